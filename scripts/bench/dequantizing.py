"""Where the time goes when weights of few bits become floats on a CPU, and what a user feels of it.

    python scripts/bench/dequantizing.py                     # about three minutes
    python scripts/bench/dequantizing.py --rows pieces --sizes 4096 --rounds 21
    python scripts/bench/dequantizing.py --rows writing --kind int8

Rows:

    pieces   of dequantizing NF4 (n x n): each pass by itself, floors below which no program gets,
             other ways that were tried, and bitsandbytes if it is installed. One thread
    vector   one row times a layer in NF4, as in generation, and other ways that were tried
    step     a training step of LoRA and QLoRA at the size M on one core, and how much of QLoRA's
             is dequantizing
    writing  a GPT-2 of 124 million weights, drawn at random and quantized: tokens a second if none,
             half and all of its weights are kept as floats (quantize.dequantized)

All contenders of a row run in this process and take turns. Times are seconds of a core, in which
other programs do not count; for writing also by the clock. Median (lowest - highest).
"""

import importlib.util
import mmap
import statistics
import time
import tracemalloc
from functools import partial
from typing import Literal, get_args

import numpy as np
from contenders import RANK, SHAPES

from minilm.arrays import BLOCK
from minilm.backend import tune_allocator, use_huge_pages
from minilm.blas import matmul
from minilm.generate import generate
from minilm.measure.speed import in_turn
from minilm.optim import AdamW
from minilm.peft import add_lora
from minilm.quantize import FourBit, dequantized, quantize_4bit, quantize_int8, quantize_model
from minilm.quantize.codebooks import levels
from minilm.quantize.linear import product_with_codes
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

Row = Literal["pieces", "vector", "step", "writing"]
LAYERS = (768, 768), (768, 3072), (4096, 4096)  # (O, I), of the row `vector`
GPT2 = dict(vocab_size=50257, context=1024, layers=12, heads=12, width=768)
PROMPT = 8  # tokens


def main(rows: tuple[Row, ...] = get_args(Row),
         sizes: tuple[int, ...] = (1024, 4096), rounds: int = 11, tokens: int = 64,
         kind: Literal["nf4", "int8"] = "nf4"):
    """Print where the time of dequantizing goes, and what a user feels of it.

    Args:
        rows: what to measure.
        sizes: n of the matrices n x n, of the row `pieces`; multiples of 512.
        rounds: turns of each contender.
        tokens: that are written, in the row `writing`.
        kind: of the quantized weights there.
    """
    if min(rounds, tokens, *sizes) < 1 or any(n % 512 for n in sizes):
        raise ValueError(f"rounds and tokens must be at least 1 and sizes multiples of 512, got "
                         f"{rounds}, {tokens} and {sizes}")
    tune_allocator()
    for n in sizes if "pieces" in rows else ():
        table(f"NF4, {n} x {n}", pieces(n), n * n, rounds)
    for O, I in LAYERS if "vector" in rows else ():
        table(f"one row times {O} x {I}", products(O, I), O * I, rounds)
    if "step" in rows:
        steps(rounds)
    if "writing" in rows:
        writing(rounds, tokens, kind)


