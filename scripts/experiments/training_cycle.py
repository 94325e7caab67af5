"""The training cycle of a language model: four stages, and what each learns from and begins as.

    python scripts/experiments/training_cycle.py --model runs/pretrain-*/model
    python scripts/experiments/training_cycle.py --quick    # seconds; the numbers mean nothing

Lecture 004, "Recipe for LLM Development" (and lecture 001, "Training Cycle - LLM"):

    stage                    data                               algorithm             begins as
    pretraining              raw text, trillions of tokens,     next token            nothing
                             low quality, large quantity
    supervised fine-tuning   prompts and responses, 10 - 100k,  next token            base
                             high quality, low quantity
    reward modeling          comparisons, 100k - 1M             which one is better   SFT
    reinforcement learning   prompts, 10 - 100k                 maximize the reward   SFT, and RM

The cycle is run through once on a small model. Its pretraining is that of pretrain.py; run.json
beside the base tells the steps and the text. A gold score stands for people (the share of vowels up
to 0.4, less beyond): the demonstrations are the best of eight answers, the comparisons go by it.
Each stage prints what it began as and what it left, by SHA-256 of all tensors. The table says which
tensors a stage had from the base and from the SFT model before its first step, as bits; of a reward
model without its head, which is new; of the policy without its adapters, which add 0 at first.

"own loss" is the stage's own, held out: nats a token of text, nats a token of demonstrations, the
share of comparisons that the reward model orders wrongly (what it minimizes is their
log-likelihood, which grows again on new ones as it becomes sure), and minus the reward, which is in
standard deviations and less the price of KL. Pretraining begins as a model with the same shape and
new weights. "gold" is what the answers of the model are worth; of the reward model, the one of four
answers by SFT that it likes best.

A seed takes about three minutes of one core.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from minilm import data
from minilm.align import draw_answers
from minilm.command import command
from minilm.continued import runs_of
from minilm.experiment import Experiment
from minilm.measure.losses import loss_of
from minilm.measure.verdict import by_arm, compared, each_seed, single, verdict
from minilm.picture import COLORS, bars
from minilm.stages import (
    KL,
    Aligned,
    Once,
    demonstrations,
    judged,
    look,
    policy,
    questions,
    supervised,
    text_reward,
)
from minilm.transformer import Transformer
from minilm.trial import KNOWN, base, held_out, old_text, program, share_of

QUESTION = "What is done to a language model, stage by stage, and what does each stage begin as?"

PRE, SFT, RM, RL = ("pretraining", "supervised fine-tuning", "reward modeling",
                    "reinforcement learning")
SLIDE = {
    "lecture 004: tokens, at least": {PRE: 1e12},
    "lecture 004: examples, from": {SFT: 10_000, RM: 100_000, RL: 10_000},
    "lecture 004: examples, to": {SFT: 100_000, RM: 1_000_000, RL: 100_000},
}


@dataclass(frozen=True)
class Cycle(Aligned):
    """A trial that is one stage."""

    stage: str = ""
    gold: str = "peak"
    beta: float = 0.05
    steps: int = 240
    eval_every: int = 240


ARMS = {stage: {"stage": stage} for stage in (PRE, SFT, RM, RL)}

EXAMPLES, TOKENS = "examples", "tokens of them"
BEFORE, AFTER = "own loss before", "own loss after"
OF_BASE, OF_SFT = "begins with tensors of the base, %", "of SFT, %"
OF_RM = "its judge is the reward model, %"
GOLD = "gold, points"
MEASURES = {EXAMPLES: 0, TOKENS: 0, BEFORE: 3, AFTER: 3, GOLD: 1, KNOWN: 2, OF_BASE: 1, OF_SFT: 1,
            OF_RM: 1}


def learns(stage: str):
    """Is the stage's loss less afterwards?"""
    return lambda rows: verdict(
        each_seed([r for r in rows if r["arm"] == stage], lambda r: r[AFTER] - r[BEFORE]),
        f"{stage}: {AFTER} - {BEFORE}", at_most=0)


def wholly(measure: str, stage: str):
    """Are all tensors the same bits?"""
    return lambda rows: single(rows, measure, stage, at_least=99.999)


CLAIMS = {
    **{f"{stage} learns what it is for": learns(stage) for stage in ARMS},
    "pretraining begins with nothing of the base":
        lambda rows: single(rows, OF_BASE, PRE, at_most=0.001),
    "supervised fine-tuning begins as the base": wholly(OF_BASE, SFT),
    "the reward model begins as the SFT model, but for its head": wholly(OF_SFT, RM),
    "and not as the base": lambda rows: single(rows, OF_BASE, RM, at_most=50),
    "reinforcement learning begins as the SFT model": wholly(OF_SFT, RL),
    "and is told by the reward model what is good": wholly(OF_RM, RL),
    "supervised fine-tuning makes answers better":
        lambda rows: compared(rows, GOLD, SFT, PRE, at_least=0),
    "reinforcement learning makes them better still":
        lambda rows: compared(rows, GOLD, RL, SFT, at_least=0),
}
CHAIN = Once()


def digests(model) -> dict[str, str]:
    """SHA-256 of each tensor, by its name in a model without adapters."""
    return {name.replace(".base.", "."): hashlib.sha256(np.ascontiguousarray(t.data)).hexdigest()
            for name, t in model.named_tensors()}


def without(part: str, found: dict) -> dict:
    """The digests of what is not of this part."""
    return {name: digest for name, digest in found.items() if part not in name}


def same(some: dict, others: dict) -> float:
    """Per cent of some tensors that are the others' of that name."""
    return 100 * float(np.mean([others.get(name) == digest for name, digest in some.items()]))


