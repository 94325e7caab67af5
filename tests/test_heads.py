"""Models without a head over the vocabulary, positions that do not count padding, segments: what
each means, what trains and saves them, and what refuses them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.distill import Distillation, student_from_teacher
from minilm.files import FormatError, read_json, write_json
from minilm.generate import generate
from minilm.inputs import counted
from minilm.interop import bitsandbytes
from minilm.interop.huggingface import load_model, save_model
from minilm.interop.peft import load_adapter, save_adapter
from minilm.measure.losses import loss_of
from minilm.measure.step import Step, parameters
from minilm.optim import AdamW
from minilm.peft import add_lora, merge_lora, retrain
from minilm.quantize import quantize_model
from minilm.shapes import tensor_shapes
from minilm.train import Trainer
from minilm.transformer import Config, Transformer, with_classes

V, CONTEXT = 23, 12
SIZES = dict(vocab_size=V, context=CONTEXT, layers=2, heads=2, width=16)
BERT = Config.bert(**SIZES, hidden=24, padding=0)
ROBERTA = replace(BERT, positions="counted", padding=3, segments=1)
GPT2, LLAMA = Config.gpt2(**SIZES), Config.llama(**SIZES, hidden=24, padding=1)
THREE = dict(head="classes", labels=("no", "perhaps", "yes"))
CONFIGS = {
    "bert": BERT, "bert, bare": replace(BERT, head="none"),
    "bert, pooled": replace(BERT, head="none", pooler="tanh"),
    "bert, classes": replace(BERT, **THREE, pooler="tanh"),
    "distilbert, classes": replace(BERT, **THREE, pooler="relu", segments=0),
    "roberta": ROBERTA, "roberta, classes": replace(ROBERTA, **THREE, pooler="tanh"),
    "gpt2, bare": replace(GPT2, head="none"), "gpt2, classes": replace(GPT2, **THREE),
    "llama, bare": replace(LLAMA, head="none"), "llama, classes": replace(LLAMA, **THREE),
    "llama": LLAMA, "bert, untied": replace(BERT, tied=False),
}
OTHERS = [name for name, c in CONFIGS.items() if not c.language]
TOKENS = np.random.default_rng(0).integers(4, V, (4, 8))
MASK = (np.arange(8) < [[8], [5], [7], [2]]).astype(int)


def noisy(name):
    model, rng = Transformer(CONFIGS[name]), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.2, t.shape).astype(np.float32)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_sizes_are_those_of_the_model(name):
    model = Transformer(CONFIGS[name])
    built = {path: t.shape for path, t in model.named_tensors()}
    assert tensor_shapes(model.config) == built
    assert parameters(model.config) == sum(t.size for _, t in model.named_tensors())


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(tmp_path, name):
    model = noisy(name)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config and again.ends.pad == model.config.padding
    assert np.array_equal(again(TOKENS, MASK).data, model(TOKENS, MASK).data)


def test_names_of_classes_are_kept(tmp_path):
    save_model(noisy("bert, classes"), tmp_path)
    raw = read_json(tmp_path / "config.json")
    assert raw["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
    assert raw["label2id"] == {"no": 0, "perhaps": 1, "yes": 2}
    assert raw["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize("changes, field", [
    (dict(id2label={}), "id2label"), (dict(id2label=["no"]), "id2label"),
    (dict(id2label={"a": "no"}), "id2label"), (dict(id2label={"0": None}), "id2label"),
    (dict(num_labels=0), "num_labels"), (dict(num_labels=10**9), "num_labels"),
    (dict(num_labels="2"), "num_labels")])
def test_damaged_classes(tmp_path, changes, field):
    save_model(noisy("bert, classes"), tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | changes)
    with pytest.raises(FormatError, match=field):
        load_model(tmp_path)


@pytest.mark.parametrize("changes, said", [
    (dict(pad_token_id=None), "pad_token_id is None"), (dict(pad_token_id=V), "pad_token_id is 23"),
    (dict(pad_token_id="1"), "pad_token_id is '1'"), (dict(pad_token_id=True), "pad_token_id"),
    (dict(max_position_embeddings=4), "max_position_embeddings is 4, expected more than the 4")])
def test_positions_that_cannot_be_counted(tmp_path, changes, said):
    save_model(noisy("roberta"), tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | changes)
    with pytest.raises(FormatError, match=said):
        load_model(tmp_path)


@given(rows=st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=3),
       padding=st.integers(0, 4), start=st.integers(0, 3))
def test_counted_positions(rows, padding, start):
    for row, found in zip(rows, counted(np.array(rows), padding, start)):
        n = start
        for id, place in zip(row, found):
            n += id != padding
            assert place == (padding if id == padding else padding + n)


@pytest.mark.parametrize("left", range(4))
def test_padding_on_either_side_changes_nothing(left):
    """RoBERTa's positions and the mask together: a text gives what it gives alone."""
    model, text = noisy("roberta"), TOKENS[:1]
    padded = np.full((1, CONTEXT), 3)
    padded[:, left : left + 8] = text
    found = model(padded, (padded != 3).astype(int)).data[:, left : left + 8]
    assert np.abs(found - model(text).data).max() < 1e-5


