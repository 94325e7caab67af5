"""One document after another through stages, each of which keeps, changes or drops it.

A stage is a function of a text: it gives the text that goes on, or Dropped with the reason. What
each stage took in and let out is counted, by documents and bytes, and some of what it dropped or
changed is kept to be looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

SHOWN = 160  # characters of a document that is kept to be looked at


class Dropped(NamedTuple):
    """A stage's answer for a text that does not go on."""

    reason: str  # "kind: what was found"


Stage = Callable[[str], str | Dropped]


@dataclass
class Passed:
    """What went through a stage."""

    documents: int = 0  # that came in
    bytes: int = 0
    kept: int = 0  # documents that went on
    kept_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # kind -> documents
    examples: list[list[str]] = field(default_factory=list)  # [source, reason, how it begins]

    def count(self, source: str, before: str, after: str | Dropped, show: int):
        """Count a text that came in as `before` and went on as `after`, or did not.

        source: where it stands. show: how many examples are kept.
        """
        self.documents += 1
        self.bytes += len(before.encode())
        if isinstance(after, str):
            self.kept += 1
            self.kept_bytes += len(after.encode())
            if after == before:
                return
        reason = after.reason if isinstance(after, Dropped) else "changed"
        kind = reason.partition(":")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        # One of each kind first, or the first pages would fill the list with one reason.
        if len(self.examples) < show and self.reasons[kind] <= 1 + len(self.examples) // 2:
            self.examples.append([source, reason, difference(before, after)])


class Funnel:
    """Stages in order, and what went through each. show: how many examples of each are kept."""

    def __init__(self, stages: dict[str, Stage], show: int = 3):
        self.stages, self.show = stages, show
        self.passed = {name: Passed() for name in stages}

    def __call__(self, source: str, text: str) -> str | Dropped:
        """What is left of a text after all stages."""
        for name, stage in self.stages.items():
            after = stage(text)
            self.passed[name].count(source, text, after, self.show)
            if isinstance(after, Dropped):
                return after
            text = after
        return text


def difference(before: str, after: str | Dropped) -> str:
    """What a stage dropped begins so; what it changed reads so about the first change."""
    if isinstance(after, Dropped):
        return before[:SHOWN]
    at = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b),
              min(len(before), len(after)))
    start = max(0, at - SHOWN // 4)
    return f"{before[start : start + SHOWN // 2]} -> {after[start : start + SHOWN // 2]}"
