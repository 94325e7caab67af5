"""adapter_config.json: what each of PEFT's fields means here, and which modules the fields choose.

A field is read, changes no number, or is refused unless it is null or false. A field that PEFT does
not know yet is refused likewise. PEFT's own defaults pass. FORMATS has the fields of each method.

Names of modules are compared as PEFT does it:

    target_modules, exclude_modules     a string is a regular expression for the whole name; of a
                                        list, an entry is the name or its last parts
    layers_to_transform                 of a list of targets, those in these layers; layers_pattern
                                        says what stands in front of a layer's number
    rank_pattern, alpha_pattern         expressions for the name or its last parts; the first counts
                                        (AdaLoRA's rank_pattern has names of tensors instead)
    modules_to_save                     the last letters of a module, which is trained as a whole
"""

from minilm.files import FormatError, read_json
from minilm.interop.patterns import match
from minilm.interop.peft_formats import FORMATS, Format, names
from minilm.interop.peft_front import FRONTS, FrontFormat
from minilm.interop.peft_front import INERT as INERT_IN_FRONT
from minilm.peft.adapted import ends_with

READ = {  # of all methods: (default, test of a value, the values that pass, in words)
    "target_modules": (None, lambda v: v is None or type(v) is str or names(v), "names"),
    "exclude_modules": (None, lambda v: v is None or type(v) is str or names(v), "names"),
    "modules_to_save": (None, lambda v: v is None or names(v), "names"),
    "base_model_name_or_path": (None, lambda v: v is None or type(v) is str, "a name or null"),
}
INERT = {  # these change no number, or only with init_lora_weights that are refused
    "peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "init_ia3_weights", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}
REFUSED = {  # other methods, and other places than linear layers: unless null or false
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config",
    "layer_replication", "lora_bias", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}

SHARED = "shared"  # T5's embedding
IDLE = "PEFT trains a copy of T5's embedding that neither encoder nor decoder looks at"


def read_config(path) -> tuple[Format | FrontFormat, dict]:
    """(the method, its fields). FormatError if a value does not fit, or for an unknown field."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise FormatError(path, f"is {type(raw).__name__}, expected fields")
    kind = raw.get("peft_type")
    methods = FORMATS | FRONTS
    if not isinstance(kind, str) or kind not in methods:
        raise FormatError(path, f"peft_type is {kind!r}, expected one of {list(methods)}")
    in_front = kind in FRONTS
    fields = methods[kind].fields if in_front else READ | methods[kind].fields
    inert = INERT | INERT_IN_FRONT if in_front else INERT
    config = {field: raw.get(field, default) for field, (default, _, _) in fields.items()}
    for field, (_, fits, expected) in fields.items():
        if not fits(config[field]):
            raise FormatError(path, f"{field} is {config[field]!r}, expected {expected}")
    for field, value in raw.items():
        if field not in fields and field not in inert and value is not None and value is not False:
            raise FormatError(path, f"{field} is {value!r}, which is not supported")
    return methods[kind], config


def resolve(path, config: dict, modules) -> dict:
    """The config with each expression replaced by the modules' names that it matches."""
    config = dict(config)
    if SHARED in modules and _saved(config, SHARED):
        raise FormatError(path, f"modules_to_save is {config['modules_to_save']!r}, which names "
                          f"{SHARED}: {IDLE}")
    for twice in filter(lambda saved: len(saved) > 1, (_saved(config, m) for m in modules)):
        raise FormatError(path, f"modules_to_save is {config['modules_to_save']!r}, which names "
                          f"{twice[1]} and {twice[0]} around it: PEFT trains the one, writes the "
                          "other, and reads neither")
    patterns = {"rank_pattern", "alpha_pattern"} if "init_r" not in config else set()
    for field in patterns & config.keys():
        table, of = config[field] or {}, {}
        for key, matched in _match(path, field, table, modules, r"(.*\.)?({})$").items():
            of = dict.fromkeys(matched, table[key]) | of  # the first counts
        config[field] = of
    for field in {"exclude_modules", "feedforward_modules"} & config.keys():
        if type(config[field]) is str:
            config[field] = [*_match(path, field, [config[field]], modules)[config[field]]]
    return config


def choose(path, config: dict, linear: list[str], head: str, there: set[str]) -> list[str]:
    """The linear modules that the method is on.

    head: the one that "all-linear" leaves out. there: those that have tensors in the file, which
    are taken if there are no names.
    """
    targets, excluded = config["target_modules"], config["exclude_modules"] or ()
    if wrong := [m for m in linear if m in there and named(m, excluded)]:
        raise FormatError(path, f"exclude_modules names {wrong[0]}, which has tensors")
    inner = _match(path, "modules_to_save", config["modules_to_save"] or (), linear,
                   r"(^|.*\.){}($|\..*)")
    left = [m for m in linear if not named(m, excluded) and not any(m in f for f in inner.values())]
    layers = _in_layers(path, config, left)
    if targets is None:
        return [m for m in left if m in there and m in layers]
    if type(targets) is list:
        return [m for m in left if m in targets or (m in layers and named(m, targets))]
    if targets.lower() == "all-linear":
        return [m for m in left if m != head]
    return [*_match(path, "target_modules", [targets], left)[targets]]


def trained_whole(config: dict, modules) -> set[str]:
    """The modules that modules_to_save names: they, or what they are part of, end with an entry."""
    return {m for m in modules if _saved(config, m)}


def _saved(config, module) -> list[str]:
    """What modules_to_save names of the module and all that it is part of."""
    ends = tuple(config["modules_to_save"] or ())
    places = (module[:i] for i, c in enumerate(f"{module}.") if c == ".")
    return [place for place in places if place.endswith(ends)]


def named(module: str, ends) -> bool:
    """Does an entry of the list stand for the module?"""
    return any(ends_with(module, end) for end in ends)


def _in_layers(path, config, modules):
    """The modules in layers_to_transform; all, if there is no such field or list."""
    layers, fronts = config.get("layers_to_transform"), config.get("layers_pattern")
    numbered = layers is not None and layers != []
    for field, given in (("layers_to_transform", numbered), ("layers_pattern", fronts)):
        if given and type(config["target_modules"]) is str:
            raise FormatError(path, f"{field} is {config[field]!r}, which goes with a list of "
                              "target_modules alone")
    if fronts and layers is None:
        raise FormatError(path, f"layers_pattern is {fronts!r}, but layers_to_transform is null")
    if not numbered:
        return {*modules}
    if fronts:
        fronts = [fronts] if type(fronts) is str else fronts
        form = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
    else:
        fronts, form = [""], r".*?\.[^.]*{}\.(?P<idx>\d+)\."
    numbers = {}
    for matched in _match(path, "layers_pattern", fronts, modules, form).values():
        numbers = matched | numbers  # the first counts
    wanted = layers if type(layers) is list else [layers]
    return {m for m, number in numbers.items() if number and int(number) in wanted}


def _match(path, field, expressions, modules, form=None):
    try:
        return match(expressions, modules, form)
    except ValueError as error:
        raise FormatError(path, f"{field} {error}") from None
