"""minilm.run and the files of a run: where it is made, what is cut off when it goes on, that it has
one writer, what must not change meanwhile, and files of ours that hold what nobody wrote.

FUZZ=20000 draws that many damaged files of each kind, rather than 60.
"""

import copy
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import distill
import finetune
import numpy as np
import pretrain
import pytest
import report
from disk import Disk, no_space

from minilm import checkpoint, data, versions
from minilm.command import command
from minilm.experiment import Experiment, conduct
from minilm.files import FormatError, read_json, read_json_lines, write_json
from minilm.interop import huggingface
from minilm.loop import Training, resumed
from minilm.measure.verdict import verdict
from minilm.optim import AdamW, LossScaler
from minilm.results import Result, table, verdicts
from minilm.run import RunDirectory, newest_model
from minilm.stored import fits, revive
from minilm.transformer import Config, Transformer

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def new_run(folder, settings=None, **more):
    return RunDirectory.create(folder, "run", settings or {}, [], **more)


def make_model():
    return Transformer(Config.llama(11, 8, layers=1, heads=2, width=8, hidden=8), 0)


# Where a run is made


def test_out_that_leads_nowhere_is_refused_and_not_tried_for_ever(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing" / "here")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    program = ("import sys; from pathlib import Path; from minilm.run import RunDirectory\n"
               "RunDirectory.create(Path(sys.argv[1]), 'run', {}, [])")
    for out in ("dangling", "dangling/below", "loop", "loop/below", "file", "file/below"):
        done = subprocess.run([sys.executable, "-c", program, tmp_path / out], env=ENV, timeout=60,
                              capture_output=True, text=True)
        assert done.returncode == 1
        assert "cannot be a folder for runs: " in done.stderr.splitlines()[-1], done.stderr
        assert str(tmp_path / out) in done.stderr.splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "loop"]


def test_a_number_that_is_taken_by_anything_is_left_alone(tmp_path):
    (tmp_path / "run-1").symlink_to(tmp_path / "nothing")
    (tmp_path / "run-2").touch()
    (tmp_path / "run-3").mkdir()
    assert new_run(tmp_path).path.name == "run-4"
    assert list((tmp_path / "run-3").iterdir()) == [] and (tmp_path / "run-1").is_symlink()


