"""The losses of minilm.distill: values and gradients against PyTorch's composition; the laws of KL:
nothing between a model and itself, T^2, masks, parts of a batch; and what is refused.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close
from hypothesis import assume, given
from hypothesis import strategies as st

from minilm import ops
from minilm.distill import TopK, distillation_loss, top_k, top_k_divergence
from minilm.tensor import Tensor

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 12))  # B, T, V
temperatures = st.floats(0.3, 10)
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
SOFT = (1.0, 0.0, 0.0)


def leaf(array):
    return Tensor(array, requires_grad=True)


def draw(seed, shape, dtype="float64", size=2.0):
    """Logits of a student and a teacher, targets of which some are -100, a mask: one token has
    both."""
    rng, lead = np.random.default_rng(seed), shape[:-1]
    logits = (size * rng.standard_normal((2, *shape))).astype(dtype)
    targets = np.where(rng.random(lead) < 0.4, -100, rng.integers(0, shape[-1], lead))
    mask = rng.integers(0, 2, lead)
    targets[-1, -1], mask[-1, -1] = 0, 1
    return *logits, targets, mask


def run(student, *args, **settings):
    """The loss and its gradient in the student's logits."""
    z = leaf(student)
    loss = distillation_loss(z, *args, **settings)
    loss.backward()
    return loss.data, z.grad


# PyTorch's


def pytorchs(student, teacher, targets, T, weights, hidden, mask, masked_only, reverse):
    """The composition in float64: the loss, gradients in student logits and hidden states."""
    z, v = torch.tensor(student).double().requires_grad_(), torch.tensor(teacher).double()
    ours, theirs = (torch.tensor(h).double() for h in hidden)
    tokens = torch.tensor(mask) == 1
    t = torch.where(tokens, torch.tensor(targets), -100)
    ours.requires_grad_()
    rows = t != -100 if masked_only else tokens
    log_q, log_p = (F.log_softmax(x[rows] / T, -1) for x in (z, v))
    pair = (log_p, log_q) if reverse else (log_q, log_p)  # F.kl_div(a, b) is KL(b || a)
    losses = [T**2 * F.kl_div(*pair, reduction="batchmean", log_target=True),
              F.cross_entropy(z.flatten(0, 1), t.flatten(), ignore_index=-100),
              F.cosine_embedding_loss(ours[tokens], theirs[tokens], torch.ones(int(tokens.sum())))]
    loss = sum(w * x for w, x in zip(weights, losses))
    loss.backward()
    return loss.item(), z.grad.numpy(), ours.grad.numpy()


@dtypes
@given(seed=seeds, shape=sizes, T=temperatures, C=st.integers(2, 7), masked_only=st.booleans(),
       weights=st.tuples(*[st.sampled_from([0.0, 0.33, 1.0, 5.0])] * 3), reverse=st.booleans(),
       padded=st.booleans())
def test_value_and_gradients_are_pytorchs(dtype, seed, shape, T, C, masked_only, weights, reverse,
                                          padded):
    assume(sum(weights))
    student, teacher, targets, mask = draw(seed, shape, dtype)
    mask = mask if padded else np.ones_like(mask)
    hidden = np.random.default_rng(seed).standard_normal((2, *shape[:2], C)).astype(dtype)
    expected, dlogits, dours = pytorchs(student, teacher, targets, T, weights, hidden, mask,
                                        masked_only, reverse)
    z, ours, theirs = leaf(student), leaf(hidden[0]), leaf(hidden[1])
    loss = distillation_loss(z, teacher, targets, T, weights, (ours, theirs),
                             mask if padded else None, masked_only, reverse)
    loss.backward()
    size = max(1, T) * sum(weights)  # of what cancels, where T is large
    assert loss.shape == () and loss.dtype == dtype and theirs.grad is None
    close(loss.data, expected, dtype, size * max(1, T))
    for found, gradient in [(z.grad, dlogits), (ours.grad, dours)]:
        close(np.zeros_like(gradient) if found is None else found, gradient, dtype, size)
        assert found is None or found.dtype == dtype


@dtypes
def test_default_weights_are_5_2_1_at_t_2_over_all_tokens(dtype):
    student, teacher, targets, mask = draw(3, (3, 4, 11), dtype)
    hidden, everywhere = np.random.default_rng(0).standard_normal((2, 3, 4, 5)), np.ones_like(mask)
    settings = targets, 2.0, (5, 2, 1), hidden, everywhere, False, False
    expected = pytorchs(student, teacher, *settings)
    loss = distillation_loss(leaf(student), Tensor(teacher), targets, hidden=tuple(hidden))
    close(loss.data, expected[0], dtype)
    without = distillation_loss(leaf(student), teacher, targets)  # no hidden states, no cosine
    settings = targets, 2.0, (5, 2, 0), hidden, everywhere, False, False
    close(without.data, pytorchs(student, teacher, *settings)[0], dtype)


