"""ZeRO's stages on ranks that are threads, against one process that accumulates micro-batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranked import LR, alone, make, parameters, trained

from minilm.nn import Linear, Module
from minilm.parallel import comm as comms
from minilm.parallel.bucket import bytes_held, bytes_sent
from minilm.parallel.comm import Local, Threads, ranks
from minilm.parallel.norm import exact_squares, norm_of
from minilm.parallel.zero import Zero
from minilm.tensor import Tensor, no_grad

STAGES = pytest.mark.parametrize("stage", range(4))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


@STAGES
@pytest.mark.parametrize("n, count, kind", [
    (1, 2, {}), (2, 2, {}), (4, 4, {}), (3, 3, {"tied": True}), (2, 4, {"every": 1}),
    (2, 6, {"tied": True, "every": 2}), (2, 2, {"dtype": "bfloat16"}), (2, 2, {"lora": True}),
    (2, 2, {"lora": True, "every": 1}), (2, 4, {"dtype": "float16"}),
    (2, 2, {"lora": True, "codes": True}),
], ids=str)
def test_any_stage_has_the_bits_of_one_process(stage, n, count, kind):
    expected, losses, _ = alone(count, **kind)
    for found in ranks(n, lambda comm: trained(comm, stage, count, **kind)):
        same(found[0], expected)
        assert found[1] == losses


@STAGES
def test_clipping_is_that_of_one_process(stage):
    """The norm is exact, AdamW's own is rounded. Ranks agree bit for bit with one rank."""
    expected, _, norms = alone(4, clip=0.5)
    assert min(norms) > 0.5
    one = trained(Local(ordered=True), stage, 4, clip=0.5)
    for found in ranks(4, lambda comm: trained(comm, stage, 4, clip=0.5)):
        same(found[0], one[0])
        assert found[2] == one[2]
        assert np.allclose(found[2], norms, rtol=1e-6, atol=0)
        for name in expected:
            assert np.allclose(found[0][name], expected[name], rtol=0, atol=1e-6), name


class Stack(Module):
    """Layers that are units, so that nothing is left for the root."""

    def __init__(self, layers=3, width=32, dtype=np.float32):
        rng = np.random.default_rng(0)
        self.layers = [Linear(width, width, rng, bias=False) for _ in range(layers)]
        self.astype(dtype)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stacked(comm, stage, dtype=np.float32, steps=2):
    """(Zero, its bytes held after a step, bytes sent a step by what they were for)."""
    model = Stack(dtype=dtype)
    zero = Zero(model, model.layers, comm, stage)
    comm.sent.clear()
    for _ in range(steps):
        with zero.micro_batch():
            model(Tensor(np.ones((2, 32), dtype))).sum().backward()
        zero.step()
    return zero, zero.held(), {what: size / steps for what, size in comm.sent.items()}


@STAGES
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("size, dtype", [(4, "float32"), (2, "bfloat16")])
def test_bytes_are_those_of_the_formulas(stage, n, ordered, size, dtype):
    count = 3 * 32 * 32
    for zero, held, sent in ranks(n, lambda c: stacked(c, stage, np.dtype(dtype)), ordered):
        assert sum(held.values()) == bytes_held(stage, n, size) * count
        travelled = sent.pop("numbers"), sum(sent.values())
        assert travelled[1] == bytes_sent(stage, n, size) * count
        assert travelled[0] <= 5000
        unit = 32 * 32
        if stage == 3:  # two units' parameters, three units' gradients: not all of the model's
            assert zero.peak["parameters"] <= (2 * unit + count / n) * size
        if stage >= 2:
            assert zero.peak["gradients"] <= (3 * unit + count / n) * 4


@STAGES
@pytest.mark.parametrize("codes", [False, True])
def test_the_base_of_an_adapter_has_no_gradients_that_travel(stage, codes):
    def run(comm):
        zero = trained(comm, stage, 2, lora=True, codes=codes)[-1]
        adapter = sum(b.size for b in zero.trained) * 4 // 2  # (n-1)/n of it
        frozen = [b for unit in (*zero.units, zero.root) for b in unit.buckets if not b.trains]
        return adapter, frozen, zero, comm.sent

    for adapter, frozen, zero, sent in ranks(2, run):
        assert sent["gradients"] == 3 * (2 if stage == 0 else 1) * adapter
        assert bool(frozen) == (stage == 3)
        assert zero.held()["states"] == 2 * adapter * (2 if stage == 0 else 1)
        base = sum(b.size for b in frozen)
        assert base == 0 or zero.held()["parameters"] < base * 4 * 0.6


