"""The same bodies under other heads: none, which gives hidden states, or classes of whole texts.

config.json's architectures says which head a folder has. A headless one has no prefix in front of
its keys. How many classes there are, and their names, is in id2label.
"""

import functools
import re

from minilm.config import Config
from minilm.interop.families import FAMILIES, Family
from minilm.interop.spelled import Spelled, require

CLASSES = 10**5  # more are damage
POOLED = {"bert": "tanh", "roberta": "tanh", "xlm-roberta": "tanh"}  # whose body has a pooler
CLASSIFIERS = {  # those that look at the first token: the pooler's activation, and the keys
    "bert": ("tanh", {"pooler.dense": "bert.pooler.dense", "head": "classifier"}),
    "distilbert": ("relu", {"pooler.dense": "pre_classifier", "head": "classifier"}),
} | dict.fromkeys(("roberta", "xlm-roberta"), (
    "tanh", {"pooler.dense": "classifier.dense", "head": "classifier.out_proj"}))


def _labels(raw, facts):
    """The classes' names. As in transformers, num_labels says how many if it is there."""
    names, count = raw.get("id2label"), raw.get("num_labels")
    require(names is None or isinstance(names, dict) and all(
        re.fullmatch(r"\d{1,9}", i, re.ASCII) and type(name) in (str, int)
        for i, name in names.items()), raw, "id2label", "numbers and the names of classes")
    count = (2 if names is None else len(names)) if count is None else count
    fits = type(count) is int and 0 < count <= CLASSES
    require(fits, raw, "id2label" if "num_labels" not in raw else "num_labels",
            f"1 to {CLASSES} classes")
    given = {int(i): str(name) for i, name in (names or {}).items()}
    given = given if len(given) == count else {}
    return {"labels": tuple(given.get(i, f"LABEL_{i}") for i in range(count))}


def _write_labels(c: Config) -> dict:
    return {"id2label": {str(i): name for i, name in enumerate(c.labels)},
            "label2id": {name: i for i, name in enumerate(c.labels)}}


LABELS = Spelled(("id2label", "label2id", "num_labels"), _labels, _write_labels)


def headless(kind: str, family: Family) -> Family:
    """The family's body alone. Whether a pooler is on it is not in config.json: the keys say it."""
    prefix = family.layer.partition(".")[0] + "."
    modules = {ours: theirs.removeprefix(prefix) for ours, theirs in family.modules.items()
               if not ours.startswith("head")}
    pooler = {"pooler": POOLED[kind]} if kind in POOLED else {}
    return family._replace(
        architecture=f"{_stem(family)}Model",
        config=functools.partial(family.config, head="none", **pooler),
        modules=modules | ({"pooler.dense": "pooler.dense"} if pooler else {}),
        layer=family.layer.removeprefix(prefix), copies={},
        respell=family.respell | {f"^{re.escape(prefix)}": ""},
        ignored=tuple(key.removeprefix(prefix) for key in family.ignored if ".pooler." not in key))


def classifier(kind: str, family: Family) -> Family:
    """The family's body and the classes of a text: of its first token, or for a decoder its last."""
    pooler, modules = CLASSIFIERS.get(kind, (None, {"head": "score"}))
    body = {ours: theirs for ours, theirs in family.modules.items() if not ours.startswith("head")}
    return family._replace(
        architecture=f"{_stem(family)}ForSequenceClassification",
        config=functools.partial(family.config, head="classes", pooler=pooler),
        modules=body | modules, copies={}, spelled=(*family.spelled, LABELS),
        harmless=tuple(field for field in family.harmless if field not in LABELS.fields),
        ignored=tuple(key for key in family.ignored
                      if key.rpartition(".")[0] not in modules.values()))


def _stem(family: Family) -> str:
    return re.sub("ForCausalLM|LMHeadModel|ForMaskedLM", "", family.architecture)


HEADS = {kind: {"none": headless(kind, family), "classes": classifier(kind, family)}
         for kind, family in FAMILIES.items()}  # by what Config.head says
