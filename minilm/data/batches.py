"""From documents to (B, T) arrays: random crops to train on, consecutive rows to evaluate on.

A stream is a (N,) array of token ids. `tokens` and `targets` are (B, T) int32; a target of -100
does not count in the loss.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from minilm.data.tokenizers import Tokenizer

IGNORED = -100
LONGEST = 2048


def pack(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one stream (N,) int32, each followed by the tokenizer's end."""
    if isinstance(documents, str):
        raise TypeError("documents must be a sequence of texts, got one str")
    end, parts = np.array([tokenizer.end], np.int32), []
    for number, document in enumerate(documents):
        try:
            parts += [tokenizer.encode(document), end]
        except ValueError as error:
            raise ValueError(f"document {number}, {document!r:.80}: {error}") from error
    if not parts:
        raise ValueError("there is no document to pack")
    return np.concatenate(parts)


class Batches:
    """Random training batches from a mixture of streams: batches[step] -> (tokens, targets).

    Each row draws a stream in proportion to `weights`, and starts anywhere in it with equal chance.
    Targets are the tokens one place later. `sizes` (S,) are the streams' tokens. A batch depends on
    (seed, step) alone, so a resumed run needs no stored position. Iterating never ends. `names` are
    those of the texts that the streams are of, for errors.
    """

    def __init__(
        self,
        streams: Sequence[np.ndarray],
        weights: Sequence[float],
        batch: int,
        length: int,
        seed: int,
        names: Sequence[str] = (),
    ):
        if batch < 1 or length < 1:
            raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")
        said = ([f"{name}: the text to train on" for name in names]
                or [f"stream {i}" for i in range(len(streams))])
        streams = [_stream(stream, length + 1, what) for what, stream in zip(said, streams)]
        sizes = np.array([len(stream) for stream in streams])
        self.tokens = np.concatenate(streams)
        self.starts = np.cumsum(sizes) - sizes
        self.sizes, self.offsets = sizes, sizes - length
        self.borders = _borders(weights, len(streams))
        self.batch, self.length, self.seed = batch, length, seed

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        which, where = np.random.default_rng([self.seed, step]).random((2, self.batch))
        stream = np.searchsorted(self.borders, which, side="right")
        first = self.starts[stream] + (where * self.offsets[stream]).astype(np.int64)
        index = first[:, None] + np.arange(self.length)  # (B, T)
        return self.tokens[index], self.tokens[index + 1]


