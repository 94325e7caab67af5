"""Teach a trained model what people prefer: a reward model, PPO, DPO or GRPO.

    python scripts/align.py                       # PPO on the newest model: more vowels
    python scripts/align.py --beta 0.1            # nearer to the model that it was
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from minilm import data, versions
from minilm.align import PPO, Remembering, Rounds, rollouts, value_head
from minilm.align.rollouts import answers_of
from minilm.aligning import Aligning, TextReward, pieces, text_of
from minilm.command import Given, command, typed
from minilm.interop import load_model, require_folder, save_adapter
from minilm.loop import fit, resumed
from minilm.nn import Module
from minilm.peft import add_lora
from minilm.run import RunDirectory, newest_model, share_held_out
from minilm.together import settle


@dataclass(frozen=True)
class Settings(Aligning):
    """What decides a run."""


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
    s = replace(s, model=str(folder), beta=0.02 if s.beta is None else s.beta)
    settle(folder)
    require_folder(folder)
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    corpus = data.load_corpus(s.data)
    described = [{"name": corpus.name, "sha256": corpus.sha256}]
    decisive = versions.fingerprints(folder)
    if run:
        run.check(described, "the model or the text are not those", decisive)
    base = load_model(folder)
    base.config.require_writer(folder, "gives answers")
    data.adopt_end(tokenizer, base.ends.eos)
    trained, held = data.split(corpus, share_held_out(folder) or 0.1)
    prompts = pieces(trained, tokenizer, s.prompt, None, s.seed)
    asked = pieces(held, tokenizer, s.prompt, s.test, s.seed)
    targets = s.targets[0] if s.targets == ("all-linear",) else s.targets
    model = add_lora(base, s.r, s.alpha, targets, seed=s.seed).astype(s.dtype)
    if run is None:
        run = RunDirectory.create(out, f"align-{s.method}", asdict(s), described, decisive)
    with run.going_on():
        align(run, s, model, tokenizer, prompts, asked)


def align(run, s, model, tokenizer, prompts, asked):
    head = value_head(model.config.width, s.seed).astype(s.dtype)
    loss = PPO(head, s.beta, s.eps, lam=s.lam, value=s.value, ptx=s.ptx)
    how = dict(most=s.tokens, end=tokenizer.end, score=TextReward(s.reward, tokenizer))
    rounds = Rounds(model, prompts, loss, batch=s.batch, seed=s.seed, epochs=s.epochs,
                    parts=s.parts, head=head, **how)
    whole = Module()
    whole.model, whole.head = model, head
    optimizer = Remembering(rounds, whole.parameters(), s.lr)
    examine = partial(examined, model, tokenizer, asked, how)
    for _, done in fit(run, model, rounds, s, loss, optimizer=optimizer, min_lr=s.lr, saved=whole):
        if not done.targets:
            print(f"{run.path}: {s.method} on {s.model}, from step {done.step}")
            if not run.records():
                run.log(step=done.step, **examine(done.step))
            continue
        drawn = rounds.drawn.told() if done.step % len(rounds) == 1 % len(rounds) else {}
        run.log(**asdict(done), **drawn)
        if done.step % s.eval_every == 0 or done.step == s.steps:
            run.log(step=done.step, **examine(done.step))
    save_adapter(model, kept := run.path / "adapter", base=s.model)
    if done.step < s.steps:
        print(f"stopped after step {done.step}; go on with: {typed(__file__, resume=run.path)}")
        return
    print(f"it writes: {typed(Path(__file__).with_name('generate.py'), adapter=kept)}")


def examined(model, tokenizer, asked, how, step: int) -> dict:
    """Reward, KL, length, entropy of answers to held-out prompts; prints them with a sample."""
    found = rollouts(model, asked, seed=7, **how)
    told, answer = found.told(), answers_of(found.tokens, found.counted)[0]
    tqdm.write(f"step {step}: reward {told['reward']:.3f}, KL {told['kl']:.2f}, "
               f"{told['length']:.1f} tokens, entropy {told['entropy']:.2f}: "
               + data.printable(f"{tokenizer.decode(asked[0])} -> {text_of(answer, tokenizer)}"))
    return {"held_out": told}


if __name__ == "__main__":
    command(main, stopped="stopped at once; a run that had begun goes on with --resume")
