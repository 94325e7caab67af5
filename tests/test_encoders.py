"""Encoders and other heads, as transformers makes and reads them: RoBERTa, segments, padding inside
the text, hidden states, classes of texts, and PEFT's adapters for those."""

import copy
import dataclasses

import numpy as np
import pytest

from minilm import ops
from minilm.files import read_json, write_json
from minilm.interop.config_json import describe_config
from minilm.interop.families import FAMILIES, ONLY
from minilm.interop.heads import HEADS
from minilm.interop.huggingface import load_model, save_model
from minilm.interop.peft import load_adapter, save_adapter
from minilm.peft import add_lora, retrain
from minilm.shapes import tensor_shapes
from minilm.tensorfiles import read_tensors, write_tensors

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]

BERT = dict(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=24)
LLAMA = BERT | dict(num_key_value_heads=2, pad_token_id=1)
SMALL = dict(vocab_size=23, dim=16, hidden_dim=24, n_layers=2, n_heads=4,
             max_position_embeddings=24)
GPT2 = dict(vocab_size=23, n_embd=16, n_layer=2, n_head=4, n_positions=24)
GEMMA = LLAMA | dict(head_dim=4, query_pre_attn_scalar=4, sliding_window=6,
                     final_logit_softcapping=0.5)
UNTIED = dict(tie_word_embeddings=False)
NAMES = dict(id2label={"0": "no", "1": "perhaps", "2": "yes"})
CASES = {  # name -> (transformers' class, its config)
    "bert": ("BertForMaskedLM", BERT),
    "bert, untied": ("BertForMaskedLM", BERT | UNTIED | dict(pad_token_id=5)),
    "bert, no padding": ("BertForMaskedLM", BERT | dict(pad_token_id=None)),
    "bert, bare": ("BertModel", BERT),
    "bert, classes": ("BertForSequenceClassification", BERT | NAMES),
    "bert, regression": ("BertForSequenceClassification", BERT | dict(num_labels=1)),
    "distilbert": ("DistilBertForMaskedLM", SMALL),
    "distilbert, untied": ("DistilBertForMaskedLM", SMALL | UNTIED),
    "distilbert, bare": ("DistilBertModel", SMALL),
    "distilbert, classes": ("DistilBertForSequenceClassification", SMALL),
    "roberta": ("RobertaForMaskedLM", BERT | dict(type_vocab_size=1)),
    "roberta, untied": ("RobertaForMaskedLM", BERT | UNTIED | dict(pad_token_id=0)),
    "roberta, bare": ("RobertaModel", BERT),
    "roberta, classes": ("RobertaForSequenceClassification", BERT | NAMES),
    "xlm-r": ("XLMRobertaForMaskedLM", BERT | dict(type_vocab_size=1)),
    "xlm-r, classes": ("XLMRobertaForSequenceClassification", BERT),
    "gpt2, bare": ("GPT2Model", GPT2),
    "gpt2, classes": ("GPT2ForSequenceClassification", GPT2 | dict(pad_token_id=1)),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, tied": ("LlamaForCausalLM", LLAMA | dict(tie_word_embeddings=True)),
    "llama, bare": ("LlamaModel", LLAMA),
    "llama, classes": ("LlamaForSequenceClassification", LLAMA | NAMES),
    "qwen3, bare": ("Qwen3Model", LLAMA | dict(head_dim=4)),
    "gemma, classes": ("GemmaForSequenceClassification", LLAMA | dict(head_dim=4)),
    "gemma 2, bare": ("Gemma2Model", GEMMA),
    "gemma 2, classes": ("Gemma2ForSequenceClassification", GEMMA),
    "gemma 3, bare": ("Gemma3TextModel", GEMMA),
    "gemma 3, classes": ("Gemma3TextForSequenceClassification", GEMMA),
}
T = 20
LENGTHS = np.array([[T], [13], [5]])
MASKS = {"none": np.ones((3, T), np.int64), "right": (np.arange(T) < LENGTHS).astype(np.int64),
         "left": (np.arange(T) >= T - LENGTHS).astype(np.int64)}
LABELS = np.array([1, 0, 1])


