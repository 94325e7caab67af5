"""Training on ranks, which here are threads: the bits of one process, one writer, other ranks that
go on, and the programs from their settings to what they leave behind."""

import contextlib
import dataclasses
import itertools
import math
import threading
from dataclasses import asdict
from types import SimpleNamespace

import finetune
import numpy as np
import pretrain
import pytest
from test_comm import PretendedNccl
from test_loop import BATCHES, SMALL, STREAM, new_run, saved

from minilm import backend, data, joining, launch, loop
from minilm.adapting import METHODS, OWN_RULE
from minilm.command import command
from minilm.files import FormatError
from minilm.interop import huggingface
from minilm.joining import Ranks, adamw_of, again, begun, joined
from minilm.joining import new_run as make_run
from minilm.loop import fit
from minilm.optim import AdamW, LossScaler
from minilm.parallel.comm import Local, ranks
from minilm.parallel.nccl import Nccl
from minilm.ranks import RankRun, RankTrainer
from minilm.run import RunDirectory
from minilm.train import Diverged, LabelLoss, Trainer
from minilm.transformer import Config, Transformer

STAGES = pytest.mark.parametrize("stage", range(4))
HELD_OUT = data.cut(STREAM, 6)


def make_model(dtype="float32"):
    return Transformer(Config.gpt2(13, 6, layers=2, heads=2, width=8, dropout=0.2), 0).astype(dtype)


def bits(model):
    return {name: t.data.tobytes() for name, t in model.named_tensors()}


def steps(trainer, count=3, clip=math.inf):
    """What `count` steps report, without their time, an evaluation, and the scale at the end."""
    done = [trainer.step(i, BATCHES[i], 0.05, clip, accumulate=4) for i in range(count)]
    return ([(d.step, d.loss, d.norm, d.targets, d.skipped) for d in done],
            trainer.evaluate(*HELD_OUT, batch=4), trainer.scaler and trainer.scaler.state())


def alone(dtype="float32", scale=None, **changes):
    """Of one process: (bits of the model, what `steps` gave)."""
    model = make_model(dtype)
    with Trainer(model, AdamW(model.parameters()), seed=7,
                 scaler=scale and LossScaler(scale, interval=2)) as trainer:
        found = steps(trainer, **changes)
    return bits(model), found


def on_ranks(comm, stage, dtype="float32", scale=None, **changes):
    """The same of a rank."""
    model = make_model(dtype)
    optimizer = adamw_of(Ranks(comm, stage), model)(model.parameters())
    with RankTrainer(model, optimizer, 7, scale and LossScaler(scale, interval=2)) as trainer:
        found = steps(trainer, **changes)
    return bits(model), found


def without_norms(found):
    done, *rest = found
    return [(*d[:2], *d[3:]) for d in done], *rest


# The trainer


@STAGES
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_ranks_have_the_bits_of_one_process_that_accumulates(n, stage, dtype):
    """With dropout. The norm alone is rounded otherwise."""
    expected, reported = alone(dtype)
    for model, found in ranks(n, lambda comm: on_ranks(comm, stage, dtype)):
        assert model == expected and without_norms(found) == without_norms(reported)
        assert np.allclose(*([d[2] for d in f[0]] for f in (found, reported)), rtol=1e-6, atol=0)


@STAGES
def test_any_ranks_clip_as_one_rank(stage):
    expected = on_ranks(Local(ordered=True), 0, clip=0.3)
    assert min(d[2] for d in expected[1][0]) > 0.3
    assert ranks(4, lambda comm: on_ranks(comm, stage, clip=0.3)) == [expected] * 4


@STAGES
def test_all_ranks_skip_the_step_that_overflows(stage):
    expected, reported = alone("float16", 2.0**21, count=7)
    skipped = [d[4] for d in reported[0]]
    assert skipped[0] and not all(skipped) and reported[2]["skipped"] == sum(skipped)
    for model, found in ranks(2, lambda comm: on_ranks(comm, stage, "float16", 2.0**21, count=7)):
        assert model == expected and [d[4] for d in found[0]] == skipped
        assert found[1:] == reported[1:]


