"""Cleaning and what it is good for: a text full of planted trouble, raw, filtered, without copies.

    python scripts/experiments/cleaner_text.py            # about six minutes a seed
    python scripts/experiments/cleaner_text.py --quick    # seconds; the numbers mean nothing

Lecture 004 says that deduplication is crucial "to avoid imbalance distribution, improve
performance, reduce training steps needed (especially large models)", and names quality filtering
before it. Lecture 003 shows Textbooks Are All You Need (Gunasekar et al. 2023,
arXiv:2306.11644): a smaller model that is better by better data.

Here good text, the prose of the standard library's docstrings, is 40 % of a heap. 30 % are copies
of two documents or three, which stand 64 times each, every second time with some words changed. 30
% are boilerplate, other languages and noise (minilm/data/cleaning/planted.py). A small model learns
from nothing

    raw            the heap
    filtered       what the stages of clean.py leave of it: language, repetition, quality, lines ...
    deduplicated   the heap without near copies (MinHash)
    both           first the one, then the other

with the same number of steps, and is asked for good text that was held out. So it meets the text
that is left more often. A large model learns the raw and the deduplicated heap, too.

The memorised share is measured on passages of good text that stand once in the heap, and on such
as stand 64 times: how many of them the model, after 64 bytes, continues for 32 bytes word for word,
if it always takes the likeliest byte (Lee et al. 2022, arXiv:2107.06499; Carlini et al. 2022,
arXiv:2202.07646).
"""

import re
from functools import cache

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.cleaning.duplicates import MinHash, bands, groups, shingles
from minilm.data.cleaning.funnel import Funnel
from minilm.data.cleaning.planted import GOOD, Page, planted
from minilm.data.cleaning.stages import make_stages
from minilm.experiment import Experiment, program
from minilm.generate import generate
from minilm.measure.losses import bits_per_byte
from minilm.measure.verdict import by_arm, by_seed, compared, verdict
from minilm.optim import AdamW, cosine_schedule
from minilm.picture import COLORS
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

QUESTION = "What does a model gain if its text is cleaned, and is that more than size?"

SLIDE = {}  # the lectures have no number for it
STEPS, BATCH, CONTEXT = 800, 8, 128
DOCUMENTS, HELD, LETTERS = 150, 40, 700  # good documents, those held out, least characters of one
TIMES, QUICK_TIMES = 64, 8  # how often a document with copies stands in the heap
BEGIN, REST = 64, 32  # bytes that are given, and that are to be continued

RAW, FILTERED, DEDUPLICATED, BOTH = "raw", "filtered", "deduplicated", "both"
SHORT, LARGE, LARGE_DEDUPLICATED = "deduplicated, 2/3 of the steps", "raw, large model", \
    "deduplicated, large model"
