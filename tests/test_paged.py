"""PagedAdamW beside AdamW, bit for bit: whatever the page size, the budget, the order in which a
device runs its queues, what is evicted when, which allocation or copy fails, and where a run stops
and goes on. Every wait of the schedule is needed. The same on CuPy, and what bad input gets.
"""

import ast
import contextlib
import functools
import gc
import inspect
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from minilm.backend import memory_limit
from minilm.files import FormatError
from minilm.optim import AdamW, PagedAdamW, paged, pages
from minilm.optim.eightbit import EightBit
from minilm.optim.pages import SLOTS
from minilm.optim.streams import CudaDevice, Event, SimulatedDevice
from minilm.run import RunDirectory
from minilm.tensor import Tensor
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

SHAPES = [(5, 7), (7,), (2, 3, 4), (1,), (11, 2)]  # 89 elements, 96 with what is between
SETTINGS = dict(lr=1e-2, weight_decay=0.1)
PAGES = [4, 8, 32, 64, 128, 1 << 22]
seeds = st.integers(0, 2**16) | st.none()


def leaves(shapes=SHAPES):
    rng = np.random.default_rng(0)
    return [Tensor(rng.standard_normal(s, dtype=np.float32), requires_grad=True) for s in shapes]


def plain(shapes=SHAPES, undecayed=(1, 3)):
    params = leaves(shapes)
    return AdamW(params, **SETTINGS, undecayed=[params[i] for i in undecayed])


def make_paged(shapes=SHAPES, undecayed=(1, 3), seed=None, **settings):
    params = leaves(shapes)
    settings.setdefault("device", SimulatedDevice(seed=seed))
    return PagedAdamW(params, **SETTINGS, undecayed=[params[i] for i in undecayed], **settings)


def give(optimizer, t):
    """Gradient t, the same for every optimizer."""
    flat, rng = optimizer.flat, np.random.default_rng(t)
    for p, view in zip(flat.params, flat.views(flat.grad)):
        view[...] = rng.standard_normal(p.shape) * 10.0 ** rng.integers(-3, 2)
        p.grad = view


def step(optimizer, t):
    give(optimizer, t)
    optimizer.step()


def same(actual, expected):
    """All bits of the parameters and states."""
    assert actual.steps == expected.steps
    found, wanted = ((o.flat.data, o.m, o.v) for o in (actual, expected))
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def budgets(page_size, width=8):
    """From one set of slots up; None."""
    return st.integers(SLOTS, 30).map(lambda n: n * width * page_size) | st.none()


@given(st.data(), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
       st.sampled_from(PAGES), seeds)
def test_bits(data, shapes, page_size, seed):
    undecayed = data.draw(st.lists(st.integers(0, len(shapes) - 1), unique=True))
    expected = plain(shapes, undecayed)
    with make_paged(shapes, undecayed, seed, page_size=page_size,
                    device_budget=data.draw(budgets(page_size))) as actual:
        for t in range(3):
            step(actual, t)
            step(expected, t)
            if evicted := data.draw(st.integers(0, 500)):
                actual.evict(evicted)
        same(actual, expected)
        device = actual.device
    assert device.used == 0


def test_a_parameter_without_gradient_counts_as_zero():
    expected, actual = plain(), make_paged(page_size=8)
    for optimizer in (expected, actual):
        step(optimizer, 1)
        give(optimizer, 2)
        optimizer.flat.params[0].grad = None
        optimizer.step()
    same(actual, expected)


def test_pages_are_cut_where_decay_ends_and_there_only():
    opt = make_paged(page_size=32)
    assert [(p.part.start, p.part.stop) for p in opt.table.pages] == [
        (0, 32), (32, 64), (64, 84), (84, 96)]
    assert opt.decayed == 84
    assert [page.nbytes for page in opt.table.pages] == [256, 256, 160, 96]


def test_an_update_in_blocks_has_the_same_bits(monkeypatch):
    monkeypatch.setattr(paged, "BLOCK", 5)
    expected, actual = plain(), make_paged(page_size=32)
    for t in range(2):
        step(expected, t)
        step(actual, t)
    same(actual, expected)


def test_one_parameter():
    expected, actual = plain([(1,)], ()), make_paged([(1,)], ())
    for t in range(3):
        step(expected, t)
        step(actual, t)
    same(actual, expected)


@given(st.lists(st.integers(0, 96), max_size=3), st.sampled_from(PAGES), seeds, st.data())
def test_parts_that_are_together_the_whole(borders, page_size, seed, data):
    expected = plain()
    actual = make_paged(seed=seed, page_size=page_size, device_budget=data.draw(budgets(page_size)))
    cuts = [0, *sorted(borders), actual.flat.size]
    for t in (1, 2, 3):
        for optimizer in (expected, actual):
            give(optimizer, t)
            optimizer.steps = t
        parts = [slice(*cut) for cut in itertools.pairwise(cuts)]
        for part in data.draw(st.permutations(parts)):
            actual.update(part, t, 0.01, scale=0.5)
        expected.update(slice(0, 96), t, 0.01, scale=0.5)
    same(actual, expected)


