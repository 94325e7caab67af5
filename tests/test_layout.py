"""Checks the house: which module may import which, what is imported late, and how long things are.

All of it is read from the source; only the public names and what importing loads are run.
"""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = [
    {"shell", "extras", "backend", "arrays", "blas", "cuda", "locks", "strict", "files",
     "together", "stored", "ranges", "tensorfiles", "vectors"},
    {"graph", "tensor", "ops", "activations", "heads", "attention", "losses"},
    {"rope", "config", "inputs", "nn", "block", "transformer", "seq2seq", "shapes", "cache",
     "decode", "generate", "dialogue"},
    {"quantize", "peft", "distill", "optim", "parallel", "align"},
    {"data", "interop", "measure", "lessons"},
    {"train", "loop", "run", "checkpoint", "records", "state", "versions", "picture",
     "results", "experiment", "command", "adapting", "aligning", "asking", "rewards",
     "continued", "trial", "tables", "trained", "stages", "ranks", "joining", "launch", "new",
     "lectures", "wholerun",
     "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHIN = {  # the arrows inside a floor
    ("arrays", "backend"),
    ("files", "locks"),
    ("files", "strict"),
    ("stored", "files"),
    ("tensorfiles", "files"),
    ("together", "files"),
    ("together", "locks"),
    ("extras", "shell"),
    ("backend", "extras"),
    ("blas", "backend"),
    ("blas", "arrays"),
    ("vectors", "arrays"),
    ("cuda", "backend"),
    ("cuda", "arrays"),
    ("tensor", "graph"),
    ("attention", "graph"),
    ("ops", "tensor"),
    ("ops", "activations"),
    ("ops", "attention"),
    ("ops", "heads"),
    ("heads", "tensor"),
    ("ops", "losses"),
    ("losses", "tensor"),
    ("activations", "graph"),
    ("activations", "tensor"),
    ("attention", "tensor"),
    ("config", "rope"),
    ("block", "config"),
    ("block", "nn"),
    ("transformer", "block"),
    ("transformer", "cache"),
    ("transformer", "config"),
    ("transformer", "inputs"),
    ("transformer", "nn"),
    ("transformer", "rope"),
    ("seq2seq", "inputs"),
    ("decode", "block"),
    ("shapes", "config"),
    ("seq2seq", "inputs"),
    ("seq2seq", "nn"),
    ("seq2seq", "transformer"),
    ("generate", "transformer"),
    ("generate", "seq2seq"),
    ("generate", "decode"),
    ("generate", "cache"),
    ("dialogue", "cache"),
    ("dialogue", "decode"),
    ("dialogue", "generate"),
    ("dialogue", "transformer"),
    ("decode", "nn"),
    ("decode", "seq2seq"),
    ("decode", "rope"),
    ("decode", "transformer"),
    ("peft", "quantize"),
    ("optim", "quantize"),
    ("parallel", "optim"),
    ("align", "peft"),
    ("align", "optim"),
    ("measure", "data"),
    ("lessons", "data"),
    ("lessons", "interop"),
    ("lessons", "measure"),
    ("run", "checkpoint"),
    ("run", "picture"),
    ("run", "records"),
    ("run", "state"),
    ("run", "versions"),
    ("experiment", "command"),
    ("experiment", "picture"),
    ("experiment", "results"),
    ("experiment", "run"),
    ("experiment", "train"),
    ("loop", "ranks"),
    ("loop", "run"),
    ("ranks", "run"),
    ("ranks", "train"),
    ("joining", "adapting"),
    ("joining", "command"),
    ("joining", "loop"),
    ("joining", "ranks"),
    ("joining", "run"),
    ("adapting", "train"),
    ("aligning", "asking"),
    ("aligning", "rewards"),
    ("continued", "adapting"),
    ("continued", "loop"),
    ("continued", "run"),
    ("continued", "versions"),
    ("trial", "adapting"),
    ("trial", "command"),
    ("trial", "experiment"),
    ("trial", "loop"),
    ("trial", "run"),
    ("trial", "versions"),
    ("lectures", "results"),
    ("wholerun", "lectures"),
    ("wholerun", "results"),
    ("tables", "trial"),
    ("trained", "run"),
    ("stages", "aligning"),
    ("stages", "asking"),
    ("stages", "loop"),
    ("stages", "rewards"),
    ("stages", "trial"),
    ("loop", "train"),
    ("command", "launch"),
    ("command", "train"),
    ("__main__", "command"),
    ("__main__", "train"),
    ("__main__", "versions"),
}
NARROWER = {
    "data": {"extras", "files", "strict"},
    "optim": {"backend", "arrays", "blas", "cuda", "tensor", "attention", "ops", "quantize",
              "ranges"},
}
PEFT = {  # methods of peft/ that know another one; all others know adapted.py alone
    "adapted": set(),
    "lora": {"adapted", "qlora"},
    "front": {"adapted"},  # of prompts and prefixes
    "prompt": {"adapted", "front"},
    "prefix": {"adapted", "front"},
    "adalora": {"adapted", "lora"},
    "bitfit": {"adapted", "retrained"},
    "bottleneck": {"adapted", "retrained"},
    "budget": {"adalora"},  # which of its singular values are kept
    "dora": {"adapted", "lora"},
    "subspace": {"adapted", "retrained"},
    "requantize": {"adapted", "lora"},  # merged LoRA in codes again
}

REQUIRED = {"numpy", "ml_dtypes", "safetensors", "threadpoolctl", "tqdm", "tyro",
            "docstring_parser"}
LATE = {
    "bitsandbytes", "cupy", "cupy_backends", "cupyx", "jax", "jinja2", "markupsafe", "matplotlib",
    "mpi4py", "peft", "py3langid", "scipy", "tokenizers", "torch", "transformers",
}

PUBLIC = {  # what other programs rely on
    "tensor": "Tensor Tensor.backward no_grad checkpoint op",
    "ops": "linear matmul add mul gelu silu swiglu relu softmax log_softmax layer_norm rms_norm "
    "rotary embedding dropout attention cross_entropy kl_divergence cosine_embedding mse",
    "transformer": "Config Transformer Transformer.parameters Transformer.named_parameters "
    "Transformer.state_dict Transformer.load_state_dict Transformer.train Transformer.eval "
    "Transformer.to",
    "generate": "generate",
    "distill": "distillation_loss student_from_teacher Distillation TopK top_k",
    "optim": "AdamW SGD PagedAdamW LossScaler clip_grad_norm cosine_schedule",
    "quantize": "quantize_int8 Int8 Int8.dequantize int8_matmul_outliers quantize_4bit FourBit "
    "FourBit.dequantize QuantizedLinear quantize_model",
    "peft": "add_lora add_ia3 add_bitfit add_bottleneck add_dora add_adalora Budget Budget.at "
    "Budget.step Orthogonal train_top retrain use_adapter merge_lora unmerge_lora unload_lora "
    "requantize_lora trainable_parameters add_subspace subspace_of degrees_of_freedom",
    "peft.prompt": "add_prompt",
    "peft.prefix": "add_prefix settle_prefix",
    "peft.adapted": "Adapter AdaptedLinear insert_adapters merge unmerge unload chosen",
    "interop": "load_model save_model",
    "interop.huggingface": "load_model save_model",
    "interop.peft": "load_adapter save_adapter",
    "interop.bitsandbytes": "load_4bit save_4bit load_model save_model",
    "checkpoint": "save load",
}


def source(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path):
    """minilm/optim/flat.py -> "optim.flat", and a package's __init__.py -> the package."""
    parts = path.relative_to(ROOT / "minilm").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def from_root(path):
    return path.relative_to(ROOT).as_posix()


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node):
    """The dotted names that an import statement may load; [] for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, f"line {node.lineno}: a relative import hides where it points"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(nodes):
    return {module for node in nodes for module in imported(node)}


def at_import(node):
    """The nodes that run when the module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(child)


