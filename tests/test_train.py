"""minilm.parallel.cores, minilm.train and minilm.run: any split of a batch gives the same step,
workers fail loudly and leave nothing behind, and a run that was stopped or killed ends bit for bit
like one that was not."""

import itertools
import json
import math
import multiprocessing
import os
import random
import select
import signal
import threading
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
from conftest import close
from hypothesis import example, given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from minilm import data, ops
from minilm.files import FormatError
from minilm.nn import Dropout, Module
from minilm.optim import SGD, AdamW, FlatParameters, cosine_schedule
from minilm.parallel.cores import GaveUp, GradientQueue, Workers, default_workers
from minilm.peft import add_lora, use_adapter
from minilm.run import RunDirectory
from minilm.tensor import Tensor, op
from minilm.train import Diverged, Trainer
from minilm.transformer import Config, Transformer

# Python 3.12 warns of every fork in a process that has threads, as BLAS does.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
fork = multiprocessing.get_context("fork")

IGNORED = -100
KINDS = [False, True]  # threads, processes
SHAPE = dict(vocab_size=13, context=6, layers=2, heads=2, width=8)


@contextmanager
def within(seconds):
    """A test that hangs fails."""

    def expire(number, frame):
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_model(dtype="float32", dropout=0.0, **changes):
    """A GPT-2 with its weights moved so far that norms and biases matter; the head is tied."""
    model = Transformer(Config.gpt2(**SHAPE | changes, dropout=dropout), seed=0)
    rng = np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += 0.2 * rng.standard_normal(t.shape, dtype=np.float32)
    return model.astype(dtype)


def make_batch(rows=7, seed=0, counted=0.6):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 13, (rows, 6))
    targets = np.where(rng.random(tokens.shape) < counted, rng.integers(0, 13, (rows, 6)), IGNORED)
    targets[0, 0] = 1
    return tokens, targets


def jitter(*_):
    time.sleep(os.urandom(1)[0] / 255 * 0.003)


def delay_gradients(flat):
    """Every gradient sets out at a moment of its own."""
    for p in flat.params:
        p.on_grad = lambda dy, receive=p.on_grad: (jitter(), receive(dy))


def gradient(dtype="float32", workers=1, processes=False, accumulate=1, batch=None, steps=1,
             checkpoint_every=0, dropout=0.0, delays=False):
    """(loss, flat gradient) of the last of some steps that change nothing."""
    model = make_model(dtype, dropout)
    model.checkpoint_every = checkpoint_every
    trainer = Trainer(model, SGD(model.parameters(), lr=0.0), workers, processes)
    with within(20), trainer:
        if delays:
            delay_gradients(trainer.optimizer.flat)
        for _ in range(steps):
            done = trainer.step(0, (batch or make_batch()), accumulate=accumulate)
        return done.loss, trainer.optimizer.flat.grad.copy()


# Workers


