"""What a model answers to instructions."""

from itertools import islice

import numpy as np
from tqdm import tqdm

from minilm import data
from minilm.generate import stream


def answers(model, records, tokenizer) -> list[str]:
    """What the model writes after each prompt until it ends, taking the likeliest token each time.
    """
    prompts = [tokenizer.prompt(data.prompt(record)) for record in records]
    longest = max(len(tokenizer.encode(record.output)) for record in records) + 1
    found = {}
    sizes = sorted({len(prompt) for prompt in prompts})  # prompts of one length make a batch
    for size in tqdm(sizes, "answers", unit="batch", leave=False, disable=None):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == size]
        ended, drawn = np.zeros(len(rows), bool), []
        for ids in islice(stream(model, [prompts[i] for i in rows], 0), longest):
            drawn.append(ids)
            ended |= ids == tokenizer.end
            if ended.all():
                break
        for i, ids in zip(rows, np.transpose(drawn)):
            end = np.flatnonzero(ids == tokenizer.end)
            found[i] = tokenizer.decode(ids[: end[0]] if len(end) else ids)
    return [found[i] for i in range(len(records))]
