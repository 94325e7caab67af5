"""A step of QLoRA on a Llama of 1.1 billion parameters: ours, and the same arithmetic in PyTorch.

Both train in bfloat16: adapters of rank 16 on all linear layers but the head, over weights in NF4
with double quantization. The loss is computed in float32. The adapters are rounded from float32
masters, which AdamW changes; its states are float32 too. PyTorch (eager) gets our model's codes and
uses its fused AdamW and attention. Its weights are made by bitsandbytes' kernels or, without that
library, looked up in a table, forward and again backward.
Each side runs in a process of its own, with no gradient checkpoints or with one a block.
"""

import math
import statistics
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
from contenders import timed
from gpu_table import Ceilings, Row, cells, code_bytes, line

from minilm import ops
from minilm.backend import peak_memory
from minilm.block import Block
from minilm.optim import AdamW
from minilm.peft import add_lora
from minilm.quantize import quantize_model
from minilm.quantize.codebooks import dynamic_map, levels
from minilm.rope import rotary_tables
from minilm.transformer import Config, Transformer

LLAMA = Config.llama(32000, 1024, layers=22, heads=32, width=2048, hidden=5632, kv_heads=4)
BATCH, RANK, LR = 4, 16, 1e-4


def our_qlora(config: Config, batch: int, checkpoint: bool, optimizer=AdamW):
    """Yield the peak memory of a step in bytes, then seconds of a step, again and again."""
    model = our_model(config, RANK, "cuda")
    model.checkpoint_every = int(checkpoint)
    step = our_step(model, batch, optimizer)
    step()  # compiles the kernels
    with peak_memory() as peak:
        step()
    yield peak.bytes
    yield from timed(step)


def torch_qlora(config: Config, batch: int, checkpoint: bool, device="cuda"):
    """The same for PyTorch. Our model is made on the CPU, so it takes no memory of the GPU."""
    import torch

    step = torch_step(torch_llama(our_model(config, RANK, "cpu"), checkpoint, device),
                      config, batch, device)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    yield torch.cuda.max_memory_allocated()
    yield from timed(step)


def our_model(config: Config, rank: int, device: str) -> Transformer:
    """A random model. Only one block at a time is in float32 on the host, never the whole model."""
    rng, model = np.random.default_rng(0), Transformer(replace(config, layers=1))
    model.config, model.blocks = config, []
    model.astype("bfloat16").to(device)  # embedding, last norm and head
    for _ in range(config.layers):
        block = quantize_model(Block(config, rng).to(device))
        model.blocks.append(block.astype("bfloat16"))
    return add_lora(model, rank, 2 * rank, "all-linear")


def our_step(model: Transformer, batch: int, optimizer=AdamW):
    """A function that makes a step and returns its loss."""
    optimizer = optimizer(model.parameters(), LR)
    tokens, targets = random_batch(model.config, batch)

    def step():
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(tokens), targets)
        loss.backward()
        optimizer.step()
        return float(loss.data)  # waits for the card

    return step


def torch_step(model, config: Config, batch: int, device: str):
    """The same in PyTorch."""
    import torch
    from torch.nn import functional as F

    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)
    tokens, targets = (torch.tensor(x, device=device) for x in random_batch(config, batch))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def random_batch(config, batch):
    """(tokens, targets), (B, T) each."""
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (batch, config.context + 1))
    return drawn[:, :-1].copy(), drawn[:, 1:].copy()


def torch_llama(model: Transformer, checkpoint: bool, device: str):
    """Our adapted model as a torch.nn.Module with copies of its arrays."""
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint as run_again

    c = model.config
    arrays = {"embed": model.embed.weight.data, "norm": model.norm.weight.data,
              "head": model.head.weight.data}
    tables = rotary_tables(c, np.arange(c.context), arrays["embed"].dtype)

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            for name, array in arrays.items():
                self.register_buffer(name, on_torch(array, device))
            self.angles = [on_torch(table, device) for table in tables]
            self.blocks = nn.ModuleList(torch_block(block, c, device) for block in model.blocks)

        def forward(self, tokens):
            x = F.embedding(tokens, self.embed)
            for block in self.blocks:
                x = (run_again(block, x, *self.angles, use_reentrant=False) if checkpoint
                     else block(x, *self.angles))
            return F.linear(F.rms_norm(x, (c.width,), self.norm, c.norm_eps), self.head)

    return Llama()


