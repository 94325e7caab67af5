"""A step of distillation: the teacher's top k, `Distillation` against the loss of both models'
outputs, in the Trainer with workers and another width, and what the teacher costs in memory.
"""

import contextlib
import dataclasses

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from minilm import ops
from minilm.distill import Distillation, TopK, distillation_loss, student_from_teacher, top_k
from minilm.measure.memory import TracedMemory
from minilm.nn import Linear
from minilm.optim import SGD, AdamW
from minilm.tensor import Tensor, no_grad, randomness
from minilm.train import LabelLoss, Trainer
from minilm.transformer import Config, Transformer

# Python 3.12 warns of every fork in a process that has threads, as BLAS does.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

V, CONTEXT = 23, 8
SIZES = dict(vocab_size=V, context=CONTEXT, layers=4, heads=4, width=16)
CONFIGS = {
    "gpt2": Config.gpt2(**SIZES),
    "llama": Config.llama(**SIZES, hidden=24, kv_heads=2),
    "bert": Config.bert(**SIZES, hidden=24),
}
families = pytest.mark.parametrize("family", CONFIGS)


def make(family, dtype="float32", **changes):
    """A tiny model; noise moves every parameter from its first value."""
    model = Transformer(dataclasses.replace(CONFIGS[family], **changes))
    rng = np.random.default_rng(1)
    for p in model.parameters():
        p.data += 0.3 * rng.standard_normal(p.shape, dtype=np.float32)
    return model.astype(dtype).eval()


def draw(family="gpt2", B=3):
    """tokens and targets (B, T): for BERT few targets, and none in the first row."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, V, (2, B, CONTEXT))
    if family == "bert":
        targets[rng.random(targets.shape) < 0.7] = -100
        targets[0], targets[-1, 2] = -100, 5
    return tokens, targets


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """BLAS's threads wait for each other where tests run side by side."""
    with threadpool_limits(1, "blas"):
        yield


def equal(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b)


# The teacher's top k


def draw_logits(seed, shape, size=2.0, dtype="float64"):  # a student's and a teacher's
    return (size * np.random.default_rng(seed).standard_normal((2, *shape))).astype(dtype)


def soft_loss(student, teacher, T=2.0):
    """T^2 KL alone, and its gradient."""
    z = Tensor(student, requires_grad=True)
    loss = distillation_loss(z, teacher, np.zeros(z.shape[:-1], int), T, (1, 0, 0))
    loss.backward()
    return loss.data, z.grad


@given(seed=st.integers(0, 2**32 - 1), T=st.floats(0.3, 10), size=st.floats(0.1, 20),
       shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 12)))
def test_more_of_the_teachers_answers_show_more_of_the_kl(seed, T, size, shape):
    """Joining classes hides some of the divergence, and never adds any; the gradient of softmax's
    inputs sums to 0, whatever is joined."""
    student, teacher = draw_logits(seed, shape, size)
    full, dfull = soft_loss(student, teacher, T)
    V, room, before = shape[-1], 1e-11 * (1 + full), 0.0
    for k in range(1, V + 1):
        answers = top_k(teacher, k, T)
        likeliest = np.sort(teacher, -1)[..., V - k :]
        assert np.array_equal(np.sort(np.take_along_axis(teacher, answers.ids, -1)), likeliest)
        loss, dz = soft_loss(student, answers, T)
        assert before - room <= loss <= full + room
        assert abs(dz.sum(-1)).max() < 1e-13 * T
        before = loss
        if k >= V - 1:
            assert abs(loss - full) < room and abs(dz - dfull).max() < 1e-10 * T


def test_top_k_is_small_enough_to_store():
    student, teacher = draw_logits(0, (3, 4, 50), dtype="float32")
    answers = top_k(teacher, 8)
    assert answers.ids.dtype == np.int32 and answers.log_p.dtype == np.float32
    close(answers.log_p, np.take_along_axis(ops.log_softmax(teacher / 2).data, answers.ids, -1),
          "float32")
    stored = TopK(answers.ids.astype(np.int16), answers.log_p.astype(np.float16))
    (loss, dz), (again, dagain) = (soft_loss(student, a) for a in (answers, stored))
    close(again, loss, "float16")
    close(dagain, dz, "float16")
    answers = top_k(20 * teacher, 8)  # which have all of the probability, and rounded up more
    more = TopK(answers.ids, answers.log_p + np.float32(1e-3))
    assert 0 < soft_loss(20 * teacher, more)[0] < 0.01
    assert dagain.dtype == np.float32 and top_k(teacher.astype(np.float16), 8).log_p.dtype == "f4"