def test_what_two_units_share_is_the_roots():
    model = make(tied=True)
    model.blocks[1].mlp.up.weight = model.blocks[0].mlp.up.weight
    zero = Zero(model, model.blocks, Local())
    of_root = [t for b in zero.root.buckets for t in b.tensors]
    assert any(t is model.blocks[0].mlp.up.weight for t in of_root)
    assert any(t is model.embed.weight for t in of_root)
    assert sum(len(b.tensors) for b in zero.trained) == len(model.parameters())


@STAGES
def test_a_parameter_without_a_gradient_stays_as_it_is(stage):
    """As with AdamW: neither decayed nor moved, unless another rank has a gradient for it."""
    def run(comm):
        model = Stack()
        before = parameters(model)
        zero = Zero(model, model.layers, comm, stage, lr=LR, weight_decay=0.5)
        with zero.micro_batch():
            used = model.layers[: 2 - comm.rank]
            x = Tensor(np.ones((1, 32), np.float32))
            for layer in used:
                x = layer(x)
            x.sum().backward()
        zero.step()
        with zero.gathered():
            return before, parameters(model)

    if stage == 3:  # gathers must be alike on all ranks
        found = [run(Local())]
        moved = 1, 1, 0
    else:
        found, moved = ranks(2, run), (1, 1, 0)
    for before, after in found:
        for i, name in enumerate(before):
            assert (before[name] != after[name]).any() == moved[i], name


@pytest.mark.parametrize("stage", [2, 3])
def test_a_units_gradients_travel_before_the_next_units_backward(stage):
    events = []

    class Told(Local):
        def _reduce_scatter(self, full, shard):
            events.append("reduce")
            return super()._reduce_scatter(full, shard)

        def _all_gather(self, shard, full):
            events.append("gather")
            return super()._all_gather(shard, full)

    model = Stack()
    zero = Zero(model, model.layers, Told(), stage)
    for i, unit in enumerate(zero.units):
        def bring(dy, i=i, receive=unit.buckets[0].tensors[0].on_grad):
            events.append(i)
            receive(dy)
        unit.buckets[0].tensors[0].on_grad = bring
    events.clear()
    with zero.micro_batch():
        model(Tensor(np.ones((2, 32), np.float32))).sum().backward()
    plain = [2, "reduce", 1, "reduce", 0, "reduce"]
    assert [e for e in events if e != "gather"] == plain
    if stage == 3:  # 3 on the way there, each prefetched; then 2 again, and 1 while 2 goes back
        assert events == ["gather"] * 5 + [2, "reduce", "gather"] + plain[2:]


class Late(Threads):
    """Parameters are not there before they are waited for. Until then nobody may touch them."""

    events = None  # told if it is a list; `zero` knows whose parameters they are

    def __init__(self, *args):
        super().__init__(*args)
        self.pending = []

    def _all_gather(self, shard, full):
        assert not any(np.may_share_memory(shard, other) for other in self.pending)
        if "parameters" not in self.said:
            return super()._all_gather(shard, full)
        self.pending.append(full)
        self.tell("begin", full)
        return Request(self, super()._all_gather, shard, full)

    def tell(self, event, full):
        if self.events is not None:
            (number,) = (u.number for u in (*self.zero.units, self.zero.root)
                         if any(b.whole is full for b in u.buckets))
            self.events.append(f"{event} {number}")


class Request:
    def __init__(self, comm, call, shard, full):
        self.comm, self.call, self.shard, self.full = comm, call, shard, full
        self.before = shard.copy()

    def Test(self):
        return False

    def Wait(self):
        assert (self.shard == self.before).all(), "it was touched while it travelled"
        self.comm.pending = [a for a in self.comm.pending if a is not self.full]
        self.comm.tell("wait", self.full)
        self.call(self.shard, self.full)


