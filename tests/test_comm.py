"""Laws of the collectives, on ranks that are threads, and NCCL's calls, on a stand-in."""

import ctypes
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import backend
from minilm.nn import Linear
from minilm.optim import AdamW
from minilm.optim.flat import clip_grad_norm
from minilm.parallel import comm as comms
from minilm.parallel.comm import Handle, Local, Threads, connect, ranks
from minilm.parallel.faults import Parted
from minilm.parallel.mpi import Mpi
from minilm.parallel.nccl import Nccl, on_cards
from minilm.parallel.zero import Zero
from minilm.tensor import Tensor

SIZES = st.integers(1, 4), st.integers(1, 9), st.sampled_from(["float32", "float64", "int32"])


def drawn(rank, size, dtype):
    x = np.random.default_rng(rank).standard_normal(size) * 100
    return x.astype(dtype)


@given(*SIZES)
def test_sums_run_in_the_order_of_ranks(n, size, dtype):
    expected = drawn(0, size * n, dtype)
    for r in range(1, n):
        expected = expected + drawn(r, size * n, dtype)

    def run(comm):
        x, full = drawn(comm.rank, size * n, dtype), drawn(comm.rank, size * n, dtype)
        shard, odd = np.empty(size, dtype), drawn(comm.rank, size * n, dtype)[:-1].copy()
        comm.all_reduce(x).wait()
        comm.reduce_scatter(full, shard).wait()
        if odd.size:
            comm.all_reduce(odd).wait()
        return x, shard, odd

    for ordered in (False, True):
        found = ranks(n, run, ordered)
        for x, _, odd in found:
            assert x.tobytes() == expected.tobytes()
            assert odd.tobytes() == expected[:-1].tobytes()
        assert np.concatenate([shard for _, shard, _ in found]).tobytes() == expected.tobytes()


@given(*SIZES)
def test_adding_on_is_the_sum_of_one_process(n, size, dtype):
    """Micro-batch after micro-batch, each rank after rank."""
    everyone = [drawn(k, size * n, dtype) for k in range(2 * n)]
    expected = everyone[0]
    for x in everyone[1:]:
        expected = expected + x

    def run(comm):
        shard = np.empty(size, dtype)
        comm.reduce_scatter(everyone[comm.rank].copy(), shard).wait()
        comm.reduce_scatter(everyone[n + comm.rank].copy(), shard, add=True).wait()
        return shard

    assert np.concatenate(ranks(n, run)).tobytes() == expected.tobytes()


@given(*SIZES)
def test_gathering_and_broadcasting_copy(n, size, dtype):
    def run(comm):
        full, x = np.empty(size * n, dtype), drawn(comm.rank, size, dtype)
        comm.all_gather(x, full).wait()
        comm.broadcast(x, root=n - 1).wait()
        assert (comm.numbers(comm.rank, 7) == [[r, 7] for r in range(n)]).all()
        comm.barrier()
        return full, x

    for full, x in ranks(n, run):
        assert full.tobytes() == b"".join(drawn(r, size, dtype).tobytes() for r in range(n))
        assert x.tobytes() == drawn(n - 1, size, dtype).tobytes()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_bytes_are_the_rings(n, ordered):
    def run(comm):
        full, shard = np.zeros(4 * n, np.float32), np.zeros(4, np.float32)
        comm.all_reduce(full)
        comm.reduce_scatter(full, shard)
        comm.all_gather(shard, full, what="mine")
        comm.broadcast(full)
        return comm.sent

    S = 16 * n
    for sent in ranks(n, run, ordered):
        part = (n - 1) * S / n
        assert sent == {"all_reduce": 2 * part, "reduce_scatter": part, "mine": part,
                        "broadcast": part}


def test_a_handle_finishes_once():
    class Request:
        asked = 0

        def Test(self):
            self.asked += 1
            return self.asked > 1

        def Wait(self):
            raise AssertionError("it was done")

    done = []
    handle = Handle(Request(), lambda: done.append(1))
    assert (handle.test(), done) == (False, [])
    assert (handle.test(), done) == (True, [1])
    handle.wait()
    assert handle.test() and done == [1]


@pytest.mark.parametrize("error", [ZeroDivisionError("no more"), SystemExit(3)])
def test_a_rank_that_fails_ends_the_others(error):
    def run(comm):
        comm.begin(7)
        comm.barrier()
        if comm.rank == 1:
            raise error
        comm.barrier()

    before = threading.active_count()
    with pytest.raises(type(error)) as found:
        ranks(3, run, ordered=False)
    assert found.value.__notes__[-1] == ("on rank 1 of 3, in step 7, after call 1: all_reduce of 1 "
                                         "float64 for barrier in step 7")
    assert threading.active_count() == before


