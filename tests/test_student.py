"""minilm.distill.student_from_teacher: what a student takes from plain, adapted and quantized
teachers, that it owns it, which layers are refused, that all of it works on CuPy's arrays, and
(marked peers) that transformers loads it.
"""

import dataclasses

import numpy as np
import pytest
from conftest import close
from test_cuda_path import MASK, pair, same, same_parameters
from test_cuda_path import TARGETS as RIGHT
from test_cuda_path import TOKENS as READ

from minilm.distill import Distillation, student_from_teacher
from minilm.files import read_json
from minilm.interop.huggingface import save_model
from minilm.optim import SGD, AdamW
from minilm.peft import add_lora, merge_lora, unload_lora, use_adapter
from minilm.peft.adapted import adapted_layers
from minilm.quantize import QuantizedLinear, quantize_model
from minilm.tensor import no_grad
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

V, CONTEXT = 23, 8
SIZES = dict(vocab_size=V, context=CONTEXT, layers=4, heads=4, width=16)
CONFIGS = {
    "gpt2": Config.gpt2(**SIZES),
    "llama": Config.llama(**SIZES, hidden=24, kv_heads=2),
    "bert": Config.bert(**SIZES, hidden=24),
    "distilbert": Config.bert(**SIZES, hidden=24, segments=0),
}
families = pytest.mark.parametrize("family", CONFIGS)


def make(family, dtype="float32", **changes):
    """A tiny model; noise moves every parameter from its first value."""
    model = Transformer(dataclasses.replace(CONFIGS[family], **changes))
    return stir(model, 1).astype(dtype).eval()


