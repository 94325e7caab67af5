"""scripts/evaluate.py as its user meets it: scores of files, of a model's answers, and errors."""

import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.answered import Answered, to_lines
from minilm.files import FormatError, read_json
from minilm.interop import huggingface, load_model, peft
from minilm.measure.answers import answers
from minilm.measure.losses import loss_of
from minilm.measure.text.scores import overlap
from minilm.peft import add_lora, merge_lora, unload_lora
from minilm.transformer import Config, Transformer

RECORDS = [
    data.Record("Say", "it", "The cat is on the mat.", ("On the mat is the cat.",), "say"),
    data.Record("Say", "so", "A dog is here.", task="say"),
    *(data.Record("Judge", f"{n}", "yes" if n % 2 else "no", task="judge") for n in range(4)),
    data.Record("SQL", "Where is Rome?", "SELECT country FROM cities WHERE name = 'Rome'",
                task="sql"),
]


@pytest.fixture
def folder(tmp_path):
    """The folder of a model of bytes whose every number counts, and a file of records."""
    model = Transformer(Config.gpt2(258, 96, layers=1, heads=2, width=16), seed=1)
    rng = np.random.default_rng(0)
    for _, tensor in model.named_tensors():
        tensor.data += rng.normal(0, 0.3, tensor.shape).astype(np.float32)
    huggingface.save_model(model, tmp_path / "model")
    data.ByteTokenizer().save(tmp_path / "model" / "tokenizer.json")
    data.save_records(tmp_path / "mine.jsonl", RECORDS)
    return tmp_path


def scores_of(run):
    return {task: {name: score["value"] for name, score in part["scores"].items()}
            for task, part in read_json(run / "result.json")["tasks"].items()}


def test_a_models_answers_are_scored_and_can_be_scored_again(folder, capsys):
    evaluate.main(folder / "mine.jsonl", folder / "model", draws=20, out=folder / "runs")
    first, said = folder / "runs" / "evaluate-1", capsys.readouterr().out
    model, tokenizer = load_model(folder / "model"), data.ByteTokenizer()
    expected = answers(model, RECORDS, tokenizer)
    kept = data.load_answered(first / "answers.jsonl")
    assert kept == data.answered(RECORDS, expected)
    found = scores_of(first)
    assert [*found] == ["say", "judge", "sql"]
    for name, value in overlap(expected[:2], [[*(r.output, *r.references)] for r in RECORDS[:2]]
                               ).items():
        assert found["say"][name] == value
    loss = loss_of(model, *data.encode(RECORDS[:2], tokenizer))
    assert found["say"]["perplexity of the outputs"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["sql"]["execution, %"] == 0 and "Matthews" in found["judge"]
    assert "judge: 4 answers" in said and "left out, no reference has four tokens" in said
    assert f"{found['say']['NIST']:.3f}" in said and "right: 'A dog is here.'" in said

    evaluate.main(folder / "mine.jsonl", folder / "model", draws=20, out=folder / "runs")
    evaluate.main(first / "answers.jsonl", draws=20, out=folder / "runs")
    again, without = (read_json(folder / "runs" / f"evaluate-{n}" / "result.json") for n in (2, 3))
    assert again == read_json(first / "result.json")
    for task, part in again["tasks"].items():
        part["scores"].pop("perplexity of the outputs")
        assert without["tasks"][task] == part


def test_an_adapter_answers_in_its_base(folder):
    model = load_model(folder / "model")
    add_lora(model, 2, 4.0)
    rng = np.random.default_rng(1)
    for parameter in model.parameters():
        parameter.data += rng.normal(0, 0.5, parameter.shape).astype(np.float32)
    peft.save_adapter(model, folder / "adapter", base=str(folder / "model"))
    evaluate.main(folder / "mine.jsonl", adapter=folder / "adapter", most=3, draws=5,
                  out=folder / "runs")
    kept = data.load_answered(folder / "runs" / "evaluate-1" / "answers.jsonl")
    unload_lora(merge_lora(model))
    assert [one.answer for one in kept] == answers(model, RECORDS[:3], data.ByteTokenizer())
    assert [one.answer for one in kept] != answers(load_model(folder / "model"), RECORDS[:3],
                                                   data.ByteTokenizer())


def test_answers_of_anybody_are_scored(tmp_path, monkeypatch, capsys):
    """Each of the texts that are right counts, and queries count by what they find."""
    monkeypatch.chdir(tmp_path)
    found = [Answered("On the mat is the cat.", "The cat is on the mat.",
                      ("On the mat is the cat.",)),
             Answered("", "Nothing is said."),
             Answered("SELECT country FROM cities WHERE name = 'Rome' LIMIT 9",
                      "SELECT country FROM cities WHERE name = 'Rome'", task="sql")]
    Path("a.jsonl").write_bytes(to_lines(found))
    tyro.cli(evaluate.main, args=["--data", "a.jsonl", "--draws", "9"])
    values = scores_of(Path("runs/evaluate-1"))
    assert values["records"]["exact match, %"] == 50 and values["sql"]["execution, %"] == 100
    assert values["sql"]["exact match, %"] == 0
    assert "perplexity of the outputs" not in values["records"]
    assert "wrong: ''" in capsys.readouterr().out


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)


