"""The two sides of benchmark.py: generators that give an answer each time they are asked.

Answers are seconds: of a step, or of a text for the jobs that generate. But the first answer of
`memory` is the MiB that a step takes, and that of `parts` is the three numbers of `our_memory`.

PyTorch's side is written for speed: fused AdamW, scaled_dot_product_attention, and one product for
q, k and v unless adapters need them apart.
"""

import ctypes
import math
import time
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

CORES = 2
RANK = 8  # of LoRA, on q and v
TEXTS = 8  # that the job `batch` writes together


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and its batch."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    vocab: int
    checkpoint: bool = False  # every sqrt(layers)-th activation is kept, the rest run again

    @property
    def every(self) -> int:
        return round(math.sqrt(self.layers)) if self.checkpoint else 0

    def tokens(self):
        """Random (tokens, targets), (B, T) each."""
        rng = np.random.default_rng(0)
        drawn = rng.integers(0, self.vocab, (self.batch, self.context + 1))
        return drawn[:, :-1].copy(), drawn[:, 1:].copy()


SHAPES = {"S": Shape(4, 4, 128, 64, 12, 256), "M": Shape(6, 6, 384, 256, 8, 512),
          "L": Shape(12, 12, 768, 256, 2, 4096),
          "nanoGPT": Shape(4, 4, 128, 64, 12, 67)}  # its recipe for a CPU


def draw(tokens):
    """The first 63 tokens of a stream."""
    for _ in zip(range(63), tokens):
        pass


def timed(step, at_least=0.25):
    """Yield the mean seconds of a call, again and again, over calls that fill `at_least` seconds.
    """
    start, count = time.perf_counter(), 0
    while True:
        step()
        count += 1
        if (seconds := time.perf_counter() - start) >= at_least:
            yield seconds / count
            start, count = time.perf_counter(), 0


def our_config(shape):
    """The Config of the GPT-2 that all sides train."""
    from minilm.transformer import Config

    s = shape
    return Config.gpt2(s.vocab, s.context, s.layers, s.heads, s.width)


def our_side(job, shape, threads):
    """Answers of this project."""
    from minilm.backend import tune_allocator
    from minilm.generate import stream
    from minilm.peft import add_lora
    from minilm.quantize import quantize_model
    from minilm.transformer import Transformer

    model = Transformer(our_config(shape))
    if job == "qlora":
        quantize_model(model)
    if job == "bfloat16":
        model.astype(ml_dtypes.bfloat16)
    if job in ("lora", "qlora"):
        add_lora(model, RANK, 2 * RANK, ("q", "v"))
    if job in ("generate", "batch"):
        tune_allocator()
        prompts = [[0]] * (TEXTS if job == "batch" else 1)
        for seconds in timed(lambda: draw(stream(model.eval(), prompts, temperature=0))):
            yield seconds / len(prompts)
    with our_trainer(model, shape, threads, job == "paged") as trainer:
        tokens = shape.tokens()
        def step(): return trainer.step(0, tokens)
        if job == "memory":
            yield sum(our_memory(trainer, step))
        if job == "parts":
            yield our_memory(trainer, step)
        yield from timed(step)


def our_trainer(model, shape, threads, paged=False, workers=CORES):
    """A Trainer that steps as PyTorch's side does."""
    from minilm.optim import AdamW, PagedAdamW
    from minilm.train import Trainer

    model.checkpoint_every = shape.every
    params = model.parameters()
    optimizer = (PagedAdamW if paged else AdamW)(
        params, 1e-3, (0.9, 0.95), weight_decay=0.1, undecayed=[p for p in params if p.ndim < 2])
    return Trainer(model, optimizer, workers, processes=workers > 1 and not threads)


def our_memory(trainer, step) -> tuple[float, float, float]:
    """MiB that a step takes beyond weights and Adam's states, in three parts: the gradients, which
    stay in memory between steps; the other worker processes at rest; all that comes and goes."""
    step()
    step()
    trainer.workers.run(trim, [()] * CORES)
    children = [child.pid for child in trainer.workers.children]
    gradients = trainer.optimizer.flat.grad.nbytes / 2**20
    # A worker holds its share of Adam's m and v, which are as large as the gradients.
    others = sum(unshared(pid) - 2 * gradients / CORES for pid in children)
    return gradients, others, growth_of_memory(["self", *children], step)


