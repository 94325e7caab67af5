"""The methods that align.py knows: their settings, and what each gives the loop.

    method   learns from                               is kept as
    reward   comparisons                               a folder of a reward model
    dpo      comparisons                               PEFT's folder
    ppo      its own answers, worth a reward each      PEFT's folder
    grpo     the same, in groups with one prompt       PEFT's folder
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from minilm import data
from minilm.align import (
    DPO,
    GRPO,
    PPO,
    RankingLoss,
    Remembering,
    Reward,
    Rounds,
    answers_of,
    draw_answers,
    reference_sums,
    reward_model,
    rollouts,
    value_head,
)
from minilm.align.dpo import answer_sums
from minilm.align.reward import raw_rewards
from minilm.asking import Asked, judged
from minilm.nn import Module
from minilm.optim import AdamW
from minilm.peft import add_lora
from minilm.ranges import AT_LEAST_0, LIMIT, POSITIVE, one_of, optional, whole
from minilm.rewards import text_of


class Method(NamedTuple):
    """What a method begins with, if nothing is given. The rates are starting points."""

    lr: float
    beta: float | None
    uses: str  # the settings that mean something to it
    constant: bool = False  # is the learning rate the same to the end?


COMPARES = "comparisons answers sharpness"
LOW_RANK = "r alpha targets beta"
METHODS = {
    "reward": Method(5e-4, None, COMPARES),
    "ppo": Method(1e-3, 0.02, f"{LOW_RANK} epochs parts eps lam value ptx replay_from", True),
    "dpo": Method(1e-3, 0.1, f"{LOW_RANK} {COMPARES}"),
    "grpo": Method(1e-3, 0.04, f"{LOW_RANK} epochs parts eps group", True),
}


@dataclass(frozen=True)
class Aligning:
    """Settings of the methods. A program's own settings extend them."""

    method: Literal[tuple(METHODS)] = "ppo"
    """reward: a reward model, from comparisons. dpo: a policy, from comparisons. ppo, grpo: a
    policy, from what its own answers are worth"""
    reward: str = ""
    """what an answer is worth: vowels (their share), peak (the same up to 0.4, then less), upper
    (capital letters), or the folder of a reward model. It is what ppo and grpo learn, and what
    comparisons are made by; by default vowels. A file of comparisons needs none"""
    prompt: int = 16
    """tokens of a prompt that is a piece of a corpus"""
    tokens: int = 24
    """most tokens of an answer"""
    beta: float | None = None
    """price of a nat of KL to the reference; by default 0.02 for ppo, 0.1 for dpo, 0.04 for grpo"""
    comparisons: int = 1200
    """prompts whose answers are compared, if they are made"""
    answers: int = 2
    """answers to each of them"""
    sharpness: float = 30.0
    """of two answers the first wins with the probability 1 / (1 + exp(-sharpness x the difference
    of their rewards)); inf: the better one always wins"""
    epochs: int = 2
    """how often ppo and grpo learn from a round's answers"""
    parts: int = 2
    """steps of an epoch; a round draws batch x parts answers"""
    group: int = 8
    """answers to one prompt that grpo compares"""
    eps: float = 0.2
    """how far, as a share, a token's probability may go from the one it was drawn by, before its
    gradient ends"""
    lam: float = 0.95
    """of ppo's advantages: 0 believes the value head, 1 the rewards alone"""
    value: float = 0.1
    """weight of the value head's loss; 0 is without a head"""
    ptx: float = 0.0
    """weight of the loss on old text: PPO-ptx"""
    replay_from: tuple[str, ...] = ()
    """corpora of the old text; by default those that the model's run says it was trained on"""
    r: int = 8
    """rank of LoRA"""
    alpha: float = 16.0
    """the update is scaled by alpha / r"""
    targets: tuple[str, ...] = ("all-linear",)
    """layers that get an adapter, among q k v o gate up down"""

    RANGES: ClassVar = {
        "method": one_of(*METHODS), "prompt": whole(1), "tokens": whole(1),
        "beta": optional(AT_LEAST_0), "comparisons": whole(1), "answers": whole(2),
        "sharpness": LIMIT, "epochs": whole(1), "parts": whole(1), "group": whole(2),
        "eps": POSITIVE, "lam": PPO.RANGES["lam"], "value": AT_LEAST_0, "ptx": AT_LEAST_0,
        "r": whole(1), "alpha": POSITIVE}


def without(method: str) -> list[str]:
    """The settings that mean something to other methods alone."""
    every = {name for m in METHODS.values() for name in m.uses.split()}
    return sorted(every - {*METHODS[method].uses.split()})


