"""bench/benchmark.py --device cuda, without a GPU: what it runs and what it prints is right.

Every row's calls run once, at tiny sizes, on the stand-in for CuPy, and are held against NumPy;
the step's twin in PyTorch, on the CPU, against our model. Nothing here takes times.
"""

import gc
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import benchmark
import gpu_kernels
import gpu_pages
import gpu_rows
import gpu_step
import gpu_table
import numpy as np
import pytest
import torch
from conftest import close
from gpu_table import H200, Ceilings, line

from minilm.attention import attention
from minilm.backend import to_device
from minilm.optim import AdamW
from minilm.optim.adamw import adamw as adamw_formula
from minilm.quantize import fourbit, quantize_4bit
from minilm.tensor import Tensor
from minilm.transformer import Config

ROOT = Path(__file__).resolve().parents[1]
SHAPES = (24, 128), (40, 64)  # (O, I), the first for the goals
TINY = Config.llama(97, 16, layers=2, heads=4, width=64, hidden=320, kv_heads=2)


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "COLD", 1.0)  # two a pass


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads gain nothing with tensors this small, and lose much where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def host(x):
    return to_device(getattr(x, "data", x) if type(x).__name__ == "Tensor" else x, "cpu")


def run(side):
    """(arguments as they were, result) of each call of a pass, on the host."""
    for call in side()():
        before = [host(a).copy() for a in call.args if hasattr(a, "dtype")]
        result = call()
        yield before, [host(r) for r in result] if isinstance(result, tuple) else host(result)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def dense(shape, double):
    """What the benchmark's weights of this shape stand for."""
    return quantize_4bit(normal(0, *shape), double_quant=double).dequantize()


def test_dequantize(cupy):
    rows = gpu_kernels.dequantize_rows(*SHAPES)
    assert len(rows) == 6 and [bool(row.share) for row in rows] == 4 * [False] + 2 * [True]
    for row in rows:
        shape = next(s for s in SHAPES if gpu_kernels.by(s) in row.title)
        dtype = "bfloat16" if "bfloat16" in row.title else "float32"
        expected = dense(shape, "double" in row.title).astype(dtype)
        for _, found in run(row.ours):
            np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


def test_quantize(cupy):
    for row, shape in zip(gpu_kernels.quantize_rows(*SHAPES), SHAPES, strict=True):
        expected = quantize_4bit(normal(0, *shape), double_quant=False)
        for _, (packed, c2) in run(row.ours):
            np.testing.assert_array_equal(packed, expected.packed)
            np.testing.assert_array_equal(c2, expected.c2)


def test_few_rows(cupy):
    rows = gpu_kernels.few_rows(SHAPES, counts=(1, 16))
    assert [(row.share, row.speed) for row in rows] == 2 * [(0.5, 4.0)] + 2 * [(0.0, 0.0)]
    for row in rows:
        shape = next(s for s in SHAPES if row.title.split("with ")[1].startswith(gpu_kernels.by(s)))
        M, W = int(re.search(r"of (\d+) x", row.title)[1]), dense(shape, True)
        for side in (row.ours, row.other):
            for (x,), y in run(side):
                assert x.shape == (M, shape[1])
                close(y, x.astype(np.float64) @ W.T, "bfloat16")


def test_lora(cupy):
    rows = gpu_kernels.lora_rows(SHAPES, M=20, r=4)
    assert len(rows) == 4 and all(row.speed == pytest.approx(1 / 1.1) for row in rows)
    for forward, backward, shape in zip(rows[::2], rows[1::2], SHAPES):
        W = dense(shape, True)
        for (x, A, B), y in run(forward.ours):
            x, A, B = (a.astype(np.float64) for a in (x, A, B))
            close(y, x @ W.T + 2 * x @ A.T @ B.T, "bfloat16")
        inputs = gpu_kernels.lora_inputs(shape, 20, 4)
        for (x, _, A, B, _), ((dy,), (dx, dA, dB)) in zip(inputs, run(backward.ours), strict=True):
            x, A, B, dy = (host(a).astype(np.float64) for a in (x, A, B, dy))
            close(dx, dy @ W + 2 * dy @ B @ A, "bfloat16")
            close(dA, 2 * (dy @ B).T @ x, "bfloat16")
            close(dB, 2 * dy.T @ (x @ A.T), "bfloat16")
        for row, turned in (forward, True), (backward, False):
            for (x, W), y in run(row.other):
                x, W = x.astype(np.float64), W.astype(np.float64)
                assert W.shape == (shape[::-1] if turned else shape)
                close(y, x @ W, "bfloat16")