def test_a_text_that_is_too_long_is_refused_in_words():
    model = Transformer(ROBERTA)
    assert model.position.weight.shape == (CONTEXT + 4, 16)
    model(np.full((1, CONTEXT), 5))
    with pytest.raises(ValueError, match=f"T must be 1 to {CONTEXT}"):
        model(np.full((1, CONTEXT + 1), 5))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_segments(name):
    model = noisy(name)
    zeros = np.zeros_like(TOKENS)
    assert np.array_equal(model(TOKENS, segments=zeros).data, model(TOKENS).data)
    if name == "bert":
        changed = zeros + (np.arange(8) > 4)
        table = model.segment.weight.data
        assert np.abs(model(TOKENS, segments=changed).data - model(TOKENS).data).max() > 1e-3
        table[1] = table[0]
        assert np.abs(model(TOKENS, segments=changed).data - model(TOKENS).data).max() < 1e-5


@pytest.mark.parametrize("name, segments, said", [
    ("bert", np.zeros((4, 7), int), r"integers \(4, 8\), .* got int64 \(4, 7\)"),
    ("bert", np.zeros((4, 8)), r"got float64 \(4, 8\)"), ("bert", [[0] * 8] * 3, r"\(3, 8\)"),
    ("bert", np.full((4, 8), 2), "0 to 1, got 2 to 2"), ("bert", -np.ones((4, 8), int), "0 to 1"),
    ("roberta", np.ones((4, 8), int), "0 to 0"), ("gpt2, bare", np.zeros((4, 8), int), "knows no")])
def test_bad_segments(name, segments, said):
    with pytest.raises(ValueError, match=said):
        Transformer(CONFIGS[name])(TOKENS, segments=segments)