class Job(NamedTuple):
    """What a method gives the loop."""

    model: Module  # what learns
    batches: object
    loss: object
    optimizer: AdamW
    examine: Callable  # () -> (what is logged, a line of what is shown)
    saved: Module | None = None  # what a checkpoint holds, if more than the model
    told: Callable = lambda step: {}  # what is logged of the step with this number


def low_rank(base, s):
    """The policy: the base with LoRA."""
    targets = s.targets[0] if s.targets == ("all-linear",) else s.targets
    return add_lora(base, s.r, s.alpha, targets, seed=s.seed).astype(s.dtype)


def from_rounds(base, s, asked: Asked, tokenizer, score, text=None) -> Job:
    """PPO or GRPO. text: batches of old text, for ptx."""
    model, head = low_rank(base, s), None
    if s.method == "ppo":
        if s.value:
            head = value_head(base.config.width, s.seed).astype(s.dtype)
            head = head.to(base.embed.weight.device)
        loss = PPO(head, s.beta, s.eps, lam=s.lam, value=s.value, ptx=s.ptx)
    else:
        loss = GRPO(s.group, s.beta, s.eps)
    rounds = Rounds(model, asked.prompts, loss, score=score, batch=s.batch * s.parts, most=s.tokens,
                    end=tokenizer.end, seed=s.seed, epochs=s.epochs, parts=s.parts,
                    group=s.group if s.method == "grpo" else 1, head=head, text=text)
    saved = Module()
    saved.model, saved.head = model, head
    def told(step): return rounds.drawn.told() if step % len(rounds) == 0 else {}
    return Job(model, rounds, loss, Remembering(rounds, saved.parameters(), s.lr),
               partial(answered, model, s, asked, tokenizer, score), saved, told)


def from_comparisons(base, s, asked: Asked, tokenizer, score=None) -> Job:
    """DPO."""
    model, loss = low_rank(base, s), DPO(s.beta)
    train, test = ((*part, reference_sums(model, *part))
                   for part in (asked.compared, asked.compared_held_out))

    def examine():
        rewards = s.beta * (answer_sums(model, *test[:2]) - test[2])
        told, line = answered(model, s, asked, tokenizer, score)
        told["pairs"] = judged(rewards)
        return told, f"pairs right {told['pairs']['right']:.1%}, {line}"
    return Job(model, data.EpochBatches(train, s.batch, s.seed), loss, adamw(model, s), examine)


def for_reward(base, s, asked: Asked, tokenizer, score=None) -> Job:
    """A reward model, whose head is new."""
    model = reward_model(base, s.seed).astype(s.dtype)

    def examine():
        model.eval()
        flat = asked.compared_held_out.texts()
        rewards = raw_rewards(model, *flat)
        told = judged(rewards.reshape(asked.compared_held_out.tokens.shape[:2]))
        best, worst = (text_of(answers_of(*flat)[i], tokenizer)
                       for i in (rewards.argmax(), rewards.argmin()))
        return {"pairs": told}, (f"pairs right {told['right']:.1%}, loss {told['loss']:.3f}, best "
                                 f"{data.printable(best)!r:.40}, worst "
                                 f"{data.printable(worst)!r:.40}")
    return Job(model, data.EpochBatches([*asked.compared], s.batch, s.seed), RankingLoss(),
               adamw(model, s), examine)


def adamw(model, s) -> AdamW:
    """Without weight decay."""
    return AdamW(model.parameters(), s.lr, (0.9, 0.95), weight_decay=0.0)


def answered(model, s, asked: Asked, tokenizer, score) -> tuple[dict, str]:
    """Reward, KL, length, entropy of answers to the held-out prompts, and a line with a sample."""
    model.eval()
    found = rollouts(model, asked.held_out, s.tokens, tokenizer.end, seed=[s.seed, 12],
                     score=score or (lambda tokens, counted: np.zeros(len(tokens))))
    told = found.told()
    if score is None:
        del told["reward"]
    answer = text_of(answers_of(found.tokens, found.counted)[0], tokenizer)
    numbers = "".join(f"{name} {value:z.3f}, " for name, value in told.items())
    text = f"{tokenizer.decode(asked.held_out[0])} -> {answer}"
    return {"answers": told}, f"{numbers}{data.printable(text)[:80]!r}"


def reference_answers(base, prompts, s, end) -> tuple:
    """What the base answers to at most 256 of the prompts: tokens (B, T), counted (B, T - 1)."""
    return draw_answers(base, prompts[:256], s.tokens, end, [s.seed, 13])


def finished_reward(model, base, s, asked: Asked, tokenizer) -> Reward:
    """The reward model with its scale: mean 0, variance 1 over what the base answers."""
    model.eval()
    return Reward.of_reference(model, *reference_answers(base, asked.prompts, s, tokenizer.end))


JOBS = {"reward": for_reward, "ppo": from_rounds, "grpo": from_rounds, "dpo": from_comparisons}
