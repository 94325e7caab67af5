"""What training takes and what a model can do: planned, measured, judged."""

from minilm.measure.memory import KINDS, Ledger, held

__all__ = ["KINDS", "Ledger", "held"]
