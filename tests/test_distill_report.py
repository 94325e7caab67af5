"""What scripts/distill.py compares and shows: losses and students by its settings, the table, the
speeds, a prediction of the teacher, the picture, and (marked peers) the student in transformers."""

import sys
from types import SimpleNamespace

import distill
import numpy as np
import pytest
from distill import Arm, draw, make_students, print_table
from test_distill_script import ARMS, SMALL, save_teacher, settings

from minilm import data
from minilm.distill import Distillation
from minilm.extras import install
from minilm.files import read_json
from minilm.interop import huggingface
from minilm.measure import speed
from minilm.measure.guesses import likeliest
from minilm.measure.speed import speeds
from minilm.tensor import no_grad
from minilm.transformer import Config, Transformer

# Settings reach the loss


@pytest.mark.parametrize("option, value", [
    ("temperature", 5.0), ("weights", (1.0, 0.0, 3.0)), ("reverse", True), ("masked_only", True),
    ("top_k", 2), ("seed", 3)])
def test_each_setting_of_the_loss_reaches_it(tmp_path, option, value):
    teacher = huggingface.load_model(save_teacher(tmp_path / "bert", "bert"))
    s = settings(tmp_path, student_width=12 if option == "seed" else 0, **{option: value})
    tokens, targets = np.random.default_rng(0).integers(0, 258, (2, 3, 8))
    targets[:, 2:] = data.IGNORED
    student, loss = next(iter(make_students(s, teacher).values()))

    def of(loss):
        return float(loss(student.eval(), tokens, targets).data)

    assert of(loss) == of(Distillation(student, teacher, **{option: value}))
    assert abs(of(loss) - of(Distillation(student, teacher))) > 1e-3


def test_a_width_that_is_the_teachers_own_is_no_other_width(tmp_path):
    teacher = huggingface.load_model(save_teacher(tmp_path / "t"))
    assert tuple(make_students(settings(tmp_path, student_width=8), teacher)) == ARMS
    wider = make_students(settings(tmp_path, student_width=12), teacher)
    assert tuple(wider) == ARMS[2:]
    config = wider[ARMS[2]][0].config
    assert (config.width, config.hidden, config.layers) == (12, 48, 2)


# The report


def curve(*accuracies):
    return [dict(step=i, validation_loss=5.0 - i, validation_accuracy=a)
            for i, a in enumerate(accuracies)]


@pytest.fixture
def arms():
    """A teacher and two students, and what they were worth at each step."""
    def model(layers):
        return Transformer(Config.gpt2(20_000, 8, layers=layers, heads=2, width=4))
    return {"teacher": Arm(model(3), curve(0.1, 0.5)), "a student": Arm(model(1), curve(0.2, 0.4)),
            "another": Arm(model(2), curve(0.0, 0.6, 0.1))}


def test_the_table(arms, capsys):
    speed = {"teacher": [1000.0, 50.0], "a student": [2500.0, 60.0], "another": [12345.6, 7.0]}
    print_table(arms, speed, "a student")
    said = capsys.readouterr().out
    rows = {line[:30].rstrip(): line[30:].split() for line in said.splitlines()}
    # each block: 4 (4 * 4 + 4) in attention, 4 * 16 + 16 + 16 * 4 + 4 in the MLP, two norms of 8;
    # embeddings of 20,000 tokens and 8 places, and the last norm
    sizes = [n * (80 + 148 + 16) + 80_000 + 32 + 8 for n in (3, 1, 2)]
    counts = [f"{size:,}" for size in sizes]
    assert rows["teacher"] == ["4.0000", "50.00%", "100.0%", counts[0], "0.32", "1,000", "50"]
    assert rows["a student"] == ["4.0000", "40.00%", "80.0%", counts[1], "0.32", "2,500", "60"]
    assert rows["another"] == ["3.0000", "10.00%", "20.0%", counts[2], "0.32", "12,346", "7"]
    assert said.endswith(
        f"keeps 80.0% of the teacher's accuracy with {sizes[1] / sizes[0]:.1%} of its parameters, "
        "and\nevaluates 2.50 times as fast and generates 1.20 times as fast, on one core.\n")


def test_the_table_of_a_teacher_that_is_never_right(arms, capsys):
    arms["teacher"] = Arm(arms["teacher"].model, curve(0.0, 0.0))
    print_table(arms, {name: [1e6] for name in arms}, "a student")
    said = capsys.readouterr().out
    assert "40.00%      nan%" in said
    assert said.endswith("evaluates 1.00 times as fast, on one core.\n")


@pytest.mark.parametrize("causal", [True, False])
def test_speeds_are_each_models_own(monkeypatch, causal):
    """By a clock that only the models move on; one round is ten times as slow as the others."""
    clock, turns = [0.0], []

    class Model:
        def __init__(self, name, seconds):
            self.name, self.seconds, self.config = name, seconds, SimpleNamespace(causal=causal)

        def eval(self):
            return self

        def __call__(self, rows):
            assert rows.shape == (16, 8)
            turns.append(self.name)
            slow = 10 if turns.count(self.name) == 2 else 1
            clock[0] += self.seconds * slow * rows.size

    def generate(model, tokens, count):
        assert tokens.shape == (1, 1)
        clock[0] += 3 * model.seconds * count

    monkeypatch.setattr(speed, "generate", generate)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    models = {name: Model(name, seconds) for name, seconds in (("a", 0.5), ("b", 0.125))}
    found = speeds(models, np.zeros((20, 8), int), rounds=3)
    assert turns == ["a", "b"] * 3
    assert found == {"a": pytest.approx([2, 2 / 3][: 1 + causal]),
                     "b": pytest.approx([8, 8 / 3][: 1 + causal])}


