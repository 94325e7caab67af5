"""Optimizers over flat parameters, gradient clipping, loss scaling, learning-rate schedules."""

from minilm.optim.adamw import SGD, AdamW
from minilm.optim.flat import FlatParameters, clip_grad_norm
from minilm.optim.mezo import MeZO
from minilm.optim.paged import PagedAdamW
from minilm.optim.precision import LossScaler
from minilm.optim.schedule import cosine_schedule

__all__ = [
    "SGD", "AdamW", "FlatParameters", "LossScaler", "MeZO", "PagedAdamW", "clip_grad_norm",
    "cosine_schedule",
]
