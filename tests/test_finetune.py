"""scripts/finetune.py as its user meets it: what each method trains and leaves behind, stopping and
resuming, the answers it counts, and one clear line for what is wrong."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import finetune
import numpy as np
import pytest
from finetune import METHODS, Settings, main

from minilm import checkpoint, data
from minilm.files import FormatError, read_json, write_json
from minilm.generate import generate, stream
from minilm.interop import (
    base_of,
    bitsandbytes,
    huggingface,
    load_adapter,
    load_model,
    save_adapter,
)
from minilm.measure.answers import answers
from minilm.measure.losses import loss_of
from minilm.peft import add_lora
from minilm.peft.adapted import adapted_layers
from minilm.quantize import QuantizedLinear, quantize_model
from minilm.run import RunDirectory
from minilm.train import Trainer
from minilm.trained import load_trained as load_to_generate
from minilm.transformer import Config, Ends, Transformer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

ROOT = Path(__file__).parents[1]
METHOD_NAMES = tuple(METHODS)
WHOLE = {name for name in METHODS if METHODS[name].whole}
SMALL = {  # beside r and alpha
    "bottleneck": dict(m=3, form="L", skip=1), "prompt": dict(length=3), "top": dict(k=1),
    "prefix": dict(length=3, hidden=5), "subspace": dict(d=300),
    "adalora": dict(last=1, dropout=0.1),
    **{name: dict(dropout=0.1) for name in ("lora", "qlora", "dora")}}
GOOD = '{"instruction": "Say", "context": "2", "output": "b"}'


@pytest.fixture
def base(tmp_path):
    """The folder of an untrained model, and a text that it may know."""
    model = Transformer(Config.gpt2(258, 40, layers=2, heads=2, width=16), seed=1)
    folder = tmp_path / "base"
    huggingface.save_model(model, folder)
    data.ByteTokenizer().save(folder / "tokenizer.json")
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 40)
    return folder


def settings(base, **changes):
    small = dict(model=str(base), known=(str(base.parent / "text.txt"),), train=20, test=3, r=2,
                 alpha=4.0, batch=8, steps=6, warmup=2, eval_every=4, save_every=4, workers=1)
    return Settings(**small | SMALL.get(changes.get("method"), {}) | changes)


def metrics(run):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in RunDirectory(run).records()]


def learned(run):
    """Bytes of what a run has learned, with all files beside the weights."""
    found = [p for name in ("model", "adapter") for p in (run / name).rglob("*") if p.is_file()]
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in found}


@pytest.mark.parametrize("context", [40, 10**12])
def test_what_is_known_is_what_the_base_was_not_trained_on(tmp_path, base, context):
    """Its run may have held out another share than a tenth; its context may be out of reach."""
    model = Transformer(Config.llama(258, context, layers=1, heads=2, width=16, hidden=16), seed=1)
    huggingface.save_model(model, base, data.ByteTokenizer())
    write_json(tmp_path / "run.json", {"settings": {"validation": 0.4}})
    s = settings(base)
    main(s, tmp_path / "runs")
    held = data.split(data.load_corpus(s.known[0]), 0.4)[1]
    rows = data.cut(data.pack(held, data.ByteTokenizer()), 40 if context == 40 else len(held[0]))
    found = metrics(tmp_path / "runs" / "finetune-lora-1")[0]["loss_known"][s.known[0]]
    assert found == pytest.approx(loss_of(model, *rows), abs=1e-5)


def test_a_tokenizer_beyond_its_model_is_refused_before_the_run(tmp_path, base):
    model = Transformer(Config.gpt2(100, 40, layers=1, heads=2, width=16))
    huggingface.save_model(model, base, data.ByteTokenizer())
    with pytest.raises(ValueError, match=r"base: the tokenizer gives the id 256, but .* 100 rows"):
        main(settings(base), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_base_whose_saving_was_killed_is_finished_before_it_is_read(tmp_path, base):
    (base / ".saved").mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.move(base / file, base / ".saved" / file)
    main(settings(base), tmp_path / "runs")
    assert (tmp_path / "runs" / "finetune-lora-1" / "adapter").is_dir()


# What a run leaves behind


TRAINED = {  # of 2 blocks of C = 16: q, k, v, o take and give 16 numbers, up and down 16 and 64
    "full": 298 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16, "top": 12 * 16**2 + 13 * 16 + 2 * 16,
    "bitfit": 11 * 16 * 2 + 16, "ia3": 2 * (16 + 16 + 64),
    **dict.fromkeys(("lora", "qlora"), 2 * 2 * (4 * 32 + 2 * 80)),
    "dora": 2 * (2 * (4 * 32 + 2 * 80) + 5 * 16 + 64), "adalora": 2 * 2 * (4 * 33 + 2 * 81),
    "bottleneck": 2 * 16 * 3 + 3 + 16 + 2 * 16, "prompt": 3 * 16,
    "prefix": 3 * 16 + 16 * 5 + 5 + 2 * 2 * 16 * (5 + 1), "subspace": 300}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_each_method_says_and_leaves_what_it_promises(tmp_path, base, capsys, method):
    s = settings(base, method=method)
    main(s, tmp_path / "runs")
    run = tmp_path / "runs" / f"finetune-{method}-1"
    said = capsys.readouterr().out
    assert f"{TRAINED[method]:,} trainable parameters" in said
    kept = run / ("model" if method in WHOLE else "adapter")
    sizes = [sum(p.stat().st_size for p in folder.glob("*.safetensors")) for folder in (kept, base)]
    assert f"{TRAINED[method]:,} numbers were trained; {sizes[0]:,} bytes are kept (" in said
    assert f"), beside the base's {sizes[1]:,}\n" in said
    assert ("which PEFT does not read" in said) == (
        method in ("bottleneck", "subspace"))
    tasks = ["reverse", "upper", "sort", "last", "add"]
    assert said.endswith("\n-> '\n") and "--temperature 0 --prompt 'Reverse\n" in said
    rows = [line.split(":")[0] for line in said.split("before")[1].splitlines()[1:] if ":" in line]
    assert rows[:8] == [*tasks, "all", "held out", str(base.parent / "text.txt")]

    before, *steps, after = metrics(run)
    assert [r["step"] for r in (before, *steps, after)] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert list(before["right"]) == tasks == list(after["right"])
    assert after["loss_held_out"] < before["loss_held_out"]
    assert before["loss_known"] != after["loss_known"]

    tensors, state = checkpoint.load(run / "checkpoints")
    names = {n.removeprefix("model.") for n in tensors if n.startswith("model.")}
    all_that_moves = TRAINED["full" if method == "subspace" else method]
    assert sum(tensors[f"model.{n}"].size for n in names) == all_that_moves
    assert method != "subspace" or tensors["theta"].size == TRAINED[method]
    assert state == {"step": 6}
    if method in WHOLE:
        model = huggingface.load_model(kept)
        assert (kept / "tokenizer.json").exists()
        state = {name.replace(".adapters.default.layer", ""): tensors[f"model.{name}"]
                 for name in names}
        assert method != "full" or set(state) == set(model.state_dict())
        assert all((model.state_dict()[name] == t).all() for name, t in state.items())
        frozen = set(model.state_dict()) - set(state)
        first = huggingface.load_model(base).state_dict()
        assert all((model.state_dict()[name] == first[name]).all() for name in frozen)
        return
    assert all(".adapters.default." in name for name in names)  # the base is not saved again
    model = load_adapter(huggingface.load_model(base), kept)
    for path, layer in adapted_layers(model).items():
        for name, t in layer.adapters["default"].named_tensors():
            own = tensors.get(f"model.{path}.adapters.default.{name}")
            if own is not None and own.shape == t.shape:  # c_attn's layers are joined in the file
                assert (t.data == own).all(), f"{path}.{name}"


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_generate_reads_what_was_learned(tmp_path, base, method):
    """It gives the losses and the answers that were measured at the end of the run."""
    s = settings(base, method=method, lr=0.05)
    main(s, tmp_path)
    run, use = tmp_path / f"finetune-{method}-1", {"model": base}
    kept = run / ("model" if method in WHOLE else "adapter")
    if method == "qlora":  # the adapter is for the base in codes
        bitsandbytes.save_model(quantize_model(huggingface.load_model(base), "nf4"), tmp_path / "q",
                                data.ByteTokenizer())
        use = {"model": tmp_path / "q"}
    _, model = load_to_generate(kept if method in WHOLE else use["model"],
                                None if method in WHOLE else kept)
    assert bool(adapted_layers(model)) == (method in ("bottleneck", "prompt", "prefix"))
    lesson = finetune.instructions(*finetune.load_data(s), data.ByteTokenizer(), model, 8, 0)
    last, first = metrics(run)[-1], metrics(run)[0]
    assert loss_of(model, *lesson.held_out) == pytest.approx(last["loss_held_out"], abs=2e-5)
    assert lesson.ask(model)[0] == last["right"]
    assert abs(first["loss_held_out"] - last["loss_held_out"]) > 2e-4


@pytest.mark.parametrize("form", ["H", "P", "L"])
def test_the_forms_of_bottlenecks_come_back(tmp_path, base, form):
    main(settings(base, method="bottleneck", form=form, skip=0), tmp_path)
    kept = tmp_path / "finetune-bottleneck-1" / "adapter"
    tensors, _ = checkpoint.load(kept.parent / "checkpoints")
    model = load_adapter(huggingface.load_model(base), kept)
    found = {f"model.{name}": t.data for name, t in model.named_parameters()}
    assert found.keys() == {n for n in tensors if n.startswith("model.")}
    assert all((found[name] == tensors[name]).all() for name in found)
    assert len(found) == 2 * {"H": 8, "P": 4, "L": 6}[form]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "bottleneck", "prompt",
                                    "prefix"])
def test_the_base_may_be_put_in_few_bits(base, method):
    s = settings(base, method=method, kind="int4")
    model = METHODS[method].prepare(huggingface.load_model(base), s)
    codes = [m.weight.codebook for _, m in model.named_modules() if type(m) is QuantizedLinear]
    assert codes == ["int4"] * 12
    with pytest.raises(ValueError, match="base is quantized already, but kind is int4"):
        METHODS[method].prepare(quantize_model(huggingface.load_model(base)), s)


def test_bitfit_leaves_codes_as_they_are(tmp_path, base):
    quantized = quantize_model(huggingface.load_model(base), "nf4")
    bitsandbytes.save_model(quantized, tmp_path / "quantized", data.ByteTokenizer())
    main(settings(base, model=str(tmp_path / "quantized"), method="bitfit"), tmp_path / "runs")
    model = load_model(tmp_path / "runs" / "finetune-bitfit-1" / "model")
    for name, t in load_model(tmp_path / "quantized").state_dict().items():
        same = (model.state_dict()[name] == t).all()
        assert same != name.endswith("bias"), name


def test_the_budget_ends_with_what_was_asked_for(tmp_path, base):
    """last = 1 leaves one singular value a matrix, on average."""
    main(settings(base, method="adalora", r=3, last=1, steps=10), tmp_path)
    tensors, _ = checkpoint.load(tmp_path / "finetune-adalora-1" / "checkpoints")
    lams = [t for name, t in tensors.items() if name.startswith("model.") and name.endswith("lam")]
    assert len(lams) == 12 and sum((lam != 0).sum() for lam in lams) == 12
    assert tensors["kept"].sum() == 12 and tensors["kept"].size == 36


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_settings_that_mean_nothing_to_a_method_are_refused(tmp_path, base, method):
    used = {"full": 2, "top": 3, "bitfit": 1, "lora": 8, "qlora": 8, "dora": 8, "adalora": 8,
            "ia3": 3, "bottleneck": 6, "prompt": 4, "prefix": 5, "subspace": 4}
    assert len(METHODS[method].without) == 18 - used[method]
    for name in METHODS[method].without:
        with pytest.raises(ValueError, match=f"{name} is given, but the method is {method}"):
            main(settings(base, method=method), tmp_path / "runs", given=frozenset({name}))
    assert not (tmp_path / "runs").exists()


def test_a_run_from_before_there_was_a_decay_goes_on(tmp_path, base):
    """Its settings lack attention dropout and weight decay: it has none."""
    main(settings(base, method="full"), tmp_path)
    run = tmp_path / "finetune-full-1"
    said = read_json(run / "run.json")
    assert said["settings"].pop("attention_dropout") == said["settings"].pop("weight_decay") == 0
    write_json(run / "run.json", said)
    main(resume=run)
    with pytest.raises(ValueError, match=r"weight_decay 0.1 \(it has 0.0\)"):
        main(settings(base, method="full", weight_decay=0.1), resume=run)


def test_attention_dropout_and_decay_change_what_is_learned(tmp_path, base):
    """Each changes the weights that are kept; the folder says nothing of them."""
    kept = []
    for i, more in enumerate(({}, {"attention_dropout": 0.3}, {"weight_decay": 0.5})):
        main(settings(base, method="full", **more), tmp_path)
        folder = tmp_path / f"finetune-full-{i + 1}" / "model"
        kept.append((load_model(folder).state_dict(), (folder / "config.json").read_text()))
    (plain, said), *others = kept
    for weights, config in others:
        assert config == said
        assert any((weights[name] != plain[name]).any() for name in plain)


@pytest.mark.parametrize("name, change, words", [
    ("clip", {}, "clip is given, but mezo has no gradient"),
    ("workers", {}, "workers is given, but mezo"), ("threads", {}, "threads is given, but mezo"),
    ("weight_decay", {}, "weight_decay is given, but mezo has none"),
    ("lr", dict(lr=0.0), "mezo needs a learning rate of its own"),
    ("dtype", dict(dtype="bfloat16"), "dtype is bfloat16, but mezo keeps no float32 masters"),
    ("method", dict(method="adalora"), "adalora goes by gradients, and mezo has none"),
    ("method", dict(method="subspace"), "subspace goes by gradients, and mezo has none"),
    ("eps", dict(optimizer="adamw"), "eps is given, but the optimizer is adamw"),
    ("eps", dict(eps=0.0), "eps must be positive"),
])
def test_what_makes_no_sense_with_mezo_is_refused(tmp_path, base, name, change, words):
    with pytest.raises(ValueError, match=words):
        s = settings(base, **dict(optimizer="mezo", lr=1e-4) | change)
        main(s, tmp_path / "runs", given=frozenset({name}))
    assert not (tmp_path / "runs").exists()


def test_qlora_trains_on_a_quantized_base(base):
    model = METHODS["qlora"].prepare(huggingface.load_model(base), settings(base, kind="fp4"))
    layers = adapted_layers(model)
    assert len(layers) == 12 and all(type(m.base) is QuantizedLinear for m in layers.values())
    assert {m.base.weight.codebook for m in layers.values()} == {"fp4"}


def test_targets_and_scaling_reach_the_adapters(base):
    s = settings(base, targets=("q", "down"), rslora=True, dropout=0.25)
    layers = adapted_layers(METHODS["lora"].prepare(huggingface.load_model(base), s))
    assert sorted({path.rpartition(".")[2] for path in layers}) == ["down", "q"]
    adapter = layers["blocks.0.mlp.down"].adapters["default"]
    assert adapter.scale == 4 / 2**0.5 and adapter.drop.p == 0.25


def test_the_seed_draws_the_adapters(base):
    def drawn(seed):
        model = METHODS["lora"].prepare(huggingface.load_model(base), settings(base, seed=seed))
        return adapted_layers(model)["blocks.0.mlp.up"].adapters["default"].A.data

    assert (drawn(0) == drawn(0)).all() and (drawn(0) != drawn(1)).any()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_what_was_learned_names_its_base_and_its_end(tmp_path, base, method):
    main(settings(base, method=method, steps=1), tmp_path)
    run = tmp_path / f"finetune-{method}-1"
    if method not in WHOLE:
        assert base_of(run / "adapter") == str(base)
        return
    assert huggingface.load_model(run / "model").ends.eos == (data.ByteTokenizer.end,)
    named = read_json(run / "model" / "tokenizer_config.json")
    assert named["eos_token"] == "<|endoftext|>"


def test_a_chat_models_ends_are_kept(tmp_path, base):
    model = huggingface.load_model(base)
    model.ends = Ends(50, (60, 70), 51)
    huggingface.save_model(model, base)
    main(settings(base, method="full", steps=1), tmp_path)
    assert huggingface.load_model(tmp_path / "finetune-full-1" / "model").ends == model.ends


def test_the_default_base_is_the_newest_pretrained_model(tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "runs/pretrain-1/model")
    s = settings(base, model="", method="full", steps=2)
    for _ in range(2):  # the second time there is a newer model, the first run's
        main(s)
    assert capsys.readouterr().out.count("full on runs/pretrain-1/model") == 2


def test_a_run_repeats_with_its_seed(tmp_path, base):
    for seed in (0, 0, 1):
        main(settings(base, seed=seed, dropout=0.1), tmp_path)
    first, again, other = (tmp_path / f"finetune-lora-{n}" for n in (1, 2, 3))
    assert learned(first) == learned(again) != learned(other)
    assert metrics(first) == metrics(again) != metrics(other)


def test_a_file_of_records_is_split_and_learned(tmp_path, base, capsys):
    records = [data.Record("Say", f"{i}", "yes" if i % 2 else "no") for i in range(30)]
    data.save_records(tmp_path / "mine.jsonl", records)
    s = settings(base, data=(str(tmp_path / "mine.jsonl"),), steps=2, train=None)
    training, test = finetune.load_data(s)
    assert (training, test) == data.split_records(records, 3) and len(test) == 3
    main(s, tmp_path)
    said = capsys.readouterr().out
    assert "27 records to train on, 3 held out" in said and "records: right" in said
    some = dataclasses.replace(s, train=5)
    assert finetune.load_data(some) == data.split_records(records, 3, 5)
    with pytest.raises(ValueError, match=r"mine\.jsonl: train is 28, but only 27 records are left"):
        main(dataclasses.replace(s, train=28), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_records_are_learned_the_other_way_round(tmp_path, base, capsys):
    records = [data.Record("Say", f"{i}", "yes" if i % 3 else f"no {i}", task="sql")
               for i in range(30)]
    data.save_records(tmp_path / "mine.jsonl", records)
    s = settings(base, data=(str(tmp_path / "mine.jsonl"),), steps=2, train=None, reverse=True)
    training, test = finetune.load_data(s)
    assert (training, test) == data.split_records([*map(data.swap, records)], 3)
    assert all(record.instruction == data.ASKED for record in training + test)
    main(s, tmp_path)
    said = capsys.readouterr().out
    assert "27 records to train on, 3 held out" in said and "sql, reversed: right" in said
    assert "ask it: " in said and "What was asked?" in said.split("ask it: ")[1]


def test_tasks_are_learned_the_other_way_round(base):
    s = settings(base, data=("sort", "sql"), train=50, test=5, reverse=True)
    learn, ask = finetune.load_data(s)
    made = finetune.load_data(dataclasses.replace(s, reverse=False))
    assert (learn, ask) == data.swapped(*made)
    assert [record.task for record in ask] == ["sort, reversed"] * 5 + ["sql, reversed"] * 5


def test_conversations_are_not_reversed(tmp_path, base):
    (tmp_path / "talks.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}]}\n' * 5)
    with pytest.raises(ValueError, match="holds conversations: only records can be reversed"):
        finetune.load_data(settings(base, data=(str(tmp_path / "talks.jsonl"),), reverse=True))


def test_a_long_record_does_not_fill_up_the_others(tmp_path, base):
    """As many targets, and the same losses as rows of one length give."""
    records = [data.Record("Say", f"{i}", "ab") for i in range(23)]
    records.append(data.Record("Say", "", "x" * 30))
    batches = data.InstructionBatches(records, data.ByteTokenizer(), 8, None, seed=0)
    assert sorted(batches[step][0].shape[1] for step in range(3)) == [12, 12, 37]
    model = huggingface.load_model(base)
    for step in range(3):
        tokens, targets = batches[step]
        wide = [np.pad(a, ((0, 0), (0, 40 - a.shape[1])), constant_values=fill)
                for a, fill in ((tokens, 0), (targets, data.IGNORED))]
        assert loss_of(model, tokens, targets) == pytest.approx(loss_of(model, *wide), abs=1e-6)


@pytest.mark.parametrize("targets, expected", [
    ((), ["attention.k", "attention.v", "mlp.down"]),
    (("q", "mlp.down"), ["attention.q", "mlp.down"]), (("up",), ["mlp.up"])])
def test_ia3_is_put_where_it_was_asked_for(base, targets, expected):
    s = settings(base, method="ia3", **dict(targets=targets) if targets else {})
    layers = adapted_layers(METHODS["ia3"].prepare(huggingface.load_model(base), s))
    assert sorted(layers) == [f"blocks.{i}.{path}" for i in (0, 1) for path in expected]
    inner = {path for path, layer in layers.items() if layer.adapters["default"].feedforward}
    assert inner == {path for path in layers if path.endswith("down")}


# Answers


def test_answers_are_what_the_model_generates_up_to_its_end(base):
    model, tokenizer = huggingface.load_model(base), data.ByteTokenizer()
    records, _ = data.make_tasks(["upper", "last"], 4, 0, 0)
    model.head.weight.data[data.ByteTokenizer.end] = 0
    longest = max(len(r.output) for r in records) + 1
    found = answers(model, records, tokenizer)
    for record, answer in zip(records, found):
        prompt = tokenizer.encode(data.prompt(record))[None]
        ids = generate(model, prompt, longest, temperature=0)[0, prompt.shape[1]:].tolist()
        end = ids.index(tokenizer.end) if tokenizer.end in ids else None
        assert answer == tokenizer.decode(ids[:end])


def test_an_answer_stops_at_its_own_end_token(base, monkeypatch):
    """Two prompts of one length, which end at different times."""
    tokenizer = data.ByteTokenizer()
    rows = [[*b"ab", tokenizer.end, *b"cd"], [*b"efgh", tokenizer.end]]
    monkeypatch.setattr("minilm.measure.answers.stream", lambda *a, **k: map(np.array, zip(*rows)))
    records = [data.Record("Say", "", "abcdef"), data.Record("Ask", "", "x")]
    assert answers(huggingface.load_model(base), records, tokenizer) == ["ab", "efgh"]


def test_many_prompts_of_one_length_take_several_batches(base, monkeypatch):
    """All their keys and values at once would not fit into memory."""
    model, tokenizer, drawn = huggingface.load_model(base), data.ByteTokenizer(), []
    records = [data.Record("Say", "", f"{i}") for i in range(5)]
    whole = answers(model, records, tokenizer)
    monkeypatch.setattr("minilm.measure.answers.ROWS", 2)
    monkeypatch.setattr("minilm.measure.answers.stream",
                        lambda model, rows, *a, **k:
                            drawn.append(len(rows)) or stream(model, rows, *a, **k))
    assert answers(model, records, tokenizer) == whole and drawn == [2, 2, 1]
    with pytest.raises(ValueError, match="there is no record to answer"):
        answers(model, [], tokenizer)


def test_what_is_shown_of_a_record_cannot_rule_the_terminal(tmp_path, base, capsys):
    records = [data.Record(f"\x1b[31mred {i}", "\a", "yes", task="\x1b[2Jtask") for i in range(3)]
    data.save_records(tmp_path / "r.jsonl", records)
    main(settings(base, data=(str(tmp_path / "r.jsonl"),), train=None, test=1, steps=1),
         tmp_path / "runs")
    said = capsys.readouterr().out
    assert "\ufffd[31mred 0 \ufffd -> " in said and "\ufffd[2Jtask: right" in said
    assert not {"\x1b", "\a"} & set(said)


# Stopping and resuming


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, base, monkeypatch, method):
    goes_on(tmp_path, base, monkeypatch, method)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_run_of_mezo_goes_on_bit_for_bit(tmp_path, base, monkeypatch, method):
    goes_on(tmp_path, base, monkeypatch, method, optimizer="mezo", lr=1e-4)


def goes_on(tmp_path, base, monkeypatch, method, **changes):
    # adalora's checkpoint comes after its last choice, which must be in it
    s = settings(base, method=method, steps=10 if method == "adalora" else 6, **changes)
    write_json(base / "config.json", read_json(base / "config.json") | {"resid_pdrop": 0.3})
    write_json(base / "generation_config.json", {"temperature": 0.5, "eos_token_id": 7})
    (base / "merges.txt").write_bytes(b"a b")
    main(s, tmp_path / "a")
    whole, step = tmp_path / "a" / f"finetune-{method}-1", Trainer.step

    def fails(trainer, number, *rest):
        if number == s.steps - 1:
            raise MemoryError("no room")
        return step(trainer, number, *rest)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", fails)
        with pytest.raises(MemoryError):
            main(s, tmp_path / "b")
    stopped = tmp_path / "b" / f"finetune-{method}-1"
    assert not learned(stopped)
    for _ in range(2):  # the second time there is nothing left to do
        main(resume=stopped)
        assert learned(stopped) == learned(whole) and metrics(stopped) == metrics(whole)
    if method == "full":
        files = {name: (whole / "model" / name).read_bytes()
                 for name in ("merges.txt", "generation_config.json", "config.json")}
        assert files["merges.txt"] == b"a b" and b'"temperature": 0.5' in files[
            "generation_config.json"] and b'"resid_pdrop": 0.3' in files["config.json"]


def test_a_run_that_was_not_examined_at_its_end_is_now(tmp_path, base, capsys):
    """Version 0.1.0 saved the last step before it examined the model."""
    main(settings(base), tmp_path)
    run = tmp_path / "finetune-lora-1"
    records, said = metrics(run), capsys.readouterr().out
    file = run / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(True)[:-1]))
    main(resume=run)
    assert metrics(run) == records and "right" in records[-1]
    assert capsys.readouterr().out.splitlines()[-9:] == said.splitlines()[-9:]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, base):
    s = settings(base)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(s).items()
             if k in ("model", "train", "test", "batch", "workers", "r")]
    command = [sys.executable, ROOT / "scripts" / "finetune.py", *flags, "--steps", "100000",
               "--known", s.known[0], "--out", str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
    run = tmp_path / "finetune-lora-1"
    for _ in range(300):
        if (run / "metrics.jsonl").exists() and len(RunDirectory(run).records()) > 3:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and f"finetune.py --resume {run}\n" in out
    _, state = checkpoint.load(run / "checkpoints")
    assert state["step"] == metrics(run)[-1]["step"] and (run / "adapter").exists()


# What is wrong is said in one line


def refused(tmp_path, *arguments):
    command = [sys.executable, ROOT / "scripts" / "finetune.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_quantized_model_keeps_its_codes(tmp_path, base):
    """It takes adapters, as qlora's base does; it is neither trained nor quantized once more."""
    quantized = quantize_model(huggingface.load_model(base), "nf4")
    bitsandbytes.save_model(quantized, tmp_path / "quantized", data.ByteTokenizer())
    model = str(tmp_path / "quantized")
    for method, words in (("full", "codes are not trained: use --method lora"),
                          ("qlora", "quantized already: --method lora")):
        with pytest.raises(ValueError, match=words):
            main(settings(base, model=model, method=method), tmp_path / "runs")
    main(settings(base, model=model), tmp_path / "runs")
    main(settings(base, method="qlora", dropout=0.0), tmp_path / "runs")
    ours, qlora = (learned(tmp_path / "runs" / f"finetune-{name}-1") for name in ("lora", "qlora"))
    file = "adapter/adapter_model.safetensors"
    assert ours[file] == qlora[file]


