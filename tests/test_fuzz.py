"""Whatever a file holds, it loads, or FormatError says what is wrong: fuzzing.py says the rules.

In the plain tests each format gets a few inputs. The long form has as many as one likes:

    FUZZ=10000 FUZZ_SEED=1 .venv/bin/python -m pytest tests/test_fuzz.py -n 0
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import pytest
from fuzzing import Format, fuzz
from report import picture

from minilm import checkpoint, data
from minilm.data.instructions import load_records, save_records
from minilm.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
from minilm.files import write_json
from minilm.interop import bitsandbytes, huggingface, peft
from minilm.measure.verdict import verdict
from minilm.nn import Module, parameter
from minilm.optim import AdamW, LossScaler
from minilm.peft import add_adalora, add_dora, add_ia3, add_lora, unload_lora
from minilm.quantize import quantize_model
from minilm.results import Result, table, verdicts
from minilm.run import RunDirectory
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Ends, Transformer

INPUTS, SEED = int(os.environ.get("FUZZ", 60)), int(os.environ.get("FUZZ_SEED", 0))
TINY = dict(vocab_size=11, context=5, layers=2, heads=2, width=8)
CONFIGS = {
    "gpt2": Config.gpt2(**TINY),
    "llama": Config.llama(**TINY, hidden=12, kv_heads=1),
    "bert": Config.bert(**TINY, hidden=12),
    "distilbert": Config.bert(**TINY, hidden=12, segments=0),
}
WIDE = {name: replace(CONFIGS[name], width=32, layers=1) for name in ("gpt2", "llama")}


def bits(model: Module):
    """All that a model holds."""
    facts = {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in model.state_dict().items()}
    return getattr(model, "config", None), getattr(model, "ends", None), facts


def folder_of(config: Config, **changes) -> Format:
    """A model in one file, and the ends of its texts in two. changes: of config.json."""
    def write(folder):
        model = Transformer(config)
        model.ends = Ends(5, (6, 7), 8)
        huggingface.save_model(model, folder)
        raw = json.loads((folder / "config.json").read_text()) | changes
        write_json(folder / "config.json", raw)

    return Format(write, huggingface.load_model, bits, huggingface.save_model)


def sharded(config: Config) -> Format:
    def write(folder):
        huggingface.save_model(Transformer(config), folder)
        file, names = folder / "model.safetensors", ["a.safetensors", "b.safetensors"]
        tensors = read_tensors(file)
        places = {key: names[i % 2] for i, key in enumerate(tensors)}
        file.unlink()
        for name in names:
            write_tensors(folder / name, {k: a for k, a in tensors.items() if places[k] == name})
        write_json(folder / "model.safetensors.index.json", {"weight_map": places})

    return Format(write, huggingface.load_model, bits, huggingface.save_model)


def in_4_bits(config: Config, kind: str, double: bool) -> Format:
    def write(folder):
        model = quantize_model(Transformer(config), kind, double, block_size=32)
        bitsandbytes.save_model(model, folder)

    return Format(write, bitsandbytes.load_model, bits, bitsandbytes.save_model)


def in_8_bits(config: Config) -> Format:
    def write(folder):
        bitsandbytes.save_model(quantize_model(Transformer(config), "llm.int8"), folder)

    return Format(write, bitsandbytes.load_model, bits, bitsandbytes.save_model)


def adapter_of(name: str, add) -> Format:
    """An adapter on a small model, on which it is put and from which it is taken again."""
    model = Transformer(CONFIGS[name])

    def write(folder):
        adapted = add(Transformer(CONFIGS[name]))
        for t in adapted.parameters():
            t.data += np.random.default_rng(0).standard_normal(t.shape, np.float32)
        peft.save_adapter(adapted, folder)

    def read(folder):
        unload_lora(model)
        return peft.load_adapter(model, folder)

    return Format(write, read, bits, peft.save_adapter)


def tokenizer_of(make) -> Format:
    """What it makes of texts, or that it cannot."""
    def facts(tokenizer):
        found = [tokenizer.vocab_size, tokenizer.end, tokenizer.mask]
        for text in ("", "ab ba", "A b\n  c é <|endoftext|>", "a" * 300):
            try:
                ids, asked = tokenizer.encode(text), tokenizer.prompt(text)
                found.append((ids.tolist(), asked.tolist(), tokenizer.decode(asked)))
            except ValueError:
                found.append("cannot")
        try:
            found.append(tokenizer.decode(range(min(tokenizer.vocab_size, 300))))
        except ValueError:
            found.append("cannot")
        return found

    return Format(lambda folder: make(folder / "tokenizer.json"),
                  lambda folder: load_tokenizer(folder / "tokenizer.json"), facts,
                  lambda tokenizer, folder: tokenizer.save(folder / "tokenizer.json"))


def library_tokenizer(model, **parts):
    """Writes a tokenizer.json of the library with this model."""
    def make(path):
        size = len(model["vocab"])
        ends = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}
                for i, text in enumerate(("</s>", "<mask>"), size)]
        write_json(path, {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
                          "added_tokens": ends, "pre_tokenizer": None, "post_processor": None,
                          "decoder": None, "model": model} | parts)
    return make


WORDS = {"[UNK]": 0, "a": 1, "b": 2, "##b": 3, "##a": 4, "ab": 5, "é": 6}
REPLACE = {"type": "Replace", "pattern": {"Regex": "[a-b]+c"}, "content": "x"}
BERT = dict(
    normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                "strip_accents": None, "lowercase": True},
    pre_tokenizer={"type": "BertPreTokenizer"},
    post_processor={"type": "BertProcessing", "sep": ["</s>", 7], "cls": ["[UNK]", 0]},
    decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
LLAMA = dict(
    normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {
        "type": "Replace", "pattern": {"String": " "}, "content": "▁"}, REPLACE]},
    post_processor={"type": "TemplateProcessing", "pair": [],
                    "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}},
                               {"Sequence": {"id": "A", "type_id": 0}}],
                    "special_tokens": {"</s>": {"id": "</s>", "ids": [7], "tokens": ["</s>"]}}},
    decoder={"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
SPLIT = dict(pre_tokenizer={"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": r"\s+|\w+"}, "behavior": "Isolated", "invert": False},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}]})
TOKENIZERS = {
    "bytes": ByteTokenizer().save,
    "chars": CharTokenizer("\n Aabcé").save,
    "bpe": BPETokenizer.train(["ab ba abab cab"], 262).save,
    "wordpiece": library_tokenizer({"type": "WordPiece", "unk_token": "[UNK]", "vocab": WORDS,
                                    "continuing_subword_prefix": "##",
                                    "max_input_chars_per_word": 100}, **BERT),
    "fallback": library_tokenizer({"type": "BPE", "vocab": WORDS | {"▁": 7, "<0x41>": 8},
                                   "merges": [["a", "b"]], "unk_token": "[UNK]", "dropout": None,
                                   "fuse_unk": True, "byte_fallback": True,
                                   "continuing_subword_prefix": None, "end_of_word_suffix": None,
                                   "ignore_merges": False}, **LLAMA),
    "unigram": library_tokenizer({"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                                  "vocab": [[word, -i] for word, i in WORDS.items()]}, **SPLIT),
    "wordlevel": library_tokenizer({"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
                                   pre_tokenizer={"type": "Whitespace"}),
}


def plain_tensors() -> Format:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False]),
              "c": np.ones((2, 1, 2), np.float16), "d": np.array(3)}
    return Format(lambda folder: write_tensors(folder / "t.safetensors", arrays, {"a": "b"}),
                  lambda folder: read_tensors(folder / "t.safetensors"),
                  lambda found: {k: (str(a.dtype), a.shape, a.tobytes()) for k, a in found.items()},
                  lambda found, folder: write_tensors(folder / "t.safetensors", found))


class Small(Module):
    def __init__(self):
        self.w, self.b = parameter(np.ones((2, 3))), parameter(np.zeros(3))


@dataclass(frozen=True)
class Settings:
    steps: int = 10
    lr: float = 1e-3
    name: str = "x"
    corpus: tuple[str, ...] = ("a",)
    clip: float | None = None


def hashed_again(folder):
    for place in folder.glob("checkpoints/*"):
        known = place / "manifest.json"
        found = {name: checkpoint._fingerprint(place / name) for name in checkpoint.FILES
                 if (place / name).is_file()}
        if known.is_file():
            known.write_text(json.dumps(found))


def run_of(hashes: bool) -> Format:
    """A run with a checkpoint and a loss scaler. hashes: they are right, whatever the files hold.
    """
    def write(folder):
        run = RunDirectory.create(folder, "run", asdict(Settings()), [{"name": "a"}])
        for file in run.path.iterdir():
            file.rename(folder / file.name)
        run.path.rmdir()
        run, model = RunDirectory(folder), Small()
        run.log(step=1, loss=2.0)
        run.log(step=3, loss=2.0, validation_loss=None)
        run.save(2, model, AdamW(model.parameters()), LossScaler())

    def read(folder):
        run, model, scaler = RunDirectory(folder), Small(), LossScaler()
        try:
            settings = run.settings(Settings())
            run.check([{"name": "a"}], "other corpora than")
        except ValueError as error:  # as they say, if the run is another than is asked for
            if "keeps its settings" in str(error) or "other corpora than" in str(error):
                return None
            raise
        step = run.restore(model, AdamW(model.parameters()), scaler)
        scaler.update(True)
        if len(run.records()) != 1:  # it takes long
            run.plot()
        return settings, step, bits(model), scaler.state(), run.records()

    return Format(write, read, lambda found: found, None,
                  hashed_again if hashes else lambda folder: None)


def result_of() -> Format:
    rows = tuple({"arm": arm, "seed": s, "score (%)": 3.0 + s} for arm in "ab" for s in range(2))
    claim = {"claim": "a is above b", **asdict(verdict([1.0, 2.0], "a - b", 0.0))}
    result = Result("x", "which?", "python x.py", True, {"lecture": {"a": 3.0}}, {"score (%)": 1},
                    "2026-01-01", "abc", "a machine", rows, (claim,))
    return Format(lambda folder: result.save(folder / "result.json"),
                  lambda folder: Result.load(folder / "result.json"),
                  lambda found: (repr(found), table(found), verdicts(found)),
                  lambda found, folder: found.save(folder / "result.json"))


SVG = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE svg [<!ENTITY a "b">]>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"><defs>
<clipPath id="p"><rect x="1"/></clipPath></defs><g clip-path="url(#p)"><use xlink:href="#m"/>
<text style="fill: red">é &a;&lt;</text></g></svg>"""


