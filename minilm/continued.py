"""Continued pretraining: the model that a run begins with, and the text that this model knows.

The runs that made a model say in their run.json which corpora they trained on, and which share they
held out. That share shows what the model still knows after it has learned from other text.
"""

from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from minilm import data
from minilm.adapting import METHODS, Adapting, prepared
from minilm.files import FormatError
from minilm.interop import load_model, save_adapter, save_model
from minilm.loop import refuse_unused
from minilm.run import behind
from minilm.stored import fits
from minilm.together import settle
from minilm.transformer import Transformer
from minilm.versions import fingerprints

ALWAYS = ("dropout", "attention_dropout", "weight_decay")  # of a new model, too


class Base(NamedTuple):
    """What a run goes on from."""

    model: Transformer  # ready to be trained by the settings' method
    tokenizer: data.Tokenizer
    known: dict[str, tuple[str, ...]]  # corpus -> texts that no run has trained on
    unknown: list[str]  # why there is nothing to measure of others, a line each
    decisive: list[dict]  # names and SHA-256 of all this, for run.json


def load_base(s, learned: Collection[str]) -> Base:
    """The model in the folder s.init, for settings of `Adapting` with context, corpus, validation.

    learned: the texts that it is to learn from. ValueError for a model without a language head, for
    a context that it has not, and for a method that is not for it.
    """
    folder, method = Path(s.init), METHODS[s.method]
    settle(folder)  # so that all that is read of it is new
    model = load_model(folder, dropout=s.dropout if method.whole else 0.0)
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    model.config.require_language()
    data.adopt_end(tokenizer, model.ends.eos)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the "
                         f"model has {model.config.vocab_size} rows")
    model = prepared(model, s).astype(s.dtype)
    if s.context > model.room:
        raise ValueError(f"context is {s.context}, but {folder} has room for {model.room} tokens")
    corpora, unknown = corpora_of(folder)
    known = {}
    for corpus, share in corpora:
        share = min(share, s.validation) if corpus.name in s.corpus else share
        if held := tuple(text for text in data.split(corpus, share)[1] if text not in learned):
            known[corpus.name] = held
    told = [{"name": f"known: {c.name}", "sha256": c.sha256} for c, _ in corpora]
    return Base(model, tokenizer, known, unknown, fingerprints(folder) + told)


def refuse_foreign(s, given: frozenset[str], architecture: Collection[str]):
    """ValueError for options that mean nothing with s.init, or without it.

    given: their names; others count as given if they differ from their defaults. architecture: the
    names of those that make a new model.
    """
    only = [field.name for field in fields(Adapting) if field.name not in ALWAYS]
    given = given | {f.name for f in fields(s) if f.name in {*only, *architecture}
                     and getattr(s, f.name) != f.default}
    if not s.init:
        refuse_unused(given, only, "there is no --init whose model it could adapt")
        return
    if wrong := [name for name in architecture if name in given]:
        raise ValueError(f"given: {', '.join(wrong)}; but the model and its tokenizer are those of "
                         f"--init {s.init}")
    method = METHODS[s.method]
    idle = {name for name in method.without if name != "dropout" or not method.whole}
    refuse_unused(given, idle, f"the method is {s.method}")
    if s.method != "full":
        refuse_unused(given, ["beta2", "weight_decay"],
                      f"the method is {s.method}, which learns as in finetune.py")


def corpora_of(folder: Path) -> tuple[list[tuple[data.Corpus, float]], list[str]]:
    """(corpora that the model in this folder was trained on, with the share that was held out in
    all runs; a line for each that is not here as it was)."""
    found, shares, unknown = {}, {}, []
    for run in runs_of(folder):
        then = {c["name"]: c["sha256"] for c in run["corpora"]}
        try:
            corpora = data.load_corpora(then)
        except (ValueError, OSError) as error:
            unknown.append(f"what {folder} knows of {', '.join(then)} is not measured: {error}")
            continue
        for corpus in corpora:
            if corpus.sha256 != then[corpus.name]:
                unknown.append(f"what {folder} knows of {corpus.name} is not measured: the text "
                               "is not what it was")
                continue
            found[corpus.name] = corpus
            share = run["settings"]["validation"]
            shares[corpus.name] = min(share, shares.get(corpus.name, share))
    return [(corpus, shares[name]) for name, corpus in found.items()], unknown


def trained_on(folder: Path, names: Collection[str] = ()) -> list[data.Corpus]:
    """The corpora of these names, or those that the model in the folder was trained on.

    ValueError if there is no name, and what the model was trained on is not known or not here.
    """
    if names:
        return data.load_corpora(names)
    corpora, unknown = corpora_of(folder)
    if unknown or not corpora:
        why = "; ".join(unknown) or f"no run.json says which text {folder} was trained on"
        raise ValueError(f"{why}; give --replay-from")
    return [corpus for corpus, _ in corpora]


def runs_of(folder: Path) -> Iterator[dict]:
    """run.json of the run that made this folder, then that of its base, and so on; those alone that
    trained on corpora. FormatError for one that is no JSON, or says nothing of its corpora."""
    for file, run in behind(folder):
        share = run["settings"].get("validation")
        if "corpus" in run["settings"] and fits(share, float) and 0 < share < 1:
            if not fits(run.get("corpora"), tuple[dict[str, str | int], ...]) or not all(
                    {"name", "sha256"} <= corpus.keys() for corpus in run["corpora"]):
                raise FormatError(file, f"corpora: {run.get('corpora')!r:.100}, expected objects "
                                  "with name and sha256")
            yield run


def save_learned(model: Transformer, s, tokenizer, folder: Path) -> dict[str, Path | str]:
    """Save what the model learned in a folder `model` or `adapter` of this one, and return the
    options by which generate.py uses it. The base's chat template goes with it."""
    base, whole = Path(s.init), METHODS[s.method].whole
    model, kept = METHODS[s.method].finish(model), folder / ("model" if whole else "adapter")
    templates = data.read_templates(base)
    if whole:
        save_model(model, kept, tokenizer)
        data.write_templates(kept, templates, templates and data.read_names(base, tokenizer))
        return {"model": kept}
    save_adapter(model, kept, base=s.init)
    data.write_templates(kept, templates)
    return {"model": s.init, "adapter": kept}


def print_losses(run):
    """Print the losses on the new text and on what the model knew, before and after."""
    records = run.records() or [{}]
    before, after = (run.require(record, validation_loss=float, known=dict)
                     for record in (records[0], records[-1]))
    run.require(before["known"], **dict.fromkeys(after["known"], float))
    print(f"\n{'held out: loss':30}{'before':>8}{'after':>8}")
    rows = [("new text", before["validation_loss"], after["validation_loss"]),
            *((f"known: {name}", before["known"][name], x) for name, x in after["known"].items())]
    for name, a, b in rows:
        print(f"{data.printable(name):30}{a:>8.3f}{b:>8.3f}")
