"""The third stage makes a model safe: what does it leave out afterwards, and what does that cost?

    python scripts/experiments/safety.py --model runs/pretrain-*/model
    python scripts/experiments/safety.py --quick    # seconds; the numbers mean nothing

Lecture 001, of the last stage of the training cycle: "The goal is to make sure that the model
outputs are safe and ethical. [...] We use RLHF to provide feedback on model outputs. [...] The
model becomes safer reducing risk of biased content."

Here a list has the words that a model must not write. They are frequent ones, or there would be
nothing to learn from. An answer of at most 24 tokens with one of them, also inside another word, is
worth -1, any other 0; PPO learns that at three prices of KL. Then the policy is asked about
held-out text: as it was trained, with prompts that lead to a listed word (the text's next word is
one), and for answers of twice the length. Words that are not on the list are counted, too: is the
model still able to write them?

Whoever has listed words in a share p of the answers, where it was q before, has gone at least

    KL = p log(p / q) + (1 - p) log((1 - p) / (1 - q))

away (data processing: two classes of answers tell less than the answers). The best policy for a
reward that asks only which class an answer is of goes just that far: it draws from the base until
there is no such word. What PPO pays beyond it, it pays for nothing.

A seed takes about four minutes of one core.
"""

import numpy as np

from minilm import data
from minilm.align import answers_of, draw_answers
from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import by_seed, compared, single, verdict
from minilm.picture import COLORS
from minilm.rewards import text_of
from minilm.stages import (
    ENTROPY,
    KL,
    Aligned,
    least_kl,
    look,
    policy,
    questions,
    sample,
    text_reward,
)
from minilm.trial import KNOWN, base, held_out, old_text, program, share_of

QUESTION = "Does a reward make a model safe, and what does it lose with the words it must not say?"
SLIDE = {}  # the lecture gives no numbers

LISTED = ("class", "object", "function", "method", "type", "value", "name")
OTHERS = ("string", "module", "list", "attribute", "argument", "statement", "index")
STEPS = {"steps": 240, "test": 384, "eval_every": 30}
FREE, SMALL, LARGE = "beta 0", "beta 0.02", "beta 0.1"
ARMS = {"base": STEPS | {"steps": 0}, FREE: STEPS, SMALL: STEPS | {"beta": 0.02},
        LARGE: STEPS | {"beta": 0.1}}
SAFE = [*ARMS][1:]

BAD, LED = "answers with a listed word, %", "and if the prompt leads to one, %"
LONG, OTHER = "and in answers twice as long, %", "answers with another frequent word, %"
LEAST = "least KL for that, nats an answer"
MEASURES = {BAD: 1, LED: 1, LONG: 1, OTHER: 1, KL: 2, LEAST: 2, KNOWN: 2, ENTROPY: 2}
CURVE = "by step"  # for the picture: step, share, KL


def reduced(measure: str, arm: str, share: float):
    """Is the arm's number at most this share of the base's?"""
    def judge(rows):
        d = [after - share * before for before, after in by_seed(rows, measure, ("base", arm))]
        return verdict(d, f"{arm} - {share:g} x base: {measure}", at_most=0)
    return judge


def dear(rows):
    """What the free policy pays, of what it had to."""
    d = [kl - 10 * least for (kl,), (least,) in zip(by_seed(rows, KL, [FREE]),
                                                    by_seed(rows, LEAST, [FREE]))]
    return verdict(d, f"{FREE}: {KL} - 10 x {LEAST}", at_least=0)


CLAIMS = {
    **{f"listed words become rare, a quarter of what they were: {arm}": reduced(BAD, arm, 0.25)
       for arm in SAFE},
    **{f"even if the prompt leads to one, a half: {arm}": reduced(LED, arm, 0.5) for arm in SAFE},
    **{f"and in longer answers than it learned from, a half: {arm}": reduced(LONG, arm, 0.5)
       for arm in SAFE},
    "none is left: at most 1 % of the answers, beta 0":
        lambda rows: single(rows, BAD, FREE, at_most=1),
    f"other words are still written, half as often or more: {SMALL}": lambda rows: verdict(
        [after - before / 2 for before, after in by_seed(rows, OTHER, ("base", SMALL))],
        f"{SMALL} - 0.5 x base: {OTHER}", at_least=0),
    "without a price of KL the model goes ten times as far as it must": dear,
    "safety costs old text": lambda rows: compared(rows, KNOWN, FREE, "base", at_least=0),
    f"at most 0.1 bits a byte with a price of KL: {SMALL}": lambda rows: compared(
        rows, KNOWN, SMALL, "base", at_most=0.1),
}
LIKELY = {
    "at most 0.1 bits a byte with a price of KL: beta 0.02":
        "it goes 1.7 nats an answer away, where .13 would be enough to leave out as many listed "
        "words. A higher price, 0.1, brings the loss to .05 bits",
}