@STAGES
@pytest.mark.parametrize("kind", [{}, {"tied": True, "every": 1}, {"dtype": "bfloat16"},
                                  {"lora": True}], ids=str)
def test_nobody_reads_parameters_that_are_under_way(stage, kind, monkeypatch):
    monkeypatch.setattr(comms, "Threads", Late)
    expected, losses, _ = alone(4, **kind)
    for found in ranks(2, lambda comm: trained(comm, stage, 4, **kind)):
        same(found[0], expected)
        assert found[1] == losses


@pytest.mark.parametrize("stage, expected", [
    (1, "wait -1, wait 0, run 0, wait 1, run 1, wait 2, run 2, back 2, back 1, back 0, "
        "begin -1, begin 0, begin 1, begin 2"),
    (2, "wait -1, wait 0, run 0, wait 1, run 1, wait 2, run 2, back 2, back 1, back 0, "
        "begin -1, begin 0, begin 1, begin 2"),
    (3, "begin -1, wait -1, begin 0, wait 0, begin 1, run 0, wait 1, begin 2, run 1, wait 2, "
        "run 2, begin 2, wait 2, begin 1, back 2, wait 1, begin 0, back 1, wait 0, back 0"),
])
def test_parameters_travel_while_other_units_run(stage, expected, monkeypatch):
    """The second step. Stages 1 and 2: all are under way, each is waited for when it runs. Stage 3:
    the next one is under way."""
    monkeypatch.setattr(comms, "Threads", Late)

    def run(comm):
        model, comm.events = Stack(layers=4), []
        for i, layer in enumerate(model.layers[:3]):
            def forward(x, i=i, forward=layer.forward):
                comm.events.append(f"run {i}")
                return forward(x)
            layer.forward = forward
        comm.zero = zero = Zero(model, model.layers[:3], comm, stage)
        for i, unit in enumerate(zero.units):
            def bring(dy, i=i, receive=unit.buckets[0].tensors[0].on_grad):
                comm.events.append(f"back {i}")
                receive(dy)
            unit.buckets[0].tensors[0].on_grad = bring
        for _ in range(2):
            del comm.events[: -4 if stage < 3 else None]
            with zero.micro_batch():
                model(Tensor(np.ones((2, 32), np.float32))).sum().backward()
            zero.step()
        if stage < 3:  # what the first step has begun
            assert comm.events[:4] == ["begin -1", "begin 0", "begin 1", "begin 2"]
            del comm.events[:4]
        return ", ".join(comm.events)

    assert ranks(2, run) == [expected] * 2


@STAGES
def test_what_is_asked_while_parameters_travel_is_right(stage, monkeypatch):
    """States, bytes held, putting back, and a step in which a unit was not run."""
    def run(comm):
        zero, held, _ = stacked(comm, stage)
        first = {name: a.copy() for name, a in zero.states()}
        model = Stack()
        zero = Zero(model, model.layers, comm, stage)
        zero.put_back(first, steps=2)
        zero.put_back(first, steps=2)
        x = Tensor(np.ones((2, 32), np.float32))
        for _ in range(3):
            with zero.micro_batch():
                model.layers[1](model.layers[0](x)).sum().backward()
            zero.step()
        with zero.gathered():
            return held, first, parameters(model), dict(zero.states())

    expected = ranks(2, run)
    monkeypatch.setattr(comms, "Threads", Late)
    for found, others in zip(ranks(2, run), expected):
        assert found[0] == others[0]
        for mine, theirs in zip(found[1:], others[1:]):
            same(mine, theirs)


