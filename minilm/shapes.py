"""The tensors of Transformer(config), from the Config alone: nothing is built.

Shapes: C width, Q width of all queries, K of the keys, V vocabulary, O out, I in.
"""

from minilm.config import Config


def linear_layers(c: Config) -> dict[str, tuple[int, int]]:
    """The linear layers of a block: path -> (O, I)."""
    C, Q, K = c.width, c.heads * c.D, c.kv_heads * c.D
    gate = {"mlp.gate": (c.hidden, C)} if c.gated else {}
    return {"attention.q": (Q, C), "attention.k": (K, C), "attention.v": (K, C),
            "attention.o": (C, Q), **gate, "mlp.up": (c.hidden, C), "mlp.down": (C, c.hidden)}


def tensor_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Path -> shape; a shared tensor once, by its first path, as in named_tensors."""
    C, V = c.width, c.vocab_size
    norm = {"weight": (C,)} | ({"bias": (C,)} if c.norm == "layer" else {})
    tables = {"embed": V, "position": c.places, "segment": c.segments}
    shapes = {f"{path}.weight": (rows, C) for path, rows in tables.items() if rows}
    block = {}
    for path, (O, I) in linear_layers(c).items():
        block |= _linear(path, O, I, c.has_bias(path))
    for name in ("norm1", "norm2", *(("end1", "end2") if c.norm_both else ())):
        block |= _below(name, norm)
    block |= qk_norms(c)
    for i in range(c.layers):
        shapes |= _below(f"blocks.{i}", block)
    shapes |= _below("norm" if c.norm_first else "embed_norm", norm)
    if c.pooler:
        shapes |= _linear("pooler.dense", C, C, True)
    if c.labels:
        shapes |= _linear("head", len(c.labels), C, bool(c.pooler))
    if c.head == "masked":
        shapes |= _linear("head.transform", C, C, True) | _below("head.norm", norm)
        shapes["head.out.bias"] = (V,)
    own = c.language and not c.tied
    return shapes | ({"head.out.weight" if c.head == "masked" else "head.weight": (V, C)} if own
                     else {})


def qk_norms(c: Config) -> dict[str, tuple[int]]:
    """The norms of a block's q and k."""
    if not c.qk_norm:
        return {}
    q, k = (c.D, c.D) if c.qk_norm == "head" else (c.heads * c.D, c.kv_heads * c.D)
    return {"attention.q_norm.weight": (q,), "attention.k_norm.weight": (k,)}


def _linear(path, O, I, bias):
    return {f"{path}.weight": (O, I)} | ({f"{path}.bias": (O,)} if bias else {})


def _below(path, tensors):
    return {f"{path}.{name}": shape for name, shape in tensors.items()}