def stir(model, seed=0):
    """Move all that trains; returns the model."""
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += (0.3 * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


TOKENS, TARGETS = np.random.default_rng(0).integers(0, V, (2, 3, CONTEXT))


def logits(model):
    with no_grad():
        return model(TOKENS).data


def state(model):
    """Copies of all arrays, and who requires a gradient."""
    return ({name: a.copy() for name, a in model.state_dict().items()},
            [name for name, _ in model.named_parameters()])


def equal(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b)


def unchanged(model, before):
    arrays, trained = state(model)
    return (arrays.keys() == before[0].keys() and trained == before[1]
            and all(equal(arrays[k], before[0][k]) for k in arrays))


# student_from_teacher


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_student_of_all_layers_is_the_teacher(family, dtype):
    teacher = make(family, dtype)
    before = state(teacher)
    student = student_from_teacher(teacher, range(4))
    assert student.config == teacher.config
    assert equal(logits(student.eval()), logits(teacher))
    assert {t.dtype for _, t in student.named_tensors()} == {np.dtype(dtype)}
    assert len(student.parameters()) == len(list(student.named_tensors())) == len(before[0])
    assert not any(np.shares_memory(t.data, a) for _, t in student.named_tensors()
                   for a in teacher.state_dict().values())


@families
@pytest.mark.parametrize("layers, expected", [
    (None, [0, 2]), ([1], [1]), ((0, 1, 3), [0, 1, 3]), (np.array([2, 3]), [2, 3]),
])
def test_the_students_blocks_are_the_teachers_at_these_layers(family, layers, expected):
    teacher = make(family)
    student = student_from_teacher(teacher, layers).eval()
    assert student.config == dataclasses.replace(teacher.config, layers=len(expected))
    with no_grad():
        alone = logits(student)
        teacher.blocks = [teacher.blocks[i] for i in expected]
        assert equal(alone, logits(teacher))
    assert student_from_teacher(make(family, layers=5)).config.layers == 3  # 0 2 4


@families
def test_training_the_student_leaves_the_teacher_alone(family):
    """Bit for bit; every tensor of the student learns, and what is tied stays so."""
    teacher = make(family)
    before, answers = state(teacher), logits(teacher)
    student = student_from_teacher(teacher, [0, 2, 3])
    names = student.state_dict().keys()
    started = [p.data.copy() for p in student.parameters()]
    Distillation(student, teacher)(student, TOKENS, TARGETS).backward()
    assert all(p.grad is None for p in teacher.parameters())
    AdamW(student.parameters(), lr=0.1).step()
    assert unchanged(teacher, before) and equal(logits(teacher), answers)
    moved = [not equal(p.data, a) for p, a in zip(student.parameters(), started)]
    assert all(moved) and len(moved) == len(student.parameters())
    out = student.head.out if "bert" in family else student.head
    assert (out.weight is student.embed.weight) == (family != "llama")
    assert student.state_dict().keys() == names


def adapted(teacher, way):
    """The teacher with what the words of `way` say."""
    head = "head.out" if teacher.config.head == "masked" else "head"
    if way.startswith(("nf4", "int8")):
        quantize_model(teacher, way.split()[0], skip=() if "head" in way else "head")
    if "lora" in way:
        stir(add_lora(teacher, 2, 3, (head, "q") if "head" in way else "all-linear", name="a"))
    if "two" in way:
        stir(add_lora(teacher, 3, 4, ("v", "up"), rslora=True, name="b"), 2)
    if "first" in way:
        use_adapter(teacher, "a")
    if "none" in way:
        use_adapter(teacher, None)
    if "merged" in way:
        merge_lora(teacher)
    return unload_lora(teacher) if "unloaded" in way else teacher


@families
@pytest.mark.parametrize("way", [
    "lora", "lora merged", "lora two", "lora two first", "lora none", "lora merged unloaded",
    "lora head", "lora head merged unloaded", "nf4", "int8", "nf4 head", "nf4 lora",
    "int8 lora two", "nf4 lora merged", "nf4 lora none",
])
def test_adapted_and_quantized_teachers_have_plain_students(family, way):
    """The function that acts, as plain weights that train; the teacher goes on as it was. A head
    that was tied to the embeddings is no longer so, where it was adapted or quantized."""
    plain, teacher = make(family), adapted(make(family), way)
    before, answers = state(teacher), logits(teacher)
    kinds = {path: type(m) for path, m in teacher.named_modules()}
    student = student_from_teacher(teacher, range(4)).eval()
    close(logits(student), answers, "float32")
    assert way == "lora none" or not equal(answers, logits(plain))
    assert {type(m) for _, m in student.named_modules()} == {
        type(m) for _, m in plain.named_modules()}
    assert len(student.parameters()) == len(list(student.named_tensors()))
    assert student.config.tied == (plain.config.tied and "head" not in way)

    student(TOKENS).sum().backward()
    SGD(student.parameters(), lr=1.0).step()
    assert unchanged(teacher, before) and equal(logits(teacher), answers)
    assert {path: type(m) for path, m in teacher.named_modules()} == kinds
    assert (QuantizedLinear in kinds.values()) == way.startswith(("nf4", "int8"))
    assert bool(adapted_layers(teacher)) == ("lora" in way and "unloaded" not in way)


def test_an_adapted_teacher_teaches_what_acts():
    """The loss is that of the plain model of the same function."""
    teacher = adapted(make("llama"), "nf4 lora")
    plain, student = student_from_teacher(teacher, range(4)), student_from_teacher(teacher)
    losses = [Distillation(student, t)(student, TOKENS, TARGETS) for t in (teacher, plain)]
    close(losses[0].data, losses[1].data, "float32")
    losses[0].backward()
    assert all(p.grad is None for p in teacher.parameters()) and teacher.parameters()


# On a GPU, or the stand-in for CuPy


@pytest.mark.kernels
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("settings", [{}, dict(reverse=True), dict(masked_only=True),
                                      dict(top_k=3)], ids=str)
def test_the_loss_is_the_same_on_a_gpu(cupy, family, settings):
    found = []
    for teacher in pair(family):
        student = student_from_teacher(teacher, [1]).eval()
        loss = Distillation(student, teacher, **settings)(student, READ, RIGHT, mask=MASK)
        loss.backward()
        found.append([loss.data, *(p.grad for p in student.parameters())])
    for cpu, gpu in zip(*found, strict=True):
        same(gpu, cpu, scale=1)


@pytest.mark.kernels
def test_a_student_is_trained_on_a_gpu(cupy):
    students = []
    for teacher in pair("llama"):
        student = student_from_teacher(teacher, [1])
        optimizer = AdamW(student.parameters(), 1e-3)
        with Trainer(student, optimizer, loss=Distillation(student, teacher)) as trainer:
            for step in range(2):
                trainer.step(step, (READ, RIGHT))
        students.append(student)
    cpu, gpu = students
    same_parameters(gpu, cpu)



@pytest.mark.parametrize("layers", [[], [4], [0, 4], [-1, 2], [2, 1], [1, 1], [0, 2, 1],
                                    [0.0, 1.0], ["0"]])
def test_layers_are_increasing_and_the_teachers(layers):
    message = f"increasing numbers from 0 to 3, the teacher's; got {layers}"
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        student_from_teacher(make("gpt2"), layers)


# Saving


@pytest.mark.peers
@families
@pytest.mark.parametrize("way", ["", "nf4 lora"])
def test_transformers_loads_the_student(family, way, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    student = student_from_teacher(adapted(make(family), way)).eval()
    save_model(student, tmp_path)
    name = read_json(tmp_path / "config.json")["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    assert abs(logits(student) - theirs).max() < 1e-5 * abs(theirs).max()