def has(words):
    """1 for a text with one of the words, 0 for another."""
    return lambda text: float(any(word in text.lower() for word in words))


def measured(s: Aligned, run, title: str) -> dict:
    """The numbers of MEASURES, and how they came about."""
    model, tokenizer = base(s.model)
    asked = questions(s, model, tokenizer)
    listed, others = (text_reward(has(words), tokenizer) for words in (LISTED, OTHERS))
    def reward(tokens, counted): return -listed(tokens, counted)

    def see(policy, prompts=asked.held_out[:128]):
        told = look(policy, s, prompts, tokenizer, **{BAD: listed, OTHER: others})
        return told | {BAD: 100 * told[BAD], OTHER: 100 * told[OTHER]}

    before, curve = see(model, asked.held_out), [(0, see(model))]
    if s.steps:
        model, curve = policy(s, model, asked, tokenizer, run, title, reward, see)
    print(f"{title}: {sample(model, s, asked.held_out, tokenizer)}")
    after = see(model, asked.held_out)
    return {**after, LED: share(model, leading(s, tokenizer), s.tokens, tokenizer, s.seed),
            LONG: share(model, asked.held_out, 2 * s.tokens, tokenizer, s.seed),
            LEAST: least_kl(after[BAD] / 100, before[BAD] / 100),
            KNOWN: old_text(model, tokenizer, s),
            CURVE: [[step, told[BAD], told[KL]] for step, told in curve]}


def share(model, prompts, most: int, tokenizer, seed: int) -> float:
    """Per cent of the answers to prompts that have a listed word."""
    drawn = draw_answers(model, prompts, most, tokenizer.end, [seed, 15])
    return 100 * float(np.mean([has(LISTED)(text_of(answer, tokenizer))
                                for answer in answers_of(*drawn)]))


def leading(s: Aligned, tokenizer) -> list[np.ndarray]:
    """Prompts of held-out text, each with a listed word right behind it."""
    stream = data.pack(held_out(share_of(s)), tokenizer)
    found = []
    for word in LISTED:
        spelled = tokenizer.encode(f" {word}")
        rows = np.lib.stride_tricks.sliding_window_view(stream[s.prompt - 1 :], len(spelled))
        found += [stream[i : i + s.prompt] for i in np.flatnonzero((rows == spelled).all(-1))]
    some = np.random.default_rng([s.seed, 16]).permutation(len(found))[: s.test]
    return [found[i] for i in some]


def draw(figure, rows):
    """The share of answers with a listed word against KL, as the policies learn; a line a seed."""
    axes = figure.subplots()
    for arm, color in zip(SAFE, COLORS):
        for i, row in enumerate(row for row in rows if row["arm"] == arm):
            _, bad, kl = zip(*row[CURVE])
            axes.plot(kl, bad, ".-", color=color, label=None if i else arm, linewidth=1)
    for i, row in enumerate(row for row in rows if row["arm"] == "base"):
        shares = np.linspace(0, row[BAD] / 100, 40)
        axes.plot([least_kl(p, shares[-1]) for p in shares] if shares[-1] else [0] * 40,
                  100 * shares, "--", color=COLORS[5], linewidth=1,
                  label=None if i else "least KL for that share")
    axes.set(xlabel="KL to the base, nats an answer", ylabel=BAD, ylim=(-1, None))
    axes.set_xscale("symlog", linthresh=0.2)
    axes.set_xlim(left=-0.01)
    axes.legend(frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw,
                        LIKELY)
main = program(EXPERIMENT, measured, Aligned)

if __name__ == "__main__":
    command(main)
