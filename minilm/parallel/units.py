"""Units: the parts of a model that travel at once, usually its blocks, and the root, their rest."""

from minilm.tensor import op


@op
def watched(x, before):
    """x itself. Its backward pass calls before() first."""
    def dx(dy):
        before()
        return dy
    return x, dx


class Unit:
    """A module whose tensors travel together; without a module, the root."""

    def __init__(self, number, module, buckets):
        self.number, self.module, self.buckets = number, module, buckets
        self.trained = [b for b in buckets if b.trains]
        self.again = 0  # forward passes under `checkpoint` that are to be run again
        self.awaits = self.passed = False  # is its backward pass to come? has it begun?

    def fetch(self):
        for b in self.buckets:
            b.fetch()

    def gather(self):
        self.fetch()
        for b in self.buckets:
            b.gather()

    def release(self):
        for b in self.buckets:
            b.release()


def owners_of(tensors, units) -> dict:
    """id of a tensor -> the number of the unit that holds it; -1: none or several do, the root.

    ValueError if a unit is not of the model, or if one lies inside another.
    """
    owners = {id(t): -1 for t in tensors}
    modules = [id(m) for unit in units for _, m in unit.named_modules()]
    if len(set(modules)) < len(modules):
        raise ValueError("units must not share modules: is one given twice, or inside another?")
    shared = set()
    for number, unit in enumerate(units):
        for name, t in unit.named_tensors():
            if not t.size:
                continue
            if id(t) not in owners:
                raise ValueError(f"unit {number} has {name}, which is none of the model's tensors")
            if owners[id(t)] not in (-1, number):
                shared.add(id(t))
            owners[id(t)] = number
    return owners | dict.fromkeys(shared, -1)
