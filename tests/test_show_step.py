"""scripts/show_step.py: what it prints is a step that was made, on any model and data it takes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import show_step
import tyro

from minilm import data, ops
from minilm.interop import save_model
from minilm.optim import AdamW
from minilm.quantize import quantize_model
from minilm.tensor import no_grad
from minilm.transformer import Config, Transformer, with_classes

MODELS = {"gpt2": Config.gpt2(258, 40, 1, 2, 16), "llama": Config.llama(258, 40, 2, 2, 16, 24),
          "bert": Config.bert(258, 40, 1, 2, 16, 24)}
TEXT = "The cat sat on the mat, and the dog sat on the cat. " * 9


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    return "text.txt"


def saved(model):
    folder = Path("model")
    save_model(model, folder)
    data.ByteTokenizer().save(folder / "tokenizer.json")
    return folder


def shown(capsys, *args, **settings):
    show_step.main(*args, **settings)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100, said
    return said


def number(pattern, said) -> float:
    return float(re.search(pattern + r" *(-?[\d.]+(?:e[-+]\d+)?)", said, re.MULTILINE)[1])


def table(said, head):
    """The rows below the line that begins with head: words, of which "a x b" is one."""
    lines = said.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == [head]) + 1
    rows = [line.replace(" x ", "x").split() for line in lines[first:]]
    ends = (i for i, row in enumerate(rows) if row[:1] in (["rms:"], ["Expected"]))
    return rows[: next(ends)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_losses_are_those_of_a_step_made_by_hand(text, capsys, name, optimizer):
    model = Transformer(MODELS[name], 3)
    said = shown(capsys, saved(model), text, batch=3, length=7, seed=5,
                 optimizer=optimizer, eta=0.01)
    model = model.astype(np.float64)
    stream = np.array([*TEXT.encode(), 256])
    tokens, targets = data.Batches([stream], [1], 3, 7, 5)[0]
    before = ops.cross_entropy(model(tokens), targets)
    before.backward()
    square = sum((p.grad**2).sum() for p in model.parameters())
    if optimizer == "sgd":
        for p in model.parameters():
            p.data[...] -= 0.01 * p.grad
        promised = number(r"eta \|grad\|\^2 =", said)
        assert abs(promised - 0.01 * square) < 1e-6
    else:
        AdamW(model.parameters(), 0.01, weight_decay=0.0).step()
    with no_grad():
        after = ops.cross_entropy(model(tokens), targets)
    assert abs(number("^2. loss", said) - before.data) < 1e-6
    assert abs(number("^5. forward again", said) - after.data) < 1e-6
    assert abs(number(r"^3. gradient +\|grad\| =", said) / np.sqrt(square) - 1) < 1e-3


@pytest.mark.parametrize("matrices", [False, True])
def test_the_layers_norms_and_shares_add_up_to_the_whole(text, capsys, matrices):
    model = Transformer(MODELS["llama"])
    said = shown(capsys, saved(model), text, batch=2, length=6, matrices=matrices)
    rows = table(said, "layer")
    assert [row[0] for row in rows] == (
        ["embed", "blocks.0", "blocks.1", "norm", "head"] if not matrices else
        ["embed", *(f"blocks.{i}.{layer}" for i in (0, 1) for layer in (
            "norm1", "attention.q", "attention.k", "attention.v", "attention.o", "norm2",
            "mlp.gate", "mlp.up", "mlp.down")), "norm", "head"])
    shapes = {row[0]: row[1] for row in rows}
    assert (shapes["embed"], shapes["head"]) == ("2x6x16", "2x6x258")
    numbers = np.array([[float(x.strip("%").replace(",", "")) for x in row[2:]] for row in rows])
    _, count, W, grad, delta, relative, share = numbers.T
    assert count.sum() == sum(p.size for p in model.parameters())
    assert abs(np.linalg.norm(grad) / number(r"\|grad\| =", said) - 1) < 0.01
    assert np.allclose(delta, 0.1 * grad, rtol=0.01) and abs(share.sum() - 100) < 1
    assert np.allclose(share, 100 * grad**2 / (grad**2).sum(), atol=0.3)
    assert np.allclose(relative, delta / W, rtol=0.02)


def test_the_weight_that_is_shown_is_the_one_with_the_largest_gradient(text, capsys):
    model = Transformer(MODELS["gpt2"])
    said = shown(capsys, saved(model), text, batch=2, length=6)
    old, grad, new = map(float, re.search(r"^(\S+) - 0.1 x (\S+) = (\S+)$", said,
                                          re.MULTILINE).groups())
    assert abs(old - 0.1 * grad - new) < 2e-6
    stream = np.array([*TEXT.encode(), 256])
    tokens, targets = data.Batches([stream], [1], 2, 6, 0)[0]
    ops.cross_entropy(model(tokens), targets).backward()
    most = max(float(np.abs(p.grad).max()) for p in model.parameters())
    assert abs(abs(grad) - most) < 1e-5
    path, index = re.search(r"one weight, ([\w.]+)\[([\d, ]+)\]", said).groups()
    assert abs(dict(model.named_parameters())[path].grad[
        tuple(map(int, index.split(", ")))] - grad) < 1e-5


def test_small_steps_fall_as_expected_and_large_ones_do_not(capsys):
    """Also: a newcomer needs no model, and no option."""
    said = shown(capsys)
    rows = np.array(table(said, "eta"), float)
    assert np.allclose(rows[:, 0], [1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert np.allclose(rows[:, 3], rows[:, 2] / rows[:, 1], rtol=1e-3)
    assert (np.abs(rows[:3, 3] - 1) < 0.05).all() and (rows[3:, 3] < 0.95).all()
    assert "measured agree within 5 % for eta = 0.0001, 0.001, 0.01 and part for 0.1, 1." in said
    assert "small Llama of random weights (see --model)" in said


RECORDS = [{"instruction": "Reverse", "context": w, "output": w[::-1]} for w in ("abc", "hello")]
TALKS = [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w[::-1]}]}
         for w in ("abc", "hello")]


@pytest.mark.parametrize("records, targets", [(RECORDS, 10), (TALKS, 10)])
def test_records_count_only_what_is_to_be_answered(text, capsys, records, targets):
    Path("mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    said = shown(capsys, None, "mine.jsonl", batch=2)
    assert f"over {targets} right tokens" in said


def test_a_masked_model_fills_in(text, capsys):
    model = Transformer(MODELS["bert"])
    said = shown(capsys, saved(model), text, matrices=True)
    assert "head.out" in said and "fell" in said


def classes(): return with_classes(Transformer(MODELS["gpt2"]), ("no", "yes"))
def codes(): return quantize_model(Transformer(Config.gpt2(258, 40, 1, 2, 64)), "nf4")
def masked(): return Transformer(MODELS["bert"])


@pytest.mark.parametrize("make, words, complaint", [
    (classes, [], "gives classes of whole texts; a language model is needed here"),
    (codes, [], "is quantized, and codes have no gradient: give the model that it was made of"),
    (masked, ["--data", "a.jsonl"], "a masked model learns text: give --data a text, not records"),
    (None, ["--data", "short.txt"], "short.txt has 4 tokens, but a row takes 32 and the one that"),
    (None, ["--model", "nowhere"], "there is no such folder"),
    (None, ["--eta", "0"], "eta must be between 1e-12 and 1000, got 0.0"),
    (None, ["--etas"], "etas must be at least one number, got none"),
    (None, ["--batch", "0"], "batch must be at least 1, got 0"),
    (None, ["--data", "nothing"], "'nothing' is neither a path nor one of python-reference"),
])
def test_what_cannot_be_shown_is_refused(text, make, words, complaint):
    words = ["--data", text, *words] if "--data" not in words else words
    if make:
        words += ["--model", str(saved(make()))]
    Path("short.txt").write_text("abc")
    with pytest.raises((ValueError, OSError), match=re.escape(complaint)):
        tyro.cli(show_step.main, args=words)


def test_a_step_too_large_is_shown_all_the_same(text, capsys):
    said = shown(capsys, None, text, eta=1000.0, etas=(1000.0, 1e-12))
    assert "the loss rose by" in said and "part for 1000" in said


