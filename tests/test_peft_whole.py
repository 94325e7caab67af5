"""minilm.interop.peft with peers: adapters that PEFT makes with each of its options give its logits
and its gradients here, and again in PEFT after they were saved; an adapter on GPT-2's c_attn is
trained to the same numbers. Every field of PEFT's configs is in one of three lists."""

import dataclasses
import os

import numpy as np
import pytest
from test_interop_peft import (
    CONFIG,
    TENSORS,
    TOKENS,
    agree,
    base,
    peer,
    peer_logits,
    theirs,
    with_peers,
)

from minilm import ops
from minilm.files import FormatError, read_json
from minilm.interop.peft import load_adapter, save_adapter
from minilm.interop.peft_config import INERT, READ, REFUSED
from minilm.interop.peft_formats import FORMATS
from minilm.nn import Linear
from minilm.optim import AdamW
from minilm.peft import merge_lora, unmerge_lora, use_adapter
from minilm.peft.adapted import adapted_layers
from minilm.tensorfiles import read_tensors

__all__ = ["peer", "theirs"]  # fixtures
TIED = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning",
                                  "ignore:Model has `tie_word_embeddings:UserWarning",
                                  "ignore:fan_in_fan_out is set to True:UserWarning")
LABELS = np.random.default_rng(6).integers(0, 23, TOKENS.shape)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@with_peers
@pytest.mark.parametrize("kind, config", [
    ("LORA", "LoraConfig"), ("IA3", "IA3Config"), ("ADALORA", "AdaLoraConfig")])
def test_every_field_of_peft_is_known(peer, kind, config):
    fields = {f.name: f for f in dataclasses.fields(getattr(peer[2], config))}
    read = (READ | FORMATS[kind].fields).keys()
    assert fields.keys() <= read | INERT | REFUSED
    assert not (read & INERT or read & REFUSED or INERT & REFUSED)
    assert read <= fields.keys()
    assert all(fields[name].default in (None, False) for name in REFUSED & fields.keys())
    if kind == "LORA":
        assert REFUSED <= fields.keys() and INERT - {"init_ia3_weights"} <= fields.keys()


