"""Models in Hugging Face folders: config.json and model.safetensors.

A `Family` is a table of two columns, what Config and Transformer call something and what one
architecture of transformers calls it. The loader reads the table one way, the saver the other.
A value that Transformer cannot express is refused, never ignored.

Not read: dropout, which belongs to training and not to weights (`load_model` takes it as an
argument), and whatever serves only generation, initialisation or other tasks.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm.backend import to_device
from minilm.files import FormatError, read_json, read_tensors, write_json, write_tensors
from minilm.nn import Dropout, Embedding, LayerNorm, Linear, RMSNorm
from minilm.transformer import MLP, Attention, Block, Config, MaskedHead, Transformer

FLOATS = ("float32", "float16", "bfloat16", "float64")
PLAIN = (Transformer, Block, Attention, MLP, MaskedHead, Linear, Embedding, LayerNorm, RMSNorm,
         Dropout)  # fmt: skip
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Family(NamedTuple):
    """What one architecture calls the parts of Config and Transformer."""

    architecture: str
    model_type: str
    make: Callable[..., Config]
    fields: dict  # of Config -> of config.json
    activations: dict  # theirs -> ours; the first is written
    modules: dict  # ours -> theirs
    layer: str  # theirs, in front of the modules of block {i}
    block: dict  # ours, below blocks.{i} -> theirs, below layer; sharing one of theirs means joined
    dropouts: dict  # fields of config.json -> 1 where Config.dropout acts, 0 where it does not
    only: dict = {}  # fields of config.json -> the one value that Transformer can express
    absent: dict = {}  # fields of config.json -> their defaults, where Config's are others
    respell: tuple = ()  # (pattern, replacement): keys of older files
    copies: dict = {}  # second names of a tensor -> the first; both are written
    ignored: tuple = ()  # keys that play no part in the logits


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    make=Config.gpt2,
    fields={"vocab_size": "vocab_size", "context": "n_positions", "layers": "n_layer",
            "heads": "n_head", "width": "n_embd", "hidden": "n_inner",
            "norm_eps": "layer_norm_epsilon", "activation": "activation_function",
            "tied": "tie_word_embeddings"},
    activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
    modules={"embed": "transformer.wte", "position": "transformer.wpe",
             "norm": "transformer.ln_f", "head": "lm_head"},
    layer="transformer.h.{i}.",
    block={"norm1": "ln_1", "norm2": "ln_2", "attention.q": "attn.c_attn",
           "attention.k": "attn.c_attn", "attention.v": "attn.c_attn", "attention.o": "attn.c_proj",
           "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    dropouts={"embd_pdrop": 1, "resid_pdrop": 1, "attn_pdrop": 0},
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    respell=((r"^(?=(wte|wpe|ln_f|h\.\d+)\.)", "transformer."),),
    ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),
)  # fmt: skip

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    make=Config.llama,
    fields={"vocab_size": "vocab_size", "context": "max_position_embeddings",
            "layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size",
            "hidden": "intermediate_size", "kv_heads": "num_key_value_heads",
            "norm_eps": "rms_norm_eps", "activation": "hidden_act", "bias": "attention_bias",
            "tied": "tie_word_embeddings"},
    activations={"silu": "swiglu", "swish": "swiglu"},
    modules={"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    layer="model.layers.{i}.",
    block={"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
           "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
           "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj",
           "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"},
    dropouts={"attention_dropout": 0},
    only={"partial_rotary_factor": 1.0},
    ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
)  # fmt: skip

MISTRAL = LLAMA._replace(
    architecture="MistralForCausalLM",
    model_type="mistral",
    absent={"num_key_value_heads": 8, "sliding_window": 4096},
)

BERT = Family(
    architecture="BertForMaskedLM",
    model_type="bert",
    make=Config.bert,
    fields={"vocab_size": "vocab_size", "context": "max_position_embeddings",
            "layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size",
            "hidden": "intermediate_size", "segments": "type_vocab_size",
            "norm_eps": "layer_norm_eps", "activation": "hidden_act",
            "tied": "tie_word_embeddings"},
    activations={"gelu": "gelu"},
    modules={"embed": "bert.embeddings.word_embeddings",
             "position": "bert.embeddings.position_embeddings",
             "segment": "bert.embeddings.token_type_embeddings",
             "embed_norm": "bert.embeddings.LayerNorm",
             "head.transform": "cls.predictions.transform.dense",
             "head.norm": "cls.predictions.transform.LayerNorm",
             "head.out": "cls.predictions.decoder"},
    layer="bert.encoder.layer.{i}.",
    block={"attention.q": "attention.self.query", "attention.k": "attention.self.key",
           "attention.v": "attention.self.value", "attention.o": "attention.output.dense",
           "norm1": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
           "mlp.down": "output.dense", "norm2": "output.LayerNorm"},
    dropouts={"hidden_dropout_prob": 1, "attention_probs_dropout_prob": 0},
    only={"is_decoder": False, "position_embedding_type": "absolute"},
    respell=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    copies={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    ignored=("bert.embeddings.position_ids", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
             "cls.seq_relationship.weight", "cls.seq_relationship.bias"),
)  # fmt: skip

DISTILBERT = Family(
    architecture="DistilBertForMaskedLM",
    model_type="distilbert",
    make=functools.partial(Config.bert, segments=0),
    fields={"vocab_size": "vocab_size", "context": "max_position_embeddings", "layers": "n_layers",
            "heads": "n_heads", "width": "dim", "hidden": "hidden_dim", "activation": "activation",
            "tied": "tie_word_embeddings"},
    activations={"gelu": "gelu"},
    modules={"embed": "distilbert.embeddings.word_embeddings",
             "position": "distilbert.embeddings.position_embeddings",
             "embed_norm": "distilbert.embeddings.LayerNorm", "head.transform": "vocab_transform",
             "head.norm": "vocab_layer_norm", "head.out": "vocab_projector"},
    layer="distilbert.transformer.layer.{i}.",
    block={"attention.q": "attention.q_lin", "attention.k": "attention.k_lin",
           "attention.v": "attention.v_lin", "attention.o": "attention.out_lin",
           "norm1": "sa_layer_norm", "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2",
           "norm2": "output_layer_norm"},
    dropouts={"dropout": 1, "attention_dropout": 0},
    ignored=("distilbert.embeddings.position_ids",),
)  # fmt: skip

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, BERT, DISTILBERT)}
ONLY = {"add_cross_attention": False, "is_encoder_decoder": False, "quantization_config": None}
OPTIONAL = ("n_inner", "num_key_value_heads")  # may be null or absent, as nothing but these sizes


def load_model(path: str | os.PathLike, dtype: str = "float32", dropout: float = 0.0):
    """The Transformer in a folder of one of FAMILIES, with its weights cast to dtype (of FLOATS).

    Reads one file or shards, and older spellings. Raises FileNotFoundError; FormatError that names
    the field or the keys, where a file is damaged or says what Transformer cannot express.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {FLOATS}, got {dtype!r}")
    path = Path(path)
    raw = read_json(path / "config.json")
    try:
        family, config = _parse(raw)
    except ValueError as error:
        raise FormatError(path / "config.json", str(error)) from None
    file, tensors = _read_files(path)
    if config.layers > len(tensors):  # or a damaged size would have us list keys without end
        raise FormatError(path / "config.json", f"{family.fields['layers']} is {config.layers}, "
                          f"but {file.name} has only {len(tensors)} tensors")  # fmt: skip
    tensors = _plain_keys(file, tensors, family, config)
    layout = _layout(family, config)
    _check(file, tensors, layout)
    model = Transformer(dataclasses.replace(config, dropout=dropout))
    own = dict(model.named_tensors())
    for theirs, parts in layout.items():
        joined = _turn(theirs, tensors[theirs])
        ends = np.cumsum([shape[0] for _, shape in parts])
        for (ours, _), array in zip(parts, np.split(joined, ends[:-1])):
            # In place: a tied head holds the same Tensor.
            own[ours].__init__(array.astype(dtype, order="C"), requires_grad=True)
    return model