@pytest.mark.parametrize("call, words", [
    (lambda comm, x: comm.all_reduce(x[:3]), "all_reduce of 3 float32 in step 7"),
    (lambda comm, x: comm.all_reduce(x.view(np.int32)), "all_reduce of 6 int32 in step 7"),
    (lambda comm, x: comm.broadcast(x), "broadcast of 6 float32 in step 7"),
    (lambda comm, x: comm.all_gather(x[:2], x, what="parameters"),
     "all_gather of 2 float32 for parameters in step 7"),
    (lambda comm, x: None, "its end in step 7"),
])
def test_a_rank_that_makes_another_call_is_named(call, words):
    def run(comm):
        comm.begin(7)
        comm.barrier()
        x = np.ones(6, np.float32)
        return call(comm, x) if comm.rank == 2 else comm.all_reduce(x)

    with pytest.raises(Parted, match=f"^the ranks differ in call 2: rank 2 has {words}; ranks 0, 1 "
                                     "have all_reduce of 6 float32 in step 7$"):
        ranks(3, run, ordered=False)


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_does_not_come_is_named(late):
    wake, began, left = threading.Event(), time.monotonic(), []

    def run(comm):
        comm.begin(7)
        if comm.rank == late:
            left.append(threading.current_thread())
            wake.wait(10)
        comm.broadcast(np.zeros(4), root=2)

    with pytest.raises(RuntimeError, match=rf"^rank {late} has not come to call 1, for which rank "
                                           r"[012] has waited 0.1 s: broadcast of 4 float64 in "
                                           r"step 7$"):
        ranks(3, run, patience=0.1)
    assert time.monotonic() - began < 5
    assert left[0].is_alive() and left[0].daemon  # so the process may end
    wake.set()


def test_what_does_not_fit_is_refused():
    comm = Local()
    with pytest.raises(ValueError, match="flat array"):
        comm.all_reduce(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="flat array"):
        comm.all_reduce(np.zeros(6)[::2])
    with pytest.raises(ValueError, match="1 shards of 3 numbers"):
        comm.all_gather(np.zeros(3), np.zeros(4))
    with pytest.raises(TypeError, match="float64, the shard float32"):
        comm.reduce_scatter(np.zeros(3), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="root"):
        comm.broadcast(np.zeros(3), root=1)


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    for name in comms.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert isinstance(connect(), Local)
    assert connect(ordered=True).ordered


def test_a_missing_mpi_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"minilm\[mpi\]"):
        Mpi()


