"""Trials on tables that are to be put in words: E2E in small, with its columns.

    name: Anna's | food: soup | price: cheap | area: harbour  ->  a sentence that says so

Each table has four ways to say it, all of which are right. Of the 1536 tables there are, 1300 are
learned from. The metrics are counted as minilm/measure/text/ says: METEOR has no synonyms, and
ROUGE-L and CIDEr are COCO's, as E2E has them (Novikova et al. 2017, arXiv:1706.09254).
"""

import numpy as np

from minilm import data
from minilm.measure.answers import answers
from minilm.measure.text.scores import overlap
from minilm.trial import (
    KNOWN,
    LOSS,
    RIGHT,
    TRAINED,
    Trial,
    base,
    learned,
    loss_of_answers,
    old_text,
    records_of,
)

E2E_COLUMNS = ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")
SUMMARIES = {"ROUGE-1, %": 1, "ROUGE-2, %": 1, "ROUGE-L, %": 1}  # as SAMSum has them
COLUMNS = {"BLEU, %": 1, "NIST": 2, "METEOR, %": 1, "ROUGE-L of COCO, %": 1, "CIDEr-D": 2}
MEASURES = {RIGHT: 1, **COLUMNS, **SUMMARIES, LOSS: 3, KNOWN: 2, TRAINED: 0}
TABLE = {"tasks": ("table",), "words": data.tasks.ALL, "steps": 1000, "train": 1300}


def measured(s: Trial, run, title: str) -> dict:
    """The numbers of MEASURES."""
    train, test = records_of(s)
    model, tokenizer = base(s.model)
    model, trained, _ = learned(model, tokenizer, train, s, run, title)
    said = answers(model, test, tokenizer)
    found = overlap(said, [(record.output, *record.references) for record in test])
    found = {column: found[column] for column in (*COLUMNS, *SUMMARIES)}
    right = [data.score(record, answer) for record, answer in zip(test, said)]
    return {RIGHT: 100 * float(np.mean(right)), **found,
            LOSS: loss_of_answers(model, tokenizer, test), KNOWN: old_text(model, tokenizer, s),
            TRAINED: trained}
