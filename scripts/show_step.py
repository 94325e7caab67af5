"""One step of training, shown: forward, loss, gradient, update, and forward again.

    python scripts/show_step.py                                  # a small model of random weights
    python scripts/show_step.py --model runs/pretrain-1/model    # one that has learned
    python scripts/show_step.py --data mine.jsonl --matrices     # its own data; each matrix a row
    python scripts/show_step.py --optimizer adamw

A batch goes forward through the layers and gives a loss. The gradient says for each weight how the
loss changes with it. The update goes a little against it, W_new = W - eta grad, and forward again
the same batch has less loss. For each layer the table has what it gives and how its weights change.

To first order the loss falls by eta |grad|^2. The last table takes steps of several sizes from the
same weights, and says how far that is true. The equations are in minilm/measure/descent.py.

Everything is computed in float64, so that small differences are seen. Nothing is saved.
"""

import math
from pathlib import Path
from typing import Literal

import numpy as np

from minilm import data
from minilm.command import command, many
from minilm.interop import load_model
from minilm.lessons import conversations, instructions
from minilm.measure.descent import falls, watched
from minilm.optim import SGD, AdamW
from minilm.quantize import is_quantized
from minilm.ranges import Range, check, each, whole
from minilm.tensor import no_grad
from minilm.train import LabelLoss
from minilm.transformer import Config, Transformer

ETA = Range("between 1e-12 and 1000", lambda eta: 1e-12 <= eta <= 1000)  # its square is needed
RANGES = {"batch": whole(1), "length": whole(1), "seed": whole(0), "eta": ETA, "etas": each(ETA)}
NEAR = 0.05  # first order "holds" if the measured fall is so near to the expected one


def main(model: Path | None = None, data: str = "python-reference", batch: int = 8,
         length: int = 32, optimizer: Literal["sgd", "adamw"] = "sgd", eta: float = 0.1,
         etas: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), matrices: bool = False,
         seed: int = 0):
    """Show one step of training.

    Args:
        model: Hugging Face folder with a tokenizer.json; without one a small Llama is drawn.
        data: a corpus (python-reference, python-docstrings, python-source), a text file or folder,
            or a JSONL file of records or conversations.
        batch: rows in the batch.
        length: tokens in a row of text; a record takes what it takes.
        optimizer: sgd is gradient descent; adamw is what the other programs train with.
        eta: the learning rate of the step that is shown.
        etas: those of the last table.
        matrices: show each matrix instead of each block.
        seed: of the batch, and of random weights.
    """
    check(RANGES, batch=batch, length=length, seed=seed, eta=eta, etas=etas)
    if not etas:
        raise ValueError("etas must be at least one number, got none")
    net, tokenizer = loaded(model, seed)
    arrays = batch_of(data, net, tokenizer, model, batch, length, seed)
    print(f"{arrays[0].shape[0]} x {arrays[0].shape[1]} tokens of {data}\nthe first row: "
          f"{tokenizer.decode(arrays[0][0])[:60]!r}")
    step = {"sgd": SGD, "adamw": AdamW}[optimizer](net.parameters(), eta, weight_decay=0.0)
    weights, loss = step.flat.data, LabelLoss()
    totals = loss.totals(*arrays)

    with watched(net) as seen:
        before = loss(net, *arrays, totals=totals)  # 1. forward, and 2. loss
    before.backward()  # 3. gradient
    old = weights.copy()
    step.step()  # 4. update
    grad, delta = step.flat.grad, weights - old

    def again() -> float:
        with no_grad(), np.errstate(all="ignore"):  # a large step may lead to infinity
            return float(loss(net, *arrays, totals=totals).data)

    print_step(float(before.data), again(), totals[0], grad, delta, eta, optimizer)  # 5.
    print_one(net, step.flat, old, delta, eta, optimizer)
    print_layers(net, seen, step.flat, old, delta, matrices)
    weights[...] = old
    print_falls(falls(again, weights, grad, delta / eta, etas))


def loaded(folder: Path | None, seed: int):
    """(model, tokenizer) in float64; without a folder a small model is drawn."""
    if folder is None:
        tokenizer, what = data.ByteTokenizer(), "a small Llama of random weights (see --model)"
        model = Transformer(Config.llama(tokenizer.vocab_size, 128, 2, 4, 32, 88), seed)
    else:
        model, what = load_model(folder), folder
        tokenizer = data.load_tokenizer(folder / "tokenizer.json")
        model.config.require_language(folder)
        if is_quantized(model):
            raise ValueError(f"{folder} is quantized, and codes have no gradient: give the model "
                             "that it was made of")
    model = model.astype(np.float64)
    print(f"{what}: {many(len(model.blocks), 'block')}, "
          f"{sum(p.size for p in model.parameters()):,} numbers")
    return model, tokenizer


