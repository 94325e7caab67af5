"""Where a text begins and ends: ids that a folder names are read, kept and stopped at, and (marked
peers) transformers reads what is written and does the same with the same folder."""

import importlib
import json
import os
from dataclasses import replace

import finetune
import generate as script
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.data import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    InstructionBatches,
    Record,
    load_tokenizer,
    pack,
    printable,
)
from minilm.distill import student_from_teacher
from minilm.files import FormatError, read_json, write_json
from minilm.generate import generate
from minilm.interop import bitsandbytes, huggingface
from minilm.interop.ends import describe_ends
from minilm.measure.answers import answers
from minilm.peft import add_lora, merge_lora, unload_lora
from minilm.quantize import quantize_model
from minilm.transformer import Config, Ends, Transformer

TEXT = "naïve 数学 😀\n\x00 the  cat, at the\n"
SMALL = dict(vocab_size=80, context=32, layers=1, heads=2, width=16)
CONFIGS = {"gpt2": Config.gpt2(**SMALL), "llama": Config.llama(**SMALL, hidden=64),
           "bert": Config.bert(**SMALL, hidden=64),
           "distilbert": Config.bert(**SMALL, hidden=64, segments=0)}
CHAT, NO_ENDS = Ends(50, (60, 70), 51), Ends()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def folder_of(path, config=None, generation=None, family="llama"):
    """A model's folder with these fields in its two files."""
    huggingface.save_model(Transformer(CONFIGS[family]), path)
    raw = {k: v for k, v in read_json(path / "config.json").items() if not k.endswith("token_id")}
    write_json(path / "config.json", raw | (config or {}))
    if generation is not None:
        write_json(path / "generation_config.json", generation)
    return path


def ids(bos, eos, pad):
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


@pytest.mark.parametrize("config, generation, expected", [
    ({}, None, Ends()),
    (ids(None, None, None), {}, Ends()),
    (ids(50, [60, 70], 51), None, CHAT),
    (ids(50, 60, 51), {"eos_token_id": [60, 70]}, CHAT),
    (ids(1, 2, 3), ids(50, [60, 70], 51), CHAT),
    (ids(50, 60, -1), {"temperature": 0.6}, Ends(50, ())),  # -1 was none in older files
    (ids(0, 0, 0), None, Ends(0, (0,), 0)),
    (ids(50256, 50256, None), None, Ends(50256, (50256,))),  # GPT-2's, of a smaller vocabulary
])
def test_what_a_folder_names_is_read(tmp_path, config, generation, expected):
    assert huggingface.load_model(folder_of(tmp_path, config, generation)).ends == expected


@pytest.mark.parametrize("file", ["config", "generation_config"])
@pytest.mark.parametrize("field, value", [
    ("eos_token_id", "60"), ("eos_token_id", [60, None]), ("eos_token_id", [[60]]),
    ("eos_token_id", 1.5), ("eos_token_id", True), ("eos_token_id", 10**30),
    ("bos_token_id", [50]), ("pad_token_id", {}),
])
def test_what_is_no_id_is_refused(tmp_path, file, field, value):
    folder_of(tmp_path, **{"config" if file == "config" else "generation": {field: value}})
    with pytest.raises(FormatError, match=rf"{file}\.json: {field} is ") as error:
        huggingface.load_model(tmp_path)
    assert "expected an id" in str(error.value)


def test_a_generation_config_without_fields_is_refused(tmp_path):
    for content in ("[]", "7", "{"):
        folder_of(tmp_path)
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(FormatError, match=r"generation_config\.json"):
            huggingface.load_model(tmp_path)


some_ids = st.integers(0, 99)


@given(bos=st.none() | some_ids, eos=st.lists(some_ids, max_size=3), pad=st.none() | some_ids)
def test_ends_come_back(tmp_path_factory, bos, eos, pad):
    """From either file alone."""
    folder, ends = tmp_path_factory.getbasetemp() / "back", Ends(bos, tuple(eos), pad)
    for config, generation in ((describe_ends(ends), None), ({}, describe_ends(ends))):
        (folder / "generation_config.json").unlink(missing_ok=True)
        assert huggingface.load_model(folder_of(folder, config, generation)).ends == ends


