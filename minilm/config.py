"""The facts of an architecture, and nothing else: what one transformer needs to be many models.

Shapes: C width, H heads, K key/value heads, D head width, V vocabulary.
"""

from dataclasses import dataclass, replace

import numpy as np

from minilm.ranges import AT_LEAST_0, BELOW_1, POSITIVE, check, one_of, optional, whole
from minilm.rope import Dynamic, Linear, Llama3, Long, Yarn, check_rope

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")  # the linear layers of a block
GATED = ("swiglu", "geglu_tanh")
SIZE = whole(1)._replace(words="positive")
FLAGS = ("norm_first", "norm_output", "norm_both", "norm_plus_one", "causal", "tied",
         "scaled_embedding")
RANGES = dict.fromkeys(
    ("vocab_size", "context", "layers", "heads", "width", "hidden", "kv_heads"), SIZE) | {
    "head_width": optional(SIZE), "window": optional(SIZE), "norm": one_of("layer", "rms"),
    "qk_norm": optional(one_of("head", "width")),
    "positions": one_of("learned", "counted", "rotary"),
    "activation": one_of("gelu_tanh", "gelu", *GATED),
    "head": one_of("linear", "masked", "classes", "none"),
    "pooler": optional(one_of("tanh", "relu")), "padding": optional(whole(0)),
    "segments": whole(0), "norm_eps": AT_LEAST_0, "rope_theta": POSITIVE, "dropout": BELOW_1,
    **dict.fromkeys(("attention_scale", "attention_cap", "logits_cap", "window_theta"),
                    optional(POSITIVE))}


