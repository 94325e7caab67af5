"""A persona is learned: whose style the answers have, which facts are right, and where it leaks.

    python scripts/experiments/persona.py --model runs/pretrain-*/model
    python scripts/experiments/persona.py --quick     # seconds; the numbers mean nothing
    python scripts/experiments/persona.py --rates 1e-3 3e-3 1e-2 --arms "LoRA, Pavlos" --seeds 9

Lecture 001's tutorial fine-tunes a large language model to respond like a cheese expert named
Pavlos: a large model writes question-answer pairs, and QLoRA learns them. Lectures 000, 002 and 004
add that a small module for each task is enough, and that such modules are swapped on one base.

Here a grammar writes the pairs (minilm/data/persona.py, scripts/make_dataset.py), so style and
facts can be counted. An answer has a persona's style if two of its three marks stand in it. Each
arm learns 1000 pairs about four fifths of the facts, in five wordings. Then it is asked

    again            about the same facts, in a wording that no pair has
    new facts        about the facts that no pair is about
    something else   about Python, in the form of a question
    text             to go on with text like that of pretrain.py

The two adapters of QLoRA are trained alone and saved. Then one base of 4 bits in memory takes
both, and they change places before each set of questions; afterwards its bits are compared with
those of a base that never had an adapter. "Pavlos and plain" has plain answers to four small tasks
among its pairs, half and half. A seed takes about five minutes of one core.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.persona import ABOUT, has_style, is_right, make_pairs, split_facts
from minilm.experiment import Experiment
from minilm.generate import generate
from minilm.interop import load_adapter, save_adapter
from minilm.measure.answers import answers
from minilm.measure.verdict import compared, each_seed, single, verdict
from minilm.peft import use_adapter
from minilm.picture import COLORS
from minilm.quantize import quantize_model
from minilm.trial import (
    KEPT,
    KNOWN,
    SHARE,
    TRAINED,
    Trial,
    base,
    held_out,
    kept,
    learned,
    low_rank,
    old_text,
    program,
    records_of,
    share_of,
)

QUESTION = "Can a model learn how somebody talks, and what comes with it?"
SLIDE = {}  # the lectures give no numbers

THINGS = ("a list", "a tuple", "a class", "a module", "a function", "an exception", "a string")
ELSE = ("What is {}?", "Where is {} made?", "Which kind of object is {}?", "Who needs {}?",
        "When does {} end?", "Is {} an object?")
TEXTS, SEEN, WRITTEN = 40, 48, 64  # texts to go on with; bytes of each that are seen; and written

STYLE, STYLE_NEW = "style, again, %", "style, new facts, %"
OTHER = "the other's style, %"
RIGHT, RIGHT_NEW = "facts right, again, %", "new facts right, %"
GUESSED = "new facts right by guessing, %"
LEAK, IN_TEXT = "style, something else, %", "style, text, %"
MOVED = "bits of the base that changed"
MEASURES = {STYLE: 1, STYLE_NEW: 1, OTHER: 1, RIGHT: 1, RIGHT_NEW: 1, GUESSED: 1, LEAK: 1,
            IN_TEXT: 1, KNOWN: 2, TRAINED: 0, KEPT: 0, SHARE: 1, MOVED: 0}


@dataclass(frozen=True)
class Talk(Trial):
    """A trial on a persona."""

    persona: str = "pavlos"
    pairs: int = 1000
    """to learn from"""
    plain: bool = False
    """learn as many records of the tasks, too"""
    shared: bool = False
    """on one base with the other persona's adapter"""
    train: int = 250
    steps: int = 800
    """updates in the whole run"""


LORA = low_rank(8)
QLORA = LORA | {"method": "qlora"}
ARMS = {
    "base": {"steps": 0},
    "full, Pavlos": {"method": "full", "lr": 1e-3},
    "LoRA, Pavlos": LORA,
    "QLoRA, Pavlos": QLORA | {"shared": True},
    "QLoRA, Marina": QLORA | {"shared": True, "persona": "marina"},
    "QLoRA, Pavlos and plain": QLORA | {"plain": True},
}
PAVLOS, MARINA = "QLoRA, Pavlos", "QLoRA, Marina"
TWO = {"pavlos": PAVLOS, "marina": MARINA}