def made(peer, name, changes, folder):
    """transformers' model with weights that hide no swaps, saved in the folder."""
    torch, transformers = peer
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, peer, tmp_path_factory):
    """(transformers' model, ours from its folder, the folder)."""
    folder = tmp_path_factory.mktemp("theirs")
    theirs = made(peer, *CASES[request.param], folder)
    return theirs, load_model(folder), folder


def text(theirs, mask):
    """Tokens with the model's padding where the mask is 0, and one in the midst of the text."""
    pad = theirs.config.pad_token_id
    tokens = np.random.default_rng(3).integers(6, 23, mask.shape)
    tokens[0, 7] = tokens[1, 10] = 1 if pad is None else pad
    return np.where(mask == 1, tokens, 1 if pad is None else pad)


def run(peer, theirs, tokens, mask, **others):
    """Their logits, or hidden states: a Tensor. With softmax in the model's dtype: Gemma 2's in
    float32 overflows at a float64 mask."""
    torch, _ = peer
    given = {name: torch.tensor(array) for name, array in others.items()}
    softmax = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype: softmax(x, dim))
        out = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask), **given)
    return out.logits if "logits" in out else out.last_hidden_state


def agree(ours, theirs, tolerance=1e-6):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("side", MASKS)
def test_logits(peer, pair, side):
    """Ours in float32 and in float64 against theirs in float64."""
    theirs, ours, folder = pair
    mask, tokens = MASKS[side], text(theirs, MASKS[side])
    expected = run(peer, copy.deepcopy(theirs).double(), tokens, mask)
    kept = ... if expected.ndim == 2 else mask == 1
    agree(ours(tokens, mask).data[kept], expected[kept])
    agree(load_model(folder, "float64")(tokens, mask).data[kept], expected[kept])
    assert tensor_shapes(ours.config) == {path: t.shape for path, t in ours.named_tensors()}


def losses(peer, theirs, ours, tokens, mask):
    """(theirs, ours) of one batch: of tokens, of classes or numbers, or of hidden states."""
    torch, _ = peer
    x, y = run(peer, theirs, tokens, mask), ours(tokens, mask)
    F = torch.nn.functional
    if ours.config.labels:
        if len(ours.config.labels) == 1:
            return F.mse_loss(x[:, 0], torch.tensor(LABELS).to(x.dtype)), ops.mse(
                y[:, 0], LABELS.astype(np.float32))
        return F.cross_entropy(x, torch.tensor(LABELS)), ops.cross_entropy(y, LABELS)
    targets = np.where(mask == 1, np.roll(tokens, 1, 1), -100)
    if ours.config.language:
        return (F.cross_entropy(x.flatten(0, 1), torch.tensor(targets).flatten()),
                ops.cross_entropy(y, targets))
    weights = np.random.default_rng(0).uniform(0, 1, x.shape) * (mask[..., None] == 1)
    return (x * x * torch.tensor(weights)).sum(), (y * y * weights.astype(np.float32)).sum()


@pytest.mark.parametrize("side", ["right", "left"])
def test_losses_and_gradients(peer, pair, side):
    """With padding around the text and inside it. Ours in float32, theirs in float64."""
    theirs, ours, _ = pair
    theirs, mask = copy.deepcopy(theirs).double(), MASKS[side]
    expected, found = losses(peer, theirs, ours, text(theirs, mask), mask)
    found.backward()
    expected.backward()
    agree(found.data, expected)
    norm = sum(float((t.grad.astype(np.float64) ** 2).sum()) for t in ours.parameters()
               if t.grad is not None)
    expected = sum(float((p.grad ** 2).sum()) for p in theirs.parameters() if p.grad is not None)
    assert abs(norm / expected - 1) < 2e-6  # of the squares
    embedding = theirs.get_input_embeddings()
    agree(ours.embed.weight.grad, embedding.weight.grad, 2e-6)
    assert ours.config.padding == embedding.padding_idx
    if ours.position:
        name = next(n for n, _ in theirs.named_parameters() if "position_embed" in n or "wpe" in n)
        agree(ours.position.weight.grad, theirs.get_parameter(name).grad, 2e-6)
    for t in ours.parameters():
        t.grad = None


