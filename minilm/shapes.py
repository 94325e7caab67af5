"""The tensors of Transformer(config), from the Config alone: nothing is built.

Shapes: C width, K width of the keys, V vocabulary, O out, I in.
"""

from minilm.transformer import Config


def linear_layers(c: Config) -> dict[str, tuple[int, int]]:
    """The linear layers of a block: path -> (O, I)."""
    C, K = c.width, c.width // c.heads * c.kv_heads
    gate = {"mlp.gate": (c.hidden, C)} if c.activation == "swiglu" else {}
    return {"attention.q": (C, C), "attention.k": (K, C), "attention.v": (K, C),
            "attention.o": (C, C), **gate, "mlp.up": (c.hidden, C), "mlp.down": (C, c.hidden)}


def tensor_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Path -> shape; a shared tensor once, by its first path, as in named_tensors."""
    C, V, masked = c.width, c.vocab_size, c.head == "masked"
    norm = {"weight": (C,)} | ({"bias": (C,)} if c.norm == "layer" else {})
    tables = {"embed": V, "position": c.context if c.positions == "learned" else 0,
              "segment": c.segments}
    shapes = {f"{path}.weight": (rows, C) for path, rows in tables.items() if rows}
    block = _with_bias(linear_layers(c), c.bias) | _below("norm1", norm) | _below("norm2", norm)
    for i in range(c.layers):
        shapes |= _below(f"blocks.{i}", block)
    shapes |= _below("norm" if c.norm_first else "embed_norm", norm)
    if masked:
        shapes |= _with_bias({"head.transform": (C, C)}, True) | _below("head.norm", norm)
        shapes["head.out.bias"] = (V,)
    return shapes if c.tied else shapes | {"head.out.weight" if masked else "head.weight": (V, C)}


def _with_bias(layers, bias):
    weights = {f"{path}.weight": shape for path, shape in layers.items()}
    return weights | ({f"{path}.bias": (O,) for path, (O, _) in layers.items()} if bias else {})


def _below(path, tensors):
    return {f"{path}.{name}": shape for name, shape in tensors.items()}