@pytest.mark.parametrize("family", CONFIGS)
def test_they_survive_loading_and_saving(tmp_path, family):
    folder_of(tmp_path / "a", ids(50, 60, 51), {"eos_token_id": [60, 70]}, family)
    huggingface.save_model(huggingface.load_model(tmp_path / "a"), tmp_path / "b")
    assert read_json(tmp_path / "b" / "config.json").items() >= ids(50, [60, 70], 51).items()
    assert read_json(tmp_path / "b" / "generation_config.json") == ids(50, [60, 70], 51)
    assert huggingface.load_model(tmp_path / "b").ends == CHAT


def test_they_survive_what_is_done_to_a_model(tmp_path):
    def loaded():
        return huggingface.load_model(tmp_path / "a")

    folder_of(tmp_path / "a", ids(50, [60, 70], 51))
    assert student_from_teacher(loaded(), [0]).ends == CHAT
    assert unload_lora(merge_lora(add_lora(loaded(), 2, 4))).ends == CHAT
    assert loaded().astype("float16").ends == CHAT
    bitsandbytes.save_model(quantize_model(loaded(), "nf4"), tmp_path / "b")
    assert bitsandbytes.load_model(tmp_path / "b").ends == CHAT
    assert read_json(tmp_path / "b" / "config.json")["eos_token_id"] == [60, 70]


def test_an_older_models_ends_do_not_stay_in_its_folder(tmp_path):
    folder_of(tmp_path, generation=ids(50, [60, 70], 51))
    huggingface.save_model(Transformer(CONFIGS["llama"]), tmp_path)
    assert huggingface.load_model(tmp_path).ends == Ends()
    assert read_json(tmp_path / "config.json").items() >= ids(None, None, None).items()


# Tokenizers in a model's folder

TOKENIZERS = {"bytes": ByteTokenizer(), "chars": CharTokenizer("".join(sorted(set(TEXT)))),
              "bpe": BPETokenizer.train([TEXT] * 3, 300)}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_model_saved_with_its_tokenizer_names_its_end(tmp_path, kind):
    """Not the end of the architecture's first model, such as GPT-2's 50256 or Llama's 2."""
    tokenizer = TOKENIZERS[kind]
    huggingface.save_model(Transformer(CONFIGS["gpt2"]), tmp_path, tokenizer)
    assert read_json(tmp_path / "config.json").items() >= ids(None, tokenizer.end, None).items()
    assert huggingface.load_model(tmp_path).ends == Ends(eos=(tokenizer.end,))
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(again) is type(tokenizer) and again.vocab_size == tokenizer.vocab_size
    assert read_json(tmp_path / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}


def framed(path, after="", **fields):
    """Byte-level BPE whose post-processor puts <s> in front of a text; its file."""
    import tokenizers

    library = BPETokenizer.train([TEXT] * 3, 300).tokenizer
    library.add_special_tokens(["<s>", "</s>", "<|end|>", "<pad>"])
    special = [(name, library.token_to_id(name)) for name in ("<s>", "</s>")]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"<s> $A{after}", special_tokens=special)
    path.mkdir(exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    return load_tokenizer(path / "tokenizer.json")


def test_a_models_own_ends_win(tmp_path):
    """And the tokenizer's names follow them."""
    tokenizer, model = framed(tmp_path), Transformer(CONFIGS["llama"])
    bos, end, pad = (tokenizer.special[name] for name in ("<s>", "<|end|>", "<pad>"))
    model.ends = Ends(bos, (end, 70), pad)
    huggingface.save_model(model, tmp_path, tokenizer)
    assert huggingface.load_model(tmp_path).ends == model.ends
    named = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>",
             "mask_token": "<|mask|>"}
    assert read_json(tmp_path / "tokenizer_config.json").items() >= named.items()
    model.ends = Ends(eos=(50256,))  # no token
    huggingface.save_model(model, tmp_path, tokenizer)
    assert read_json(tmp_path / "tokenizer_config.json")["eos_token"] == "<|endoftext|>"


