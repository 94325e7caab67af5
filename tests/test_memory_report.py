"""scripts/memory_report.py: its table against bytes counted by hand, the spike against a run of its
own, here and on a GPU, and what it says where something is missed."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from minilm import ops
from minilm.measure import KINDS
from minilm.measure.memory import make_model
from minilm.measure.plan import plan
from minilm.measure.step import Step
from minilm.optim import AdamW
from minilm.optim.pages import SLOTS
from minilm.transformer import Config, Transformer

pytest.importorskip("tyro", reason="the script's settings need it")

import memory_report
from memory_report import (
    limited,
    main,
    print_checkpoints,
    print_spike,
    random_batch,
    unlimited,
)

LLAMA = Config.llama(1024, 64, 9, 2, 64, 170)
TINY = Step(Config.llama(64, 32, 4, 2, 32, 64), "qlora", 2, 32, 4, "all-linear", checkpoint_every=2)
PAGE = 256


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the script runs."""
    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(what it prints, the picture)."""
    picture = tmp_path_factory.mktemp("report") / "new" / "memory.png"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(layers=9, width=64, context=64, rank=8, page_size=1024, steps=4, rounds=1, out=picture)
    return said.getvalue(), picture


def lines_of(said):
    """{method: bytes by kind, total, planned}, as printed."""
    found = re.findall(r"^(\S.*?) {2,}((?: *\d+\.\d\d){8})$", said, re.M)
    return {name: dict(zip((*KINDS, "total", "planned"), map(float, cells.split())))
            for name, cells in found}


def test_the_table(report):
    said, table = report[0], lines_of(report[0])
    assert list(table) == ["full", "LoRA", "QLoRA", "+ checkpoints", "+ paging"]
    numbers = sum(p.size for p in Transformer(LLAMA).parameters())
    linear = 9 * (4 * 64 * 64 + 3 * 64 * 170)
    adapted = 9 * 8 * (4 * (64 + 64) + 3 * (64 + 170))
    codes = linear * (0.5 + 1 / 64 + 4 / 64 / 256) + 9 * 7 * 4 + 4 * (numbers - linear)
    assert f"a Llama of {numbers:,} parameters, 2 x 64 tokens" in said
    expected = {"full": (4 * numbers, 0, 4 * numbers, 8 * numbers)} | dict.fromkeys(
        ("LoRA", "QLoRA", "+ checkpoints", "+ paging"),
        (codes, 4 * adapted, 4 * adapted, 8 * adapted))
    expected["LoRA"] = (4 * numbers, *expected["LoRA"][1:])
    expected["+ paging"] = (*expected["+ paging"][:3], SLOTS * 8 * 1024)
    for name, row in table.items():
        found = [row[kind] for kind in KINDS[:4]]
        assert found == pytest.approx([n / 1e6 for n in expected[name]], abs=0.006), name
        assert row["total"] == pytest.approx(sum(row[kind] for kind in KINDS), abs=0.04)
        assert row["planned"] == pytest.approx(row["total"], rel=0.05)
    plain, saving = table["QLoRA"], table["+ checkpoints"]
    assert saving["activations"] < plain["activations"] / 4 and saving["total"] < plain["total"]
    assert f"states of {8 * adapted / 1e6:.2f} MB wait in the host's memory" in said


def test_the_page_has_totals_that_the_plan_predicts():
    page = (Path(memory_report.__file__).parent / "README.md").read_text(encoding="utf-8")
    totals = [float(total) for total in re.findall(
        r"^\| (?:full|LoRA,.*|QLoRA|\+ a check.*?) \|.* ([\d.]+) \|$", page, re.M)]
    full = Step(Config.llama(1024, 256, 16, 4, 128, 341), "full", 2, 256, 16, "all-linear")
    planned = [plan(step).total / 1e6 for step in memory_report.methods(full, PAGE)[0].values()]
    assert totals == pytest.approx(planned[:-1], rel=0.004)  # the last pages its optimizer
    assert "`plan_memory.py` predicts each total within 0.4 %." in page


def test_what_checkpoints_save(report):
    table = lines_of(report[0])
    rows = re.findall(r"^(\w+) +([\d.]+) MB -> ([\d.]+) MB, at most ([\d.]+) MB: (\w+); time x "
                      r"([\d.]+) \(([\d.]+) - ([\d.]+)\)", report[0], re.M)
    assert [row[0] for row in rows] == ["full", "QLoRA"] and "every 3 of n = 9 blocks" in report[0]
    for name, plain, saving, bound, met, *times in rows:
        plain, saving, bound = map(float, (plain, saving, bound))
        row = table[name]
        assert plain == pytest.approx(row["activations"] + row["workspace"], abs=0.02)
        assert bound == pytest.approx((2 / 3 + 1 / 9) * plain, abs=0.02)
        assert saving < plain and met == ("met" if saving <= bound else "missed")
        assert times[0] == times[1] == times[2] > "0"  # one turn
    found = table["+ checkpoints"]
    assert float(rows[1][2]) == pytest.approx(found["activations"] + found["workspace"], abs=0.02)


def test_a_goal_that_is_missed_is_said_to_be(monkeypatch, capsys):
    """Of measured bytes and seconds that are made up."""
    full = Step(LLAMA, "full", 2, 64)
    peak = dict.fromkeys(KINDS, 0) | {"activations": 9_000_000}
    monkeypatch.setattr(memory_report, "measured", lambda step: peak)
    monkeypatch.setattr(memory_report, "in_turn", lambda steps, rounds: [(1.0, 1.5)] * rounds)
    print_checkpoints(full, {"full": peak, "QLoRA": peak, "+ checkpoints": peak}, 3)
    said = capsys.readouterr().out
    assert ("full      9.00 MB -> 9.00 MB, at most 7.00 MB: missed; time x 1.50 (1.50 - 1.50), at "
            "most 1.4: missed\n") in said
    monkeypatch.setattr(memory_report, "in_turn", lambda steps, rounds: [(1.0, 1.3)] * rounds)
    small = dict.fromkeys(KINDS, 0) | {"activations": 7_000_000}
    monkeypatch.setattr(memory_report, "measured", lambda step: small)
    print_checkpoints(full, {"full": peak, "QLoRA": peak, "+ checkpoints": small}, 3)
    assert "at most 7.00 MB: met; time x 1.30 (1.30 - 1.30), at most 1.4: met" in (
        capsys.readouterr().out)


def test_the_spike_is_told(report):
    wanted, spike, allowed = map(float, re.search(
        r"wanted: ([\d.]+) MB, in the spike ([\d.]+) MB; allowed: ([\d.]+) MB", report[0]).groups())
    row = lines_of(report[0])["+ checkpoints"]
    assert wanted < allowed < spike == pytest.approx(row["total"], rel=0.02)
    assert allowed == pytest.approx(spike - 0.75 * row["optimizer"], abs=0.02)
    assert "AdamW:      step 3: out of memory allocating" in report[0]
    assert "PagedAdamW: finished with the same losses as AdamW without a limit" in report[0]
    assert report[1].read_bytes()[:4] == b"\x89PNG" and report[0].endswith(f"{report[1]}\n")


def batches_with_a_spike(count=4, spike=2):
    return [random_batch(TINY, 32 if i == spike else 8, i) for i in range(count)]


def plain_losses(batches):
    """A run of AdamW as a reader would write it."""
    model, losses = make_model(TINY), []
    optimizer = AdamW(model.parameters(), memory_report.LR)
    for tokens, targets in batches:
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(tokens), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.data))
    return losses


def test_the_run_under_a_limit():
    """No moment is above the limit, states are whole between device and host, and only the spike
    sends them away."""
    batches = batches_with_a_spike()
    losses, peaks = unlimited(TINY, batches)
    assert losses == plain_losses(batches)
    whole, states = sum(peaks[2].values()), peaks[2]["optimizer"]
    budget = whole - states // 2
    done, _, error = limited(TINY, batches, peaks, budget)
    assert done == losses[:2] and "out of memory" in error
    found, moments, error = limited(TINY, batches, peaks, budget, PAGE)
    assert (found, error) == (losses, "") and len(moments) == 8
    for i, moment in enumerate(moments):
        assert sum(moment.kinds.values()) <= budget
        assert moment.kinds["optimizer"] + moment.away >= states
        assert (moment.away > 0) == (i == 4)
        assert moment.kinds["activations"] == (0 if i % 2 else peaks[i // 2]["activations"])
    assert limited(TINY, batches, peaks, whole)[2] == ""
    assert limited(TINY, batches, peaks, whole - states + 100, PAGE)[0] == losses[:2]


def test_other_losses_are_said_to_be(monkeypatch, capsys):
    class Wrong(memory_report.PagedAdamW):
        def update(self, part, t, lr, scale=1.0):
            super().update(part, t, 2 * lr, scale)

    monkeypatch.setattr(memory_report, "PagedAdamW", Wrong)
    print_spike(TINY, 4, PAGE)
    assert "finished with OTHER LOSSES THAN AdamW" in capsys.readouterr().out


def test_a_spike_that_is_none():
    with pytest.raises(ValueError, match=r"steps of [\d,]+ bytes do not fit into .* smaller rank"):
        print_spike(replace(TINY, r=24), 4, PAGE)


@pytest.mark.kernels
def test_the_spike_on_a_gpu(cupy, capsys):
    """The pool has the limit there, and asks for pages by itself. The states are large enough that
    a quarter of them holds the pieces of the pool's chunks that no array fits into."""
    config = Config.llama(64, 32, 2, 2, 64, 128)
    step = replace(TINY, config=config, r=64, batch=16, checkpoint_every=1, device="cuda")
    others = cupy.empty(1 << 20, "uint8")  # what the process holds besides does not count
    moments, _, done = print_spike(step, 4, PAGE)
    said = capsys.readouterr().out
    assert done == 2 and "step 3: Out of memory allocating" in said
    assert "finished with the same losses as AdamW without a limit" in said
    assert np.argmax([moment.away for moment in moments]) == 4 and others.size == 1 << 20