def test_reference(cupy):
    forward, backward = gpu_kernels.reference_rows(n=70, r=3)
    for side in (forward.ours, forward.other):
        for (x, W, A, B), (y, h) in run(side):
            x, W, A, B = (a.astype(np.float64) for a in (x, W, A, B))
            close(h, 2 * x @ A.T, "float32")
            close(y, x @ W.T + 2 * x @ A.T @ B.T, "float32")
    for side in (backward.ours, backward.other):
        for arrays, (dx, dA, dB) in run(side):
            dy, x, h, W, A, B = (a.astype(np.float64) for a in arrays)
            close(dx, dy @ W + 2 * dy @ B @ A, "float32")
            close(dA, 2 * (dy @ B).T @ x, "float32")
            close(dB, dy.T @ h, "float32")


def test_attention(cupy):
    rows = gpu_kernels.attention_rows(B=2, H=4, K=2, T=20, D=16, device="cpu")

    def spec(*arrays):
        dy, *qkv = (np.asarray(a, np.float64) for a in arrays)
        q, k, v = (Tensor(a, requires_grad=True) for a in qkv)
        y = attention(q, k, v, causal=True)
        y.backward(dy)
        return y.data, q.grad, k.grad, v.grad

    for forward, backward in zip(rows[0].ours()()[:1], rows[1].ours()()[:1]):
        close(host(forward()[0]), spec(*map(host, forward.args[:1] + forward.args[:3]))[0],
              "bfloat16")
        for found, expected in zip(backward(), spec(*map(host, backward.args[:4]))[1:]):
            close(host(found), expected, "bfloat16")
    for forward, backward in zip(rows[0].other()(), rows[1].other()()):
        q, k, v = (a.detach().float() for a in forward.args)
        close(forward().detach().float(), spec(q, q, k, v)[0], "bfloat16")
        (q, k, v), dy = ([a.detach().float() for a in part] for part in (
            backward.args[1], backward.args[2:]))
        for found, expected in zip(backward(), spec(*dy, q, k, v)[1:], strict=True):
            close(found.float(), expected, "bfloat16")


@pytest.mark.parametrize("rows", [gpu_rows.swiglu_rows, gpu_rows.rms_norm_rows])
def test_what_is_between_products(cupy, rows):
    one, two = rows(rows=3, width=24, device="cpu")
    def exact(a): return torch.tensor(host(a).astype(np.float64))
    for call in one.ours()()[:1]:
        inputs = [exact(a) for a in call.args]
        theirs = one.other()()[0].func(*inputs)
        close(host(call()), theirs, "bfloat16")
    for call in two.ours()()[:1]:
        dy, *inputs = (exact(a) for a in call.args)
        leaves = [a.requires_grad_() for a in inputs]
        for found, expected in zip(call(), two.other()()[0].func(dy, *leaves), strict=True):
            close(host(found), expected.detach(), "bfloat16")


def test_adamw(cupy):
    (row,) = gpu_kernels.adamw_rows(n=1001, device="cpu")
    calls = row.ours()()
    for call in calls:
        p, g, m, v = (host(a).copy() for a in call.args[:4])
        adamw_formula(p, g, m, v, *call.args[4:])
        call()
        for found, expected in zip(call.args, (p, g, m, v)):
            np.testing.assert_array_equal(host(found), expected)
    for step in row.other()():
        (p,) = step.__self__.param_groups[0]["params"]
        ours, g, zero = p.detach().numpy().copy(), p.grad.numpy(), np.zeros(1001, np.float32)
        adamw_formula(ours, g, zero, zero.copy(), *calls[0].args[4:])
        step()
        close(p.detach().numpy(), ours, "float32")