def test_rows_are_those_of_distilberts_code():
    """KL is per token that is no padding, or per masked token; the cosine loss per token that is no
    padding, in both cases; cross-entropy per target. Targets of padding do not count."""
    student, teacher, targets, mask = draw(0, (2, 3, 5))
    targets[:], mask[:] = [[1, -100, -100], [-100, 4, 2]], [[1, 1, 1], [1, 1, 0]]
    hidden = 100 * np.random.default_rng(1).standard_normal((2, 2, 3, 4))  # 1e-12 is nothing
    log_q, log_p = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (student, teacher))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    lengths = np.linalg.norm(hidden, axis=-1)
    cosine = 1 - (hidden[0] * hidden[1]).sum(-1) / lengths[0] / lengths[1]

    def loss(weights, masked_only):
        return distillation_loss(leaf(student), teacher, targets, 1.0, weights,
                                 tuple(map(leaf, hidden)), mask, masked_only).data

    close(loss(SOFT, False), kl[mask == 1].sum() / 5, "float64")
    close(loss(SOFT, True), kl[(targets != -100) & (mask == 1)].sum() / 2, "float64")
    for masked_only in (False, True):
        close(loss((0, 0, 1), masked_only), cosine[mask == 1].sum() / 5, "float64", 1.0)
        close(loss((0, 1, 0), masked_only), -(log_q[0, 0, 1] + log_q[1, 1, 4]) / 2, "float64")


# Laws


@given(seed=seeds, shape=sizes, T=temperatures, size=st.floats(0, 50), reverse=st.booleans(),
       dtype=st.sampled_from(["float32", "float16", "float64"]))
def test_a_student_that_is_its_teacher_has_nothing_to_learn(seed, shape, T, size, reverse, dtype):
    z, _, targets, _ = draw(seed, shape, dtype, size)
    loss, dz = run(z, z.copy(), targets, T, SOFT, reverse=reverse)
    assert loss == 0 and not dz.any()


@given(seed=seeds, shape=sizes, T=temperatures, size=st.floats(0, 50), reverse=st.booleans())
def test_kl_is_not_negative(seed, shape, T, size, reverse):
    student, teacher, targets, _ = draw(seed, shape, "float32", size)
    nearly = teacher + student * np.float32(1e-3)
    for z in (student, nearly):
        loss = run(z, teacher, targets, T, SOFT, reverse=reverse)[0]
        assert loss >= -1e-5 * T**2


@given(seed=seeds, shape=sizes, size=st.floats(1e-4, 0.03))
def test_t_squared_keeps_the_gradients_size_where_logits_are_small(seed, shape, size):
    """Hinton et al., eq. (4): T^2 dC/dz_i -> (z_i - v_i) / N, both with mean 0 over the N tokens,
    where |z| and |v| are small beside T. Without T^2 it would be 64 times smaller at T = 8."""
    student, teacher, targets, _ = draw(seed, shape, size=size)
    gap = student - teacher
    limit = (gap - gap.mean(-1, keepdims=True)) / gap.shape[-1] / targets.size
    # Second order: a variance of the logits, which |z| <= 0.1 makes small beside the first.
    assume(abs(np.stack([student, teacher])).max() < 0.1)
    norms = []
    for T in (1, 1.5, 2, 4, 8):
        dz = run(student, teacher, targets, T, SOFT)[1]
        beyond = 0.4 / T * abs(gap - gap.mean(-1, keepdims=True)).max() / gap.shape[-1]
        assert abs(dz - limit).max() < beyond / targets.size
        norms.append(np.linalg.norm(dz) / np.linalg.norm(limit))
    assert max(norms) < 1.1 * min(norms) and abs(norms[-1] - 1) < 0.05


@given(seed=seeds, shape=sizes, T=temperatures)
def test_forward_kl_is_soft_cross_entropy_but_for_a_constant(seed, shape, T):
    student, teacher, targets, mask = draw(seed, shape)
    loss, dz = run(student, teacher, targets, T, SOFT, mask=mask)
    z, p = leaf(student), ops.softmax(teacher / T).data * mask[..., None] / mask.sum()
    soft = (ops.log_softmax(z / T) * p).sum() * -T * T
    soft.backward()
    close(dz, z.grad, "float64", T)
    p = ops.softmax(teacher / T).data
    entropy = -((p * np.log(p)).sum(-1) * mask).sum() / mask.sum()
    close(loss, soft.data - T * T * entropy, "float64", 5 * T * T)


