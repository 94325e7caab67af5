"""What quantization costs: errors of each datatype, and the perplexity of a quantized model.

    python scripts/quantize.py                      # with the newest model under runs/
    python scripts/quantize.py --model runs/pretrain-1/model

Prints the lectures' worked examples and four tables: the error of datatypes and block sizes on
normal numbers, the same on the model's own weights, how full the buckets of 4 bits are with both,
and the model's perplexity on held-out text with its weights in each datatype. Draws the codebooks
over a histogram of the weights (needs the extra `plots`).
"""

import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minilm import data
from minilm.backend import tune_allocator
from minilm.command import command
from minilm.extras import told
from minilm.files import make_place
from minilm.interop import load_model
from minilm.measure.buckets import blocks, colliding, counts, entropy, values
from minilm.measure.losses import loss_of
from minilm.nn import Linear
from minilm.picture import save_png
from minilm.quantize import is_quantized, quantize_4bit, quantize_int8, quantize_model
from minilm.quantize.fourbit import BLOCK_SIZES, levels
from minilm.quantize.outliers import watched
from minilm.run import newest_model, share_held_out

KINDS = ("nf4", "fp4", "int4", "nf3", "int3", "nf2", "int2")


def main(model: Path | None = None, block_sizes: tuple[int, ...] = (32, 64, 128, 256, 4096),
         corpus: str = "python-reference", out: Path = Path("runs/codebooks.png")):
    """What quantization costs.

    Args:
        model: Hugging Face folder and tokenizer.json; by default the newest runs/pretrain-*/model.
        block_sizes: how many numbers share a constant; powers of 2 from 32 to 4096.
        corpus: as for pretrain.py. The perplexity is measured on what the model's run held out of
            it, or on a tenth.
        out: file for the picture.
    """
    if not block_sizes or set(block_sizes) - set(BLOCK_SIZES):
        raise ValueError(f"block_sizes must be among {', '.join(map(str, BLOCK_SIZES))}; got "
                         + (", ".join(map(str, block_sizes)) or "none"))
    tune_allocator()
    folder = model or newest_model(Path("runs"), "pretrain-*")
    loaded = load_model(folder)
    if is_quantized(loaded):
        raise ValueError(f"{folder} is quantized already: give the folder of the model in floats")
    loaded.config.require_language(folder)
    if not loaded.config.causal:
        raise ValueError(f"{folder} fills in masked tokens; perplexity needs a causal model")
    weights = [m.weight.data for path, m in loaded.named_modules()
               if type(m) is Linear and path != "head"]
    share = share_held_out(folder) or 0.1
    text = data.split(data.load_corpus(corpus), share)[1]
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    data.adopt_end(tokenizer, loaded.ends.eos)
    rows = data.rows_of(text, tokenizer, loaded.config.context)
    make_place(out)
    normal = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    print_examples()
    print("\nnormal numbers")
    print_errors([normal], block_sizes)
    print("\n(bitsandbytes publishes for nf4, blocks of 64: mean |error| 0.0728, "
          "mean |error / x| 0.2033)")
    print(f"\nthe weights of {folder}, without the head")
    print_errors(weights, block_sizes)
    print_sizes(weights)
    print_buckets([normal], weights)
    print(f"\nthe model on the {share:.0%} of {corpus} that are held out")
    print_perplexities(folder, rows)
    print("\n" + told("the codebooks over the weights", draw_codebooks(weights, out)))


def print_examples():
    """The lectures' examples. They truncate 1.5 c = 18.68 and 5.6 c = 69.73 to 18 and 69."""
    x = np.array([1.5, 2.3, 3.7, 4.1, 5.6, 6.8, 7.9, 8.4, 9.2, 10.2])
    quantized = quantize_int8(x)
    print(f"absmax: x {x}\n  c = {quantized.c:.4f}, codes {quantized.codes}"
          f"\n  back {np.round(quantized.dequantize(), 2)}")
    W = np.array([[-0.7, -0.3, 0.0, -0.4, 0.3], [-1.0, 0.2, 0.7, 1.7, -0.9],
                  [-0.1, -1.5, -0.1, 0.8, 0.5], [1.2, -1.7, -0.9, -0.3, 0.7],
                  [0.4, 0.1, -1.4, 2.2, -1.1]], np.float32)
    whole, by_row = quantize_int8(W), quantize_int8(W, axis=-1)
    print(f"a 5 x 5 matrix with one constant, c = {whole.c:.2f} (the slide's -60, 99 and -100 are "
          f"codes of weights before they were rounded)\n{whole.codes}")
    constants = quantize_int8(by_row.absmax)
    print(f"with a constant a row, and these in 8 bits: {W.nbytes} bytes -> "
          f"{by_row.codes.nbytes} + {constants.codes.nbytes} + {constants.absmax.nbytes} = "
          f"{by_row.codes.nbytes + constants.nbytes}\n{by_row.codes}")
    one, two = (quantize_4bit(np.ones((1024, 1024), np.float32), double_quant=d)
                for d in (False, True))
    bits = [8 * q.nbytes / 1024**2 - 4 for q in (one, two)]
    print(f"constants of blocks of 64: {bits[0]:.3f} bits a weight -> {bits[1]:.3f}; of 65 billion "
          f"weights {65 / 8 * (bits[0] - bits[1]):.2f} GB less")