def test_a_post_processor_frames_prompts_alone(tmp_path):
    tokenizer = framed(tmp_path)
    bos = tokenizer.special["<s>"]
    assert tokenizer.prompt(TEXT).tolist() == [bos, *tokenizer.encode(TEXT)]
    assert tokenizer.prompt("").tolist() == [bos] and tokenizer.prompt(TEXT).dtype == np.int32
    assert bos not in tokenizer.encode("<s> the")
    assert tokenizer.decode(tokenizer.prompt(TEXT)) == TEXT
    assert bos not in pack([TEXT], tokenizer)
    bare = load_tokenizer(tmp_path / "tokenizer.json", framed=False)
    assert np.array_equal(bare.prompt(TEXT), tokenizer.encode(TEXT))
    bare.save(tmp_path / "bare.json")  # what is trained on bare text is asked with bare text
    assert read_json(tmp_path / "bare.json")["post_processor"] is None
    for tokenizer in TOKENIZERS.values():
        assert np.array_equal(tokenizer.prompt(TEXT), tokenizer.encode(TEXT))


def test_instructions_are_learned_and_asked_alike(tmp_path, monkeypatch):
    """With <s> in front, as whoever asks the model later puts it there."""
    tokenizer, record = framed(tmp_path), Record("the cat", "", "at")
    asked = tokenizer.prompt("the cat\n-> ")
    tokens, _ = InstructionBatches([record], tokenizer, 1, None, 0)[0]
    assert tokens[0, : len(asked)].tolist() == asked.tolist()
    prompts = []

    def stream(model, tokens, temperature, seed):
        prompts.extend(tokens)
        yield np.array([tokenizer.end])

    monkeypatch.setattr(importlib.import_module("minilm.measure.answers"), "stream", stream)
    assert answers(None, [record], tokenizer) == [""]
    assert np.array_equal(prompts, [asked])


def test_a_model_learns_to_end_as_its_folder_says(tmp_path, monkeypatch):
    """A chat model's answers end with another token than its documents."""
    tokenizer = framed(tmp_path)
    end, mask = tokenizer.special["<|end|>"], tokenizer.mask
    model = Transformer(Config.llama(tokenizer.vocab_size, 64, 1, 2, 16, hidden=32))
    for eos, expected in (((end, 70), end), ((tokenizer.end, end), tokenizer.end),
                          ((50256, mask), tokenizer.end), ((), tokenizer.end)):
        model.ends, learned = Ends(eos=eos), []
        huggingface.save_model(model, tmp_path, tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "finetune",
                          lambda *args: learned.append(args[5].batches[0][1]))
            finetune.main(finetune.Settings(model=str(tmp_path), known=(), train=4, test=1, batch=2,
                                            data=("reverse",)), tmp_path / "runs")
        assert all(row[row >= 0][-1] == expected for row in learned[0])


@given(text=st.text(), extra=st.lists(st.integers(300, 2**40), max_size=3))
def test_ids_that_name_no_token_are_no_text(text, extra):
    tokenizer = TOKENIZERS["bytes"]
    tokens = [*tokenizer.encode(text).tolist(), *extra]
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens[: len(tokens) - len(extra)]) == text
    tokens = np.array([*tokens, 2**64 - 1], np.uint64)
    assert tokenizer.decode(tokens) == text


def test_their_files_are_read_without_the_library(tmp_path, monkeypatch):
    for tokenizer in (TOKENIZERS["bytes"], TOKENIZERS["chars"]):
        tokenizer.save(tmp_path / "tokenizer.json")
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, "tokenizers", None)
            again = load_tokenizer(tmp_path / "tokenizer.json")
        assert type(again) is type(tokenizer) and again.fields() == tokenizer.fields()


@pytest.mark.parametrize("raw, text", [({"minilm_tokenizer": "bytes"}, "é\0"), (
    {"minilm_tokenizer": "characters", "alphabet": "abé"}, "éa")])
