"""scripts/pretrain.py as its user meets it: what a run leaves behind, stopping and resuming, and
one clear line for what is wrong."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pretrain
import pytest
from pretrain import Settings, main

from minilm import checkpoint, data, loop
from minilm.command import command as program
from minilm.command import typed
from minilm.files import FormatError, read_json, write_json
from minilm.interop import huggingface
from minilm.run import RunDirectory
from minilm.train import Diverged, Trainer

# Python 3.12 warns of every fork in a process that has threads, as BLAS does.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

ROOT = Path(__file__).parents[1]
SMALL = dict(layers=1, heads=2, width=8, context=8, batch=8, steps=6, warmup=2, eval_every=4,
             save_every=4, sample=12, workers=1, lr=1e-2, prompt="The ")


@pytest.fixture
def text(tmp_path):
    """A file of words."""
    words = np.random.default_rng(0).choice(["The", "cat", "sat", "on", "a", "mat.\n"], 300)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words))
    return file


@pytest.fixture
def plain(monkeypatch):
    """Without the curves, which take longer than the run."""
    monkeypatch.setattr(RunDirectory, "plot", lambda run: None)


def settings(text, **changes):
    return Settings(**dict(corpus=(str(text),)) | SMALL | changes)


def metrics(run):
    """The records without what differs from run to run."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in RunDirectory(run).records()]


def saved(run):
    """Every bit of the last checkpoint, and its step."""
    tensors, state = checkpoint.load(run / "checkpoints")
    return {name: array.tobytes() for name, array in tensors.items()}, state["step"]


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


# What a run leaves behind