def torch_side(job, shape):
    """Answers of PyTorch."""
    import torch

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    model = torch_gpt(shape, fused=job != "lora")
    if job == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK,
                                                 target_modules=["q", "v"]))
    if job == "generate":
        model.eval()
        with torch.inference_mode():
            yield from timed(lambda: draw(torch_stream(model, shape)))
    step, optimizer = torch_step(model, shape)
    if job == "memory":
        step()
        step()
        optimizer.zero_grad(set_to_none=True)
        trim()
        yield growth_of_memory(["self"], step)
    yield from timed(step)


def torch_step(model, shape, lift=lambda loss_of: loss_of):
    """(a function that makes a training step and returns its loss, the optimizer).

    lift: of the function that gives the loss, such as torch.compile.
    """
    import torch

    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens, targets = map(torch.from_numpy, shape.tokens())

    @lift
    def loss_of(tokens, targets):
        return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, optimizer


def torch_block(C, H, fused):
    """A block of width C with H heads; q, k and v in one layer or apart."""
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
            if fused:
                self.qkv = nn.Linear(C, 3 * C)
            else:
                self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))
            self.o = nn.Linear(C, C)
            self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def forward(self, x, cache=None, past=0):
            (B, T, _), h = x.shape, self.norm1(x)
            qkv = self.qkv(h).split(C, dim=2) if fused else (self.q(h), self.k(h), self.v(h))
            q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in qkv)
            if cache is not None:
                cache[0][:, :, past : past + T], cache[1][:, :, past : past + T] = k, v
                k, v = (t[:, :, : past + T] for t in cache)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
            x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    return Block()


def torch_gpt(shape, fused=True):
    """GPT-2 in PyTorch, with our initialisation's scale."""
    import torch
    from torch import nn

    C = shape.width

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.position = nn.Embedding(shape.vocab, C), nn.Embedding(shape.context, C)
            self.blocks = nn.ModuleList(
                torch_block(C, shape.heads, fused) for _ in range(shape.layers))
            self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, shape.vocab, bias=False)
            self.head.weight = self.embed.weight
            for p in self.parameters():
                if p.dim() == 2:
                    nn.init.normal_(p, 0, 0.02)

        def forward(self, tokens, caches=None, past=0):
            x = self.embed(tokens) + self.position.weight[past : past + tokens.shape[1]]
            if shape.every:
                for i in range(0, shape.layers, shape.every):
                    part = nn.Sequential(*self.blocks[i : i + shape.every])
                    x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
            else:
                for i, block in enumerate(self.blocks):
                    x = block(x, caches and caches[i], past)
            return self.head(self.norm(x))

    return GPT()


def torch_stream(model, shape):
    """Greedy tokens one after another, with a cache of keys and values."""
    import torch

    cached = (1, shape.heads, shape.context, shape.width // shape.heads)
    caches = [(torch.zeros(cached), torch.zeros(cached)) for _ in range(shape.layers)]
    token = torch.zeros((1, 1), dtype=torch.int64)
    for past in range(shape.context):
        token = model(token, caches, past)[:, -1].argmax(-1, keepdim=True)
        yield token


def trim(trainer=None):
    """Give this process's freed memory back to the system (glibc). Workers call it as a method."""
    ctypes.CDLL(None).malloc_trim(0)


def growth_of_memory(pids, step) -> float:
    """MiB by which the processes' high-water marks rise during a step, all together."""
    before = [memory(pid, "VmRSS") for pid in pids]
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the high-water mark
    step()
    return sum(memory(pid, "VmHWM") for pid in pids) - sum(before)


def memory(pid, field) -> float:
    """A field of the process's status, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 1024


def unshared(pid) -> float:
    """MiB that only this process holds."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def our_codes(job, n):
    """Seconds to quantize an n x n matrix to NF4, or to dequantize it, on one thread."""
    from minilm.backend import tune_allocator
    from minilm.quantize import quantize_4bit

    tune_allocator()
    x = matrix(n)
    codes = quantize_4bit(x, double_quant=False)
    if job == "quantize":
        yield from timed(lambda: quantize_4bit(x, double_quant=False))
    yield from timed(codes.dequantize)


def bitsandbytes_codes(job, n):
    """The same in bitsandbytes, with the same settings of the allocator."""
    import torch
    from bitsandbytes import functional

    from minilm.backend import tune_allocator

    tune_allocator()
    torch.set_num_threads(1)
    x = torch.from_numpy(matrix(n))
    codes = functional.quantize_4bit(x, quant_type="nf4")
    if job == "quantize":
        yield from timed(lambda: functional.quantize_4bit(x, quant_type="nf4"))
    yield from timed(lambda: functional.dequantize_4bit(*codes))


def matrix(n):
    return np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