def save_model(model: Transformer, path: str | os.PathLike) -> None:
    """Write a folder that transformers and `load_model` read, in the model's dtype.

    config.json comes last, so a folder that is not whole does not load. ValueError, before
    anything is written, for a model that no family expresses or with other modules than its own.
    """
    for name, module in model.named_modules():
        if type(module) not in PLAIN:
            raise ValueError(f"{name or 'the model'} is a {type(module).__name__}: "
                             "only a Transformer with its own modules can be saved")  # fmt: skip
    family = _family_of(model.config)
    raw = _describe(family, model.config) | {"dtype": model.embed.weight.dtype.name}
    raw["torch_dtype"] = raw["dtype"]  # the name before transformers 5
    layout = _layout(family, model.config)
    expected = {ours: shape for parts in layout.values() for ours, shape in parts}
    state = model.state_dict()
    if differing := expected.items() ^ {name: array.shape for name, array in state.items()}.items():
        raise ValueError(f"tensors differ from what config says: {_some(dict(differing))}")
    tensors = {}
    for theirs, parts in layout.items():
        joined = np.concatenate([to_device(state[ours], "cpu") for ours, _ in parts])
        tensors[theirs] = _turn(theirs, joined)
    tensors |= {copy: tensors[name] for copy, name in family.copies.items()}
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").unlink(missing_ok=True)
    write_tensors(path / "model.safetensors", tensors, {"format": "pt"})
    write_json(path / "config.json", raw)