def test_a_pass_reads_more_than_the_cache_holds(cupy, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "COLD", 5e3)
    calls = gpu_kernels.few_row((64, 128), 1, False).ours()()
    codes = [call.args[1].packed for call in calls]
    assert sum(c.nbytes for c in codes) >= 4e3 and len(calls) == 2
    assert len({c.data.ptr for c in codes}) == len({c.args[0].data.ptr for c in calls}) == 2
    monkeypatch.setattr(gpu_kernels, "COLD", 180e6)
    assert [gpu_kernels.distinct(gpu_table.code_bytes(s, True))
            for s in (gpu_kernels.SQUARE, gpu_kernels.LARGE)] == [21, 8]


def test_floors():
    dequantize = {row.title: H200.seconds(row.work) for row in gpu_kernels.dequantize_rows()}
    n = 11008 * 4096
    one = dequantize["nf4_dequantize 11008 x 4096 to bfloat16, float32 constants"]
    assert one == pytest.approx((n / 2 + n / 64 * 4 + 2 * n) / 4.3e12) == pytest.approx(26.87e-6,
                                                                                        rel=1e-3)
    two = dequantize["nf4_dequantize 11008 x 4096 to bfloat16, double quantized"]
    assert two == pytest.approx(26.37e-6, rel=1e-3)

    forward = gpu_kernels.lora_rows()[0]
    assert forward.work[0] == forward.added[0] == (n * (2.5 + 1 / 64 + 1 / 4096), 0)
    assert H200.seconds(forward.work) == pytest.approx(two + 2 * 2048 * (n + 16 * 15104) / 790e12)
    assert H200.seconds(gpu_kernels.few_row((11008, 4096), 16, True).work) == pytest.approx(
        (n * (0.5 + 1 / 64 + 1 / 4096) + 32 * 15104) / 4.3e12)
    forward, backward = (H200.seconds(row.work) for row in gpu_kernels.attention_rows())
    scores = 4 * 32 * 1024 * 1024 * 64
    assert forward == pytest.approx(4 * scores / 2 / 790e12) and forward > 21e-6
    assert backward == pytest.approx(10 * scores / 2 / 790e12)
    assert H200.seconds(gpu_kernels.adamw_rows()[0].work) == pytest.approx(28 * 2**24 / 4.3e12)


def test_the_steps_floor():
    weights, adapters = 1_034_420_224 - 65_536_000, 12_615_680  # the linear layers but the head's
    attended = 22 * 1024 * 2048  # a token's, half of them masked
    forward, head = 2 * (weights + adapters + attended), 4 * 65_536_000
    backward = 2 * (weights + 2 * adapters + 2 * attended)
    for checkpoint in (False, True):
        (made, _), (_, flops) = gpu_step.step_row(gpu_step.LLAMA, 4, checkpoint).work
        assert flops == 4096 * ((1 + checkpoint) * forward + backward + head)
        assert made == pytest.approx((2 + checkpoint) * weights * (2.5 + 1 / 64 + 1 / 4096))


@pytest.mark.parametrize("ours, other, share, speed, met", [
    (2e-3, 8e-3, "50%", "4.00", "met"), (2e-3, 7e-3, "50%", "3.50", "missed"),
    (3e-3, 15e-3, "33%", "5.00", "missed")])
def test_a_line_says_whether_its_goals_are_met(ours, other, share, speed, met):
    row = gpu_table.Row("what", ((1e9, 5e8),), None, "them", print, share=0.5, speed=4.0)
    assert line(row, Ceilings(1e12, 1e12), [ours], [other]) == (
        f"| what | 1.00 ms | {1e3 * ours:.2f} ms | {share} | them: {1e3 * other:.2f} ms | {speed} "
        f"| at least 4.0 x as fast, at least 50% of the floor: {met} |")


def test_work_whose_floor_is_added_to_the_others_time():
    row = gpu_table.Row("what", ((1e9, 0),), None, "them", print, ((1e9, 0),), speed=1 / 1.1)
    text = line(row, Ceilings(1e12, 1e12), [2e-3, 5e-6, 3e-3], [1e-3])
    assert text == ("| what | 1.00 ms | 2.00 ms (0.01 - 3.00) | 50% | them: 2.00 ms | 1.00 | "
                    "at most 1.10 x its time: met |")