def test_without_a_model_it_says_how_to_get_one(tmp_path):
    assert "run pretrain.py first, or give --model" in refused(tmp_path)


@pytest.mark.parametrize("change, words", [
    (dict(r=99), "r must be 1 to 16"),
    (dict(targets=("x",)), "match no layer"),
    (dict(method="qlora", kind="int5"), "kind must be one of"),
    (dict(method="adalora", last=3), "last must be 1 to 2, got 3"),
    (dict(method="top", k=3), "k must be 1 to 2, got 3"),
    (dict(method="subspace", d=10**6), "d must be 1 to 11,360; got 1000000"),
    (dict(method="subspace", d=5, said=True), "d must be 6 to 11,360, of which 5 scale a layer"),
    (dict(method="bottleneck", skip=2), "skip must be 0 to 1, got 2"),
    (dict(method="prompt", length=40), "rows in front must be 1 to 39"),
    (dict(method="prefix", length=30), "a record takes .. tokens, but the model's context is 10"),
    (dict(data=("reverse", "juggle")), "'juggle' is none of the tasks"),
    (dict(data=()), "no task is named; there are reverse, upper"),
    (dict(seed=2**63), f"seed must fit 64 bits, got {2**63}"),
    (dict(data=("juggle",)), "'juggle' is neither a file nor one of the tasks reverse, upper"),
    (dict(data=("mine.jsonl",)), r"'mine\.jsonl' is neither a file nor one of the tasks"),
    (dict(test=0), "must be at least 1"),
    (dict(data=("sql",)), "a record takes 1.. tokens, but the model's context is 40"),
])
def test_bad_settings_are_refused_before_a_run_is_made(tmp_path, base, change, words):
    with pytest.raises(ValueError, match=words):
        main(settings(base, **change), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("lines, change, words", [
    (['{"instruction": "a", "output": "b"}'] * 9, {}, "comes more than 3 times"),
    (['{"instruction": "a", "output": "b"}'] * 3, {},
     "3 of the records are held out, but .* has 3: give a smaller --test"),
    (['{"instruction": "a", "output": "b", "task": "sql"}', GOOD], dict(test=1),
     r"r\.jsonl: .*must be a query"),
    (['{"instruction": "a", "output": 1}'], {}, r"r\.jsonl: line 1: output: expected str"),
    ([GOOD] + [GOOD.replace("2", f"3{i}") for i in range(6)] + [GOOD.replace("2", "x" * 50)], {},
     "a record takes .. tokens, but the model's context is 40"),
])
def test_bad_records_are_refused_before_a_run_is_made(tmp_path, base, lines, change, words):
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=words):
        main(settings(base, data=(str(tmp_path / "r.jsonl"),), train=None, **change),
             tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name, words", [
    ("nowhere", "there is no such folder"), ("adapter", "holds an adapter, not a model"),
    ("file", "is no folder; a model is a folder with config.json"),
])
def test_a_folder_that_is_no_models_is_named(tmp_path, base, name, words):
    save_adapter(add_lora(huggingface.load_model(base), 2, 4), tmp_path / "adapter")
    (tmp_path / "file").touch()
    with pytest.raises((OSError, ValueError), match=words):
        main(settings(tmp_path / name), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_bitfit_needs_biases(tmp_path, base):
    model = Transformer(Config.llama(258, 40, layers=1, heads=2, width=16, hidden=16), seed=1)
    huggingface.save_model(model, base, data.ByteTokenizer())
    with pytest.raises(ValueError, match="no layer of this model has one"):
        main(settings(base, method="bitfit"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_pipe_as_data_is_refused_at_once(tmp_path, base):
    os.mkfifo(tmp_path / "pipe")
    for change in (dict(data=(str(tmp_path / "pipe"),)), dict(known=(str(tmp_path / "pipe"),))):
        with pytest.raises(FormatError, match="pipe: cannot be read: it is a pipe"):
            main(settings(base, **change), tmp_path / "runs")
    (base / "model.safetensors").unlink()
    os.mkfifo(base / "model.safetensors")
    with pytest.raises(FormatError, match=r"model\.safetensors: cannot be read: it is a pipe"):
        main(settings(base), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_query_that_takes_all_memory_is_refused_before_a_run_is_made(tmp_path, base):
    """Nested common tables, each read many times by the next."""
    query = "WITH a(x) AS (VALUES (1))"
    for before, name in zip("abcdefghijk", "bcdefghijkl"):
        query += f",{name}(x)AS(VALUES({'+'.join([f'1 IN {before}'] * 4)}))"
    hostile = data.Record("SQL", "q", f"{query}SELECT 1 IN l", task="sql")
    data.save_records(tmp_path / "r.jsonl", [hostile, data.Record("Say", "", "yes")])
    with pytest.raises(ValueError, match="the output must be a query on cities, got 'WITH a"):
        main(settings(base, data=(str(tmp_path / "r.jsonl"),), test=1), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_masked_model_is_refused_before_a_run_is_made(tmp_path, base):
    masked = Transformer(Config.bert(258, 40, layers=1, heads=2, width=8, hidden=8))
    huggingface.save_model(masked, base)
    with pytest.raises(ValueError, match="only a causal model gives answers"):
        main(settings(base), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_wants_its_own_model_and_data(tmp_path, base):
    main(settings(base, steps=2), tmp_path)
    run = tmp_path / "finetune-lora-1"
    with pytest.raises(ValueError, match="keeps its settings"):
        main(settings(base, steps=4), resume=run)
    model = huggingface.load_model(base)
    model.embed.weight.data[0] += 1
    huggingface.save_model(model, base)
    with pytest.raises(ValueError, match="not those this run was started on"):
        main(resume=run)