def test_classes_are_of_the_first_token_or_of_the_last():
    model, x = noisy("bert, classes"), np.zeros((4, 8, 16), np.float32)
    x[:, 0] = np.random.default_rng(0).normal(size=(4, 16))
    W, b = model.pooler.dense.weight.data, model.pooler.dense.bias.data
    assert np.allclose(model.pooled(ops.add(x, 0 * x)).data, np.tanh(x[:, 0] @ W.T + b), atol=1e-6)
    model, padded = noisy("llama, classes"), np.where(MASK, TOKENS, 1)
    found = model(padded).data  # by the padding's id, with no mask at all
    assert np.allclose(found, model(padded, MASK).data, atol=1e-5)
    masked = model(TOKENS, MASK).data
    for row, n in enumerate((8, 5, 7, 2)):
        alone = model(TOKENS[row : row + 1, :n]).data
        assert np.allclose(found[row], alone, atol=1e-5)
        assert np.allclose(masked[row], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert, untied", "roberta"])
def test_the_paddings_row_learns_nothing_from_look_ups(name):
    model, tokens = noisy(name), TOKENS.copy()
    pad = model.config.padding
    tokens[:, 3] = pad
    ops.cross_entropy(model(tokens), TOKENS).backward()
    grad = model.embed.weight.grad
    assert grad[pad].any() == model.config.shared  # a tied head's gradient flows
    assert grad[tokens[0, 0]].any()
    model.embed.padding = None
    model.embed.weight.grad = None
    ops.cross_entropy(model(tokens), TOKENS).backward()
    differs = (model.embed.weight.grad != grad).any(-1)
    assert differs.nonzero()[0].tolist() == [pad]


@pytest.mark.parametrize("name", [name for name in OTHERS if "classes" in name])
@pytest.mark.parametrize("lora", [False, True])
def test_a_classifier_learns(name, lora):
    """Trainer's own loss, with a mask, and the labels (B,)."""
    model, labels = noisy(name), np.array([0, 1, 2, 1])
    if lora:
        retrain(add_lora(model, 4, 8), ["head"])
    with Trainer(model, AdamW(model.parameters(), lr=0.02)) as trainer:
        losses = [trainer.step(i, (TOKENS, labels, MASK)).loss for i in range(25)]
        loss, right = trainer.evaluate(TOKENS, labels, MASK)
        assert right == 1 and loss < losses[-1] < 0.5 * losses[0]


def test_adapters_and_few_bits_of_a_classifier(tmp_path):
    model = add_lora(noisy("roberta, classes"), 2, 4)
    for t in model.parameters():
        t.data += 0.1
    expected = model(TOKENS, MASK).data
    save_adapter(model, tmp_path / "a")
    again = load_adapter(noisy("roberta, classes"), tmp_path / "a")
    assert np.array_equal(again(TOKENS, MASK).data, expected)
    assert np.allclose(merge_lora(again)(TOKENS, MASK).data, expected, atol=1e-5)
    model = quantize_model(noisy("roberta, classes"))
    bitsandbytes.save_model(model, tmp_path / "b")
    found = bitsandbytes.load_model(tmp_path / "b")(TOKENS, MASK).data
    assert np.allclose(found, model(TOKENS, MASK).data, atol=1e-5)


@pytest.mark.parametrize("name, task", [("bert, classes", "SEQ_CLS"), ("llama, classes", "SEQ_CLS"),
                                        ("bert", None), ("llama", "CAUSAL_LM")])
def test_the_task_that_peft_is_told(tmp_path, name, task):
    model = add_lora(noisy(name), 2, 4)
    save_adapter(retrain(model, ["head"]) if model.config.labels else model, tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["task_type"] == task


@pytest.mark.parametrize("name", OTHERS)
def test_what_needs_a_language_model_says_so(name):
    model = noisy(name)
    said = "classes of whole texts" if model.config.labels else "no head"
    with pytest.raises(ValueError, match=f"this model .*{said}.*language model"):
        generate(model, TOKENS, 1)
    with pytest.raises(ValueError, match=f"the student .*{said}"):
        Distillation(model, model)
    with pytest.raises(ValueError, match=f"the teacher .*{said}"):
        Distillation(noisy("llama" if model.config.causal else "bert"), model)
    with pytest.raises(ValueError, match=said):
        Step(model.config, "full", 1, 4)
    if not model.config.labels:
        with pytest.raises(ValueError, match="no head"):
            loss_of(model, TOKENS, TOKENS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_student_of_some_layers(name):
    teacher = noisy(name)
    student = student_from_teacher(teacher, [0, 1]).eval()
    assert student.config == teacher.config
    assert np.array_equal(student(TOKENS, MASK).data, teacher(TOKENS, MASK).data)


@pytest.mark.parametrize("changes, given", [
    (dict(padding=V), ["padding", "23"]), (dict(padding=-1), ["padding", "-1"]),
    (dict(positions="counted", padding=None), ["'counted'", "padding"]),
    (dict(labels=("a",)), ["labels", "'classes'"]), (dict(head="classes"), ["labels"]),
    (dict(**THREE), ["labels", "pooler"]), (dict(pooler="tanh"), ["pooler", "'none'"]),
    (dict(head="none", pooler="gelu"), ["pooler", "gelu", "'relu'"]),
    (dict(head="none", pooler="tanh", causal=True), ["pooler", "causal"])])
def test_contradictions(changes, given):
    with pytest.raises(ValueError) as error:
        replace(BERT, **changes)
    assert all(part in str(error.value) for part in given), str(error.value)


@pytest.mark.parametrize("labels", [["a"], "ab", (1,), None])
def test_labels_are_names(labels):
    with pytest.raises(TypeError, match="labels must be a tuple of names"):
        replace(BERT, head="classes", pooler="tanh", labels=labels)


@pytest.mark.parametrize("changes", [dict(padding=2), dict(pooler="relu")])
def test_a_model_that_is_not_its_configs_is_not_saved(tmp_path, changes):
    model = noisy("bert, classes")
    model.config = replace(model.config, **changes)
    with pytest.raises(ValueError, match=r"padding|pooler|cannot express"):
        save_model(model, tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_another_head_on_the_same_body(name):
    """The hidden states are what they were; what is trained later is a copy."""
    model, labels = noisy(name), ("a", "b", "c", "d")
    before, states = {k: a.copy() for k, a in model.state_dict().items()}, model.hidden(TOKENS).data
    new = with_classes(model, labels, seed=3).eval()
    assert new.config.labels == labels and new(TOKENS).shape == (len(TOKENS), 4)
    assert np.array_equal(new.hidden(TOKENS).data, states)
    if model.pooler:
        assert np.array_equal(new.pooled(new.hidden(TOKENS)).data,
                              model.pooled(model.hidden(TOKENS)).data)
    again, other = (with_classes(model, labels, seed).head.weight.data for seed in (3, 4))
    assert np.array_equal(again, new.head.weight.data) and (again != other).all()
    for t in new.parameters():
        t.data += 1
    assert all(np.array_equal(a, before[k]) for k, a in model.state_dict().items())


@pytest.mark.parametrize("change", [quantize_model, lambda model: add_lora(model, 2, 4)])
def test_no_other_head_on_adapters_or_codes(change):
    with pytest.raises(ValueError, match="state does not fit"):
        with_classes(change(noisy("bert")), ("no", "yes"))