@given(seed=seeds, shape=sizes, T=temperatures)
def test_reverse_is_the_forward_kl_of_exchanged_arguments(seed, shape, T):
    student, teacher, targets, mask = draw(seed, shape, "float32")
    forward, back = leaf(student), leaf(teacher)
    both = ops.kl_divergence(forward, back, temperature=T, mask=mask)
    both.backward()
    loss, dv = run(teacher, student, targets, T, SOFT, mask=mask, reverse=True)
    close(loss, both.data * T**2, "float32", 5 * T**2)
    close(dv, back.grad * T**2, "float32", 5 * T)
    loss, dz = run(student, teacher, targets, T, SOFT, mask=mask)
    close(loss, both.data * T**2, "float32", 5 * T**2)
    close(dz, forward.grad * T**2, "float32", 5 * T)


@given(seed=seeds, B=st.integers(2, 6), data=st.data(), masked_only=st.booleans(),
       reverse=st.booleans(), k=st.one_of(st.none(), st.integers(1, 7)))
def test_parts_add_up_to_the_whole(seed, B, data, masked_only, reverse, k):
    """With the whole batch's numbers of tokens and of targets; a part may have none of them."""
    student, teacher, targets, mask = draw(seed, (B, 3, 7))
    cut = data.draw(st.integers(1, B - 1))
    mask[:cut], targets[:cut] = data.draw(st.integers(0, 1)), data.draw(st.sampled_from([-100, 3]))
    hidden, totals = np.random.default_rng(seed).standard_normal((2, B, 3, 4)), None
    if not mask.any():
        return

    def part(rows, totals=None):
        z, ours, answers = leaf(student[rows]), leaf(hidden[0, rows]), teacher[rows]
        answers = answers if k is None else top_k(answers, k, 3.0)
        loss = distillation_loss(z, answers, targets[rows], 3.0, (5, 2, 1),
                                 (ours, hidden[1, rows]), mask[rows], masked_only,
                                 reverse and k is None, totals)
        loss.backward()
        return loss.data, z.grad, ours.grad

    whole = part(slice(None))
    totals = int(mask.sum()), int(((targets != -100) & (mask == 1)).sum())
    first, second = part(slice(cut), totals), part(slice(cut, None), totals)
    close(first[0] + second[0], whole[0], "float64")
    for i in (1, 2):
        close(np.concatenate([first[i], second[i]]), whole[i], "float64", 1.0)


@given(seed=seeds, shape=sizes, extra=st.integers(1, 3), reverse=st.booleans(),
       masked_only=st.booleans(), k=st.sampled_from([None, 1, 2]))
def test_padding_changes_nothing(seed, shape, extra, reverse, masked_only, k):
    student, teacher, targets, mask = draw(seed, shape)
    rng, lead = np.random.default_rng(seed), (shape[0], extra)
    hidden = rng.standard_normal((2, *shape[:2], 4))

    def loss(student, teacher, targets, hidden, mask):
        z, ours = leaf(student), leaf(hidden[0])
        answers = teacher if k is None else top_k(teacher, k)
        loss = distillation_loss(z, answers, targets, hidden=(ours, hidden[1]), mask=mask,
                                 masked_only=masked_only, reverse=reverse and k is None)
        loss.backward()
        return loss.data, z.grad, ours.grad

    def padded(x, value):
        return np.concatenate([x, value], axis=-1 if x.ndim == 2 else -2)

    plain = loss(student, teacher, targets, hidden, mask)
    longer = loss(*(padded(z, 9 * rng.standard_normal((*lead, shape[-1])))
                    for z in (student, teacher)), padded(targets, np.full(lead, -100)),
                  [padded(h, 9 * rng.standard_normal((*lead, 4))) for h in hidden],
                  padded(mask, np.zeros(lead, int)))
    for found, expected in zip(longer, plain):
        if expected.ndim:
            assert not found[:, shape[1]:].any()
            found = found[:, : shape[1]]
        close(found, expected, "float64", 1.0)
    assert not plain[2][mask == 0].any()
    assert not plain[1][(mask == 0) & (targets == -100)].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_flows_back_to_the_teacher(reverse):
    student, teacher, targets, _ = draw(0, (2, 3, 5))
    v, h = leaf(teacher), leaf(np.ones((2, 3, 4)))
    z, ours = leaf(student), leaf(np.random.default_rng(0).standard_normal((2, 3, 4)))
    distillation_loss(z, v * 2.0, targets, hidden=(ours, h * 3.0), reverse=reverse).backward()
    assert v.grad is None and h.grad is None and z.grad.any() and ours.grad.any()
    assert top_k(v, 2).log_p.shape == (2, 3, 2)


