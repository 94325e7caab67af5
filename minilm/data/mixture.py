"""The mixture that a model is trained on: how often a run sees each corpus.

    epochs = p total / tokens         p of the run's tokens are from the corpus, which has `tokens`

The columns are those of the Llama paper (Touvron et al. 2023, arXiv:2302.13971, table 1): the
share, the epochs, the size. Two more explain them: the tokens, and how many bytes each stands for.
"""

from collections.abc import Sequence
from typing import NamedTuple

from minilm.data.corpora import Corpus
from minilm.data.heldout import account


class Part(NamedTuple):
    """A corpus of a mixture."""

    name: str
    p: float  # share of the run's tokens
    tokens: float
    size: float  # bytes of its text

    def epochs(self, total: float) -> float:
        """How often a run on `total` tokens sees each of the corpus's.

        >>> Part("a", 0.25, 100, 400).epochs(1000)
        2.5
        """
        return self.p * total / self.tokens

    @property
    def bytes_a_token(self) -> float:
        return self.size / self.tokens


def mixture_of(corpora: Sequence[Corpus], parts: Sequence[tuple], tokens: Sequence[int],
               weights: Sequence[float] = ()) -> list[Part]:
    """The mixture that Batches draws rows from.

    parts: (documents to train on, those held out) of each corpus, as `split` gives them. tokens: of
    the former. weights: how often each corpus is drawn from, by default in proportion to its
    tokens.
    """
    weights = weights or tokens
    sizes = [sum(len(text.encode()) for text in training) for training, _ in parts]
    return [Part(corpus.name, weight / sum(weights), count, size) for corpus, weight, count, size
            in zip(corpora, weights, tokens, sizes, strict=True)]


def from_epochs(name: str, p: float, epochs: float, size: float, total: float) -> Part:
    """The part that a run on `total` tokens has seen so often: p total / epochs are its tokens."""
    return Part(name, p, p * total / epochs, size)


def mixture_table(mixture: Sequence[Part], total: float) -> str:
    """A run on `total` tokens of the mixture: a line a corpus, and one for all if they are several.

    >>> print(mixture_table([Part("a", 0.75, 100, 400), Part("b", 0.25, 300, 300)], 400))
    a run on 400 tokens
    corpus             share   epochs             tokens        size  bytes a token
    a                  75.0%     3.00                100       400 B           4.00
    b                  25.0%     0.33                300       300 B           1.00
    all               100.0%     1.00                400       700 B           1.75
    """
    every = Part("all", sum(part.p for part in mixture), sum(part.tokens for part in mixture),
                 sum(part.size for part in mixture))
    width = max(16, *(len(part.name) for part in mixture))
    lines = [f"a run on {total:,.0f} tokens", f"{'corpus':{width}}{'share':>8}{'epochs':>9}"
             f"{'tokens':>19}{'size':>12}  bytes a token"]
    for part in [*mixture, *[every] * (len(mixture) > 1)]:
        lines.append(f"{part.name:{width}}{part.p:8.1%}{part.epochs(total):9.2f}"
                     f"{part.tokens:19,.0f}{amount(part.size):>12}{part.bytes_a_token:15.2f}")
    return "\n".join(lines)


def accounts(corpora: Sequence[Corpus], parts: Sequence[tuple], tokens: Sequence[int],
             weights: Sequence[float], total: float) -> str:
    """What is trained on and held out of each corpus, and the mixture of a run on `total` tokens;
    for a program to print. See mixture_of."""
    lines = [account(corpus, *part) for corpus, part in zip(corpora, parts, strict=True)]
    return "\n".join([*lines, mixture_table(mixture_of(corpora, parts, tokens, weights), total)])


def amount(size: float) -> str:
    """Bytes in the unit that leaves up to four digits before the point; a TB is 10^12.

    >>> amount(783e9), amount(3.3e12), amount(512)
    ('783 GB', '3.3 TB', '512 B')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size:.0f} B"
