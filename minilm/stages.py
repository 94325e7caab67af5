"""The stages of alignment as experiments run them, on one small model and its own answers.

    prompts        pieces of pretrain.py's text; those that are looked at are held out from it
    demonstrations the best of several answers by the model; a gold score stands for people
    comparisons    of two answers, by the gold score and with noise
    reward model   learns the comparisons; it never sees the gold score
    policy         PPO, GRPO or DPO, as align.py does it; LoRA on the model that it begins with

`look` says what a policy's answers are worth, and how far it has gone for it. What several arms
need, such as the reward model, is made once for a seed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from minilm import data, trial
from minilm.align import Reward, answers_of, draw_answers, rollouts
from minilm.align.ppo import SHARE
from minilm.aligning import JOBS, METHODS, Aligning, Job, finished_reward
from minilm.asking import Asked, asked_of, compared
from minilm.data.preferences import SCORES
from minilm.loop import Training, fit
from minilm.peft.adapted import adapted_layers
from minilm.ranges import AT_LEAST_0, check, one_of, whole
from minilm.rewards import TextReward, text_of
from minilm.trial import Trial, share_of

KL, LENGTH = "KL to where it began, nats an answer", "length of an answer, tokens"
ENTROPY = "entropy, nats a token"
STRANGE = "nats a token of the answers by the base"


@dataclass(frozen=True)
class Aligned(Trial):
    """A trial whose model learns what its answers are worth."""

    by: Literal["ppo", "grpo", "dpo"] = "ppo"
    """how the policy learns"""
    gold: str = "vowels"
    """what answers are really worth, among SCORES"""
    beta: float = 0.0
    """price of a nat of KL to the model that the policy begins with"""
    ptx: float = 0.0
    """weight of the loss on old text"""
    prompt: int = 16
    """tokens of a prompt"""
    tokens: int = 24
    """most tokens of an answer"""
    group: int = 8
    """answers to one prompt that grpo compares"""
    judging: int = 240
    """steps of the reward model"""
    shown: int = 600
    """demonstrations"""
    showing: int = 75
    """steps of learning from them"""
    batch: int = 32
    """answers of a step; a round has two steps' answers, and is learned from twice"""
    steps: int = 360
    """updates of the policy, 4 a round"""
    lr: float = 1e-3
    """learning rate; 0: the method's own"""
    warmup: int = 0
    """steps of linear warmup"""
    eval_every: int = 40
    """steps between looks at held-out prompts"""
    save_every: int = 80
    """steps between checkpoints"""
    train: int = 1200
    """prompts whose answers are compared"""
    test: int = 128
    """held-out prompts"""

    RANGES: ClassVar = Trial.RANGES | {
        "by": one_of("ppo", "grpo", "dpo"), "gold": one_of(*SCORES), "beta": AT_LEAST_0,
        "ptx": AT_LEAST_0, "prompt": whole(1), "tokens": whole(1), "group": whole(2),
        "judging": whole(1), "shown": whole(1), "showing": whole(1)}


@dataclass(frozen=True)
class Stage(Aligning, Training):
    """What align.py would be given."""

    test: int = 128


def stage_of(s: Aligned, method: str, **own) -> Stage:
    """The settings of one stage: those of the trial that it knows, and its own."""
    shared = {f.name: getattr(s, f.name) for f in fields(Stage)
              if f.name != "method" and hasattr(s, f.name)}
    return Stage(**shared | {"method": method, "comparisons": s.train} | own)


class Judged(NamedTuple):
    """Comparisons, and the reward model that has learned them."""

    asked: Asked
    reward: Reward
    right: float  # share of held-out pairs that the reward model puts in the labels' order
    agree: float  # share of them that the labels put in the gold score's order


class Once:
    """Keeps the value of the last key: what the arms of a seed share is made once."""

    def __init__(self):
        self.key = self.value = None

    def __call__(self, key, make: Callable):
        """The value of this key, made if need be."""
        if key != self.key:
            self.key, self.value = key, make()
        return self.value


def text_reward(rule: str | Callable, tokenizer) -> TextReward:
    """A rule, or one of SCORES by its name, as a reward."""
    return TextReward(SCORES.get(rule, rule), tokenizer)


def questions(s: Aligned, model, tokenizer, method: str = "ppo", score=None, **own) -> Asked:
    """Prompts, and for methods that need them comparisons of the model's answers by the score."""
    corpus = data.load_corpus("python-reference")
    return asked_of(corpus, stage_of(s, method, **own), share_of(s), model, tokenizer, score)


def old_batches(s: Aligned, tokenizer):
    """Batches of the text that pretrain.py trains on, for ptx; none if that is 0."""
    if not s.ptx:
        return None
    parts = [data.split(data.load_corpus("python-reference"), share_of(s))]
    return data.batches_of(parts, tokenizer, s.batch, s.prompt + s.tokens, s.seed)[0]


def taught(model, s: Stage, asked: Asked, tokenizer, run, title: str, score=None, text=None,
           watch: Callable = lambda job, done: None, begun: Callable = lambda job: None) -> Job:
    """A stage from this model on.

    begun(Job) is called with what the stage begins as, also in a run that goes on; watch(Job, Step)
    where the run stands, and after each step.
    """
    job = JOBS[s.method](model, s, asked, tokenizer, score, *[text] * (text is not None))
    begun(job)
    min_lr = s.lr if METHODS[s.method].constant else 0.0
    for _, done in fit(run, job.model, job.batches, s, job.loss, optimizer=job.optimizer,
                       min_lr=min_lr, saved=job.saved, title=title):
        watch(job, done)
    if done.step < s.steps:  # by Ctrl-C
        raise KeyboardInterrupt
    return job