@pytest.mark.parametrize("checkpoint_every", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("processes", KINDS)
def test_workers_give_the_gradient_of_one(processes, accumulate, checkpoint_every):
    loss, whole = gradient("float64")
    for count in (1, 2, 3):
        found, parts = gradient("float64", count, processes, accumulate, None, 2, checkpoint_every)
        close(found, loss, "float64")
        close(parts, whole, "float64")


@pytest.mark.parametrize("accumulate, checkpoint_every", [(1, 0), (2, 1)])
def test_the_bits_do_not_depend_on_who_is_fast(accumulate, checkpoint_every):
    def run(processes, delays):
        return gradient("float32", 3, processes, accumulate, None, 2, checkpoint_every, 0.1, delays)

    loss, expected = run(False, False)
    for processes, delays in [(True, False), (False, True), (True, True), (False, True)]:
        again, found = run(processes, delays)
        assert again == loss
        assert np.array_equal(found, expected)


class Task:
    """Work on one parameter of three numbers: `do` what a part says."""

    def __init__(self):
        self.x = Tensor(np.zeros(3), requires_grad=True)
        self.flat = FlatParameters([self.x])

    def do(self, verb, number):
        if verb == "sleep":
            time.sleep(number)
        if verb == "fail":
            raise ValueError(f"no luck with {number}")
        if verb == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == "die while it answers":  # half of the answer is in the pipe by then
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        (self.x * 1.0).sum().backward()
        return bytes(number) if verb == "die while it answers" else number

    def workers(self, count, processes):
        return Workers(self.flat, self, count, processes)


OK = ("add", 1)


@pytest.mark.parametrize("processes", KINDS)
def test_results_come_in_order_and_each_part_counts_once(processes):
    task = Task()
    with within(5), task.workers(3, processes) as workers:
        for count in (3, 1, 2, 3):
            task.flat.zero_grad()
            parts = [("sleep", 0.02 * (count - i)) for i in range(count)]
            assert workers.run(Task.do, parts) == [number for _, number in parts]
            assert task.x.grad.tolist() == [count] * 3
        with pytest.raises(ValueError, match="4 parts for 3 workers"):
            workers.run(Task.do, [OK] * 4)
        with pytest.raises(ValueError, match="0 parts"):
            workers.run(Task.do, [])
        assert workers.run(Task.do, [OK]) == [1]
    with pytest.raises(ValueError, match="at least one worker, got 0"):
        task.workers(0, processes)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("processes", KINDS)
def test_a_worker_that_fails_is_named_and_the_rest_refuse(processes, rank):
    task = Task()
    parts = [("sleep", 0.3), OK, OK]  # the others wait for worker 0, and must not be blamed
    parts[rank] = ("fail", rank)
    with within(5), task.workers(3, processes) as workers:
        assert workers.run(Task.do, [OK, OK, OK]) == [1, 1, 1]
        with pytest.raises((ValueError, RuntimeError), match=f"no luck with {rank}") as caught:
            workers.run(Task.do, parts)
        if processes and rank:
            assert str(caught.value).startswith(f"worker process {rank} failed")
            assert "in do" in str(caught.value)  # with the child's traceback
        else:
            assert caught.type is ValueError
        with pytest.raises(RuntimeError, match="failed before"):
            workers.run(Task.do, [OK])


@pytest.mark.parametrize("rank", [1, 2])
def test_a_worker_that_is_killed_is_named_and_the_rest_refuse(rank):
    parts = [("sleep", 0.1), OK, OK]
    parts[rank] = ("die", rank)
    with within(5), Task().workers(3, True) as workers:
        with pytest.raises(RuntimeError, match=f"worker process {rank} died"):
            workers.run(Task.do, parts)
        with pytest.raises(RuntimeError, match="failed before"):
            workers.run(Task.do, [OK])


def test_a_worker_that_is_killed_amid_its_answer_is_named():
    with within(5), Task().workers(2, True) as workers:
        with pytest.raises(RuntimeError, match="worker process 1 died: killed by signal 9; if mem"):
            workers.run(Task.do, [("sleep", 0.5), ("die while it answers", 10**7)])


def test_a_worker_that_is_killed_takes_no_lock_with_it(monkeypatch):
    """No child holds a lock that the parent wants: here it would be killed as soon as it does."""
    parent, enter = os.getpid(), multiprocessing.synchronize.SemLock.__enter__

    def enter_and_die(lock):
        entered = enter(lock)
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return entered

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__enter__", enter_and_die)
    with within(5), Task().workers(2, True) as workers:
        assert workers.run(Task.do, [("sleep", 0.5), OK]) == [0.5, 1]  # the child has to wait


def test_a_worker_that_does_not_hear_is_killed_in_the_end(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what a child inherits
    try:
        with within(5), pytest.raises(ValueError, match="no luck"):
            with Task().workers(2, True) as workers:
                child, join = workers.children[0], workers.children[0].join
                monkeypatch.setattr(child, "join", lambda timeout=None: join(timeout and 0.1))
                workers.run(Task.do, [("fail", 0), ("sleep", 60)])
        assert child.exitcode == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_worker_that_dies_between_two_runs_is_named():
    with within(5), Task().workers(3, True) as workers:
        workers.run(Task.do, [OK, OK, OK])
        os.kill(workers.children[1].pid, signal.SIGKILL)
        workers.children[1].join()
        with pytest.raises(RuntimeError, match="worker process 2 died"):
            workers.run(Task.do, [OK, OK, OK])


def test_children_are_gone_at_the_end_even_from_amid_their_work():
    with within(5):
        with Task().workers(3, True) as workers:
            children = workers.children
            assert len(children) == 2 and all(child.is_alive() for child in children)
        assert [child.exitcode is not None for child in children] == [True, True]
        with pytest.raises(ValueError, match="no luck"), Task().workers(2, True) as workers:
            children = workers.children
            workers.run(Task.do, [("fail", 0), ("sleep", 60)])
        assert children[0].exitcode == -signal.SIGTERM


@pytest.mark.parametrize("parts", [[OK, OK, OK], [("sleep", 60), OK, OK]])
def test_children_leave_when_their_parent_is_killed(parts):
    """Idle, or waiting for the parent's gradients. All hold a pipe open as long as they live."""
    end, held = os.pipe()

    def live():
        with Task().workers(3, True) as workers:
            workers.run(Task.do, [OK, OK, OK])
            os.write(held, b"!")
            workers.run(Task.do, parts)
            time.sleep(60)

    parent = fork.Process(target=live)
    parent.start()
    os.close(held)
    with within(10):
        assert os.read(end, 1) == b"!"
        time.sleep(0.2)
        parent.kill()
        parent.join()
        ready, _, _ = select.select([end], [], [], 3)
        assert ready and os.read(end, 1) == b"", "a worker outlived its parent"
    os.close(end)


def blas_threads():
    return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}


@pytest.mark.parametrize("processes", KINDS)
def test_blas_has_one_thread_while_workers_run(processes):
    with threadpool_limits(2, "blas"):
        with Task().workers(2, processes):
            assert blas_threads() == {1}
        assert blas_threads() == {2}
        with pytest.raises(ValueError), Task().workers(2, processes) as workers:
            workers.run(Task.do, [("fail", 0), OK])
        assert blas_threads() == {2}


def test_blas_keeps_one_thread_until_the_last_workers_end():
    with threadpool_limits(2, "blas"):
        one, other = Task().workers(2, False), Task().workers(2, False)
        with one:
            other.__enter__()
        assert blas_threads() == {1}
        other.__exit__()
        assert blas_threads() == {2}


@pytest.mark.parametrize("processes", KINDS)
def test_the_model_is_an_ordinary_one_again_afterwards(processes):
    task = Task()
    for _ in range(2):
        with within(5), task.workers(2, processes) as workers:
            task.flat.zero_grad()
            workers.run(Task.do, [OK, OK])
            assert task.x.grad.tolist() == [2, 2, 2]
    (task.x * 3.0).sum().backward()
    assert task.x.grad.tolist() == [5, 5, 5]


@pytest.mark.parametrize("error", [BlockingIOError, KeyboardInterrupt])
def test_workers_that_cannot_all_start_leave_nothing(monkeypatch, error):
    """No more processes, or Ctrl-C: those that had started end, and the model is an ordinary one.
    """
    task, start = Task(), fork.Process.start
    workers, started = task.workers(3, True), []

    def second_fails(child):
        if started:
            raise error
        started.append(child)
        start(child)

    with threadpool_limits(2, "blas"), monkeypatch.context() as patch:
        patch.setattr(fork.Process, "start", second_fails)
        with within(5), pytest.raises(error), workers:
            pass
        assert blas_threads() == {2}
    assert not workers.open and started[0].exitcode is not None
    (task.x * 3.0).sum().backward()
    assert task.x.grad.tolist() == [3, 3, 3]
    with within(5), task.workers(2, True) as workers:
        assert workers.run(Task.do, [OK, OK]) == [1, 1]


@pytest.mark.parametrize("processes", KINDS)
def test_an_adapter_may_rest_while_workers_run_but_not_when_they_start(processes):
    model = add_lora(make_model(), 2, 4)
    trainer = Trainer(model, SGD(model.parameters()), 2, processes)
    hooks = [p.on_grad for p in model.parameters()]
    with within(5), trainer:
        use_adapter(model, None)
    with pytest.raises(ValueError, match="frozen, or its adapter does not act"), trainer:
        pass
    use_adapter(model, "default")
    assert [p.on_grad for p in model.parameters()] == hooks
    with within(5), trainer:
        assert trainer.step(0, make_batch()).norm > 0


def test_a_single_worker_that_fails_may_go_on():
    tokens, targets = make_batch()
    found = []
    for fails in (True, False):
        model = make_model()
        trainer = Trainer(model, SGD(model.parameters()))
        if fails:
            with pytest.raises(ValueError, match="targets from 0 to 999"):
                trainer.step(0, (tokens, np.where(targets == targets.max(), 999, 0)))
        found.append(trainer.step(0, (tokens, targets)).norm)
    assert found[0] == found[1]


def test_a_full_queue_holds_its_worker_back(monkeypatch):
    monkeypatch.setattr(GradientQueue, "LIMIT", 16)  # bytes, two gradients
    turns, broken, entered = threading.Semaphore(0), threading.Event(), []
    queue = GradientQueue(turns, None, broken.is_set)
    sent = []

    def work():
        for i in range(6):
            sent.append(i)
            queue.put(lambda dy: entered.append(float(dy)), np.float64(i))
        queue.finish()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    time.sleep(0.1)
    assert (sent, entered) == ([0, 1, 2], [])
    turns.release(6)
    worker.join(5)
    assert entered == sent == [0, 1, 2, 3, 4, 5]
    broken.set()
    with pytest.raises(GaveUp):
        work()
    assert len(sent) == 9


# Trainer


@given(st.data())
@example(None)
def test_a_split_batch_is_the_whole_batch(draw):
    if draw is None:  # the second worker's part has no target
        rows, accumulate, workers = 4, 1, 2
        tokens, targets = make_batch(rows)
        targets[2:] = IGNORED
    else:
        rows = draw.draw(st.integers(1, 7))
        accumulate, workers = draw.draw(st.integers(1, rows)), draw.draw(st.integers(1, 4))
        seed, counted = draw.draw(st.integers(0, 99)), draw.draw(st.sampled_from([0.1, 0.5, 1.0]))
        tokens, targets = make_batch(rows, seed, counted)
    whole = gradient("float64", batch=(tokens, targets))
    split = gradient("float64", workers, False, accumulate, (tokens, targets))
    close(split[0], whole[0], "float64")
    close(split[1], whole[1], "float64")


class Preference:
    """A loss on three arrays, which divides by two totals: pairs of rows, weighted, and tokens."""

    def totals(self, liked, other, weights):
        return liked.size, weights.sum()

    def __call__(self, model, liked, other, weights, totals):
        tokens, total = totals
        first, second = (ops.log_softmax(model(rows)) for rows in (liked, other))
        gap = (first * weights[:, None, None]).sum() - (second * weights[:, None, None]).sum()
        return gap * (1 / total) + (first * first).sum() * (1 / tokens)


@given(rows=st.integers(1, 7), accumulate=st.integers(1, 7), workers=st.integers(1, 4),
       seed=st.integers(0, 99))
def test_a_split_batch_of_three_arrays_is_the_whole_batch(rows, accumulate, workers, seed):
    rng = np.random.default_rng(seed)
    liked, other = rng.integers(0, 13, (2, rows, 6))
    batch = liked, other, rng.random(rows) + 0.1
    found = []
    for way in [(1, 1), (workers, min(accumulate, rows))]:
        model = make_model("float64")
        optimizer = AdamW(model.parameters(), eps=1e-3)
        with Trainer(model, optimizer, way[0], loss=Preference()) as trainer:
            done = trainer.step(0, batch, lr=1e-2, clip=0.5, accumulate=way[1])
        found.append((np.array([done.loss, done.norm]), optimizer.flat.data.copy()))
        assert done.targets == batch[2].sum()
    for split, whole in zip(*found):
        close(split, whole, "float64")


def test_a_batch_is_a_tuple_of_arrays_of_as_many_rows():
    tokens, targets = make_batch()
    model = make_model()
    with Trainer(model, SGD(model.parameters())) as trainer:
        with pytest.raises(TypeError, match="a batch is a tuple of arrays, got ndarray"):
            trainer.step(0, tokens)
        with pytest.raises(ValueError, match=r"share their first axis, got \[\(7, 6\), \(6, 6\)\]"):
            trainer.step(0, (tokens, targets[1:]))
        with pytest.raises(ValueError, match=r"share their first axis, got \[\(7, 6\), \(6, 6\)\]"):
            trainer.evaluate(tokens, targets[1:])
        with pytest.raises(TypeError, match="a tuple of arrays, got one with int"):
            trainer.evaluate(tokens, targets, 32)  # batch is given by name
        with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
            trainer.evaluate(tokens, targets, batch=0)


@pytest.mark.parametrize("processes", KINDS)
def test_outside_of_with_one_worker_works_and_more_say_what_they_need(processes):
    found = []
    for inside in (True, False):
        model = make_model(dropout=0.2)
        trainer = Trainer(model, AdamW(model.parameters()), 1, processes)
        with trainer if inside else nullcontext():
            done = [trainer.step(i, make_batch(), clip=0.5).loss for i in range(2)]
            found.append((done, trainer.evaluate(*make_batch()), trainer.optimizer.flat.data))
    assert found[0][:2] == found[1][:2] and np.array_equal(found[0][2], found[1][2])
    trainer = Trainer(model, SGD(model.parameters()), 2, processes)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="2 workers run only inside a `with`"):
            trainer.step(0, make_batch())
        with trainer:
            trainer.step(0, make_batch())