def _parse(raw) -> tuple[Family, Config]:
    """The family and Config that config.json describes; ValueError naming the field it cannot."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}, expected one of {list(FAMILIES)}")
    family = FAMILIES[kind]
    raw = family.absent | raw
    for field, value in (ONLY | family.only).items():
        _require(raw.get(field, value) == value, field, raw, repr(value))
    values, types = {}, {field.name: field.type for field in dataclasses.fields(Config)}
    for ours, theirs in family.fields.items():
        optional = raw.get(theirs) is None if theirs in OPTIONAL else theirs not in raw
        if optional and (theirs in OPTIONAL or types[ours] is not int):
            continue  # Config has the same default
        values[ours] = _value(theirs, raw, types[ours], family)
    config = family.make(**values)
    return family, _rotary(raw, config) if config.positions == "rotary" else config


def _value(field, raw, kind, family):
    """The field's value for Config: an int, float, bool or the name of an activation."""
    value = raw.get(field)
    if kind is int:
        _require(type(value) is int and value > 0, field, raw, "a positive integer")
    elif kind is float:
        fits = type(value) in (int, float) and 0 < value < FLOAT32_MAX
        _require(fits, field, raw, "a positive number")
        return float(value)
    elif kind is bool:
        _require(type(value) is bool, field, raw, "true or false")
    else:
        known = family.activations
        _require(isinstance(value, str) and value in known, field, raw, f"one of {list(known)}")
        return known[value]
    return value


def _rotary(raw, c: Config) -> Config:
    """c with its rotary base, once the fields that only Llama and Mistral have are checked."""
    width, window, bases = c.width // c.heads, raw.get("sliding_window"), set()
    _require(raw.get("head_dim") in (None, width), "head_dim", raw, f"{width}: hidden_size / heads")
    _require(raw.get("mlp_bias", False) == c.bias, "mlp_bias", raw, "the same as attention_bias")
    wide = window is None or type(window) is int and window >= c.context
    _require(wide, "sliding_window", raw, "null or at least max_position_embeddings")
    if "rope_theta" in raw:
        bases.add(_value("rope_theta", raw, float, None))
    for field in ("rope_parameters", "rope_scaling"):
        rope = raw.get(field)
        if rope is not None:
            plain = isinstance(rope, dict) and rope.keys() <= {"rope_theta", "rope_type", "type"}
            plain = plain and all(rope.get(k, "default") == "default" for k in ("rope_type", "type"))
            _require(plain, field, raw, 'null or of rope_type "default"')
            bases |= {_value("rope_theta", rope, float, None)} if "rope_theta" in rope else set()
    _require(len(bases) < 2, "rope_theta", raw, f"one value, not {sorted(bases)}")
    return dataclasses.replace(c, rope_theta=min(bases, default=c.rope_theta))


def _require(fits, field, raw, expected):
    if not fits:
        found = repr(raw[field]) if field in raw else "missing"
        raise ValueError(f"{field} is {found}, expected {expected}")


def _family_of(c: Config) -> Family:
    if c.positions == "rotary":
        return LLAMA
    if c.head == "masked":
        return BERT if c.segments else DISTILBERT
    return GPT2


def _describe(family: Family, c: Config) -> dict:
    """config.json for c; ValueError where it would not be read as c again."""
    names = {ours: theirs for theirs, ours in reversed(family.activations.items())}
    raw = {"architectures": [family.architecture], "model_type": family.model_type}
    raw |= {theirs: getattr(c, ours) for ours, theirs in family.fields.items()}
    raw[family.fields["activation"]] = names.get(c.activation, c.activation)
    raw |= {field: float(share * c.dropout) for field, share in family.dropouts.items()}
    if c.positions == "rotary":
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        raw |= {"head_dim": c.width // c.heads, "mlp_bias": c.bias, "rope_parameters": rope,
                "rope_theta": c.rope_theta}  # the last is for transformers before 5  # fmt: skip
    back = dataclasses.replace(_parse(raw)[1], dropout=c.dropout)
    for name, value in vars(c).items():
        if value != getattr(back, name):
            raise ValueError(f"{family.architecture} is the nearest architecture, but "
                             f"cannot express {name}={value!r}")  # fmt: skip
    return raw


