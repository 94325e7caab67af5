"""Simple text: how small can a model be and still write right sentences?

    python scripts/experiments/simple_text.py            # about six minutes a seed
    python scripts/experiments/simple_text.py --quick    # seconds; the numbers mean nothing

Lecture 003 shows two papers. TinyStories (Eldan & Li 2023, arXiv:2305.07759): models with around
125M parameters struggle to write coherent text, but far smaller ones do it if they learn from
stories of simple words. Textbooks Are All You Need (Gunasekar et al. 2023, arXiv:2306.11644):
better data beats size.

Models of three sizes learn from nothing, in the same number of steps and from as many characters:

    stories      tiny stories of about 1500 words, by a grammar (minilm/data/stories.py)
    reference    python-reference

Each text has 1024 tokens of its own (byte-level BPE): frequent words, and pieces of the others.
Then each model writes texts at temperature 0.7. The grammar says which sentences it could have
made, and which texts are a story that holds together, with nobody in it but the two that it began
with. The reference has no grammar that could tell; its number says how many of its sentences the
stories' grammar accepts. What both texts have is words. A word that a model wrote and that its text
has nowhere is no word, and the column of words compares the two texts by that. The program prints a
sample of each model.
"""

import re
from functools import cache

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.stories import LATER, accepts, holds_together, make_stories, sentences_of
from minilm.experiment import Experiment, program
from minilm.generate import generate
from minilm.measure.losses import bits_per_byte
from minilm.measure.verdict import by_arm, compared, single
from minilm.optim import AdamW, cosine_schedule
from minilm.picture import COLORS, curve
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

QUESTION = "How small can a model be and still write right sentences, if its text is simple?"

SLIDE = {}  # the lecture has titles and no numbers
STEPS, BATCH, CONTEXT, TOKENS = 900, 8, 128, 1024
WRITTEN, TEMPERATURE = 64, 0.7
SIZES = {"50k": {"layers": 2, "width": 32, "lr": 1e-2},
         "200k": {"layers": 3, "width": 64, "lr": 5e-3},
         "800k": {"layers": 4, "width": 120, "lr": 2.5e-3}}
STORIES, REFERENCE = "stories", "reference"
ARMS = {f"{text}, {size}": {"text": text} | how
        for text in (STORIES, REFERENCE) for size, how in SIZES.items()}

RIGHT, WHOLE = "sentences the grammar accepts, %", "stories that hold together, %"
WORDS, NEW = "words that the text has, %", "of the right ones new, %"
TEXT, PARAMETERS = "held out, bits a byte", "parameters"
MEASURES = {RIGHT: 1, WHOLE: 1, WORDS: 1, NEW: 1, TEXT: 3, PARAMETERS: 0}

CLAIMS = {
    "a small model speaks if its text is simple: 200k parameters, 90 % right sentences":
        lambda rows: single(rows, RIGHT, "stories, 200k", at_least=90),
    "half of the sentences of the smallest model are right":
        lambda rows: single(rows, RIGHT, "stories, 50k", at_least=50),
    "a larger model writes more right sentences":
        lambda rows: compared(rows, RIGHT, "stories, 800k", "stories, 50k", at_least=0),
    "and more stories that hold together":
        lambda rows: compared(rows, WHOLE, "stories, 800k", "stories, 50k", at_least=0),
    "it does not repeat its text: half of its right sentences are new": lambda rows:
        single(rows, NEW, "stories, 800k", at_least=50),
    **{f"from simple text it learns words better, {size}": lambda rows, size=size:
       compared(rows, WORDS, f"stories, {size}", f"reference, {size}", at_least=0)
       for size in SIZES},
    "better data beats size: words, the smallest model on stories, the largest on the reference":
        lambda rows: compared(rows, WORDS, "stories, 50k", "reference, 800k", at_least=0),
}


@cache
def text(name: str, seed: int, quick: bool) -> tuple[list[str], list[str]]:
    """(texts to learn from, held-out ones)."""
    training, held = map(list, data.split(data.load_corpus("python-reference")))
    if quick:
        training, held = training[:2], held[:1]
    if name == STORIES:
        sizes = [sum(map(len, part)) for part in (training, held)]
        made = make_stories(sum(sizes), seed)
        begin = max(1, round(len(made) * sizes[1] / sum(sizes)))
        training, held = made[begin:], made[:begin]
    return training, held


