"""What transformers calls the parts of Config and Transformer: a table for each architecture."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from minilm.config import LINEAR, Config
from minilm.interop.rotary import PHI3_ROTARY, ROTARY, rotary_by_type
from minilm.interop.spelled import (
    COUNTED,
    NO_WINDOW,
    SCALE,
    UNROTATED,
    UNROTATED_WINDOW,
    UPPER_WINDOW,
    WINDOW,
    Spelled,
    biases,
    head_width,
    optional,
    window_but_of_every,
)
from minilm.shapes import tensor_shapes
from minilm.transformer import Transformer

FIELDS = {"vocab_size": "vocab_size", "context": "max_position_embeddings",
          "layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size",
          "hidden": "intermediate_size", "activation": "hidden_act",
          "tied": "tie_word_embeddings"}
PADDED = FIELDS | {"padding": "pad_token_id"}  # if transformers' Embedding knows it: padding_idx
ONLY = {"add_cross_attention": False, "is_encoder_decoder": False}
# Fields of config.json that change no logits: of training, of other tasks, of what is returned, and
# the ends of a text, which ends.py reads.
HARMLESS = ("transformers_version", "architectures", "dtype", "return_dict", "output_hidden_states",
            "use_cache", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
            "initializer_range", "bos_token_id", "eos_token_id")


class Family(NamedTuple):
    """What one architecture calls the parts of Config and Transformer."""

    architecture: str
    config: Callable[..., Config]
    fields: dict  # of Config -> of config.json
    activations: dict  # theirs -> ours; the first is written
    modules: dict  # ours -> theirs; several of ours with the same name there are one weight there
    layer: str  # the prefix of their modules in block i
    block: dict  # like modules, below blocks.i
    spelled: tuple[Spelled, ...] = ()  # facts that take several fields
    spellings: dict = {}  # another name of a field in config.json -> the one used here
    harmless: tuple = HARMLESS  # fields that do not matter
    only: dict = {}  # field -> the one value that Transformer can express, or a tuple of such
    absent: dict = {}  # field of config.json -> its default, if that is not Config's
    respell: dict = {}  # pattern -> replacement: keys of older files
    copies: dict = {}  # key -> another key of the same tensor; both are written
    ignored: tuple = ()  # keys that do not affect the logits
    model: Callable = Transformer  # of a Config
    shapes: Callable = tensor_shapes  # of a Config: our paths and shapes, without the model

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
    {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh",
     "gelu": "gelu", "gelu_python": "gelu"},
    {"embed": "transformer.wte", "position": "transformer.wpe", "norm": "transformer.ln_f",
     "head": "lm_head"},
    "transformer.h.{i}.",
    {"norm1": "ln_1", "attention.q": "attn.c_attn", "attention.k": "attn.c_attn",
     "attention.v": "attn.c_attn", "attention.o": "attn.c_proj", "norm2": "ln_2",
     "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    spellings={"hidden_size": "n_embd", "max_position_embeddings": "n_positions",
               "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    harmless=(*HARMLESS, "resid_pdrop", "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn",
              "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
              "summary_first_dropout", "pad_token_id"),
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "is_causal": True},
    respell={r"^(?=(wte|wpe|ln_f|h\.\d+)\.)": "transformer."},
    ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),
)

LLAMA = Family(
    "LlamaForCausalLM",
    Config.llama,
    PADDED | {"kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps"},
    {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu_tanh",
     "gelu_new": "geglu_tanh"},
    {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    "model.layers.{i}.",
    {"norm1": "input_layernorm", "attention.q": "self_attn.q_proj",
     "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
     "attention.o": "self_attn.o_proj", "norm2": "post_attention_layernorm",
     "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"},
    spelled=(head_width(divides=True), ROTARY, NO_WINDOW,
             biases({"attention_bias": LINEAR[:4], "mlp_bias": LINEAR[4:]})),
    harmless=(*HARMLESS, "attention_dropout", "pretraining_tp"),
    only={"partial_rotary_factor": 1.0, "is_causal": True},
    respell={r"^(?=(embed_tokens|norm|layers\.\d+)\.)": "model."},
    ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)

NO_BIAS = {"attention_bias": False, "mlp_bias": False}

MISTRAL = LLAMA._replace(
    architecture="MistralForCausalLM",
    spelled=(head_width(), ROTARY, WINDOW),
    only=LLAMA.only | NO_BIAS,
    absent={"num_key_value_heads": 8, "sliding_window": 4096},
)

QWEN2 = LLAMA._replace(
    architecture="Qwen2ForCausalLM",
    config=functools.partial(Config.llama, bias=LINEAR[:3]),
    spelled=(head_width(), ROTARY, UPPER_WINDOW),
    absent={"num_key_value_heads": 32, "sliding_window": 4096},
)

QWEN3 = LLAMA._replace(
    architecture="Qwen3ForCausalLM",
    config=functools.partial(Config.llama, qk_norm="head"),
    block=LLAMA.block | {"attention.q_norm": "self_attn.q_norm",
                         "attention.k_norm": "self_attn.k_norm"},
    spelled=(head_width(), ROTARY, UPPER_WINDOW, biases({"attention_bias": LINEAR[:4]})),
    absent={"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
)

SMOLLM3 = LLAMA._replace(
    architecture="SmolLM3ForCausalLM",
    config=functools.partial(Config.llama, rope_theta=2e6),
    spelled=(head_width(), ROTARY, UNROTATED, UNROTATED_WINDOW, LLAMA.spelled[-1]),
    absent={"num_key_value_heads": 4, "tie_word_embeddings": True, "pad_token_id": 128004},
)

OLMO2 = QWEN3._replace(
    architecture="Olmo2ForCausalLM",
    config=functools.partial(Config.llama, qk_norm="width", norm_output=True, norm_eps=1e-5),
    block=QWEN3.block | {"norm1": "post_attention_layernorm",
                         "norm2": "post_feedforward_layernorm"},
    spelled=(head_width(), ROTARY, NO_WINDOW, biases({"attention_bias": LINEAR[:4]})),
    absent={"pad_token_id": 1},
)

OLMO3 = OLMO2._replace(
    architecture="Olmo3ForCausalLM",
    spelled=(head_width(), rotary_by_type(5e5, 5e5), window_but_of_every(4), OLMO2.spelled[-1]),
    absent={"sliding_window": 4096, "pad_token_id": 1},
)

PHI3 = LLAMA._replace(
    architecture="Phi3ForCausalLM",
    config=functools.partial(Config.llama, norm_eps=1e-5),
    block=LLAMA.block | dict.fromkeys(("attention.q", "attention.k", "attention.v"),
                                      "self_attn.qkv_proj")
    | dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj"),
    spelled=(head_width(), PHI3_ROTARY, WINDOW),
    harmless=(*LLAMA.harmless, "resid_pdrop", "embd_pdrop"),
    only=LLAMA.only | NO_BIAS,
    absent={"pad_token_id": 32000},
)

GEMMA = LLAMA._replace(
    architecture="GemmaForCausalLM",
    config=functools.partial(Config.llama, norm_plus_one=True, scaled_embedding=True),
    activations={"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh", "gelu_new": "geglu_tanh",
                 "silu": "swiglu"},  # "gelu" was written for the tanh form
    spelled=(head_width(), ROTARY, NO_WINDOW, biases({"attention_bias": LINEAR[:4]})),
    only=LLAMA.only | {"use_bidirectional_attention": (None, False)},
    absent={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True,
            "pad_token_id": 0},
)

GEMMA2 = GEMMA._replace(
    architecture="Gemma2ForCausalLM",
    config=functools.partial(GEMMA.config, norm_both=True),
    fields=GEMMA.fields | {"activation": "hidden_activation"},
    activations={k: v for k, v in GEMMA.activations.items() if k != "gelu"},
    block=LLAMA.block | {"end1": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm",
                         "end2": "post_feedforward_layernorm"},
    spelled=(head_width(divides=True), ROTARY, window_but_of_every(2), SCALE,
             optional(attention_cap="attn_logit_softcapping", logits_cap="final_logit_softcapping"),
             GEMMA.spelled[-1]),
    absent=GEMMA.absent | {"num_key_value_heads": 4, "sliding_window": 4096,
                           "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
                           "final_logit_softcapping": 30.0},
)

GEMMA3 = GEMMA2._replace(
    architecture="Gemma3ForCausalLM",
    config=functools.partial(GEMMA2.config, qk_norm="head"),
    block=GEMMA2.block | {name: QWEN3.block[name] for name in ("attention.q_norm",
                                                               "attention.k_norm")},
    spelled=(head_width(divides=True), rotary_by_type(1e6, 1e4, "rope_local_base_freq"),
             window_but_of_every(6, ("sliding_window_pattern",)), SCALE,
             optional(logits_cap="final_logit_softcapping"), GEMMA.spelled[-1]),
    only=GEMMA.only | {"attn_logit_softcapping": None},
    absent={k: v for k, v in GEMMA2.absent.items() if "softcapping" not in k},
)

BERT = Family(
    "BertForMaskedLM",
    Config.bert,
    PADDED | {"segments": "type_vocab_size", "norm_eps": "layer_norm_eps"},
    {"gelu": "gelu", "gelu_python": "gelu"},
    {"embed": "bert.embeddings.word_embeddings", "position": "bert.embeddings.position_embeddings",
     "segment": "bert.embeddings.token_type_embeddings", "embed_norm": "bert.embeddings.LayerNorm",
     "head.transform": "cls.predictions.transform.dense",
     "head.norm": "cls.predictions.transform.LayerNorm", "head.out": "cls.predictions.decoder"},
    "bert.encoder.layer.{i}.",
    {"attention.q": "attention.self.query", "attention.k": "attention.self.key",
     "attention.v": "attention.self.value", "attention.o": "attention.output.dense",
     "norm1": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
     "mlp.down": "output.dense", "norm2": "output.LayerNorm"},
    harmless=(*HARMLESS, "hidden_dropout_prob", "attention_probs_dropout_prob",
              "classifier_dropout"),
    only={"is_decoder": False, "is_causal": False, "position_embedding_type": "absolute"},
    absent={"pad_token_id": 0, "type_vocab_size": 2},
    respell={r"\.gamma$": ".weight", r"\.beta$": ".bias"},
    copies={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    ignored=("bert.embeddings.position_ids", "bert.embeddings.token_type_ids",
             "bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight",
             "cls.seq_relationship.bias"),
)

DISTILBERT = Family(
    "DistilBertForMaskedLM",
    functools.partial(Config.bert, segments=0),
    PADDED | {"layers": "n_layers", "heads": "n_heads", "width": "dim", "hidden": "hidden_dim",
              "activation": "activation"},
    {"gelu": "gelu", "gelu_python": "gelu"},
    {"embed": "distilbert.embeddings.word_embeddings",
     "position": "distilbert.embeddings.position_embeddings",
     "embed_norm": "distilbert.embeddings.LayerNorm", "head.transform": "vocab_transform",
     "head.norm": "vocab_layer_norm", "head.out": "vocab_projector"},
    "distilbert.transformer.layer.{i}.",
    {"attention.q": "attention.q_lin", "attention.k": "attention.k_lin",
     "attention.v": "attention.v_lin", "attention.o": "attention.out_lin", "norm1": "sa_layer_norm",
     "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2", "norm2": "output_layer_norm"},
    spellings={"hidden_size": "dim", "num_attention_heads": "n_heads",
               "num_hidden_layers": "n_layers"},
    harmless=(*HARMLESS, "dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout",
              "sinusoidal_pos_embds"),
    only={"is_causal": False},
    absent={"pad_token_id": 0},
    ignored=("distilbert.embeddings.position_ids",),
)

ROBERTA = BERT._replace(
    architecture="RobertaForMaskedLM",
    config=functools.partial(Config.bert, positions="counted"),
    fields={ours: theirs for ours, theirs in BERT.fields.items() if ours != "context"},
    modules={"embed": "roberta.embeddings.word_embeddings",
             "position": "roberta.embeddings.position_embeddings",
             "segment": "roberta.embeddings.token_type_embeddings",
             "embed_norm": "roberta.embeddings.LayerNorm", "head.transform": "lm_head.dense",
             "head.norm": "lm_head.layer_norm", "head.out": "lm_head.decoder"},
    layer="roberta.encoder.layer.{i}.",
    spelled=(COUNTED,),
    absent={"pad_token_id": 1, "type_vocab_size": 2},
    copies={"lm_head.bias": "lm_head.decoder.bias"},
    ignored=("roberta.embeddings.position_ids", "roberta.embeddings.token_type_ids",
             "roberta.pooler.dense.weight", "roberta.pooler.dense.bias"),
)

XLM_ROBERTA = ROBERTA._replace(architecture="XLMRobertaForMaskedLM")

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3,
            "smollm3": SMOLLM3, "olmo2": OLMO2, "olmo3": OLMO3, "phi3": PHI3, "gemma": GEMMA,
            "gemma2": GEMMA2, "gemma3_text": GEMMA3, "bert": BERT, "distilbert": DISTILBERT,
            "roberta": ROBERTA, "xlm-roberta": XLM_ROBERTA}