@given(st.lists(st.integers(0, 96), max_size=3), st.sampled_from(PAGES), seeds,
       st.lists(st.sets(st.integers(0, len(SHAPES) - 1)), min_size=3, max_size=3), st.data())
def test_parameters_without_a_gradient_are_left_out(borders, page_size, seed, absent, data):
    expected = plain()
    actual = make_paged(seed=seed, page_size=page_size, device_budget=data.draw(budgets(page_size)))
    ends = [0, *sorted(borders), actual.flat.size]
    def everywhere(*step):
        for part in data.draw(st.permutations([slice(*cut) for cut in itertools.pairwise(ends)])):
            actual.update(part, *step)
    for t, without in enumerate(absent):
        for optimizer in (expected, actual):
            give(optimizer, t)
            for i in without:
                optimizer.flat.params[i].grad = None
        before = expected.flat.data.copy()
        actual.step(0.5, everywhere)
        expected.step(0.5)
        for i in without:
            assert np.array_equal(actual.flat.params[i].data,
                                  actual.flat.views(before)[i])
    same(actual, expected)


@pytest.mark.parametrize("budget", [None, 3 * 544])
def test_states_in_8_bits_leave_out_whole_blocks(budget):
    """A block that two parameters share is updated for both, the gradient that is missing as 0."""
    shapes, absent = [(600,), (900,), (40,), (600,)], (1, 2)
    found = []
    for missing in (True, False):
        optimizer = make_paged(shapes, (), page_size=256, state=EightBit(), device_budget=budget)
        for t in range(3):
            give(optimizer, t)
            for i in absent if t == 2 else ():
                optimizer.flat.params[i].grad[...] = 0
                if missing:
                    optimizer.flat.params[i].grad = None
            before = optimizer.flat.data.copy()
            optimizer.step()
        found.append((optimizer, before))
    (left, before), (zeros, _) = found
    present = np.r_[0:600, 1540:2140]
    assert np.array_equal(left.flat.data[present], zeros.flat.data[present])
    assert (left.flat.data[present] != before[present]).all()
    assert np.array_equal(left.flat.data[768:1536], before[768:1536])
    assert (zeros.flat.data[768:1536] != before[768:1536]).all()


class Paging(RuleBasedStateMachine):
    """Anything may happen to a paged optimizer between two steps, and one thing may fail."""

    @initialize(page_size=st.sampled_from(PAGES), seed=seeds, data=st.data())
    def begin(self, page_size, seed, data):
        self.model, self.t, self.spikes = plain(), 0, []
        self.start(page_size, data, seed)

    def start(self, page_size, data, seed):
        room = data.draw(st.integers(8 * min(page_size, 84), 1200) | st.none())
        self.device, self.spikes = SimulatedDevice(room and room + 200, seed), []
        self.opt = make_paged(page_size=page_size, device=self.device,
                              device_budget=data.draw(budgets(page_size)))

    def step_model(self):
        step(self.model, self.t)
        self.t += 1

    @rule()
    def step(self):
        step(self.opt, self.t)
        self.step_model()

    @rule(k=st.integers(1, 60))
    def step_with_a_failure(self, k):
        self.device.fail(k)
        try:
            step(self.opt, self.t)
        except Exception:
            assert self.opt.steps in (self.model.steps, self.model.steps + 1)
        if self.opt.steps > self.model.steps:
            self.step_model()
        self.device.failing = range(0)

    @rule(value=st.sampled_from([np.nan, np.inf, -np.inf]), place=st.integers(0, 95))
    def bad_gradient(self, value, place):
        skipped = self.opt.skipped
        give(self.opt, self.t)
        flat = self.opt.flat
        i = place % len(flat.params)
        flat.params[i].grad.reshape(-1)[place % flat.params[i].size] = value
        self.opt.step()
        assert self.opt.skipped == skipped + 1

    @rule(nbytes=st.integers(1, 1500))
    def spike(self, nbytes):
        with suppress(MemoryError):
            self.device.allocate(nbytes)
            self.spikes.append(nbytes)

    @precondition(lambda self: self.spikes)
    @rule()
    def release(self):
        self.device.release(self.spikes.pop())

    @rule(nbytes=st.integers(0, 1000), k=st.integers(0, 9))
    def evict(self, nbytes, k):
        before, free = self.opt.table.nbytes, 0
        self.device.fail(k, times=k > 0)
        with suppress(RuntimeError):
            free = self.opt.evict(nbytes)
        self.device.failing = range(0)
        assert before - self.opt.table.nbytes == free

    @rule(k=st.integers(0, 4))
    def prefetch(self, k):
        self.device.fail(k, times=k > 0)
        self.opt.prefetch()
        self.device.failing = range(0)

    @rule(k=st.integers(0, 9))
    def states(self, k):
        self.device.fail(k, times=k > 0)
        with suppress(RuntimeError):
            self.opt.states()
        self.device.failing = range(0)

    @rule(page_size=st.sampled_from(PAGES), seed=seeds, data=st.data())
    def resume(self, page_size, seed, data):
        """Elsewhere: on another device, with other pages."""
        before, kept = self.opt, self.opt.states()
        self.start(page_size, data, seed)
        self.opt.flat.data[...], self.opt.steps = before.flat.data, before.steps
        self.opt.put_back(kept)
        before.close()

    @invariant()
    def bits(self):
        if hasattr(self, "opt"):
            assert np.array_equal(self.opt.flat.data, self.model.flat.data)

    @invariant()
    def memory(self):
        if hasattr(self, "opt"):
            table, device = self.opt.table, self.device
            frames = [*table.slots, *(page.frame for page in table.pages if page.frame)]
            assert table.nbytes == sum(frame.memory.size for frame in frames)
            assert device.used == table.nbytes + sum(self.spikes)
            assert table.nbytes <= (table.budget or math.inf)
            assert device.used <= (device.limit or math.inf)

    def teardown(self):
        if hasattr(self, "opt"):
            same(self.opt, self.model)
            self.opt.close()
            assert self.device.used == sum(self.spikes)