def arrows(path):
    """The rooms of minilm that a module imports, early or late, without its own."""
    rooms = set()
    for module in imports(ast.walk(tree(path))):
        package, _, rest = module.partition(".")
        if package == "minilm" and rest:
            room = rest.split(".")[0]
            if (ROOT / "minilm" / room).is_dir() or (ROOT / "minilm" / f"{room}.py").exists():
                rooms.add(room)
    return rooms - {name(path).split(".")[0]}


@pytest.mark.parametrize("path", source("minilm"), ids=from_root)
def test_imports_point_down(path):
    room = name(path).split(".")[0]
    if not room:
        assert arrows(path) == set(), "importing minilm loads nothing"
        return
    assert room in FLOOR, f"{room} has no floor: give it one in {Path(__file__).name}"
    for other in arrows(path):
        down = FLOOR[other] < FLOOR[room]
        assert down or (room, other) in WITHIN, f"{name(path)} must not import {other}"
        assert other in NARROWER.get(room, {other}), f"{name(path)} must not import {other}"


def siblings(path):
    """The modules of its own package that a module imports; "__init__" for the package's names."""
    package = f"minilm.{path.parent.name}."
    found = {module.removeprefix(package).split(".")[0] for module in imports(ast.walk(tree(path)))
             if module.startswith(package)}
    return {m if (path.parent / f"{m}.py").exists() else "__init__" for m in found}