def test_only_passes_that_were_queued_in_time_count(monkeypatch):
    said = []

    def run_pass(ready, waits):
        said.append(waits)
        return float(len(said)), waits >= 32

    monkeypatch.setattr(gpu_table, "run_pass", run_pass)
    assert gpu_table.times(None, 3) == [4.0, 5.0, 6.0] and said == [8, 8, 16, 32, 32, 32]
    monkeypatch.setattr(gpu_table, "run_pass", lambda ready, waits: (1.0, False))
    with pytest.raises(RuntimeError, match="not measured"):
        gpu_table.times(None, 3)


@pytest.mark.parametrize("begun", [False, True])
def test_a_pass(monkeypatch, begun):
    said = []

    class Event:
        done = begun

        def record(self):
            said.append("event")

        def synchronize(self):
            said.append("wait")

    device = SimpleNamespace(synchronize=lambda: said.append("idle"))
    numbers = SimpleNamespace(max=lambda: said.append("busy"))
    events = SimpleNamespace(Event=Event, Device=lambda: device,
                             get_elapsed_time=lambda start, stop: 6.0)  # milliseconds
    monkeypatch.setattr(gpu_table, "cupy", lambda: SimpleNamespace(
        cuda=events, zeros=lambda *_: numbers))
    calls = [lambda: said.append("a"), lambda: said.append("b")]
    assert gpu_table.run_pass(lambda: calls, 2) == (pytest.approx(3e-3), not begun)
    assert said == ["idle", "busy", "busy", "a", "b", "event", "a", "b", "event", "wait"]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype, apart", [("float32", 1e-4), ("bfloat16", 0.03)])
@pytest.mark.parametrize("made_by", [
    "table", pytest.param("bitsandbytes", marks=pytest.mark.peers)])
def test_pytorchs_step_is_ours(monkeypatch, made_by, dtype, apart, checkpoint):
    if made_by == "bitsandbytes":
        pytest.importorskip(made_by)
    monkeypatch.setattr(gpu_step, "torch_weight", getattr(gpu_step, f"weight_of_{made_by}"))
    monkeypatch.setattr(gpu_step, "LR", 1e-2)
    model, rng = gpu_step.our_model(TINY, 4, "cpu").astype(dtype), np.random.default_rng(1)
    model.checkpoint_every = int(checkpoint)
    for name, t in model.named_tensors():  # no part is so small that it could be wrong unseen
        if name.endswith((".c1", ".offset")):
            t.data *= 6
        elif name.endswith((".B", "norm1.weight", "norm2.weight", "norm.weight")):
            t.data += rng.normal(0, 0.2, t.shape).astype(t.dtype)
    twin = gpu_step.torch_llama(model, checkpoint, "cpu")
    sizes = [sum(p.size for p in model.parameters()), sum(p.numel() for p in twin.parameters())]
    assert sizes[0] == sizes[1] > 0
    tokens, _ = gpu_step.random_batch(TINY, 2)
    if dtype == "float32":  # in bfloat16 the roundings of all layers add up
        close(twin(torch.tensor(tokens)).detach().numpy(), model(tokens).data, dtype)
    ours, theirs = gpu_step.our_step(model, 2), gpu_step.torch_step(twin, TINY, 2, "cpu")
    losses = np.array([(ours(), theirs()) for _ in range(6)])
    assert abs(losses[:, 0] - losses[:, 1]).max() < apart and losses[0, 0] - losses[-1, 0] > 0.4


def test_the_model_holds_codes_and_bfloat16(cupy):
    model = gpu_step.our_model(TINY, 4, "cuda")
    kinds = {}
    for name, t in model.named_tensors():
        kinds.setdefault(str(t.dtype), set()).add(name.rpartition(".")[2])
        assert t.device == "cuda" and t.requires_grad == (name[-2:] in (".A", ".B")), name
    assert kinds == {"bfloat16": {"weight", "A", "B"}, "uint8": {"packed", "c2"},
                     "float32": {"c1", "offset"}}
    assert len(model.blocks) == 2 and model.config == TINY
    first, second = (host(block.mlp.up.base.packed) for block in model.blocks)
    assert (first != second).any()