def test_saved_and_read_there(peer, pair, tmp_path):
    _, transformers = peer
    theirs, ours, _ = pair
    save_model(ours, tmp_path)
    raw, mask = read_json(tmp_path / "config.json"), MASKS["left"]
    again, info = getattr(transformers, raw["architectures"][0]).from_pretrained(
        tmp_path, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    tokens = text(theirs, mask)
    expected = run(peer, theirs, tokens, mask)
    kept = ... if expected.ndim == 2 else mask == 1
    agree(run(peer, again.eval(), tokens, mask).detach().numpy()[kept], expected[kept])
    assert again.config.pad_token_id == theirs.config.pad_token_id
    mine = load_model(tmp_path)
    assert mine.config == ours.config and mine.ends == ours.ends
    assert np.array_equal(mine(tokens, mask).data, ours(tokens, mask).data)
    if ours.config.labels:
        assert again.config.id2label == theirs.config.id2label


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification",
                                  "RobertaModel"])
def test_segments(peer, tmp_path, name):
    theirs = made(peer, name, BERT, tmp_path)
    ours, mask = load_model(tmp_path), MASKS["right"]
    tokens, segments = text(theirs, mask), np.repeat([[0] * 8 + [1] * 12], 3, 0)
    expected = run(peer, theirs, tokens, mask, token_type_ids=segments)
    kept = ... if expected.ndim == 2 else mask == 1
    agree(ours(tokens, mask, segments=segments).data[kept], expected[kept], 2e-6)
    assert np.abs(ours(tokens, mask).data - expected.detach().numpy())[kept].max() > 1e-3


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_poolers(peer, tmp_path, name):
    torch, transformers = peer
    theirs = made(peer, name, BERT, tmp_path)
    tokens = text(theirs, MASKS["none"])
    ours = load_model(tmp_path)
    agree(ours.pooled(ours(tokens)).data, theirs(torch.tensor(tokens)).pooler_output)
    kind = getattr(transformers, name)
    kind(theirs.config, add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    bare = load_model(tmp_path / "bare")
    assert bare.config == dataclasses.replace(ours.config, pooler=None)
    with pytest.raises(ValueError, match="no pooler"):
        bare.pooled(bare(tokens))
    save_model(bare, tmp_path / "again")
    assert load_model(tmp_path / "again").config == bare.config
    assert not any("pooler" in key for key in read_tensors(
        tmp_path / "again" / "model.safetensors"))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] != "GPT2Model"])
@pytest.mark.parametrize("named", [None, []])
def test_keys_show_a_head_that_is_not_named(peer, tmp_path, name, named):
    """GPT-2's body alone is excepted: its head would be the embedding, which is there."""
    theirs = made(peer, CASES[name][0], CASES[name][1] | UNTIED, tmp_path)
    raw = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", raw | {"architectures": named})
    ours, tokens = load_model(tmp_path), text(theirs, MASKS["none"])
    agree(ours(tokens).data, run(peer, theirs, tokens, MASKS["none"]), 3e-6)
    save_model(ours, tmp_path / "b")
    assert read_json(tmp_path / "b" / "config.json")["architectures"] == [CASES[name][0]]


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "llama, tied"])
def test_a_trained_head_is_read_as_transformers_reads_it(peer, tmp_path, name):
    """config.json says that it is tied; the numbers say otherwise."""
    theirs = made(peer, *CASES[name], tmp_path)
    head = {"distilbert": "vocab_projector", "roberta": "lm_head.decoder", "llama, tied": "lm_head",
            "bert": "cls.predictions.decoder"}[name] + ".weight"
    file = tmp_path / "model.safetensors"
    write_tensors(file, read_tensors(file) | {
        head: theirs.get_input_embeddings().weight.detach().numpy() + 0.1})
    again = type(theirs).from_pretrained(tmp_path).eval()
    tokens, mask = text(theirs, MASKS["left"]), MASKS["left"]
    expected = run(peer, again, tokens, mask).detach().numpy()[mask == 1]
    before = run(peer, theirs, tokens, mask).detach().numpy()[mask == 1]
    assert np.abs(expected - before).max() > 0.05
    ours = load_model(tmp_path)
    agree(ours(tokens, mask).data[mask == 1], expected, 3e-6)
    save_model(ours, tmp_path / "b")
    again = type(theirs).from_pretrained(tmp_path / "b").eval()
    agree(run(peer, again, tokens, mask).detach().numpy()[mask == 1], expected)