def test_top_k_is_the_same_in_blocks_of_rows(monkeypatch):
    _, teacher = draw_logits(0, (5, 7, 11))
    whole = top_k(teacher, 3)
    monkeypatch.setattr("minilm.arrays.BLOCK", 16)
    monkeypatch.setattr("minilm.arrays.WHOLE", 16)
    blocks = top_k(Tensor(teacher), 3)
    assert blocks.ids.shape == (5, 7, 3) and np.array_equal(blocks.ids, whole.ids)
    close(blocks.log_p, whole.log_p, "float64")


# Distillation


def test_vocabularies_must_be_one():
    with pytest.raises(ValueError, match=r"vocabulary of 24 tokens, the teacher one of 23"):
        Distillation(make("gpt2", vocab_size=24), make("gpt2"))


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=0.0), "temperature must be positive and finite, got 0.0"),
    (dict(weights=(0, 0, 0)), r"not all 0.*got \(0, 0, 0\)"),
])
def test_bad_settings_are_refused_before_the_first_step(settings, message):
    model = make("gpt2")
    with pytest.raises(ValueError, match=message):
        Distillation(model, model, **settings)


@pytest.mark.parametrize("settings, message", [
    (dict(top_k=V + 1), f"top_k must be 1 to {V}, got {V + 1}"),
    (dict(top_k=0), f"top_k must be 1 to {V}, got 0"),
    (dict(top_k=3, reverse=True), "reverse KL needs all"),
])
def test_bad_top_k_is_refused(settings, message):
    model = make("gpt2")
    with pytest.raises(ValueError, match=message):
        Distillation(model, model, **settings)


@families
@pytest.mark.parametrize("settings", [
    {}, dict(temperature=3.0, weights=(1.0, 0.0, 0.0), reverse=True), dict(masked_only=True),
    dict(weights=(0.0, 0.0, 2.0)), dict(weights=(0.0, 1.0, 0.0)), dict(top_k=4, temperature=1.5),
])
def test_it_is_the_loss_of_both_models_outputs(family, settings):
    """With the mask in both models, the teacher without dropout even if it was left training, and
    the student with."""
    teacher, (tokens, targets) = make(family, dropout=0.4), draw(family)
    student, mask = student_from_teacher(teacher), np.ones_like(tokens)
    mask[0, -3:] = mask[1, -1] = 0
    loss = Distillation(student, teacher, **settings)

    def run(**arguments):
        with randomness(np.random.default_rng(7)):
            return loss(student, tokens, targets, mask=mask, **arguments)

    teacher.train()
    found = run()
    theirs = teacher.eval().hidden(tokens, mask)
    with randomness(np.random.default_rng(7)):
        ours = student.hidden(tokens, mask)
    settings, answers = dict(settings), teacher.head(theirs)
    if k := settings.pop("top_k", None):
        answers = top_k(answers, k, settings["temperature"])
    expected = distillation_loss(student.head(ours), answers, np.where(mask, targets, -100),
                                 hidden=(ours, theirs), mask=mask, **settings)
    assert equal(found.data, expected.data)
    assert not np.isclose(run(totals=(100, 50)).data, found.data)
    student.eval()
    assert not np.isclose(run().data, found.data)


@families
def test_the_teachers_mode_is_its_owners(family):
    """It answers without dropout, and stays as it is for others that train it meanwhile."""
    student, teacher = make(family), make(family, dropout=0.5)
    loss, batch = Distillation(student, teacher), draw(family)
    expected = loss(student, *batch).data
    teacher.train()
    assert loss(student, *batch).data == expected
    assert all(module.training for _, module in teacher.named_modules())


@families
def test_the_teacher_has_no_graph(family):
    teacher, graphs = make(family), []
    student = student_from_teacher(teacher)
    for layer in (teacher.blocks[-1], teacher.head, student.blocks[-1], student.head):
        def spy(*args, forward=layer.forward):
            y = forward(*args)
            graphs.append(y.requires_grad)
            return y
        layer.forward = spy
    Distillation(student, teacher)(student, *draw()).backward()
    assert sorted(graphs) == [False, False, True, True]
    assert all(p.grad is None for p in teacher.parameters())


def test_all_of_the_top_k_are_the_whole_distribution():
    teacher, batch = make("gpt2", "float64"), draw()

    def gradients(**settings):
        student = student_from_teacher(teacher)
        loss = Distillation(student, teacher, **settings)(student, *batch)
        loss.backward()
        return [loss.data, *(p.grad for p in student.parameters())]

    whole = gradients()
    for found, expected in zip(gradients(top_k=V), whole):
        close(found, expected, "float64", 1.0)
    assert abs(gradients(top_k=2)[0] - whole[0]) > 1e-3


