"""Chat templates: what a folder says of them, what they write, what they may not do, and (marked
peers) transformers gives the same tokens for templates of the published kinds."""

import os
import subprocess
import time
from functools import partial

import numpy as np
import pytest
from chat_templates import TEMPLATES, byte_level, with_spaces, write_folder

from minilm.data import ByteTokenizer, CharTokenizer, Record, chat, load_tokenizer, prompt, sandbox
from minilm.files import FormatError, write_json

BYTES, WORDS, SPACED = ByteTokenizer(), byte_level(), with_spaces()
SYSTEM, ASK, SAID, AGAIN = ({"role": role, "content": text} for role, text in [
    ("system", " Be brief. "), ("user", "the cat\n\nsat? "), ("assistant", " the mat 😀"),
    ("user", "naïve <|im_end|> </s>")])
TALKS = {"one": [ASK], "two": [ASK, SAID], "three": [ASK, SAID, AGAIN], "system": [SYSTEM, ASK],
         "all": [SYSTEM, ASK, SAID, AGAIN, SAID], "alone": [SAID, SAID], "rules": [SYSTEM]}


def chat_of(folder, tokenizer):
    return chat.load_chat(folder, tokenizer, chat.read_templates(folder))


def written(source, **names):
    (found,) = sandbox.render(source, [names])
    return found


# What transformers gives


@pytest.fixture(scope="module")
def peer():
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


@pytest.mark.peers
@pytest.mark.parametrize("tokenizer", [WORDS, SPACED], ids=["bytes", "spaces"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_tokens_are_transformers(peer, tmp_path, kind, tokenizer):
    """With and without the start of an answer; where it raises there, it does here."""
    theirs = peer.AutoTokenizer.from_pretrained(write_folder(tmp_path, tokenizer, TEMPLATES[kind]))
    ours, raised = chat_of(tmp_path, tokenizer), 0
    for answer in (True, False):
        for found, messages in zip(ours.render(TALKS.values(), answer), TALKS.values()):
            try:
                expected = theirs.apply_chat_template(
                    messages, add_generation_prompt=answer, return_dict=False)
            except Exception as error:
                assert found.error.endswith(str(error))
                raised += 1
                continue
            assert ours.tokenizer.marked(found.text).tolist() == expected
    assert raised == {"llama2": 2, "gemma": 6}.get(kind, 0)


@pytest.mark.peers
@pytest.mark.parametrize("where", ["config", "list", "file"])
def test_the_template_is_the_one_that_transformers_takes(peer, tmp_path, where):
    folder = write_folder(tmp_path / "a", WORDS, TEMPLATES["zephyr"], where)
    ours = chat_of(folder, WORDS)
    theirs = peer.AutoTokenizer.from_pretrained(folder)
    assert theirs.get_chat_template() == ours.source == TEMPLATES["zephyr"]
    assert ours.names == theirs.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>"}
    theirs.save_pretrained(tmp_path / "b")
    assert chat_of(tmp_path / "b", WORDS)[:2] == ours[:2]
    again = write_folder(tmp_path / "c", WORDS)
    chat.write_templates(again, chat.read_templates(folder))
    theirs = peer.AutoTokenizer.from_pretrained(again)
    assert theirs.get_chat_template() == ours.source
    if where == "list":
        assert theirs.get_chat_template(tools=[{}]) == "{{ tools }}"


@pytest.mark.peers
def test_generation_blocks_are_where_transformers_sees_them(peer, tmp_path):
    theirs = peer.AutoTokenizer.from_pretrained(
        write_folder(tmp_path, WORDS, TEMPLATES["generation"]))
    messages = TALKS["all"]
    (found,) = chat_of(tmp_path, WORDS).render([messages])
    said = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids = np.array(said["input_ids"])[np.array(said["assistant_masks"]) == 1]
    spelled = "".join(found.text[start:end] for start, end in found.spans)
    assert spelled == " the mat 😀<|im_end|>" * 2
    assert WORDS.marked(spelled).tolist() == ids.tolist()


@pytest.mark.peers
@pytest.mark.parametrize("tokenizer", [BYTES, CharTokenizer.train(["the cat <|endoftext|>"])],
                         ids=["bytes", "characters"])
def test_our_own_tokenizers_find_the_marks_that_transformers_finds(peer, tmp_path, tokenizer):
    theirs = peer.AutoTokenizer.from_pretrained(write_folder(tmp_path, tokenizer))
    text = "the <|endoftext|><|mask|> cat<|endoftext|"
    found = tokenizer.marked(text).tolist()
    assert found == theirs(text, add_special_tokens=False).input_ids
    assert found.count(tokenizer.end) == found.count(tokenizer.mask) == 1


# What a folder says


def test_a_folder_may_have_no_template(tmp_path):
    assert chat.read_templates(write_folder(tmp_path, BYTES)) == {}


def test_named_templates_come_back(tmp_path):
    templates = {"default": "{{ 1 }}\n", "tool_use": "é\n", "x-1": ""}
    chat.write_templates(tmp_path, templates)
    assert chat.read_templates(tmp_path) == templates


@pytest.mark.parametrize("value, words", [
    (3, "chat_template is 3, expected a text or a list"),
    ([3], "chat_template has 3, expected name and template"),
    ([{"name": "../../x", "template": ""}], r".*'\.\./\.\./x'.*expected name and template"),
])
def test_a_damaged_template_is_refused(tmp_path, value, words):
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(FormatError, match=rf"tokenizer_config\.json: {words}"):
        chat.read_templates(tmp_path)


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"chat_template\.jinja: not UTF-8"):
        chat.read_templates(tmp_path)


def test_without_a_default_the_names_are_told(tmp_path):
    with pytest.raises(FormatError, match=r"\['rag', 'tool_use'\], expected one named default"):
        chat.load_chat(tmp_path, BYTES, {"tool_use": "", "rag": ""})


def test_older_folders_name_their_tokens_elsewhere(tmp_path):
    write_folder(tmp_path, WORDS)
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": {"content": "<|im_end|>"}})
    assert chat.read_names(tmp_path, WORDS) == {"bos_token": "<|im_end|>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    assert chat.read_names(tmp_path, BYTES) == {"eos_token": "<|endoftext|>"}


@pytest.mark.parametrize("kind, mark", [
    ("chatml", "<|im_end|>"), ("llama2", "</s>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>"),
    ("zephyr", "</s>"), ("gemma", "<end_of_turn>"), ("thinking", "<|im_end|>"), ("loops", "</s>")])
def test_what_ends_an_answer(tmp_path, kind, mark):
    found = chat_of(write_folder(tmp_path, WORDS, TEMPLATES[kind]), WORDS).closing()
    assert found == (WORDS.special[mark],)


@pytest.mark.parametrize("source", ["{{ messages[1].content }}.", "no", "{{ raise_exception() }}"])
def test_nothing_may_end_an_answer(tmp_path, source):
    assert chat_of(write_folder(tmp_path, WORDS, source), WORDS).closing() == ()


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS, SPACED, CharTokenizer.train(["Sum 1+\n->"])])
@pytest.mark.parametrize("frame", [False, True])
def test_the_plain_template_asks_as_records_do(tmp_path, tokenizer, frame):
    if frame and tokenizer in (WORDS, SPACED):
        raw = tokenizer.fields()
        raw["post_processor"] = {
            "type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [tokenizer.special["<s>"]],
                                       "tokens": ["<s>"]}}}
        write_json(tmp_path / "framed.json", raw)
        tokenizer = load_tokenizer(tmp_path / "framed.json")
    write_folder(tmp_path, tokenizer)
    ours = chat.load_chat(tmp_path, tokenizer, {"default": chat.plain(tokenizer)})
    asked = tokenizer.prompt(prompt(Record("Sum 1+1", "", "1")))
    assert (asked[0] == tokenizer.special.get("<s>")) == (frame and "<s>" in tokenizer.special)
    assert ours.prompt([{"role": "user", "content": "Sum 1+1"}]).tolist() == asked.tolist()


