"""minilm.nn.Module as a tree: children in attributes, lists and dicts, by path, swapped, in another
dtype; and a Linear made of given tensors. What a whole model does with it is in test_transformer.
"""

import ml_dtypes
import numpy as np
import pytest

from minilm import ops
from minilm.nn import Linear, Module
from minilm.tensor import Tensor

DTYPES = ["float64", "float16", ml_dtypes.bfloat16]


class Leaf(Module):
    """x w, with w a parameter or frozen."""

    def __init__(self, value, trained=True):
        self.w = Tensor(np.array([value], np.float32), requires_grad=trained)

    def forward(self, x):
        return x * self.w


class Codes(Leaf):
    """Holds what means nothing in another dtype."""

    def astype(self, dtype):
        return self


class Tree(Module):
    """Modules wherever they can be, among values that are none."""

    def __init__(self):
        self.first, self.count, self.name = Leaf(1), 3, "tree"
        self.listed = [Leaf(2), None, Leaf(3, trained=False)]
        self.named = {"left": Leaf(4), "size": 5, "right": Leaf(6)}
        self.own = Tensor(np.ones(2, np.float32))
        self.deep = {"inner": Holder([Leaf(7)])}
        self.empty, self.none = {}, None


class Holder(Module):
    def __init__(self, modules):
        self.inside = modules


PATHS = ["first", "listed.0", "listed.2", "named.left", "named.right", "deep.inner"]


def test_numbers_that_are_not_finite_are_counted_in_pieces(monkeypatch):
    model = Holder([Leaf(1)])
    model.inside[0].w = Tensor(np.full(11, 2, np.float32), requires_grad=True)
    monkeypatch.setattr("minilm.nn.PIECE", 4)
    model.require_finite()
    model.inside[0].w.data[[0, 3, 4, 10]] = np.nan
    with pytest.raises(ValueError, match=r"inside\.0\.w: 4 of its 11 numbers are not finite"):
        model.require_finite()


def test_children_are_right_below():
    tree = Tree()
    assert [name for name, _ in tree.children()] == PATHS
    assert dict(tree.children())["listed.2"] is tree.listed[2]
    assert dict(tree.children())["named.right"] is tree.named["right"]
    assert list(Leaf(1).children()) == []


def test_paths_lead_through_lists_and_dicts():
    tree = Tree()
    modules = dict(tree.named_modules())
    assert list(modules) == ["", *PATHS, "deep.inner.inside.0"]
    assert modules[""] is tree and modules["deep.inner.inside.0"] is tree.deep["inner"].inside[0]
    assert list(tree.state_dict()) == ["own", *(f"{path}.w" for path in modules
                                                if path not in ("", "deep.inner"))]
    trained = [name for name, _ in tree.named_parameters()]
    assert trained == [f"{path}.w" for path in ("first", "listed.0", "named.left", "named.right",
                                                "deep.inner.inside.0")]
    assert not any(m.training for _, m in tree.eval().named_modules())
    assert tree.freeze().parameters() == []


@pytest.mark.parametrize("path", [*PATHS, "deep.inner.inside.0"])
def test_replace_swaps_one_module_wherever_it_is(path):
    tree, new = Tree(), Leaf(9)
    before = dict(tree.named_modules())
    tree.replace(path, new)
    after = dict(tree.named_modules())
    assert after[path] is new
    gone = {path, *(p for p in before if p.startswith(f"{path}."))}
    assert {p: m for p, m in after.items() if p not in gone} == {
        p: m for p, m in before.items() if p not in gone}
    assert tree.named["size"] == 5 and tree.listed[1] is None and len(tree.listed) == 3


@pytest.mark.parametrize("path", ["named", "named.size", "named.top", "listed.1", "listed.left",
                                  "deep.inner.inside", "empty.left", "own", "named.left.w"])
def test_replace_needs_a_module_there(path):
    tree = Tree()
    before, values = dict(tree.named_modules()), dict(tree.named)
    with pytest.raises(ValueError, match="there is no module") as error:
        tree.replace(path, Leaf(9))
    assert repr(path) in str(error.value)
    assert dict(tree.named_modules()) == before
    assert tree.named == values and tree.empty == {}


