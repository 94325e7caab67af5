"""Cards and what joins them: the facts that the time of a step on many cards is computed from.

Peaks are those of data sheets: dense products in 16 bits, the memory's size and speed, links one
way. What of them training reaches is assumed:

    LINKS   0.8 of a link: NCCL's bus bandwidth in a node is 360 of 450 GB/s of an H100, and 240 of
            300 of an A100
    A_IN    3 us before a message in a node arrives, A_OUT 8 us between nodes

How fast a card computes is the caller's: a share of its peak.
"""

from dataclasses import dataclass

from minilm.measure.collectives import Link

LINKS, A_IN, A_OUT = 0.8, 3e-6, 8e-6


@dataclass(frozen=True)
class Card:
    """A GPU, by its data sheet."""

    peak: float  # operations a second, products in 16 bits
    memory: float  # bytes
    speed: float  # of its memory, bytes a second


A100 = Card(312e12, 80e9, 2.039e12)  # SXM, 80 GB
H100 = Card(989.4e12, 80e9, 3.35e12)  # SXM


@dataclass(frozen=True)
class Cluster:
    """Nodes of a few cards each. inside: between two cards of a node. outside: out of a node."""

    card: Card
    per_node: int
    inside: Link
    outside: Link

    def link(self, n: int) -> Link:
        """What a ring of n ranks sees, which enters and leaves each node once.

        The ring may be cut into as many as a node has adapters, so all of them count. Of a node's
        messages, one of per_node goes out: that is the latency's mean. ValueError unless n >= 1.
        """
        if n < 1:
            raise ValueError(f"there must be a rank, got {n}")
        if n <= self.per_node:
            return self.inside
        a = (self.inside.a * (self.per_node - 1) + self.outside.a) / self.per_node
        return Link(a, min(self.inside.B, self.outside.B))


def network(bits: float, adapters: int = 1, a: float = A_OUT) -> Link:
    """What leaves a node with so many adapters of so many bits a second.

    >>> f"{network(400e9, 8).B:.3g}"
    '3.2e+11'
    """
    return Link(a, LINKS * adapters * bits / 8)


CLUSTERS = {
    "H100, 8 x 400 Gb/s": Cluster(H100, 8, Link(A_IN, LINKS * 450e9), network(400e9, 8)),
    "A100, 8 x 200 Gb/s": Cluster(A100, 8, Link(A_IN, LINKS * 300e9), network(200e9, 8)),
    "H100, 1 x 100 Gb/s": Cluster(H100, 8, Link(A_IN, LINKS * 450e9), network(100e9, 1, 25e-6)),
}
