"""What an answer is worth: a rule on its text, or a reward model in a folder.

A reward model's folder is a model with one class, with its tokenizer, and reward.json, which says
what is taken off its rewards and what they are divided by: then the answers of the reference have
mean 0 and variance 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilm.align import Reward, answers_of
from minilm.data.preferences import SCORES
from minilm.files import FormatError, read_json, write_json
from minilm.interop import load_model, save_model
from minilm.ranges import FINITE, POSITIVE, check
from minilm.stored import revive


class TextReward:
    """A rule on texts as a reward: called with tokens (B, T), counted (B, T - 1), it gives (B,)."""

    def __init__(self, rule: Callable[[str], float], tokenizer):
        self.rule, self.tokenizer = rule, tokenizer

    def __call__(self, tokens, counted) -> np.ndarray:
        texts = [text_of(answer, self.tokenizer) for answer in answers_of(tokens, counted)]
        return np.array([self.rule(text) for text in texts])


def text_of(answer, tokenizer) -> str:
    """An answer's text, without its end."""
    return tokenizer.decode(answer[:-1] if answer[-1] == tokenizer.end else answer)


def reward_of(name: str, model_folder: Path, model, tokenizer):
    """The reward of this name, or that of a reward model's folder, for answers of the model.

    ValueError if it is neither, or if the reward model has another vocabulary; FormatError.
    """
    if name in SCORES:
        return TextReward(SCORES[name], tokenizer)
    if not Path(name).is_dir():
        raise ValueError(f"reward {name!r} is neither a folder nor one of {', '.join(SCORES)}")
    if not (Path(name) / "reward.json").exists():
        raise ValueError(f"{name} holds no reward model, as reward.json is missing: align.py "
                         "--method reward leaves one in runs/align-reward-N/reward")
    reward = load_reward(name)
    if (theirs := reward.model.config.vocab_size) != model.config.vocab_size:
        raise ValueError(f"{name} has a vocabulary of {theirs} tokens, but {model_folder} one of "
                         f"{model.config.vocab_size}: it must read the policy's tokens")
    first, second = (read_json(Path(f) / "tokenizer.json") for f in (name, model_folder))
    if first != second:
        raise ValueError(f"{name} and {model_folder} have different tokenizers: it must read the "
                         "policy's tokens")
    return reward


@dataclass(frozen=True)
class Scale:
    """What reward.json says."""

    mean: float
    sd: float

    def __post_init__(self):
        check({"mean": FINITE, "sd": POSITIVE}, mean=self.mean, sd=self.sd)


def save_reward(reward: Reward, folder: Path, tokenizer):
    """Write a folder that load_reward reads."""
    save_model(reward.model, folder, tokenizer)
    write_json(Path(folder) / "reward.json", {"mean": reward.mean, "sd": reward.sd})


def load_reward(folder: Path) -> Reward:
    """The reward model in a folder. FormatError if it is none, FileNotFoundError."""
    scale = revive(Scale, read_json(file := Path(folder) / "reward.json"), file)
    model = load_model(folder).eval().freeze()
    if model.config.labels != ("reward",):
        raise FormatError(Path(folder) / "config.json", "is no reward model's: its classes are "
                          f"{model.config.labels}, expected one, 'reward'")
    return Reward(model, scale.mean, scale.sd)