# Training


def train(family, workers=1, processes=False, accumulate=1, steps=3, dtype="float32", dropout=0.0,
          width=16, lr=0.01, eps=1e-8, **settings):
    """Losses and parameters after steps on one batch; a student of another width starts fresh."""
    teacher = make(family, dtype, dropout=dropout)
    student = student_from_teacher(teacher)
    if width != 16:
        student = make(family, dtype, layers=2, width=width, dropout=dropout)
    loss = Distillation(student, teacher, **settings)
    if loss.project:
        loss.project.astype(dtype)
    before = [p.data.copy() for p in loss.parameters()]
    optimizer = AdamW(student.parameters() + loss.parameters(), lr=lr, eps=eps)
    with Trainer(student, optimizer, workers, processes, loss=loss) as trainer:
        done = [trainer.step(i, draw(family, 5), accumulate=accumulate) for i in range(steps)]
    assert not any(equal(p.data, a) for p, a in zip(loss.parameters(), before))
    return [s.loss for s in done], optimizer.flat.data.copy()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("width", [16, 8])
def test_threads_and_processes_give_the_same_bits(family, width):
    threads, again, processes = (train(family, 2, p, 2, dropout=0.2, width=width)
                                 for p in (False, False, True))
    assert equal(threads[1], again[1]) and equal(threads[1], processes[1])
    assert threads[0] == again[0] == processes[0]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("settings", [{}, dict(masked_only=True, width=8), dict(top_k=3)])
def test_workers_and_micro_batches_give_the_step_of_the_whole(family, settings):
    """The masked objective has as many tokens as ever, and a part without any target."""
    (losses, whole), (parts, split) = (
        train(family, *way, dtype="float64", eps=1e-3, **settings) for way in [(1,), (2, False, 2)])
    close(np.array(parts), np.array(losses), "float64")
    close(split, whole, "float64")


@families
@pytest.mark.parametrize("settings", [
    {}, dict(width=24), dict(reverse=True), dict(top_k=4), dict(masked_only=True),
    dict(weights=(0.0, 0.0, 1.0)), dict(weights=(0.0, 0.0, 1.0), width=8),
])
def test_steps_on_one_batch_lower_the_loss(family, settings):
    losses, _ = train(family, steps=10, lr=0.02, **settings)
    assert losses[-1] < 0.8 * losses[0]


def test_a_projection_is_there_where_widths_differ():
    narrow, wide = make("gpt2", width=8), make("gpt2")
    loss, again, other = (Distillation(narrow, wide, **s) for s in ({}, {"seed": 0}, {"seed": 1}))
    assert type(loss.project) is Linear and loss.parameters() == [loss.project.weight]
    assert loss.project.weight.shape == (16, 8) and loss.project.bias is None
    W, same, different = (d.project.weight.data for d in (loss, again, other))
    assert equal(same, W) and not equal(different, W) and abs(W.std() * 8**0.5 - 1) < 0.1
    assert not Distillation(narrow, wide, weights=(1, 1, 0)).parameters()
    assert not Distillation(make("gpt2", layers=1), wide).parameters()


# Padding


def padded(arrays, more, fill):
    """Rows filled up with `more` places each."""
    return tuple(np.pad(a, ((0, 0), (0, more)), constant_values=v) for a, v in zip(arrays, fill))


def stepped(family, batch, loss, workers=1, **settings):
    """The loss and the gradient of a step that changes nothing."""
    student, teacher = make(family, "float64", layers=2), make(family, "float64")
    loss = LabelLoss() if loss == "labels" else Distillation(student, teacher, **settings)
    with Trainer(student, SGD(student.parameters(), lr=0.0), workers, loss=loss) as trainer:
        done = trainer.step(0, batch)
    return done, trainer.optimizer.flat.grad.copy(), trainer.evaluate(*batch) if workers == 1 else 0


@families
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("loss, settings", [
    ("labels", {}), ("teacher", {}), ("teacher", dict(masked_only=True)),
    ("teacher", dict(top_k=3)), ("teacher", dict(weights=(0.0, 0.0, 1.0)))], ids=str)