def torch_block(block: Block, c: Config, device: str):
    from torch import nn
    from torch.nn import functional as F

    class TorchBlock(nn.Module):
        def __init__(self):
            super().__init__()
            for part, names in (block.attention, "qkvo"), (block.mlp, ("gate", "up", "down")):
                for name in names:
                    setattr(self, name, torch_linear(getattr(part, name), device))
            for name in ("norm1", "norm2"):
                self.register_buffer(name, on_torch(getattr(block, name).weight.data, device))

        def forward(self, x, cos, sin):
            h = F.rms_norm(x, (c.width,), self.norm1, c.norm_eps)
            q, k, v = (f(h).unflatten(-1, (-1, c.width // c.heads)).transpose(1, 2)
                       for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v,
                                               is_causal=True, enable_gqa=True)
            x = x + self.o(y.transpose(1, 2).flatten(2))
            h = F.rms_norm(x, (c.width,), self.norm2, c.norm_eps)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    return TorchBlock()


def turn(x, cos, sin):
    """Rotary positions, as in minilm/heads.py."""
    import torch

    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def torch_linear(layer, device: str):
    """A layer with LoRA on double quantized NF4."""
    import torch
    from torch.nn import functional as F

    adapter = layer.adapters[layer.active]
    dtype = on_torch(adapter.A.data, "cpu").dtype
    dequantize = torch_weight(layer.base.weight, dtype, device)

    class Product(torch.autograd.Function):
        """x W^T. W is made when it is used: forward, and again backward."""

        @staticmethod
        def forward(ctx, x):
            return x @ dequantize().T

        @staticmethod
        def backward(ctx, dy):
            return dy @ dequantize()

    class TorchLinear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B = (torch.nn.Parameter(on_torch(t.data, device).float())  # masters
                              for t in (adapter.A, adapter.B))

        def forward(self, x):
            h = F.linear(x, self.A.to(dtype)) * adapter.scale
            return Product.apply(x) + F.linear(h, self.B.to(dtype))

    return TorchLinear()


def weight_of_bitsandbytes(W, dtype, device: str):
    """A function that makes the weight from its codes by bitsandbytes' kernel."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed, c2, c1, offset, code, table = (on_torch(x, device) for x in (
        W.packed, W.c2, W.c1, W.offset, levels(W.codebook), dynamic_map()))
    constants = QuantState(c1, code=table, blocksize=256, dtype=torch.float32)
    state = QuantState(c2, torch.Size(W.shape), code, W.block_size, W.codebook, dtype,
                       offset.reshape(()), constants)
    return lambda: dequantize_4bit(packed.view(-1, 1), state)


def weight_of_table(W, dtype, device: str):
    """The same by PyTorch alone: a byte is looked up as two numbers."""
    from torch.nn import functional as F

    byte = np.arange(256)
    packed, c2, c1, offset, pairs, table = (on_torch(x, device) for x in (
        W.packed, W.c2, W.c1, W.offset, levels(W.codebook)[np.stack([byte >> 4, byte & 15], -1)],
        dynamic_map()))

    def dequantize():
        constants = table[c2.int()] * c1.repeat_interleave(256)[: len(c2)] + offset
        numbers = F.embedding(packed.int(), pairs).view(-1, W.block_size)
        return numbers.mul_(constants[:, None]).to(dtype).view(W.shape)

    return dequantize


torch_weight = weight_of_bitsandbytes if find_spec("bitsandbytes") else weight_of_table
PEER = "PyTorch with bitsandbytes" if find_spec("bitsandbytes") else "PyTorch"


def on_torch(array, device: str):
    """A NumPy array in PyTorch. (PyTorch does not know NumPy's bfloat16.)"""
    import torch

    if array.dtype == "bfloat16":
        return torch.tensor(array.astype(np.float32)).to(device, torch.bfloat16)
    return torch.tensor(array, device=device)


def step_row(config: Config, batch: int, checkpoint: bool) -> Row:
    """The step's row. Its floor is the time to make the weights from codes and to multiply."""
    c, tokens, times_forward = config, batch * config.context, 1 + checkpoint
    kv_width = c.width // c.heads * c.kv_heads
    shapes = [(c.width, c.width)] * 2 + [(kv_width, c.width)] * 2
    shapes += [(c.hidden, c.width)] * 2 + [(c.width, c.hidden)]
    block = sum(map(math.prod, shapes))
    adapter = RANK * sum(O + I for O, I in shapes)
    attended = c.context * c.width  # products of q and k, and of P and v; half are masked
    forward = 2 * (block + adapter + attended)
    backward = 2 * (block + 2 * adapter + 2 * attended)
    head = 2 * 2 * c.width * c.vocab_size
    flops = tokens * (c.layers * (times_forward * forward + backward) + head)
    made = c.layers * sum(code_bytes(shape, True) + 2 * math.prod(shape) for shape in shapes)
    kind = "a checkpoint a block" if checkpoint else "no checkpoints"
    title = (f"QLoRA step of a Llama of {c.layers} x {c.width}, {batch} x {c.context} tokens, "
             f"r = {RANK}, bfloat16, {kind}")
    return Row(title, ((made * (times_forward + 1), 0), (0, flops)), None, PEER, speed=1.0)


def step_lines(config: Config, batch: int, checkpoint: bool, ceilings: Ceilings,
               theirs=(), ours=()) -> list[str]:
    """The rows of time, tokens a second and memory, from both sides' answers if there are any."""
    row = step_row(config, batch, checkpoint)
    tokens, goal = batch * config.context, "at most PyTorch's"
    floor = tokens / ceilings.seconds(row.work)
    speed, memory = f"{row.title}: tokens a second", f"{row.title}: peak memory"
    if not ours:
        none, beside = "not yet measured", f"{PEER}: not yet measured"
        return [line(row, ceilings), cells(speed, f"{floor:,.0f}", none, "", beside, "", ""),
                cells(memory, "", none, "", beside, "", goal)]
    (their_peak, *their_times), (our_peak, *our_times) = theirs, ours
    our_speed, their_speed = (tokens / statistics.median(t) for t in (our_times, their_times))
    return [
        line(row, ceilings, our_times, their_times),
        cells(speed, f"{floor:,.0f}", f"{our_speed:,.0f}", f"{our_speed / floor:.0%}",
              f"{PEER}: {their_speed:,.0f}", "", ""),
        cells(memory, "", f"{our_peak / 2**30:.2f} GiB", "",
              f"{PEER}: {their_peak / 2**30:.2f} GiB", f"{their_peak / our_peak:.2f}",
              f"{goal}: {'met' if our_peak <= their_peak else 'missed'}")]
