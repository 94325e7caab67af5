"""minilm.peft.prompt: rows of real tokens act as these tokens, for every family; rows at the start;
how many numbers there are, GPT-3's too. What prompts share with prefixes is in test_front.py."""

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.peft import add_prompt
from minilm.peft.adapted import insert_adapters
from minilm.peft.prompt import Prompt
from minilm.peft.retrained import Retrained, with_tensors
from minilm.tensor import Tensor, no_grad
from minilm.transformer import Config, Transformer

V, C, CONTEXT = 19, 16, 12
SIZES = dict(vocab_size=V, context=CONTEXT, layers=2, heads=2, width=C)
CONFIGS = {"gpt2": Config.gpt2(**SIZES), "llama": Config.llama(**SIZES, hidden=24, kv_heads=1),
           "gemma": Config.llama(**SIZES, hidden=24, kv_heads=1, norm_plus_one=True,
                                 scaled_embedding=True, activation="geglu_tanh"),
           "bert": Config.bert(**SIZES, hidden=24)}
families = pytest.mark.parametrize("family", CONFIGS)


def make(family, dtype="float64"):
    model, rng = Transformer(CONFIGS[family]), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += 0.3 * rng.standard_normal(t.shape, dtype=np.float32)
    return model.astype(dtype).eval()


def rows(model):
    return model.front.adapters["default"].P.data


@families
@given(seed=st.integers(0, 999), p=st.integers(1, 5), T=st.integers(1, 6), B=st.integers(1, 3))
def test_rows_of_real_tokens_are_these_tokens(family, seed, p, T, B):
    """Positions, factors and norms are a token's."""
    rng, model, plain = np.random.default_rng(seed), make(family), make(family)
    ids, text = rng.integers(0, V, p), rng.integers(0, V, (B, T))
    add_prompt(model, ids=ids)
    whole = np.concatenate([np.tile(ids, (B, 1)), text], axis=1)
    with no_grad():
        expected = plain(whole).data[:, p:]
    close(model(text).data, expected, "float64")


@given(seed=st.integers(0, 999), p=st.integers(1, 5))
def test_their_gradient_is_that_of_the_tables_rows(seed, p):
    """For a head that is not tied, and tokens that are not in the text too."""
    rng, model, plain = np.random.default_rng(seed), make("llama"), make("llama")
    ids, text, targets = rng.permutation(9)[:p], *rng.integers(9, V, (2, 3, 5))
    ops.cross_entropy(add_prompt(model, ids=ids)(text), targets).backward()
    whole = np.concatenate([np.tile(ids, (3, 1)), text], axis=1)
    ops.cross_entropy(plain(whole)[:, p:], targets).backward()
    P, = model.parameters()
    close(P.grad, plain.embed.weight.grad[ids], "float64")


@families
def test_the_batchs_rows_are_one_prompt(family):
    """Its gradient is the sum over the batch."""
    model, rng = add_prompt(make(family), 3), np.random.default_rng(0)
    P, = model.parameters()
    text, targets = rng.integers(0, V, (2, 4, 5))
    def gradient(part):
        P.grad = None
        ops.cross_entropy(model(text[part]), targets[part], total=20).backward()
        return P.grad
    whole = gradient(slice(4))
    close(sum(gradient(slice(i, i + 1)) for i in range(4)), whole, "float64")


@given(p=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_ids_are_repeated_or_cut(p, n, seed):
    ids = np.random.default_rng(seed).integers(0, V, n)
    model = make("gpt2")
    table = model.embed.weight.data
    assert np.array_equal(rows(add_prompt(model, p, ids)), table[np.tile(ids, 9)[:p]])
    assert np.array_equal(rows(add_prompt(make("gpt2"), ids=[*ids])), table[ids])
    assert np.array_equal(rows(add_prompt(make("gemma"), ids=ids)),
                          4 * make("gemma").embed.weight.data[ids])  # times sqrt(C)


def test_the_rows_are_those_of_the_table_that_acts():
    """And a copy: training them leaves the table as it is."""
    model = make("llama")
    table = with_tensors(model.embed, weight=Tensor(model.embed.weight.data * 2))
    insert_adapters(model, "default", {"embed": Retrained(table)})
    add_prompt(model, ids=[3, 4])
    assert np.array_equal(rows(model), table.weight.data[[3, 4]])
    rows(model)[...] = 0
    assert table.weight.data[[3, 4]].all()


@given(seed=st.integers(0, 999))
def test_random_rows_have_the_tables_size(seed):
    model = make("llama", "float32")
    one, two = (rows(add_prompt(make("llama", "float32"), 11, seed=s)) for s in (seed, seed))
    assert np.array_equal(one, two) and one.dtype == np.float32
    assert (rows(add_prompt(make("llama"), 11, seed=seed + 1)) != one).all()
    assert one.std() == pytest.approx(model.embed.weight.data.std(), rel=0.3)
    large = rows(add_prompt(make("gemma", "float32"), 11, seed=seed))
    assert large.std() == pytest.approx(4 * model.embed.weight.data.std(), rel=0.3)


@pytest.mark.parametrize("ids, text", [
    ([], r"ids must be integers \(p,\), got float64 \(0,\)"), ([[1]], r"got int64 \(1, 1\)"),
    ([1.0], r"got float64 \(1,\)"), ([V], "ids from 19 to 19, but the table has 19 rows"),
    ([-1], "ids from -1 to -1"), (range(CONTEXT), "must be 1 to 11")])
def test_ids_that_are_refused(ids, text):
    model = make("gpt2")
    with pytest.raises(ValueError, match=text):
        add_prompt(model, ids=ids)
    assert len(model.parameters()) == len([*model.named_tensors()])


def test_how_many_numbers():
    """p C; GPT-3's 3.2M (LoRA, table 4) are l_p + l_i = 256 + 8 rows of 12,288."""
    assert sum(p.size for p in add_prompt(make("bert"), 5).parameters()) == 5 * C
    assert Prompt(np.zeros((256 + 8, 12288), np.float32)).P.size == 3_244_032
    for wrong in (np.zeros(3), np.zeros((0, 3))):
        with pytest.raises(ValueError, match=r"P must be \(p, C\)"):
            Prompt(wrong)