def test_pages_are_copied(cupy):
    rows = gpu_pages.copy_rows(page_size=16, size=1000)  # 7 pages of 128 bytes
    for row, queue in zip(rows, ("in", "out"), strict=True):
        ((call,), again), rng = (row.ours()() for _ in range(2)), np.random.default_rng(0)
        _, found, pages = call.args
        assert found == queue and len(pages) == 7 and row.work == ((7 * 128, 0),)
        assert len({home.ctypes.data for _, home in pages}) == 7 and again
        drawn = [rng.integers(0, 256, (2, 128), np.uint8) for _ in pages]
        for (frame, home), (on_card, at_home) in zip(pages, drawn):
            frame.set(on_card)
            home[...] = at_home
        call()
        cupy.cuda.get_current_stream().synchronize()
        for (frame, home), (on_card, at_home) in zip(pages, drawn):
            copied = at_home if queue == "in" else on_card
            np.testing.assert_array_equal(host(frame), copied)
            np.testing.assert_array_equal(home, copied)


def test_pages_are_copied_on_the_optimizers_streams(cupy):
    """Which follow the caller's, so that its events time the copies, and which it waits for."""
    said = []

    class Device:
        def __getattr__(self, name):
            return lambda *args: said.append((name, *args)) or f"event of {args[0]}"

    for queue in ("in", "out"):
        gpu_pages.copy_pages(Device(), queue, [("frame 0", "home 0"), ("frame 1", "home 1")])
    before, after = [("record", "main"), ("wait", "in", "event of main")], [
        ("record", "in"), ("wait", "main", "event of in")]
    assert said[:6] == [*before, ("copy_in", "frame 0", "home 0"),
                        ("copy_in", "frame 1", "home 1"), *after]
    assert [s[0] for s in said[6:]] == ["record", "wait", "copy_out", "copy_out", "record", "wait"]
    assert said[7:9] == [("wait", "out", "event of main"), ("copy_out", "home 0", "frame 0")]
    assert said[10:] == [("record", "out"), ("wait", "main", "event of out")]


def test_the_ceilings_of_the_link(monkeypatch):
    drawn, seconds = [], iter((1e-6, 2e-6, 4e-6, 5e-6, 6e-6, 8e-6))

    def times(ready, rounds):
        (copy,) = ready()
        target, (source,) = copy.func.__self__, copy.args
        source[...] = torch.randint(0, 256, (1000,), dtype=torch.uint8)
        copy()
        assert torch.equal(target, source) and copy.keywords == {"non_blocking": True}
        drawn.append((target.data_ptr(), source.data_ptr()))
        return [next(seconds) for _ in range(rounds)]

    monkeypatch.setattr(gpu_pages, "times", times)
    found, lines = gpu_pages.measured_link(3, size=1000, device="cpu")
    assert [c.bytes for c in found] == [pytest.approx(1000 / 2e-6), pytest.approx(1000 / 6e-6)]
    assert drawn[0] == drawn[1][::-1]  # there and back
    assert "from the host to the card |  | 0.50 GB/s (0.25 - 1.00) |" in lines[0]
    assert "from the card to the host |  | 0.17 GB/s (0.12 - 0.20) |" in lines[1]


def test_paged_steps_are_those_of_adamw_in_less_memory(cupy, monkeypatch):
    monkeypatch.setattr(gpu_pages, "STEPS", 3)
    monkeypatch.setattr(gpu_step, "LR", 1e-2)
    allocator, paged = cupy.cuda.get_allocator(), gpu_pages.paged(1 << 10)

    def needed(kind):
        gc.collect()  # models of before would count
        return list(gpu_pages.relieved(gpu_pages.needs, TINY, 2, kind))

    for kept in fourbit._levels_on, fourbit._map_on, fourbit._steps_on:
        kept.cache_clear()  # what earlier tests left in the pool would count
    cupy.get_default_memory_pool().free_all_blocks()
    ((losses, most),), ((same, least),) = needed(AdamW), needed(paged)
    assert losses == same and len(set(losses)) == gpu_pages.STEPS  # bit for bit
    states, slots = 8 * 51_200, 3 * 8 * 1024
    assert most - least == pytest.approx(states - slots, rel=0.05)
    limit = (least + most) // 2
    (full,), (short,) = (gpu_pages.relieved(gpu_pages.within, TINY, 2, kind, limit)
                         for kind in (paged, AdamW))
    assert full == losses and short == losses[: len(short)] and len(short) < gpu_pages.STEPS
    assert cupy.cuda.get_allocator() == allocator