SMALL = {"width": 64, "lr": 5e-3}
BIG = {"width": 128, "lr": 2.5e-3}
ARMS = {
    RAW: SMALL | {"heap": RAW}, FILTERED: SMALL | {"heap": FILTERED},
    DEDUPLICATED: SMALL | {"heap": DEDUPLICATED}, BOTH: SMALL | {"heap": BOTH},
    SHORT: SMALL | {"heap": DEDUPLICATED, "steps": STEPS * 2 // 3},
    LARGE: BIG | {"heap": RAW}, LARGE_DEDUPLICATED: BIG | {"heap": DEDUPLICATED},
}
TEXT = "held-out good text, bits a byte"
ONCE, MANY = "memorised: stood once, %", f"stood {TIMES} times, %"
SIZE, FIT, LOST = "text learned, kB", "good and no copy, %", "good documents lost, %"
PARAMETERS = "parameters"
MEASURES = {TEXT: 3, MANY: 1, ONCE: 1, SIZE: 0, FIT: 1, LOST: 1, PARAMETERS: 0}


def gains(rows) -> list[float]:
    """For each seed the bits that the large model gains by deduplication beyond the small one."""
    return [(a - b) - (c - d) for a, b, c, d in
            by_seed(rows, TEXT, (LARGE, LARGE_DEDUPLICATED, RAW, DEDUPLICATED))]


CLAIMS = {
    "deduplication improves the model":
        lambda rows: compared(rows, TEXT, DEDUPLICATED, RAW, at_most=0),
    "it needs fewer steps for the same: two thirds are enough":
        lambda rows: compared(rows, TEXT, SHORT, RAW, at_most=0),
    "a large model gains more by it than a small one":
        lambda rows: verdict(gains(rows), f"gain of the large - of the small: {TEXT}", at_least=0),
    "raw text that comes many times is memorised more than what comes once":
        lambda rows: verdict([row[MANY] - row[ONCE] for row in rows if row["arm"] == LARGE],
                             f"{LARGE}: {MANY} - once", at_least=0),
    "after deduplication less of it is memorised":
        lambda rows: compared(rows, MANY, LARGE_DEDUPLICATED, LARGE, at_most=0),
    "filtering improves the model":
        lambda rows: compared(rows, TEXT, FILTERED, RAW, at_most=0),
    "both are better than filtering alone":
        lambda rows: compared(rows, TEXT, BOTH, FILTERED, at_most=0),
    "both are better than deduplication alone":
        lambda rows: compared(rows, TEXT, BOTH, DEDUPLICATED, at_most=0),
    "better data beats size: the small model on clean text, the large one on raw text":
        lambda rows: compared(rows, TEXT, BOTH, LARGE, at_most=0),
}


@cache
def prose(corpus: str) -> tuple[str, ...]:
    """Documents of paragraphs of prose, a line each, no two with a paragraph in common."""
    seen, documents = set(), [[]]
    for text in data.load_corpus(corpus).documents:
        for part in text.split("\n\n"):
            line = " ".join(part.split())
            if re.match("[A-Z]", part) and line.endswith(".") and len(line) > 100 and \
                    line not in seen:
                seen.add(line)
                documents[-1].append(line)
                if sum(map(len, documents[-1])) >= LETTERS:
                    documents.append([])
    return tuple(map("\n".join, documents[:-1]))


@cache
def heaps(seed: int, quick: bool) -> tuple[list[str], dict[str, list[Page]]]:
    """(good documents that are held out, the pages of each heap)."""
    rng = np.random.default_rng(seed)
    count, held = (20, 2) if quick else (DOCUMENTS, HELD)
    found = prose("python-reference" if quick else "python-docstrings")
    drawn = [found[i] for i in rng.permutation(len(found))[: count + held]]
    raw = planted(drawn[held:], rng, times=[QUICK_TIMES if quick else TIMES])
    clean = filtered(raw)
    return drawn[:held], {RAW: raw, FILTERED: clean, DEDUPLICATED: without_copies(raw),
                          BOTH: without_copies(clean)}


def filtered(pages: list[Page]) -> list[Page]:
    """What the stages of clean.py leave of each page."""
    funnel = Funnel(make_stages())
    left = [page._replace(text=funnel(page.kind, page.text)) for page in pages]
    return [page for page in left if isinstance(page.text, str)]


def without_copies(pages: list[Page]) -> list[Page]:
    """The first page of each group of near copies."""
    def members(i): return shingles(pages[i].text)
    sign = MinHash()
    hashes = np.array([bands(sign(members(i))) for i in range(len(pages))])
    first = groups(hashes, members)
    return [page for i, page in enumerate(pages) if first[i] == i]


def passages(pages: list[Page], times: int, most: int = 100) -> np.ndarray:
    """Bytes of good documents that stand so often, one passage after another: at most
    (most, BEGIN + REST)."""
    count = np.bincount([page.source for page in pages if page.source >= 0])
    length, rows = BEGIN + REST, []
    for page in pages:
        if page.kind == GOOD and count[page.source] == times:
            text = np.frombuffer(page.text.encode(), np.uint8)
            rows.append(text[: len(text) // length * length].reshape(-1, length))
    return np.concatenate(rows)[:most].astype(np.int32)


def memorised(model, rows: np.ndarray) -> float:
    """Per cent of the rows that the model continues word for word."""
    said = generate(model, rows[:, :BEGIN], REST, temperature=0, eos=())
    return float(100 * (said == rows).all(1).mean())


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The numbers of one arm."""
    how = ARMS[arm]
    steps, lr, width = 2 if quick else how.get("steps", STEPS), how["lr"], how["width"]
    held, of = heaps(seed, quick)
    pages, tokenizer = of[how["heap"]], data.ByteTokenizer()
    stream = data.pack([page.text for page in pages], tokenizer)
    model = Transformer(Config.llama(tokenizer.vocab_size, CONTEXT, layers=1 if quick else 4,
                                     heads=4, width=width, hidden=8 * width // 3), seed)
    params = model.parameters()
    optimizer = AdamW(params, lr, (0.9, 0.95), weight_decay=0.1,
                      undecayed=[p for p in params if p.ndim < 2])
    trainer = Trainer(model, optimizer, seed=seed)
    batches = data.Batches([stream], [1], BATCH, CONTEXT, seed)
    for step in range(steps):
        now = cosine_schedule(step, steps, lr, lr / 20, warmup=steps // 20)
        trainer.step(step, batches[step], now, clip=1.0)
    rows = data.rows_of(held, tokenizer, CONTEXT)
    loss, _ = trainer.evaluate(*rows)
    counted = int((rows[1] != data.IGNORED).sum())
    kept = {page.source: len(page.text) for page in pages if page.source >= 0}
    most = 4 if quick else 100
    return {TEXT: bits_per_byte(loss, counted, sum(len(text.encode()) for text in held)),
            **{name: memorised(model, passages(of[RAW], times, most))
               for name, times in ((MANY, QUICK_TIMES if quick else TIMES), (ONCE, 1))},
            SIZE: len(stream) / 1e3, FIT: 100 * sum(kept.values()) / len(stream),
            LOST: 100 * (1 - len(kept) / (len({p.source for p in of[RAW]}) - 1)),
            PARAMETERS: sum(p.data.size for p in params)}


def draw(figure, rows):
    """Held-out bits and the memorised share of each arm: a dot for each seed."""
    both = figure.subplots(1, 2, sharey=True)
    for axes, measure, label in zip(both, (TEXT, MANY), (
            "held-out good text,\nbits a byte", f"memorised of what\nstood {TIMES} times, %")):
        found = by_arm(rows, measure)
        for i, arm in enumerate(names := [*found][::-1]):
            axes.plot(found[arm], [i] * len(found[arm]), "o", color=COLORS["large" in arm],
                      markersize=4, markeredgewidth=0)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel=label)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
