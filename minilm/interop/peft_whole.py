"""What a PEFT folder holds beside the tensors of a method: layers that were trained whole.

    <module>.weight, .bias      a module of modules_to_save
    <module>.base_layer.bias    the bias below an adapter, with bias "lora_only" or "all"
    <module>.bias               every other bias, with bias "all"
    <module>.base_layer.weight  the head below an adapter; and embedding or head (<module>.weight)
                                without modules_to_save: PEFT keeps them if it is told so, if the
                                vocabulary has changed, or if the head has an adapter

PEFT writes the last kind without training it. If it equals the model's own, it is left out here;
otherwise it takes its place, frozen. A tied head and embedding have one weight. modules_to_save
makes a copy, so from then on head and embedding differ.
"""

from dataclasses import dataclass

import numpy as np

from minilm.backend import to_device
from minilm.files import FormatError
from minilm.interop.families import Family
from minilm.interop.huggingface import finite, turned
from minilm.interop.peft_config import IDLE, SHARED, trained_whole
from minilm.interop.peft_formats import shortest_end
from minilm.peft.adapted import placed
from minilm.peft.retrained import Retrained, with_tensors
from minilm.tensor import Tensor
from minilm.transformer import Transformer

PREFIX = "base_model.model."
KINDS = ("weight", "bias")
CLASSIFIER = "classifier"


@dataclass
class Whole:
    """Which tensors of a model are, or could be, in a folder as a whole."""

    model: Transformer
    family: Family
    bases: dict  # our path -> module
    modules: dict  # their module -> our paths
    prefix: str = PREFIX  # of the keys

    def ends(self) -> tuple[str, str]:
        """Our paths of the embedding and of the head's linear layer."""
        return "embed", "head.out" if "head.out" in self.bases else "head"

    def shape(self, module, kind):
        """In the file; None if there is no such tensor."""
        parts = [getattr(self.bases[path], kind, None) for path in self.modules[module]]
        if any(part is None for part in parts):
            return None
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return shape[::-1] if ".c_" in f"{module}.{kind}" else shape

    def wanted(self, config, adapted, arrays) -> dict[str, tuple[str, str, bool]]:
        """{key: (module, kind, is it trained?)} of what the file should hold."""
        saved, ends, found = trained_whole(config, self.modules), self.ends(), {}
        biased = {"all": self.modules, "lora_only": adapted}.get(config.get("bias"), ())
        for module, paths in self.modules.items():
            below = f"{module}.base_layer" if module in adapted else module
            for kind in KINDS:
                key = f"{self.prefix}{below}.{kind}"
                if self.shape(module, kind) is None:
                    continue
                if module in saved:
                    found[f"{self.prefix}{module}.{kind}"] = module, kind, True
                elif kind == "bias" and module in biased:
                    found[key] = module, kind, True
                elif key in arrays and paths[0] in ends:
                    found[key] = module, kind, False
        return found

    def read(self, file, arrays, wanted, adapters) -> dict:
        """The adapters, and for each layer with tensors of its own one that holds them."""
        dtype, own, tied = placed(self.model, ()).dtype, {}, {}
        for key, (module, kind, trained) in wanted.items():
            array, paths = turned(key, finite(file, key, arrays[key], dtype)), self.modules[module]
            sizes = [getattr(self.bases[path], kind).shape[0] for path in paths]
            for path, part in zip(paths, np.split(array, np.cumsum(sizes)[:-1])):
                if trained or not self._has(path, kind, part):
                    tensor = Tensor(placed(self.model, part), requires_grad=trained)
                    own.setdefault(path, {})[kind] = tensor
                    if kind == "weight" and not trained:
                        tied[path] = tensor
        ends = self.ends()
        for path, other in (ends, ends[::-1]) if self.model.config.shared else ():
            if path in tied:
                own.setdefault(other, {}).setdefault("weight", tied[path])
        layers = {path: with_tensors(self.bases[path], **tensors) for path, tensors in own.items()}
        return adapters | {path: Retrained(layer, adapters.get(path))
                           for path, layer in layers.items()}

    def _has(self, path, kind, array):
        has = getattr(self.bases[path], kind)
        return isinstance(has, Tensor) and np.array_equal(to_device(has.data, "cpu"), array)

    def write(self, retrained: dict[str, Retrained], adapted) -> tuple[dict, list, str]:
        """(the tensors, modules_to_save, bias) of layers with tensors of their own.

        ValueError for biases that are neither all nor those of the adapted layers.
        """
        arrays, saved, biased = {}, [], set()
        for module, paths in self.modules.items():
            layers = {path: retrained[path].layer for path in paths if path in retrained}
            own = [kind for kind in KINDS if any(
                getattr(layer, kind, None) is not getattr(self.bases[path], kind, None)
                for path, layer in layers.items())]
            below = f"{module}.base_layer" if module in adapted else module
            if own and module == SHARED:
                raise ValueError(f"{SHARED} cannot be saved: {IDLE}")
            if "weight" in own and module not in adapted:
                own = [kind for kind in KINDS if self.shape(module, kind)]
                saved.append(module)
            elif "bias" in own:
                biased.add(module)
            for kind in own:
                parts = [getattr(layers.get(path, self.bases[path]), kind) for path in paths]
                array = np.concatenate([to_device(part.data, "cpu") for part in parts])
                arrays[key] = turned(key := f"{self.prefix}{below}.{kind}", array)
        arrays |= {f"{self.prefix}{copy}": arrays[f"{self.prefix}{key}"] for copy, key in
                   self.family.copies.items() if f"{self.prefix}{key}" in arrays}
        every = {m for m in self.modules if m not in saved and self.shape(m, "bias")}
        for bias, modules in {"none": set(), "lora_only": every & {*adapted}, "all": every}.items():
            if biased == modules:
                others = self.modules.keys() - {*saved}
                return arrays, sorted({shortest_end(_head(m, others), others, others)
                                       for m in saved}), bias
        raise ValueError(f"PEFT trains all biases or those of adapted layers, not {sorted(biased)}")


def _head(module, others) -> str:
    """RoBERTa's classifier is two layers. If both are saved, PEFT wants the name of the whole."""
    head = f"{CLASSIFIER}."
    whole = module.startswith(head) and not any(other.startswith(head) for other in others)
    return CLASSIFIER if whole else module


def without_copies(file, arrays: dict, family: Family, config: dict) -> dict:
    """The arrays, each once. FormatError for a copy that differs.

    With bias "all", PEFT writes the biases of modules_to_save three times: as such, under its own
    name for them, and as they were. What they were does not act.
    """
    if config.get("bias") == "all":
        arrays = {key: a for key, a in arrays.items() if not (key.endswith(".bias") and (
            ".original_module." in key or ".modules_to_save." in key))}
    for copy, key in family.copies.items():
        module, _, kind = key.rpartition(".")
        keys = {f"{PREFIX}{key}", f"{PREFIX}{module}.base_layer.{kind}"} & arrays.keys()
        if keys and f"{PREFIX}{copy}" in arrays:
            array = arrays.pop(f"{PREFIX}{copy}")
            acts = not trained_whole(config, [module])
            if acts and not np.array_equal(array, arrays[min(keys)]):
                raise FormatError(file, f"{PREFIX}{copy} differs from {min(keys)}, of which it "
                                        "should be a copy")
    return arrays
