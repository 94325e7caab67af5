"""Measuring what training takes."""

from minilm.measure.memory import KINDS, Ledger, held

__all__ = ["KINDS", "Ledger", "held"]
