"""What transformers calls the parts of Config and Transformer: a table for each architecture."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from minilm.transformer import Config

FIELDS = {"vocab_size": "vocab_size", "context": "max_position_embeddings",
          "layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size",
          "hidden": "intermediate_size", "activation": "hidden_act",
          "tied": "tie_word_embeddings"}


class Family(NamedTuple):
    """What one architecture calls the parts of Config and Transformer."""

    architecture: str
    config: Callable[..., Config]
    fields: dict  # of Config -> of config.json
    activations: dict  # theirs -> ours; the first is written
    modules: dict  # ours -> theirs; several of ours with the same name there are one weight there
    layer: str  # the prefix of their modules in block i
    block: dict  # like modules, below blocks.i
    only: dict = {}  # field of config.json -> the one value that Transformer can express
    absent: dict = {}  # field of config.json -> its default, if that is not Config's
    respell: dict = {}  # pattern -> replacement: keys of older files
    copies: dict = {}  # key -> another key of the same tensor; both are written
    ignored: tuple = ()  # keys that do not affect the logits

    def names(self, layers: int) -> dict[str, str]:
        """{path of our module: theirs} for a model with this many layers."""
        names = dict(self.modules)
        for i in range(layers):
            for ours, theirs in self.block.items():
                names[f"blocks.{i}.{ours}"] = self.layer.format(i=i) + theirs
        return names

    def joined(self, layers: int, paths) -> dict[str, list[str]]:
        """{their module: those of our paths that it joins, in order}."""
        joined = {}
        for ours, theirs in self.names(layers).items():
            if ours in paths:
                joined.setdefault(theirs, []).append(ours)
        return joined


GPT2 = Family(
    "GPT2LMHeadModel",
    Config.gpt2,
    FIELDS | {"context": "n_positions", "layers": "n_layer", "heads": "n_head", "width": "n_embd",
              "hidden": "n_inner", "norm_eps": "layer_norm_epsilon",
              "activation": "activation_function"},
    {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
    {"embed": "transformer.wte", "position": "transformer.wpe", "norm": "transformer.ln_f",
     "head": "lm_head"},
    "transformer.h.{i}.",
    {"norm1": "ln_1", "attention.q": "attn.c_attn", "attention.k": "attn.c_attn",
     "attention.v": "attn.c_attn", "attention.o": "attn.c_proj", "norm2": "ln_2",
     "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    respell={r"^(?=(wte|wpe|ln_f|h\.\d+)\.)": "transformer."},
    ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),
)

LLAMA = Family(
    "LlamaForCausalLM",
    Config.llama,
    FIELDS | {"kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
              "bias": "attention_bias"},
    {"silu": "swiglu", "swish": "swiglu"},
    {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    "model.layers.{i}.",
    {"norm1": "input_layernorm", "attention.q": "self_attn.q_proj",
     "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
     "attention.o": "self_attn.o_proj", "norm2": "post_attention_layernorm",
     "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"},
    only={"partial_rotary_factor": 1.0},
    ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
)

MISTRAL = LLAMA._replace(
    architecture="MistralForCausalLM", absent={"num_key_value_heads": 8, "sliding_window": 4096}
)

BERT = Family(
    "BertForMaskedLM",
    Config.bert,
    FIELDS | {"segments": "type_vocab_size", "norm_eps": "layer_norm_eps"},
    {"gelu": "gelu"},
    {"embed": "bert.embeddings.word_embeddings", "position": "bert.embeddings.position_embeddings",
     "segment": "bert.embeddings.token_type_embeddings", "embed_norm": "bert.embeddings.LayerNorm",
     "head.transform": "cls.predictions.transform.dense",
     "head.norm": "cls.predictions.transform.LayerNorm", "head.out": "cls.predictions.decoder"},
    "bert.encoder.layer.{i}.",
    {"attention.q": "attention.self.query", "attention.k": "attention.self.key",
     "attention.v": "attention.self.value", "attention.o": "attention.output.dense",
     "norm1": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
     "mlp.down": "output.dense", "norm2": "output.LayerNorm"},
    only={"is_decoder": False, "position_embedding_type": "absolute"},
    respell={r"\.gamma$": ".weight", r"\.beta$": ".bias"},
    copies={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    ignored=("bert.embeddings.position_ids", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
             "cls.seq_relationship.weight", "cls.seq_relationship.bias"),
)

DISTILBERT = Family(
    "DistilBertForMaskedLM",
    functools.partial(Config.bert, segments=0),
    FIELDS | {"layers": "n_layers", "heads": "n_heads", "width": "dim", "hidden": "hidden_dim",
              "activation": "activation"},
    {"gelu": "gelu"},
    {"embed": "distilbert.embeddings.word_embeddings",
     "position": "distilbert.embeddings.position_embeddings",
     "embed_norm": "distilbert.embeddings.LayerNorm", "head.transform": "vocab_transform",
     "head.norm": "vocab_layer_norm", "head.out": "vocab_projector"},
    "distilbert.transformer.layer.{i}.",
    {"attention.q": "attention.q_lin", "attention.k": "attention.k_lin",
     "attention.v": "attention.v_lin", "attention.o": "attention.out_lin", "norm1": "sa_layer_norm",
     "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2", "norm2": "output_layer_norm"},
    ignored=("distilbert.embeddings.position_ids",),
)

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL, "bert": BERT,
            "distilbert": DISTILBERT}
