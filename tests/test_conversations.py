"""Conversations to learn from: each answer is a target, after the tokens that ask for it, and
nothing else is; files and templates that do not fit are refused with their place."""

import json
import os

import numpy as np
import pytest
from chat_templates import GENERATION, TEMPLATES, byte_level, with_spaces, write_folder

from minilm.data import (
    IGNORED,
    ByteTokenizer,
    Record,
    answer_rows,
    encode,
    filled,
    holds_conversations,
    load_chat,
    load_conversations,
    opening,
    plain,
    split_records,
)
from minilm.files import FormatError

WORDS, SPACED, BYTES = byte_level(), with_spaces(), ByteTokenizer()
TALK = [{"role": role, "content": text} for role, text in [
    ("user", "Who sat?"), ("assistant", "the cat"), ("user", "naïve 😀?"),
    ("assistant", "café on"), ("user", "So?")]]
SYSTEM = [{"role": "system", "content": "Be brief."}]
PLAIN_CHATML = GENERATION.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """{kind: its chat} for a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    write_folder(folder, WORDS)
    sources = TEMPLATES | {"same": PLAIN_CHATML}
    return lambda tokenizer, kind: load_chat(folder, tokenizer, {"default": sources[kind]})


def wanted(tokenizer, row):
    return tokenizer.decode(row[1][row[1] != IGNORED])


@pytest.mark.parametrize("tokenizer", [WORDS, SPACED], ids=["bytes", "spaces"])
@pytest.mark.parametrize("kind, end", [
    ("chatml", "<|im_end|>"), ("llama2", "</s>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>"),
    ("zephyr", "</s>"), ("gemma", "<end_of_turn>"), ("same", "<|im_end|>")])
def test_each_answer_follows_the_tokens_that_ask_for_it(chats, tokenizer, kind, end):
    """All turns are in one row, and its tokens are those of the text."""
    chat = chats(tokenizer, kind)
    ((tokens, targets),) = answer_rows([TALK], chat, (), 999)
    assert tokens.dtype == targets.dtype == np.int32 and len(tokens) == len(targets)
    whole = tokenizer.marked(chat.text(TALK[:4]))
    assert tokens.tolist() == whole[:-1].tolist()
    learned = targets != IGNORED
    assert (targets[learned] == whole[1:][learned]).all()
    starts = np.flatnonzero(learned & ~np.append(False, learned[:-1]))
    assert [len(chat.prompt(TALK[:i])) - 1 for i in (1, 3)] == starts.tolist()
    spelled = ["".join(tokenizer.decode(part)).strip() for part in
               np.split(targets[learned], np.cumsum(learned)[starts[1:] - 1])]
    assert spelled == ["the cat", "café on"]
    ends = [targets[i] for i in np.flatnonzero(learned & ~np.append(learned[1:], False))]
    assert ends == [tokenizer.special[end]] * 2


@pytest.mark.parametrize("kind, messages", [("thinking", TALK), ("mistral", SYSTEM + TALK)])
def test_where_a_template_writes_earlier_turns_otherwise_each_has_a_row(chats, kind, messages):
    chat = chats(WORDS, kind)
    rows = answer_rows([messages], chat, (), 999)
    assert len(rows) == 2
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for (tokens, targets), i in zip(rows, places):
        asked = chat.prompt(messages[:i])
        assert tokens[: len(asked)].tolist() == asked.tolist()
        assert (targets[: len(asked) - 1] == IGNORED).all()
        said = targets[len(asked) - 1 :]
        think = "<think>\n\n</think>\n\n" * (kind == "thinking")
        assert WORDS.decode(said[said != IGNORED]) == think + messages[i]["content"]


def test_what_is_asked_finds_what_the_template_marks(chats):
    """The same template with and without {% generation %}, on messages of any characters."""
    rng, letters = np.random.default_rng(0), [*"abé😀<>|_", " ", "the", "<|im_end|>", "\n\n"]
    def text(): return "".join(rng.choice(letters, rng.integers(8)))
    talks = [[{"role": role, "content": text()} for role in ("user", "assistant") * turns]
             for turns in rng.integers(1, 4, 50)]
    marked = answer_rows(talks, chats(WORDS, "generation"), (), 999)
    found = iter(answer_rows(talks, chats(WORDS, "same"), (), 999))
    apart = 0
    for talk, (tokens, targets) in zip(talks, marked, strict=True):
        said = "".join(m["content"] for m in talk if m["role"] == "assistant")
        if any(m["content"].startswith("\n") for m in talk if m["role"] == "assistant"):
            continue  # a token spans the border
        assert wanted(WORDS, (tokens, targets)) == said.replace("<|im_end|>", "")
    whole = [a.tolist() for row in marked for a in row]
    asked = [a.tolist() for row in found for a in row]
    apart = [i for i, row in enumerate(whole) if row not in asked]
    assert len(apart) < len(whole) / 4


@pytest.mark.peers
@pytest.mark.parametrize("tokenizer", [WORDS, SPACED], ids=["bytes", "spaces"])
def test_marked_answers_are_transformers(tmp_path, tokenizer):
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    folder = write_folder(tmp_path, tokenizer, GENERATION)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    said = theirs.apply_chat_template(TALK[:4], return_assistant_tokens_mask=True,
                                      return_dict=True)
    chat = load_chat(folder, tokenizer, {"default": GENERATION})
    ((tokens, targets),) = answer_rows([TALK], chat, (), 999)
    assert tokens.tolist() == said["input_ids"][:-1]
    assert (targets != IGNORED).tolist() == [m == 1 for m in said["assistant_masks"][1:]]


@pytest.mark.parametrize("block, said", [("th|e| cat", " the"), ("the| c|at", " cat"),
                                         ("the| cat|", " cat"), ("|the| cat", " the")])
def test_a_token_that_is_partly_in_a_block_is_an_answers(chats, block, said):
    """As in transformers."""
    for tag in ("{% generation %}", "{% endgeneration %}"):
        block = block.replace("|", tag, 1)
    chat = chats(WORDS, "same")._replace(source="</s> " + block)
    ((tokens, targets),) = answer_rows([TALK], chat, (), 99)
    assert wanted(WORDS, (tokens, targets)) == said
    assert WORDS.tokenizer.encode(" the cat").tokens == ["Ġthe", "Ġcat"]


@pytest.mark.parametrize("tokenizer", [WORDS, SPACED, BYTES])
def test_the_plain_template_teaches_what_records_teach(tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    (tmp_path / "tokenizer_config.json").unlink()
    chat = load_chat(tmp_path, tokenizer, {"default": plain(tokenizer)})
    rows = answer_rows([TALK[:2]], chat, (), 999)
    expected = encode([Record("Who sat?", "", "the cat")], tokenizer)
    assert [a.tolist() for a in filled(rows)] == [a.tolist() for a in expected]


def test_the_ends_of_the_model_end_an_answer_too(chats):
    """A template's own end may be no special token."""
    chat = chats(BYTES, "loops")._replace(source="{% for m in messages %}{{ m.content }}.\n"
                                          "{% endfor %}")
    ((_, targets),) = answer_rows([TALK[:2]], chat, [ord(".")], 999)
    assert wanted(BYTES, (0, targets)) == "the cat."
    with pytest.raises(ValueError, match=r"conversation 0, .* writes no end .*the cat\."):
        answer_rows([TALK[:2]], chat, [], 999)