def test_the_loss_is_the_mean_over_the_targets_that_count():
    tokens, targets = make_batch()
    model = make_model("float64")
    expected, _, counted = by_hand(model, tokens, targets)
    with Trainer(model, SGD(model.parameters(), lr=0.0), workers=2) as trainer:
        done = trainer.step(4, (tokens, targets), lr=0.0, accumulate=2)
    close(done.loss, expected, "float64")
    assert (done.step, done.targets, done.lr) == (5, counted, 0.0)
    close(done.norm, math.sqrt((trainer.optimizer.flat.grad**2).sum()), "float64")


def test_the_gradient_is_clipped_and_lr_is_set():
    tokens, targets = make_batch()
    model = make_model("float64")
    before = [p.data.copy() for p in model.parameters()]
    with Trainer(model, SGD(model.parameters(), lr=7.0)) as trainer:
        done = trainer.step(0, (tokens, targets), lr=0.5, clip=0.01)
    moved = math.sqrt(sum(((p.data - b) ** 2).sum() for p, b in zip(model.parameters(), before)))
    assert done.norm > 0.1
    assert done.lr == trainer.optimizer.lr == 0.5
    assert moved == pytest.approx(0.5 * 0.01, rel=1e-9)


def test_nothing_to_learn_from_is_an_error():
    tokens, targets = make_batch()
    model = make_model()
    before = model.state_dict()["embed.weight"].copy()
    with Trainer(model, AdamW(model.parameters())) as trainer:
        with pytest.raises(ValueError, match=r"step 3: the loss counts nothing .*-100"):
            trainer.step(3, (tokens, np.full_like(targets, IGNORED)))
        with pytest.raises(ValueError, match=r"8 micro-batches .* 7 rows"):
            trainer.step(3, (tokens, targets), accumulate=8)
        with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
            trainer.step(3, (tokens, targets), accumulate=0)
        assert trainer.optimizer.steps == 0
    assert np.array_equal(model.state_dict()["embed.weight"], before)