class Hosts(Local):
    """Rank 1 of two machines with two ranks each, which have so many GPUs."""

    rank, size, local_rank = 1, 4, 1

    def __init__(self, *cards):
        super().__init__(ordered=True)
        self.cards = cards

    def numbers(self, number, cards):
        assert (number, cards) == (1, self.cards[0])
        return np.array([[r % 2, self.cards[r // 2]] for r in range(4)], np.float64)


def test_each_rank_has_the_gpu_of_its_number_on_its_machine(cupy, monkeypatch):
    made = []
    monkeypatch.setattr("minilm.parallel.nccl.Local", Threads)
    monkeypatch.setattr("minilm.parallel.nccl.Nccl", lambda *how: made.append(how) or "nccl")
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 2)
    host = Hosts(2, 2)
    assert (on_cards(host), made) == ("nccl", [(host, True)])
    with pytest.raises(RuntimeError, match=r"^each rank needs a GPU of its own, but rank 3 is "
                                           r"number 2 on a machine that has 1$"):
        on_cards(Hosts(2, 1))


def test_a_process_by_itself_needs_no_nccl(cupy):
    assert on_cards(host := Local()) is host


def test_without_a_gpu_it_is_said(cupy, monkeypatch):
    backend.cupy.cache_clear()
    monkeypatch.setattr(cupy, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU and its driver; CuPy finds none"):
        on_cards(Local())
    backend.cupy.cache_clear()


class PretendedNccl:
    """NCCL of one rank: it copies from pointer to pointer."""

    available, NCCL_SUM = True, "sum"
    types = {"FLOAT32": 4, "FLOAT16": 2, "FLOAT64": 8, "BFLOAT16": 2, "INT32": 4, "INT64": 8,
             "UINT8": 1}

    def __init__(self):
        self.log = []
        for name, size in self.types.items():
            setattr(self, f"NCCL_{name}", (name, size))

    def get_unique_id(self): return bytes(range(128))
    def groupStart(self): self.log.append("start")
    def groupEnd(self): self.log.append("end")

    def NcclCommunicator(self, size, name, rank):
        assert (size, name, rank) == (1, bytes(range(128)), 0)
        return self

    def copy(self, a, b, count, kind, stream):
        self.log.append((kind[0], count, stream))
        ctypes.memmove(b, a, count * kind[1])

    def allReduce(self, a, b, count, kind, add, s): self.copy(a, b, count, kind, s)
    def reduceScatter(self, a, b, count, kind, add, s): self.copy(a, b, count, kind, s)
    def allGather(self, a, b, count, kind, s): self.copy(a, b, count, kind, s)
    def broadcast(self, a, b, count, kind, root, s): self.copy(a, b, count, kind, s)
    def send(self, a, count, kind, other, s): self.sending = a
    def recv(self, b, count, kind, other, s): self.copy(self.sending, b, count, kind, s)


def test_a_missing_nccl_names_the_extra(cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda, "nccl", SimpleNamespace(available=False), raising=False)
    with pytest.raises(RuntimeError, match=r"minilm\[nccl\]"):
        Nccl(Local())


@pytest.fixture
def pretended(cupy, monkeypatch, request):
    """The stand-in for NCCL, or None where CuPy is the real one, and NCCL with it."""
    if request.node.callspec.params["cupy"] == "real":
        pytest.importorskip("cupy.cuda.nccl")
        return None
    stand_in = PretendedNccl()
    monkeypatch.setattr(backend, "nccl", lambda: stand_in)
    monkeypatch.setattr(cupy.cuda, "Device", lambda number: SimpleNamespace(use=int), raising=False)
    return stand_in


@pytest.mark.parametrize("ordered", [False, True])
def test_nccl_is_given_pointers_counts_and_types(cupy, pretended, ordered):
    """On a stand-in of one rank. What only a card shows, streams and their order, is not seen."""
    comm = Nccl(host := Local(), ordered)
    comm.begin(7)
    assert host.step == 7
    if pretended:
        comm.stream.wait_event = lambda event: pretended.log.append("wait")
    x, y = cupy.asarray(np.arange(4, dtype=np.float32)), cupy.zeros(4, np.float32)
    comm.reduce_scatter(x, y).wait()
    assert y.get().tolist() == [0, 1, 2, 3]
    comm.reduce_scatter(x, y, add=True).wait()
    assert y.get().tolist() == [0, 2, 4, 6]
    comm.all_gather(x, y).wait()
    comm.all_reduce(y).wait()
    handle = comm.broadcast(y)
    assert handle.test()
    assert y.get().tolist() == [0, 1, 2, 3]
    assert comm.numbers(3, 4).tolist() == [[3, 4]]
    if pretended:
        assert ("start" in pretended.log) == ordered
        assert pretended.log[0] == "wait" and pretended.log.count("wait") == 6  # before each call
        calls = {call[:2] for call in pretended.log if type(call) is tuple}
        assert calls == {("FLOAT32", 4), ("FLOAT64", 2)}
    with pytest.raises(TypeError, match="float32, float16"):
        comm.all_reduce(np.zeros(3))


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_on_a_gpu_is_adamw(cupy, pretended, stage, dtype):
    """One rank, with the same kernels: the bits of AdamW."""
    def made():
        layer = Linear(8, 8, np.random.default_rng(0)).astype(np.dtype(dtype)).to("cuda")
        return layer, Tensor(cupy.asarray(np.ones((2, 8), dtype)))

    (layer, x), (other, _) = made(), made()
    zero = Zero(layer, [layer], Nccl(Local()), stage, lr=0.1)
    optimizer = AdamW(other.parameters(), lr=0.1)
    for _ in range(2):
        with zero.micro_batch():
            layer(x).sum().backward()
        optimizer.zero_grad()
        other(x).sum().backward()
        norm = clip_grad_norm(other.parameters(), 1e9)
        assert zero.norm() == pytest.approx(norm, rel=1e-6)
        zero.step()
        optimizer.step()
    with zero.gathered():
        for mine, theirs in zip(layer.parameters(), other.parameters()):
            assert mine.data.get().tobytes() == theirs.data.get().tobytes()
    with pytest.raises(ValueError, match="stage 3 is for a CPU"):
        Zero(made()[0], [], Nccl(Local()), 3)