@pytest.mark.parametrize(
    "family, tokenizer, workers", [("gpt2", "bytes", 2), ("llama", "chars", 1), ("bert", "bpe", 1)]
)
def test_a_run_leaves_all_that_it_promises(tmp_path, text, capsys, family, tokenizer, workers):
    s = settings(text, family=family, tokenizer=tokenizer, vocab_size=270, workers=workers)
    main(s, tmp_path / "runs")
    run = tmp_path / "runs" / "pretrain-1"
    names = {"run.json", "metrics.jsonl", "samples.txt", "loss.png", "model", "checkpoints",
             "tokenizer.json"}
    assert {p.name for p in run.iterdir()} == names
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"

    described = RunDirectory(run).describe()
    tuples = {"corpus": s.corpus, "weights": (), "targets": s.targets}
    assert Settings(**described["settings"] | tuples) == s
    corpus = data.load_corpus(text)
    assert described["corpora"] == [
        {"name": str(text), "sha256": corpus.sha256, "characters": corpus.characters}
    ]

    records = metrics(run)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "validation_loss" in r] == [4, 6]
    assert all(0 < r["loss"] < 8 and 0 <= r.get("validation_accuracy", 0) < 1 for r in records)
    held = data.split(corpus, s.validation)[1]
    targets = len(data.pack(held, data.load_tokenizer(run / "tokenizer.json"))) - 1
    for r in records:  # a masked model is not asked for all that a byte says
        assert ("bits_per_byte" in r) == ("validation_loss" in r and family != "bert")
        if "bits_per_byte" in r:
            bits = r["validation_loss"] / np.log(2) * targets / len("".join(held).encode())
            assert r["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
    everywhere = 8 * 8  # batch * context
    assert all((0 < r["targets"] < 32) if family == "bert" else r["targets"] == everywhere
               for r in records)
    assert records[0]["lr"] == pytest.approx(1e-2 / 3) and records[2]["lr"] == 1e-2

    samples = (run / "samples.txt").read_text()
    assert samples.count("===") == 2
    assert "=== after step 0\nThe" in samples and "=== after step 6\nThe" in samples
    said = capsys.readouterr().out
    assert "step 6: held out: loss" in said
    assert (f"generate.py --model {run / 'model'}" in said) == (family != "bert")

    kept = data.load_tokenizer(run / "tokenizer.json")
    assert type(kept).__name__ == {"bytes": "ByteTokenizer", "chars": "CharTokenizer",
                                   "bpe": "BPETokenizer"}[tokenizer]
    assert (run / "model" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()

    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000004", "step-00000006"]
    tensors, state = checkpoint.load(run / "checkpoints")
    trained = pretrain.make_model(s, kept.vocab_size)
    trained.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    )
    loaded = huggingface.load_model(run / "model")
    assert loaded.config == trained.config and state == {
        "step": 6, "samples": (run / "samples.txt").stat().st_size}
    tokens = kept.encode("The cat ")[None, :8]
    assert np.array_equal(loaded.eval()(tokens).data, trained.eval()(tokens).data)


def test_the_loss_falls(tmp_path, text, plain):
    main(settings(text, steps=60, width=16), tmp_path)
    losses = [r["loss"] for r in metrics(tmp_path / "pretrain-1")]
    assert losses[0] > 5.3  # 258 bytes, all alike: 5.55 nats
    assert np.mean(losses[-5:]) < 3.2


def test_runs_do_not_overwrite_each_other_and_repeat_with_the_seed(tmp_path, text, plain):
    for seed in (0, 0, 1):
        main(settings(text, seed=seed, dropout=0.1), tmp_path)
    first, again, other = (tmp_path / f"pretrain-{n}" for n in (1, 2, 3))
    assert weights(first) == weights(again) != weights(other)
    assert metrics(first) == metrics(again) != metrics(other)


@pytest.mark.parametrize(
    "change",
    [dict(lr=2e-2), dict(min_lr=1e-3), dict(warmup=0), dict(beta2=0.9), dict(weight_decay=0.5),
     dict(clip=0.1), dict(dropout=0.1), dict(accumulate=2), dict(batch=7), dict(seed=1),
     dict(attention_dropout=0.1)],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_counts(tmp_path, text, plain, change):
    for s in (settings(text, steps=4), settings(text, steps=4, **change)):
        main(s, tmp_path)
    assert weights(tmp_path / "pretrain-1") != weights(tmp_path / "pretrain-2")


def test_workers_are_as_asked_for(tmp_path, text, plain, monkeypatch):
    seen = []

    class Spy(Trainer):
        def __init__(self, model, optimizer, workers, processes, seed, *rest):
            seen.append((workers, processes, seed))
            super().__init__(model, optimizer, workers, processes, seed, *rest)

    monkeypatch.setattr(loop, "Trainer", Spy)
    monkeypatch.setattr(loop, "default_workers", lambda: (2, True))
    for change in (dict(workers=0), dict(workers=1, threads=True), dict(workers=0, seed=5)):
        main(settings(text, steps=1, **{"workers": 0} | change), tmp_path)
    assert seen == [(2, True, 0), (1, False, 0), (2, True, 5)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_model_is_of_the_family_size_and_seed_asked_for(text, family):
    sizes = dict(layers=2, heads=3, width=24, context=5, dropout=0.3)

    def make(seed):
        return pretrain.make_model(settings(text, seed=seed, family=family, **sizes), 11)

    model = make(0)
    c = model.config
    assert sizes.items() < dataclasses.asdict(c).items() and c.vocab_size == 11
    assert c.causal == (family != "bert") and c.norm == ("rms" if family == "llama" else "layer")
    assert np.array_equal(model.embed.weight.data, make(0).embed.weight.data)
    assert not np.array_equal(model.embed.weight.data, make(1).embed.weight.data)


@pytest.mark.parametrize("given, shares", [((3.0, 1.0), [0.75]), ((), None)])
def test_corpora_are_mixed_by_weight_or_by_size(tmp_path, text, monkeypatch, given, shares):
    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 60)
    seen = {}
    monkeypatch.setattr(pretrain, "pretrain", lambda run, s, m, batches, *_: seen.update(b=batches))
    main(settings(text, corpus=(str(text), str(other)), weights=given), tmp_path / "runs")
    sizes = [int(f.stat().st_size * 0.9) + 1 for f in (text, other)]  # an end after each text
    found = seen["b"].borders
    assert found == pytest.approx(shares or [sizes[0] / sum(sizes)], rel=1e-9)
    described = RunDirectory(tmp_path / "runs" / "pretrain-1").describe()
    assert [c["name"] for c in described["corpora"]] == [str(text), str(other)]
    assert described["settings"]["weights"] == list(given)


def test_characters_that_only_the_held_out_text_or_the_prompt_has_are_known(tmp_path, text, plain):
    text.write_text(text.read_text() + "\N{SNOWMAN}")
    main(settings(text, tokenizer="chars", prompt="\N{BLACK HEART SUIT}"), tmp_path)
    alphabet = data.load_tokenizer(tmp_path / "pretrain-1" / "tokenizer.json").alphabet
    assert {"\N{SNOWMAN}", "\N{BLACK HEART SUIT}"} < set(alphabet)


# Stopping and resuming


def interrupt_after(step, monkeypatch):
    """Ctrl-C while that step's record is written."""
    log = RunDirectory.log

    def press(run, **record):
        log(run, **record)
        if record["step"] == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunDirectory, "log", press)


@pytest.mark.parametrize("family, tokenizer, workers", [("gpt2", "bpe", 1), ("bert", "bytes", 2)])
def test_a_stopped_and_resumed_run_ends_like_a_straight_one(
    tmp_path, text, plain, monkeypatch, capsys, family, tokenizer, workers
):
    s = settings(text, family=family, tokenizer=tokenizer, vocab_size=270, workers=workers,
                 dropout=0.2, accumulate=2, steps=7)
    main(s, tmp_path / "straight")
    straight = tmp_path / "straight" / "pretrain-1"
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        main(s, tmp_path / "runs")
    run = tmp_path / "runs" / "pretrain-1"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"stopped after step 2; go on with: {typed(pretrain.__file__, resume=run)}"
    assert saved(run)[1] == 2
    assert metrics(run)[:2] == metrics(straight)[:2]

    main(Settings(), tmp_path / "elsewhere", resume=run)
    assert saved(run) == saved(straight) and saved(run)[1] == 7
    assert weights(run) == weights(straight)
    only_loss = [[{k: v for k, v in r.items() if "validation" not in k} for r in metrics(path)]
                 for path in (run, straight)]
    assert only_loss[0] == only_loss[1]
    assert metrics(run)[2:] == metrics(straight)[2:]
    assert not (tmp_path / "elsewhere").exists()


def test_a_crash_before_the_first_checkpoint_costs_no_more_than_the_steps(
    tmp_path, text, plain, monkeypatch
):
    s = settings(text, save_every=4)
    main(s, tmp_path / "straight")

    def crash(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", crash)
        with pytest.raises(OSError, match="no space left"):
            main(s, tmp_path / "runs")
    run, straight = tmp_path / "runs" / "pretrain-1", tmp_path / "straight" / "pretrain-1"
    assert len(metrics(run)) == 4
    main(Settings(), resume=run)
    assert saved(run) == saved(straight)
    assert metrics(run) == metrics(straight)


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path, text, plain, capsys):
    main(settings(text), tmp_path)
    run = tmp_path / "pretrain-1"
    before = contents(run)
    capsys.readouterr()
    main(Settings(), resume=run)
    said = capsys.readouterr().out
    assert "from step 6" in said and "write more" in said and "go on with" not in said
    assert contents(run) == before


@pytest.mark.parametrize("name", ["bpee", "byte"])
def test_a_tokenizer_that_is_not_there_is_told_from_those_that_are(tmp_path, text, name):
    with pytest.raises(ValueError, match=f"'{name}' is neither a path nor one of bytes, chars, "):
        main(settings(text, tokenizer=name), tmp_path)


@pytest.fixture
def stopped(tmp_path, text, plain, monkeypatch):
    """A run of which two steps are done."""
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        main(settings(text, tokenizer="chars"), tmp_path / "runs")
    return tmp_path / "runs" / "pretrain-1"


@pytest.mark.parametrize(
    "asked, said",
    [(dict(lr=0.5), r"lr 0\.5 \(it has 0\.01\)"), (dict(family="gpt2"), "family gpt2"),
     (dict(steps=9, width=16), "steps 9 .*, width 16 "), (dict(corpus=("x",)), "corpus"),
     (dict(weights=(1.0,)), "weights")],
)
def test_resuming_with_other_settings_is_refused(stopped, asked, said):
    before = contents(stopped)
    with pytest.raises(ValueError, match=f"pretrain-1 keeps its settings, .*{said}"):
        main(Settings(**asked), resume=stopped)
    assert contents(stopped) == before


@pytest.mark.parametrize("words, said", [
    ("--steps 2400", r"steps 2400 \(it has 6\)"), ("--steps=2400", "steps 2400"),
    ("--family llama --tokenizer bytes", r"tokenizer bytes \(it has chars\)"),
    ("--threads --seed 3", r"seed 3"), ("--workers 9", r"workers 9 \(it has 1\)"),
    ("--out elsewhere", "give --resume or --out, not both"),
    ("--out runs", "give --resume or --out, not both"),
])
def test_what_is_given_beside_resume_is_not_ignored(stopped, monkeypatch, words, said):
    """Also if it is the default: the run has another."""
    before = contents(stopped)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--resume", str(stopped), *words.split()])
    with pytest.raises(SystemExit, match=said):
        program(main)
    assert contents(stopped) == before


def test_what_is_given_beside_resume_may_be_what_the_run_has(stopped, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--resume", str(stopped), "--steps", "6"])
    program(main)
    assert saved(stopped)[1] == 6
    program(main)
    assert "from step 6, its last\n" in capsys.readouterr().out


def test_a_run_without_a_clip_is_stored_and_resumed(tmp_path, text, plain, monkeypatch):
    s = settings(text, tokenizer="chars", clip=math.inf)
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        main(s, tmp_path)
    run = tmp_path / "pretrain-1"
    assert json.loads((run / "run.json").read_text())["settings"]["clip"] == "inf"
    main(s, resume=run)
    main(dataclasses.replace(s, clip=1e30), tmp_path)
    assert weights(run) == weights(tmp_path / "pretrain-2")


def test_a_stored_setting_out_of_its_range_is_the_files_fault(stopped):
    file = stopped / "run.json"
    whole = json.loads(file.read_text())
    for name, value in dict(clip=-1.0, batch="8", steps=2.5).items():
        file.write_text(json.dumps(whole | {"settings": whole["settings"] | {name: value}}))
        with pytest.raises(FormatError, match=rf"json: settings: {name} (must be|is {value!r})"):
            main(Settings(), resume=stopped)


def test_resuming_takes_the_settings_that_the_run_has(stopped, text):
    main(settings(text, tokenizer="chars"), resume=stopped)
    assert saved(stopped)[1] == 6


@pytest.mark.parametrize("new", ["other words " * 50, "few"])
def test_resuming_on_other_text_is_refused(stopped, text, new):
    before = contents(stopped)
    text.write_text(new)
    said = "the text or the tokenizer is not the one that this run was started on"
    with pytest.raises(ValueError, match=said):
        main(Settings(), resume=stopped)
    assert contents(stopped) == before


def test_a_tokenizer_of_others_frames_no_prompt_of_a_model_that_learned_from_bare_text(
    tmp_path, text, plain
):
    """No document has the <s> that its post-processor puts in front of prompts."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = data.BPETokenizer.train([text.read_text()], 270).tokenizer
    theirs.add_special_tokens(["<s>"])
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 270)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    main(settings(text, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path)
    for folder in ("pretrain-1", "pretrain-1/model"):
        kept = data.load_tokenizer(tmp_path / folder / "tokenizer.json")
        assert np.array_equal(kept.prompt("The"), kept.encode("The")) and kept.vocab_size == 271
    assert huggingface.load_model(tmp_path / "pretrain-1" / "model").ends.eos == (kept.end,)


def test_resuming_keeps_the_tokenizer_when_its_file_has_changed(tmp_path, text, plain, monkeypatch):
    ours = tmp_path / "tokenizer.json"
    letters = "".join(sorted(set(text.read_text())))
    data.CharTokenizer(letters).save(ours)
    s = settings(text, tokenizer=str(ours))
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        main(s, tmp_path)
    main(s, tmp_path)
    data.CharTokenizer("".join(sorted(set(letters) - {"T"} | {"t", "z"}))).save(ours)
    main(Settings(), resume=tmp_path / "pretrain-1")
    assert weights(tmp_path / "pretrain-1") == weights(tmp_path / "pretrain-2")


def test_resuming_with_another_tokenizer_is_refused(stopped):
    """Of the same size, it would go on without a word, to other bits."""
    fields = read_json(stopped / "tokenizer.json")
    vocab = fields["model"]["vocab"]
    vocab["a"], vocab["t"] = vocab["t"], vocab["a"]
    write_json(stopped / "tokenizer.json", fields)
    with pytest.raises(ValueError, match=r"was started on: tokenizer\.json changed"):
        main(resume=stopped)
    run = read_json(stopped / "run.json")
    del run["base"]  # as in runs of 0.1.0
    write_json(stopped / "run.json", run)
    main(resume=stopped)


def test_resuming_from_damaged_files_is_an_error(stopped):
    file = stopped / "run.json"
    whole = json.loads(file.read_text())
    fields = whole["settings"]
    for changed in (fields | {"colour": "red"}, {k: v for k, v in fields.items() if k != "beta2"}):
        file.write_text(json.dumps(whole | {"settings": changed}))
        with pytest.raises(ValueError, match=r"run\.json: .*settings .*(colour|beta2)"):
            main(Settings(), resume=stopped)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: not valid JSON"):
        main(Settings(), resume=stopped)


def test_a_run_inside_its_own_corpus_goes_on_and_learns_nothing_from_it(
        tmp_path, text, plain, monkeypatch, capsys):
    """Runs, models and their samples lie below the folder that is the corpus."""
    s = settings(tmp_path)
    before = data.load_corpus(tmp_path).sha256
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        main(s, tmp_path / "runs")
    first = tmp_path / "runs" / "pretrain-1"
    assert (first / "samples.txt").stat().st_size
    capsys.readouterr()
    main(Settings(), resume=first)
    said = capsys.readouterr().out
    assert f"{tmp_path}: skipped: {first}: holds a run, not text\n" in said
    held = sum(map(len, data.split(data.load_corpus(tmp_path))[1]))
    assert f"characters to train on, {held:,} held out" in said
    main(s, tmp_path / "runs")
    assert weights(first) == weights(tmp_path / "runs" / "pretrain-2")
    assert data.load_corpus(tmp_path).sha256 == before


# What is wrong


@pytest.mark.parametrize(
    "content, changes, said",
    [("", {}, "holds no text"), (" \n", {}, "holds no text"), ("a b", {}, "too short|too few"),
     (b"\xff\xfe\xfa" * 99, {}, r"text\.txt: not UTF-8"),
     (None, dict(corpus=("no",)), "'no' is neither a path"),
     (None, dict(corpus=()), "corpus"), (None, dict(weights=(1.0, 2.0)), "expected 1 weights"),
     (None, dict(tokenizer="no.json"), r"no\.json"), (None, dict(heads=3), "multiple of heads"),
     (None, dict(validation=1.0), "validation"), (None, dict(eval_every=0), "eval_every"),
     (None, dict(save_every=0), "save_every"), (None, dict(prompt=""), "prompt"),
     (None, dict(tokenizer="bpe", vocab_size=9), "vocab_size"), (None, dict(batch=0), "batch"),
     (None, dict(workers=-1), "workers"), (None, dict(accumulate=0), "accumulate must be 1 to"),
     (None, dict(accumulate=9), "the batch's 8 rows, got 9")],
)
def test_bad_settings_are_errors_and_leave_no_folder(tmp_path, text, content, changes, said):
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, OSError), match=said):
        main(settings(text, **changes), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.run\.json"):
        main(Settings(), resume=tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_diverges_can_go_on_from_its_checkpoint(tmp_path, text, plain):
    s = settings(text, lr=1e38, min_lr=1e38, warmup=0, save_every=1, eval_every=100, steps=50)
    with pytest.raises(Diverged, match=r"step \d+: loss (nan|inf)|gradient norm (nan|inf)"):
        main(s, tmp_path)
    run = tmp_path / "pretrain-1"
    assert saved(run)[1] == len(metrics(run)) >= 1


def command(*arguments):
    return [sys.executable, ROOT / "scripts" / "pretrain.py", *map(str, arguments)]


def flags(s):
    """The settings as a command line."""
    changed = {k: v for k, v in dataclasses.asdict(s).items() if v != getattr(Settings(), k)}
    words = []
    for name, value in changed.items():
        words += [f"--{name.replace('_', '-')}", *(value if type(value) is tuple else [value])]
    return words


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}


def test_the_command_line_ends_with_one_line_of_error(tmp_path):
    words = ["--corpus", "no-such-corpus", "--out", tmp_path / "runs"]
    ended = subprocess.run(command(*words), env=environment(), capture_output=True, text=True)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("pretrain.py: 'no-such-corpus' is neither a path nor one of python-")
    assert ended.stdout == ""


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, text, plain):
    """The terminal sends it to every process of the group."""
    s = settings(text, steps=400, eval_every=1000, save_every=1000, workers=2)
    process = subprocess.Popen(
        command(*flags(s), "--out", tmp_path), env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    run = tmp_path / "pretrain-1"
    try:
        limit = time.monotonic() + 20
        while not RunDirectory(run).records() and process.poll() is None:
            assert time.monotonic() < limit, "it does not start"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    done = metrics(run)[-1]["step"]
    assert 1 <= done < 400
    assert out.splitlines()[-1] == (
        f"stopped after step {done}; go on with: {typed(pretrain.__file__, resume=run)}")
    assert saved(run)[1] == done
    main(Settings(), resume=run)
    assert [r["step"] for r in metrics(run)] == list(range(1, 401))
    assert saved(run)[1] == 400