def test_state_is_loaded_through_lists_and_dicts():
    source, target = Tree(), Tree()
    for _, t in source.named_tensors():
        t.data += 10
    target.load_state_dict(source.state_dict())
    assert [t.data.tolist() for _, t in target.named_tensors()] == [
        [11, 11], [11], [12], [13], [14], [16], [17]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_astype_reaches_everything_and_asks_each_module(dtype):
    tree = Tree()
    tree.named["left"] = tree.deep["inner"].inside[0] = Codes(8)
    tree.listed[0].w = tree.first.w  # shared, and still shared afterwards
    trained, tensors = [name for name, _ in tree.named_parameters()], dict(tree.named_tensors())
    tree.first.w.grad = np.ones(1, np.float32)
    assert tree.astype(dtype) is tree
    assert [name for name, _ in tree.named_parameters()] == trained
    assert all(t is tensors[name] for name, t in tree.named_tensors())
    found = {name: t.dtype for name, t in tree.named_tensors()}
    assert found.pop("named.left.w") == np.float32  # at its first path, and at none twice
    assert set(found.values()) == {np.dtype(dtype)} and "deep.inner.inside.0.w" not in found
    assert tree.first.w.grad is None
    (tree.first(Tensor(np.ones(1, dtype)))).backward(np.ones(1, dtype))
    assert tree.first.w.grad.dtype == dtype and tree.listed[0].w.grad is tree.first.w.grad


def test_a_linear_layer_of_given_tensors():
    weight, bias = (Tensor(np.random.default_rng(0).standard_normal(s)) for s in [(3, 4), (3,)])
    x = Tensor(np.random.default_rng(1).standard_normal((2, 4)))
    layer, bare = Linear.of(weight, bias), Linear.of(weight)
    assert type(layer) is Linear and layer.weight is weight and layer.bias is bias
    assert bare.bias is None and list(bare.state_dict()) == ["weight"]
    assert layer.training and not layer.parameters()
    assert np.array_equal(layer(x).data, ops.linear(x, weight, bias).data)
    assert np.allclose(bare(x).data, x.data @ weight.data.T)
    made = Linear(4, 3, np.random.default_rng(0))
    assert list(Linear.of(made.weight, made.bias).state_dict()) == list(made.state_dict())


@pytest.mark.parametrize("state, said", [
    (None, "state must be a dict of arrays by name, got NoneType"),
    ([1], "state must be a dict of arrays by name, got list"),
    ({"weight": [[1.0, 2.0]]}, "state must hold arrays, but weight is a list"),
    ({"weight": Tensor([[1.0, 2.0]])}, "state must hold arrays, but weight is a Tensor"),
    ({"weight": np.array([["1", "2"]])}, "weight is <U1, expected float32"),
    ({"weight": np.array([[1j, 2]])}, "weight is complex128, expected float32"),
    ({"weight": np.array([[1, None]])}, "weight is object, expected float32"),
])
def test_a_state_is_a_dict_of_arrays_of_numbers(state, said):
    layer = Linear(2, 1, np.random.default_rng(0), bias=False)
    before = layer.weight.data.copy()
    with pytest.raises(TypeError, match=said):
        layer.load_state_dict(state)
    assert np.array_equal(layer.weight.data, before)


@pytest.mark.parametrize("own", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("given", ["float64", "float16", "bfloat16", "int64", "bool"])
def test_a_state_may_have_another_dtype_of_numbers(own, given):
    layer = Linear(2, 1, np.random.default_rng(0), bias=False).astype(own)
    layer.load_state_dict({"weight": np.array([[1, 0]]).astype(given)})
    assert layer.weight.dtype == own and layer.weight.data.tolist() == [[1.0, 0.0]]


def test_codes_are_not_made_of_floats():
    module = Module()
    module.codes = Tensor(np.array([3], np.uint8))
    with pytest.raises(TypeError, match="codes is float32, expected uint8"):
        module.load_state_dict({"codes": np.array([0.5], np.float32)})