@op
def poisoned(x, logit, grad):
    y = x.copy()
    y[..., 1] += logit
    return y, lambda dy: dy * grad


class Poisoned(Module):
    """A model that goes wrong on demand, forwards or backwards."""

    def __init__(self):
        self.inner, self.logit, self.grad = make_model(), 0.0, 1.0

    def forward(self, tokens):
        return poisoned(self.inner(tokens), logit=self.logit, grad=self.grad)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "where, value, said",
    [("logit", math.nan, "loss nan"), ("logit", -math.inf, "loss inf"),
     ("grad", math.nan, r"loss \d.*norm nan"), ("grad", 1e30, r"loss \d.*norm inf")],
)
def test_a_step_that_is_not_finite_changes_nothing(where, value, said, workers):
    tokens, targets = make_batch()
    model = Poisoned()
    optimizer = AdamW(model.parameters())
    with Trainer(model, optimizer, workers) as trainer:
        for step in range(2):
            trainer.step(step, (tokens, targets), lr=1e-3)
        before = [a.copy() for a in (optimizer.flat.data, optimizer.m, optimizer.v)]
        good = getattr(model, where)
        setattr(model, where, value)
        with pytest.raises(Diverged, match=f"step 2: {said}"):
            trainer.step(2, (tokens, targets), lr=1e-2, clip=1.0)
        after = [optimizer.flat.data, optimizer.m, optimizer.v]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        assert (optimizer.steps, optimizer.lr) == (2, 1e-3)
        setattr(model, where, good)
        assert math.isfinite(trainer.step(2, (tokens, targets)).norm)


