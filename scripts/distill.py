"""Train a teacher, cut a student out of it, distil, and show what the student kept.

    python scripts/distill.py                                # about four minutes on two cores
    python scripts/distill.py --teacher runs/distill-1/teacher --sweep 1 2 4 8
    python scripts/distill.py --objective masked             # BERT, filling in masked tokens

The student has every other layer of the teacher. It is trained four times, on the same tokens: from
the teacher's weights or from random ones, and by distillation or on the text alone. The program
prints loss, accuracy, size and speed of the teacher and the four students. It draws their curves
and one prediction of the teacher at three temperatures (needs the extra `plots`). --sweep distils
at other temperatures too. A run directory keeps teacher and student as Hugging Face folders.
"""

import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import tyro

from minilm import data
from minilm.command import Given, command, typed, utf8
from minilm.distill import Distillation, student_from_teacher
from minilm.extras import told
from minilm.interop import load_model, save_model
from minilm.loop import Training, fit, refuse_unused, resumed, validation
from minilm.measure.guesses import likeliest
from minilm.measure.speed import speeds
from minilm.nn import Module
from minilm.optim import AdamW
from minilm.picture import save_png
from minilm.ranges import AT_LEAST_0, POSITIVE, check, each, one_of, optional, whole
from minilm.run import RunDirectory, share_held_out
from minilm.transformer import Config, Transformer
from minilm.versions import fingerprints

TEMPERATURES = (1, 2, 4)  # of the prediction in the picture
LR = {"causal": 5e-3, "masked": 1e-3}  # BERT, with its norms after the branches, needs less


@dataclass(frozen=True)
class Settings:
    """What decides a run."""

    corpus: tuple[str, ...] = ("python-reference",)
    """python-reference, python-docstrings, python-source, or paths of text files and folders"""
    validation: float = 0.1
    """share of each corpus that is held out"""
    teacher: str = ""
    """Hugging Face folder with a tokenizer.json; by default a teacher is trained"""
    objective: Literal["causal", "masked"] = "causal"
    """causal predicts the next token (a new teacher is a Llama), masked fills in tokens (a BERT)"""
    layers: int = 8
    """blocks of a new teacher"""
    heads: int = 4
    """attention heads of a new teacher"""
    width: int = 64
    """width of a new teacher"""
    context: int = 128
    """tokens in a row"""
    teacher_steps: int = 2400
    """updates of a new teacher"""
    keep: tuple[int, ...] = ()
    """the teacher's layers, from 0, that the student gets; by default every other one"""
    student_width: int = 0
    """another width than the teacher's; the student then begins with random weights"""
    steps: int = 800
    """updates of each student"""
    temperature: float = 1.0
    """of both distributions in the soft loss; DistilBERT's is 2, see --sweep"""
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0)
    """of the soft, the hard and the cosine loss"""
    reverse: bool = False
    """use KL(student || teacher) instead of KL(teacher || student)"""
    masked_only: bool = False
    """take the soft loss over the masked tokens only"""
    top_k: int | None = None
    """show the student only this many of the teacher's likeliest answers"""
    sweep: tuple[float, ...] = ()
    """temperatures at which the student is distilled once more"""
    batch: int = 8
    """rows in a step"""
    lr: float = 0.0
    """learning rate after the warmup; it falls to a twentieth; 0 means the objective's own"""
    prompt: str = "the value of th"
    """the picture shows what the teacher expects after this"""
    seed: int = 0
    """of weights and batches"""
    workers: int = 0
    """cores to use; 0 means all"""
    threads: bool = False
    """use threads rather than processes as workers"""

    RANGES: ClassVar = {
        "objective": one_of("causal", "masked"), "context": whole(2), "teacher_steps": whole(1),
        "keep": each(whole(0)), "student_width": whole(0), "steps": whole(1), "batch": whole(1),
        "top_k": optional(whole(1)), "sweep": each(POSITIVE), "lr": AT_LEAST_0, "seed": whole(0),
        "workers": whole(0)}  # temperature and weights are Distillation's

    def __post_init__(self):
        check(self.RANGES, **vars(self))


class Arm(NamedTuple):
    """A model, and the records of its held-out loss and accuracy."""

    model: Transformer
    curve: list[dict]