TestPaging = Paging.TestCase


# the waits


class Watched(SimulatedDevice):
    """A device that leaves out what is called at one place of the schedule, and sees hasty reads.

    Its forward pass is queued.
    """

    def __init__(self, limit, seed, dropped):
        super().__init__(limit, seed, overlap=True)
        self.dropped = dropped

    def wait(self, queue, event):
        if place(sys._getframe(1)) != self.dropped:
            super().wait(queue, event)

    def synchronize(self):
        if place(sys._getframe(1)) != self.dropped:
            super().synchronize()


def place(frame):
    return os.path.basename(frame.f_code.co_filename), frame.f_lineno


def sites():
    """Each place in the schedule where something waits: (file, line), with its source as name."""
    for module in (pages, paged):
        source = inspect.getsource(module)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and (
                    node.func.attr in ("wait", "synchronize")):
                where = os.path.basename(module.__file__), node.lineno
                line = source.splitlines()[node.lineno - 1].strip()
                yield pytest.param(where, id=f"{where[0]}:{where[1]} {line}")


def train(optimizer, device=None):
    """What comes out of eight steps between which much happens; device: with a queued backward."""
    flat, kept = optimizer.flat, []

    def backward(t):
        noise = np.random.default_rng(t).standard_normal(flat.size, dtype=np.float32)
        np.copyto(flat.grad, noise + flat.data)

    def one_step(t):
        (device.launch if device else call)("main", backward, t)
        optimizer.update(slice(0, flat.size), t, 0.01)

    for t in range(1, 9):
        if device and t == 3:
            device.allocate(550)  # pages go
        if device and t == 4:
            device.release(430)  # all but one or two come back
        if device and t == 6:
            device.release(120)
        if device and t == 7:
            optimizer.evict(300)
            device.fail(2)  # a page that comes back
        try:
            one_step(t)
        except RuntimeError as error:
            if "told to fail" not in str(error):
                raise
            one_step(t)
        if t == 6:
            kept.append(optimizer.v.copy())
    if device:
        optimizer.close()
        device._run(lambda: not any(device.queues.values()))
    return [*kept, flat.data]


def call(queue, fn, *args):
    fn(*args)


BUDGETS = {  # the device's limit, the budget
    "pressure": (1000, None), "a single page streams": (1050, None), "streams": (2000, 400)}


def differs(seed, case, dropped=None):
    """Do the queues' order and a dropped wait change what comes out?"""
    limit, budget = BUDGETS[case]
    device = Watched(limit, seed, dropped)
    params = leaves()
    optimizer = PagedAdamW(params, **SETTINGS, undecayed=params[1:3], page_size=8, device=device,
                           device_budget=budget)
    try:
        actual = train(optimizer, device)
    except RuntimeError as error:
        assert dropped, error
        return True
    return not all(np.array_equal(a, b) for a, b in zip(actual, expected(), strict=True))


@functools.cache
def expected():
    params = leaves()
    return train(AdamW(params, **SETTINGS, undecayed=params[1:3]))


@pytest.mark.parametrize("case", BUDGETS)
def test_every_order_of_the_queues_gives_the_same(case):
    assert not any(differs(seed, case) for seed in range(60))


@pytest.mark.parametrize("site", [*sites()])
def test_every_wait_is_needed(site):
    assert any(differs(seed, case, site) for seed in range(60) for case in BUDGETS)