class Gated(Module):
    """A model with a parameter that it does not always use."""

    def __init__(self):
        self.inner, self.gate, self.closed = make_model("float64"), Tensor(np.ones(1), True), False

    def forward(self, tokens):
        return self.inner(tokens) if self.closed else self.inner(tokens) * self.gate


@pytest.mark.parametrize("workers", [1, 2])
def test_a_parameter_that_a_step_does_not_use_stays(workers):
    model = Gated()
    with Trainer(model, SGD(model.parameters(), lr=0.1), workers) as trainer:
        trainer.step(0, make_batch())
        after, model.closed = model.gate.data.copy(), True
        norm = trainer.step(1, make_batch()).norm
    squares = sum((p.grad**2).sum() for p in model.inner.parameters())
    assert after != 1 and model.gate.data == after
    close(norm, math.sqrt(squares), "float64")


def test_evaluation_leaves_the_mode_to_those_who_share_the_model():
    model, batch = make_model(dropout=0.5).train(), make_batch()
    trainer = Trainer(model, SGD(model.parameters(), lr=0.0))
    found = trainer.evaluate(*batch)
    assert all(module.training for _, module in model.named_modules())
    model.eval()
    assert trainer.evaluate(*batch) == found
    assert not model.training


def by_hand(model, tokens, targets):
    """(mean loss, share that is right, number of targets), one token after another."""
    losses, hits = [], []
    for row, aims in zip(tokens, targets):
        for logits, aim in zip(model.eval()(row[None]).data[0], aims):
            if aim != IGNORED:
                logits = logits.astype(float)
                losses.append(np.log(np.exp(logits).sum()) - logits[aim])
                hits.append(logits.argmax() == aim)
    return np.mean(losses), np.mean(hits), len(losses)


