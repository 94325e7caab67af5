"""Under Adam alpha is a learning rate of B: the law that scripts/experiments/alpha.py states."""

import alpha
import numpy as np
import pytest

from minilm import ops
from minilm.nn import Linear, Module
from minilm.optim import SGD, AdamW
from minilm.peft import add_lora
from minilm.tensor import Tensor

LR = 0.01


class Two(Module):
    """Two layers with a bend between them."""

    def __init__(self, rng):
        self.first, self.second = (Linear.of(Tensor(rng.normal(size=shape)), None)
                                   for shape in ((7, 5), (4, 7)))

    def forward(self, x):
        return self.second(ops.silu(self.first(x)))


def outputs(alpha, make_optimizers, steps=8):
    """What the model says after each of a few steps, in float64."""
    rng = np.random.default_rng(0)
    model = add_lora(Two(rng), 2, alpha, ("first", "second"))
    x, target = Tensor(rng.normal(size=(6, 5))), Tensor(rng.normal(size=(6, 4)))
    named, said = dict(model.named_parameters()), []
    assert {p.data.dtype for p in named.values()} == {np.dtype(np.float64)}
    optimizers = make_optimizers([p for name, p in named.items() if name.endswith(".A")],
                                 [p for name, p in named.items() if name.endswith(".B")])
    for _ in range(steps):
        ops.mse(model(x), target).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        said.append(model(x).data.copy())
    return np.array(said)


def adam(lr_A, lr_B, eps=1e-30):
    """One AdamW for the A and one for the B, without decay: LoRA+."""
    return lambda A, B: [AdamW(A, lr_A, eps=eps, weight_decay=0.0),
                         AdamW(B, lr_B, eps=eps, weight_decay=0.0)]


@pytest.mark.parametrize("c", [0.25, 2, 4])
def test_c_times_alpha_is_c_times_the_rate_of_b(c):
    """Eq. (1) of the experiment."""
    plus = outputs(3.0, adam(LR, c * LR))
    np.testing.assert_allclose(outputs(3.0 * c, adam(LR, LR)), plus, rtol=0, atol=1e-10)
    assert abs(plus - outputs(3.0, adam(LR, LR))).max() > 1e-3  # it is not that nothing matters


def test_adams_eps_breaks_the_law_where_it_is_as_large_as_gradients():
    plus, more = outputs(3.0, adam(LR, 4 * LR, 0.1)), outputs(12.0, adam(LR, LR, 0.1))
    assert abs(plus - more).max() > 1e-3


def test_for_sgd_it_is_c_squared():
    """The gradient of B is c times that of B' = c B, so B' steps by c^2 times the rate."""
    def sgd(lr_A, lr_B): return lambda A, B: [SGD(A, lr_A), SGD(B, lr_B)]
    plus = outputs(3.0, sgd(LR, 16 * LR))
    np.testing.assert_allclose(outputs(12.0, sgd(LR, LR)), plus, rtol=0, atol=1e-10)
    assert abs(plus - outputs(3.0, sgd(LR, 4 * LR))).max() > 1e-3


def test_the_scaled_arms_undo_what_alpha_does_to_b():
    """alpha times the rate is the same in all of them, and alpha is an arm's name times r."""
    for arm, k in alpha.ALPHAS.items():
        assert alpha.ARMS[arm] == {"r": alpha.R, "alpha": alpha.R * k, "lr": alpha.LR}
    sizes = {alpha.ARMS[arm]["alpha"] * alpha.ARMS[arm]["lr"] for arm in alpha.SCALED}
    assert len(alpha.SCALED) == 5 and np.ptp(list(sizes)) < 1e-12
