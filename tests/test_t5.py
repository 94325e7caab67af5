"""T5s as transformers makes and reads them: the same logits with padding on either side, the same
losses, gradients and greedy tokens, and back again. And config.json: every field of transformers'
class is read, refused or known not to matter."""

import copy
import dataclasses

import numpy as np
import pytest

from minilm import ops
from minilm.files import FormatError, read_json, write_json
from minilm.generate import generate
from minilm.interop import bitsandbytes, huggingface, peft, t5
from minilm.peft import add_lora, retrain
from minilm.seq2seq import T5, EncoderDecoder
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Ends

pytestmark = pytest.mark.peers

BASE = dict(vocab_size=23, d_model=16, d_kv=3, d_ff=24, num_layers=3, num_decoder_layers=2,
            num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=12,
            decoder_start_token_id=0, initializer_factor=0.5)
V11 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
CASES = {  # name -> (changes of BASE, has it a head of its own?)
    "v1.0": ({}, False),
    "v1.1": (V11, True),
    "v1.1, tied": (V11, False),  # what version 5 of transformers makes of such a config
    "more decoder": (dict(num_layers=1, relative_attention_num_buckets=6), False),
    "another start": (dict(decoder_start_token_id=4, d_kv=8), False),
    "another padding": (dict(pad_token_id=2), False),
}
rng = np.random.default_rng(3)
TOKENS, WRITTEN = rng.integers(3, 23, (3, 20)), rng.integers(3, 23, (3, 15))
TARGETS = np.where(np.arange(15) < [[15], [9], [4]], WRITTEN, -100)


def padding(T, lengths, side):
    """(B, T) of 1 for a token and 0 for padding."""
    at, lengths = np.arange(T), np.array(lengths)[:, None]
    return {"none": np.ones((3, T), np.int64), "right": (at < lengths).astype(np.int64),
            "left": (at >= T - lengths).astype(np.int64)}[side]


@pytest.fixture(scope="module", params=CASES)
def pair(request, peer, tmp_path_factory):
    """(transformers' model, ours from its folder, the folder)."""
    torch, transformers = peer
    changes, own_head = CASES[request.param]
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**BASE | changes)).eval()
    if own_head:
        theirs.lm_head.weight = torch.nn.Parameter(0.5 * torch.randn(23, 16))
    with torch.no_grad():
        for parameter in theirs.parameters():  # equal norms would hide swaps
            parameter += 0.15 * torch.randn_like(parameter)
        theirs.decoder.final_layer_norm.weight.normal_()  # or a tied head would only echo
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, t5.load_model(folder), folder


def logits_of(peer, model, mask, decoder_mask):
    torch, _ = peer
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(mask),
            decoder_input_ids=torch.tensor(WRITTEN),
            decoder_attention_mask=torch.tensor(decoder_mask)).logits.numpy()


def agree(ours, theirs, tolerance=1e-6):
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def exact_norm(self, x):
    """Theirs has float32's variance even in float64."""
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@pytest.mark.parametrize("sides", [("none", "none"), ("left", "right"), ("right", "left")])
def test_logits(peer, pair, sides, monkeypatch):
    """Ours in float32 and in float64 against theirs in float64."""
    theirs, ours, folder = pair
    norm = type(theirs.decoder.final_layer_norm)
    monkeypatch.setattr(norm, "forward", exact_norm)
    mask, decoder_mask = padding(20, [20, 13, 5], sides[0]), padding(15, [15, 9, 4], sides[1])
    kept = decoder_mask == 1
    expected = logits_of(peer, copy.deepcopy(theirs).double(), mask, decoder_mask)[kept]
    agree(ours(TOKENS, WRITTEN, mask, decoder_mask).data[kept], expected)
    wider = t5.load_model(folder, "float64")
    agree(wider(TOKENS, WRITTEN, mask, decoder_mask).data[kept], expected, 1e-13)
    assert t5.tensor_shapes(ours.config) == {path: x.shape for path, x in ours.named_tensors()}