def batch_of(source: str, model, tokenizer, folder, batch: int, length: int, seed: int) -> tuple:
    """(tokens, targets) of the first batch, as finetune.py or pretrain.py would draw it."""
    if source.endswith(".jsonl"):
        if not model.config.causal:
            raise ValueError("a masked model learns text: give --data a text, not records")
        if data.holds_conversations(source):
            records, teach = data.load_conversations(source), conversations
            templates = folder and data.read_templates(folder)
            by = data.load_chat(folder or Path(), tokenizer,
                                templates or {"default": data.plain(tokenizer)})
        else:
            records, teach, by = data.load_records(source), instructions, tokenizer
        return teach(records, records[:1], by, model, batch, seed).batches[0]
    stream = data.pack(data.load_corpus(source).documents, tokenizer)
    length = min(length, model.room)
    if len(stream) <= length:
        raise ValueError(f"{source} has {len(stream)} tokens, but a row takes {length} and the one "
                         "that follows: give a smaller --length")
    batches = data.Batches([stream], [1], batch, length, seed)
    return (batches if model.config.causal else data.MaskedBatches(batches, tokenizer, seed))[0]


def print_step(before: float, after: float, targets: int, grad, delta, eta: float, optimizer: str):
    """Print the five parts of the step."""
    expected = -float(np.vdot(grad, delta))
    rule = {"sgd": f"W_new = W - eta grad, eta = {eta:g}",
            "adamw": f"W_new = W - eta m / (sqrt(v) + eps), eta = {eta:g} (AdamW's first step: "
                     "about -eta\n                  times the sign of grad)"}[optimizer]
    promise = {"sgd": "eta |grad|^2", "adamw": "-grad . dW"}[optimizer]
    print(f"""
1. forward        the tokens go through the layers, which give a probability for each next token
2. loss           {before:.6f}: the mean of -log p over {targets:,} right tokens, so p = \
{math.exp(-before):.2%}
3. gradient       |grad| = {norm(grad):.4g}: how the loss changes with each of {grad.size:,} weights
4. update         {rule}; |dW| = {norm(delta):.4g}
5. forward again  {after:.6f}: the loss {'fell' if after < before else 'rose'} by \
{abs(before - after):.6f};
                  to first order it falls by {promise} = {expected:.6f}""")


def print_one(model, flat, old, delta, eta: float, optimizer: str):
    """Print the update of one weight: the one with the largest gradient."""
    at = int(np.abs(flat.grad).argmax())
    paths = {id(p): path for path, p in model.named_parameters()}
    p, place = next((p, place) for p, place in zip(flat.params, flat.places)
                    if place.start <= at < place.stop)
    index = ", ".join(map(str, np.unravel_index(at - place.start, p.shape)))
    factor, of = (flat.grad[at], "grad") if optimizer == "sgd" else (
        -delta[at] / eta, "m / (sqrt(v) + eps)")
    print(f"\none weight, {paths[id(p)]}[{index}], W - eta {of}:\n"
          f"{old[at]:.6f} - {eta:g} x {factor:.6f} = {old[at] + delta[at]:.6f}")


def norm(a) -> float:
    """The root of the sum of squares."""
    return float(np.linalg.norm(a))


def print_layers(model, seen, flat, old, delta, matrices: bool):
    """Print a row for each part of the model, or for each layer that has weights of its own."""
    paths = {id(p): path for path, p in model.named_parameters()}
    parts, rows = dict(model.children()), {}
    for p, place in zip(flat.params, flat.places):
        layer = paths[id(p)].rpartition(".")[0]
        part = layer if matrices else next(n for n in parts if f"{layer}.".startswith(f"{n}."))
        rows.setdefault(part, []).append(place)
    fall = np.vdot(flat.grad, delta)
    print(f"\n{'layer':21}{'gives':>15}{'rms':>9}{'weights':>11}{'|W|':>9}{'|grad|':>9}{'|dW|':>9}"
          f"{'|dW|/|W|':>9}{'share':>8}")
    for path in seen:
        if path not in rows and path != "head":
            continue
        shape, rms = " x ".join(map(str, seen[path].shape)), seen[path].rms
        print(f"{path:21}{shape:>15}{rms:9.3g}", end="")
        if path not in rows:
            print("  the embedding's weights")
            continue
        W, g, d = (np.concatenate([a[place] for place in rows[path]])
                   for a in (old, flat.grad, delta))
        relative = norm(d) / norm(W) if norm(W) else math.inf
        print(f"{W.size:11,}{norm(W):9.3g}{norm(g):9.3g}{norm(d):9.3g}{relative:9.3g}"
              f"{np.vdot(g, d) / fall:8.1%}")
    print("rms: of the numbers that a layer gives; share: of the fall of the loss that is expected")


def print_falls(found):
    """Print by how much the loss falls in steps of several sizes, beside what is expected."""
    print("\nThe same step with other eta, each from the same weights:\n\n"
          f"{'eta':>10}{'expected fall':>16}{'measured fall':>16}{'measured / expected':>22}"
          f"{'(expected - measured) / eta^2':>32}")
    for fall in found:
        print(f"{fall.eta:10g}{fall.expected:16.6g}{fall.measured:16.6g}"
              f"{fall.ratio:22.4f}{fall.bend:32.4g}")
    near = [f.eta for f in found if abs(f.ratio - 1) <= NEAR]
    far = [f.eta for f in found if f.eta not in near]
    both = [f"{name} {', '.join(f'{eta:g}' for eta in etas)}"
            for name, etas in (("agree within 5 % for eta =", near), ("part for", far)) if etas]
    print(f"Expected and measured {' and '.join(both)}.\nAs eta falls, the last column tends to a "
          "number: the difference falls as eta^2.")


if __name__ == "__main__":
    command(main)