def print_errors(arrays, block_sizes):
    """Print the errors of all arrays together, by datatype and block size."""
    print(f"{'datatype':10}{'block':>6}{'bits':>7}{'mean |e|':>11}{'mean |e/x|':>12}"
          f"{'|e| / |x|':>11}")
    for kind in KINDS:
        for size in block_sizes:
            quantized = [quantize_4bit(x, kind, size, double_quant=False) for x in arrays]
            print_error(kind, size, arrays, quantized)
    print_error("nf4+double", 64, arrays, [quantize_4bit(x) for x in arrays])
    print_error("int8", "row", arrays, [quantize_int8(x, axis=-1) for x in arrays])


def print_error(kind, size, arrays, quantized):
    x = np.concatenate([a.ravel() for a in arrays]).astype(np.float64)
    e = np.abs(np.concatenate([q.dequantize().ravel() for q in quantized]) - x)
    bits = 8 * sum(q.nbytes for q in quantized) / x.size
    relative = np.mean(e / (np.abs(x) + 1e-8))
    print(f"{kind:10}{size:>6}{bits:>7.3f}{e.mean():>11.5f}{relative:>12.4f}"
          f"{np.linalg.norm(e) / np.linalg.norm(x):>11.5f}")


def print_sizes(arrays):
    """Print that most weights are small: shares of them below multiples of their spread."""
    x = abs(np.concatenate([a.ravel() for a in arrays]).astype(np.float64))
    spread = math.sqrt(np.mean(x * x))
    below = ", ".join(f"{np.mean(x < n * spread):.2%} below {n}" for n in (1, 2, 3))
    print(f"\ntheir spread is {spread:.4f}; {below} spreads; the largest is {x.max() / spread:.1f}")


def print_buckets(normal, weights):
    """Print the levels of three codebooks, and per cent of the numbers, in blocks of 64, at each.

    FP4 and int4 have 15 levels: FP4's two codes for 0 are counted as one.
    """
    kinds = ("nf4", "fp4", "int4")
    numbers = [blocks(np.concatenate([a.ravel() for a in arrays])) for arrays in (normal, weights)]
    full = [[counts(x, kind, largest) for x, largest in numbers] for kind in kinds]
    print("\nhow full each bucket is in blocks of 64")
    print(f"{'':14}" + "".join(f"{kind:>11}{'normal':>8}{'weights':>8}" for kind in kinds))
    for i in range(16):
        cells = [f"{values(kind)[i]:>11.7f}" + "".join(f"{n[i] / n.sum():>8.2%}" for n in both)
                 for kind, both in zip(kinds, full) if i < len(both[0])]
        print(f"{'':14}" + "".join(cells))
    for title, of in (("bits", entropy), ("pairs collide", colliding)):
        form = ".2f" if of is entropy else ".2%"
        print(f"{title:14}" + "".join(f"{'':11}" + "".join(f"{of(n):>8{form}}" for n in both)
                                      for both in full))
    print("(16 equal buckets would have 4 bits, and 6.25 % of the pairs of numbers would collide)")


def print_perplexities(folder, rows):
    """Print the model's loss and perplexity on rows of text, with its weights in each datatype."""
    plans = [("float32", None, False), ("int8, a constant a row", "int8", False),
             ("LLM.int8()", "llm.int8", False)]
    plans += [(kind, kind, False) for kind in KINDS]
    plans += [("nf4 + double", "nf4", True), ("nf4 + double, int8", "nf4", "int8")]
    results, seen = [], None
    for title, kind, double_quant in tqdm(plans, unit="datatype", leave=False, disable=None):
        model = load_model(folder)
        if kind:
            quantize_model(model, kind, double_quant)
        held = sum(t.data.nbytes for name, t in model.named_tensors() if "head" not in name)
        with watched(model) as inputs:
            results.append((title, held, loss_of(model, *rows)))
        seen = inputs if inputs.features else seen
    base = results[0]
    print(f"{'weights':24}{'MB':>7}{'loss':>9}{'perplexity':>12}{'rise':>8}")
    for title, size, loss in results:
        print(f"{title:24}{size / 1e6:>7.2f}{loss:>9.4f} {math.exp(loss):>11.4f}"
              f" {math.expm1(loss - base[2]):>z7.2%}")
    print(f"LLM.int8() multiplied {seen.share:.2%} of the columns in 16 bits: O, those with any "
          f"|x| >= 6 in up to 32 rows of text; the largest |x| is {seen.largest:.1f}")


def draw_codebooks(weights, path: Path) -> Path | None:
    """The levels of three codebooks over the weights, each divided by its block's constant.

    None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    flat = np.concatenate([w.ravel() for w in weights]).astype(np.float32)
    blocks = flat[: flat.size // 64 * 64].reshape(-1, 64)
    scaled = (blocks / np.abs(blocks).max(-1, keepdims=True)).ravel()
    kinds = ("nf4", "fp4", "int4")
    axes = (figure := Figure(figsize=(6, 4.5), layout="constrained")).subplots(
        len(kinds), sharex=True)
    for axis, kind in zip(axes, kinds):
        axis.hist(scaled, 201, range=(-1, 1), density=True, color="lightgray")
        axis.vlines(levels(kind), 0, axis.get_ylim()[1], linewidth=1)
        axis.set(ylabel=kind, yticks=[])
    axes[-1].set_xlabel("weight / largest of its block")
    return save_png(figure, path)


if __name__ == "__main__":
    command(main)