def judged(s: Aligned, model, tokenizer, run, title: str, begun=lambda job: None) -> Judged:
    """Comparisons of the model's answers, and a reward model that begins with the model."""
    gold = text_reward(s.gold, tokenizer)
    asked = questions(s, model, tokenizer, "reward", gold)
    how = stage_of(s, "reward", lr=METHODS["reward"].lr, batch=min(24, s.train),
                   warmup=0, steps=s.judging if s.model else 2)
    job = taught(model, how, asked, tokenizer, run.inside("reward"), f"{title}, reward model",
                 begun=begun)
    scores = gold(*asked.compared_held_out.texts()).reshape(-1, how.answers)
    right, gaps = job.examine()[0]["pairs"]["right"], scores[:, 0] - scores[:, -1]
    agree = float(np.mean(gaps[gaps != 0] > 0)) if gaps.any() else 0.5
    return Judged(asked, finished_reward(job.model, model, how, asked, tokenizer), right,
                  agree)


def demonstrations(s: Aligned, model, prompts, tokenizer, best_of: int = 8):
    """(tokens, targets), (N, T) each: of several answers by the model the best by the gold score;
    the prompts are no targets."""
    how = stage_of(s, "reward", answers=best_of, sharpness=np.inf)
    found = compared(model, prompts, text_reward(s.gold, tokenizer), how, tokenizer.end,
                     [s.seed, 17])
    tokens, counted = found.tokens[:, 0], found.counted[:, 0]
    return tokens[:, :-1], np.where(counted, tokens[:, 1:], data.IGNORED)


def supervised(s: Aligned, model, prompts, tokenizer, run, title: str):
    """(the model after it has learned demonstrations with all its weights, the demonstrations)."""
    asked = prompts[:: len(prompts) // min(s.shown, s.train)][: min(s.shown, s.train)]
    rows = demonstrations(s, model, asked, tokenizer)
    how = replace(s, method="full", lr=3e-4, warmup=5, batch=min(16, s.train),
                  steps=s.showing if s.model else 2)
    batches = data.EpochBatches(rows, how.batch, s.seed)
    model, *_ = trial.taught(model, batches, how, run.inside("shown"), f"{title}, SFT")
    return model.eval(), rows


def look(model, s: Aligned, prompts, tokenizer, frozen=None, **scores) -> dict[str, float]:
    """Mean scores of answers to these prompts, KL, length, entropy, and how strange they are.

    frozen: what the model began as, by default itself without its adapters. scores: name -> what
    is called with tokens (B, T), counted (B, T - 1).
    """
    model.eval()
    frozen = frozen or (None if adapted_layers(model) else model)
    first, *others = scores
    r = rollouts(model, prompts, s.tokens, tokenizer.end, seed=[s.seed, 12], score=scores[first],
                 frozen=frozen)
    told, rest = r.told(), {name: scores[name](r.tokens, r.counted) for name in others}
    return {first: told["reward"], **{name: float(np.mean(x)) for name, x in rest.items()},
            KL: told["kl"], STRANGE: float(-r.reference.sum() / r.counted.sum()),
            LENGTH: told["length"], ENTROPY: told["entropy"]}


def policy(s: Aligned, model, asked: Asked, tokenizer, run, title: str, score, see: Callable,
           begun: Callable = lambda job: None):
    """(the policy that s.by has made, [(step, see(policy))] from the first step to the last).

    A run that goes on has the numbers of its earlier steps.
    """
    def watch(job, done):
        if done.targets and done.step % s.eval_every and done.step < s.steps:
            return
        if done.targets or not run.records():
            run.log(step=done.step, **see(job.model))
    job = taught(model, stage_of(s, s.by), asked, tokenizer, run, title, score,
                 old_batches(s, tokenizer), watch, begun)
    return job.model, [(r["step"], {n: x for n, x in r.items() if n != "step"})
                       for r in run.records()]


def sample(model, s: Aligned, prompts, tokenizer, count: int = 3) -> str:
    """What the model answers to the first prompts."""
    drawn = draw_answers(model.eval(), prompts[:count], s.tokens, tokenizer.end, [s.seed, 14])
    return "; ".join(repr(data.printable(tokenizer.decode(prompt))) + " -> "
                     + repr(data.printable(text_of(answer, tokenizer)))
                     for prompt, answer in zip(prompts, answers_of(*drawn)))


def at_kl(points: list[dict[str, float]], kl: float) -> dict[str, float]:
    """The numbers where a policy first comes to this KL, on a line between two looks at it; NaN if
    it never does.

    >>> at_kl([{KL: 0.0, "a": 1.0}, {KL: 4.0, "a": 3.0}], 1.0)["a"]
    1.5
    """
    if points[0][KL] >= kl:
        return points[0]
    for a, b in pairwise(points):
        if b[KL] >= kl:
            share = (kl - a[KL]) / (b[KL] - a[KL])
            return {name: a[name] + share * (b[name] - a[name]) for name in a}
    return dict.fromkeys(points[0], math.nan)


def least_kl(p: float, q: float) -> float:
    """The least KL, in nats, of a policy that has in a share p of its answers what its reference
    has in a share q: that of two coins. inf if the reference never or always has it, but not p.

    Answers as such tell at least as much as whether they have it (Kullback & Leibler 1951, On
    information and sufficiency, theorem 4.1).

    >>> round(least_kl(0.0, 0.5), 4)  # log 2
    0.6931
    """
    check({"p": SHARE, "q": SHARE}, p=p, q=q)
    pairs = ((p, q), (1 - p, 1 - q))
    return sum((a * math.log(a / b) if b else math.inf for a, b in pairs if a), 0.0)