def whole(found: dict) -> str:
    """One short digest of all."""
    return hashlib.sha256("".join(map("".join, sorted(found.items()))).encode()).hexdigest()[:12]


def measured(s: Cycle, run, title: str) -> dict:
    """The numbers of one stage. The first arm of a seed runs them all."""
    rows, lines = CHAIN((s.model, s.seed), lambda: cycle(s, run, title))
    print(f"{s.stage}, seed {s.seed}: {lines[s.stage]}")
    return rows[s.stage]


def cycle(s: Cycle, run, title: str):
    """({stage: its numbers}, {stage: what it learned from, how, and what it began as})."""
    model, tokenizer = base(s.model)
    prompts, gold = questions(s, model, tokenizer), text_reward(s.gold, tokenizer)
    rows, begins, ends, lines = {}, {}, {}, {}

    def left(stage, model, data_and_way: str, made=None, **numbers):
        """Write down a stage that is done: what it made, and the model that answers after it."""
        ends[stage] = digests(made or model)
        of = {OF_BASE: same(begins[stage], ends[PRE]), OF_RM: 0.0,
              OF_SFT: same(begins[stage], ends[SFT]) if SFT in ends else 0.0}
        rows[stage] = of | {KNOWN: old_text(model, tokenizer, s)} | numbers
        but = ", but for its head," if stage == RM else ""
        lines[stage] = (f"{data_and_way}; began{but} as {whole(begins[stage])}, left "
                        f"{whole(ends[stage])}")

    def worth(model):
        return 100 * look(model, s, prompts.held_out, tokenizer, gold=gold)["gold"]

    fresh = Transformer(model.config, seed=s.seed + 1)
    begins[PRE] = digests(fresh)
    left(PRE, model, f"text, {made_by(s)}; next token", **pretrained(s, fresh, model, tokenizer),
         **{GOLD: worth(model)})
    asked = demonstrations(s, model, prompts.held_out, tokenizer)
    begins[SFT], before = digests(model), loss_of(model, *asked)
    model, shown = supervised(s, model, prompts.prompts, tokenizer, run, title)
    count = int((shown[1] != data.IGNORED).sum())
    left(SFT, model, "prompts and the best of eight answers; next token", **{
        EXAMPLES: len(shown[0]), TOKENS: count, BEFORE: before, AFTER: loss_of(model, *asked),
        GOLD: worth(model)})
    first = {}

    def begun(job):
        begins[RM] = without("head", digests(job.model))
        first[RM] = 1 - job.examine()[0]["pairs"]["right"]
    found = judged(s, model, tokenizer, run, title, begun)
    left(RM, model, "comparisons of two answers; which is better", found.reward.model, **{
        EXAMPLES: len(found.asked.compared.tokens), BEFORE: first[RM], AFTER: 1 - found.right,
        TOKENS: int(found.asked.compared.counted.sum()),
        GOLD: best_of(s, model, prompts.held_out, tokenizer, found.reward, gold)})
    policy_of(s, model, prompts, tokenizer, run, title, found.reward, gold, begins, left)
    rows[RL][OF_RM] = same(digests(found.reward.model), ends[RM])
    return rows, lines


def policy_of(s: Cycle, model, prompts, tokenizer, run, title, reward, gold, begins, left):
    """The last stage."""
    def begun(job): begins[RL] = without(".adapters.", digests(job.model))
    def see(model): return look(model, s, prompts.held_out, tokenizer, reward=reward, gold=gold)
    model, curve = policy(s, model, prompts, tokenizer, run, title, reward, see, begun)
    before, after = (s.beta * told[KL] - told["reward"] for told in (curve[0][1], curve[-1][1]))
    rounds = -(-s.steps // 4)
    left(RL, model, "prompts; PPO, maximize the reward", **{
        EXAMPLES: rounds * 2 * s.batch, BEFORE: before, AFTER: after,
        TOKENS: rounds * 2 * s.batch * s.tokens, GOLD: 100 * curve[-1][1]["gold"]})


def pretrained(s: Cycle, fresh, model, tokenizer) -> dict:
    """The size of the text, and the loss of a new model and of the base."""
    learned, _ = data.split(data.load_corpus("python-reference"), share_of(s))
    rows = data.rows_of(held_out(share_of(s))[: s.documents], tokenizer, model.room)
    return {EXAMPLES: len(learned), TOKENS: len(data.pack(learned, tokenizer)),
            BEFORE: loss_of(fresh, *rows), AFTER: loss_of(model, *rows)}


def made_by(s: Cycle) -> str:
    """What run.json beside the base says."""
    runs = [run["settings"] for run in runs_of(s.model)] if s.model else []
    return ", then ".join(f"{run['steps']} steps of {run['batch']} rows" for run in runs[::-1]
                          ) or "no run.json"


def best_of(s: Cycle, model, prompts, tokenizer, reward, gold, count: int = 4) -> float:
    """Points of gold of the answer that the reward model likes best of several."""
    drawn = draw_answers(model, [p for p in prompts for _ in range(count)], s.tokens,
                         tokenizer.end, [s.seed, 18])
    scores, golds = (score(*drawn).reshape(-1, count) for score in (reward, gold))
    return 100 * float(golds[np.arange(len(golds)), scores.argmax(-1)].mean())


def draw(figure, rows):
    """What the answers are worth after each stage; a dot a seed."""
    axes = figure.subplots()
    color = dict(zip(ARMS, (COLORS[5], COLORS[0], COLORS[1], COLORS[2])))
    bars(axes, by_arm(rows, GOLD), color.get)
    axes.set(xlabel="gold score of held-out answers, points")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Cycle)

if __name__ == "__main__":
    command(main)