def test_queues_that_wait_for_what_nobody_records():
    device = SimulatedDevice(seed=0)
    device.wait("in", Event())
    with pytest.raises(RuntimeError, match="an event that nobody records"):
        device.synchronize()


def test_a_device_waits_for_no_work_but_its_own():
    device, done = SimulatedDevice(seed=0, overlap=True), []
    device.wait("main", Event())
    device.launch("in", done.append, 1)
    device.synchronize()
    assert done == [1]


# failures


@pytest.mark.parametrize("times", [1, 10**6])
@pytest.mark.parametrize("budget", [None, 400])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_failure_leaves_the_old_or_the_new_state_or_says_so(seed, budget, times):
    ends = set()
    for k in range(1, 45):
        opt, model = make_paged(page_size=8, device_budget=budget, seed=seed), plain()
        for o in (opt, model):
            step(o, 1)
        opt.evict(300)
        opt.device.fail(k, times)
        give(opt, 2)
        give(model, 2)
        end = "went on"
        try:
            opt.step()
        except RuntimeError as error:
            end = "two steps" if "of two steps" in str(error) else f"raised at {opt.steps}"
        opt.device.failing = range(0)
        if opt.steps == 2:
            model.step()
        if end == "two steps":
            for call in (opt.step, opt.states, opt.prefetch, lambda: opt.evict(1)):
                with pytest.raises(RuntimeError, match="two steps: go back to a checkpoint"):
                    call()
        else:
            same(opt, model)
            step(opt, 3)
            step(model, 3)
            same(opt, model)
        ends.add(end)
        opt.close()
    lasting = {"two steps"} | ({"raised at 2"} if budget else set())
    assert ends == {"went on", "raised at 1"} | (lasting if times > 1 else set())


def test_a_page_that_did_not_get_home_is_not_lost():
    """It waits in its slot, and takes the way home, or into a frame, with the next step."""
    waited = 0
    for k in range(1, 60):
        opt, model = make_paged(page_size=8), plain()
        opt.evict(64)
        opt.device.limit = opt.device.used
        opt.device.fail(k, times=3)  # the way home, a frame, the way home again
        step(model, 1)
        with suppress(RuntimeError):
            step(opt, 1)
        waiting = sum(frame.dirty for frame in opt.table.slots)
        if opt.broken or not opt.steps:
            continue
        waited += waiting
        opt.device.failing, opt.device.limit = range(0), None
        for t in (2, 3):
            step(opt, t)
            step(model, t)
        same(opt, model)
    assert waited


def test_a_copy_that_is_out_of_date_is_not_used():
    opt, model = make_paged(page_size=8), plain()
    for t in range(4):
        opt.evict(64)
        if t == 2:
            opt.device.limit = opt.device.used
        step(opt, t)
        step(model, t)
    same(opt, model)


def test_where_others_have_updated_their_parts_a_failure_is_not_the_old_state():
    opt, model = make_paged(page_size=8), plain()
    for o in (opt, model):
        give(o, 1)
        o.steps = 1
    model.update(slice(0, 96), 1, 0.01)
    opt.update(slice(0, 48), 1, 0.01)
    opt.evict(300)
    opt.device.fail(2)
    opt.update(slice(48, 96), 1, 0.01)
    same(opt, model)


def test_an_update_that_fails_is_not_made_twice():
    opt = make_paged(page_size=8, device_budget=400)

    def fail(*args):
        raise ZeroDivisionError
    opt.state.update = fail
    with pytest.raises(RuntimeError, match="step 1 ended after 0 of 13 pages"):
        step(opt, 1)
    with pytest.raises(RuntimeError, match="go back to a checkpoint"):
        opt.update(slice(0, 8), 1, 0.1)


def test_an_interrupt_in_the_middle_is_not_lost():
    opt = make_paged(page_size=8, device_budget=400)
    load, loaded = opt.table.load, []

    def interrupted(page):
        loaded.append(page)
        if len(loaded) == 5:
            raise KeyboardInterrupt
        return load(page)
    opt.table.load = interrupted
    with pytest.raises(KeyboardInterrupt):
        step(opt, 1)
    with pytest.raises(RuntimeError, match="of two steps"):
        opt.states()


@pytest.mark.parametrize("k, got", [(1, 0), (5, 256), (13, 736)])
def test_homes_that_the_host_does_not_give(k, got):
    device = SimulatedDevice()
    device.fail(k)
    with pytest.raises(MemoryError, match=f"768 bytes .* {got} could be had; pageable=True"):
        make_paged(page_size=8, device=device)
    assert device.used == 0


def test_a_copy_that_fails_before_the_first_step():
    device = SimulatedDevice()
    device.fail(19)
    with pytest.raises(RuntimeError, match="copy 19 was told to fail"):
        make_paged(page_size=8, device=device)
    assert device.used == 0 and device.peak == 64 * 3