def test_the_timed_step_streams(cupy):
    peaks = []
    for kind in (), (gpu_pages.paged(1 << 10),):
        gc.collect()  # models of before would count
        peaks.append(next(gpu_step.our_qlora(TINY, 2, False, *kind)))
    gc.collect()  # the paged optimizer, which gives the allocator back
    assert peaks[0] - peaks[1] == pytest.approx(8 * 51_200 - 3 * 8 * 1024, rel=0.05)


@pytest.mark.parametrize("page_size", gpu_pages.PAGES)
def test_the_smallest_budget_streams(page_size):
    """It takes less than the states of the adapters; one byte less is an error."""
    parameter = Tensor(np.zeros(12_615_680, np.float32), requires_grad=True)
    settings = gpu_pages.paged(page_size)
    with settings([parameter]) as optimizer:
        assert len(optimizer.table.slots) == 3 and optimizer.table.nbytes == optimizer.budget
        assert all(page.frame is None for page in optimizer.table.pages)
    with pytest.raises(ValueError, match="is below 3 pages"):
        settings([parameter], device_budget=optimizer.budget - 1)


@pytest.mark.parametrize("ours, theirs, said, met", [
    (8, 0, ("finished, the same losses", "out of memory in step 1"), "met"),
    (8, 8, ("finished, the same losses", "finished, the same losses"), "missed"),
    (3, 3, ("out of memory in step 4", "out of memory in step 4"), "missed")])
def test_what_the_limit_did(ours, theirs, said, met):
    losses = [float(i) for i in range(8)]
    text = gpu_pages.limit_line(3 << 29, losses, losses[:theirs], losses[:ours])
    assert f"| in 1.50 GiB: {said[0]} |  | AdamW: {said[1]} |" in text
    assert text.endswith(f": {met} |") and text.count("|") == 8
    other = gpu_pages.limit_line(3 << 29, losses, losses[:1], losses[::-1])
    assert "finished, OTHER losses" in other and other.endswith(": missed |")


def test_the_rows_of_pages(cupy, monkeypatch, capsys):
    """Every pass takes 10 ms, and a step with its states on the card 20 ms."""
    turns, paged = [], gpu_pages.paged(1 << 10)

    def take_turns(theirs, ours, rounds):
        turns.append((theirs, ours, rounds))
        if theirs[0] is gpu_step.our_qlora:
            return [5 << 30, 9.0, 20e-3, 20e-3], [4 << 30, 9.0, 23e-3, 20e-3]
        return [list(side(*args)) for side, *args in (theirs, ours)]

    monkeypatch.setattr(gpu_table, "run_pass", lambda ready, waits: (10e-3, True))
    monkeypatch.setattr(gpu_pages, "measured_link", partial(
        gpu_pages.measured_link, size=1000, device="cpu"))
    monkeypatch.setattr(gpu_pages, "copy_rows", partial(gpu_pages.copy_rows, 16, 900))
    monkeypatch.setattr(gpu_pages, "PAGES", (1 << 12, 1 << 10))
    monkeypatch.setattr(gpu_pages, "STEPS", 1)
    monkeypatch.setattr(gpu_step, "LLAMA", TINY)
    monkeypatch.setattr(gpu_step, "BATCH", 2)
    monkeypatch.setattr(benchmark, "take_turns", take_turns)
    monkeypatch.setattr(gpu_kernels, "measured_ceilings", lambda rounds: (H200, []))
    monkeypatch.setattr(gpu_table, "card", lambda: "a card")
    benchmark.main(("pages",), rounds=2, device="cuda")
    table = capsys.readouterr().out.splitlines()[-9:]
    assert all(text.count("|") == 8 for text in table)
    assert "ceiling: one copy of 1,000 bytes" in table[0] and "ceiling:" in table[1]
    assert all("10.00 ms (10.00 - 10.00) | 90% |" in text and ": met |" in text
               for text in table[2:4])
    for text, size in zip(table[4:8:2], ("0.03125 MiB", "0.0078125 MiB")):
        assert f"in pages of {size} |" in text and "states on the card: 20.00 ms" in text
        assert text.endswith("| 0.93 | at most 1.05 x its time: missed |")
    assert "| 4.00 GiB |  | states on the card: 5.00 GiB | 1.250 |" in table[5]
    assert "finished, the same losses |  | AdamW: out of memory" in table[8]
    assert table[8].endswith(": met |")
    for (theirs, ours, rounds), page_size in zip(turns[:2], gpu_pages.PAGES):
        assert theirs == (gpu_step.our_qlora, TINY, 2, False) == ours[:4] and rounds == 4
        assert ours[4].keywords == gpu_pages.paged(page_size).keywords
    assert [rounds for *_, rounds in turns[2:]] == [1, 1] and turns[3][0][4] is AdamW
    assert turns[3][1][4].keywords == paged.keywords