@given(st.lists(st.builds(Answered, st.just("") | texts, texts, st.lists(texts, max_size=2).map(
    tuple), st.just("") | texts, st.just("") | texts), min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("answers") / "a.jsonl"
    path.write_bytes(to_lines(found))
    assert data.load_answered(path) == found and data.holds_answers(path)
    assert all(one.right == (one.output, *one.references) for one in found)


GOOD = {"answer": "a", "output": "b"}


@pytest.mark.parametrize("line, said", [
    ("", "holds no record"), ("\n", "line 1: not valid JSON"), ("{", "line 1: not valid"),
    ({"answer": "a"}, "line 1: output: the field is missing"),
    (GOOD | {"answer": 1}, "line 1: answer: expected str, got int"),
    (GOOD | {"output": ""}, "line 1: output: the text is empty"),
    (GOOD | {"output": None}, "line 1: output: expected str, got NoneType"),
    (GOOD | {"references": "c"}, "line 1: references: expected a list, got str"),
    (GOOD | {"references": [""]}, "line 1: references: the text is empty"),
    (GOOD | {"references": [1]}, "line 1: references: expected str, got int"),
    (GOOD | {"x": 1}, "line 1: 'x': the field is unknown"),
    (json.dumps(GOOD) + "\n[]", "line 2: expected an object, got list"),
    (json.dumps(GOOD) + '\n{"output": "b"}', "line 2: answer: the field is missing"),
    (json.dumps(GOOD) + '\n{"answer": "\\ud800", "output": "b"}', "line 2: "),
    ({"instruction": "a"}, "line 1: output: the field is missing"),
    ({"messages": []}, "holds conversations"),
])
def test_what_is_wrong_with_a_file_is_said(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(FormatError, match=rf"a\.jsonl: (?:{said})"):
        evaluate.main(path, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_is_refused(folder):
    path = folder / "mine.jsonl"
    (folder / "a.jsonl").write_text(json.dumps(GOOD))
    long = folder / "long.jsonl"
    data.save_records(long, [data.Record("Say", "x" * 99, "y")])
    for (file, settings), error, said in (
            ((path, {"most": 0}), ValueError, "most must be at least 1, got 0"),
            ((path, {"draws": 0}), ValueError, "draws must be at least 1, got 0"),
            ((folder / "none.jsonl", {}), FileNotFoundError, "none.jsonl"),
            ((folder / "a.jsonl", {"model": folder / "model", "given": frozenset(["model"])}),
             ValueError, "model is given, but .*a.jsonl has answers already"),
            ((long, {"model": folder / "model"}), ValueError, "the model's context is 96"),
            ((path, {"model": folder / "no"}), OSError, "no")):
        with pytest.raises(error, match=said):
            evaluate.main(file, out=folder / "runs", **settings)
    assert not (folder / "runs").exists()