# Templates are somebody else's programs


@pytest.mark.parametrize("source, words", [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
     "takes more than 0.2 s"),
    ("{% set x = 10 ** (10 ** 9) %}", "takes more than 0.2 s"),
    ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
     "writes more than 16,777,216 characters"),
    ("{{ 'x' * 10 ** 12 }}", "needs more than 1024 MiB"),
    ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    ("{{ namespace(__class__=1) }}", "a namespace may not have '__class__'"),
    ("{{ namespace({'_x': 1}) }}", "a namespace may not have '_x'"),
    ("{% set n = namespace() %}{% set n._x = 1 %}", "a namespace may not have '_x'"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("a\n{% for %}", "line 2: "),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ raise_exception('é <so>') }}", "é <so>"),
    ("{{ messages[0].content.name() }}", "UndefinedError: 'str object' has no attribute 'name'"),
    ("{{ nothing.name }}", "UndefinedError: 'nothing' is undefined"),
])
def test_what_a_template_may_not_do(monkeypatch, source, words):
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    start = time.perf_counter()
    assert words in (found := written(source, messages=[ASK])).error and not found.text
    assert time.perf_counter() - start < 5


def test_one_that_fails_does_not_end_the_others(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    source = "{% if x %}{{ x / 0 }}{% endif %}a"
    assert [f.text for f in sandbox.render(source, [{"x": 0}, {"x": 1}, {}])] == ["a", "", "a"]
    source = "{% for i in range(x) %}{% for j in range(x) %}{% endfor %}{% endfor %}a"
    found = sandbox.render(source, [{"x": 0}, {"x": 99999}, {"x": 0}])
    assert [f.text for f in found] == ["a", "", ""]
    assert [f.error for f in found] == ["", *["takes more than 0.2 s"] * 2]


def test_without_jinja_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(sandbox, "OLDEST", (99, 0, 0))
    monkeypatch.setattr(sandbox.subprocess, "run", partial(said, '{"error": "no jinja2"}'))
    with pytest.raises(ImportError, match=r'jinja2 of version 99.0.0 or later: .*minilm\[chat\]'):
        written("a")


def said(words, *asked, **settings):
    return subprocess.CompletedProcess(asked, 0, words.encode())
