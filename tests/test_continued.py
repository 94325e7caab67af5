"""scripts/pretrain.py --init: what it goes on from, what it measures of the old text, what it
leaves, and what is refused."""

import dataclasses
import signal
import sys

import numpy as np
import pretrain
import pytest
from pretrain import Settings, main

from minilm import checkpoint, data
from minilm.command import command as program
from minilm.continued import corpora_of
from minilm.files import FormatError, read_json, write_json
from minilm.interop import huggingface, load_model, save_model
from minilm.measure.losses import loss_of
from minilm.quantize import quantize_model
from minilm.run import RunDirectory
from minilm.trained import load_trained as load_to_generate
from minilm.transformer import Config, Transformer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

OLD, NEW = ["The", "cat", "sat", "on", "a", "mat.\n"], ["0", "11", "2", "=", "+", "7;\n"]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Without the curves, which take longer than the run."""
    monkeypatch.setattr(RunDirectory, "plot", lambda run: None)


def write(file, words, seed=0):
    file.write_text(" ".join(np.random.default_rng(seed).choice(words, 400)))
    return str(file)


@pytest.fixture
def base(tmp_path):
    """The folder of a Llama that was trained on old.txt, a fifth of which was held out."""
    s = Settings(corpus=(write(tmp_path / "old.txt", OLD),), layers=1, heads=2, width=8, context=16,
                 batch=4, steps=4, warmup=1, sample=4, workers=1, lr=1e-2, validation=0.2)
    main(s, tmp_path / "bases")
    return tmp_path / "bases" / "pretrain-1" / "model"


def settings(base, **changes):
    file = base.parent.parent.parent / "new.txt"
    new = str(file) if file.exists() else write(file, NEW, seed=1)
    small = dict(init=str(base), corpus=(new,), context=8, batch=4, steps=6, warmup=2,
                 eval_every=4, save_every=4, sample=4, workers=1)
    return Settings(**small | changes)


def metrics(run):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in RunDirectory(run).records()]


def learned(run):
    """All that a run has kept beside what tells the time, byte for byte."""
    found = {p.relative_to(run).as_posix(): p.read_bytes()
             for name in ("model", "adapter") for p in (run / name).rglob("*") if p.is_file()}
    tensors, state = checkpoint.load(run / "checkpoints")
    return found, {name: array.tobytes() for name, array in tensors.items()}, state


def held_out(name, share, context):
    held = data.split(data.load_corpus(name), share)[1]
    return data.cut(data.pack(held, data.ByteTokenizer()), context)


@pytest.mark.parametrize("method", ["full", "lora", "bitfit"])
def test_it_goes_on_with_the_model_and_tells_what_is_learned_and_forgotten(
        tmp_path, base, capsys, method):
    s = settings(base, method=method, lr=3e-2)
    if method == "bitfit":  # a Llama has no biases
        model = Transformer(Config.gpt2(258, 16, layers=1, heads=2, width=8), seed=3)
        huggingface.save_model(model, base, data.ByteTokenizer())
    before_all = {p: p.read_bytes() for p in base.iterdir()}
    capsys.readouterr()
    main(s, tmp_path / "runs")
    run, said = tmp_path / "runs" / "pretrain-1", capsys.readouterr().out
    assert {p: p.read_bytes() for p in base.iterdir()} == before_all
    before, *_, after = metrics(run)
    assert [r["step"] for r in metrics(run)] == [0, 1, 2, 3, 4, 5, 6]
    old = str(tmp_path / "old.txt")
    rows = {"new": held_out(s.corpus[0], s.validation, 8), "old": held_out(old, 0.2, 8)}
    whole = method != "lora"
    kept = run / ("model" if whole else "adapter")
    assert not (run / ("adapter" if whole else "model")).exists()
    now = load_to_generate(kept if whole else None, None if whole else kept)[1]
    for record, model in ((before, load_model(base)), (after, now)):
        assert record["validation_loss"] == pytest.approx(loss_of(model, *rows["new"]), abs=1e-4)
        assert record["known"] == {old: pytest.approx(loss_of(model, *rows["old"]), abs=1e-4)}
    assert after["validation_loss"] < before["validation_loss"]
    new = before["validation_loss"], after["validation_loss"]
    for line in (f"{'new text':30}{new[0]:>8.3f}{new[1]:>8.3f}",
                 f"{before['known'][old]:>8.3f}{after['known'][old]:>8.3f}",
                 f"{method} on {base}, ", f"--{'model' if whole else 'adapter'} {kept}"):
        assert line in said
    assert now.config == load_model(base).config
    assert data.load_tokenizer(run / "tokenizer.json").vocab_size == 258


def test_a_masked_model_fills_in_the_new_text(tmp_path, base):
    bert = Transformer(Config.bert(258, 16, layers=1, heads=2, width=8, hidden=8), seed=2)
    huggingface.save_model(bert, base, data.ByteTokenizer())
    main(settings(base), tmp_path / "runs")
    run = tmp_path / "runs" / "pretrain-1"
    before, *_, after = metrics(run)
    assert all(r["targets"] < 4 * 8 / 2 for r in metrics(run)[1:]) and "known" in after
    assert "bits_per_byte" not in before and after["validation_loss"] < before["validation_loss"]
    assert not load_model(run / "model").config.causal


def test_a_tokenizer_of_others_stays_as_it_was(tmp_path, base):
    """With what it puts around prompts, though no document of the text has it."""
    library = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = library.models.WordPiece(
        {word: i for i, word in enumerate([*special, *"012=+7;", "##1", "cat"])}, unk_token="[UNK]")
    theirs = library.Tokenizer(words)
    theirs.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    theirs.add_special_tokens(special)
    theirs.post_processor = library.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert = Transformer(Config.bert(14, 16, layers=1, heads=2, width=8, hidden=8), seed=2)
    huggingface.save_model(bert, base)
    theirs.save(str(base / "tokenizer.json"))
    main(settings(base, prompt="11 = 7 cat", lr=3e-2, steps=12), tmp_path / "runs")
    run = tmp_path / "runs" / "pretrain-1"
    for file in (run / "tokenizer.json", run / "model" / "tokenizer.json"):
        assert data.load_tokenizer(file).prompt("11 cat").tolist() == [2, 6, 12, 13, 3]
    assert metrics(run)[-1]["validation_loss"] < metrics(run)[0]["validation_loss"]
    assert "cat" in (run / "samples.txt").read_text()
    main(Settings(), resume=run)


@pytest.mark.parametrize("change", [dict(method="full", dropout=0.1), dict(method="lora"),
                                    dict(method="adalora", last=2)], ids=lambda c: c["method"])
def test_a_stopped_and_resumed_run_ends_like_a_straight_one(tmp_path, base, monkeypatch, change):
    s = settings(base, accumulate=2, **change)
    main(s, tmp_path / "straight")
    log = RunDirectory.log

    def press(run, **record):
        log(run, **record)
        if record["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "log", press)
        main(s, tmp_path / "runs")
    straight, run = (tmp_path / name / "pretrain-1" for name in ("straight", "runs"))
    assert len(metrics(run)) == 3
    main(Settings(), resume=run)
    assert metrics(run) == metrics(straight) and learned(run) == learned(straight)
    assert (run / "samples.txt").read_bytes() == (straight / "samples.txt").read_bytes()
    main(Settings(), resume=run)  # is finished
    assert metrics(run) == metrics(straight)


def test_it_goes_on_only_with_the_model_it_began_with(tmp_path, base):
    main(settings(base), tmp_path / "runs")
    model = load_model(base)
    model.embed.weight.data += 1
    huggingface.save_model(model, base, data.ByteTokenizer())
    with pytest.raises(ValueError, match=r"the text, the model or .*: model\.safetensors changed"):
        main(Settings(), resume=tmp_path / "runs" / "pretrain-1")


@pytest.mark.parametrize("words, said", [
    ("--layers 8 --width 64", r"given: layers, width; but the model .* those of --init"),
    ("--tokenizer bytes", "given: tokenizer; but"), ("--family gpt2", "given: family; but"),
    ("--context 17", r"context is 17, but .*model has room for 16 tokens"),
    ("--method prompt --length 9", r"context is 8, but .* has room for 7"),
    ("--r 4", "r is given, but the method is full"),
    ("--method lora --weight-decay .1", "weight_decay is given, but the method is lora, which"),
    ("--method ia3 --dropout .1", "dropout is given, but the method is ia3"),
    ("--init none", "none: there is no such folder"),
    (f"--init {__file__}", "is no folder; a model is a folder with"),
])
def test_what_means_nothing_beside_a_model_is_refused(tmp_path, base, monkeypatch, words, said):
    s = settings(base)
    monkeypatch.setattr(sys, "argv", [
        "pretrain.py", "--init", s.init, "--corpus", *s.corpus, "--context", "8", "--steps", "1",
        "--out", str(tmp_path / "runs"), *words.split()])
    with pytest.raises(SystemExit, match=said):
        program(main)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change, said", [
    (dict(layers=2, heads=2), "given: layers, heads; but"),
    (dict(init="", method="lora"), "method is given, but there is no --init"),
    (dict(init="", r=3), "r is given, but there is no --init")])
def test_settings_count_as_given_if_they_are_no_defaults(tmp_path, base, change, said):
    with pytest.raises(ValueError, match=said):
        main(settings(base, **change), tmp_path / "runs")


def test_models_that_cannot_go_on_are_refused(tmp_path, base):
    codes = quantize_model(load_model(base), "nf4")
    save_model(codes, base, data.ByteTokenizer())
    with pytest.raises(ValueError, match=r"model is quantized, .*: use --method lora"):
        main(settings(base), tmp_path / "runs")
    small = Transformer(Config.llama(100, 16, layers=1, heads=2, width=8, hidden=8))
    huggingface.save_model(small, base, data.ByteTokenizer())
    with pytest.raises(ValueError, match="the tokenizer has 258 tokens, but the model has 100"):
        main(settings(base), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_rate_is_the_methods_own(tmp_path, base):
    for method in ("full", "lora"):
        main(settings(base, method=method, steps=2, warmup=0), tmp_path / "runs")
    rates = [metrics(tmp_path / "runs" / f"pretrain-{n}")[1]["lr"] for n in (1, 2)]
    assert rates == [1e-3, 3e-3]


# What the model knows


def test_the_text_of_all_runs_before_is_known_by_what_each_held_out(tmp_path, base, capsys):
    main(settings(base, validation=0.3), tmp_path / "bases")
    second = tmp_path / "bases" / "pretrain-2" / "model"
    old, new = (data.load_corpus(tmp_path / f"{name}.txt") for name in ("old", "new"))
    assert corpora_of(second) == ([(new, 0.3), (old, 0.2)], [])
    third = settings(second, corpus=(str(tmp_path / "old.txt"),), validation=0.4)
    main(third, tmp_path / "bases")  # learns again what is held out of neither run
    assert corpora_of(tmp_path / "bases" / "pretrain-3" / "model") == (
        [(old, 0.2), (new, 0.3)], [])
    capsys.readouterr()
    write(tmp_path / "new.txt", NEW, seed=2)
    (tmp_path / "old.txt").unlink()
    found, said = corpora_of(second)
    assert found == [] and len(said) == 2
    assert "new.txt is not measured: the text is not what it was" in said[0]
    assert "old.txt' is neither a path nor" in said[1]
    main(settings(base), tmp_path / "runs")
    said = capsys.readouterr().out
    assert "old.txt is not measured" in said and "known:" not in said
    assert metrics(tmp_path / "runs" / "pretrain-1")[-1]["known"] == {}


def test_what_is_learned_now_is_not_held_out(tmp_path, base):
    """With a smaller share for the same text, less of it is unknown."""
    s = settings(base, corpus=(str(tmp_path / "old.txt"),), validation=0.1)
    main(s, tmp_path / "runs")
    rows = held_out(s.corpus[0], 0.1, 8)
    found = metrics(tmp_path / "runs" / "pretrain-1")[0]["known"]
    assert found == {s.corpus[0]: pytest.approx(loss_of(load_model(base), *rows), abs=1e-4)}


def test_a_model_of_no_run_and_a_damaged_run(tmp_path, base):
    run = base.parent / "run.json"
    whole = read_json(run)
    write_json(run, whole | {"corpora": [{"name": 3}]})
    with pytest.raises(FormatError, match=r"corpora: .*, expected objects with name and sha256"):
        corpora_of(base)
    for other in ({"settings": {"validation": 0.1}}, {"settings": 3}, 3):
        write_json(run, other)
        assert corpora_of(base) == ([], [])
    run.unlink()
    assert corpora_of(base) == ([], [])


def test_runs_of_earlier_versions_have_none_of_this(tmp_path, base):
    """They go on as new models, whatever is not in their run.json."""
    run = base.parent
    whole = read_json(run / "run.json")
    kept = {k: v for k, v in whole["settings"].items()
            if k in {f.name for f in dataclasses.fields(pretrain.Training)} or k in (
                "corpus weights validation tokenizer vocab_size family layers heads width context "
                "dropout accumulate min_lr beta2 weight_decay prompt sample").split()}
    write_json(run / "run.json", whole | {"settings": kept})
    main(Settings(), resume=run)