def main(settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),
         out: Path = Path("runs"), resume: Path | None = None, given: Given = frozenset()):
    """Train a teacher, cut a student out of it, distil, and show what the student kept.

    Args:
        settings: what decides the run.
        out: the run gets a folder of its own in here.
        resume: folder of a run to go on with, bit for bit, under its own settings.
        given: names of the options on the command line.
    """
    settings = replace(settings, prompt=utf8("prompt", settings.prompt))
    run, s = resumed(settings, resume, given)
    if not s.prompt:
        raise ValueError("the prompt must not be empty")
    if s.teacher and not run:
        refuse_unused(given, ("layers", "heads", "width", "teacher_steps"), "a teacher is given")
    if not s.weights[0] and not run:
        refuse_unused(given, ("temperature", "reverse", "masked_only", "top_k", "sweep"),
                      f"the soft loss has no weight in {s.weights}")
    if s.objective == "causal" and not run:
        refuse_unused(given, ("masked_only",), "the objective is causal: every token has a target")
    if len({f"{T:g}" for T in s.sweep}) < len(s.sweep):  # these are their names
        raise ValueError(f"sweep must be different temperatures, got {s.sweep}")
    corpora = data.load_corpora(s.corpus)
    described = [{"name": c.name, "sha256": c.sha256} for c in corpora]
    described += fingerprints(Path(s.teacher)) if s.teacher else []
    if run:
        run.check(described, "the text or the teacher are not those")
    teacher, tokenizer = load_teacher(s) if s.teacher else new_teacher(s)
    parts = [data.split(corpus, s.validation) for corpus in corpora]
    texts = data.batches_of(parts, tokenizer, s.batch, s.context, s.seed,
                            masked=s.objective == "masked", names=[c.name for c in corpora])
    make_students(s, teacher)  # these two lines fail now, if at all, not after the training
    likeliest(teacher, tokenizer, s.prompt, TEMPERATURES)
    if run is None:
        s = replace(s, lr=s.lr or LR[s.objective])
        run = RunDirectory.create(out, "distill", asdict(s), described)
    for corpus, part in zip(corpora, parts):
        print(data.account(corpus, *part))
    try:
        with run.going_on():
            distill(run, s, teacher, tokenizer, texts)
    except KeyboardInterrupt:
        sys.exit(f"stopped; go on with: {typed(__file__, resume=run.path)}")


def distill(run, s: Settings, teacher, tokenizer, texts):
    """Train the teacher, unless it is given, and all students; show and save the results."""
    tokens = s.batch * s.context
    trained = f"trained in {s.teacher}" if s.teacher else f"{s.teacher_steps * tokens:,} tokens"
    print(f"{run.path}: teacher of {size(teacher):,} parameters, {trained}; each student "
          f"{s.steps * tokens:,} tokens")
    arms = {"teacher": Arm(teacher, train(run, s, "teacher", teacher, texts,
                                          0 if s.teacher else s.teacher_steps))}
    save_model(teacher, run.path / "teacher", tokenizer)
    for name, (student, loss) in make_students(s, teacher).items():
        arms[name] = Arm(student, train(run, s, name, student, texts, s.steps, loss))
    student = list(arms)[1]
    arms[student].model.ends, arms[student].model.origin = teacher.ends, teacher.origin
    save_model(arms[student].model, run.path / "student", tokenizer)
    print_table(arms, speeds({name: arm.model for name, arm in arms.items()}, texts[1][0]), student)
    picture = draw(run.path / "distill.png", arms, s.prompt,
                   *likeliest(teacher, tokenizer, s.prompt, TEMPERATURES))
    print(told("curves, and a prediction at three temperatures", picture))
    print(f"teacher and student, as Hugging Face folders: {run.path}/teacher, {run.path}/student")


