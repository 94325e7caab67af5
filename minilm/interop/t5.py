"""T5 in Hugging Face folders: T5ForConditionalGeneration's v1.0, and v1.1 as in Flan-T5.

The scripts, `huggingface` and `bitsandbytes` read Transformers alone and refuse these folders.

Two things do not stand in config.json as they seem to. Whether the head is tied: transformers
writes tie_word_embeddings as true since version 5, and a lm_head.weight of other numbers unties it.
Whether the head is scaled: scale_decoder_outputs, or before version 5 tie_word_embeddings.
"""

import os
from dataclasses import replace
from pathlib import Path

from minilm.files import FormatError, read_json
from minilm.interop.config_json import LAYERS, respelled
from minilm.interop.ends import describe_ends
from minilm.interop.families import HARMLESS, Family
from minilm.interop.huggingface import arrays_of, as_it_is, build, require_parts, write_folder
from minilm.interop.remembered import kept_fields
from minilm.interop.shards import open_arrays, require_folder
from minilm.interop.spelled import require, value
from minilm.seq2seq import T5, EncoderDecoder
from minilm.together import settle

FIELDS = {"vocab_size": "vocab_size", "layers": "num_layers", "decoder_layers":
          "num_decoder_layers", "heads": "num_heads", "width": "d_model", "hidden": "d_ff",
          "head_width": "d_kv", "buckets": "relative_attention_num_buckets",
          "max_distance": "relative_attention_max_distance", "norm_eps": "layer_norm_epsilon",
          "activation": "feed_forward_proj"}
SPELLED = ("decoder_start_token_id", "pad_token_id", "tie_word_embeddings", "scale_decoder_outputs",
           "is_gated_act", "dense_act_fn")
SPELLINGS = {"hidden_size": "d_model", "num_attention_heads": "num_heads",
             "num_hidden_layers": "num_layers", "head_dim": "d_kv"}
ABSENT = {"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
          "feed_forward_proj": "relu"}  # what older files leave out
ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu_tanh"}
INNER = {"relu": (False, "relu"), "geglu_tanh": (True, "gelu_new")}  # is_gated_act, dense_act_fn
ONLY = {"is_encoder_decoder": True, "is_decoder": False, "quantization_config": None}
UNIMPORTANT = {*HARMLESS, "dropout_rate", "initializer_factor", "classifier_dropout"} - {*SPELLED}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of shared.weight
HEAD, SHARED = "lm_head.weight", "shared.weight"


def load_model(
    path: str | os.PathLike, dtype: str = "float32", dropout: float = 0.0
) -> EncoderDecoder:
    """The EncoderDecoder in a folder, its weights cast to dtype. Raises as huggingface's does."""
    settle(path := Path(path))
    require_folder(path)
    try:
        c = replace(read_config(read_json(path / "config.json")), dropout=dropout)
    except ValueError as error:
        raise FormatError(path / "config.json", str(error)) from None
    with open_arrays(path) as (file, arrays):
        for name in [name for name in COPIES if name in arrays]:
            if not arrays.setdefault(SHARED, arrays[name]).equals(arrays.pop(name)):
                raise FormatError(file, f"{name} differs from {SHARED}, of which it should be a "
                                        "copy")
        if {HEAD, SHARED} <= arrays.keys() and not arrays[HEAD].equals(arrays[SHARED]):
            c = replace(c, tied=False)
        if c.decoder_layers > len(arrays):
            raise FormatError(path / "config.json", f"num_decoder_layers is {c.decoder_layers}, "
                                                    f"but {file.name} holds {len(arrays)} tensors")
        return build(family_of(c), c, file, arrays, dtype)


def save_model(model: EncoderDecoder, path: str | os.PathLike, tokenizer=None) -> None:
    """Write a folder that transformers and `load_model` read. Raises as huggingface's does."""
    if type(model) is not EncoderDecoder:
        raise TypeError(f"expected an EncoderDecoder, got a {type(model).__name__}")
    family, raw = describe(model)
    require_parts(model, EncoderDecoder(as_it_is(model), seed=None))
    model.require_finite()
    write_folder(model, path, raw, arrays_of(model, family), tokenizer)