@pytest.mark.parametrize("path", source("minilm/peft"), ids=from_root)
def test_methods_of_peft_know_the_slot_and_not_each_other(path):
    if path.stem != "__init__":  # the public names, of all of them
        assert siblings(path) <= PEFT.get(path.stem, {"adapted"})


def test_the_arrows_inside_a_floor_make_no_circle():
    left = set(WITHIN)
    assert all(FLOOR[a] == FLOOR[b] for a, b in left)
    while ends := {pair for pair in left if pair[1] not in {a for a, _ in left}}:
        left -= ends
    assert not left


@pytest.mark.parametrize("path", source("minilm"), ids=from_root)
def test_only_required_packages_are_imported_early(path):
    third_party = {
        module.split(".")[0] for module in imports(at_import(tree(path)))
    } - sys.stdlib_module_names
    assert third_party <= REQUIRED | {"minilm"}
    if name(path).startswith("data"):
        assert third_party <= {"numpy", "minilm"}


@pytest.mark.parametrize("path", source("scripts"), ids=from_root)
def test_scripts_import_optional_packages_late(path):
    early = {module.split(".")[0] for module in imports(at_import(tree(path)))}
    assert not early & LATE


def other_programs(path):
    """The programs of scripts/ that this one imports; those of bench/ may import each other."""
    def both_in_bench(other): return other.parent.name == path.parent.name == "bench"
    programs = {other.stem for other in source("scripts") if not both_in_bench(other)}
    return {m.split(".")[0] for m in imports(ast.walk(tree(path)))} & (programs | {"scripts"})


@pytest.mark.parametrize("path", source("scripts"), ids=from_root)
def test_no_program_imports_another(path):
    """What two of them need belongs in minilm."""
    assert other_programs(path) == set()


def test_another_program_is_seen(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import minilm.generate\ndef main():\n    from finetune import main\n")
    assert other_programs(program) == {"finetune"}


def test_only_backend_and_arrays_import_cupy():
    cupy = {"cupy", "cupy_backends", "cupyx"}
    found = {
        from_root(path)
        for path in source("minilm", "scripts")
        if cupy & {m.split(".")[0] for m in imports(ast.walk(tree(path)))}
    }
    assert found == {"minilm/backend.py", "minilm/arrays.py"}


def test_importing_every_module_loads_no_optional_package():
    modules = [f"minilm.{name(path)}".rstrip(".") for path in source("minilm")]
    program = (
        "import importlib, sys\n"
        f"for module in {modules}: importlib.import_module(module)\n"
        f"print(*sorted({LATE} & set(sys.modules)))"
    )
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", source("minilm", "scripts"), ids=from_root)
def test_files_functions_and_lines_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    long = [f"the file has {len(lines)} lines"] if len(lines) > 320 else []
    for number, line in enumerate(lines, 1):
        if len(line) > 100:
            long.append(f"line {number} has {len(line)} columns")
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50:
            long.append(f"{node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long


def test_nothing_runs_code_that_comes_as_data():
    """No eval, no exec, and no format that can hold code: pickle and what is built on it."""
    for path in source("minilm", "scripts", "tests"):
        nodes = list(ast.walk(tree(path)))
        calls = {getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)}
        modules = {module.split(".")[0] for module in imports(nodes)}
        settings = {word.arg for word in nodes if isinstance(word, ast.keyword)}
        assert not calls & {"eval", "exec", "compile"}, path
        assert not modules & {"pickle", "marshal", "shelve", "dill", "joblib"}, path
        assert "allow_pickle" not in settings, path


@pytest.mark.parametrize("path", source("minilm"), ids=from_root)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize(
    "module, path", [(module, path) for module, paths in PUBLIC.items() for path in paths.split()]
)
def test_every_public_name_says_what_it_is(module, path):
    """A docstring, a comment at the end of its first line, or no more than three lines."""
    public = attrgetter(path)(importlib.import_module(f"minilm.{module}"))
    lines = inspect.getsource(public).removeprefix("@op\n").splitlines()
    assert inspect.getdoc(public) or "  # " in lines[0] or len(lines) <= 3