def test_loss_and_gradients(peer, pair):
    torch, _ = peer
    theirs, ours, _ = pair
    mask = padding(20, [20, 13, 5], "right")
    loss = ops.cross_entropy(ours(TOKENS, ours.shifted(TARGETS), mask), TARGETS)
    loss.backward()
    theirs.zero_grad()
    their_loss = theirs(input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(mask),
                        labels=torch.tensor(TARGETS)).loss
    their_loss.backward()
    agree(loss.data, their_loss.item())
    names = t5.family_of(ours.config).names(0)
    grads = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    assert len(grads) == len(ours.parameters())
    for path, parameter in ours.named_parameters():
        module, _, kind = path.rpartition(".")
        agree(parameter.grad, grads[f"{names[module]}.{kind}"], 1e-5)
        parameter.grad = None


def test_what_stands_for_an_ignored_target(peer, pair):
    """The padding, which need not be the decoder's start."""
    torch, _ = peer
    theirs, ours, _ = pair
    targets = np.where(WRITTEN % 3 == 0, -100, WRITTEN)
    expected = theirs.prepare_decoder_input_ids_from_labels(torch.tensor(targets)).numpy()
    assert np.array_equal(ours.shifted(targets), expected)


def test_greedy_tokens(peer, pair):
    """One by one from the cache, and, with a module that may need all rows, without it."""
    torch, _ = peer
    theirs, ours, folder = pair
    # Theirs has a cache of as many layers as the encoder: with a deeper decoder it fails.
    cached = theirs.config.num_layers >= theirs.config.num_decoder_layers
    expected = theirs.generate(
        torch.tensor(TOKENS), attention_mask=torch.ones(3, 20, dtype=torch.long), do_sample=False,
        eos_token_id=None, max_new_tokens=18, use_cache=cached).numpy()
    assert len(np.unique(expected)) > 2
    assert np.array_equal(generate(ours, TOKENS, 18, temperature=0, eos=()), expected)

    class Unknown(type(ours.decoder.norm)):
        pass

    unknown = t5.load_model(folder)
    unknown.decoder.norm.__class__ = Unknown
    assert np.array_equal(generate(unknown, TOKENS, 18, temperature=0, eos=()), expected)


def test_padded_texts_are_answered_alike(peer, pair):
    """A batch of padded texts, read with their mask: the same tokens as each text alone."""
    _, ours, _ = pair
    mask, start = padding(20, [20, 13, 5], "left"), ours.config.start
    reader = ours.read(TOKENS, mask)
    together = generate(reader, np.full((3, 1), start), 9, temperature=0, eos=())
    for row, length in zip(range(3), (20, 13, 5)):
        alone = generate(ours, TOKENS[row : row + 1, 20 - length :], 9, temperature=0, eos=())
        assert np.array_equal(together[row : row + 1], alone)


def test_saved_and_read_there(peer, pair, tmp_path):
    _, transformers = peer
    theirs, ours, _ = pair
    t5.save_model(ours, tmp_path)
    again, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert again.config.scale_decoder_outputs == ours.config.scaled_head
    mask, decoder_mask = padding(20, [20, 13, 5], "left"), padding(15, [15, 9, 4], "right")
    kept = decoder_mask == 1
    agree(logits_of(peer, again.eval(), mask, decoder_mask)[kept],
          logits_of(peer, theirs, mask, decoder_mask)[kept])
    assert again.generation_config.decoder_start_token_id == ours.config.start
    mine = t5.load_model(tmp_path)
    assert mine.config == ours.config and mine.ends == ours.ends
    assert np.array_equal(mine(TOKENS, WRITTEN).data, ours(TOKENS, WRITTEN).data)


def test_what_a_folder_says_beside_comes_back(peer, folder, tmp_path):
    """How it samples and its dropout; what the decoder starts with also for a new model."""
    _, transformers = peer
    asked = changed(folder, tmp_path / "asked", dropout_rate=0.25, n_positions=512, hidden_size=16)
    write_json(asked / "generation_config.json", dict(
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, num_beams=4))
    t5.save_model(t5.load_model(asked), tmp_path / "again")
    raw = read_json(tmp_path / "again" / "config.json")
    assert raw["dropout_rate"] == 0.25 and raw["n_positions"] == 512
    assert raw["d_model"] == 16 and "hidden_size" not in raw  # which is another name of the same
    assert read_json(tmp_path / "again" / "generation_config.json")["num_beams"] == 4
    new = EncoderDecoder(T5(9, 1, 1, 1, 4, 4, 4, start=3))
    new.ends = Ends(eos=(1,), pad=0)
    t5.save_model(new, tmp_path / "new")
    there = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert there.generation_config.decoder_start_token_id == 3


