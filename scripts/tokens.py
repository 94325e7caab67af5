"""Show what a model is given: how text becomes tokens, and how tokens become rows.

    python scripts/tokens.py
    python scripts/tokens.py --corpus notes/ --vocab-size 8192 --text "Where is the cat?"
    python scripts/tokens.py --tokenizer my-model/tokenizer.json --text "Where is the cat?"
    python scripts/tokens.py --corpus python-docstrings python-source --weights 9 1 --steps 10000

Learns byte-pair encoding from the corpora, and prints the first pairs that it joins; how long a
token is if there are more of them; a text as tokens and ids; rows as pretrain.py packs them, and
what one place sees and has to say; and how often a run of pretrain.py would see each corpus:

    epochs = p B T steps / tokens        p of the rows are from it; B rows of T tokens are a step
"""

from pathlib import Path

import numpy as np

from minilm import data
from minilm.command import Given, command, many, utf8
from minilm.data.bpe import LearnedTokens, learn
from minilm.loop import refuse_unused

FIRST, SIZES = 20, (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
ROWS, PLACES = 3, 12


def main(corpus: tuple[str, ...] = ("python-reference",), vocab_size: int = 2048,
         tokenizer: Path | None = None, text: str = "A tokenizer is learned from a text.",
         weights: tuple[float, ...] = (), batch: int = 8, context: int = 128, steps: int = 2400,
         seed: int = 0, given: Given = frozenset()):
    """Show what a model is given.

    Args:
        corpus: python-reference, python-docstrings, python-source, or paths of texts and folders.
        vocab_size: tokens to learn, the 256 bytes among them.
        tokenizer: show this tokenizer.json instead of one that is learned.
        text: shown as tokens.
        weights: how often each corpus is drawn from; by default in proportion to its tokens.
        batch: rows of a step.
        context: tokens of a row.
        steps: of the run whose epochs are counted.
        seed: of the rows that are shown.
        given: names of the options on the command line.
    """
    if tokenizer:
        refuse_unused(given, ("vocab_size",), "nothing is learned: --tokenizer has its tokens")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if not corpus:
        raise ValueError("corpus must name a text")
    corpora = data.load_corpora(corpus)
    parts = [data.split(c) for c in corpora]
    learned, held_out = ([text for part in parts for text in part[side]] for side in (0, 1))
    merges = () if tokenizer else learn(learned, vocab_size)
    chosen = data.load_tokenizer(tokenizer) if tokenizer else LearnedTokens(merges)
    streams = [data.pack(part[0], chosen) for part in parts]
    sizes = [len(stream) for stream in streams]
    weights, names = weights or sizes, [c.name for c in corpora]
    data.Batches(streams, weights, batch, context, seed, names)  # refuses as pretrain.py would
    if not tokenizer:
        show_merges(merges)
        show_lengths(merges, held_out)
    show_text(utf8("text", text), chosen)
    show_rows(np.concatenate(streams), chosen, seed)
    mixture = data.mixture_of(corpora, parts, sizes, weights)
    print("\n" + data.mixture_table(mixture, batch * context * steps))


def show_merges(merges):
    """The first pairs, each with how often it was there when its turn came."""
    print(f"byte-pair encoding: {len(merges):,} merges; the first {min(FIRST, len(merges))}, each "
          "with how often the two stood side by side")
    for i, (pair, count) in enumerate(merges[:FIRST], 1):
        left, right = map(shown, pair)
        print(f"{i:4}  {count:9,}  {left} + {right} -> {shown(b''.join(pair))}")


def show_lengths(merges, texts):
    """What more tokens buy: the same held-out texts in fewer tokens."""
    size, words = (sum(f(text) for text in texts) for f in (lambda text: len(text.encode()),
                                                           lambda text: len(text.split())))
    print(f"\n{'vocabulary':>10}  bytes a token  words a token    of the held-out text; a word "
          "ends at a space")
    for vocab in [size for size in SIZES if size < 256 + len(merges)] + [256 + len(merges)]:
        tokenizer = LearnedTokens(merges[: vocab - 256])
        count = sum(len(tokenizer.tokens(text)) for text in texts)
        print(f"{vocab:10,}  {size / count:13.2f}  {words / count:13.2f}")


def show_text(text: str, tokenizer):
    """The tokens, and below them the ids."""
    ids = tokenizer.encode(text)
    print(f"\n{text!r}: {many(len(text.encode()), 'byte')}, {many(len(ids), 'token')}")
    show_ids(ids, tokenizer)


def show_rows(stream, tokenizer, seed: int):
    """Rows in which a document ends and the next begins; what one place sees and has to say."""
    rng = np.random.default_rng(seed)
    ends = np.flatnonzero(stream == tokenizer.end)
    starts = np.maximum(0, ends - rng.integers(1, PLACES, len(ends)))
    print(f"\n{ROWS} rows of {PLACES} tokens, cut out of documents that stand one after another")
    for start in (drawn := sorted(rng.choice(starts, ROWS))):
        show_ids(stream[start : start + PLACES], tokenizer)
    sees, says = np.split(stream[drawn[-1] :][: PLACES // 2 + 1], [-1])
    print(f"in the last row place {len(sees)} sees {' '.join(written(sees, tokenizer))}")
    print(f"and has to say {written(says, tokenizer)[0]}, the next one; it sees no other row")


def show_ids(ids, tokenizer, width: int = 100):
    """Each token, and below it its id, in as many lines as they need."""
    above = below = ""
    for token, id in zip(written(ids, tokenizer), map(str, ids)):
        size = 1 + max(len(token), len(id))
        if above and len(above) + size > width:
            print(above.rstrip(), below.rstrip(), sep="\n")
            above = below = ""
        above, below = f"{above}{token:{size}}", f"{below}{id:{size}}"
    print(above.rstrip(), below.rstrip(), sep="\n")


def written(ids, tokenizer) -> list[str]:
    """Each token as Python writes it, so that spaces and line ends can be seen."""
    names = {id: name for name, id in tokenizer.special.items()}
    return [names.get(id) or shown(tokenizer.decode([id])) for id in map(int, ids)]


def shown(token: str | bytes) -> str:
    """A token in quotes."""
    return repr(token.decode(errors="replace") if isinstance(token, bytes) else token)


if __name__ == "__main__":
    command(main)