def test_version_0_1s_files_are_read(tmp_path, raw, text):
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["bytes", "chars"])
def test_the_library_reads_them_alike(tmp_path, kind):
    """Also if one field differs, so that it is not ours any more."""
    tokenizer = TOKENIZERS[kind]
    raw = tokenizer.fields()
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": tokenizer.vocab_size,
                                                         "content": "<more>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    other = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(other) is BPETokenizer and other.vocab_size == tokenizer.vocab_size + 1
    assert (other.end, other.mask) == (tokenizer.end, tokenizer.mask)
    assert np.array_equal(other.encode(TEXT), tokenizer.encode(TEXT))
    assert other.decode(tokenizer.encode(TEXT)) == TEXT
    if kind == "chars":
        with pytest.raises(ValueError, match="cannot encode the text 'cat€'"):
            other.encode("cat€")


# scripts/generate.py


def lively(path, tokenizer, ends=NO_ENDS, V=None, seed=0):
    """A model that writes varied text, in a folder with its tokenizer."""
    model = Transformer(Config.llama(V or tokenizer.vocab_size, 64, 1, 2, 16, hidden=32))
    rng = np.random.default_rng(seed)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.5, t.shape).astype(np.float32)
    model.ends = ends
    huggingface.save_model(model, path)
    tokenizer.save(path / "tokenizer.json")
    return model.eval()


def written(capsys, folder, prompt, tokens=30):
    script.main(folder, prompt, tokens, temperature=0)
    return capsys.readouterr().out


def test_the_script_stops_at_each_of_the_ends(tmp_path, capsys):
    tokenizer = framed(tmp_path)
    model = lively(tmp_path, tokenizer)
    asked = tokenizer.prompt("the")
    free = generate(model, asked[None], 30, 0)[0, len(asked):].tolist()
    first = next(i for i in range(3, 30) if free.index(free[i]) == i)  # it comes there first
    for eos in ((free[first],), (399, free[first]), (free[first], 50256)):
        lively(tmp_path, tokenizer, Ends(eos=eos))
        expected = tokenizer.decode([*asked, *free[:first]])
        assert written(capsys, tmp_path, "the") == printable(expected) + "\n"
    lively(tmp_path, tokenizer, Ends(eos=(50256,)))  # comes never: the tokenizer's end counts
    expected = tokenizer.decode([*asked, *free])
    assert tokenizer.end not in free
    assert written(capsys, tmp_path, "the") == printable(expected) + "\n"


def test_an_empty_prompt_begins_as_the_folder_says(tmp_path, capsys):
    tokenizer = TOKENIZERS["bpe"]
    for bos, first in ((7, 7), (None, tokenizer.end), (50256, tokenizer.end)):
        model = lively(tmp_path, tokenizer, Ends(bos=bos))
        new = generate(model, [[first]], 12, 0)[0, 1:].tolist()
        new = new[: new.index(tokenizer.end)] if tokenizer.end in new else new
        expected = tokenizer.decode([first, *new])[len(tokenizer.decode([first])):]
        assert written(capsys, tmp_path, "", 12) == printable(expected) + "\n"


def test_a_table_of_more_rows_than_tokens_writes_on(tmp_path, capsys):
    tokenizer = ByteTokenizer()
    model = lively(tmp_path, tokenizer, V=1000)
    drawn = generate(model, tokenizer.encode("the")[None], 30, 0)[0]
    assert (drawn >= tokenizer.vocab_size).sum() > 5
    expected = tokenizer.decode(drawn[drawn < 256])
    assert written(capsys, tmp_path, "the") == printable(expected) + "\n"


# Against transformers


@pytest.mark.peers
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_peer_loads_every_tokenizer(peer, tmp_path, family, kind):
    tokenizer = TOKENIZERS[kind]
    huggingface.save_model(Transformer(CONFIGS[family]), tmp_path, tokenizer)
    theirs = peer[1].AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.mask_token_id) == (tokenizer.end, tokenizer.mask)
    assert len(theirs) == tokenizer.vocab_size
    found = theirs(TEXT).input_ids
    assert found == tokenizer.encode(TEXT).tolist()
    assert theirs.decode([*found, 10**6]) == tokenizer.decode([*found, 10**6]) == TEXT
    if kind == "chars":
        with pytest.raises(Exception, match="UNK"):
            theirs("€")
    theirs.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again" / "tokenizer.json")
    assert again.encode(TEXT).tolist() == found and again.end == tokenizer.end