# What is refused


Z, T34 = np.zeros((3, 4, 5), np.float32), np.zeros((3, 4), int)
ANSWERS = top_k(Z, 2)


@pytest.mark.parametrize("wrong, message", [
    (dict(targets=T34[:, :3]), r"targets \(3, 3\) do not go with logits \(3, 4, 5\)"),
    (dict(targets=T34[0]), r"targets \(4,\) do not go with logits \(3, 4, 5\)"),
    (dict(teacher_logits=Z[..., :4]), r"student \(3, 4, 5\), teacher \(3, 4, 4\)"),
    (dict(teacher_logits=Z[:1]), r"student \(3, 4, 5\), teacher \(1, 4, 5\)"),
    (dict(teacher_logits=Z[:1], reverse=True), r"student \(1, 4, 5\), teacher \(3, 4, 5\)"),
    (dict(hidden=(Z, Z[..., :4])), r"x \(3, 4, 5\), y \(3, 4, 4\)"),
    (dict(mask=T34[:2]), r"mask \(2, 4\) does not go with rows \(3, 4\)"),
    (dict(mask=T34), "no row counts"),
    (dict(targets=T34 - 100, masked_only=True), "no row counts"),
    (dict(temperature=0), "temperature must be positive and finite, got 0"),
    (dict(temperature=-1.5), "temperature must be positive and finite, got -1.5"),
    (dict(temperature=np.nan), "temperature must be positive and finite, got nan"),
    (dict(temperature=np.inf), "temperature must be positive and finite, got inf"),
    (dict(weights=(0, 0, 0)), r"three numbers.*not all 0.*got \(0, 0, 0\)"),
    (dict(weights=(1, -2, 3)), "weights must be finite and at least 0, got -2"),
    (dict(weights=(1, np.nan, 3)), "weights must be finite and at least 0, got nan"),
    (dict(weights=(np.inf, 1, 3)), "weights must be finite and at least 0, got inf"),
    (dict(weights=(1, 2)), r"three numbers.*got \(1, 2\)"),
    (dict(weights=(0, 0, 1)), r"weights \(0, 0, 1\) leave only the cosine loss.*no hidden"),
    (dict(teacher_logits=ANSWERS, reverse=True), "reverse KL needs all.*not its top k"),
    (dict(teacher_logits=TopK(ANSWERS.ids[..., :1], ANSWERS.log_p)),
     r"ids \(3, 4, 1\) and log_p \(3, 4, 2\) do not go with logits \(3, 4, 5\)"),
    (dict(teacher_logits=TopK(ANSWERS.ids[:2], ANSWERS.log_p[:2])), r"\(2, 4, 2\).*\(3, 4, 5\)"),
])
def test_bad_input(wrong, message):
    arguments = dict(teacher_logits=Z, targets=T34) | wrong
    with pytest.raises(ValueError, match=message):
        distillation_loss(leaf(Z), **arguments)


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "targets"])
@pytest.mark.parametrize("other", [None, [[1, 2]]])
def test_what_is_no_array_is_named(name, other):
    arguments = {"student_logits": leaf(Z), "teacher_logits": Z, "targets": T34}
    with pytest.raises(TypeError, match=f"^{name} must be an array, got {type(other).__name__}$"):
        distillation_loss(**arguments | {name: other})


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_top_k_and_divergence_have_a_temperature_that_is_a_number(temperature):
    with pytest.raises(ValueError, match=r"^temperature must be positive and finite, got "):
        top_k(Z, 2, temperature)
    with pytest.raises(ValueError, match=r"^temperature must be positive and finite, got "):
        ops.kl_divergence(leaf(Z), Z, temperature=temperature)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_is_1_to_the_number_of_tokens(k):
    with pytest.raises(ValueError, match=f"k must be 1 to 5, got {k}"):
        top_k(Z, k)


def test_top_k_divergence_has_a_mask_too():
    with pytest.raises(ValueError, match=r"top_k_divergence: mask \(2, 4\).*rows \(3, 4\)"):
        top_k_divergence(leaf(Z), *ANSWERS, mask=T34[:2])