def _layout(family: Family, c: Config) -> dict:
    """{their key: [(our name, shape), ...]}, several of ours where theirs joins them."""
    modules = dict(family.modules)
    for i in range(c.layers):
        layer = family.layer.format(i=i)
        modules |= {f"blocks.{i}.{ours}": layer + theirs for ours, theirs in family.block.items()}
    layout = {}
    for ours, theirs in modules.items():
        for suffix, shape in _shapes(ours, c).items():
            layout.setdefault(f"{theirs}.{suffix}", []).append((f"{ours}.{suffix}", shape))
    return layout


def _shapes(ours: str, c: Config) -> dict:
    """{"weight": shape, "bias": shape} of a module: known before a damaged size can ask for memory."""
    name, C, F, V = ours.split(".")[-1], c.width, c.hidden, c.vocab_size
    if "norm" in name:
        return {"weight": (C,)} | ({"bias": (C,)} if c.norm == "layer" else {})
    rows = {"embed": V, "position": c.context, "segment": c.segments}
    if name in rows:
        return {"weight": (rows[name], C)}
    K = C // c.heads * c.kv_heads
    O, I = {"k": (K, C), "v": (K, C), "gate": (F, C), "up": (F, C), "down": (C, F),
            "head": (V, C), "out": (V, C)}.get(name, (C, C))  # fmt: skip
    weight = {} if c.tied and name in ("head", "out") else {"weight": (O, I)}
    bias = name != "head" and (c.bias or ours.startswith("head."))
    return weight | ({"bias": (O,)} if bias else {})


def _turn(key, array):
    """GPT-2's Conv1D modules, all named c_*, hold W as (I, O)."""
    return array.T if ".c_" in key else array


def _read_files(folder):
    """(the file that errors name, {key: array})."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.exists() or not index.exists():
        return file, read_tensors(file)
    raw = read_json(index)
    shards = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(shards, dict):
        raise FormatError(index, f"weight_map is {shards!r}, expected keys and their files")
    tensors = {}
    for shard in sorted(set(map(str, shards.values()))):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII):
            raise FormatError(index, f"weight_map names {shard!r}, expected a .safetensors file")
        try:
            part = read_tensors(folder / shard)
        except FileNotFoundError:
            raise FormatError(index, f"weight_map names {shard!r}, which is not there") from None
        if twice := part.keys() & tensors.keys():
            raise FormatError(folder / shard, f"has what another shard has: {_some(twice)}")
        tensors |= part
    return index, tensors


def _plain_keys(file, tensors, family, c: Config):
    """The tensors under today's spelling, once, and without those that play no part."""
    plain = {}
    for key, array in tensors.items():
        for pattern, replacement in family.respell:
            key = re.sub(pattern, replacement, key)
        if key in plain:
            raise FormatError(file, f"{key} is there in two spellings")
        plain[key] = array
    for key in family.ignored:
        for i in range(c.layers if "{i}" in key else 1):
            plain.pop(key.format(i=i), None)
    head, embed = family.modules.get("head", family.modules.get("head.out")), family.modules["embed"]
    tied = {f"{head}.weight": f"{embed}.weight"} if c.tied else {}
    for copy, name in (family.copies | tied).items():
        if copy in plain and not np.array_equal(plain.setdefault(name, plain[copy]), plain[copy]):
            raise FormatError(file, f"{copy} differs from {name}, of which it should be a copy")
        plain.pop(copy, None)
    return plain


def _check(file, tensors, layout):
    """FormatError where the keys, shapes or dtypes are not those of the layout."""
    wrong = []
    for key, parts in layout.items():
        shape = _turn(key, np.broadcast_to(0, (sum(s[0] for _, s in parts), *parts[0][1][1:]))).shape
        if key in tensors and tensors[key].shape != shape:
            wrong.append(f"{key} is {tensors[key].shape}, expected {shape}")
        elif key in tensors and tensors[key].dtype.name not in FLOATS:
            wrong.append(f"{key} is {tensors[key].dtype}, expected one of {FLOATS}")
    missing, unexpected = layout.keys() - tensors.keys(), tensors.keys() - layout.keys()
    problems = {"missing keys: ": missing, "unexpected keys: ": unexpected, "": wrong}
    if text := "; ".join(kind + _some(names) for kind, names in problems.items() if names):
        raise FormatError(file, text)


def _some(names):
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more
