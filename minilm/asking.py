"""What a policy is asked, and which answers are compared: of pieces of text, or of a file."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minilm import data
from minilm.align import Ranked, draw_answers, laid_out, ranking_loss
from minilm.data.preferences import Comparison, ranked
from minilm.files import FormatError
from minilm.tensorfiles import read_tensors, write_tensors

DRAWN = 256  # answers that are drawn together
MADE = "comparisons.safetensors"
PARTS = ("compared", "compared_held_out")


class Asked(NamedTuple):
    """What is learned from, and what is held out."""

    prompts: list  # tokens (P,) each
    held_out: list
    compared: Ranked | None = None
    compared_held_out: Ranked | None = None


def pieces(texts, tokenizer, length: int, count: int | None, seed: int) -> list[np.ndarray]:
    """Pieces of `length` tokens of texts: `count` at random places, or all that lie in a row."""
    stream = data.pack(texts, tokenizer)
    if len(stream) < length:
        raise ValueError(f"the text has {len(stream)} tokens, too few for a prompt of {length}")
    if count is None:
        starts = np.arange(0, len(stream) - length + 1, length)
    else:
        starts = np.random.default_rng([seed, 8]).integers(0, len(stream) - length + 1, count)
    return [stream[start : start + length] for start in starts]


def encoded(comparisons: list[Comparison], tokenizer) -> Ranked:
    """The comparisons of a file as tokens; each answer has the tokenizer's end."""
    def ended(text): return np.append(tokenizer.encode(text), tokenizer.end)
    prompts = [tokenizer.prompt(c.prompt) for c in comparisons]
    answers = [(ended(c.chosen), ended(c.rejected)) for c in comparisons]
    return laid_out(prompts, answers, tokenizer.end)


def require_readable(comparisons: list[Comparison], s, model, tokenizer):
    """ValueError, with the line of the file, for a text that the tokenizer does not know, or that
    does not fit the model: an answer of the file, or one of the model's own."""
    for number, c in enumerate(comparisons, 1):
        try:
            asked = len(tokenizer.prompt(c.prompt))
            require_room(model, s.tokens, asked)
            if s.method in ("reward", "dpo"):
                longer = max(len(tokenizer.encode(text)) for text in (c.chosen, c.rejected))
                require_room(model, 0, asked + longer + 1)  # and the end
        except ValueError as error:
            raise ValueError(f"{s.data}: line {number}: {error}") from error


def compared(model, prompts, score, s, end: int | None, seed) -> Ranked:
    """Comparisons of what the model itself answers to the prompts, by settings of Aligning.

    score(tokens, counted): the gold score, which ranks them with noise, see data.preferences.
    seed: a list of whole numbers.
    """
    asked, drawn, K = [p for p in prompts for _ in range(s.answers)], [], s.answers
    width = max(map(len, prompts))
    for i in tqdm(range(0, len(asked), DRAWN), "answers to compare", leave=False, disable=None):
        drawn.append(draw_answers(model, asked[i : i + DRAWN], s.tokens, end, [*seed, i], width))
    tokens, counted = (np.concatenate(parts) for parts in zip(*drawn))
    scores, rng = score(tokens, counted).reshape(-1, K), np.random.default_rng([*seed, 11])
    found = Ranked(*(a.reshape(-1, K, a.shape[1]) for a in (tokens, counted)))
    return found.put_in_order(np.stack([ranked(row, s.sharpness, rng) for row in scores]))


def judged(rewards) -> dict[str, float]:
    """Loss of rewards (M, K), the best answer first, and the share of pairs in the right order; one
    whose rewards are equal counts half."""
    K = rewards.shape[1]
    gaps = np.stack([rewards[:, a] - rewards[:, b] for a in range(K) for b in range(a + 1, K)])
    return {"right": float((np.sign(gaps) + 1).mean() / 2),
            "loss": float(ranking_loss(rewards).data)}


def keep_made(source, asked: Asked, folder: Path):
    """Write comparisons that were made of a corpus into a run's folder: drawing them takes long."""
    if isinstance(source, data.Corpus) and asked.compared:
        write_tensors(folder / MADE, {f"{part}.{name}": array for part in PARTS
                                      for name, array in getattr(asked, part)._asdict().items()})


def read_made(folder: Path, sizes, vocab: int) -> list[Ranked]:
    """What `keep_made` has written, to learn from and held out; [] if there is no such file.

    sizes: (M, K, T) of both. vocab: how many tokens there are. FormatError for anything else.
    """
    if not (file := folder / MADE).exists():  # the run is of an earlier version
        return []
    tensors, found = read_tensors(file), []
    for part, (M, K, T) in zip(PARTS, sizes):
        for name, kind, shape in zip(Ranked._fields, ("int64", "bool"), ((M, K, T), (M, K, T - 1))):
            array = tensors.get(f"{part}.{name}", np.empty(0))
            if (array.dtype, array.shape) != (kind, shape):
                raise FormatError(file, f"{part}.{name} is {array.dtype} {array.shape}, expected "
                                        f"{kind} {shape}")
        found.append(Ranked(*(tensors[f"{part}.{name}"] for name in Ranked._fields)))
        if not 0 <= found[-1].tokens.min() <= found[-1].tokens.max() < vocab:
            raise FormatError(file, f"{part}.tokens must be at least 0 and below {vocab}")
    return found


def asked_of(source, s, share: float, model, tokenizer, score, run: Path | None = None) -> Asked:
    """Prompts of a corpus or of comparisons, and what the settings' method compares of them.

    share: of a corpus, what is held out. The model answers prompts of a corpus, for comparisons
    that `score` makes. run: the folder of a run that goes on, which may have kept them. ValueError
    if too little is there, and if a text does not fit the model.
    """
    compares = s.method in ("reward", "dpo")
    if not isinstance(source, data.Corpus):
        if len(source) <= s.test:
            raise ValueError(f"{s.test} of the comparisons are held out, but {s.data} has "
                             f"{len(source)}: give a smaller --test")
        require_readable(source, s, model, tokenizer)
        parts = data.split_records(source, s.test, prompt=lambda c: c.prompt)
        prompts = [[tokenizer.prompt(text) for text in dict.fromkeys(c.prompt for c in part)]
                   for part in parts]
        return Asked(*prompts, *(encoded(part, tokenizer) for part in parts if compares))
    trained, held = data.split(source, share)
    require_room(model, s.tokens, s.prompt)
    some = pieces(trained, tokenizer, s.prompt, s.comparisons if compares else None, s.seed)
    asked = pieces(held, tokenizer, s.prompt, s.test, s.seed)
    if not compares:
        return Asked(some, asked)
    sizes = [(len(part), s.answers, s.prompt + s.tokens) for part in (some, asked)]
    made = run and read_made(run, sizes, model.config.vocab_size)
    return Asked(some, asked, *made or (
        compared(model, part, score, s, tokenizer.end, [s.seed, 10 + i])
        for i, part in enumerate((some, asked))))


def require_room(model, answer: int, length: int):
    """ValueError unless a text of this length, and an answer after it, fit the model."""
    if length + answer > model.room:
        after = f" and an answer of {answer}" * bool(answer)
        raise ValueError(f"a text of {length} tokens{after} must fit the model's context of "
                         f"{model.room}")