def test_a_device_without_room_for_one_page():
    device = SimulatedDevice(limit=63)
    with pytest.raises(MemoryError, match="no room for 64 bytes, a page"):
        make_paged(page_size=8, device=device)
    assert device.used == 0


def test_a_device_without_room_for_what_an_update_takes_besides():
    spare, device = EightBit().spare(84), SimulatedDevice(limit=5000)
    with pytest.raises(MemoryError, match=f"out of memory allocating {spare:,} bytes"):
        make_paged(state=EightBit(), device=device)
    assert device.used == 0


def test_a_simulated_device_gives_all_that_it_has_fails_once_and_spoils_what_is_freed():
    device = SimulatedDevice(limit=64)
    frame = device.frame(64)
    frame[...] = 0
    device.free(frame)
    assert (frame == 0xFF).all()
    device.fail(1)
    with pytest.raises(MemoryError, match="was told to fail"):
        device.frame(64)
    assert device.frame(64).size == 64


def test_slots_are_made_of_pages_where_there_is_no_other_room():
    expected, actual = plain(), make_paged(page_size=8, device=SimulatedDevice(limit=300))
    for t in range(3):
        step(expected, t)
        step(actual, t)
    same(actual, expected)
    assert len(actual.table.slots) == SLOTS and actual.device.used <= 300


# what goes wrong otherwise


@pytest.mark.parametrize("page_size", [0, -8, 1, 2, 3, 12, 1000])
def test_page_sizes_that_are_no_power_of_two(page_size):
    message = f"^page_size must be a power of two from 4 up, got {page_size}$"
    with pytest.raises(ValueError, match=message):
        make_paged(page_size=page_size)


@pytest.mark.parametrize("page_size, budget, least", [(8, 191, 64), (32, 600, 256), (32, 0, 256)])
def test_budgets_below_a_set_of_slots(page_size, budget, least):
    message = f"device_budget of {budget} bytes is below 3 pages of {least} bytes"
    with pytest.raises(ValueError, match=message):
        make_paged(page_size=page_size, device_budget=budget)
    make_paged(page_size=page_size, device_budget=3 * least)


def test_a_budget_that_holds_all_needs_no_slots():
    opt = make_paged(page_size=64, device_budget=768)
    assert opt.table.nbytes == 768 and not opt.table.slots
    with pytest.raises(ValueError, match="budget"):
        make_paged(page_size=64, device_budget=767)


def test_no_parameters():
    with pytest.raises(ValueError, match="no parameters"):
        PagedAdamW([])


def test_float64():
    with pytest.raises(TypeError, match="in float32, the parameters are float64"):
        PagedAdamW([Tensor(np.zeros(3), requires_grad=True)])


def test_a_parameter_that_changes_shape():
    opt = make_paged()
    opt.flat.params[0].data = np.zeros((5, 8), np.float32)
    with pytest.raises(ValueError, match=r"parameter 0 was \(5, 7\) and has become \(5, 8\)"):
        opt.update(slice(0, 96), 1, 0.1)