def test_a_thought_that_only_the_question_begins_is_part_of_the_question(chats):
    """Templates of models that reason drop it from what was said."""
    chat = chats(WORDS, "same")._replace(source=PLAIN_CHATML + "{% if add_generation_prompt %}"
                                         "<think>{% endif %}")
    rows = answer_rows([TALK], chat, (), 999)
    for (tokens, targets), i in zip(rows, (1, 3), strict=True):
        asked = chat.prompt(TALK[:i])
        assert tokens[: len(asked)].tolist() == asked.tolist()
        assert wanted(WORDS, (tokens, targets)) == TALK[i]["content"]
        assert targets[len(asked) - 1] != IGNORED == targets[len(asked) - 2]


# What is wrong


@pytest.mark.parametrize("source, words", [
    ("{{ raise_exception('never') }}", "conversation 1, .*: the chat template fails: never"),
    ("{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}"
     "{% if add_generation_prompt %}Now:{% endif %}",
     r"conversation 1, .*asks for an answer with .*Now:', but then writes"),
])
def test_a_template_that_does_not_fit_is_refused(chats, source, words):
    chat = chats(WORDS, "same")._replace(
        source="{% if messages[0].content == 'x' %}" + PLAIN_CHATML + "{% else %}" + source
        + "{% endif %}")
    good = [{"role": "user", "content": "x"}, TALK[1]]
    with pytest.raises(ValueError, match=words):
        answer_rows([good, TALK, good], chat, [WORDS.special["<|im_end|>"]], 999)


def test_a_long_conversation_is_refused_not_cut(chats):
    chat = chats(WORDS, "same")
    ((tokens, _),) = answer_rows([TALK], chat, (), 999)
    assert answer_rows([TALK], chat, (), len(tokens))
    with pytest.raises(ValueError, match=rf"conversation 0, .*takes {len(tokens)} tokens, but the "
                                         rf"model's context is {len(tokens) - 1}"):
        answer_rows([TALK], chat, (), len(tokens) - 1)


def test_a_file_of_conversations(tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (TALK, SYSTEM + TALK)))
    assert load_conversations(file) == [TALK, SYSTEM + TALK] and holds_conversations(file)
    file.write_text('{"instruction": "messages", "output": "b"}')
    assert not holds_conversations(file)
    file.write_text('{"messages": [')
    assert not holds_conversations(file)


@pytest.mark.parametrize("line, words", [
    ("3", "expected the field messages alone, got 'int'"),
    ('{"messages": [], "tools": []}', r"messages alone, got \['messages', 'tools'\]"),
    ('{"messages": []}', r"messages: expected a list of some, got \[\]"),
    ('{"messages": [{"role": "user"}]}', "message 0: expected role and content"),
    ('{"messages": [{"role": "user", "content": null}]}', "message 0: .*'content': None"),
    ('{"messages": [{"role": "", "content": ""}]}', "message 0: expected role and content"),
    ('{"messages": [{"role": "user", "content": "", "name": "x"}]}', "message 0: .*'name': 'x'"),
    ('{"messages": [{"role": "user", "content": ""}]}', "no message has the role assistant"),
    ('{"messages": [', "Expecting value"),
    ("", "not valid JSON: Expecting value, at column 1"),
])
def test_a_damaged_line_is_named(tmp_path, line, words):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n" + line + "\n")
    with pytest.raises(FormatError, match=rf"t\.jsonl: line 2: .*{words}"):
        load_conversations(file)
    file.write_text("")
    with pytest.raises(FormatError, match="holds no conversation"):
        load_conversations(file)


def test_conversations_that_begin_alike_stay_together():
    talks = [[*SYSTEM, {"role": "user", "content": f"{i % 4}"}, {"role": "assistant",
              "content": f"{i}"}] for i in range(12)]
    assert opening(talks[5]) == "Be brief.\n1"
    train, held = split_records(talks, 6, prompt=opening)
    assert len(held) == 6 and not {*map(opening, train)} & {*map(opening, held)}