OPTIONS = {  # name: (family, the config's settings)
    "bias-all": ("gpt2", dict(target_modules=["c_attn", "c_fc"], bias="all")),
    "bias-lora": ("gpt2", dict(target_modules=["c_attn", "c_fc"], bias="lora_only")),
    "bias-bert": ("bert", dict(target_modules=["query", "output.dense"], bias="all")),
    "bias-distilbert": ("distilbert", dict(target_modules=["q_lin"], bias="lora_only")),
    "bias-llama": ("llama", dict(target_modules=["q_proj"], bias="all")),
    "bias-and-norm": ("gpt2", dict(target_modules=["c_attn"], bias="all",
                                   modules_to_save=["ln_f", "c_fc"])),
    "bias-and-decoder": ("bert", dict(target_modules=["query"], bias="all",
                                      modules_to_save=["decoder", "intermediate"])),
    "head": ("llama", dict(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])),
    "head-tied": ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["lm_head"])),
    "both": ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "both-tied": ("gpt2", dict(target_modules=["c_fc"], modules_to_save=["wte", "lm_head"])),
    "embed-tied": ("gpt2", dict(target_modules=["c_fc"], modules_to_save=["wte", "wpe"])),
    "norms": ("llama", dict(target_modules=["v_proj", "up_proj"], modules_to_save=["norm", "mlp"])),
    "joined": ("gpt2", dict(target_modules=["c_fc"], modules_to_save=["c_attn", "1.mlp.c_proj"])),
    "cls": ("bert", dict(target_modules=["query"], modules_to_save=["cls"])),
    "decoder": ("bert", dict(target_modules=["value"], modules_to_save=["decoder"], bias="none")),
    "on-head": ("llama", dict(target_modules=["q_proj", "lm_head"])),
    "on-head-tied": ("gpt2", dict(target_modules=["c_attn", "lm_head"])),
    "on-head-bert": ("bert", dict(target_modules=["query", "decoder"], bias="lora_only")),
    "on-head-embed": ("llama", dict(target_modules=".*(q_proj|lm_head)",
                                    modules_to_save=["embed_tokens"])),
    "pattern": ("llama", dict(target_modules=r"model\.layers\.\d+\.(self_attn\.[qv]|mlp\.up)_proj",
                              rank_pattern={r"[01]\.self_attn\.(q|k)_proj": 3, "v_proj": 1},
                              alpha_pattern={r".*\.1\..*": 7, ".*proj": 2})),
    "flags": ("gpt2", dict(target_modules=r"(?i).*\.(C_FC|c_attn)", exclude_modules=r".*\.0\.mlp.*",
                           use_rslora=True)),
    "layers": ("llama", dict(target_modules=["q_proj", "model.layers.0.mlp.up_proj"],
                             layers_to_transform=[1], layers_pattern="lay[e]rs")),
    "layer": ("bert", dict(target_modules=["query", "dense"], layers_to_transform=0)),
    "orthogonal": ("llama", dict(target_modules=["q_proj"], r=4, init_lora_weights="orthogonal")),
    "gaussian": ("llama", dict(target_modules=["q_proj"], init_lora_weights="gaussian")),
    "all-linear": ("bert", dict(target_modules="all-linear")),
    "defaults": ("llama", dict()),
    "seq-names": ("llama", dict(target_modules=["q_proj"], modules_to_save=["score", "lm_head"])),
    "dora": ("llama", dict(target_modules=["q_proj", "down_proj"], use_dora=True, use_rslora=True)),
    "dora-gpt2": ("gpt2", dict(target_modules=["c_attn", "c_fc"], use_dora=True, lora_dropout=0.1,
                               rank_pattern={"c_fc": 3}, modules_to_save=["ln_f"])),
    "dora-bias": ("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], use_dora=True, bias="all")),
    "adalora": ("llama", dict(target_modules=["q_proj", "down_proj"], lora_alpha=6)),
    "adalora-gpt2": ("gpt2", dict(target_modules=["c_attn", "c_fc"], bias="lora_only",
                                  modules_to_save=["ln_f"])),
    "adalora-bert": ("bert", dict(target_modules="all-linear", lora_dropout=0.1)),
    "ia3": ("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], modules_to_save=["ln_f", "wte"],
                         feedforward_modules=["mlp.c_proj"])),
    "ia3-pattern": ("llama", dict(target_modules=r".*\.(k|v|down)_proj", modules_to_save=["norm"],
                                  feedforward_modules=r".*\.down_proj",
                                  exclude_modules=["0.self_attn.k_proj"])),
}