@pytest.mark.parametrize("workers, processes", [(1, False), (3, False), (2, True)])
def test_evaluation_is_a_plain_loop_without_dropout(workers, processes):
    tokens, targets = make_batch(rows=9)
    model = make_model("float64", dropout=0.5)
    targets[3:5] = model.eval()(tokens[3:5]).data.argmax(-1)  # some hits
    loss, accuracy, _ = by_hand(model, tokens, targets)
    assert 0 < accuracy < 1
    trainer = Trainer(model, SGD(model.parameters(), lr=0.0), workers, processes)
    with within(10), trainer:
        for batch in (1, 4, 32):
            found = trainer.evaluate(tokens, targets, batch=batch)
            close(found[0], loss, "float64")
            assert found[1] == accuracy
        first = trainer.step(0, (tokens, targets)).loss
        again = trainer.evaluate(tokens, targets)
        assert abs(first - loss) > 1e-3  # dropout was back
        close(again[0], loss, "float64")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_masked_models_evaluation_counts_no_padding(workers):
    """The last row is filled up; what it says is what its text says alone."""
    texts = "and so on it goes, to the end, which is no row", "this text has 38 characters, 32 + 6"
    _, (tokens, targets, mask) = data.batches_of([[[text] for text in texts]], data.ByteTokenizer(),
                                                 2, 32, 3, masked=True)
    _, everywhere = data.corrupt(tokens, np.random.default_rng(3), data.ByteTokenizer())
    assert (everywhere[mask == 0] != IGNORED).any() and (targets[mask == 1] != IGNORED).any()
    model = Transformer(Config.bert(258, 32, layers=1, heads=2, width=8, hidden=16))
    size = mask[-1].sum()
    assert (mask[:-1] == 1).all() and 0 < size < 9 and not tokens[-1, size:].any()
    targets[-1, size - 1] = 7
    losses, right, counted = [], 0, 0
    model.astype("float64")
    for row, aims, there in zip(tokens, targets, mask):
        row, aims = row[None, : there.sum()], aims[None, : there.sum()]
        logits = model.eval()(row)
        losses.append(float(ops.cross_entropy(logits, aims, total=1).data))
        right += (logits.data.argmax(-1) == aims).sum()
        counted += (aims != IGNORED).sum()
    with Trainer(model, SGD(model.parameters()), workers) as trainer:
        found = trainer.evaluate(tokens, targets, mask)
    close(np.array(found), np.array([sum(losses), right]) / counted, "float64")


@pytest.mark.parametrize("processes", KINDS)
def test_dropout_differs_between_steps_and_workers_and_repeats_with_the_seed(processes):
    row = make_batch(rows=1, counted=1.0)

    def loss(copies, workers=1, accumulate=1, step=0, seed=0, dropout=0.3):
        """Of copies of one row; it is that of the row alone where all copies are dropped alike."""
        model = make_model(dropout=dropout)
        batch = [np.repeat(a, copies, axis=0) for a in row]
        trainer = Trainer(model, SGD(model.parameters(), lr=0.0), workers, processes, seed)
        with within(10), trainer:
            return trainer.step(step, batch, accumulate=accumulate).loss

    ways = [dict(copies=1), dict(copies=1, step=1), dict(copies=1, seed=1), dict(copies=2),
            dict(copies=2, workers=2), dict(copies=2, accumulate=2)]
    drawn = [loss(**way) for way in ways]
    assert len(set(drawn)) == len(ways)
    assert [loss(**way) for way in ways] == drawn
    assert np.ptp([loss(**way, dropout=0.0) for way in ways]) < 1e-6 < min(np.diff(sorted(drawn)))