@pytest.mark.peers
@pytest.mark.parametrize("family", CONFIGS)
def test_peer_reads_the_ends(peer, tmp_path, family):
    _, transformers = peer
    folder_of(tmp_path / "a", ids(50, 60, 51), {"eos_token_id": [60, 70]}, family)
    model = huggingface.load_model(tmp_path / "a")
    for ends in (CHAT, Ends()):
        model.ends = ends
        if family != "gpt2":  # the embedding knows the id too: another fact, in the same field
            model.config = replace(model.config, padding=ends.pad)
            model.embed.padding = ends.pad
        huggingface.save_model(model, tmp_path / "b")
        architecture = read_json(tmp_path / "b" / "config.json")["architectures"][0]
        theirs = getattr(transformers, architecture).from_pretrained(tmp_path / "b")
        readers = "config generation_config" if theirs.can_generate() else "config"
        for config in (getattr(theirs, reader) for reader in readers.split()):
            eos = config.eos_token_id
            assert (config.bos_token_id, config.pad_token_id) == (ends.bos, ends.pad)
            assert (tuple(eos) if isinstance(eos, list) else eos) == (ends.eos or None)


@pytest.mark.peers
@pytest.mark.parametrize("where", ["config", "generation_config", "config, unseen"])
def test_peer_ends_and_fills_the_same_rows(peer, tmp_path, where):
    torch, transformers = peer
    tokenizer = TOKENIZERS["bytes"]
    model, tokens = lively(tmp_path, tokenizer), np.array([[5, 6, 7], [70, 80, 90], [1, 2, 3]])
    free = generate(model, tokens, 20, 0)[:, 3:]
    for eos, pad in (([int(free[0, 6]), int(free[1, 3])], 9), (int(free[2, 8]), None)):
        raw = read_json(tmp_path / "config.json") | ids(None, None, None)
        given = {"eos_token_id": eos, "pad_token_id": pad}
        write_json(tmp_path / "config.json", raw | (given if where.startswith("config") else {}))
        if where != "config":
            write_json(tmp_path / "generation_config.json",
                       given if where == "generation_config" else {"pad_token_id": pad})
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        expected = theirs.generate(torch.tensor(tokens), max_new_tokens=20, do_sample=False,
                                   attention_mask=torch.ones(3, 3, dtype=torch.long))
        found = generate(huggingface.load_model(tmp_path), tokens, 20, 0)
        assert np.array_equal(found, expected.numpy())


@pytest.mark.peers
@pytest.mark.parametrize("after", ["", " </s>"])
@pytest.mark.parametrize("seed", range(3))
def test_peer_writes_the_same_text(peer, tmp_path, capsys, seed, after):
    """A folder with <s> in front, several ends, and more rows than tokens."""
    _, transformers = peer
    tokenizer, V = framed(tmp_path, after), 400
    asked = tokenizer.prompt("the cat")
    free = generate(lively(tmp_path, tokenizer, V=V, seed=seed), asked[None], 30, 0)
    free = free[0, len(asked):].tolist()
    assert max(free) >= tokenizer.vocab_size
    lively(tmp_path, tokenizer, Ends(eos=(free[20], 399)), V, seed)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    inputs = names("the cat", return_tensors="pt", return_token_type_ids=False)
    assert np.array_equal(inputs.input_ids[0], asked)
    new = theirs.generate(**inputs, max_new_tokens=30, do_sample=False, pad_token_id=0)[0]
    if new[-1] in (free[20], 399):
        new = new[:-1]  # the end itself is no text
    expected = names.decode(new, skip_special_tokens=True)
    assert written(capsys, tmp_path, "the cat") == printable(expected) + "\n"