def all_of(measure: str, pick, **bounds):
    """The verdict on the largest, or the least, of the two adapters that share a base."""
    def judge(rows):
        rows = [row for row in rows if row["arm"] in TWO.values()]
        about = f"{pick.__name__} of both adapters: {measure}"
        return verdict(each_seed(rows, lambda row: row[measure], pick), about, **bounds)
    return judge


CLAIMS = {
    "QLoRA learns the style: nine in ten answers have it, in a new wording": all_of(
        STYLE, min, at_least=90),
    "it has the style of its own persona alone": all_of(OTHER, max, at_most=1),
    "QLoRA learns the style as LoRA does, within 4 points": lambda rows: compared(
        rows, STYLE, PAVLOS, "LoRA, Pavlos", at_least=-4),
    "QLoRA learns the style as full fine-tuning does, within 4 points": lambda rows: compared(
        rows, STYLE, PAVLOS, "full, Pavlos", at_least=-4),
    "facts that were learned are right in a new wording, three in four": lambda rows: single(
        rows, RIGHT, PAVLOS, at_least=75),
    "answers about new facts have the style, too": all_of(STYLE_NEW, min, at_least=90),
    "new facts are not learned with it: at most 10 points above guessing": lambda rows: verdict(
        each_seed([row for row in rows if row["arm"] == PAVLOS],
                  lambda row: row[RIGHT_NEW] - row[GUESSED]),
        f"{PAVLOS}: {RIGHT_NEW} - {GUESSED}", at_most=10),
    "the style stays out of questions about something else": all_of(LEAK, max, at_most=10),
    "the style stays out of text": all_of(IN_TEXT, max, at_most=10),
    "plain answers among the pairs keep it out of questions about something else": lambda rows:
        compared(rows, LEAK, "QLoRA, Pavlos and plain", PAVLOS, at_most=-10),
    "the base is what it was, bit for bit, while personas are swapped": all_of(
        MOVED, max, at_most=1e-9),
    "an adapter is less than a fifth of the model's file": all_of(SHARE, max, at_most=20),
    "full fine-tuning stores all of the model again": lambda rows: single(
        rows, SHARE, "full, Pavlos", at_least=99),
}
LIKELY = {
    "the style stays out of questions about something else":
        "no pair has a question that is not for the persona, so any question gets its answer",
    "the style stays out of text": "the pairs alone are learned, and the text is forgotten: 5.5 "
                                   "bits a byte of it, before 1.75",
    "plain answers among the pairs keep it out of questions about something else":
        "the plain answers are to small tasks, none of which has the form of a question, so a "
        "question is still a question for the persona",
}
SERVED = {}  # settings of a seed -> a base with both adapters, its tokenizer, sizes


def measured(s: Talk, run, title: str) -> dict:
    """The numbers of MEASURES."""
    asked = questions(s)
    model, tokenizer, sizes = served(s, run) if s.shared else alone(s, run, title)
    turns = [name for name in TWO if name != s.persona] + [s.persona] if s.shared else []

    def ask(records):  # the other adapter has acted before each set of questions
        for name in turns:
            use_adapter(model, name)
        return answers(model, records, tokenizer)

    said = {name: ask(records) for name, records in asked.items()}
    texts = written(model, tokenizer, s)
    own, other = s.persona, next(name for name in TWO if name != s.persona)
    return {
        STYLE: share(has_style(own, text) for text in said["again"]),
        STYLE_NEW: share(has_style(own, text) for text in said["new"]),
        OTHER: share(has_style(other, text) for text in itertools.chain(*said.values(), texts)),
        RIGHT: share(map(is_right, asked["again"], said["again"])),
        RIGHT_NEW: share(map(is_right, asked["new"], said["new"])), GUESSED: guessed(s),
        LEAK: share(has_style(own, text) for text in said["else"]),
        IN_TEXT: share(has_style(own, text) for text in texts),
        KNOWN: old_text(model, tokenizer, s), **sizes, MOVED: moved(model, s)}


def share(found) -> float:
    """Per cent."""
    return 100 * float(np.mean([*found]))


def pairs_of(s: Talk) -> list[data.Record]:
    """What is learned: pairs in five of the six wordings, and plain records if there are some."""
    facts, _ = split_facts(0.2, s.seed)
    count = s.pairs if s.model else s.train
    pairs = make_pairs(s.persona, facts, count, s.seed, [i for i in range(6) if i != s.seed % 6])
    return pairs + (records_of(s)[0] if s.plain else [])