def new_teacher(s: Settings):
    """(model, tokenizer): a Llama or a BERT on bytes, untrained."""
    tokenizer, causal = data.ByteTokenizer(), s.objective == "causal"
    preset, hidden = (Config.llama, 8 * s.width // 3) if causal else (Config.bert, 4 * s.width)
    config = preset(tokenizer.vocab_size, s.context, s.layers, s.heads, s.width, hidden)
    return Transformer(config, s.seed), tokenizer


def load_teacher(s: Settings):
    """(model, tokenizer) of a Hugging Face folder."""
    folder = Path(s.teacher)
    teacher = load_model(folder)
    tokenizer, c = data.load_tokenizer(folder / "tokenizer.json"), teacher.config
    c.require_language(folder)
    if c.causal != (s.objective == "causal"):
        raise ValueError(f"{folder} has a {'causal' if c.causal else 'masked'} teacher, the "
                         f"objective is {s.objective}")
    if c.vocab_size < tokenizer.vocab_size or c.context < s.context:
        raise ValueError(f"{folder} has a vocabulary of {c.vocab_size} and a context of "
                         f"{c.context}; its tokenizer needs {tokenizer.vocab_size}, and --context "
                         f"is {s.context}")
    data.adopt_end(tokenizer, teacher.ends.eos)
    if (share := share_held_out(folder)) and share < s.validation:
        print(f"{folder} was trained with {share:.1%} held out: it has learned some of the "
              f"{s.validation:.1%} here", file=sys.stderr)
    return teacher, tokenizer


def make_students(s: Settings, teacher) -> dict[str, tuple]:
    """name -> (student, its loss). A name says where the student begins and what it learns from.

    The first student is the one that is saved. A student of another width than the teacher's cannot
    begin with its weights.
    """
    learns = partial(Distillation, temperature=s.temperature, weights=s.weights,
                     masked_only=s.masked_only, reverse=s.reverse, top_k=s.top_k, seed=s.seed)
    half = partial(student_from_teacher, teacher, s.keep or None)
    config = half().config
    width = s.student_width or config.width
    starts = {"from the teacher": half} if width == config.width else {}
    config = replace(config, width=width, hidden=config.hidden * width // config.width)
    fresh = partial(Transformer, config, s.seed + 1)  # a new teacher's first weights take the seed
    students = {}
    for start, make in (starts | {"from random": fresh}).items():
        students |= {f"{start}, distilled": (student := make(), learns(student, teacher)),
                     f"{start}, labels alone": (make(), None)}
    for T in s.sweep:
        student = half() if starts else fresh()
        students[f"distilled at T={T:g}"] = student, learns(student, teacher, temperature=T)
    return students


def train(run, s: Settings, name: str, model, texts, steps: int, loss=None) -> list[dict]:
    """Train a model in its own folder, from where it was stopped; returns its records."""
    arm = RunDirectory(run.path / "arms" / name.replace(",", "").replace(" ", "-"))
    arm.path.mkdir(parents=True, exist_ok=True)
    (batches, held_out), every = texts, max(1, steps // 8)
    settings = Training(s.batch, steps, s.lr, warmup=steps // 20, eval_every=every,
                        save_every=every, seed=s.seed, workers=s.workers, threads=s.threads)
    whole = Module()
    whole.model, whole.project = model, loss and loss.project
    params = whole.parameters()
    optimizer = AdamW(params, s.lr, (0.9, 0.95), weight_decay=0.1,
                      undecayed=[p for p in params if p.ndim < 2])
    for trainer, done in fit(arm, model, batches, settings, loss, optimizer=optimizer,
                             min_lr=s.lr / 20, saved=whole, title=name):
        last = done.step == steps
        due = last or done.step % every == 0
        if due and (done.targets or not arm.records()):
            arm.log(step=done.step, **validation(trainer, held_out, every=1 if last else 4))
    if done.step < steps:
        raise KeyboardInterrupt
    return [arm.require(record, validation_loss=float, validation_accuracy=float)
            for record in arm.records()]


def size(model) -> int:
    return sum(p.size for p in model.parameters())


def print_table(arms: dict[str, Arm], speed: dict[str, list[float]], student: str):
    """Print a line for each model, and what this student kept."""
    verbs = ["evaluates", "generates"][: len(speed[student])]
    print(f"\n{'':30}{'held out:':>9}{'tokens':>9}{'of the':>10}{'':19}"
          + "".join(f"{verb:>11}" for verb in verbs)
          + f"\n{'':30}{'loss':>9}{'right':>9}{'teacher':>10}{'parameters':>12}{'MB':>7}"
          + len(verbs) * f"{'tokens/s':>11}")
    top = arms["teacher"].curve[-1]["validation_accuracy"] or math.nan
    for name, arm in arms.items():
        end, n = arm.curve[-1], size(arm.model)
        right = end["validation_accuracy"]
        print(f"{name:30}{end['validation_loss']:>9.4f}{right:>9.2%}{right / top:>10.1%}{n:>12,}"
              f"{4 * n / 1e6:>7.2f}" + "".join(f"{v:>11,.0f}" for v in speed[name]))
    kept = arms[student].curve[-1]["validation_accuracy"] / top
    faster = [f"{verb} {mine / its:.2f} times as fast"
              for verb, mine, its in zip(verbs, speed[student], speed["teacher"])]
    print(f"\nThe distilled student keeps {kept:.1%} of the teacher's accuracy with "
          f"{size(arms[student].model) / size(arms['teacher'].model):.1%} of its parameters, and\n"
          f"{' and '.join(faster)}, on one core.")


def draw(path: Path, arms: dict[str, Arm], prompt: str, tokens, p) -> Path | None:
    """Curves of the teacher and of the students, and a prediction; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    teacher, *students = arms
    left.plot(*points(arms[teacher], "validation_loss"), ".-", color="black", linewidth=1)
    end = arms[teacher].curve[-1]["validation_loss"]
    left.set(title="the teacher", xlabel="step", ylabel="held-out loss (nats a token)",
             ylim=(0.9 * end, 1.8 * end))
    level, *_ = ends = [arm.curve[-1]["validation_accuracy"] for arm in arms.values()]
    middle.axhline(level, color="black", linewidth=1, label="teacher")
    middle.axhline(0.97 * level, color="black", linewidth=1, linestyle=":", label="97 % of it")
    for name in students:
        middle.plot(*points(arms[name], "validation_accuracy"), ".-", linewidth=1, label=name)
    middle.legend(loc="lower right", fontsize="small")
    middle.set(title="students", xlabel="step", ylabel="held-out tokens right",
               ylim=(min(0.7 * level, *ends), 1.03 * max(ends) or 1))
    places, width = np.arange(len(tokens)), 0.8 / len(p)
    for i, (T, heights) in enumerate(p.items()):
        right.bar(places + (i - (len(p) - 1) / 2) * width, heights, width, label=f"T = {T}")
    right.set_xticks(places, tokens, family="monospace", parse_math=False)
    right.legend(frameon=False)
    right.set_title(f"the teacher after {prompt!r}", parse_math=False)
    right.set(xlabel="next token", ylabel="probability")
    return save_png(figure, path)


def points(arm: Arm, what: str):
    """Steps, and the records' values."""
    return [r["step"] for r in arm.curve], [r[what] for r in arm.curve]


if __name__ == "__main__":
    command(main)