def table(title, jobs, weights, rounds):
    """Print the time of each job, which does its work on so many weights."""
    many = max(1, (1 << 22) // weights)  # a turn of a few milliseconds at least
    turns = {what: partial(repeat, job, many) for what, job in jobs.items()}
    times = in_turn(turns, rounds + 1, clock=lambda: time.thread_time() / many)
    print(f"\n| {title} | ms of a core | ns a weight |\n|---|---|---|")
    for what, (_, *seconds) in times.items():  # the first turn warms up
        nanoseconds = 1e9 * statistics.median(seconds) / weights
        print(f"| {what} | {spread(seconds, 1e3)} | {nanoseconds:.2f} |", flush=True)


def repeat(job, times):
    for _ in range(times):
        job()


def spread(values, unit=1.0) -> str:
    """Median (lowest - highest)."""
    low, middle, high = (unit * f(values) for f in (min, statistics.median, max))
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def pieces(n) -> dict:
    """name -> what to time, for a matrix (n, n) in NF4."""
    x = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    single, double = quantize_4bit(x, double_quant=False), quantize_4bit(x)
    packed, c2, eight = single.packed, single.c2, quantize_int8(x, axis=-1)
    pairs, y, other = table_of_bytes(), np.ones(n * n, np.float32), np.ones(n * n, np.float32)
    quads = np.concatenate([np.tile(pairs, (256, 1)), np.repeat(pairs, 256, 0)], axis=1)

    def index(i, part): packed[i // 2 :][: part.size // 2].astype(np.intp)
    def look_up(i, part):
        pairs.take(packed[i // 2 :][: part.size // 2], 0, part.reshape(-1, 2), "clip")
    def look_up_four(i, part):
        codes = packed.view(np.uint16)[i // 4 :][: part.size // 4]
        quads.take(codes, 0, part.reshape(-1, 4), "clip")
    def scale(i, part): part *= np.repeat(c2[i // 64 :][: part.size // 64], 64)
    def scale_rows(i, part):  # a loop of its own for each block
        part = part.reshape(-1, 64)
        part *= c2[i // 64 :][: len(part), None]

    def passes(*works, step=BLOCK, fresh=True):
        """Blocks that stay in the cache from pass to pass; fresh: into a new array."""
        def run():
            x = np.empty(n * n, np.float32) if fresh else y
            for i in range(0, x.size, step):
                for work in works:
                    work(i, x[i : i + step])
            return x
        return run

    return {
        "floor: write the floats once": lambda: y.fill(1),
        "floor: copy the floats": lambda: np.copyto(y, other),
        "if each array had new pages of the system": lambda: new_pages(y.nbytes),
        "codes to indices, inside of the look-up": passes(index, fresh=False),
        "look-up, two values for a byte": passes(look_up, fresh=False),
        "product with the constants": passes(scale, fresh=False),
        "constants of double quantization": lambda: double.absmax,
        "dequantize": single.dequantize,
        "dequantize, double quantization": double.dequantize,
        "dequantize to bfloat16": lambda: single.dequantize("bfloat16"),
        "dequantize, int8": eight.dequantize,
        "tried: four values for two bytes": passes(look_up_four, scale),
        "tried: a product for each block": passes(look_up, scale_rows),
        "tried: smaller pieces": passes(look_up, scale, step=BLOCK // 8),
        "tried: the whole matrix, pass by pass": passes(look_up, scale, step=n * n),
        "tried: int8 in one expression": lambda: eight.codes * (eight.absmax * np.float32(1 / 127)),
    } | bitsandbytes(x)


def new_pages(size):
    """Write into memory that the system has to clear first, page by page."""
    with mmap.mmap(-1, size) as pages:
        np.frombuffer(pages, np.uint8)[::4096] = 1


def table_of_bytes():
    """The two levels that each byte stands for: (256, 2)."""
    codes = np.arange(256)
    return levels("nf4")[np.stack([codes >> 4, codes & 15], axis=1)]


def bitsandbytes(x) -> dict:
    """The same in bitsandbytes, {} if it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import torch
    from bitsandbytes import functional

    torch.set_num_threads(1)
    codes = functional.quantize_4bit(torch.from_numpy(x), quant_type="nf4")
    return {"bitsandbytes": lambda: functional.dequantize_4bit(*codes)}


def products(O, I) -> dict:
    """name -> what to time: x W^T for one row x (1, I) and W (O, I) in NF4."""
    rng = np.random.default_rng(0)
    W = quantize_4bit(rng.standard_normal((O, I), dtype=np.float32), double_quant=False)
    x = rng.standard_normal((1, I), dtype=np.float32)
    floats, pairs, step = W.dequantize(), table_of_bytes(), max(1, BLOCK // I)
    packed, c2, y = W.packed.reshape(O, -1), W.c2.reshape(O, -1), np.empty(O, np.float32)
    buffer, blocks = np.empty((step, I), np.float32), x.reshape(-1, 64, 1)

    def look_up(i):
        part = buffer[: min(step, O - i)]
        pairs.take(packed[i : i + step].reshape(-1), 0, part.reshape(-1, 2), "clip")
        return part
    def by_parts():  # a part is used while the cache has it
        for i in range(0, O, step):
            part = look_up(i)
            part *= np.repeat(c2[i : i + step], 64).reshape(-1, I)
            np.vecdot(part, x[0], out=y[i : i + step])
    def sums_of_blocks():  # rounds in another order
        for i in range(0, O, step):
            z = look_up(i).reshape(-1, I // 64, 64).swapaxes(0, 1) @ blocks  # (blocks, O, 1)
            np.vecdot(z[..., 0].T, c2[i : i + step], out=y[i : i + step])

    for tried in (by_parts, sums_of_blocks):
        tried()
        if np.abs(y - floats @ x[0]).max() > 1e-4 * np.abs(y).max():
            raise RuntimeError(f"{tried.__name__} gives another product")
    return {
        "dequantize and multiply": lambda: product_with_codes(x, W),
        "multiply, the weight being kept as floats": lambda: matmul(x, floats.T),
        "tried: part by part": by_parts,
        "tried: the constants times the blocks' sums": sums_of_blocks,
    }


def steps(rounds):
    """Print the time of a step of LoRA and QLoRA, and the share of dequantizing."""
    inside, plain = [], FourBit.dequantize

    def watched(self, dtype="float32"):
        start = time.thread_time()
        floats = plain(self, dtype)
        inside[-1] += time.thread_time() - start
        return floats

    with trainer_of("LoRA") as lora, trainer_of("QLoRA") as qlora:
        def step(trainer):
            inside.append(0)
            trainer.step(0, SHAPES["M"].tokens())

        FourBit.dequantize = watched
        try:
            times = in_turn({"LoRA": lambda: step(lora), "QLoRA": lambda: step(qlora)}, rounds + 1,
                            clock=time.thread_time)
        finally:
            FourBit.dequantize = plain
    ratios = [b / a for a, b in zip(*times.values())][1:]
    shares = [100 * part / whole for part, whole in zip(inside[1::2], times["QLoRA"])][1:]
    print("\n| a step at M, one core | |\n|---|---|")
    for method, seconds in times.items():
        print(f"| {method} | {spread(seconds[1:], 1e3)} ms |")
    print(f"| QLoRA's over LoRA's | {spread(ratios)} |")
    print(f"| of QLoRA's, dequantizing | {spread(shares)} % |", flush=True)


def trainer_of(method) -> Trainer:
    """One that trains a GPT-2 of the size M by this method, on one core."""
    s = SHAPES["M"]
    model = Transformer(Config.gpt2(s.vocab, s.context, s.layers, s.heads, s.width))
    if method == "QLoRA":
        quantize_model(model)
    add_lora(model, RANK, 2 * RANK, ("q", "v"))
    return Trainer(model, AdamW(model.parameters(), 1e-3), 1)


def writing(rounds, tokens, kind):
    """Print tokens a second by the memory that weights kept as floats may take."""
    model = quantize_model(Transformer(Config.gpt2(**GPT2)).eval().freeze(), kind)
    use_huge_pages(t.data for _, t in model.named_tensors())
    prompt = np.random.default_rng(0).integers(0, GPT2["vocab_size"], (1, PROMPT))
    with dequantized(model, 2**62) as kept:
        everything = sum(floats.nbytes for floats in kept.values())
    limits, drawn, spent = (0, everything // 2, everything), [], {}

    def write(limit):
        with dequantized(model, limit) as kept:
            use_huge_pages(kept.values())
            start = time.process_time(), time.perf_counter()
            drawn.append(generate(model, prompt, tokens, temperature=0))
            now = time.process_time(), time.perf_counter()
        spent.setdefault(limit, []).append([b - a for a, b in zip(start, now)])

    in_turn({limit: partial(write, limit) for limit in limits}, rounds + 1)
    if any((other != drawn[0]).any() for other in drawn):
        raise RuntimeError("weights that are kept changed a token")
    peaks = {limit: peak(model, prompt, limit) for limit in limits}
    print(f"\n| {kind}, floats that are kept | memory beyond none | tokens/s by the clock | "
          "ms of a core for a token |\n|---|---|---|---|")
    for limit in limits:
        core, clock = zip(*spent[limit][1:])
        print(f"| up to {limit / 1e6:.1f} MB | {(peaks[limit] - peaks[0]) / 1e6:.1f} MB | "
              f"{spread([tokens / t for t in clock])} | {spread(core, 1e3 / tokens)} |")


def peak(model, prompt, limit) -> int:
    """Bytes of arrays at the highest moment of two tokens, weights that are kept among them."""
    tracemalloc.start()
    try:
        with dequantized(model, limit):
            generate(model, prompt, 2, temperature=0)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    from minilm.command import command

    command(main)