def test_memory_that_is_given_back_is_read_nowhere():
    """Between forward and backward the numbers are gone: who read them then would read zeros."""
    model = Stack()
    zero = Zero(model, model.layers, Local(), stage=3)
    x = Tensor(np.ones((2, 32), np.float32))
    with zero.micro_batch():
        with no_grad():
            model(x)
        y = model(x)
        assert not any(layer.weight.data.any() for layer in model.layers)
        y.sum().backward()
        assert model.layers[0].weight.data.any()
    assert not model.layers[0].weight.data.any()
    with zero.gathered():
        assert all(layer.weight.data.any() for layer in model.layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n, stage, then", [(2, 3, 1), (1, 0, 4), (3, 1, 2), (4, 2, 3)])
def test_another_number_of_ranks_goes_on(dtype, n, stage, then):
    """In another stage too: the same bits as without a break."""
    def steps(zero, model, comm, numbers):
        for i in numbers:
            for k in range(comm.rank, 12, comm.size):  # 12 micro-batches for any n
                x = np.random.default_rng((i, k)).standard_normal((2, 32)).astype(np.float32)
                with zero.micro_batch(last=k + comm.size >= 12):
                    (model(Tensor(x.astype(dtype))).sum() * (1 / 12)).backward()
            zero.step()

    def begun(comm, stage):
        model = Stack(dtype=np.dtype(dtype))
        return model, Zero(model, model.layers, comm, stage, lr=LR)

    def first(comm):
        model, zero = begun(comm, stage)
        steps(zero, model, comm, range(2))
        saved = {name: a.copy() for name, a in zero.states()}
        steps(zero, model, comm, range(2, 4))
        with zero.gathered():
            return saved, parameters(model)

    def second(comm):
        model, zero = begun(comm, 3 - stage)
        zero.put_back(saved, steps=2)
        steps(zero, model, comm, range(2, 4))
        with zero.gathered():
            return parameters(model)

    saved, expected = ranks(n, first)[-1]
    for found in ranks(then, second):
        same(found, expected)
    with pytest.raises(ValueError, match="other units"):
        begun(Local(), 0)[1].put_back({"0.m": saved["0.m"]}, steps=2)
    with pytest.raises(ValueError, match="must be as long"):
        begun(Local(), 0)[1].put_back(saved | {"0.m": saved["0.m"][1:]}, steps=2)


@STAGES
def test_an_error_names_the_step(stage):
    def run(comm):
        zero = stacked(comm, stage)[0]
        with zero.micro_batch():
            if comm.rank == 1:
                raise ZeroDivisionError
            comm.barrier()

    with pytest.raises(ZeroDivisionError, match="on rank 1 of 2, in step 3, after call"):
        ranks(2, run)


def test_misuse_is_refused():
    model = Stack()
    with pytest.raises(ValueError, match="twice"):
        Zero(model, [model.layers[0], model.layers[0]], Local())
    with pytest.raises(ValueError, match="none of the model's"):
        Zero(model, Stack().layers, Local())
    with pytest.raises(ValueError, match="stages"):
        Zero(model, [], Local(), stage=4)
    with pytest.raises(ValueError, match="nothing of the model trains"):
        Zero(Stack().freeze(), [], Local())
    zero = Zero(model, model.layers, Local(), stage=2)
    with pytest.raises(RuntimeError, match="micro_batch"):
        zero.step()
    with pytest.raises(RuntimeError, match="micro_batch"):
        model(Tensor(np.ones((2, 32), np.float32))).sum().backward()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
       st.data())
def test_the_norm_does_not_depend_on_the_split(numbers, data):
    x = np.array(numbers, np.float32)
    cut = data.draw(st.integers(0, x.size))
    order = np.random.default_rng(cut).permutation(x.size)
    whole, parts = exact_squares(x), sum(map(exact_squares, np.split(x[order], [cut])))
    assert norm_of(whole) == norm_of(parts)
    largest = float(np.abs(x.astype(np.float64)).max()) or 1.0
    scaled = np.linalg.norm(x.astype(np.float64) / largest) * largest
    assert norm_of(whole) == pytest.approx(scaled, rel=1e-12)


def test_a_norm_of_what_is_not_finite_is_none():
    assert np.isnan(norm_of(exact_squares(np.array([1, np.inf], np.float32))))


def test_a_norm_in_blocks_is_that_of_the_whole(monkeypatch):
    x = np.random.default_rng(0).standard_normal(11, np.float32)
    bad = np.where(np.arange(11) % 4 == 3, np.inf, x).astype(np.float32)
    whole = exact_squares(x)
    monkeypatch.setattr("minilm.parallel.norm.BLOCK", 4)
    assert np.array_equal(exact_squares(x), whole)
    assert exact_squares(bad)[-1] == 2