def picture_of() -> Format:
    """The drawing beside a result, as the page of results takes it in."""
    def read(folder):
        found = picture(folder / "result.svg", "x-") or ""
        assert "<script" not in found.lower()
        return found

    return Format(lambda folder: (folder / "result.svg").write_text(SVG, encoding="utf-8"), read,
                  lambda found: found)


def records_of() -> Format:
    records = [data.Record("add", "1 2", "3"), data.Record("say", "", "é", ("e",), "sql")]
    return Format(lambda folder: save_records(folder / "r.jsonl", records),
                  lambda folder: load_records(folder / "r.jsonl"), repr,
                  lambda found, folder: save_records(folder / "r.jsonl", found))


def corpus_of() -> Format:
    def write(folder):
        (folder / "below").mkdir()
        for i, name in enumerate(("a.txt", "b.md", "below/c.py")):
            (folder / name).write_text(f"{i} text é\n\nanother\n" * 9)

    def read(folder):
        try:
            corpus = data.load_corpus(folder)
            return corpus.documents, corpus.sha256, data.split(corpus, 0.2)
        except ValueError as error:  # as load_corpus and split say
            assert "holds no text" in str(error) or "nothing to hold out" in str(error)

    return Format(write, read, lambda found: found)


FORMATS = {
    **{name: folder_of(config) for name, config in CONFIGS.items()},
    "mistral": folder_of(CONFIGS["llama"], model_type="mistral", sliding_window=4096),
    "sharded": sharded(CONFIGS["gpt2"]),
    "nf4-gpt2": in_4_bits(WIDE["gpt2"], "nf4", True),
    "nf4-llama": in_4_bits(WIDE["llama"], "nf4", True),
    "fp4-llama": in_4_bits(WIDE["llama"], "fp4", False),
    "int8": in_8_bits(WIDE["llama"]),
    "lora": adapter_of("llama", partial(add_lora, r=2, alpha=4)),
    "lora-gpt2": adapter_of("gpt2", partial(add_lora, r=1, alpha=2.5, targets=("q", "v", "up"))),
    "ia3": adapter_of("bert", add_ia3),
    "dora": adapter_of("gpt2", partial(add_dora, r=1, alpha=2.5)),
    "adalora": adapter_of("gpt2", partial(add_adalora, r=1, alpha=2.5, targets=("q", "v", "up"))),
    **{f"tokenizer-{name}": tokenizer_of(make) for name, make in TOKENIZERS.items()},
    "tensors": plain_tensors(),
    "run": run_of(hashes=False),
    "checkpoint": run_of(hashes=True),
    "result": result_of(),
    "picture": picture_of(),
    "records": records_of(),
    "corpus": corpus_of(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_fuzz(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    escapes, loaded = fuzz(FORMATS[name], tmp_path, INPUTS, SEED)
    print(f"{name}: {loaded} of {INPUTS} were loaded")
    assert not escapes, "\n".join(f"{e.number} of seed {SEED}, {e.what}: {e.why}" for e in escapes)