def made_by_peft(peer, theirs, option, folder, **saving):
    """PEFT's model with noise on all that it trains, in float32; it is in the folder too."""
    torch, _, peft = peer
    torch.manual_seed(0)
    name, settings = OPTIONS[option]
    kind, first = {
        "ia3": (peft.IA3Config, {}), "adalora": (peft.AdaLoraConfig, dict(init_r=3, total_step=9)),
    }.get(option.split("-")[0], (peft.LoraConfig, {"r": 2}))
    config = kind(**first | settings)
    model = peft.get_peft_model(theirs(name).float(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, **saving)
    return name, model


def gradients_of(peer, model):
    """{name: gradient} of the mean cross-entropy."""
    torch = peer[0]
    logits = model.eval()(torch.tensor(TOKENS)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(LABELS).flatten())
    loss.backward()
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    def plain(name):  # BERT's head has two names for one bias
        for part in (".modules_to_save", ".default"):
            name = name.replace(part, "")
        return name.replace("cls.predictions.decoder.bias", "cls.predictions.bias")
    return {plain(name): p.grad.numpy() for name, p in names.items()}


def trained(model):
    """Backward here; the sum of squares of all gradients, and how many numbers are trained."""
    for p in model.parameters():
        p.grad = None
    ops.cross_entropy(model(TOKENS).reshape(-1, 23), LABELS.reshape(-1)).backward()
    return (sum(float((p.grad.astype(np.float64) ** 2).sum()) for p in model.parameters()),
            sum(p.size for p in model.parameters()))


@with_peers
@TIED
@pytest.mark.parametrize("option", OPTIONS)
def test_options(peer, theirs, tmp_path, option):
    name, model = made_by_peft(peer, theirs, option, tmp_path / "a")
    expected, ours = peer_logits(peer, model), load_adapter(base(name), tmp_path / "a").eval()
    agree(ours(TOKENS).data, expected, 1e-6)
    grads = gradients_of(peer, model)
    size, count = trained(ours)
    assert count == sum(g.size for g in grads.values())
    assert size == pytest.approx(sum(float((g.astype(float) ** 2).sum()) for g in grads.values()),
                                 rel=2e-6)
    save_adapter(ours, tmp_path / "b")
    loaded = peer[2].PeftModel.from_pretrained(theirs(name).float(), tmp_path / "b",
                                               is_trainable=True)
    agree(peer_logits(peer, loaded), expected, 1e-6)
    again = gradients_of(peer, loaded)
    assert again.keys() == grads.keys()
    for key, grad in grads.items():
        agree(again[key], grad, 2e-5)
    twice = load_adapter(base(name), tmp_path / "b").eval()
    assert np.array_equal(twice(TOKENS).data, ours(TOKENS).data)
    agree(merge_lora(ours)(TOKENS).data, expected, 1e-6)
    assert np.array_equal(unmerge_lora(ours)(TOKENS).data, twice(TOKENS).data)
    assert np.array_equal(use_adapter(ours, None)(TOKENS).data, base(name)(TOKENS).data)


@with_peers
@TIED
@pytest.mark.parametrize("settings", [
    dict(target_modules=["c_attn", "c_fc"]), dict(target_modules=["c_attn"], bias="all"),
    dict(target_modules=["c_attn"], modules_to_save=["lm_head", "ln_f"], use_rslora=True)])
def test_c_attn_is_trained_as_in_peft(peer, theirs, tmp_path, settings):
    """20 steps of AdamW from PEFT's adapter: its losses, its numbers, and r = 4 comes back."""
    torch, _, peft = peer
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs("gpt2"), peft.LoraConfig(r=4, lora_alpha=8, **settings))
    model.save_pretrained(tmp_path / "start")
    ours = load_adapter(base("gpt2").astype("float64"), tmp_path / "start")
    mine = AdamW(ours.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    other = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01,
                              betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    tokens, labels = torch.tensor(TOKENS), torch.tensor(LABELS).flatten()
    model.eval()
    for _ in range(20):
        logits = model(tokens).logits.flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, labels)
        loss = ops.cross_entropy(ours(TOKENS).reshape(-1, 23), LABELS.reshape(-1))
        assert float(loss.data) == pytest.approx(float(expected.detach()), rel=1e-9)
        other.zero_grad(), mine.zero_grad()
        expected.backward(), loss.backward()
        other.step(), mine.step()
    model.save_pretrained(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    found, wanted = (read_tensors(tmp_path / who / TENSORS) for who in ("ours", "theirs"))
    assert read_json(tmp_path / "ours" / CONFIG)["r"] == 4
    assert found.keys() <= wanted.keys()
    for key, array in found.items():
        agree(array, wanted[key], 1e-7)


@with_peers
@TIED
@pytest.mark.parametrize("name, head", [("llama", "lm_head"), ("gpt2", "lm_head"),
                                        ("bert", "decoder")])
def test_another_head_below_an_adapter(peer, theirs, tmp_path, name, head):
    """base_layer.weight is not the model's: the head is replaced; of a tied one the embedding too,
    as in PEFT."""
    torch, _, peft = peer
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=[head], init_lora_weights=False)
    model = peft.get_peft_model(theirs(name).float(), config)
    with torch.no_grad():
        layer = model.get_submodule({"lm_head": "base_model.model.lm_head"}.get(
            head, "base_model.model.cls.predictions.decoder"))
        layer.base_layer.weight += 0.1 * torch.randn_like(layer.base_layer.weight)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    ours = load_adapter(base(name), tmp_path / "a").eval()
    agree(ours(TOKENS).data, peer_logits(peer, model), 1e-6)
    assert {"A", "B"} == {path.rpartition(".")[2] for path, _ in ours.named_parameters()}
    save_adapter(ours, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(theirs(name).float(), tmp_path / "b")
    agree(peer_logits(peer, again), peer_logits(peer, model), 1e-6)
    agree(load_adapter(base(name), tmp_path / "b").eval()(TOKENS).data, ours(TOKENS).data, 1e-6)


@with_peers
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_embeddings_that_were_saved_untrained(peer, theirs, tmp_path, name):
    target = {"bert": "query", "gpt2": "c_attn"}.get(name, "q_proj")
    config = peer[2].LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    model = peer[2].get_peft_model(theirs(name).float(), config)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed" in key or "wte" in key for key in read_tensors(tmp_path / TENSORS))
    ours = load_adapter(base(name), tmp_path).eval()
    agree(ours(TOKENS).data, peer_logits(peer, model), 1e-6)
    assert {path.rpartition(".")[2] for path in adapted_layers(ours)} <= {"q", "k", "v"}


@with_peers
@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_inits_that_change_the_base(peer, theirs, tmp_path, init):
    """Refused with the reason; what PEFT converts them to loads, and does what they did."""
    torch, _, peft = peer
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
    model = peft.get_peft_model(theirs("llama").float(), config)
    kept = model.peft_config["default"].init_lora_weights
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = kept
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) if "lora_" in name else 0
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(FormatError, match=f"init_lora_weights is '{init}', .*base's weights"):
        load_adapter(base("llama"), tmp_path / "raw")
    expected = peer_logits(peer, model)
    model.save_pretrained(tmp_path / "converted",
                          path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = load_adapter(base("llama"), tmp_path / "converted").eval()
    agree(ours(TOKENS).data, expected, 2e-6)


@with_peers
@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu:UserWarning")
def test_eva_is_plain_lora_once_saved(peer, theirs, tmp_path):
    """Initialised from the inputs of its layers, with ranks that are distributed anew."""
    torch, _, peft = peer
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="eva",
                             eva_config=peft.EvaConfig(rho=2.0))
    model = peft.get_peft_model(theirs("llama").float(), config)
    ids = torch.randint(0, 23, (20, 8, 9))
    batches = [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in ids]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) if "lora_" in name else 0
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / CONFIG)["init_lora_weights"] == "eva"
    ours = load_adapter(base("llama"), tmp_path).eval()
    agree(ours(TOKENS).data, peer_logits(peer, model), 1e-6)