def read_config(raw) -> T5:
    """What config.json describes. ValueError, with the field's name, if T5 cannot express it."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "t5":
        raise ValueError(f"model_type is {kind!r}, expected 't5'")
    raw = ABSENT | respelled(raw, SPELLINGS)
    if raw.get("num_decoder_layers") is None:
        raw["num_decoder_layers"] = raw.get("num_layers")
    for field, only in ONLY.items():
        require(raw.get(field, only) == only, raw, field, repr(only))
    types = T5.__dataclass_fields__
    facts = {ours: value(raw, theirs, types[ours].type) for ours, theirs in FIELDS.items()}
    require(facts["activation"] in ACTIVATIONS, raw, "feed_forward_proj",
            f"one of {list(ACTIVATIONS)}")
    facts["activation"] = ACTIVATIONS[facts["activation"]]
    for field, given in zip(("is_gated_act", "dense_act_fn"), INNER[facts["activation"]]):
        require(raw.get(field, given) == given, raw, field, f"{given!r}, as feed_forward_proj says")
    for field in ("num_layers", "num_decoder_layers"):
        require(raw[field] <= LAYERS, raw, field, f"at most {LAYERS}")
    tied = "tie_word_embeddings" not in raw or value(raw, "tie_word_embeddings", bool)
    scaled = value(raw, "scale_decoder_outputs", bool) if "scale_decoder_outputs" in raw else tied
    return T5(**facts, tied=tied, scaled_head=scaled, start=_start(raw))


def _start(raw) -> int:
    """decoder_start_token_id, or else pad_token_id, or else 0."""
    for field in ("decoder_start_token_id", "pad_token_id"):
        if raw.get(field) is not None:
            require(type(raw[field]) is int and raw[field] >= 0, raw, field, "an id")
            return raw[field]
    return 0


def describe(model: EncoderDecoder) -> tuple[Family, dict]:
    """The names of the model's parts there, and its config.json."""
    c, names = as_it_is(model), {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    gated, inner = INNER[c.activation]
    raw = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    raw |= {theirs: getattr(c, ours) for ours, theirs in FIELDS.items()} | ONLY
    raw |= {"feed_forward_proj": names[c.activation], "is_gated_act": gated, "dense_act_fn": inner,
            "tie_word_embeddings": c.tied, "scale_decoder_outputs": c.scaled_head}
    del raw["quantization_config"]
    _, first = next(model.named_tensors())
    raw["dtype"] = raw["torch_dtype"] = first.dtype.name
    raw |= describe_ends(model.ends) | {"decoder_start_token_id": c.start}
    family = family_of(c)
    return family, kept_fields(model.origin, family) | raw


def family_of(c: T5) -> Family:
    """What transformers calls all modules of a T5 with these facts."""
    modules = {"embed": "shared", "head": "lm_head"}
    inner = ({"mlp.gate": "wi_0", "mlp.up": "wi_1", "mlp.down": "wo"} if c.activation != "relu"
             else {"mlp.up": "wi", "mlp.down": "wo"})
    for stack, layers, last in (("encoder", c.layers, 1), ("decoder", c.decoder_layers, 2)):
        modules |= {f"{stack}.norm": f"{stack}.final_layer_norm", f"{stack}.distances":
                    f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"}
        block = {"norm1": "0.layer_norm", "norm2": f"{last}.layer_norm"}
        block |= {ours: f"{last}.DenseReluDense.{theirs}" for ours, theirs in inner.items()}
        block |= {f"attention.{n}": f"0.SelfAttention.{n}" for n in "qkvo"}
        if stack == "decoder":
            block |= {f"cross.{n}": f"1.EncDecAttention.{n}" for n in "qkvo"}
            block["norm_cross"] = "1.layer_norm"
        modules |= {f"{stack}.blocks.{i}.{ours}": f"{stack}.block.{i}.layer.{theirs}"
                    for i in range(layers) for ours, theirs in block.items()}
    return Family("T5ForConditionalGeneration", T5, FIELDS, ACTIVATIONS, modules, "", {},
                  spellings=SPELLINGS, model=EncoderDecoder, shapes=tensor_shapes, ignored=(
                      "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",))


def tensor_shapes(c: T5) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the tensors of EncoderDecoder(c); nothing is built."""
    C, Q = c.width, c.heads * c.head_width
    ends = {"q": (Q, C), "k": (Q, C), "v": (Q, C), "o": (C, Q), "gate": (c.hidden, C),
            "up": (c.hidden, C), "down": (C, c.hidden), "embed": (c.vocab_size, C),
            "head": (c.vocab_size, C), "distances": (c.buckets, c.heads)}
    modules = family_of(c).modules.keys() - ({"head"} if c.tied else set())
    return {f"{path}.weight": ends.get(path.split(".")[-1], (C,)) for path in modules}