def test_padded_rows_give_the_same_number_as_unpadded_ones(family, workers, loss, settings):
    """Of a causal model the targets say what padding is; of the others a mask."""
    tokens, targets = (a[:, :5] for a in draw("bert", 4))
    targets[:, -1] = [3, 1, 4, 1]
    mask = np.ones_like(tokens)
    bare = (tokens, targets) if family != "bert" else (tokens, targets, mask)
    whole = stepped(family, bare, loss, workers, **settings)
    ways = [padded((tokens, targets, mask), 3, (7, fill, 0)) for fill in (-100, 5)]
    ways.append(tuple(np.pad(a, ((0, 2), (0, 0))) for a in ways[0]))  # rows that are all padding
    if family != "bert":
        ways.append(ways[0][:2])
    for batch in ways:
        found = stepped(family, batch, loss, workers, **settings)
        close(found[0].loss, whole[0].loss, "float64")
        close(found[1], whole[1], "float64")
        close(np.array(found[2]), np.array(whole[2]), "float64")
        assert found[0].targets == whole[0].targets


@families
def test_text_without_targets_teaches_what_the_teacher_says(family):
    """The soft and the cosine loss need none: the mask says what is text."""
    tokens, targets = draw(family)
    mask = np.ones_like(tokens)
    mask[:, 4:] = 0
    none, settings = np.full_like(targets, -100), dict(weights=(1.0, 0.0, 2.0))
    with_targets, _, _ = stepped(family, (tokens, targets, mask), "teacher", **settings)
    student, teacher = make(family, "float64", layers=2), make(family, "float64")
    loss = Distillation(student, teacher, **settings)
    with Trainer(student, SGD(student.parameters(), lr=0.0), loss=loss) as trainer:
        done = trainer.step(0, (tokens, none, mask), accumulate=2)
        close(done.loss, with_targets.loss, "float64")
        assert done.targets == mask.sum()
        if family != "bert":
            with pytest.raises(ValueError, match="the loss counts nothing in this batch"):
                trainer.step(0, (tokens, none))
        trainer.loss = Distillation(student, teacher)
        with pytest.raises(ValueError, match="the loss counts nothing in this batch"):
            trainer.step(0, (tokens, none, mask))


def test_a_student_sees_what_its_teacher_sees():
    for student, teacher, said in (("gpt2", "bert", "a causal model, the teacher a masked model"),
                                   ("bert", "llama", "a masked model, the teacher a causal model")):
        with pytest.raises(ValueError, match=said):
            Distillation(make(student), make(teacher))


def test_what_distillation_counts():
    gpt2, bert = (Distillation(make(f), make(f)) for f in ("gpt2", "bert"))
    tokens, targets = np.zeros((2, 2, 4), int)
    targets[0], targets[1] = [-100, 5, -100, 6], [7, -100, -100, -100]
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert gpt2.totals(tokens, targets) == (5, 3)  # a prompt counts, what is after the end does not
    assert bert.totals(tokens, targets) == (8, 3)
    assert gpt2.totals(tokens, targets, mask) == bert.totals(tokens, targets, mask) == (7, 3)


# Memory


def grown(run):
    """The most bytes that a run takes beyond those before it."""
    with TracedMemory() as memory:
        before = memory.held
        run()
        return memory.bytes - before


WIDE = dict(vocab_size=32, context=32, layers=4, heads=2, width=64)
LARGE = dict(vocab_size=4096, context=32, layers=4, heads=2, width=32)


@pytest.mark.parametrize("sizes", [WIDE, LARGE], ids=["wide blocks", "large vocabulary"])
@pytest.mark.parametrize("settings", [{}, dict(masked_only=True), dict(top_k=16)], ids=str)
def test_the_teacher_costs_one_forward_pass(sizes, settings, monkeypatch):
    """Beyond the student's step: 0.1 MB of Python's objects, and 2 MB for the blocks in which KL is
    computed, however large the batch is. Logits take 8.4 MB where the vocabulary is large."""
    teacher, rng = Transformer(Config.gpt2(**sizes)), np.random.default_rng(0)
    student = student_from_teacher(teacher)
    tokens, targets = rng.integers(0, sizes["vocab_size"], (2, 16, 32))
    optimizer = AdamW(student.parameters(), lr=1e-3)
    distillation = Distillation(student, teacher, **settings)

    def step(loss):
        optimizer.zero_grad()
        loss(student, tokens, targets, totals=(tokens.size, targets.size)).backward()
        optimizer.step()

    def forward():
        with no_grad():
            teacher(tokens)

    step(distillation)  # fills the caches
    allowed = grown(lambda: step(LabelLoss())) + grown(forward) + (
        0.1e6 if sizes is WIDE or "top_k" in settings else 2.2e6)
    assert grown(lambda: step(distillation)) <= allowed
    monkeypatch.setattr("minilm.distill.no_grad", contextlib.nullcontext)  # a graph of the teacher
    assert grown(lambda: step(distillation)) > allowed