@pytest.mark.parametrize("kind, dora", [*((kind, False) for kind in FORMATS), ("LORA", True)])
def test_a_joined_layer_may_have_parts_of_several_sizes(kind, dora):
    """As q, k and v of grouped-query attention have them."""
    rng, method, sizes = np.random.default_rng(0), FORMATS[kind], [(8, 6), (4, 6), (2, 6)]
    bases = [Linear(I, O, rng) for O, I in sizes]
    config = {"r": 3, "init_r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "use_rslora": False,
              "use_dora": dora, "rank_pattern": {}, "alpha_pattern": {}, "feedforward_modules": []}
    tensors = {end: rng.standard_normal(shape).astype(np.float32)
               for end, shape in method.shapes(config, "qkv", sizes, {}).items()}
    parts = method.split(config, "qkv", sizes, tensors)
    assert [part.shape[0] for part in parts] == [8, 4, 2]
    joined, _ = method.join("qkv", bases, parts)
    assert joined.keys() == tensors.keys()
    assert all(np.array_equal(joined[end], tensors[end]) for end in tensors)
    joined, _ = method.join("qkv", bases, [None, *parts[1:]])
    absent = {"lora_B.weight": 0, "lora_B": 0, "ia3_l": 1,
              "lora_magnitude_vector": np.linalg.norm(bases[0].weight.data, axis=1)}
    for end in absent.keys() & joined.keys():
        assert np.array_equal(joined[end][8:], tensors[end][8:])
        assert np.allclose(joined[end][:8].T, absent[end], rtol=1e-6, atol=0)