@STAGES
def test_a_sum_over_ranks_that_overflows_is_a_step_to_skip(stage):
    """Each rank's own gradients are finite. Nobody is warned of it, either."""
    def run(comm):
        model = make_model()
        trainer = RankTrainer(model, adamw_of(Ranks(comm, stage), model)(None),
                              scaler=LossScaler(1024.0))

        def backward(rows, totals, scale, seed):
            for t in model.parameters():
                t.on_grad(np.full(t.shape, trainer.size, np.float32))
            return 1.0

        trainer._backward = backward
        for trainer.size in (1.0, 3e38, 1.0):
            yield trainer.step(0, BATCHES[0], accumulate=2).skipped
        yield trainer.scaler.scale

    assert ranks(2, lambda comm: [*run(comm)]) == [[False, True, False, 512.0]] * 2


def test_a_step_without_a_scaler_that_is_not_finite_ends_all_ranks():
    class Spoiled(LabelLoss):
        def __call__(self, model, *rows, totals):
            return super().__call__(model, *rows, totals=totals) * math.nan

    def run(comm):
        model = make_model()
        trainer = RankTrainer(model, adamw_of(Ranks(comm, 1), model)(None), loss=Spoiled())
        with pytest.raises(Diverged, match="step 0: loss nan"):
            trainer.step(0, BATCHES[0], accumulate=2)
        return True

    assert ranks(2, run) == [True, True]


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [0, 3])
def test_an_evaluation_is_shared_and_has_the_bits_of_one_process(pieces, stage):
    rows = [a[: 4 * pieces - 1] for a in HELD_OUT]
    model = make_model()
    expected = Trainer(model, AdamW(model.parameters())).evaluate(*rows, batch=4)
    calls = []

    def run(comm):
        model = make_model()
        trainer = RankTrainer(model, adamw_of(Ranks(comm, stage), model)(None))
        evaluate, own = trainer._evaluate, []
        trainer._evaluate = lambda *a: own.append(len(a[0])) or evaluate(*a)
        found = trainer.evaluate(*rows, batch=4)
        calls.append(len(own))
        return found

    assert ranks(3, run) == [expected] * 3
    assert calls == [-(-pieces // 3)] * 3


def test_inside_whole_a_forward_pass_leaves_the_parameters_here():
    """In stage 3, where it gives them back otherwise; afterwards they are here for good."""
    def run(comm):
        model, expected = make_model(), bits(make_model())
        with RankTrainer(model, adamw_of(Ranks(comm, 3), model)(None)) as trainer:
            with trainer.whole():
                trainer.evaluate(*HELD_OUT)
                assert bits(model) == expected
            assert not model.blocks[0].mlp.up.weight.data.any()
        trainer.evaluate(*HELD_OUT)
        return bits(model) == expected

    assert ranks(2, run) == [True, True]


def test_micro_batches_that_cannot_be_shared_are_refused():
    def run(comm):
        model = make_model()
        trainer = RankTrainer(model, adamw_of(Ranks(comm, 0), model)(None))
        trainer.step(0, BATCHES[0], accumulate=4 if comm.size == 3 else 1)

    said = r"4 micro-batches a step cannot be shared evenly by 3 ranks: .* a multiple of 3"
    with pytest.raises(ValueError, match=said) as caught:
        ranks(3, run)
    assert "of 3, in step 1" in caught.value.__notes__[0]


# The loop


def trained(run, comm, stage, settings=SMALL, stop=None):
    """Train with fit on a rank; stop: after this step, as a crash would. The steps and losses."""
    model = make_model(settings.dtype)
    if comm:
        run, optimizer = RankRun(run.path, comm), adamw_of(Ranks(comm, stage), model)(None)
    else:
        optimizer = AdamW(model.parameters(), weight_decay=0.01)
    for _, done in fit(run, model, BATCHES, settings, optimizer=optimizer, accumulate=4):
        if done.targets:
            run.log(**asdict(done))
            run.write_sample(done.step, f"{done.loss}")
        if done.step == stop:
            return done.step
    return bits(model)


def logged(run):
    return [(r["step"], r["loss"], r["norm"]) for r in run.records()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_goes_on_with_other_ranks_in_another_stage(tmp_path, dtype):
    s = dataclasses.replace(SMALL, dtype=dtype, save_every=1)
    straight, run = new_run(tmp_path), new_run(tmp_path)
    expected = trained(straight, Local(ordered=True), 0, s)
    for n, stage, stop in ((4, 3, 2), (1, 2, 3), (2, 1, 5), (2, 0, 6)):
        assert ranks(n, lambda comm: trained(run, comm, stage, s, stop)) == [stop] * n
    found = ranks(4, lambda comm: trained(run, comm, 2, s))
    assert found == [expected] * 4
    assert saved(run) == saved(straight) and logged(run) == logged(straight)
    samples = [(r.path / "samples.txt").read_text() for r in (run, straight)]
    assert samples[0] == samples[1] and samples[0].count("===") == s.steps


def test_one_process_goes_on_with_a_run_of_ranks_and_they_with_its(tmp_path):
    """With the same bits as long as no gradient is clipped."""
    s = dataclasses.replace(SMALL, clip=math.inf, save_every=1)
    straight, run = new_run(tmp_path), new_run(tmp_path)
    expected = trained(straight, None, None, s)
    ranks(2, lambda comm: trained(run, comm, 3, s, stop=2))
    assert trained(run, None, None, s, stop=5) == 5
    assert ranks(2, lambda comm: trained(run, comm, 2, s)) == [expected] * 2
    assert saved(run) == saved(straight)
    assert [x[:2] for x in logged(run)] == [x[:2] for x in logged(straight)]


def test_a_checkpoint_of_another_model_is_refused_on_all_ranks(tmp_path):
    run = new_run(tmp_path)
    trained(run, None, None, dataclasses.replace(SMALL, steps=2))

    def other(comm):
        model = Transformer(Config.gpt2(13, 6, layers=1, heads=2, width=8))
        optimizer = adamw_of(Ranks(comm, 2), model)(None)
        with pytest.raises(FormatError, match="moments are of another model"):
            list(fit(RankRun(run.path, comm), model, BATCHES, SMALL, optimizer=optimizer))
        return True

    assert ranks(2, other) == [True, True]


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step(tmp_path, monkeypatch):
    run, own = new_run(tmp_path), threading.local()

    @contextlib.contextmanager
    def finish_on_interrupt():
        asked = itertools.count()
        yield lambda: own.rank == 1 and next(asked) >= 2

    def one(comm):
        own.rank = comm.rank
        trained(run, comm, 1)
        return len(run.records())

    monkeypatch.setattr(loop, "finish_on_interrupt", finish_on_interrupt)
    assert ranks(2, one) == [3, 3]
    assert saved(run)[1] == 3


def test_ranks_that_find_other_checkpoints_are_told(tmp_path):
    """As if each had a disk of its own."""
    runs = [new_run(tmp_path), new_run(tmp_path)]
    trained(runs[0], None, None, dataclasses.replace(SMALL, steps=2))
    with pytest.raises(RuntimeError, match=r"found checkpoints of the steps \[0, 2\]"):
        ranks(2, lambda comm: trained(runs[comm.rank], comm, 0))


# The programs


@pytest.fixture
def folder(tmp_path):
    """Of an untrained model; beside it a text."""
    model = Transformer(Config.gpt2(258, 26, layers=2, heads=2, width=16), seed=1)
    huggingface.save_model(model, tmp_path / "base", data.ByteTokenizer())
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 40)
    return tmp_path


def of_pretrain(folder, **changes):
    small = dict(corpus=(str(folder / "text.txt"),), layers=2, heads=2, width=8, context=8, batch=8,
                 steps=4, warmup=2, eval_every=2, save_every=2, sample=9, lr=1e-2, accumulate=4)
    return pretrain.Settings(**{k: v for k, v in (small | changes).items() if v is not None})


def of_finetune(folder, **changes):
    small = dict(model=str(folder / "base"), known=(str(folder / "text.txt"),), train=20, test=2,
                 data=("upper",), r=2, batch=8, steps=3, warmup=1, eval_every=2, save_every=2,
                 k=1, m=3, length=3, hidden=5, attention_dropout=0.1, accumulate=4)
    return finetune.Settings(**small | changes)


def kept(run):
    """All that a run leaves, but for times, and the picture."""
    files = {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for name in ("metrics.jsonl", "loss.png"):
        files.pop(name, None)
    records = RunDirectory(run).records()
    return files, [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def on(n, stage, main, s, out, **settings):
    """A program on n ranks: what its only run leaves."""
    ranks(n, lambda comm: main(s, out, stage=stage, comm=comm, **settings))
    (run,) = out.iterdir()
    return kept(run)


@pytest.fixture
def plain(monkeypatch):
    """Without the curves, which take longer than the run."""
    monkeypatch.setattr(RunDirectory, "plot", lambda run: None)


@STAGES
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_pretrain_leaves_the_same_on_any_ranks(folder, plain, capsys, stage, family):
    s = of_pretrain(folder, family=family, dropout=0.1)
    expected = on(1, 0, pretrain.main, s, folder / "one")
    said = capsys.readouterr().out
    assert "1 rank in stage 0, from step 0" in said and "held out: loss" in said
    assert on(2, stage, pretrain.main, s, folder / "two") == expected
    assert f"2 ranks in stage {stage}, from step 0" in capsys.readouterr().out
    assert {"model/model.safetensors", "samples.txt", "run.json"} <= expected[0].keys()


def test_pretrain_goes_on_from_a_model_on_ranks(folder, plain):
    s = of_pretrain(folder, init=str(folder / "base"), method="lora", accumulate=2,
                    **dict.fromkeys(("layers", "heads", "width"), None))
    expected = on(1, 2, pretrain.main, s, folder / "one")
    assert on(2, 3, pretrain.main, s, folder / "two") == expected
    assert "known" in expected[1][0] and "adapter/adapter_model.safetensors" in expected[0]


@pytest.mark.parametrize("method", [m for m in METHODS if m not in OWN_RULE])
def test_finetune_leaves_the_same_on_any_ranks(folder, method):
    s = of_finetune(folder, method=method)
    expected = on(1, 1, finetune.main, s, folder / "one")
    assert on(2, 3, finetune.main, s, folder / "two") == expected
    assert [r["step"] for r in expected[1]] == [0, 1, 2, 3, 3]


def test_a_program_that_fails_on_ranks_goes_on(folder, plain, monkeypatch):
    s, step = of_pretrain(folder), RankTrainer.step

    def fail(trainer, number, *args):
        if number == 3 and trainer.comm.rank == 1:
            raise OSError(28, "No room", "disk")
        return step(trainer, number, *args)

    expected = on(1, 0, pretrain.main, s, folder / "one")
    with monkeypatch.context() as patch:
        patch.setattr(RankTrainer, "step", fail)
        with pytest.raises(OSError, match="No room") as caught:
            on(2, 2, pretrain.main, s, folder / "two")
    run = folder / "two" / "pretrain-1"
    assert f"go on with: --resume {run}" in caught.value.__notes__
    resume = dict(resume=run)
    assert on(4, 1, pretrain.main, pretrain.Settings(), folder / "two", **resume) == expected


# Settings


def test_a_step_has_as_many_micro_batches_as_ranks_if_nothing_is_said(tmp_path):
    class Four(Local):
        size = 4

    s = pretrain.Settings()
    of = Ranks(Four(), 2)
    assert begun(of, s, None, frozenset())[1] == dataclasses.replace(s, workers=1, accumulate=4)
    assert begun(of, dataclasses.replace(s, accumulate=8), None, {"accumulate"})[1].accumulate == 8
    assert begun(None, s, None, frozenset())[1].accumulate == 1
    for wrong, given, said in (
            (dict(), {"accumulate"}, "1 micro-batches a step cannot be shared evenly by 4 ranks"),
            (dict(accumulate=6), (), "6 micro-batches a step cannot be shared evenly by 4 ranks"),
            (dict(batch=3), (), "batch is 3, but each of 4 ranks needs a row"),
            (dict(batch=3, accumulate=4), (), "accumulate must be 1 to the batch's 3 rows, got 4"),
            (dict(workers=2), {"workers"}, "workers is given, but with --stage each rank is one"),
            (dict(threads=True), {"threads"}, "threads is given, but with --stage each rank is")):
        with pytest.raises(ValueError, match=said):
            begun(of, dataclasses.replace(s, **wrong), None, frozenset(given))
    for wrong, said in ((dict(optimizer="mezo"), "mezo has an update rule"),
                        (dict(method="adalora"), "adalora has an update rule"),
                        (dict(method="subspace"), "subspace has an update rule")):
        with pytest.raises(ValueError, match=said):
            begun(of, finetune.Settings(**wrong), None, frozenset())
    six = dataclasses.replace(s, workers=1, accumulate=6)
    run = RunDirectory.create(tmp_path, "run", asdict(six), [])
    with pytest.raises(ValueError, match=r"^a step of this run has 6 micro-batches, which 4 ranks "
                                         r"cannot share evenly: go on with as many ranks as"):
        begun(of, s, run.path, frozenset())
    run = RunDirectory.create(tmp_path, "run", asdict(dataclasses.replace(s, workers=3)), [])
    with pytest.raises(ValueError, match=r"others are given: workers 1 \(it has 3\)"):
        begun(of, s, run.path, frozenset())


def test_a_run_on_ranks_is_made_once_and_all_know_where(tmp_path):
    def make(comm):
        return make_run(Ranks(comm, 1), tmp_path, "Zoë", {}, []).path

    assert ranks(3, make) == [tmp_path / "Zoë-1"] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["Zoë-1"]


def test_stages_are_0_to_3():
    assert joined(None) is None and joined(3).comm.size == 1
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"stage must be 0 to 3, got {wrong}"):
            joined(wrong)


def test_what_to_type_to_go_on():
    class Two(Local):
        size = 2

    run = RunDirectory("runs/pretrain-1")
    assert again(None, "p.py", run).endswith("p.py --resume runs/pretrain-1")
    words = again(Ranks(Local(), 3), "p.py", run)
    assert words.endswith("p.py --resume runs/pretrain-1 --stage 3") and "mpiexec" not in words
    assert again(Ranks(Two(), 3), "p.py", run) == f"mpiexec -n 2 {words}"
    on_gpus = again(Ranks(Two(), 1, "cuda"), "p.py", run)
    assert on_gpus.endswith("--resume runs/pretrain-1 --stage 1 --device cuda")


@pytest.mark.parametrize("known, said", [
    (True, "started 2 of this program, .*: give --stage 0, 1, 2 or 3, and they train together"),
    (False, "started 2 of this program, .*: start it without mpiexec")])
def test_several_processes_that_know_nothing_of_each_other_are_refused(monkeypatch, known, said):
    launch.require_stage(known, frozenset())
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(ValueError, match=said):
        launch.require_stage(known, frozenset())
    if known:
        launch.require_stage(known, {"stage"})


def test_one_process_of_mpiexec_is_as_any_other(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    monkeypatch.setattr("sys.argv", ["program.py"])

    def main():
        raise ValueError("bad")

    with pytest.raises(SystemExit, match=r"^program\.py: bad$"):
        command(main)


# On GPUs


@pytest.mark.parametrize("program, stage", [("pretrain", 2), ("finetune", 1)])
def test_a_rank_on_a_gpu_trains_as_on_a_cpu(cupy, folder, plain, capsys, monkeypatch, request,
                                            program, stage):
    """Where there is no GPU, NCCL is a stand-in of one rank; it takes no array of the host."""
    if request.node.callspec.params["cupy"] == "emulated":
        monkeypatch.setattr(backend, "nccl", PretendedNccl)
        one = SimpleNamespace(use=int)
        monkeypatch.setattr(cupy.cuda, "Device", lambda number: one, raising=False)
    else:
        pytest.importorskip("cupy.cuda.nccl")
    monkeypatch.setattr(joining, "on_cards", lambda host: Nccl(host, host.ordered))
    main, of = (pretrain.main, of_pretrain) if program == "pretrain" else (
        finetune.main, of_finetune)
    found = {}
    for device in ("cpu", "cuda"):
        main(of(folder), folder / device, stage=stage, device=device, comm=Local(ordered=True))
        (run,) = (folder / device).iterdir()
        found[device] = kept(run)
    said = capsys.readouterr().out
    assert f"1 rank in stage {stage}, from" in said
    assert f"1 rank in stage {stage} on GPUs, from" in said
    assert found["cpu"][0].keys() == found["cuda"][0].keys()
    for mine, other in zip(found["cpu"][1], found["cuda"][1], strict=True):
        assert mine["step"] == other["step"]
        assert mine.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)


@pytest.mark.parametrize("stage, said", [
    (None, "--device cuda needs --stage: take 0 for one GPU"),
    (3, "stage 3 is for a CPU, whose memory can be given back .*: take stage 2")])
def test_a_stage_that_a_gpu_cannot_have_is_refused_before_a_run_begins(folder, stage, said):
    with pytest.raises(ValueError, match=said):
        pretrain.main(of_pretrain(folder), folder / "out", stage=stage, device="cuda")
    assert not (folder / "out").exists()