class Slow(Module):
    """Takes its time to change the mode."""

    @property
    def training(self):
        return self.mode

    @training.setter
    def training(self, mode):
        time.sleep(0.05)
        self.mode = mode


class Probe(Module):
    """Notes whether dropout acts while it is run."""

    def __init__(self):
        self.slow, self.drop, self.inner, self.modes = Slow(), Dropout(0.5), make_model(), set()

    def forward(self, tokens):
        self.modes.add(self.drop.acts)
        return self.inner(tokens)


def test_no_worker_starts_before_its_model_is_in_the_right_mode():
    model = Probe()
    with within(5), Trainer(model, SGD(model.parameters(), lr=0.0), 3) as trainer:
        for _ in range(2):
            for run, mode in ((trainer.evaluate, False), (lambda *b: trainer.step(0, b), True)):
                model.modes.clear()
                run(*make_batch())
                assert model.modes == {mode}


def test_default_workers_use_every_core():
    cores, processes = default_workers()
    assert 1 <= cores <= os.cpu_count()
    assert not (processes and cores == 1)


# Run directories

STEPS, SAVE_EVERY = 8, 2
SETTINGS = {"lr": 1e-2}


def make_run(dropout=0.2, **changes):
    model = make_model(dropout=dropout, **changes)
    params = model.parameters()
    return model, AdamW(params, weight_decay=0.1, undecayed=[p for p in params if p.ndim < 2])


def go_on(run, until=STEPS, workers=1, processes=False):
    """Train from the last checkpoint, or the start, to `until`; returns (model, optimizer)."""
    model, optimizer = make_run()
    stream = np.random.default_rng(5).integers(0, 13, 200)
    batches = data.Batches([stream], [1], batch=4, length=6, seed=3)
    start = run.restore(model, optimizer)
    with Trainer(model, optimizer, workers, processes, seed=1) as trainer:
        for step in range(start, until):
            done = trainer.step(step, batches[step], schedule(step), clip=0.5, accumulate=2)
            run.log(**vars(done))
            if done.step % SAVE_EVERY == 0:
                run.save(done.step, model, optimizer)
    return model, optimizer


def schedule(step):
    return cosine_schedule(step, STEPS, lr=1e-2, warmup=2)


def new_run(folder):
    return RunDirectory.create(folder, "run", SETTINGS, [])


def metrics(run):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in run.records()]