def test_after_close():
    opt = make_paged(page_size=8)
    opt.close()
    opt.close()
    assert opt.device.used == 0
    for call in (opt.step, opt.states, lambda: opt.evict(1)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_another_process(monkeypatch):
    opt = make_paged()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(RuntimeError, match="train with threads"):
        opt.step()


def test_a_trainer_with_processes_is_refused():
    with pytest.raises(ValueError, match="nor PagedAdamW's pages: train there with threads"):
        Trainer(None, make_paged(), workers=2, processes=True)


def test_states_of_another_size():
    opt = make_paged(page_size=8)
    step(opt, 1)
    before = opt.states()
    with pytest.raises(ValueError, match="v has 96 elements, got 95"):
        opt.put_back({"m": before["m"] + 1, "v": before["v"][:-1]})
    assert all(np.array_equal(opt.states()[name], before[name]) for name in "mv")
    held = opt.table.nbytes
    opt.put_back(before)
    assert opt.table.nbytes == held


def test_short_pages_become_no_slots():
    opt = make_paged(page_size=64)
    assert opt.evict(100) == 160 == 768 - opt.table.nbytes


def test_pages_used_longest_ago_go_first():
    opt = make_paged(page_size=8)
    step(opt, 1)
    opt.update(slice(0, 16), 2, 0.1)
    assert opt.evict(64 * 2) == 128
    assert [page.frame is None for page in opt.table.pages] == 2 * [False] + 5 * [True] + 6 * [
        False]
    assert [frame.page.part.start for frame in opt.table.slots] == [32, 24, 16]


def test_nothing_is_freed_while_a_step_is_made():
    opt = make_paged(page_size=8)
    update, freed = opt.state.update, []

    def greedy(*args):
        freed.append(opt.evict(64))
        update(*args)
    opt.state.update = greedy
    step(opt, 1)
    assert freed == [0] * 13
    with opt.table.lock:  # another thread brings pages back
        assert opt.evict(64) == 0
    assert opt.evict(64) == 64


def test_pages_come_back_once_for_all_that_update_together():
    table, came = make_paged(page_size=8).table, []
    table.bring_back = lambda: came.append(table.busy)
    with table.in_use():
        table.begin()
        with table.in_use():
            table.begin()
        table.begin()
    with table.in_use():
        table.begin()
    assert came == [1, 1]


def test_an_optimizer_that_is_dropped_frees_nothing_in_use():
    device = SimulatedDevice(seed=0, limit=2000)
    opt = make_paged(page_size=8, device=device, device_budget=400)
    step(opt, 1)
    assert any(device.queues.values())
    del opt
    assert not any(device.queues.values())
    with pytest.raises(MemoryError, match="2,000 bytes"):
        device.allocate(2000)


AT_EXIT = """
import numpy as np
from minilm.optim import PagedAdamW
from minilm.optim.streams import SimulatedDevice
from minilm.tensor import Tensor

class Device(SimulatedDevice):
    def close(self): print("closed")

optimizer = PagedAdamW([Tensor(np.ones(3, np.float32), requires_grad=True)], device=Device())
"""


def test_at_exit_a_device_is_left_alone():
    """The driver may be gone by then."""
    run = [sys.executable, "-c", AT_EXIT]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == ""


# in training

ROWS = np.random.default_rng(0).integers(0, 11, (2, 4, 8))


def small_model(dtype="float32"):
    return Transformer(Config.gpt2(11, 8, 2, 2, 16), seed=1).astype(dtype)


def train_some(model, optimizer, steps, **settings):
    with Trainer(model, optimizer, **settings) as trainer:
        return [trainer.step(i, tuple(ROWS), lr=0.01, clip=1.0).loss for i in steps]


def paged_model(page_size=256, dtype="float32", **settings):
    model = small_model(dtype)
    params = model.parameters()
    settings = dict(device=SimulatedDevice(seed=1), page_size=page_size) | settings
    return model, PagedAdamW(params, **settings, undecayed=[p for p in params if p.ndim < 2])


def plain_model(dtype="float32"):
    model = small_model(dtype)
    params = model.parameters()
    return model, AdamW(params, undecayed=[p for p in params if p.ndim < 2])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("settings", [{}, dict(device_budget=8192), dict(device_budget=8192,
                                                                       device=SimulatedDevice())])
def test_training_with_workers(workers, settings):
    model, optimizer = plain_model()
    expected = train_some(model, optimizer, range(4), workers=workers)
    model, actual = paged_model(**settings)
    assert train_some(model, actual, range(4), workers=workers) == expected
    same(actual, optimizer)


KINDS = {
    "plain": plain_model,
    "small pages": paged_model,
    "large pages": functools.partial(paged_model, 1 << 12),
    "streamed": functools.partial(paged_model, 512, device_budget=3 * 8 * 512),
}


@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_a_run_goes_on_with_other_pages(before, after, tmp_path):
    model, optimizer = KINDS[before]()
    run = RunDirectory(tmp_path)
    train_some(model, optimizer, range(2))
    run.save(2, model, optimizer)
    losses = train_some(model, optimizer, range(2, 4))
    model, again = KINDS[after]()
    assert run.restore(model, again) == 2
    assert train_some(model, again, range(2, 4)) == losses
    same(again, optimizer)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = paged_model()
    run = RunDirectory(tmp_path)
    train_some(model, optimizer, [0])
    run.save(1, model, optimizer)
    before = optimizer.states()
    other = Transformer(Config.gpt2(11, 8, 1, 2, 16))
    with pytest.raises(FormatError, match="of another model"):
        run.restore(other, PagedAdamW(other.parameters()))
    with pytest.raises(FormatError, match=r"of another model: .*m_absmax"):
        run.restore(*paged_model(state=EightBit()))
    assert all(np.array_equal(optimizer.states()[name], before[name]) for name in "mv")


def test_eight_bits_with_pages_of_any_size(tmp_path):
    budget = 3 * 512 * 3
    model, optimizer = paged_model(1 << 22, state=EightBit())
    losses = train_some(model, optimizer, range(4), workers=2)
    first, streamed = paged_model(256, state=EightBit(), device_budget=budget)
    assert train_some(first, streamed, range(2), workers=2) == losses[:2]
    assert streamed.table.nbytes <= budget
    assert all(place.start % 16 == 0 for places, _ in streamed.table.layouts.values()
               for place, _ in places)
    assert sum(page.nbytes for page in streamed.table.pages) < 2.2 * streamed.flat.size
    run = RunDirectory(tmp_path)
    run.save(2, first, streamed)
    second, again = paged_model(1024, state=EightBit())
    assert run.restore(second, again) == 2
    assert train_some(second, again, range(2, 4), workers=2) == losses[2:]
    assert np.array_equal(again.flat.data, optimizer.flat.data)
    states = [o.states() for o in (again, optimizer)]
    assert all(np.array_equal(states[0][k], states[1][k]) for k in states[0])
    with pytest.raises(ValueError, match="power of two from 256 up"):
        paged_model(128, state=EightBit())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_masters_of_16_bits(dtype):
    outcomes = []
    for make in plain_model, functools.partial(paged_model, device_budget=8192):
        model, optimizer = make(dtype=dtype)
        outcomes.append((train_some(model, optimizer, range(3)), optimizer.flat.rounded.tobytes()))
    assert outcomes[0] == outcomes[1]


# on a GPU, or CuPy's stand-in


@pytest.fixture
def on_gpu(cupy):
    """make(kind, **settings): an optimizer with parameters on the GPU, in chunks of its own."""
    made = []

    def make(kind, shapes=((40, 50), (50,), (30, 30)), dtype="float32", **settings):
        params = [Tensor(cupy.asarray(p.data.astype(dtype)), True) for p in leaves(shapes)]
        made.append(kind(params, **SETTINGS, undecayed=params[1:2], **settings))
        return made[-1]

    with no_pieces(cupy):
        yield make
    for optimizer in made:
        if isinstance(optimizer, PagedAdamW):
            optimizer.close()


def gpu_step(optimizer, t):
    flat, rng = optimizer.flat, np.random.default_rng(t)
    flat.grad.set(rng.standard_normal(flat.size, dtype=np.float32))
    for p, view in zip(flat.params, flat.views(flat.grad)):
        p.grad = view
    optimizer.step()


def same_on_gpu(actual, expected):
    for a, b in zip((actual.flat.data, actual.m, actual.v),
                    (expected.flat.data, expected.m, expected.v), strict=True):
        a, b = (x if isinstance(x, np.ndarray) else x.get() for x in (a, b))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("settings", [
    dict(page_size=256), dict(page_size=256, device_budget=3 * 8 * 256), dict(),
    dict(page_size=64, device_budget=9000), dict(page_size=256, pageable=True)])
def test_steps_on_a_gpu(on_gpu, settings):
    expected, actual = on_gpu(AdamW), on_gpu(PagedAdamW, **settings)
    assert type(actual.device) is CudaDevice
    for t in range(3):
        gpu_step(expected, t)
        gpu_step(actual, t)
        if t == 1:
            actual.evict(4000)
    same_on_gpu(actual, expected)


@contextlib.contextmanager
def no_pieces(cupy):
    """Inside, the pool has no free pieces of chunks that it has split: a new array needs a new one.

    What others have left in the pool would else be found by an array that is to find nothing.
    """
    gc.collect()  # CuPy does so where it finds no memory
    pool, taken, size = cupy.get_default_memory_pool(), [], 1 << 30
    with memory_limit(1):  # the card gives nothing more
        while size >= 512:
            try:
                taken.append(pool.malloc(size))
            except MemoryError:
                size //= 2
    yield


@contextlib.contextmanager
def room_for(cupy, nbytes):
    """Inside, arrays may take so much more."""
    with no_pieces(cupy), memory_limit(cupy.get_default_memory_pool().total_bytes() + nbytes):
        yield


def test_a_spike_takes_the_pages_memory(cupy, on_gpu):
    expected, actual = on_gpu(AdamW), on_gpu(PagedAdamW, page_size=128)
    for optimizer in (expected, actual):
        gpu_step(optimizer, 0)
    states = actual.table.nbytes
    assert states == 8 * actual.flat.size
    with room_for(cupy, 40_000):
        spike = cupy.zeros(50_000, np.uint8)
        assert actual.table.nbytes <= states - 10_000
        gpu_step(actual, 1)
        with pytest.raises(MemoryError):
            cupy.zeros(90_000, np.uint8)
        assert actual.table.nbytes == SLOTS * 8 * 128
        del spike
        gpu_step(actual, 2)
        assert actual.table.nbytes == states + SLOTS * 8 * 128
    for t in (1, 2):
        gpu_step(expected, t)
    same_on_gpu(actual, expected)


@pytest.mark.parametrize("dtype, state", [("bfloat16", None), ("float32", EightBit())])
def test_what_an_update_takes_besides_has_room(cupy, on_gpu, dtype, state):
    """The pages that come back leave it, and where others have taken it since, they go again."""
    make = functools.partial(on_gpu, PagedAdamW, ((1000, 1000), (50,)), dtype, page_size=1 << 14,
                             state=state)
    with make() as optimizer:
        for t in range(3):
            gpu_step(optimizer, t)
        expected = [*optimizer.states().values(), optimizer.flat.rounded.get()]
    optimizer = make()
    gpu_step(optimizer, 0)
    optimizer.evict(10**9)
    pool = cupy.get_default_memory_pool()
    with room_for(cupy, 1_500_000):
        gpu_step(optimizer, 1)
        pool.free_all_blocks()
        others = cupy.empty(pool.get_limit() - pool.total_bytes() - 512, np.uint8)
        gpu_step(optimizer, 2)
    assert others.nbytes and optimizer.table.slots
    actual = [*optimizer.states().values(), optimizer.flat.rounded.get()]
    assert all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_an_array_gets_as_many_pages_as_it_takes(cupy, on_gpu, monkeypatch):
    """A pool may give back nothing of what is freed until more is."""
    optimizer = on_gpu(PagedAdamW, page_size=128)
    before, malloc = optimizer.table.nbytes, optimizer.device.pool

    def fragmented(nbytes):
        if optimizer.table.nbytes > before - 8000:
            raise MemoryError
        return malloc(nbytes)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer.device, "pool", fragmented)
        cupy.empty(512, np.uint8)
    assert optimizer.table.nbytes == before - 8192


