"""Score a model's answers by texts that are right, with every metric that fits them.

    python scripts/evaluate.py --data mine.jsonl                   # the newest model answers
    python scripts/evaluate.py --data mine.jsonl --adapter runs/finetune-lora-1/adapter
    python scripts/evaluate.py --data answered.jsonl               # answers that are there already

A file has a JSON object a line. Records are as for finetune.py: an instruction, perhaps a context,
the output that is right, and perhaps other references that are right too. A line with an `answer`
needs no instruction, and no model runs.

The model gives the likeliest tokens, so the same command gives the same answers. Prints for each
task of the file the scores with their 95 % intervals by examples, and leaves a folder
runs/evaluate-N: result.json with the same numbers, and answers.jsonl, which this program scores
again. What each metric counts is said in minilm/measure/text/.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minilm import data
from minilm.command import Given, command, many
from minilm.data.answered import to_lines
from minilm.files import FormatError, sha256, write_atomically, write_json
from minilm.loop import refuse_unused
from minilm.measure.answers import answers
from minilm.measure.text import perplexity
from minilm.measure.text.scores import Score, scored, scores
from minilm.measure.text.tokens import mean
from minilm.ranges import check, optional, whole
from minilm.run import RunDirectory
from minilm.trained import load_trained

RANGES = {"most": optional(whole(1)), "seed": whole(0), "draws": whole(1)}
SHOWN = 3  # wrong answers of each task


def main(data: Path, model: Path | None = None, adapter: Path | None = None,
         most: int | None = None, seed: int = 0, draws: int = 1000, out: Path = Path("runs"),
         given: Given = frozenset()):
    """Score a model's answers by texts that are right.

    Args:
        data: a JSONL file of records or of answers.
        model: Hugging Face folder with a tokenizer.json; by default the one that the adapter names,
            or without an adapter the newest runs/*/model.
        adapter: folder of an adapter for the model: PEFT's, or one that finetune.py left.
        most: score so many examples, the first of the file; by default all.
        seed: of what the intervals draw.
        draws: how often they draw.
        out: the run gets a folder of its own in here.
        given: names of the options on the command line.
    """
    check(RANGES, most=most, seed=seed, draws=draws)
    examples, rows = examined(data, model, adapter, most, given)
    groups = {}
    for place, example in enumerate(examples):
        groups.setdefault(example.task or "records", []).append(place)
    found = {}
    for task, places in groups.items():
        some = [examples[place] for place in places]
        found[task] = judged(task, some, rows and [rows[place] for place in places], seed, draws)
        show(task, some, *found[task])
    settings = {"data": str(data), "model": model and str(model),
                "adapter": adapter and str(adapter), "most": most, "seed": seed, "draws": draws}

    def fill(folder: Path):
        write_json(folder / "result.json", settings | {"tasks": {
            task: told(groups[task], *of_task) for task, of_task in found.items()}})
        write_atomically(folder / "answers.jsonl", to_lines(examples))

    sources = [{"name": str(data), "sha256": sha256(data)}]
    run = RunDirectory.create(out, "evaluate", settings, sources, fill=fill)
    print(f"\n{run.path}: result.json, answers.jsonl")


def examined(path: Path, model, adapter, most, given):
    """(the answers, the rows of their outputs' perplexity, or None if no model was asked).

    ValueError for conversations, and for records that are too long for the model.
    """
    if data.holds_answers(path):
        refuse_unused(given, ("model", "adapter"), f"{path} has answers already")
        return data.load_answered(path)[:most], None
    if data.holds_conversations(path):
        raise FormatError(path, "holds conversations, which have no answer that alone is right; "
                                "expected records")
    records = data.load_records(path)[:most]
    folder, transformer = load_trained(model, adapter, job="gives answers")
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    data.adopt_end(tokenizer, transformer.ends.eos)
    rows = perplexity.per_example(transformer, records, tokenizer)  # refuses what is too long
    return data.answered(records, answers(transformer, records, tokenizer)), [*rows]


def judged(task: str, examples, rows, seed: int, draws: int):
    """({metric: Score}, {metric that does not fit: why}) of a task's answers."""
    watch = partial(tqdm, desc=f"{task}: metrics", leave=False, disable=None)
    found, why = scores([example.answer for example in examples],
                        [example.right for example in examples], seed, draws, watch)
    if task == "sql":
        found["execution, %"] = executed(examples, seed, draws)
    if rows is not None:
        found["perplexity of the outputs"] = scored(np.array(rows), perplexity.of_sums, seed, draws)
    return found, why


def executed(examples, seed: int, draws: int) -> Score:
    """Per cent of the queries that find what the right ones find (Zhong et al. 2017,
    arXiv:1709.00103, section 4: execution accuracy)."""
    watch = tqdm(examples, "sql: queries", leave=False, disable=None)
    rows = np.array([(data.score(example, example.answer), 1) for example in watch], float)
    return scored(rows, lambda sums: 100 * mean(sums), seed, draws)


def show(task: str, examples, found: dict[str, Score], why: dict[str, str]):
    """Print a task's scores, what does not fit, and some answers that are wrong."""
    print(f"\n{data.printable(task)}: {many(len(examples), 'answer')}\n"
          f"{'':26}{'score':>9}    95 % interval by examples")
    for name, (value, low, high) in found.items():
        print(f"{name:26}{value:9.3f}    {low:.3f} to {high:.3f}")
    for name, reason in why.items():
        print(f"{name}: left out, {reason}")
    wrong = [example for example in examples if example.answer not in example.right]
    for example in wrong[:SHOWN]:
        print(f"wrong: {example.answer[:70]!r}\n"
              f"right: {example.output[:70]!r}")


def told(places, found: dict[str, Score], why: dict[str, str]) -> dict:
    """A task's part of result.json; what is not finite becomes null."""
    return {"examples": len(places), "scores": {
        name: {part: value if math.isfinite(value) else None
               for part, value in score._asdict().items()} for name, score in found.items()},
        "left out": why}


if __name__ == "__main__":
    command(main)
