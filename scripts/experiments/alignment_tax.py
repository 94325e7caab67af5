"""What does each stage of alignment cost a model of what it knew: the alignment tax.

    python scripts/experiments/alignment_tax.py --model runs/pretrain-*/model
    python scripts/experiments/alignment_tax.py --quick    # seconds; the numbers mean nothing

Lecture 004, of fine-tuning for a single task: "Possibility for catastrophic forgetting (aka
alignment tax). This may not be a bad thing!" Then come instructions, and RLHF.

One model goes through the stages, and after each the loss on the text that pretrain.py taught is
measured on the same held-out pages:

    pretrained         the base
    one task           all weights learn one task that is no text, to sort letters
    SFT                all weights learn demonstrations: prompts of text, each with the best of
                       eight answers of the base
    PPO                from SFT, by a reward model of the SFT model's answers, which begins as SFT
    PPO-ptx            the same, with the loss of pretraining on old text beside it

PPO-ptx is Ouyang et al. 2022 (arXiv:2203.02155, eq. 2), who found that it takes back most of what
PPO has cost. What is better is said by a gold score, as in rlhf.py: the share of vowels up to 0.4,
less beyond. A seed takes about five minutes of one core.
"""

from dataclasses import dataclass

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import by_arm, by_seed, compared, verdict
from minilm.picture import COLORS, bars
from minilm.stages import (
    KL,
    Aligned,
    Once,
    judged,
    look,
    policy,
    questions,
    sample,
    supervised,
    text_reward,
)
from minilm.trial import KNOWN, base, learned, old_text, program, records_of

QUESTION = "What does each stage of alignment cost in what the model knew?"
SLIDE = {}  # the lecture gives no numbers


@dataclass(frozen=True)
class Staged(Aligned):
    """A trial that ends after one of the stages."""

    stage: str = ""
    gold: str = "peak"
    beta: float = 0.05
    steps: int = 240
    eval_every: int = 240


NONE, TASK, SFT, PPO, PTX = "pretrained", "one task", "SFT", "PPO", "PPO-ptx"
ARMS = {
    NONE: {"stage": NONE, "steps": 0},
    TASK: {"stage": TASK, "tasks": ("sort",), "method": "full", "batch": 8, "steps": 300,
           "warmup": 30},
    SFT: {"stage": SFT},
    PPO: {"stage": PPO},
    PTX: {"stage": PTX, "ptx": 0.1},
}

GOLD, MODEL = "gold, points", "reward model, sd"
MEASURES = {KNOWN: 3, GOLD: 1, MODEL: 2, KL: 2}


def costs(a: str, b: str):
    """Has a lost more of the old text than b?"""
    return lambda rows: compared(rows, KNOWN, a, b, at_least=0)


def halved(rows):
    """What PPO-ptx lost after SFT minus half of what PPO did."""
    found = by_seed(rows, KNOWN, (SFT, PPO, PTX))
    return verdict([(ptx - sft) - (ppo - sft) / 2 for sft, ppo, ptx in found],
                   f"({PTX} - {SFT}) - 0.5 x ({PPO} - {SFT}): {KNOWN}", at_most=0)


CLAIMS = {
    "supervised fine-tuning costs old text": costs(SFT, NONE),
    "PPO costs more of it": costs(PPO, SFT),
    "old text beside PPO takes some of that back": costs(PPO, PTX),
    "at least half of it": halved,
    "one narrow task costs more than all stages of alignment": costs(TASK, PPO),
    "demonstrations make answers better": lambda rows: compared(rows, GOLD, SFT, NONE, at_least=0),
    "PPO makes them better still": lambda rows: compared(rows, GOLD, PPO, SFT, at_least=0),
    "PPO-ptx gives up at most 2 points of that": lambda rows: compared(rows, GOLD, PTX, PPO,
                                                                       at_least=-2),
}
SHOWN, JUDGED = Once(), Once()


def measured(s: Staged, run, title: str) -> dict:
    """The numbers of MEASURES."""
    begun, tokenizer = base(s.model)
    prompts, key = questions(s, begun, tokenizer), (s.model, s.seed)
    weights = SHOWN(key, lambda: supervised(s, begun, prompts.prompts, tokenizer, run, title)[0]
                    .state_dict())
    begun.load_state_dict(weights)
    found = JUDGED(key, lambda: judged(s, begun, tokenizer, run, title))
    scores = {GOLD: text_reward(s.gold, tokenizer), MODEL: found.reward}

    def see(model, frozen=None):
        told = look(model, s, prompts.held_out, tokenizer, frozen, **scores)
        return told | {GOLD: 100 * told[GOLD]}

    model = begun if s.stage in (SFT, PPO, PTX) else base(s.model)[0]
    if s.stage == TASK:
        model = learned(model, tokenizer, records_of(s)[0], s, run, title)[0]
    if s.stage in (PPO, PTX):
        model, curve = policy(s, model, prompts, tokenizer, run, title, found.reward, see)
        told = curve[-1][1]
    else:
        told = see(model, base(s.model)[0])
    print(f"{title}: {sample(model, s, prompts.held_out, tokenizer)}")
    return {**told, KNOWN: old_text(model, tokenizer, s)}


def draw(figure, rows):
    """The loss on old text after each stage; a dot a seed."""
    axes = figure.subplots()
    color = dict(zip(ARMS, (COLORS[5], COLORS[1], COLORS[0], COLORS[3], COLORS[2])))
    bars(axes, by_arm(rows, KNOWN), color.get)
    axes.set(xlabel=f"{KNOWN}, held out")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Staged)

if __name__ == "__main__":
    command(main)