def test_threads_that_find_no_memory_at_once(cupy, on_gpu, monkeypatch):
    """The one that comes second waits for what the first one's eviction frees."""
    optimizer = on_gpu(PagedAdamW, page_size=128)
    before, malloc = optimizer.table.nbytes, optimizer.device.pool
    both, tried = threading.Barrier(2), threading.local()

    def full(nbytes):
        if not hasattr(tried, "once"):
            tried.once = True
            both.wait()
            raise MemoryError
        if optimizer.table.nbytes == before:
            raise MemoryError
        return malloc(nbytes)
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(optimizer.device, "pool", full)
        patch.setattr(optimizer.device, "synchronize", lambda: time.sleep(0.05))
        arrays = [*threads.map(lambda n: cupy.empty(n, np.uint8), (512, 1024))]
    assert [a.nbytes for a in arrays] == [512, 1024]
    assert optimizer.table.nbytes == before - 1024


def test_the_allocator_is_put_back(cupy, on_gpu):
    before = cupy.cuda.get_allocator()
    first, second = on_gpu(PagedAdamW), on_gpu(PagedAdamW)
    second.close()
    assert cupy.cuda.get_allocator() is first.device.hook
    first.close()
    assert cupy.cuda.get_allocator() == before
    third, fourth = on_gpu(PagedAdamW), on_gpu(PagedAdamW, page_size=64)
    third.close()
    with room_for(cupy, 1000):
        cupy.zeros(5000, np.uint8)
    assert fourth.table.nbytes < 8 * fourth.flat.size
    fourth.close()
    cupy.zeros(10)