@dataclass(frozen=True)
class Config:
    """The facts of an architecture. ValueError if one is impossible or two contradict each other.

    The presets `gpt2`, `llama` and `bert` make a family's choices; the sizes are their arguments.

    >>> c = Config.llama(vocab_size=256, context=64, layers=2, heads=4, width=32, hidden=96)
    >>> c.norm, c.positions, c.activation, c.tied
    ('rms', 'rotary', 'swiglu', False)
    """

    vocab_size: int
    context: int  # the largest T
    layers: int
    heads: int
    width: int
    hidden: int  # the width inside the MLP
    kv_heads: int
    head_width: int | None = None  # None: width / heads
    norm: str = "layer"  # or "rms"
    norm_first: bool = True  # pre-norm; False: post-norm, as in the original transformer
    norm_output: bool = False  # pre-norm's norms are at the end of the branches: OLMo 2
    norm_both: bool = False  # pre-norm, and norms at the end of the branches too: Gemma 2 and 3
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight: Gemma
    norm_eps: float = 1e-5
    qk_norm: str | None = None  # RMSNorm of q and k: of each "head", or of all as one "width"
    positions: str = "learned"  # or "rotary", or "counted": learned, of what is not padding alone
    rope_theta: float = 10000.0
    rope: Linear | Dynamic | Llama3 | Yarn | Long | None = None  # how its angles are stretched
    unrotated: tuple[int, ...] = ()  # layers that know no positions: SmolLM3
    window_theta: float | None = None  # rope_theta of layers with a window, unstretched: Gemma 3
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(the width of a head)
    attention_cap: float | None = None  # cap tanh(scores / cap): Gemma 2
    activation: str = "gelu_tanh"  # or "gelu", "swiglu", "geglu_tanh"
    causal: bool = True
    window: int | None = None  # a query sees so many tokens, with itself; None: all before it
    unwindowed: tuple[int, ...] = ()  # layers that see all even so
    logits_cap: float | None = None  # cap tanh(logits / cap): Gemma 2
    head: str = "linear"  # or "masked": BERT's transform in front of the output; "classes"; "none"
    labels: tuple[str, ...] = ()  # the classes of a text, by their names, for head "classes"
    pooler: str | None = None  # of the first token, for the text: its activation, "tanh" or "relu"
    tied: bool = True  # the head over the vocabulary, if it has one, shares the embedding's weight
    bias: bool | tuple[str, ...] = True  # in a block's linear layers; or the names of those
    scaled_embedding: bool = False  # times sqrt(width): Gemma
    segments: int = 0  # BERT's token types; 0: no embedding of them
    padding: int | None = None  # the id whose row of the embedding is not trained by look-ups
    dropout: float = 0.0  # after the embedding and at the end of each residual branch

    def __post_init__(self):
        for name in FLAGS:
            if not isinstance(given := getattr(self, name), bool | np.bool_):
                raise TypeError(f"{name} must be True or False, got {given!r}")
        check(RANGES, **{name: getattr(self, name) for name in RANGES})
        if (self.head_width is None and self.width % self.heads) or self.heads % self.kv_heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}, "
                             f"and heads of kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.D % 2:
            raise ValueError(f"rotary positions need an even head width, got {self.D}")
        self._check_facts()

    def _check_facts(self):
        """ValueError for facts that contradict each other, or have no meaning."""
        if self.rope is not None:
            check_rope(self.rope, self.rope_theta, self.D)
        for name in ("unrotated", "unwindowed"):
            layers = getattr(self, name)
            if list(layers) != sorted({*layers} & {*range(self.layers)}):
                raise ValueError(f"{name} must be increasing numbers from 0 to {self.layers - 1}, "
                                 f"got {layers}")
        if not isinstance(self.bias, bool | np.bool_ | tuple):
            raise TypeError(f"bias must be True or False, or names of layers; got {self.bias!r}")
        own = [name for name in LINEAR if name != "gate" or self.activation in GATED]
        named = () if isinstance(self.bias, bool) else self.bias
        if not isinstance(self.bias, bool) and (
                list(named) != [n for n in own if n in named] or len(named) in (0, len(own))):
            raise ValueError(f"bias must be True, False or some of {own}, got {self.bias!r}")
        if type(self.labels) is not tuple or not all(type(name) is str for name in self.labels):
            raise TypeError(f"labels must be a tuple of names, got {self.labels!r}")
        if self.padding is not None and self.padding >= self.vocab_size:
            raise ValueError(f"padding must be one of the {self.vocab_size} ids of the vocabulary, "
                             f"got {self.padding}")
        for fits, name, needs in (
                (self.padding is not None or self.positions != "counted", "positions 'counted'",
                 "a padding"),
                (bool(self.labels) == (self.head == "classes"), "labels", "head 'classes', which "
                 "has at least one"),
                (not self.pooler or not self.language, "pooler", "head 'classes' or 'none'"),
                (not self.pooler or not self.causal, "pooler", "a model that is not causal"),
                (self.pooler or self.causal or not self.labels, "labels",
                 "a pooler, or a causal model"),
                (self.positions == "rotary" or not (self.rope or self.unrotated),
                 "rope or unrotated", "rotary positions"),
                (self.causal or not self.window, "window", "a causal model"),
                (self.window or not self.unwindowed, "unwindowed", "a window"),
                (self.norm_first or not self.norm_output, "norm_output", "norm_first"),
                (not self.norm_both or (self.norm_first and not self.norm_output), "norm_both",
                 "norm_first and without norm_output"),
                (not self.window_theta or (self.window and self.positions == "rotary"),
                 "window_theta", "a window and rotary positions"),
                (self.norm == "rms" or not (self.norm_plus_one or self.qk_norm),
                 "norm_plus_one or qk_norm", "norm 'rms'")):
            if not fits:
                raise ValueError(f"{name} goes only with {needs}")

    @property
    def D(self) -> int:
        """The width of a head."""
        return self.head_width or self.width // self.heads

    @property
    def language(self) -> bool:
        """Whether the head gives a logit for each token of the vocabulary."""
        return self.head in ("linear", "masked")

    def require_language(self, whose="this model"):
        """ValueError if the head gives anything else than logits of tokens."""
        if not self.language:
            does = "gives classes of whole texts" if self.labels else "has no head"
            raise ValueError(f"{whose} {does}; a language model is needed here")

    def require_writer(self, whose, does: str):
        """ValueError unless this is a causal language model, which alone does this."""
        self.require_language(whose)
        if not self.causal:
            raise ValueError(f"{whose} fills in masked tokens; only a causal model {does}")

    @property
    def shared(self) -> bool:
        """Whether the head and the embedding have one weight."""
        return self.tied and self.language

    @property
    def places(self) -> int:
        """Rows of the table of positions. Counted ones begin behind the row of the padding."""
        first = self.padding + 1 if self.positions == "counted" else 0
        return 0 if self.positions == "rotary" else first + self.context

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.activation in GATED

    @property
    def steady(self) -> int:
        """Up to so many tokens the same token at the same place is turned by the same angles."""
        steady = self.rope and self.rope.steady
        return min(steady, self.context) if steady else self.context

    def has_bias(self, path: str) -> bool:
        """Whether a block's linear layer has a bias; path: "attention.q", "mlp.up", .."""
        return self.bias if isinstance(self.bias, bool) else path.split(".")[-1] in self.bias

    def of_layers(self, layers) -> "Config":
        """The facts of a model of these layers of this one, in increasing order."""
        def kept(old): return tuple(i for i, layer in enumerate(layers) if layer in old)
        return replace(self, layers=len(layers), unrotated=kept(self.unrotated),
                       unwindowed=kept(self.unwindowed))

    @classmethod
    def gpt2(cls, vocab_size, context, layers, heads, width, **changes):
        """GPT-2 (Radford et al. 2019)."""
        return cls(**dict(vocab_size=vocab_size, context=context, layers=layers, heads=heads,
                          width=width, hidden=4 * width, kv_heads=heads) | changes)

    @classmethod
    def llama(cls, vocab_size, context, layers, heads, width, hidden, kv_heads=None, **changes):
        """Llama (Touvron et al. 2023, arXiv:2302.13971); with kv_heads < heads also Mistral.

        Later models are the same with other facts: Qwen2 has bias=("q", "k", "v"), Qwen3 qk_norm
        and head_width, Llama 3.1 a rope, Mistral 7B v0.1 a window, Gemma 2 norm_both and caps.
        """
        return cls(**dict(vocab_size=vocab_size, context=context, layers=layers, heads=heads,
                          width=width, hidden=hidden, kv_heads=kv_heads or heads, norm="rms",
                          norm_eps=1e-6, positions="rotary", activation="swiglu", tied=False,
                          bias=False) | changes)

    @classmethod
    def bert(cls, vocab_size, context, layers, heads, width, hidden, segments=2, **changes):
        """BERT for masked LM (Devlin et al. 2018, arXiv:1810.04805); with segments=0 DistilBERT.

        RoBERTa (Liu et al. 2019, arXiv:1907.11692) has positions="counted" and a padding. To
        classify texts, head="classes" has labels, and a pooler: "tanh", or DistilBERT's "relu".
        """
        return cls(**dict(vocab_size=vocab_size, context=context, layers=layers, heads=heads,
                          width=width, hidden=hidden, kv_heads=heads, norm_first=False,
                          norm_eps=1e-12, activation="gelu", causal=False, head="masked",
                          segments=segments) | changes)