def test_out_may_be_a_link_to_a_folder(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert new_run(tmp_path / "link" / "deep").path == tmp_path / "link" / "deep" / "run-1"
    assert (tmp_path / "there" / "deep" / "run-1" / "run.json").exists()


def test_a_run_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fill(folder):
        data.ByteTokenizer().save(folder / "tokenizer.json")

    for k in range(1, 100):
        with monkeypatch.context() as patch:
            disk = Disk(patch, k, no_space)
            try:
                new_run(tmp_path / "runs", fill=fill)
            except OSError:
                pass
        left = os.listdir(tmp_path / "runs") if (tmp_path / "runs").exists() else []
        assert not [name for name in left if not name.startswith("run-")]
        for name in left:
            assert sorted(os.listdir(tmp_path / "runs" / name)) == ["run.json", "tokenizer.json"]
            RunDirectory(tmp_path / "runs" / name).describe()
        if disk.count < k:
            break
    assert 8 < k < 99 and left


def test_what_is_no_run_says_so(tmp_path):
    run = new_run(tmp_path / "runs")
    for folder, more in [(tmp_path, ""), (run.path / "model", f": give {run.path}"),
                         (run.path / "checkpoints" / "step-1", f": give {run.path}")]:
        with pytest.raises(FileNotFoundError, match=r"run\.json") as caught:
            RunDirectory(folder).describe()
        assert caught.value.strerror == f"is missing, so there is no run to go on with{more}"


def test_a_run_inside_a_run_is_there_again_when_it_goes_on(tmp_path):
    run = RunDirectory(tmp_path)
    run.inside("arm").log(step=1, loss=2.0)
    assert run.inside("arm").path == tmp_path / "arm"
    assert run.inside("arm").records() == [{"step": 1, "loss": 2.0}] and run.records() == []


# Going on


def steps(run, count, model, optimizer, first=0):
    for step in range(first + 1, count + 1):
        run.log(step=step, loss=1.0 / step)
        run.write_sample(step, f"=== after step {step + 7}\ntext")
        run.save(step, model, optimizer)


def test_samples_are_cut_to_the_checkpoint_whatever_they_say(tmp_path):
    model = make_model()
    run, optimizer = new_run(tmp_path), AdamW(model.parameters())
    steps(run, 3, model, optimizer)
    straight = [(run.path / name).read_bytes() for name in ("samples.txt", "metrics.jsonl")]
    run.log(step=4, loss=0.25)
    run.write_sample(4, "lost")
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert run.restore(model, optimizer) == 3
    assert [(run.path / n).read_bytes() for n in ("samples.txt", "metrics.jsonl")] == straight


def test_without_a_checkpoint_every_sample_is_made_again(tmp_path):
    model = make_model()
    run, optimizer = new_run(tmp_path), AdamW(model.parameters())
    run.write_sample(0, "first")
    assert run.restore(model, optimizer) == 0
    assert (run.path / "samples.txt").read_bytes() == b""


def test_samples_of_earlier_versions_stay(tmp_path):
    model = make_model()
    run, optimizer = new_run(tmp_path), AdamW(model.parameters())
    run.save(1, model, optimizer)  # says nothing of samples
    run.write_sample(0, "first")
    run.restore(model, optimizer)
    assert "first" in (run.path / "samples.txt").read_text()


def test_samples_that_are_a_pipe_do_not_hang(tmp_path):
    run, model = new_run(tmp_path), make_model()
    os.mkfifo(run.path / "samples.txt")
    with pytest.raises(FormatError, match=r"samples\.txt: cannot be read: it is a pipe"):
        run.restore(model, AdamW(model.parameters()))


def test_what_was_logged_is_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    model = make_model()
    run, optimizer, synced = new_run(tmp_path), AdamW(model.parameters()), []
    run.log(step=1, loss=1.0)
    run.write_sample(1, "text")
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    run.save(1, model, optimizer)
    assert synced[:2] == [(run.path / n).stat().st_ino for n in ("metrics.jsonl", "samples.txt")]


def test_what_kills_left_in_a_run_is_cleared_away_by_the_next_writer(tmp_path):
    run = new_run(tmp_path)
    dead = [run.path / name for name in (".metrics.jsonl.ab.tmp", "checkpoints/step-00000001.tmp/x",
                                         "model/.saved.ab.tmp/w", "arms/a/.f.1.tmp")]
    for path in dead:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    kept = run.path / "checkpoints" / "step-00000002" / "x"
    kept.parent.mkdir()
    kept.touch()
    with run.alone(), run.alone():
        assert (run.path / ".lock").exists()
    assert not list(run.path.rglob("*.tmp")) and kept.exists()
    assert not (run.path / ".lock").exists()


def test_two_writers_at_once(tmp_path):
    """The second one is refused, by programs and by fit alike, and changes nothing."""
    run = new_run(tmp_path)
    (run.path / ".of.the.first.tmp").touch()
    program = ("import sys; from pathlib import Path; from minilm.run import RunDirectory\n"
               "with RunDirectory(Path(sys.argv[1])).going_on(): pass")
    with run.alone():
        (run.path / ".of.the.first.tmp").touch()
        done = subprocess.run([sys.executable, "-c", program, run.path], env=ENV,
                              capture_output=True, text=True)
        assert f"{run.path} is in use: another process writes there" in done.stderr
        assert "go on with" not in done.stderr and (run.path / ".of.the.first.tmp").exists()
    assert subprocess.run([sys.executable, "-c", program, run.path], env=ENV).returncode == 0


def test_two_objects_of_one_run_are_two_writers(tmp_path):
    run = new_run(tmp_path)
    with run.alone(), pytest.raises(RuntimeError, match="this process writes there already"):
        with RunDirectory(run.path).alone():
            pass
    with RunDirectory(run.path).alone():
        pass


def test_samples_in_a_pipe_do_not_hang(tmp_path):
    run, model = new_run(tmp_path), make_model()
    os.mkfifo(run.path / "samples.txt")
    with pytest.raises(FormatError, match=r"samples\.txt: cannot be read: it is a pipe"):
        run.restore(model, AdamW(model.parameters()))


@pytest.mark.parametrize("name", ["a b's", "-a"])
def test_how_to_go_on_is_what_a_program_reads(tmp_path, monkeypatch, name):
    """Also if the run's folder looks like an option."""
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    with pytest.raises(OSError) as caught, RunDirectory(name).going_on():
        raise OSError
    (note,) = caught.value.__notes__
    monkeypatch.setattr(sys, "argv", ["p", *shlex.split(note.removeprefix("go on with: "))])
    heard = []

    def main(resume: Path):
        heard.append(resume)

    command(main)
    assert heard == [Path(name)]


def test_the_curves_are_whole_or_absent(tmp_path, monkeypatch):
    run = new_run(tmp_path)
    run.log(step=1, loss=1.0)
    before = run.plot().read_bytes()
    run.log(step=2, loss=2.0)
    for k in range(2, 6):  # the first is a mkdir of what is there
        with monkeypatch.context() as patch:
            Disk(patch, k, no_space)
            with pytest.raises(OSError, match="No space"):
                run.plot()
        assert run.path.joinpath("loss.png").read_bytes() == before


# What must not change


def test_another_number_of_threads_is_said(tmp_path):
    s = Training(workers=1)
    run = new_run(tmp_path, asdict(s))
    resumed(s, run.path)
    told = read_json(run.path / "run.json")
    told["blas"][0]["num_threads"] += 3
    write_json(run.path / "run.json", {**told, "blas": told["blas"][:1]})
    with pytest.warns(UserWarning, match=r"cannot go on bit for bit: BLAS was .*num_threads \d+ "):
        resumed(s, run.path)
    write_json(run.path / "run.json", {**told, "settings": asdict(replace(s, workers=2))})
    resumed(Training(), run.path)  # each worker has one thread
    write_json(run.path / "run.json", {**told, "settings": asdict(replace(s, workers=2)),
                                       "numpy": "1.0"})
    with pytest.warns(UserWarning, match=f"numpy was '1.0' and is {np.__version__}"):
        resumed(Training(), run.path)


def tiny_finetune(base, **changes):
    return finetune.Settings(**dict(
        model=str(base), data=("last",), train=8, test=2, known=(str(base.parent / "known.txt"),),
        r=1, steps=2, warmup=0, batch=2, save_every=1, eval_every=9, workers=1) | changes)


@pytest.fixture
def base(tmp_path):
    """A tiny model's folder."""
    folder = tmp_path / "base"
    huggingface.save_model(Transformer(Config.llama(258, 64, 1, 2, 8, 8), 0), folder)
    data.ByteTokenizer().save(folder / "tokenizer.json")
    (tmp_path / "known.txt").write_text("some text that it knows " * 9)
    return folder


def edit(file, change):
    raw = read_json(file)
    change(raw)
    write_json(file, raw)


def test_a_base_that_changed_is_refused(tmp_path, base):
    finetune.main(tiny_finetune(base), tmp_path / "runs")
    run, before = tmp_path / "runs" / "finetune-lora-1", {}
    for file in [*base.iterdir(), tmp_path / "known.txt"]:
        before[file] = file.read_bytes()

    def theta(raw):
        raw["rope_theta"] = raw["rope_parameters"]["rope_theta"] = 77.0

    changes = {"config.json": lambda: edit(base / "config.json", theta),
               "tokenizer.json": lambda: (base / "tokenizer.json").write_bytes(
                   before[base / "tokenizer.json"] + b"\n"),
               "known.txt": lambda: (tmp_path / "known.txt").write_text("another " * 20),
               "generation_config.json": lambda: write_json(base / "generation_config.json", {})}
    for name, change in changes.items():
        change()
        with pytest.raises(ValueError, match=f"are not those this run was started on: .*{name}"):
            finetune.main(finetune.Settings(), resume=run)
        for file, content in before.items():
            file.write_bytes(content)
    (base / "generation_config.json").unlink()
    finetune.main(finetune.Settings(), resume=run)
    edit(run / "run.json", lambda raw: raw.pop("base"))  # as 0.1.0 wrote it
    finetune.main(finetune.Settings(), resume=run)


def test_fingerprints_are_of_all_that_decides(base):
    names = {file["name"] for file in versions.fingerprints(base)}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_newest_model_finds_one_whose_save_was_killed(tmp_path):
    folder = tmp_path / "pretrain-1" / "model"
    huggingface.save_model(make_model(), folder)
    (folder / ".saved").mkdir()
    os.rename(folder / "config.json", folder / ".saved" / "config.json")
    assert newest_model(tmp_path) == folder


# Files of ours that hold what nobody wrote

NASTY = [None, True, False, 0, -1, 1, 7, 10**400, 0.5, -0.0, 1e308, "", "x", "\ud800", [], {},
         [1], [None], [[]], {"a": 1}, {"step": 1}, ["a", "b"], "lora", 2**63]
COUNT = int(os.environ.get("FUZZ", 60))


def damaged(value, rng):
    """A copy in which one place, at any depth, has another value, is gone, or is there twice."""
    value = copy.deepcopy(value)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    node, key = rng.choice(places)
    what = rng.random()
    if what < 0.7:
        node[key] = rng.choice(NASTY)
    elif what < 0.85:
        del node[key]
    elif isinstance(node, dict):
        node["more"] = rng.choice(NASTY)
    else:
        node.append(node[key])
    return value


def bytes_of(value, rng):
    """JSON, and sometimes bytes that are not."""
    text = json.dumps(value)
    if rng.random() < 0.8:
        return text.encode()
    at = rng.randrange(len(text))
    junk = rng.choice([b"\xff", b"[" * 100_000, b"NaN", b"1e999", b"9" * 5000, b"\0", b'"', b""])
    return text[:at].encode() + junk + text[at + rng.randrange(3) :].encode()


SETTINGS = [pretrain.Settings(weights=(1.0, 2.0)), finetune.Settings(),
            distill.Settings(top_k=3, sweep=(1.0,))]


def check_each(write, read, allowed=FormatError):
    """read() after write(rng): it succeeds, or FormatError names the file."""
    refused = 0
    for seed in range(COUNT):
        write(random.Random(seed))
        try:
            read()
        except allowed as error:
            assert str(error), seed
            refused += 1
    assert refused > COUNT / 5


@pytest.mark.filterwarnings("ignore:.*cannot go on bit for bit")
@pytest.mark.parametrize("s", SETTINGS, ids=["pretrain", "finetune", "distill"])
def test_fuzzed_run_json(tmp_path, s):
    run = new_run(tmp_path, asdict(s), base=[{"name": "a", "sha256": "b"}])
    good = read_json(run.path / "run.json")

    def write(rng):
        (run.path / "run.json").write_bytes(bytes_of(damaged(good, rng), rng))

    def read():
        _, own = resumed(s, run.path)
        assert type(own) is type(s)
        try:
            run.check([], "the text is not the one", [{"name": "a", "sha256": "b"}])
        except FormatError:
            raise
        except ValueError as error:
            assert "this run was started on" in str(error)

    def read_own():
        """Another number of steps is a setting that differs from the one given."""
        try:
            read()
        except FormatError as error:
            assert str(run.path / "run.json") in str(error)
            raise
        except ValueError as error:
            assert "others are given" in str(error)

    check_each(write, read_own)


def test_fuzzed_metrics(tmp_path):
    run = new_run(tmp_path)
    good = [{"step": 0, "right": {"a": 0.5}, "loss_held_out": 1.5, "loss_known": {"b": None}},
            *({"step": n, "loss": 2.0, "norm": None, "skipped": False, "validation_loss": 1.0,
               "validation_accuracy": 0.5} for n in range(1, 4))]

    def write(rng):
        lines = [json.dumps(r).encode() for r in good]
        at = rng.randrange(4)
        lines[at] = bytes_of(damaged(good[at], rng), rng)
        (run.path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n" * rng.randrange(2))

    def read():
        model = make_model()
        try:
            run.restore(model, AdamW(model.parameters()))
            records = run.records()
            for record in records[:1]:
                full = run.require(record, right=dict, loss_held_out=float, loss_known=dict)
                finetune.print_scores(full, full)
            for record in records[1:]:
                run.require(record, validation_loss=float, validation_accuracy=float)
        except FormatError as error:
            assert str(run.path / "metrics.jsonl") in str(error)
            raise

    check_each(write, read)


def test_fuzzed_metrics_are_drawn(tmp_path):
    run = new_run(tmp_path)
    (run.path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null}\n{"step": 2, "loss": true}\n{"step": 3, "loss": {"a": 1}}\n'
        '{"step": 4, "loss": 1e30}\n{"step": 9223372036854775807, "validation_loss": -1e30}\n')
    assert run.plot().exists()


@pytest.mark.filterwarnings("ignore:skipped a damaged checkpoint")
def test_fuzzed_state_with_the_right_hashes(tmp_path):
    model = make_model().astype("float16")
    optimizer, scaler = AdamW(model.parameters()), LossScaler()
    run = new_run(tmp_path)
    run.write_sample(1, "text")
    run.save(1, model, optimizer, scaler)
    (folder,) = (run.path / "checkpoints").iterdir()
    good, manifest = read_json(folder / "state.json"), read_json(folder / "manifest.json")
    held = [a.tobytes() for a in (optimizer.flat.data, optimizer.m, optimizer.v)]

    def write(rng):
        (folder / "state.json").write_bytes(bytes_of(damaged(good, rng), rng))
        told = manifest | {"state.json": checkpoint._fingerprint(folder / "state.json")}
        told = damaged(told, rng) if rng.random() < 0.2 else told
        (folder / "manifest.json").write_bytes(json.dumps(told).encode())

    def read():
        fresh = LossScaler()
        try:
            run.restore(model, optimizer, fresh)
        except FormatError:
            assert fresh.state() == LossScaler().state() and optimizer.steps >= 0
            raise
        assert fresh.scale > 0 and type(optimizer.steps) is int and optimizer.steps >= 0
        assert held == [a.tobytes() for a in (optimizer.flat.data, optimizer.m, optimizer.v)]

    check_each(write, read)


@pytest.mark.parametrize("change, said", [
    (dict(scale=0.0), r"state\.json: scaler\.scale is 0\.0"),
    (dict(scale="65536"), r"scaler\.scale is '65536'"),
    (dict(good=-1), r"scaler\.good is -1"), (dict(good=9), r"scaler\.good is 9, expected 0 to 1"),
    (dict(skipped=True), r"scaler\.skipped is True"), (dict(skipped=2), r"scaler\.skipped is 2")])
def test_a_scaler_that_cannot_be(tmp_path, change, said):
    model, scaler = make_model().astype("float16"), LossScaler()
    run, optimizer = new_run(tmp_path), AdamW(model.parameters())
    scaler.state = lambda: LossScaler().state() | change
    run.save(1, model, optimizer, scaler)
    with pytest.raises(FormatError, match=said):
        run.restore(model, optimizer, LossScaler())
    assert optimizer.steps == 0


def test_tensors_that_do_not_fit_are_refused_and_never_spread(tmp_path):
    """A moment of shape (1,) would be broadcast without a word."""
    model = make_model()
    run, optimizer = new_run(tmp_path), AdamW(model.parameters())
    run.save(1, model, optimizer)
    tensors, state = checkpoint.load(run.path / "checkpoints")
    name = "m.blocks.0.norm1.weight"
    for wrong in (np.ones(1, np.float32), tensors[name].astype(np.float64)):
        checkpoint.save(run.path / "checkpoints", tensors | {name: wrong}, state)
        with pytest.raises(FormatError, match=re.escape(name)):
            run.restore(model, optimizer)
    checkpoint.save(run.path / "checkpoints",
                    {n: t for n, t in tensors.items() if n != "model.embed.weight"}, state)
    with pytest.raises(FormatError, match=r"has no model\.embed\.weight"):
        run.restore(model, optimizer)
    assert not optimizer.m.any() and optimizer.steps == 0


def good_result():
    claim = {"claim": "a is above b", **asdict(verdict([1.0, 2.0], "a - b", at_least=0))}
    rows = tuple({"arm": arm, "seed": seed, "loss": seed + 0.5} for arm in "ab" for seed in (0, 1))
    return Result("name", "Is it?", "python x.py", False, {"lecture": {"a": 1.5}}, {"loss": 2},
                  "2026-01-01", "abc", "a machine", rows, (claim,))


def test_fuzzed_results(tmp_path):
    good_result().save(file := tmp_path / "result.json")
    assert Result.load(file) == good_result()
    good = read_json(file)

    def write(rng):
        file.write_bytes(bytes_of(damaged(good, rng), rng))

    def read():
        try:
            result = Result.load(file)
        except FormatError as error:
            assert str(file) in str(error)
            raise
        assert table(result) is not None and verdicts(result) is not None
        assert "<html" in report.page([file])

    check_each(write, read)


def test_kept_results_still_load():
    for file in (ROOT / "scripts" / "experiments").glob("*.json"):
        assert Result.load(file).rows


def test_an_experiment_that_was_killed_at_once_can_go_on(tmp_path):
    experiment = Experiment(str(tmp_path / "trial.py"), "Is it?", {}, ["a", "b"], {"loss": 1}, {})

    def killed(arm, seed, run):
        raise SystemExit

    def measured(arm, seed, run):
        return {"loss": 1.5}

    with pytest.raises(SystemExit):
        conduct(experiment, killed, [0], {}, out=tmp_path / "runs")
    run = tmp_path / "runs" / "trial-1"
    result = conduct(experiment, measured, [0], {}, resume=run)
    assert len(result.rows) == 2
    (run / "a-0" / "checkpoints").mkdir(parents=True)  # of a kill amid the removal
    conduct(experiment, measured, [0, 1], {}, resume=run)
    assert sorted(p.name for p in run.iterdir()) == ["result.json", "run.json"]


def test_values_and_annotations():
    for value, hint in [(1, int), (1, float), (1.5, float), ([], tuple), ([1], tuple[int, ...]),
                        ({"a": {"b": 1}}, dict[str, dict[str, float]]), (None, int | None),
                        ("a", str), (True, bool)]:
        assert fits(value, hint)
    for value, hint in [(True, int), (1.0, int), (2**63, int), (10**400, float), ((1,), tuple),
                        ([1, "a"], tuple[int, ...]), ({"a": None}, dict[str, float]), (0, bool),
                        ("1", int | None)]:
        assert not fits(value, hint)


def test_a_setting_of_another_kind_is_named(tmp_path):
    stored = json.loads(json.dumps(asdict(Training())))
    for change, said in [(dict(steps="9"), r"settings: steps is '9', expected int"),
                         (dict(dtype="int8"), "settings: dtype is 'int8', expected typing.Literal"),
                         (dict(batch=0), "settings: batch must be at least 1")]:
        with pytest.raises(FormatError, match=said):
            revive(Training, stored | change, tmp_path / "run.json", "settings")
    with pytest.raises(FormatError, match="expected an object"):
        revive(Training, [], tmp_path)


def test_lines_of_json(tmp_path):
    (tmp_path / "f").write_bytes(b'{"a": 1}\n[2]\n{"a')
    assert read_json_lines(tmp_path / "f") == [{"a": 1}, [2]]
    for bad in (b"\xff", b"NaN", b"1e999", b'"\\ud800"', b"[" * 100_000, b"9" * 5000):
        (tmp_path / "f").write_bytes(b"1\n" + bad + b"\n1\n")
        with pytest.raises(FormatError, match="line 2: not valid JSON"):
            read_json_lines(tmp_path / "f")
    (tmp_path / "f").write_bytes('"😀 \\ud83d\\ude00"\n'.encode())
    assert read_json_lines(tmp_path / "f") == ["😀 😀"]
    shutil.rmtree(tmp_path)