@pytest.mark.parametrize("name, buffers", [
    ("llama", ["model.rotary_emb.inv_freq"]), ("llama, bare", ["rotary_emb.inv_freq"]),
    ("bert", ["bert.embeddings.token_type_ids"]), ("roberta", [
        "roberta.embeddings.token_type_ids", "roberta.embeddings.position_ids"])])
def test_buffers_do_not_matter(peer, tmp_path, name, buffers):
    made(peer, *CASES[name], tmp_path)
    tokens, file = np.full((1, 5), 7), tmp_path / "model.safetensors"
    expected = load_model(tmp_path)(tokens).data
    write_tensors(file, read_tensors(file) | {key: np.ones(8, np.float32) for key in buffers})
    assert np.array_equal(load_model(tmp_path)(tokens).data, expected)


def test_a_prefix_may_be_left_in_front_of_a_bare_models_keys(peer, tmp_path):
    theirs = made(peer, "BertModel", BERT, tmp_path)
    file, tokens = tmp_path / "model.safetensors", text(theirs, MASKS["none"])
    expected = load_model(tmp_path)(tokens).data
    write_tensors(file, {f"bert.{key}": a for key, a in read_tensors(file).items()})
    assert np.array_equal(load_model(tmp_path)(tokens).data, expected)


def test_an_untied_models_copy_of_the_bias_does_not_act(peer, tmp_path):
    """As in transformers, where a tied model's is one with the decoder's."""
    theirs = made(peer, "BertForMaskedLM", BERT | UNTIED, tmp_path)
    assert (theirs.cls.predictions.bias != theirs.cls.predictions.decoder.bias).any()
    tokens = text(theirs, MASKS["none"])
    agree(load_model(tmp_path)(tokens).data, run(peer, theirs, tokens, MASKS["none"]))


@pytest.mark.parametrize("changes, padding", [
    (dict(pad_token_id=None), None), (dict(pad_token_id=-1), None), (dict(pad_token_id=23), None),
    (dict(pad_token_id=22), 22), ({}, 0)])
def test_an_id_outside_of_the_vocabulary_is_no_padding(peer, tmp_path, changes, padding):
    made(peer, "BertForMaskedLM", BERT, tmp_path)
    raw = read_json(tmp_path / "config.json")
    del raw["pad_token_id"]
    write_json(tmp_path / "config.json", raw | changes)
    model = load_model(tmp_path)
    assert (model.config.padding, model.embed.padding) == (padding, padding)
    save_model(model, tmp_path)
    assert read_json(tmp_path / "config.json")["pad_token_id"] == padding


def test_adapters_of_classifiers(peer, pair, tmp_path):
    """PEFT's SEQ_CLS keeps the classifier, trained whole, beside the adapters."""
    torch, _ = peer
    peft = pytest.importorskip("peft")
    theirs, ours, folder = pair
    if not ours.config.labels:
        return
    targets = ["c_attn"] if "GPT2" in type(theirs).__name__ else (
        ["q_lin"] if ours.config.pooler == "relu" else
        ["query"] if ours.config.pooler else ["q_proj"])
    torch.manual_seed(1)
    adapted = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(
        r=2, task_type="SEQ_CLS", target_modules=targets, init_lora_weights=False,
        fan_in_fan_out="c_attn" in targets))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "modules_to_save" in name:
                p += 0.1 * torch.randn_like(p)
    adapted.save_pretrained(tmp_path / "a")
    tokens, mask = text(theirs, MASKS["right"]), MASKS["right"]
    expected = run(peer, adapted.eval(), tokens, mask)
    loaded = load_adapter(load_model(folder), tmp_path / "a")
    agree(loaded(tokens, mask).data, expected, 2e-6)
    save_adapter(loaded, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "b").eval()
    agree(run(peer, again, tokens, mask).detach().numpy(), expected, 2e-6)


