"""minilm.data.library: a tokenizer.json can do no harm. Panics become ValueError, and what would
take all memory, lose a token or draw at random is refused or switched off."""

import base64
import json

import numpy as np
import pytest

from minilm.data.library import called
from minilm.data.tokenizers import load_tokenizer
from minilm.files import FormatError, write_json

pytest.importorskip("tokenizers")
VOCAB = {"a": 0, "b": 1, "ab": 2, "[UNK]": 3}
END = {"id": 4, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
       "normalized": False, "special": True}
BPE = {"type": "BPE", "vocab": VOCAB, "merges": [["a", "b"]], "unk_token": "[UNK]"}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
STRIP = {"type": "Sequence", "decoders": [
    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]}
TRIE = np.zeros(256, "<u4")  # of one letter, a: to the text at 0
TRIE[0], TRIE[0x60] = 1 << 10, ord("a") | 1 << 8 | 1 << 10
TWICE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.fixture
def load(tmp_path):
    def load(**parts):
        fields = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
                  "added_tokens": [END], "pre_tokenizer": None, "post_processor": None,
                  "decoder": None, "model": BPE}
        write_json(tmp_path / "tokenizer.json", fields | parts)
        return load_tokenizer(tmp_path / "tokenizer.json")

    return load


def test_a_panic_while_encoding_is_a_value_error(load):
    tokenizer = load(pre_tokenizer=SPLIT)
    assert tokenizer.encode("ab").tolist() == [2]
    with pytest.raises(ValueError, match=r"cannot encode .*retry-limit"):
        tokenizer.encode("a" * 60 + "b")


def test_a_panic_while_decoding_is_a_value_error(load):
    tokenizer = load(decoder=STRIP)
    with pytest.raises(ValueError, match=r"cannot decode .*index out of bounds"):
        tokenizer.decode([4])


def test_what_ends_the_program_is_no_value_error():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        called("x", stop)


def test_two_tokens_with_one_id_are_refused(load):
    """Saved, one of them would be gone."""
    with pytest.raises(FormatError, match=r"the tokens '\w+' and '\w+' have the same id 1"):
        load(model=BPE | {"vocab": VOCAB | {"ab": 1}})


def test_gaps_between_ids_have_a_limit(load, tmp_path):
    """Saving goes through all ids: two billion of them take all memory."""
    tokenizer = load(model=BPE | {"vocab": VOCAB | {"far": 2**16}})
    assert tokenizer.vocab_size == 2**16 + 1
    tokenizer.save(tmp_path / "again.json")
    assert load_tokenizer(tmp_path / "again.json").vocab_size == 2**16 + 1
    with pytest.raises(FormatError, match="6 tokens have ids up to 2147483640: too many"):
        load(model=BPE | {"vocab": VOCAB | {"far": 2**31 - 8}})


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_steps_that_make_much_of_little_are_refused(load, part):
    """Forty steps that each double the letters: 2^40 letters of one."""
    def chain(steps):
        return {"type": "Sequence", f"{part}s": steps}

    tokenizer = load(**{part: chain([TWICE] * 3)})
    if part == "normalizer":
        assert tokenizer.encode("a").tolist() == [0] * 8
    for steps in ([TWICE] * 40, [chain([TWICE] * 20)] * 2, [TWICE | {"content": "a" * 200}] * 2):
        with pytest.raises(FormatError, match="letters of one, expected at most 10000"):
            load(**{part: chain(steps)})


def test_templates_that_repeat_the_text_are_refused(load):
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [text] * 300, "pair": [text],
                "special_tokens": {}}
    load(post_processor=template)
    with pytest.raises(FormatError, match=r"9e\+04 letters of one"):
        load(post_processor={"type": "Sequence", "processors": [template] * 2})


def test_templates_of_too_many_tokens_are_refused(load):
    """A file of 30 kB that put a billion tokens around each text."""
    def frame(ids, times):
        tokens = {"</s>": {"id": "</s>", "ids": [4] * ids, "tokens": ["</s>"] * ids}}
        return {"type": "TemplateProcessing", "pair": [], "special_tokens": tokens,
                "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * times}

    assert load(post_processor=frame(3, 20)).prompt("ab").tolist() == [4] * 60
    with pytest.raises(FormatError, match=r"9e\+04 letters of one"):
        load(post_processor=frame(300, 300))


def test_a_frame_of_ids_without_a_token_is_refused(load):
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}

    def frame(id):
        tokens = {"</s>": {"id": "</s>", "ids": [id], "tokens": ["</s>"]}}
        return {"type": "TemplateProcessing", "single": [end, text], "pair": [text],
                "special_tokens": tokens}

    assert load(post_processor=frame(4)).prompt("ab").tolist() == [4, 2]
    with pytest.raises(FormatError, match="gives the id 4294967295, which no token has"):
        load(post_processor=frame(2**32 - 1))


def test_encoding_is_never_random(load, tmp_path):
    tokenizer = load(model=BPE | {"dropout": 0.5})
    assert {tuple(tokenizer.encode("abab")) for _ in range(20)} == {(2, 2)}
    tokenizer.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["model"]["dropout"] is None




def mapped(texts: bytes):
    """A normalizer that makes the first of texts, which zero bytes end, of each a."""
    data = TRIE.nbytes.to_bytes(4, "little") + TRIE.tobytes() + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def test_a_map_of_letters_that_grows_too_much_is_refused(load):
    """One of 40 kB made gigabytes of a page."""
    assert load(normalizer=mapped(b"ab\0" * 10_000)).encode("aba").tolist() == [2, 1, 2]
    with pytest.raises(FormatError, match=r"4e\+04 letters of one, expected at most 10000"):
        load(normalizer=mapped(b"ab" * 20_000))
    with pytest.raises(FormatError, match=r"2e\+04 letters of one"):
        load(normalizer={"type": "Sequence", "normalizers": [mapped(b"b" * 100 + b"\0"),
                                                             mapped(b"a" * 200 + b"\0b\0")]})
