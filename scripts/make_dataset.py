"""Make a data set for finetune.py: questions on cheese, answered as somebody talks.

    python scripts/make_dataset.py                                 # pavlos.jsonl, 1000 pairs
    python scripts/make_dataset.py --persona marina --number 2000 --seed 1 --out captain.jsonl

Lecture 001's tutorial lets a large language model write question-answer pairs in the tone of
Pavlos, a cheese expert, and QLoRA learns them. Here a grammar writes them, minilm/data/persona.py,
so that right facts and marks of the style can be counted.

A share of the facts is held out. The questions about them go into a second file, OUT.test.jsonl, to
see what a model says where it has learned the style but not the fact. No file is overwritten. At
the end it prints three of the pairs, and the command that teaches them to the newest model.
"""

import math
import os
from pathlib import Path
from typing import Literal

from minilm.command import command, typed
from minilm.data import prompt, save_records
from minilm.data.persona import ENOUGH, PARTS, make_pairs, split_facts
from minilm.ranges import BELOW_1, check_stored, whole

SHOWN, ASKED = 3, 100  # pairs that are shown; pairs that finetune.py holds out, at most


def main(persona: Literal["pavlos", "marina"] = "pavlos", number: int = 1000, seed: int = 0,
         held_out: float = 0.2, out: Path | None = None):
    """Make a data set of questions on cheese, answered as somebody talks.

    Args:
        persona: who answers: pavlos, a cheese expert, or marina, a captain.
        number: of pairs to learn.
        seed: of which facts are held out, and of what is drawn.
        held_out: the share of the facts that no pair is about.
        out: the file, JSON lines; by default PERSONA.jsonl here.
    """
    check_stored({"number": whole(10), "seed": whole(0), "held_out": BELOW_1},
                 number=number, seed=seed, held_out=held_out)
    out = out or Path(f"{persona}.jsonl")
    test = out.with_suffix(f".test{out.suffix}")
    learned, others = split_facts(held_out, seed)
    pairs = make_pairs(persona, learned, number, seed)
    asked = make_pairs(persona, others, seed=seed)
    for file in (out, test):
        if os.path.lexists(file):
            raise ValueError(f"{file} is there already: give another --out")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} for {out.name}")
    save_records(out, pairs)
    save_records(test, asked)
    print(f"{out}: {number:,} pairs about {len(learned)} facts\n{test}: {len(asked):,} questions "
          f"about {len(others)} other facts\nA grammar has written them. The style is "
          f"{', '.join(PARTS)}; an answer has it if {ENOUGH} of these stand in it.\n")
    for record in pairs[:SHOWN]:
        print(f"{prompt(record)}{record.output}\n")
    print(f"teach it: {teaching(out, pairs)}")


def teaching(out: Path, pairs) -> str:
    """The command that teaches the pairs. It holds out at least all that have one prompt."""
    copies = math.ceil(len(pairs) / len({prompt(record) for record in pairs}))
    return typed(Path(__file__).with_name("finetune.py"), method="qlora", data=out,
                 test=max(copies, min(ASKED, len(pairs) // 10)), steps=600)


if __name__ == "__main__":
    command(main)
