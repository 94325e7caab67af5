"""scripts/distill.py as its user meets it: what a run leaves behind and says of it, what the
students begin with and learn from, stopping and resuming, and one clear line for what is wrong."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import distill
import numpy as np
import pytest
from distill import Settings, main

from minilm import checkpoint, data, ops
from minilm.command import typed
from minilm.distill import Distillation, student_from_teacher
from minilm.files import write_json
from minilm.interop import huggingface, load_model, save_model
from minilm.quantize import quantize_model
from minilm.run import RunDirectory
from minilm.train import LabelLoss, Trainer
from minilm.transformer import Config, Ends, Transformer

# Python 3.12 warns of every fork in a process that has threads, as BLAS does.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

ROOT = Path(__file__).parents[1]
SMALL = dict(layers=4, heads=2, width=8, context=8, batch=4, steps=6, teacher_steps=8, workers=1,
             lr=1e-2, temperature=2.0)
SIZES = dict(vocab_size=258, context=16, layers=3, heads=2, width=8)
TEACHERS = {
    "gpt2": Config.gpt2(**SIZES), "llama": Config.llama(**SIZES, hidden=12, kv_heads=1),
    "bert": Config.bert(**SIZES, hidden=12),
}
ARMS = ("from the teacher, distilled", "from the teacher, labels alone", "from random, distilled",
        "from random, labels alone")


@pytest.fixture
def text(tmp_path):
    """A file of words."""
    words = np.random.default_rng(0).choice(["The", "cat", "sat", "on", "a", "mat.\n"], 300)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words))
    return file


@pytest.fixture
def plain(monkeypatch):
    """Without the picture and the speeds, which take longer than the run."""
    monkeypatch.setattr(distill, "draw", lambda *_: None)
    monkeypatch.setattr(distill, "speeds", lambda models, _: {name: [1.0] for name in models})


def settings(text, **changes):
    return Settings(**dict(corpus=(str(text),)) | SMALL | changes)


def save_teacher(folder, family="gpt2", **changes):
    """A folder of an untrained model; noise gives it an opinion of every token."""
    model = Transformer(dataclasses.replace(TEACHERS[family], **changes))
    rng = np.random.default_rng(1)
    for p in model.parameters():
        p.data += 0.3 * rng.standard_normal(p.shape, dtype=np.float32)
    huggingface.save_model(model, folder)
    data.ByteTokenizer().save(folder / "tokenizer.json")
    return str(folder)


def folder(run, arm):
    return run / "arms" / arm.replace(",", "").replace(" ", "-")


def metrics(run, arm):
    return RunDirectory(folder(run, arm)).records()


def same(a, b):
    """Do two models or two of their states hold the same bits?"""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def contents(run):
    """Every bit that a run has learned, and all its records."""
    found = {file.relative_to(run).as_posix(): file.read_bytes() for file in run.glob("*/*.saf*")}
    for arm in (run / "arms").iterdir():
        found[arm.name] = RunDirectory(arm).records()
        if len(found[arm.name]) > 1:  # it was trained
            tensors, state = checkpoint.load(arm / "checkpoints")
            found |= {f"{arm.name} {name}": a.tobytes() for name, a in tensors.items()}
            assert state["step"] == found[arm.name][-1]["step"]
    return found


# What a run leaves behind


@pytest.mark.parametrize("changes", [
    dict(), dict(objective="masked", workers=2), dict(student_width=12, sweep=(1.0, 4.0)),
    dict(keep=(0, 1, 3), sweep=(0.5,))], ids=str)
def test_a_run_leaves_and_says_what_it_promises(tmp_path, text, capsys, changes):
    s = settings(text, **changes)
    main(s, tmp_path / "runs")
    run, said = tmp_path / "runs" / "distill-1", capsys.readouterr().out
    assert {p.name for p in run.iterdir()} == {"run.json", "arms", "teacher", "student",
                                               "distill.png"}
    assert (run / "distill.png").read_bytes()[:4] == b"\x89PNG" and str(run / "distill.png") in said
    assert f"{run}/teacher, {run}/student" in said
    corpus = data.load_corpus(text)
    assert data.account(corpus, *data.split(corpus, s.validation)) in said.splitlines()
    models = {name: huggingface.load_model(run / name) for name in ("teacher", "student")}
    assert [type(data.load_tokenizer(run / name / "tokenizer.json")) for name in models] == [
        data.ByteTokenizer] * 2
    causal = s.objective == "causal"
    assert [(m.config.layers, m.config.width, m.config.causal) for m in models.values()] == [
        (4, 8, causal), (len(s.keep) or 2, s.student_width or 8, causal)]

    arms = ["teacher", *ARMS[2 if s.student_width else 0 :]]
    arms += [f"distilled at T={T:g}" for T in s.sweep]
    assert {p.name for p in (run / "arms").iterdir()} == {folder(run, arm).name for arm in arms}
    parts = [data.split(data.load_corpus(text), s.validation)]
    _, (tokens, targets, *mask) = data.batches_of(parts, data.ByteTokenizer(), s.batch, s.context,
                                                  s.seed, masked=not causal)
    for model, arm in zip(models.values(), arms):  # the records are of what was saved
        logits, end = model.eval()(tokens, *mask), metrics(run, arm)[-1]
        loss = float(ops.cross_entropy(logits, targets).data)
        right = (logits.data.argmax(-1) == targets).sum() / (targets != data.IGNORED).sum()
        assert [end["validation_loss"], end["validation_accuracy"]] == pytest.approx(
            [loss, right], abs=1e-5)
    lines = {line[:30].rstrip(): line[30:].split() for line in said.splitlines()}
    sizes = [sum(p.size for p in model.parameters()) for model in models.values()]
    for arm in arms:
        records = metrics(run, arm)
        assert [r["step"] for r in records] == list(range(9 if arm == "teacher" else 7))
        assert records[-1]["validation_loss"] < records[0]["validation_loss"]
        loss, right, _, size, *_ = lines[arm]
        assert loss == f"{records[-1]['validation_loss']:.4f}"
        assert right == f"{records[-1]['validation_accuracy']:.2%}"
        assert size == f"{sizes[arm != 'teacher']:,}"
    assert f"teacher of {sizes[0]:,} parameters, 256 tokens; each student 192 tokens" in said


def test_what_students_begin_with_and_learn_from(tmp_path, text, monkeypatch, plain):
    """The same batches, the trained teacher, and nothing of it where labels are alone."""
    arms, step = [], Trainer.step

    def spy(trainer, number, batch, *rest):
        if number == 0:
            arms.append(SimpleNamespace(loss=trainer.loss, batches=[], begin={
                n: t.copy() for n, t in trainer.model.state_dict().items()}))
        arms[-1].batches.append(batch[0].tobytes())
        return step(trainer, number, batch, *rest)

    monkeypatch.setattr(Trainer, "step", spy)
    main(settings(text, sweep=(1.0, 8.0)), tmp_path)
    saved = huggingface.load_model(tmp_path / "distill-1" / "teacher")
    teacher, *students = arms
    assert len(students) == 6 and len(teacher.batches) == 8
    assert all(len(set(a.batches)) == 6 and a.batches == students[0].batches for a in students)
    half = student_from_teacher(saved)
    assert [same(a.begin, half) for a in students] == [True, True, False, False, True, True]
    assert same(students[2].begin, students[3].begin)
    assert [type(a.loss) is LabelLoss for a in arms] == [True, False] * 3 + [False]
    losses = [a.loss for a in students if type(a.loss) is not LabelLoss]
    assert [loss.temperature for loss in losses] == [2, 2, 1, 8]
    assert all(same(loss.teacher, saved) for loss in losses)


def test_a_run_repeats_with_its_seed(tmp_path, text, plain):
    for seed in (0, 0, 1):
        main(settings(text, seed=seed), tmp_path)
    first, again, other = (contents(tmp_path / f"distill-{n}") for n in (1, 2, 3))
    assert first == again and first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


# Teachers from elsewhere


@pytest.mark.parametrize("family", TEACHERS)
def test_a_teacher_from_a_folder(tmp_path, text, plain, family):
    path = save_teacher(tmp_path / "theirs", family)
    objective = "masked" if family == "bert" else "causal"
    main(settings(text, teacher=path, objective=objective, keep=(1, 2)), tmp_path)
    run = tmp_path / "distill-1"
    given, saved = (huggingface.load_model(p) for p in (path, run / "teacher"))
    assert same(given, saved) and given.config == saved.config
    assert [r["step"] for r in metrics(run, "teacher")] == [0]
    student = huggingface.load_model(run / "student").config
    assert student == dataclasses.replace(given.config, layers=2)


@pytest.mark.parametrize("kind", ["nf4", "llm.int8"])
def test_a_teacher_in_few_bits(tmp_path, text, kind):
    """It is saved in them; its student has plain weights."""
    path = Path(save_teacher(tmp_path / "theirs", "llama"))
    tokenizer = data.load_tokenizer(path / "tokenizer.json")
    save_model(quantize_model(huggingface.load_model(path), kind), path, tokenizer)
    main(settings(text, teacher=str(path), keep=(1, 2)), tmp_path)
    run = tmp_path / "distill-1"
    assert same(load_model(run / "teacher"), load_model(path))
    assert (run / "teacher" / "model.safetensors").read_bytes() == (
        path / "model.safetensors").read_bytes()
    assert huggingface.load_model(run / "student").config.layers == 2


@pytest.mark.parametrize("changes, words", [
    (dict(objective="masked"), "has a causal teacher, the objective is masked"),
    (dict(context=17), "context of 16; .* --context is 17"), (dict(keep=(2, 3)), "0 to 2"),
    (dict(prompt="\N{SNOWMAN}", teacher="chars"), r"'\N{SNOWMAN}' .*not in the alphabet"),
    (dict(teacher="small"), "a vocabulary of 257 .* needs 258"), (dict(teacher="none"), "none")])
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, text, changes, words):
    given, chars = (save_teacher(tmp_path / n) for n in ("given", "chars"))
    data.CharTokenizer.train([text.read_text()]).save(Path(chars) / "tokenizer.json")
    save_teacher(tmp_path / "small", vocab_size=257)
    teacher = str(tmp_path / changes["teacher"]) if "teacher" in changes else given
    with pytest.raises((ValueError, OSError), match=words):
        main(settings(text, **changes | dict(teacher=teacher)), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changes", [{}, dict(student_width=12)])
def test_students_end_texts_as_their_teacher_does(tmp_path, text, plain, changes):
    path = Path(save_teacher(tmp_path / "theirs", vocab_size=259))
    tokenizer = data.BPETokenizer.train([text.read_text()], 258)
    tokenizer.tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(path / "tokenizer.json")
    write_json(path / "generation_config.json", {"eos_token_id": [258], "bos_token_id": 3})
    assert distill.load_teacher(settings(text, teacher=str(path)))[1].end == 258
    main(settings(text, teacher=str(path), **changes), tmp_path)
    for name in ("teacher", "student"):
        assert huggingface.load_model(tmp_path / "distill-1" / name).ends == Ends(3, (258,))


def test_a_teacher_that_has_learned_what_is_held_out_is_told_of(tmp_path, text, plain, capsys):
    path = save_teacher(tmp_path / "run" / "model")
    write_json(tmp_path / "run" / "run.json", {"settings": {"validation": 0.05}})
    for validation, told in ((0.1, True), (0.05, False)):
        distill.load_teacher(settings(text, teacher=path, validation=validation))
        said = "was trained with 5.0% held out: it has learned some of the 10.0% here"
        assert (said in capsys.readouterr().err) is told


def test_a_teacher_whose_saving_was_killed_is_finished_first(tmp_path, text, plain):
    """Its files are then those that a resumed run finds."""
    path = Path(save_teacher(tmp_path / "theirs"))
    (path / ".saved").mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.move(path / file, path / ".saved" / file)
    main(settings(text, teacher=str(path)), tmp_path)
    main(settings(text, teacher=str(path)), resume=tmp_path / "distill-1")


# Stopping and resuming


@pytest.mark.parametrize("arm, step, changes", [
    ("teacher", 3, {}), ("teacher", 8, {}), (ARMS[0], 0, {}), (ARMS[0], 3, dict(workers=2)),
    (ARMS[2], 3, dict(student_width=12)), (ARMS[3], 6, dict(objective="masked")),
    ("teacher", 0, dict(teacher="gpt2"))])
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path, text, plain, monkeypatch, ctrl_c, arm, step, changes
):
    if "teacher" in changes:
        changes = dict(teacher=save_teacher(tmp_path / "theirs"))
    s, log = settings(text, **changes), RunDirectory.log

    def press(run, **record):
        log(run, **record)
        if record["step"] == step and run.path == folder(tmp_path / "b" / "distill-1", arm):
            signal.raise_signal(signal.SIGINT)

    main(s, tmp_path / "a")
    stopped = tmp_path / "b" / "distill-1"
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "log", press)
        with pytest.raises(SystemExit, match=f"go on with: .* --resume {re.escape(str(stopped))}$"):
            main(s, tmp_path / "b")
    assert not (stopped / "student").exists() or step == 6
    assert metrics(stopped, arm)[-1]["step"] == step
    for _ in range(2):  # the second time there is nothing left to do
        main(resume=stopped)
        assert contents(stopped) == contents(tmp_path / "a" / "distill-1")
    if "student_width" in changes:
        tensors, _ = checkpoint.load(folder(stopped, arm) / "checkpoints")
        drawn = Distillation(Transformer(dataclasses.replace(TEACHERS["gpt2"], width=12)),
                             Transformer(TEACHERS["gpt2"])).project.weight.data
        assert tensors["model.project.weight"].shape == drawn.shape == (8, 12)
        assert (tensors["model.project.weight"] != drawn).mean() > 0.9


def start(*words):
    """The script in a process group of its own, as in a terminal."""
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "distill.py", *map(str, words)], text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def flags(s):
    """The settings as a command line; of tuples the corpus alone."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(s).items()
             if type(value) in (int, float) and value != getattr(Settings(), name)]
    return [*words, "--corpus", *s.corpus]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, text, plain):
    """In the teacher's training, and again in a student's."""
    s, run = settings(text, teacher_steps=60, steps=20, workers=2), tmp_path / "b" / "distill-1"
    for arm, words in (("teacher", [*flags(s), "--out", run.parent]),
                       (ARMS[1], ["--resume", run])):
        process, limit = start(*words), time.monotonic() + 20
        try:
            while not metrics(run, arm) and process.poll() is None:
                assert time.monotonic() < limit, "it does not start"
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
        assert process.returncode == 1
        assert said == f"stopped; go on with: {typed(distill.__file__, resume=run)}\n"
        assert not (run / "student").exists()
    main(resume=run)
    main(s, tmp_path / "a")
    assert contents(run) == contents(tmp_path / "a" / "distill-1")


