"""Optimizers over flat parameters, gradient clipping, learning-rate schedules."""

from minilm.optim.adamw import SGD, AdamW
from minilm.optim.flat import FlatParameters, clip_grad_norm
from minilm.optim.schedule import cosine_schedule

__all__ = ["SGD", "AdamW", "FlatParameters", "clip_grad_norm", "cosine_schedule"]