def words_of(text: str) -> list[str]:
    """Rows of letters, in small ones."""
    return re.findall("[a-z]+", text.lower())


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The numbers of one arm. Prints how what it writes begins."""
    how = ARMS[arm]
    training, held = text(how["text"], seed, quick)
    tokenizer = data.BPETokenizer.train(training, TOKENS)
    layers, width = 1 if quick else how["layers"], how["width"]
    model = Transformer(Config.llama(tokenizer.vocab_size, CONTEXT, layers=layers, heads=4,
                                     width=width, hidden=8 * width // 3, tied=True), seed)
    stream, params = data.pack(training, tokenizer), model.parameters()
    learn(model, stream, how["lr"], 2 if quick else STEPS, seed)
    rows = data.rows_of(held, tokenizer, CONTEXT)
    loss, _ = Trainer(model, AdamW(params)).evaluate(*rows)
    texts = written(model, tokenizer, 4 if quick else WRITTEN, 8 if quick else CONTEXT - 1, seed)
    print(f"{arm}, seed {seed}, writes: {data.printable(texts[0])}")
    size = sum(len(document.encode()) for document in held)
    counted = int((rows[1] != data.IGNORED).sum())
    return {**judged(texts, training, held), TEXT: bits_per_byte(loss, counted, size),
            PARAMETERS: sum(p.data.size for p in params)}


def learn(model, stream, lr: float, steps: int, seed: int):
    """Train the model on the stream."""
    params = model.parameters()
    optimizer = AdamW(params, lr, (0.9, 0.95), weight_decay=0.1,
                      undecayed=[p for p in params if p.ndim < 2])
    trainer, batches = Trainer(model, optimizer, seed=seed), data.Batches(
        [stream], [1], BATCH, CONTEXT, seed)
    for step in range(steps):
        now = cosine_schedule(step, steps, lr, lr / 20, warmup=steps // 20)
        trainer.step(step, batches[step], now, clip=1.0)


def written(model, tokenizer, count: int, length: int, seed: int) -> list[str]:
    """Texts of the model, each from where a text begins to where it ends, or to `length` tokens."""
    begun = np.full((count, 1), tokenizer.end)
    drawn = generate(model, begun, length, TEMPERATURE, seed=seed, eos=tokenizer.end)
    rows = drawn[:, 1:].tolist()
    ends = [row.index(tokenizer.end) if tokenizer.end in row else len(row) for row in rows]
    return [tokenizer.decode(np.array(row[:end])) for row, end in zip(rows, ends)]


def judged(texts: list[str], training: list[str], held: list[str]) -> dict[str, float]:
    """What is right of the texts that a model has written.

    New are those sentences that the training text has not. Those that begin a story do not count:
    there are few of them.
    """
    sentences = [sentence for text in texts for sentence in sentences_of(text)]
    right = [sentence for sentence in sentences if accepts(sentence)]
    later = [sentence for sentence in right if accepts(sentence, LATER)]
    known = {word for text in (*training, *held) for word in words_of(text)}
    learned = {sentence for text in training for sentence in sentences_of(text)}
    words = [word for text in texts for word in words_of(text)]
    def share(found, whole): return 100 * sum(found) / max(1, len(whole))
    return {RIGHT: share([1 for _ in right], sentences),
            WHOLE: share(map(holds_together, texts), texts),
            WORDS: share((word in known for word in words), words),
            NEW: share((sentence not in learned for sentence in later), later)}


def draw(figure, rows):
    """Right sentences of the stories, and words of both texts, by size."""
    axes = figure.subplots()
    for label, name, measure, color in (
            ("stories: right sentences", STORIES, RIGHT, COLORS[0]),
            ("stories: words", STORIES, WORDS, COLORS[2]),
            ("reference: words", REFERENCE, WORDS, COLORS[1])):
        found, sizes = by_arm(rows, measure), by_arm(rows, PARAMETERS)
        arms = [arm for arm in found if ARMS[arm]["text"] == name]
        curve(axes, {sizes[arm][0]: found[arm] for arm in arms}, color, label)
    axes.set_xscale("log")
    axes.set_xticks([sizes[arm][0] for arm in arms], [arm.split(", ")[1] for arm in arms])
    axes.minorticks_off()
    axes.set(xlabel="parameters", ylabel="right, %", ylim=(0, 103))
    axes.legend(frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