def outcome(run, model, optimizer):
    """All that must come out the same, to the bit."""
    arrays = {**model.state_dict(), "m": optimizer.m, "v": optimizer.v}
    return {k: a.tobytes() for k, a in arrays.items()}, optimizer.steps, metrics(run)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The outcome without a stop, of (workers, processes)."""
    found = {}
    for key in [(1, False), (2, True)]:
        run = new_run(tmp_path_factory.mktemp("straight"))
        found[key] = outcome(run, *go_on(run, STEPS, *key))
    return found


def test_a_run_logs_every_step(straight):
    *_, records = straight[1, False]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["lr"] for r in records] == [schedule(s) for s in range(STEPS)]
    assert all(r["targets"] == 24 and r["norm"] > 0 for r in records)


@pytest.mark.parametrize("workers, processes", [(1, False), (2, True)])
def test_a_resumed_run_ends_like_a_straight_one(tmp_path, straight, workers, processes):
    run = new_run(tmp_path)
    with within(20):
        go_on(run, 3, workers, processes)  # the third step is lost: the checkpoint is of the second
        assert [r["step"] for r in run.records()] == [1, 2, 3]
        go_on(run, 6, workers, processes)
        ended = go_on(RunDirectory(run.path), STEPS, workers, processes)
    assert outcome(run, *ended) == straight[workers, processes]


def test_a_run_without_checkpoint_starts_anew(tmp_path, straight):
    run = new_run(tmp_path)
    go_on(run, 1)
    assert not (run.path / "checkpoints").exists()
    (run.path / "checkpoints" / "step-00000002.tmp").mkdir(parents=True)  # killed in the first save
    assert outcome(run, *go_on(run)) == straight[1, False]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, straight):
    run = new_run(tmp_path)
    go_on(run, 5)
    file = run.path / "checkpoints" / "step-00000004" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged checkpoint.*step-00000004"):
        assert run.restore(*make_run()) == 2
    assert [r["step"] for r in run.records()] == [1, 2]
    with pytest.warns(UserWarning, match="damaged"):
        ended = go_on(run)
    assert outcome(run, *ended) == straight[1, False]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_no_whole_checkpoint_is_an_error_and_changes_nothing(tmp_path, file):
    run = new_run(tmp_path)
    go_on(run, 2)
    (run.path / "checkpoints" / "step-00000002" / file).write_bytes(b"{}")
    model, optimizer = make_run()
    before, logged = outcome(run, model, optimizer), run.records()
    with pytest.warns(UserWarning), pytest.raises(FormatError, match="no whole checkpoint"):
        run.restore(model, optimizer)
    assert outcome(run, model, optimizer) == before
    assert run.records() == logged


@pytest.mark.parametrize(
    "changes, said",
    [(dict(layers=1), r"blocks\.1\.mlp\.up\.weight"), (dict(layers=3), r"blocks\.2\.norm1\.bias"),
     (dict(width=4), r"embed\.weight is \(13, 8\), expected \(13, 4\)"),
     (dict(vocab_size=14), r"embed\.weight is \(13, 8\)"), (dict(tied=False), r"head\.weight")],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, changes, said):
    run = new_run(tmp_path)
    go_on(run, 3)
    model, optimizer = make_run(**changes)
    before = outcome(run, model, optimizer)
    with pytest.raises(ValueError, match=said):
        run.restore(model, optimizer)
    assert outcome(run, model, optimizer) == before


def test_a_checkpoint_of_other_trainable_parameters_is_refused(tmp_path):
    run = new_run(tmp_path)
    go_on(run, 2)
    model = make_model(dropout=0.2)
    model.embed.weight.node = None
    optimizer = AdamW(model.parameters())
    before = outcome(run, model, optimizer)
    with pytest.raises(FormatError, match=r"moments .*\['m\.embed\.weight', 'v\.embed\.weight'\]"):
        run.restore(model, optimizer)
    assert outcome(run, model, optimizer) == before


def test_the_last_line_of_the_metrics_may_be_cut_short(tmp_path, straight):
    run = new_run(tmp_path)
    go_on(run, 3)
    file = run.path / "metrics.jsonl"
    whole = file.read_text()
    for end in (1, 2, 20):
        file.write_text(whole[:-end])
        assert [r["step"] for r in run.records()] == ([1, 2, 3] if end == 1 else [1, 2])
    assert outcome(run, *go_on(run)) == straight[1, False]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_metrics_that_are_damaged_inside_are_an_error(tmp_path):
    run = new_run(tmp_path)
    run.log(step=1)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": \n{"step": 3}\n')
    with pytest.raises(FormatError, match=r"metrics\.jsonl: line 2"):
        run.records()


def test_a_run_that_is_killed_again_and_again_ends_like_a_straight_one(tmp_path, straight):
    run, kills = new_run(tmp_path), 0
    for delay in [0.01, *(random.uniform(0.0, 0.15) for _ in range(5))]:
        child = fork.Process(target=go_on, args=(run, STEPS, 2, True))
        child.start()
        child.join(delay)
        if child.exitcode is None:
            child.kill()
            kills += 1
        with within(5):
            child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
    with within(20):
        ended = go_on(run, STEPS, 2, True)
    assert kills
    assert outcome(run, *ended) == straight[2, True]


def test_a_run_describes_itself(tmp_path):
    runs = [RunDirectory.create(tmp_path / "runs", "try", SETTINGS, [{"name": "a"}]) for _ in "12"]
    assert [run.path.name for run in runs] == ["try-1", "try-2"]
    described = runs[0].describe()
    assert described["settings"] == SETTINGS and described["corpora"] == [{"name": "a"}]
    assert described["numpy"] == np.__version__ and described["blas"]
    for field, content in itertools.product(("settings", "corpora"), [{}, []]):
        broken = {"settings": {}, "corpora": []}
        del broken[field]
        (runs[1].path / "run.json").write_text(json.dumps(broken if content == {} else content))
        with pytest.raises(FormatError, match=field if content == {} else "must hold an object"):
            runs[1].describe()
    with pytest.raises(FileNotFoundError, match="nothing"):
        RunDirectory(tmp_path / "nothing").describe()


def test_curves_and_samples(tmp_path):
    run = new_run(tmp_path)
    for step in range(4):
        run.log(step=step, loss=4.0 - step, **({"validation_loss": 4.1} if step % 2 else {}))
    assert run.plot() == run.path / "loss.png"
    assert (run.path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    run.write_sample(0, "xq\n")
    run.write_sample(100, "the ä")
    text = (run.path / "samples.txt").read_text(encoding="utf-8")
    assert text.index("after step 0\nxq\n") < text.index("after step 100\nthe ä\n")