def test_fresh_weights_spread_as_there(peer):
    torch, transformers = peer
    torch.manual_seed(0)
    there = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=200, d_model=64, d_kv=8, d_ff=96, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu")).state_dict()
    c = T5(200, 2, 2, heads=4, width=64, hidden=96, head_width=8, activation="geglu_tanh")
    names = t5.family_of(c).modules
    for path, t in EncoderDecoder(c, seed=0).named_tensors():
        theirs = there[f"{names[path.removesuffix('.weight')]}.weight"].numpy()
        assert t.shape == theirs.shape
        assert abs(t.data.std() - theirs.std()) <= 5 * theirs.std() / t.size**0.5, path


def test_every_field_is_read_refused_or_harmless(peer):
    _, transformers = peer
    lists = {*t5.FIELDS.values()}, {*t5.SPELLED}, {*t5.ONLY}, t5.UNIMPORTANT
    for field in dataclasses.fields(transformers.T5Config):
        places = sum(field.name in names for names in lists)
        assert places == 1, f"{field.name} is in {places} of the lists"
    assert transformers.T5Config.attribute_map == t5.SPELLINGS
    config = transformers.T5Config()
    read = t5.read_config({"model_type": "t5", "vocab_size": 32128, "d_model": 512, "d_kv": 64,
                           "d_ff": 2048, "num_layers": 6, "num_heads": 8,
                           "relative_attention_num_buckets": 32})
    assert all(getattr(read, ours) == getattr(config, theirs)
               for ours, theirs in t5.FIELDS.items() if theirs != "feed_forward_proj")
    assert read.activation == config.feed_forward_proj and read.scaled_head and read.start == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_adapters(peer, pair, tmp_path):
    """Its LoRA of all linear layers here, and ours there, and here again."""
    torch, _ = peer
    library = pytest.importorskip("peft")
    theirs, _, folder = pair
    settings = library.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=3, bias="none",
                                  target_modules=["q", "v", "wo"])
    adapted = library.get_peft_model(copy.deepcopy(theirs), settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "theirs")
    ours = peft.load_adapter(t5.load_model(folder), tmp_path / "theirs")
    mask, decoder_mask = padding(20, [20, 13, 5], "left"), padding(15, [15, 9, 4], "right")
    kept = decoder_mask == 1
    expected = logits_of(peer, adapted.eval(), mask, decoder_mask)[kept]
    agree(ours(TOKENS, WRITTEN, mask, decoder_mask).data[kept], expected, 2e-6)
    assert np.abs(expected - logits_of(peer, theirs, mask, decoder_mask)[kept]).max() > 0.1

    peft.save_adapter(ours, tmp_path / "ours")
    assert read_json(tmp_path / "ours" / "adapter_config.json")["task_type"] == "SEQ_2_SEQ_LM"
    there = library.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    assert np.array_equal(logits_of(peer, there, mask, decoder_mask)[kept], expected)
    again = peft.load_adapter(t5.load_model(folder), tmp_path / "ours")
    assert np.array_equal(again(TOKENS, WRITTEN).data, ours(TOKENS, WRITTEN).data)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind, settings", [("PromptTuningConfig", {}), ("PrefixTuningConfig", {}),
                                            ("LoraConfig", dict(modules_to_save=["shared"]))])
def test_peft_adapters_that_do_not_fit(peer, folder, tmp_path, kind, settings):
    """Rows in front, and a copy of the embedding that PEFT trains without a use for it."""
    library = pytest.importorskip("peft")
    theirs = peer[1].T5ForConditionalGeneration.from_pretrained(folder)
    front = {} if settings else dict(num_virtual_tokens=2, num_transformer_submodules=1)
    library.get_peft_model(theirs, getattr(library, kind)(
        task_type="SEQ_2_SEQ_LM", **settings, **front)).save_pretrained(tmp_path)
    model = t5.load_model(folder)
    with pytest.raises(FormatError, match="modules_to_save is .*, which names shared: PEFT "
                       "trains a copy" if settings else "peft_type is of rows in front of a Trans"):
        peft.load_adapter(model, tmp_path)
    assert [path for path, _ in model.named_tensors()] == [
        path for path, _ in t5.load_model(folder).named_tensors()]