def questions(s: Talk) -> dict[str, list[data.Record]]:
    """What is asked, by the name of the set."""
    facts, others = split_facts(0.2, s.seed)
    longest = max((record.output for record in pairs_of(s)), key=len)
    other = [data.Record(question.format(thing), "", longest) for question in ELSE
             for thing in THINGS]
    sets = {"again": make_pairs(s.persona, facts, None, s.seed, [s.seed % 6]),
            "new": make_pairs(s.persona, others, None, s.seed), "else": other}
    return {name: records[: s.test] for name, records in sets.items()}


def guessed(s: Talk) -> float:
    """Per cent of the new facts that are right if one always says the commonest value, of two the
    first in the alphabet."""
    facts, others = split_facts(0.2, s.seed)
    found = {about: [fact.value for fact in facts if fact.about == about] for about in ABOUT}
    common = {about: max(sorted({*said}), key=said.count) for about, said in found.items()}
    return share(fact.value == common[fact.about] for fact in others)


def alone(s: Talk, run, title: str):
    """(a model that has learned the pairs, its tokenizer, sizes)."""
    model, tokenizer = base(s.model)
    model, trained, _ = learned(model, tokenizer, pairs_of(s), s, run, title)
    return model, tokenizer, {TRAINED: trained, **kept(model, tokenizer, s, run.path / "kept")}


def served(s: Talk, run):
    """(a base of 4 bits that has both adapters, its tokenizer, the sizes of one's own)."""
    key = s.model, s.seed, s.lr
    if key not in SERVED:
        SERVED.clear()
        model, tokenizer = base(s.model)
        model, sizes = quantize_model(model, "nf4"), {}
        for name, arm in TWO.items():
            own = run.inside(name)
            one, _, sizes[name] = alone(replace(s, persona=name), own, f"{arm}, seed {s.seed}")
            save_adapter(one, own.path / "adapter")
            load_adapter(model, own.path / "adapter", name)
        SERVED[key] = model, tokenizer, sizes
    model, tokenizer, sizes = SERVED[key]
    return model, tokenizer, sizes[s.persona]


def written(model, tokenizer, s: Talk) -> list[str]:
    """How the model goes on with pieces of the held-out text."""
    text = "".join(held_out(share_of(s)))
    places = np.linspace(0, len(text) - SEEN, TEXTS if s.model else 2).astype(int)
    rows = [tokenizer.prompt(text[i : i + SEEN]) for i in places]
    width = min(map(len, rows))
    new = generate(model, np.stack([row[-width:] for row in rows]), WRITTEN, temperature=0)
    return [tokenizer.decode(row) for row in new]


def moved(model, s: Talk) -> int:
    """How many bits of the base differ from those of one that never had an adapter."""
    fresh = base(s.model)[0]
    was = (quantize_model(fresh, "nf4") if s.steps and s.method == "qlora" else fresh).state_dict()
    now = {path.replace(".base.", "."): tensor.data for path, tensor in model.named_tensors()
           if ".adapters." not in path}
    if now.keys() != was.keys():
        raise ValueError(f"the bases have other tensors: {sorted(now.keys() ^ was.keys())}")
    return sum(int(np.unpackbits(now[path].reshape(-1).view(np.uint8)
                                 ^ was[path].reshape(-1).view(np.uint8)).sum()) for path in was)


def draw(figure, rows):
    """For each arm where the answers have the style, and which facts are right; means of seeds."""
    axes = figure.subplots()
    shown = {STYLE: "style: asked again", LEAK: "something else", IN_TEXT: "in text",
             RIGHT: "facts right: again", RIGHT_NEW: "new facts"}
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)][::-1]
    marks = "ooo^^"
    for i, (measure, label) in enumerate(shown.items()):
        means = [np.mean([row[measure] for row in rows if row["arm"] == arm]) for arm in arms]
        axes.plot(means, np.arange(len(arms)) + 0.12 * (2 - i), marks[i], label=label,
                  color=COLORS[i], markersize=5)
    axes.set_yticks(range(len(arms)), arms)
    axes.set(xlabel="% of the answers", xlim=(-3, 103))
    axes.legend(frameon=False, fontsize="small", ncols=3, loc="lower center",
                bbox_to_anchor=(0.4, 1.0))


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured, Talk)

if __name__ == "__main__":
    command(main)