def test_real_speeds_are_positive(arms):
    found = speeds({name: arm.model for name, arm in arms.items()}, np.zeros((3, 8), int))
    assert found.keys() == arms.keys() and all(min(v) > 0 and len(v) == 2 for v in found.values())


PROMPT = "The longest prompt of all"


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_prediction_is_the_teachers_at_each_temperature(tmp_path, family):
    """Of the next token, or of a mask after the prompt's end, which leaves room for it; also where
    the likeliest of all ids is none of the tokenizer's."""
    teacher = huggingface.load_model(
        save_teacher(tmp_path / "t", family, vocab_size=300), dropout=0.5)
    tokens = np.array([[*PROMPT[-15:].encode(), *([257] if family == "bert" else [])]])
    with no_grad():
        state = teacher.eval().hidden(tokens).data[0, -1]
        teacher.embed.weight.data[290] = 10 * state / (state @ state)
        logits = teacher(tokens).data[0, -1].astype(np.float64)
    assert family == "bert" or logits.argmax() == 290
    names, p = likeliest(teacher.train(), data.ByteTokenizer(), PROMPT, (1, 2, 4))
    first = np.argsort(-logits[:258])[:8]
    assert list(p) == [1, 2, 4] and len(names) == 8
    for T, found in p.items():
        exact = np.exp(logits / T) / np.exp(logits / T).sum()
        np.testing.assert_allclose(found, exact[first], rtol=1e-5)
    assert (np.diff(p[1]) < 0).all()
    assert all(m.training for _, m in teacher.named_modules())  # as it was, but without dropout
    assert len(likeliest(teacher, data.ByteTokenizer(), PROMPT, count=3)[0]) == 3


def test_a_prediction_names_tokens_as_one_can_read_them(tmp_path):
    teacher = huggingface.load_model(save_teacher(tmp_path / "t", tied=False))
    with no_grad():
        state = teacher.eval().hidden(np.array([[*b"ab"]])).data[0, -1]
    for id, size in ((256, 40.0), (32, 39.0), (10, 38.0), (ord("$"), 37.0)):
        teacher.head.weight.data[id] = size * state / (state @ state)
    names, _ = likeliest(teacher, data.ByteTokenizer(), "ab", count=4)
    assert names == ["end", "\N{OPEN BOX}", r"\n", "$"]


def test_the_picture_shows_curves_and_prediction(tmp_path, arms, monkeypatch):
    """With signs that would be formulas, and a student that is far behind."""
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    p = {1: np.array([0.6, 0.3]), 2: np.array([0.5, 0.4]), 4: np.array([0.45, 0.42])}
    path = tmp_path / "new.png"
    assert draw(path, arms, "a $x_$ b", ["$y_$", "c"], p) == path
    assert path.read_bytes()[:4] == b"\x89PNG"
    left, middle, right = figures[0].axes
    assert np.array_equal(left.lines[0].get_xydata(), [[0, 5], [1, 4]])
    level, kept, first, second = (line.get_xydata() for line in middle.lines)
    assert set(level[:, 1]) == {0.5} and set(kept[:, 1]) == {0.97 * 0.5}
    assert first.tolist() == [[0, 0.2], [1, 0.4]]
    assert second.tolist() == [[0, 0.0], [1, 0.6], [2, 0.1]]
    assert [t.get_text() for t in middle.get_legend().get_texts()] == [
        "teacher", "97 % of it", "a student", "another"]
    bottom, top = middle.get_ylim()
    assert bottom <= 0.1 and 0.5 < top
    bars = {c.get_label(): [b.get_height() for b in c] for c in right.containers}
    assert bars == {f"T = {T}": list(heights) for T, heights in p.items()}
    assert [t.get_text() for t in right.get_xticklabels()] == ["$y_$", "c"]
    assert right.get_title() == "the teacher after 'a $x_$ b'"
    arms = {"teacher": Arm(None, curve(0.0)), "never right": Arm(None, curve(0.0))}
    assert draw(path, arms, "a", ["b", "c"], p) == path


def test_without_matplotlib_it_says_how_to_get_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tmp_path, save_teacher(tmp_path / "t"))
    assert f"temperatures: {install('plots')}" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.png"))


def run(tmp_path, teacher, **changes):
    """A run with that teacher; returns its folder."""
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 40)
    s = distill.Settings(corpus=(str(tmp_path / "text.txt"),), teacher=teacher, **SMALL | changes)
    distill.main(s, tmp_path / "runs")
    return tmp_path / "runs" / "distill-1"


@pytest.mark.peers
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_transformers_computes_what_the_student_does(tmp_path, family, monkeypatch):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    monkeypatch.setattr(distill, "draw", lambda *_: None)
    folder = run(tmp_path, save_teacher(tmp_path / "t", family), keep=(0, 2),
                 objective="masked" if family == "bert" else "causal") / "student"
    tokens = np.random.default_rng(0).integers(0, 258, (2, 16))
    name = read_json(folder / "config.json")["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad(), no_grad():
        theirs = model.eval()(torch.tensor(tokens)).logits.numpy()
        ours = huggingface.load_model(folder).eval()(tokens).data
    assert abs(ours - theirs).max() < 1e-5 * abs(theirs).max()