def test_lora_on_a_classifier_is_read_there(peer, pair, tmp_path):
    """With the classifier left as it is."""
    peft = pytest.importorskip("peft")
    theirs, ours, folder = pair
    if not ours.config.labels:
        return
    model = add_lora(load_model(folder), 2, 4, ("q", "v", "up"))
    rng = np.random.default_rng(0)
    for t in model.parameters():
        t.data += rng.normal(0, 0.1, t.shape).astype(np.float32)
    save_adapter(model, tmp_path)
    tokens, mask = text(theirs, MASKS["right"]), MASKS["right"]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path).eval()
    agree(model(tokens, mask).data, run(peer, again, tokens, mask), 2e-6)


def test_a_classifier_trained_beside_lora_is_read_there(peer, pair, tmp_path):
    """DistilBERT's two layers have names that PEFT cannot tell apart, so both must be trained."""
    peft = pytest.importorskip("peft")
    theirs, ours, folder = pair
    if not ours.config.labels:
        return
    for paths in (["head"], ["head", "pooler.dense"]) if ours.config.pooler else (["head"],):
        model = retrain(add_lora(load_model(folder), 2, 4), paths)
        rng = np.random.default_rng(0)
        for t in model.parameters():
            t.data += rng.normal(0, 0.1, t.shape).astype(np.float32)
        if ours.config.pooler == "relu" and len(paths) == 1:
            with pytest.raises(ValueError, match=r"cannot train classifier .*pre_classifier"):
                save_adapter(model, tmp_path)
            continue
        save_adapter(model, tmp_path)
        tokens, mask = text(theirs, MASKS["right"]), MASKS["right"]
        assert np.array_equal(load_adapter(load_model(folder), tmp_path)(tokens, mask).data,
                              model(tokens, mask).data)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path).eval()
        agree(model(tokens, mask).data, run(peer, again, tokens, mask), 2e-6)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("head", ["none", "classes"])
def test_every_field_is_read_refused_or_harmless(peer, kind, head):
    _, transformers = peer
    config, family = transformers.CONFIG_MAPPING[kind], HEADS[kind][head]
    assert hasattr(transformers, family.architecture)
    read = {*family.fields.values(), *(f for s in family.spelled for f in s.fields)}
    lists = read, {*ONLY, *family.only}, {*family.harmless}
    for field in dataclasses.fields(config):
        places = sum(field.name in names for names in lists)
        assert places == 1, f"{field.name} is in {places} of the lists"


def test_a_prefix_may_be_missing_from_a_decoders_keys(peer, tmp_path):
    theirs = made(peer, "LlamaForCausalLM", LLAMA, tmp_path)
    file, tokens = tmp_path / "model.safetensors", text(theirs, MASKS["none"])
    expected = load_model(tmp_path)(tokens).data
    write_tensors(file, {k.removeprefix("model."): a for k, a in read_tensors(file).items()})
    assert np.array_equal(load_model(tmp_path)(tokens).data, expected)


@pytest.mark.parametrize("name", ["gelu_python", "gelu_accurate", "gelu", "gelu_new"])
def test_activations_by_other_names(peer, tmp_path, name):
    theirs = made(peer, "GPT2LMHeadModel", GPT2 | dict(activation_function=name), tmp_path)
    tokens = text(theirs, MASKS["none"])
    agree(load_model(tmp_path)(tokens).data, run(peer, theirs, tokens, MASKS["none"]), 2e-6)


@pytest.mark.parametrize("changes", [
    dict(hidden_act="gelu_python"), dict(max_position_embeddings=64), dict(pad_token_id=3),
    dict(layer_norm_eps=1e-5), dict(classifier_dropout=0.3), dict(problem_type="regression"),
    dict(label2id={"a": 0, "b": 1}), dict(num_labels=4), dict(id2label={"3": "x", "7": "y"})])
def test_variants_that_change_no_number(peer, tmp_path, changes):
    theirs = made(peer, "RobertaForSequenceClassification", BERT | changes, tmp_path)
    ours, tokens = load_model(tmp_path), text(theirs, MASKS["left"])
    agree(ours(tokens, MASKS["left"]).data, run(peer, theirs, tokens, MASKS["left"]), 2e-6)
    assert describe_config(ours.config)[0] is HEADS["roberta"]["classes"]