def test_the_table_from_end_to_end(cupy, monkeypatch, capsys):
    def tiny(rows, *sizes, **named):
        return lambda: rows(*sizes, **named)[:1]

    def run_once(ready, waits):
        for call in ready():
            call()
        return 1e-3, True

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(gpu_table, "run_pass", run_once)
    monkeypatch.setattr(gpu_table, "card", lambda: "a card")
    for name, value in {
            "GROUPS": {"dequantize": tiny(gpu_kernels.dequantize_rows, *SHAPES),
                       "matmul": tiny(gpu_kernels.few_rows, SHAPES)},
            "measured_ceilings": partial(gpu_kernels.measured_ceilings, size=1024, n=64)}.items():
        monkeypatch.setattr(gpu_kernels, name, value)
    for name, value in {"LLAMA": TINY, "BATCH": 2, "timed": partial(gpu_step.timed, at_least=0),
                        "torch_qlora": partial(gpu_step.torch_qlora, device="cpu")}.items():
        monkeypatch.setattr(gpu_step, name, value)

    def take_turns(theirs, ours, rounds):
        return [[answer for _, answer in zip(range(rounds), side(*args))]
                for side, *args in (theirs, ours)]

    monkeypatch.setattr(benchmark, "take_turns", take_turns)
    benchmark.main(("step", "matmul", "dequantize"), rounds=1, device="cuda")
    said = capsys.readouterr().out
    assert re.match(r"Measured on \d{4}-\d\d-\d\d: a card\.\n\n    python ", said)
    table = said[said.index("| what") :].splitlines()
    assert len(table) == 2 + 2 + 2 + 6 and all(text.count("|") == 8 for text in table)
    assert "0.00 TB/s (" not in table[2] and "ceiling: copy of 1,024 bytes" in table[2]
    assert "nf4_dequantize" in table[4] and "nf4_matmul" in table[5]
    for time, speed, memory in (table[6:9], table[9:]):
        assert "as fast: " in time and ": tokens a second" in speed
        assert f"{gpu_step.PEER}: 1.00 GiB" in memory
        assert memory.endswith("at most PyTorch's: met |")


def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench" / "benchmark.py", "--device", "cuda"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r'benchmark.py: device "cuda" needs .*\n', done.stderr)


@pytest.mark.parametrize("device, row", [("cpu", "adamw"), ("cuda", "train")])
def test_a_row_that_the_device_does_not_have(device, row):
    with pytest.raises(SystemExit, match=rf"there are no rows \['{row}'\] on {device}, only"):
        benchmark.main((row,), device=device)


def test_results_hold_every_row(monkeypatch):
    """Each row is in kernels/RESULTS.md; where nothing was measured it says so, with the floor."""
    monkeypatch.setattr(gpu_step, "PEER", "PyTorch")  # whether or not bitsandbytes is here
    text = (ROOT / "kernels" / "RESULTS.md").read_text(encoding="utf-8")
    assert gpu_table.HEAD in text
    groups = gpu_kernels.GROUPS | gpu_rows.GROUPS
    computed = [line(row, H200) for rows in groups.values() for row in rows()]
    for checkpoint in (False, True):
        computed += gpu_step.step_lines(gpu_step.LLAMA, gpu_step.BATCH, checkpoint, H200)
    computed += [line(row, gpu_pages.PCIE) for row in gpu_pages.copy_rows()]
    for page_size in gpu_pages.PAGES:
        computed += gpu_pages.streaming_lines(page_size, H200)
    computed.append(gpu_pages.limit_line())
    for row in computed:
        found = next(t for t in text.splitlines() if t.startswith(row[: row.index(" | ") + 3]))
        assert "not yet measured" not in found or found == row
    assert all(f"| {title} |" in text for title in (
        *gpu_kernels.ceiling_titles(), *gpu_pages.link_titles()))
