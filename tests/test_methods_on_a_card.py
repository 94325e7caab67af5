"""All methods of adaptation on a card, real or emulated: the numbers of the CPU, in 32 bits and in
16, on plain and quantized bases, beside and merged; and a budget there."""

import numpy as np
import pytest
from conftest import close, counted_launches
from test_cuda_path import TOKENS, on_cpu, pair, same, same_dropout, same_parameters, trained
from test_methods import MERGES, METHODS

from minilm.optim import AdamW
from minilm.peft import Budget, add_adalora, merge_lora
from minilm.peft.adalora import acting, orthogonality
from minilm.quantize import quantize_model
from minilm.tensor import no_grad
from minilm.transformer import drop_attention

__all__ = ["same_dropout"]  # a fixture
pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["plain", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step(cupy, method, base, dtype):
    cpu, gpu = pair("gpt2", dtype=dtype)
    for model in (cpu, gpu):
        METHODS[method](model if base == "plain" else quantize_model(model, base))
    for a, b in zip(gpu.state_dict().values(), cpu.state_dict().values(), strict=True):
        close(on_cpu(a), on_cpu(b), dtype)
    close(trained(gpu)[0], trained(cpu)[0], dtype)
    same_parameters(gpu, cpu, dtype)
    if method in MERGES and dtype == "float32":
        with no_grad():
            same(merge_lora(gpu.eval())(TOKENS).data, merge_lora(cpu.eval())(TOKENS).data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_budget(cupy, dtype):
    kept = []
    for model in pair("gpt2", dtype=dtype):
        add_adalora(model.eval(), 3, 6)
        rng, xp = np.random.default_rng(0), cupy if len(kept) else np
        for p in model.parameters():
            p.data += xp.asarray(0.3 * rng.standard_normal(p.shape)).astype(p.dtype)
        optimizer = AdamW(model.parameters(), 0.0)
        budget = Budget(model, optimizer, last=1, steps=3, final=1)
        (model(TOKENS).sum() + orthogonality(model)).backward()
        optimizer.step()
        budget.Ubar += xp.asarray(rng.random(budget.Ubar.shape)).astype(budget.Ubar.dtype)
        assert budget.step(1) == budget.at(1) < budget.first
        kept.append(np.concatenate(budget.kept))
        lams = np.concatenate([on_cpu(a.lam.data)[:, 0] for a in acting(model)])
        assert np.array_equal(lams != 0, kept[-1])
    if dtype == "float32":
        assert np.array_equal(*kept)


@pytest.mark.parametrize("family", ["gpt2", "scaled"])  # a head of 16 has a kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_dropout(cupy, family, dtype):
    """The kernel of attention has none, so bfloat16 goes without it; the card draws the dropout."""
    cpu, gpu = pair(family, lambda model: drop_attention(model, 0.3), dtype)
    with counted_launches() as count:
        found = trained(gpu, steps=1)[0]
    assert count["dropout"] >= 2 and count["attention_dq"] == 0
    close(found, trained(cpu, steps=1)[0], dtype)
    same_parameters(gpu, cpu, dtype)
