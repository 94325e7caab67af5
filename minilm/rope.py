"""Angles of rotary positions (Su et al. 2021, arXiv:2104.09864), and how they are stretched.

Position p turns the i-th pair of a head by p w_i, with w_i = theta^(-2i/D), eq. (15) there. A model
that was trained on short texts reads longer ones if its w_i are made smaller. Each class below is a
way to do that, and Config.rope holds one of them, or None. All compute in float32, in the order in
which transformers does, so that the angles are the same.

Letters: D the width of a head, w the angles per position (D/2,), T the tokens of a pass.
"""

import math
from dataclasses import dataclass

import numpy as np

from minilm.backend import array_module


def powers(theta: float, D: int, xp=np):
    """1 / w_i = theta^(2i/D), i = 0 .. D/2 - 1: (D/2,)."""
    half = D // 2
    return theta ** (xp.arange(half, dtype=np.float32) / half)


def frequencies(theta: float, D: int, xp=np):
    """w_i = theta^(-2i/D): (D/2,)."""
    return 1 / powers(theta, D, xp)


@dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595), eq. (4): p becomes p / factor.

    Divides all w by the factor.
    """

    factor: float
    steady = None  # w depends on T above this many tokens; None: never
    scale = 1.0  # a factor of cos and sin

    def frequencies(self, theta, D, T, xp=np):
        return frequencies(theta, D, xp) / self.factor


@dataclass(frozen=True)
class Dynamic:
    """Dynamic NTK scaling (Peng et al. 2023, arXiv:2309.00071, appendices A.1 and A.2).

    If a text has more tokens than the model was trained on, T > original, theta grows with it:
    theta' = theta (factor T / original - (factor - 1))^(D / (D - 2)). The same token at the same
    place is then turned by another angle in a longer text.
    """

    factor: float
    original: int
    scale = 1.0

    @property
    def steady(self):
        return self.original

    def frequencies(self, theta, D, T, xp=np):
        T = max(T, self.original)
        stretch = (self.factor * T / self.original) - (self.factor - 1)
        return frequencies(theta * stretch ** (D / (D - 2)), D, xp)


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1 (Grattafiori et al. 2024, arXiv:2407.21783, section 3.4.1; the formula is in the
    code that was published with it).

    A pair that turns once in L = 2 pi / w positions keeps w if L < original / high, gets w / factor
    if L > original / low, and between them a mean of both, weighted by s = (original / L - low) /
    (high - low): (1 - s) w / factor + s w.
    """

    factor: float
    original: int
    low: float = 1.0
    high: float = 4.0
    steady, scale = None, 1.0

    def frequencies(self, theta, D, T, xp=np):
        w = frequencies(theta, D, xp)
        L = 2 * math.pi / w
        s = (self.original / L - self.low) / (self.high - self.low)
        slow, fast = L > self.original / self.low, L < self.original / self.high
        mean = (1 - s) * w / self.factor + s * w
        return xp.where(fast, w, xp.where(slow, w / self.factor, mean))


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2.

    A pair that turns r = original w / 2 pi times in the original context keeps w if r > fast, and
    gets w / factor if r < slow. Between those pairs the weight of w falls in a straight line, in
    the pair's number i, as in the code that was published with the paper. truncate: the line begins
    and ends at whole i. cos and sin are multiplied by `attention`, 0.1 ln(factor) + 1 if it is
    None: eq. (22), whose sqrt(1/t) is for q and for k.
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None
    truncate: bool = True
    steady = None

    @property
    def scale(self):
        if self.attention is not None:
            return self.attention
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, theta, D, T, xp=np):
        inverse = powers(theta, D, xp)
        first, last = (self._pair(r, theta, D) for r in (self.fast, self.slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, D - 1)
        last += 0.001 * (first == last)
        keeps = 1 - xp.clip((xp.arange(D // 2, dtype=np.float32) - first) / (last - first), 0, 1)
        return 1 / (self.factor * inverse) * (1 - keeps) + 1 / inverse * keeps

    def _pair(self, r, theta, D):
        """The i, not whole, of the pair that turns r times in the original context."""
        return D * math.log(self.original / (r * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class Long:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753), as in Phi-3: a divisor for each w.

    `short` (D/2 numbers) for texts up to the original context, `long` for those beyond. cos and sin
    are multiplied by `attention`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention: float = 1.0

    @property
    def steady(self):
        return self.original

    @property
    def scale(self):
        return self.attention

    def frequencies(self, theta, D, T, xp=np):
        divisors = xp.asarray(self.long if T > self.original else self.short, np.float32)
        return 1 / (divisors * powers(theta, D, xp))


KINDS = (Linear, Dynamic, Llama3, Yarn, Long)


def check_rope(rope, theta: float, D: int):
    """ValueError if these numbers give no angles."""
    if type(rope) not in KINDS:
        raise ValueError(f"rope must be None or of {[k.__name__ for k in KINDS]}, got {rope!r}")
    for name, value in vars(rope).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(x is None or 0 < x < 1e30 for x in numbers) and name != "truncate":
            raise ValueError(f"{name} of rope must be positive, got {value!r}")
    least = {Dynamic: 4, Long: 2 * len(getattr(rope, "long", ()))}.get(type(rope), 2)
    if D < least or (type(rope) is Long and not D // 2 == len(rope.short) == len(rope.long)):
        raise ValueError(f"{rope} does not go with heads of width {D}")
    if type(rope) is Llama3 and rope.low >= rope.high:
        raise ValueError(f"low must be below high, got {rope}")
    if type(rope) is Yarn and theta <= 1:
        raise ValueError(f"YaRN needs rope_theta > 1, got {theta}")


def rotary_tables(c, places, dtype):
    """cos and sin of the angles at these places, from float32 as in transformers: (T, D/2) each.

    c: a Config. With a window_theta the layers with a window have tables of their own, which come
    behind the others. places: increasing positions. Where the angles depend on the length of the
    text, it ends at the last place.
    """
    xp = array_module(places)
    if c.rope is None:
        w, scale = frequencies(c.rope_theta, c.D, xp), 1.0
    else:
        T = int(places[-1]) + 1 if c.rope.steady else None
        w, scale = c.rope.frequencies(c.rope_theta, c.D, T, xp), c.rope.scale
    tables = _tables(places, w, scale, dtype)
    if c.window_theta:
        tables += _tables(places, frequencies(c.window_theta, c.D, xp), 1.0, dtype)
    return tables


def _tables(places, w, scale, dtype):
    xp, angles = array_module(places), places[:, None].astype(np.float32) * w
    cos, sin = xp.cos(angles), xp.sin(angles)
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    return cos.astype(dtype), sin.astype(dtype)