def test_a_gpu_is_closed_when_its_copies_are_done(cupy):
    device, waited = CudaDevice(), []
    device.streams = {name: SimpleNamespace(synchronize=functools.partial(waited.append, name))
                      for name in device.streams}
    device.close()
    assert waited == ["in", "update", "out"]


def test_copies_are_asynchronous(cupy, on_gpu):
    """From and to pinned memory, on streams of their own."""
    from emulated_cupy import streams

    optimizer = on_gpu(PagedAdamW, page_size=256, device_budget=3 * 8 * 256)
    streams.asynchronous.clear()
    gpu_step(optimizer, 0)
    own = optimizer.device.streams
    queues = {"in": "set", "out": "get"}
    if type(own["in"]) is streams.Stream:
        pages = len(optimizer.table.pages)
        assert sorted((way, stream is own[name], pinned)
                      for name, way in queues.items()
                      for stream, w, pinned in streams.asynchronous if w == way
                      ) == [("get", True, True)] * pages + [("set", True, True)] * (pages + SLOTS)


def test_pinned_memory_that_is_not_there(cupy, on_gpu, monkeypatch):
    from emulated_cupy import streams

    if cupy.cuda.PinnedMemory is not streams.PinnedMemory:
        pytest.skip("a machine's pinned memory is not limited for a test")
    used = streams.PinnedMemory.used
    monkeypatch.setattr(streams.PinnedMemory, "limit", used + 10_000)
    with pytest.raises(MemoryError, match=r"23,616 bytes of host .* 8,192 could be had") as error:
        on_gpu(PagedAdamW, page_size=256)
    assert "pageable=True" in str(error.value)
    del error
    assert streams.PinnedMemory.used == used
    gpu_step(on_gpu(PagedAdamW, page_size=256, pageable=True), 0)
    assert streams.PinnedMemory.used == used


def test_an_optimizer_that_is_dropped_gives_its_memory_back(cupy):
    pool = cupy.get_default_memory_pool()
    gc.collect()
    used = pool.used_bytes()
    params = leaves([(40, 50)])
    params[0].data = cupy.asarray(params[0].data)
    optimizer = PagedAdamW(params)
    assert pool.used_bytes() > used + 8 * 2000
    del params, optimizer
    gc.collect()
    assert pool.used_bytes() == used
