"""scripts/quantize.py as its user meets it: the tables' numbers, the picture, and what is wrong."""

import itertools
import re

import numpy as np
import pytest
import quantize

from minilm import data
from minilm.files import write_json
from minilm.interop import bitsandbytes, huggingface
from minilm.measure.losses import loss_of
from minilm.quantize import quantize_model
from minilm.quantize.codebooks import NF4
from minilm.transformer import Config, Transformer


@pytest.fixture
def model(tmp_path):
    """The folder of an untrained model whose every number counts, and a text."""
    made = Transformer(Config.gpt2(258, 16, layers=1, heads=2, width=64), seed=1)
    rng = np.random.default_rng(0)
    for _, t in made.named_tensors():
        t.data += rng.normal(0, 0.15, t.shape).astype(np.float32)
    huggingface.save_model(made, tmp_path / "model")
    data.ByteTokenizer().save(tmp_path / "model" / "tokenizer.json")
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 100)
    return tmp_path / "model"


def test_the_tables_and_the_picture(tmp_path, model, capsys):
    picture = tmp_path / "new" / "codebooks.png"
    quantize.main(model, (64,), str(tmp_path / "text.txt"), picture)
    said = capsys.readouterr().out
    assert "c = 12.4510, codes [ 19  29  46  51  70  85  98 105 115 127]" in said
    assert "[-58  12  40  98 -52]" in said and "c = 57.73" in said
    assert "100 bytes -> 25 + 5 + 4 = 34" in said
    assert "0.500 bits a weight -> 0.127; of 65 billion weights 3.03 GB less" in said

    normal, own = (dict(re.findall(r"^(\w+) +(?:64|row) +([\d. ]+)$", part, re.M))
                   for part in said.split("the weights of")[:2])
    assert list(normal) == ["nf4", "fp4", "int4", "nf3", "int3", "nf2", "int2", "int8"] == list(own)
    bits, mean, relative, _ = map(float, normal["nf4"].split())
    assert bits == 4.5 and abs(mean - 0.0728) < 1e-4 and abs(relative - 0.2033) < 5e-4

    table = said.split("how full each bucket is")[1].split("pairs collide")[0]
    lines = [re.findall(r"(-?\d\.\d{7}) +([\d.]+)% +([\d.]+)%", line)
             for line in table.splitlines()]
    columns = {i: [line[i] for line in lines if len(line) > i] for i in range(3)}
    assert [len(column) for column in columns.values()] == [16, 15, 15]  # nf4, fp4, int4
    assert [level for level, *_ in columns[0]] == [f"{v:.7f}" for v in NF4]
    for column in columns.values():
        for shares in list(zip(*column))[1:]:
            assert abs(sum(map(float, shares)) - 100) < 0.09
    assert 3.87 < float(re.search(r"^bits +([\d.]+)", table, re.M)[1]) < 3.9
    share = re.search(r"LLM.int8\(\) multiplied ([\d.]+)% of the columns", said)[1]
    assert 0 <= float(share) < 100

    loss = {title.strip(): float(value) for title, value in re.findall(
        r"^(.{24}) +[\d.]+ +([\d.]+) +[\d.]+ +-?[\d.]+%$", said, re.M)}
    assert len(loss) == 12
    tokens, targets = data.cut(data.pack(data.split(
        data.load_corpus(str(tmp_path / "text.txt")), 0.1)[1], data.ByteTokenizer()), 16)
    z = huggingface.load_model(model).eval()(tokens).data.astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counted = targets != data.IGNORED
    right = np.take_along_axis(p, np.where(counted, targets, 0)[..., None], -1)[..., 0]
    assert loss["float32"] == pytest.approx(-np.log(right[counted]).mean(), abs=1e-4)
    assert abs(loss["int8, a constant a row"] - loss["float32"]) < (
        abs(loss["nf2"] - loss["float32"]))
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_text_is_what_the_models_run_held_out(tmp_path, model, capsys):
    """In rows that fit in memory, whatever context the model claims."""
    write_json(tmp_path / "run.json", {"settings": {"validation": 0.3}})
    folder, text = tmp_path / "vast", str(tmp_path / "text.txt")
    llama = Config.llama(258, 10**12, layers=1, heads=2, width=64, hidden=64)
    huggingface.save_model(made := Transformer(llama, seed=2), folder, data.ByteTokenizer())
    quantize.main(folder, (64,), text, tmp_path / "picture.png")
    said = capsys.readouterr().out
    held = data.split(data.load_corpus(text), 0.3)[1]
    loss = loss_of(made, *data.cut(data.pack(held, data.ByteTokenizer()), 1000))
    assert f"the model on the 30% of {text} that are held out" in said
    found = re.search(r"^float32 +[\d.]+ +([\d.]+) ", said, re.M)[1]
    assert float(found) == pytest.approx(loss, abs=1e-4)


def test_large_numbers_stand_apart(tmp_path, model, monkeypatch, capsys):
    """On a text that it was not trained on, a model of few bits may be far worse."""
    more = itertools.count(0, 3)
    monkeypatch.setattr(quantize, "loss_of", lambda *args: loss_of(*args) + next(more))
    quantize.print_perplexities(model, data.cut(np.arange(64) % 9, 16))
    table = capsys.readouterr().out.splitlines()[1:-1]
    assert len(table) == 12 and all(len(line[24:].split()) == 4 for line in table)


def test_what_costs_nothing_does_not_rise_by_minus_zero(model, monkeypatch, capsys):
    losses = iter([1.0] + 10 * [1 - 1e-6] + [1 - 1e-3])
    monkeypatch.setattr(quantize, "loss_of", lambda *args: 0 * loss_of(*args) + next(losses))
    quantize.print_perplexities(model, data.cut(np.arange(64) % 9, 16))
    table = capsys.readouterr().out.splitlines()[1:-1]
    assert [line.split()[-1] for line in table] == 11 * ["0.00%"] + ["-0.10%"]


@pytest.mark.parametrize("sizes, got", [((), "none"), ((64, 3), "64, 3")])
def test_a_block_of_no_such_size_is_refused(sizes, got):
    with pytest.raises(ValueError, match=f"among 32, 64, 128, 256, .*, 4096; got {got}$"):
        quantize.main(block_sizes=sizes)


def test_without_a_model_it_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"run pretrain.py first, or give --model"):
        quantize.main()


def test_a_masked_model_has_no_perplexity(tmp_path):
    bert = Transformer(Config.bert(258, 16, layers=1, heads=2, width=8, hidden=8))
    huggingface.save_model(bert, tmp_path / "model")
    with pytest.raises(ValueError, match="perplexity needs a causal model"):
        quantize.main(tmp_path / "model")


def test_a_quantized_model_is_not_quantized_once_more(tmp_path, model):
    made = quantize_model(huggingface.load_model(model), "llm.int8")
    bitsandbytes.save_model(made, tmp_path / "codes", data.ByteTokenizer())
    with pytest.raises(ValueError, match="codes is quantized already: give the folder"):
        quantize.main(tmp_path / "codes", (64,), str(tmp_path / "text.txt"))
