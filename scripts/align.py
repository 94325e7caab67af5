"""Teach a trained model what people prefer: a reward model, PPO, GRPO or DPO.

    python scripts/align.py                                   # PPO: answers with more vowels
    python scripts/align.py --beta 0                          # the same at any distance
    python scripts/align.py --method grpo --reward peak
    python scripts/align.py --method reward --reward peak     # learns the reward from comparisons
    python scripts/align.py --reward runs/align-reward-1/reward   # and PPO goes by what it learned
    python scripts/align.py --method dpo --reward peak        # from comparisons themselves
    python scripts/align.py --method dpo --data mine.jsonl    # lines of prompt, chosen, rejected

The policy is LoRA on the newest model; the reference that it stays near is the model without it.
Prompts are pieces of a corpus, or those of the file. Without a file comparisons are made: the model
answers each prompt several times, and a rule says with noise which answer is better.

The program shows what the policy answers to held-out prompts as it learns: reward, KL to the
reference, length, entropy and a sample. Of a reward model it shows how many held-out pairs it puts
in the right order. The run's folder keeps these as curves.png, and the adapter as PEFT's folder,
for generate.py and evaluate.py, or the reward model, for --reward. A policy that is merged is a
model of its own, which finetune.py and the others take: --merged.
"""

import hashlib
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from tqdm import tqdm

from minilm import data, versions
from minilm.aligning import JOBS, METHODS, Aligning, finished_reward, without
from minilm.asking import asked_of, keep_made
from minilm.command import Given, command, typed
from minilm.continued import trained_on
from minilm.data.preferences import holds_comparisons, load_comparisons
from minilm.extras import told
from minilm.interop import load_model, require_folder, save_adapter, save_model
from minilm.loop import Training, fit, refuse_unused, resumed
from minilm.peft import merge_lora, unload_lora
from minilm.picture import COLORS, save_png
from minilm.quantize import is_quantized
from minilm.ranges import AT_LEAST_0, whole
from minilm.rewards import reward_of, save_reward
from minilm.run import RunDirectory, newest_model, share_held_out
from minilm.stored import fits
from minilm.together import settle


@dataclass(frozen=True)
class Settings(Aligning, Training):
    """What decides a run."""

    model: str = ""
    """Hugging Face folder with a tokenizer.json; by default the newest runs/pretrain-*/model"""
    data: str = "python-reference"
    """corpus whose pieces are the prompts, or a JSONL file of prompt, chosen, rejected"""
    test: int = 128
    """prompts to hold out"""
    merged: bool = False
    """keep the policy as a model, with the adapter in its weights, rather than the adapter"""
    batch: int = 32
    """prompts of a step with their answers; answers of a step of ppo and grpo"""
    steps: int = 240
    """updates in the whole run"""
    lr: float = 0.0
    """learning rate after the warmup. It falls as a cosine, but stays in ppo and grpo; 0 means the
    method's own, which is a starting point"""
    warmup: int = 0
    """steps of linear warmup"""
    eval_every: int = 40
    """steps between looks at held-out prompts"""
    save_every: int = 80
    """steps between checkpoints"""

    RANGES: ClassVar = Training.RANGES | Aligning.RANGES | {
        "steps": whole(1), "test": whole(1), "lr": AT_LEAST_0}


def main(settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),
         out: Path = Path("runs"), resume: Path | None = None, given: Given = frozenset()):
    """Teach a trained model what people prefer.

    Args:
        settings: what decides the run.
        out: the run gets a folder of its own in here.
        resume: folder of a run to go on with, bit for bit, under its own settings.
        given: names of the options on the command line.
    """
    run, s = resumed(settings, resume, given)
    folder = Path(s.model) if s.model else newest_model(Path("runs"), "pretrain-*")
    if not run:
        s = sensible(replace(s, model=str(folder)), given)
    settle(folder)
    require_folder(folder)
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    base = load_model(folder)
    base.config.require_writer(folder, "gives answers")
    if s.method == "reward" and is_quantized(base):
        raise ValueError(f"{folder} is quantized, and a reward model learns in all of its weights: "
                         "give the model that it was made of")
    data.adopt_end(tokenizer, base.ends.eos)
    score = reward_of(s.reward, folder, base, tokenizer) if s.reward else None
    source, described = prompts_of(s)
    old = trained_on(folder, s.replay_from) if s.ptx else []
    described += [{"name": f"old text: {c.name}", "sha256": c.sha256} for c in old]
    decisive = versions.fingerprints(folder)
    if Path(s.reward).is_dir() and s.reward:
        decisive += [{**f, "name": f"reward: {f['name']}"}
                     for f in versions.fingerprints(Path(s.reward))]
    if run:
        run.check(described, "the models or the data are not those", decisive)
    share = share_held_out(folder) or 0.1
    asked = asked_of(source, s, share, base, tokenizer, score, run and run.path)
    parts = [data.split(corpus, share) for corpus in old]
    length = s.prompt + s.tokens
    text = [data.batches_of(parts, tokenizer, s.batch, length, s.seed,
                            names=[corpus.name for corpus in old])[0]] if old else []
    job = JOBS[s.method](base, s, asked, tokenizer, score, *text)
    if run is None:
        run = RunDirectory.create(out, f"align-{s.method}", asdict(s), described, decisive,
                                  partial(keep_made, source, asked))
    with run.going_on():
        step = align(run, s, job)
        kept = keep(run, s, job.model, base, asked, tokenizer)
        tell(run, s, step, kept)