def cut(stream: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole stream cut into consecutive rows: tokens (R, T) and targets (R, T), int32.

    Every token but the first is a target exactly once. The last row is filled up with tokens 0 and
    targets -100.

    >>> tokens, targets = cut(np.arange(10, 16), 3)
    >>> tokens.tolist(), targets.tolist()
    ([[10, 11, 12], [13, 14, 0]], [[11, 12, 13], [14, 15, -100]])
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    stream = _stream(stream, 2)
    size = len(stream) - 1
    shape = -(-size // length), length
    tokens, targets = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
    tokens.flat[:size] = stream[:-1]
    targets.flat[:size] = stream[1:]
    return tokens, targets


def rows_of(documents: Iterable[str], tokenizer: Tokenizer, context: int):
    """Tokens and targets (R, T) of texts on which to measure a model with this context, as in cut.

    A row has at most LONGEST tokens: models claim contexts for whose logits there is no memory.
    """
    return cut(pack(documents, tokenizer), min(context, LONGEST))


def mask_tokens(
    tokens: np.ndarray,
    rng: np.random.Generator,
    mask: int,
    vocab_size: int,
    rate: float = 0.15,
    special: Collection[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's corruption: inputs and targets shaped like tokens.

    Devlin et al. 2018, arXiv:1810.04805, section 3.1.

    Each token that is neither special nor mask becomes a target with probability `rate`. Of these
    tokens 80 % are replaced by mask, 10 % by a random ordinary id, and 10 % stay, so the model
    cannot tell which of the tokens it sees are true. All other targets are -100.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie between 0 and 1, got {rate}")
    reserved = np.unique([*special, mask])
    if reserved[0] < 0 or reserved[-1] >= vocab_size:
        raise ValueError(f"mask and special must be ids below {vocab_size}, got {reserved}")
    ordinary = np.delete(np.arange(vocab_size, dtype=np.int32), reserved)
    if not len(ordinary):
        raise ValueError("every id is special: there is none to draw")
    draw = rng.random(tokens.shape)
    draw[np.isin(tokens, reserved)] = 1
    random = ordinary[rng.integers(len(ordinary), size=tokens.shape)]
    inputs = np.where(draw < 0.9 * rate, random, tokens)
    inputs = np.where(draw < 0.8 * rate, mask, inputs)
    targets = np.where(draw < rate, tokens, IGNORED)
    return inputs.astype(np.int32), targets.astype(np.int32)


def batches_of(
    parts: Sequence[tuple[Iterable[str], Iterable[str]]],
    tokenizer: Tokenizer,
    batch: int,
    length: int,
    seed: int,
    weights: Sequence[float] = (),
    masked: bool = False,
    names: Sequence[str] = (),
) -> tuple:
    """(batches of the training texts, rows of the held-out ones), for parts as `split` gives them.

    weights: how often each part is drawn from, by default in proportion to its tokens.
    masked: the model fills in tokens rather than going on. The rows are then tokens, targets and a
    mask, which is 0 for the padding of the last row: padding is neither seen nor counted. Otherwise
    they are what `cut` returns.
    names: of the parts, for errors. ValueError if a part has fewer tokens to train on than a row.
    """
    streams = [pack(training, tokenizer) for training, _ in parts]
    batches = Batches(streams, weights or [len(s) for s in streams], batch, length, seed, names)
    held_out = held_out_rows([held for _, held in parts], tokenizer, length, seed, masked)
    return MaskedBatches(batches, tokenizer, seed) if masked else batches, held_out


def held_out_rows(parts: Iterable[Iterable[str]], tokenizer: Tokenizer, length: int, seed: int,
                  masked: bool = False) -> tuple[np.ndarray, ...]:
    """Rows of the texts that are held out, of all parts one after another; see `batches_of`."""
    tokens, targets = cut(np.concatenate([pack(held, tokenizer) for held in parts]), length)
    if not masked:
        return tokens, targets
    real = targets != IGNORED
    corrupted, targets = corrupt(tokens, np.random.default_rng(seed), tokenizer)
    corrupted, targets = np.where(real, corrupted, tokens), np.where(real, targets, IGNORED)
    if (targets == IGNORED).all():
        raise ValueError(f"the held-out texts are too short: none of their {real.sum()} tokens is "
                         "masked")
    return corrupted, targets, real.astype(np.int32)


class MaskedBatches:
    """Batches for a model that fills in tokens: batches[step] -> (corrupted tokens, targets)."""

    def __init__(self, batches: Batches, tokenizer: Tokenizer, seed: int):
        self.batches, self.tokenizer, self.seed = batches, tokenizer, seed
        self.sizes = batches.sizes

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, _ = self.batches[step]
        # The 2 keeps this stream apart from the crops' (seed, step).
        return corrupt(tokens, np.random.default_rng([self.seed, step, 2]), self.tokenizer)


def corrupt(tokens: np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer):
    """mask_tokens with the tokenizer's mask and end. ValueError if it has no mask."""
    if tokenizer.mask is None:
        raise ValueError("the tokenizer has no mask token")
    return mask_tokens(tokens, rng, tokenizer.mask, tokenizer.vocab_size, special=(tokenizer.end,))


def _stream(stream, least, name="the stream"):
    stream = np.asarray(stream)
    if stream.ndim != 1 or stream.dtype.kind not in "iu":
        raise TypeError(f"a stream is (N,) of integers, got {stream.dtype} {stream.shape}")
    if len(stream) < least:
        raise ValueError(f"{name} is too short: {least} tokens are needed, it has {len(stream)}")
    return stream.astype(np.int32, copy=False)


def _borders(weights, streams):
    """The places in [0, 1) where one stream ends and the next begins: (S - 1,) float64."""
    weights = np.asarray(weights, np.float64)
    if weights.shape != (streams,):
        raise ValueError(f"expected {streams} weights, one a stream, got shape {weights.shape}")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"weights must be finite, none negative, not all zero: {weights}")
    shares = np.cumsum(weights)
    return shares[:-1] / shares[-1]