def test_a_resumed_run_wants_its_own_settings_text_and_teacher(tmp_path, text, plain):
    given = Path(save_teacher(tmp_path / "theirs"))
    s = settings(text, teacher=str(given))
    main(s, tmp_path)
    run = tmp_path / "distill-1"
    before = contents(run)
    for changes, words in ((dict(objective="masked"), "objective masked"),
                           (dict(context=9), r"context 9 \(it has 8\)")):
        with pytest.raises(ValueError, match=f"keeps its settings, .*{words}"):
            main(dataclasses.replace(s, **changes), resume=run)
    for file in (text, given / "model.safetensors", given / "tokenizer.json"):
        whole = file.read_bytes()
        file.write_bytes(whole.replace(b"a", b"b") + b" ")
        said = (process := start("--resume", run)).communicate(timeout=20)
        assert process.returncode == 1 and said == ("", (
            f"distill.py: {run}: the text or the teacher are not those this run was started on\n"))
        file.write_bytes(whole)
    main(s, resume=run)
    assert contents(run) == before


# What is wrong is said before anything is trained


@pytest.mark.parametrize("change, words", [
    (dict(keep=(0, 4)), r"from 0 to 3.*got \[0, 4\]"), (dict(keep=(2, 1)), "increasing"),
    (dict(steps=0), "steps must be at least 1, got 0"), (dict(teacher_steps=0), "teacher_steps"),
    (dict(prompt=""), "prompt"), (dict(temperature=0.0), "temperature must be .*, got 0"),
    (dict(sweep=(1.0, -1.0)), "sweep must be positive and finite, got -1"),
    (dict(weights=(0.0, 0.0, 0.0)), "not all 0"),
    (dict(top_k=259), "top_k must be 1 to 258, .*259"), (dict(top_k=3, reverse=True), "needs all"),
    (dict(context=1), "context must be at least 2"), (dict(workers=-1), "workers"),
    (dict(lr=-1.0), "lr must be finite and at least 0, got -1"), (dict(lr=float("inf")), "got inf"),
    (dict(student_width=7), "multiple of heads"), (dict(batch=0), "batch"),
    (dict(validation=0.0), "validation"), (dict(corpus=("no",)), "'no' is neither a path")])
def test_bad_settings_are_refused_before_a_folder_is_made(tmp_path, text, change, words):
    with pytest.raises(ValueError, match=words):
        main(settings(text, **change), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
