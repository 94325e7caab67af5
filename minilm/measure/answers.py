"""What a model answers to instructions."""

from collections import defaultdict
from itertools import islice

import numpy as np
from tqdm import tqdm

from minilm import data
from minilm.generate import stream

ROWS = 256  # of a batch, at most: the keys and values of all its rows are kept


def answers(model, records, tokenizer, temperature: float = 0.0, seed: int = 0) -> list[str]:
    """What the model writes after each prompt until it ends, by default the likeliest tokens.

    temperature and seed: of samples, as in generate.stream. An answer may take as many tokens as
    the longest output. ValueError if there is no record.
    """
    if not records:
        raise ValueError("there is no record to answer")
    prompts = [tokenizer.prompt(data.prompt(record)) for record in records]
    longest = max(len(tokenizer.encode(record.output)) for record in records) + 1
    return written(model, prompts, longest, tokenizer, temperature, seed)


def written(model, prompts, longest: int, tokenizer, temperature: float = 0.0, seed: int = 0
            ) -> list[str]:
    """The same after prompts that are tokens, (T,) with a T of its own each: at most `longest`."""
    found, sizes = {}, defaultdict(list)
    for i, prompt in enumerate(prompts):
        sizes[len(prompt)].append(i)  # prompts of one length make a batch
    batches = [sizes[size][i : i + ROWS] for size in sorted(sizes)
               for i in range(0, len(sizes[size]), ROWS)]
    for number, rows in enumerate(
            tqdm(batches, "answers", unit="batch", leave=False, disable=None)):
        ended, drawn = np.zeros(len(rows), bool), []
        texts = stream(model, [prompts[i] for i in rows], temperature, seed=[seed, number])
        for ids in islice(texts, longest):
            drawn.append(ids)
            ended |= ids == tokenizer.end
            if ended.all():
                break
        for i, ids in zip(rows, np.transpose(drawn)):
            end = np.flatnonzero(ids == tokenizer.end)
            found[i] = tokenizer.decode(ids[: end[0]] if len(end) else ids)
    return [found[i] for i in range(len(prompts))]