def test_what_is_trained_whole_beside_lora(folder, tmp_path):
    """A head goes to PEFT and back; the embedding cannot, since no stack there would see it."""
    model = retrain(add_lora(t5.load_model(folder), 2, 3), ["head", "decoder.norm"])
    model.parameters()[-1].data += 0.1
    peft.save_adapter(model, tmp_path / "a")
    raw = read_json(tmp_path / "a" / "adapter_config.json")
    assert raw["modules_to_save"] == ["decoder.final_layer_norm", "lm_head"]
    again = peft.load_adapter(t5.load_model(folder), tmp_path / "a")
    assert np.array_equal(again(TOKENS, WRITTEN).data, model(TOKENS, WRITTEN).data)
    with pytest.raises(ValueError, match="shared cannot be saved: PEFT trains a copy of T5's emb"):
        peft.save_adapter(retrain(model, ["embed"]), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def changed(folder, path, tensors=None, **fields):
    """A copy of the folder with other fields in config.json, or other tensors."""
    path.mkdir()
    write_json(path / "config.json", read_json(folder / "config.json") | fields)
    arrays = read_tensors(folder / "model.safetensors")
    write_tensors(path / "model.safetensors", tensors(arrays) if tensors else arrays)
    return path


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    """A tied v1.0."""
    _, transformers = peer
    path = tmp_path_factory.mktemp("v1.0")
    transformers.T5ForConditionalGeneration(transformers.T5Config(**BASE)).save_pretrained(path)
    return path


@pytest.mark.parametrize("field, value, said", [
    ("model_type", "mt5", "'mt5', expected 't5'"), ("is_decoder", True, "is_decoder is True"),
    ("feed_forward_proj", "gated-silu", "'gated-silu', expected one of"),
    ("dense_act_fn", "gelu", "'gelu', expected 'relu', as feed_forward_proj"),
    ("is_gated_act", True, "is_gated_act is True"), ("d_kv", None, "d_kv is None"),
    ("num_layers", 10**6, "at most"), ("num_decoder_layers", 9**5, "holds 55 tensors"),
    ("num_layers", 9**5, "holds 55 tensors"), ("d_ff", 25, "expected float"),
    ("decoder_start_token_id", -1, "expected an id"), ("decoder_start_token_id", 23, "below 23"),
    ("relative_attention_max_distance", 4, "more than half of the 8 buckets"),
    ("tie_word_embeddings", None, "tie_word_embeddings is None"),
    ("tie_word_embeddings", False, "missing keys: lm_head.weight"),
    ("head_dim", 4, "head_dim is 4, expected d_kv's value"),
    ("quantization_config", {"load_in_4bit": True}, "quantization_config")])
def test_what_it_cannot_express_is_refused(folder, tmp_path, field, value, said):
    with pytest.raises(FormatError, match=said):
        t5.load_model(changed(folder, tmp_path / "other", **{field: value}))


def test_copies_of_the_embedding(folder, tmp_path):
    """Older files have them under other names: equal ones are one, others are refused."""
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    model = t5.load_model(folder)
    same = changed(folder, tmp_path / "same", lambda a: a | dict.fromkeys(
        (*copies, "lm_head.weight"), a["shared.weight"]))
    renamed = changed(folder, tmp_path / "renamed", lambda a: {
        {"shared.weight": copies[0]}.get(key, key): array for key, array in a.items()})
    for path in (same, renamed):
        again = t5.load_model(path)
        assert again.config == model.config and again.head.weight is again.embed.weight
        assert np.array_equal(again(TOKENS, WRITTEN).data, model(TOKENS, WRITTEN).data)
    other = changed(folder, tmp_path / "other", lambda a: a | {copies[1]: a["shared.weight"] + 1})
    with pytest.raises(FormatError, match=r"decoder.embed_tokens.weight differs from shared.we"):
        t5.load_model(other)


def test_others_say_who_reads_and_writes_a_t5(folder, tmp_path):
    with pytest.raises(FormatError, match=r"'t5', expected one of .*; interop.t5 reads T5s"):
        huggingface.load_model(folder)
    model = t5.load_model(folder)
    for save in (huggingface.save_model, bitsandbytes.save_model):
        with pytest.raises(TypeError, match=r"got a T5; interop.t5 writes T5s"):
            save(model, tmp_path / "new")
    with pytest.raises(ValueError, match="not the modules"):
        t5.save_model(add_lora(model, r=2, alpha=2), tmp_path / "new")
    assert not (tmp_path / "new").exists()