def sensible(s: Settings, given) -> Settings:
    """The settings of a new run. ValueError for those that mean nothing to it."""
    refuse_unused(given, without(s.method), f"the method is {s.method}")
    compares, file = s.method in ("reward", "dpo"), holds_comparisons(s.data)
    if file:
        refuse_unused(given, ("prompt",), f"{s.data} has the prompts")
        refuse_unused(given, ("comparisons", "answers", "sharpness"), f"{s.data} has comparisons")
        if s.method == "reward":
            refuse_unused(given, ("reward",), f"{s.data} says what is better")
    if not s.ptx:
        refuse_unused(given, ("replay_from",), "ptx is 0")
    if s.method == "dpo" and s.beta == 0:
        raise ValueError("beta must be positive for dpo, got 0")
    method, needed = METHODS[s.method], not (compares and file)
    return replace(s, lr=s.lr or method.lr, beta=method.beta if s.beta is None else s.beta,
                   reward=s.reward or ("vowels" if needed else ""))


def prompts_of(s: Settings):
    """(a corpus or comparisons, what run.json says of them)."""
    if not holds_comparisons(s.data):
        corpus = data.load_corpus(s.data)
        return corpus, [{"name": corpus.name, "sha256": corpus.sha256}]
    found = load_comparisons(s.data)
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    return found, [{"name": os.path.basename(s.data), "sha256": digest}]


def align(run, s: Settings, job) -> int:
    """Train, and show what the model does with held-out prompts; returns the last step."""
    for _, done in fit(run, job.model, job.batches, s, job.loss, optimizer=job.optimizer,
                       min_lr=s.lr if METHODS[s.method].constant else 0.0, saved=job.saved):
        if not done.targets:
            print(f"{run.path}: {s.method} on {s.model}, from step {done.step}"
                  + ", its last" * (done.step == s.steps))
        else:
            run.log(**asdict(done), **job.told(done.step - 1))
        looks = done.step % s.eval_every == 0 or done.step == s.steps
        if looks and (done.targets or not run.records()):
            found, line = job.examine()
            tqdm.write(f"step {done.step}: {line}")
            run.log(step=done.step, **found)
    return done.step


def keep(run, s: Settings, model, base, asked, tokenizer) -> dict[str, Path]:
    """Save what was learned; returns the options by which other programs take it."""
    if s.method == "reward":
        reward = finished_reward(model, base, s, asked, tokenizer)
        save_reward(reward, kept := run.path / "reward", tokenizer)
        return {"reward": kept}
    templates, names = data.read_templates(Path(s.model)), None
    if s.merged:
        save_model(unload_lora(merge_lora(model)), kept := run.path / "model", tokenizer)
        names = data.read_names(Path(s.model), tokenizer)
        use = {"model": kept}
    else:
        save_adapter(model, kept := run.path / "adapter", base=s.model)
        use = {"model": s.model, "adapter": kept}
    data.write_templates(kept, templates, names)
    return use


def tell(run, s: Settings, step: int, use: dict[str, Path]):
    """Draw the curves, print the numbers before and after, and how to use what was kept."""
    drawn = draw(run)
    if step < s.steps:
        print(f"stopped after step {step}; go on with: {typed(__file__, resume=run.path)}")
        return
    looks = [r for r in run.records() if "answers" in r or "pairs" in r]
    print(f"\n{'held out':24}{'before':>10}{'after':>10}")
    for what, name in (("pairs", "right"), ("pairs", "loss"), *(
            ("answers", n) for n in ("reward", "kl", "length", "entropy"))):
        before, after = (run.require(look.get(what, {}), **{}).get(name) for look in
                         (looks[0], looks[-1]))
        if after is not None:
            print(f"{what + ': ' + name:24}{before:>z10.3f}{after:>z10.3f}")
    print(told("curves", drawn))
    if s.method == "reward":
        print(f"go by it: {typed(__file__, model=s.model, **use)}")
    else:
        writes = Path(__file__).with_name("generate.py")
        print(f"it writes: {typed(writes, **use, temperature=1.0)}")


PANELS = {  # (what was looked at, its number): what the axis says
    ("pairs", "right"): "pairs in the right order", ("pairs", "loss"): "loss (nats a pair)",
    ("answers", "reward"): "reward", ("answers", "kl"): "KL (nats an answer)",
    ("answers", "length"): "length (tokens)", ("answers", "entropy"): "entropy (nats a token)"}


def draw(run: RunDirectory) -> Path | None:
    """Draw curves.png: what training saw and what is held out, by step; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = run.records()
    panels = {said: curves(records, *at) for at, said in PANELS.items()}
    panels = {said: lines for said, lines in panels.items() if lines[1]}
    across = 2 if len(panels) < 5 else 3
    down = max(1, -(-len(panels) // across))
    figure = Figure(figsize=(3.4 * across, 2.6 * down + 0.3), layout="constrained")
    for axes, (said, lines) in zip(figure.subplots(down, across).flat, panels.items()):
        for points, name, look in zip(lines, ("in training", "held out"), ("-", ".-")):
            axes.plot(*zip(*points or [(0, math.nan)]), look, label=name, linewidth=1,
                      color=COLORS[name == "held out"])
        axes.set(xlabel="step", ylabel=said)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2,
                  frameon=False)
    return save_png(figure, run.path / "curves.png")


def curves(records: list[dict], what: str, name: str) -> tuple[list, list]:
    """(step, number) in training, of the policy before that step, and of what was looked at."""
    found = ([(r["step"] - 1, r.get(name)) for r in records if what not in r],
             [(r["step"], r[what].get(name)) for r in records if fits(r.get(what), dict)])
    return tuple([(x, y) for x, y in points if fits(y, float) and abs(y) < 1e100]
                 for points in found)


if __name__ == "__main__":
    command(main, stopped="stopped at once; a run that had begun goes on with --resume")
