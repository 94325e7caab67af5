"""The stages of check_gpu.py: the processes that each one runs, and what it reports of them.

Every stage is a function of a Stage (its log and its clock) and the program's options.
"""

import importlib.util
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
CASES = re.findall(r"^def (\w+)\(large\):",
                   (HERE / "gpu_cases.py").read_text(encoding="utf-8"), re.M)
SANITIZED = [name for name in CASES if name not in ("products", "model")]  # cuBLAS's, and slow
TESTS = (  # longest first
    "cuda_path nf4_kernels gpu_benchmark attention_kernel row_kernels adamw_kernel lora_kernels "
    "counted_kernels paged eightbit mezo methods_on_a_card dequantized student memory_report "
    "measure main rank_training rank_speed comm").split()
GROUPS = {"dequantize": 30, "matmul": 40, "lora": 40, "attention": 25, "swiglu": 25, "rms_norm": 25,
          "adamw": 20, "pages": 25, "quantize": 20, "reference": 20}  # at most, in seconds
WANTED = ("cupy", "torch", "hypothesis", "pytest", "xdist", "pytest_timeout", "tyro", "tqdm",
          "safetensors", "threadpoolctl", "ml_dtypes")
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats",
            "SchedulerStats")
COUNT = os.cpu_count() or 2
FEW_THREADS = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}  # if many processes run
PROBE = sys.executable, HERE / "gpu_probe.py"
CHECKS = sys.executable, HERE / "check_kernels.py"


def env(stage, args):
    """Card, driver, versions, registers; the card's ceilings."""
    for name, command in (("nvidia-smi", ["nvidia-smi"]), ("nvcc", ["nvcc", "--version"]),
                          ("topology", ["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"])):
        if shutil.which(command[0]):
            stage.run(name, command, 10)
        else:
            stage.note(name, "absent")
    absent = [name for name in WANTED if importlib.util.find_spec(name) is None]
    stage.note("packages", "ok", f"absent: {' '.join(absent) or 'none'}")
    if not args.dry_run:
        stage.run("CuPy and our kernels", [*PROBE, "env"])
        ceilings(stage, args)


def ceilings(stage, args):
    output, _ = stage.run("ceilings", [*PROBE, "ceilings", args.scratch / "ceilings.json"])
    args.table += table_of(output)


def table_of(output: str) -> list[str]:
    """The lines of an output that belong in kernels/RESULTS.md."""
    return [line for line in output.splitlines() if line.startswith(("| ", "Measured on "))]


def chosen(names, args):
    return [name for name in names if not args.only or name in args.only]


def cases(stage, args):
    """Every kernel against its formula, small, then large."""
    more = ["--stand-in"] if args.dry_run else []

    def job(case, large):
        return lambda: stage.run(f"{case}{' large' * large}",
                                 [*CHECKS, case, *more, *["--large"] * large], 60, env=FEW_THREADS)

    for large in (False, True)[: 1 if args.dry_run else 2]:
        stage.at_once([job(case, large) for case in chosen(CASES, args)], min(8, COUNT))


def bench(stage, args):
    """The rows of benchmark.py except the step, one process after the other."""
    found = args.scratch / "ceilings.json"
    if not found.exists():
        ceilings(stage, args)
    for group in chosen(GROUPS, args):
        seconds = min(GROUPS[group], stage.left())
        output, _ = stage.run(group, [*PROBE, "rows", found, group, args.rounds, seconds - 10],
                              seconds, told=met)
        args.table += table_of(output)
        print(*(f"    {line}" for line in table_of(output)), sep="\n", flush=True)


def met(output):
    """How many rows there are, and how many of them met their goal, missed it or failed."""
    counted = {"met": ": met |", "missed": ": missed |", "FAILED": "FAILED", "late": "no time left"}
    return ", ".join([f"{len(table_of(output))} rows",
                      *(f"{output.count(text)} {word}" for word, text in counted.items())])


def step(stage, args):
    """Our step of QLoRA beside PyTorch's: time to queue it, time until it is done, memory."""
    for side, layers in ("ours", 2), ("ours", 22), ("torch", 22):  # a short one first
        limit = 80 if side == "ours" else 240  # PyTorch's model is quantized on the CPU
        stage.run(f"{side}, {layers} layers",
                  [*PROBE, "step", side, layers, args.scratch, "plain"], limit)
    rows_of_steps("step_rows", stage, args)


def streaming(stage, args):
    """The step with states in pages and with checkpoints; small steps in a limited pool."""
    plain = [] if (args.scratch / "plain-ours-22.json").exists() else ["plain"]  # from `step`
    for kind in (*plain, "pages-32", "pages-8", "checkpoint"):
        stage.run(kind, [*PROBE, "step", "ours", 22, args.scratch, kind], 45)
    for job in "needs", "within":  # both kinds at once, since nothing is timed
        stage.at_once([partial(stage.run, f"{job} {kind}", [*PROBE, job, kind, args.scratch], 75)
                       for kind in ("plain", "pages-8")], 2)
    stage.run("torch", [*PROBE, "step", "torch", 22, args.scratch, "checkpoint"], 90)
    rows_of_steps("streaming_rows", stage, args)


def rows_of_steps(name, stage, args):
    output, _ = stage.run("rows", [*PROBE, name, args.scratch / "ceilings.json", args.scratch],
                          told=met)
    args.table += table_of(output)


def tests(stage, args):
    """The tests that take the fixture `cupy`, on the real CuPy; a process for each file."""
    more = ["--timeout=60"] if importlib.util.find_spec("pytest_timeout") else []
    command = [sys.executable, "-m", "pytest", "-k", "emulated" if args.dry_run else "real", "-q",
               "-o", "addopts=-ra", "-p", "no:cacheprovider", "-W", "default", "--tb=short", *more]
    settings = FEW_THREADS | {"HYPOTHESIS_PROFILE": "few" if args.dry_run else "dev"}

    def job(name):
        return lambda: stage.run(name, [*command, f"tests/test_{name}.py"], env=settings,
                                 told=outcome, absent=5)

    stage.at_once([job(name) for name in chosen(TESTS, args)], min(8, COUNT))


def outcome(output):
    """pytest's last line, and the first failure."""
    ends = re.findall(r"^\S*\d+ (?:passed|failed|skipped|error).*$", output, re.M)
    first = re.search(r"^(?:FAILED|ERROR) .*$", output, re.M)
    return " ".join([*(end.strip("= ") for end in ends[-1:]), *([first[0][:110]] if first else [])])


def sanitize(stage, args):
    """check_kernels.py under compute-sanitizer."""
    tool = found("compute-sanitizer", "/usr/local/cuda/bin", "compute-sanitizer")
    if not tool:
        return stage.note("compute-sanitizer", "absent")

    def job(check, case):
        return lambda: stage.run(
            f"{check} {case}", [tool, "--tool", check, "--error-exitcode", "9", "--print-limit",
                                "8", *CHECKS, case, "--raw",
                                *["--unwritten"] * (check == "initcheck")],
            60, told=faults, env=FEW_THREADS)

    order = [(check, case) for check in ("memcheck", "racecheck", "synccheck", "initcheck")
             for case in chosen(SANITIZED, args)]
    stage.at_once([job(*pair) for pair in order], min(8, COUNT))


def faults(output):
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    return ", ".join([*summaries[-1:], f"{output.count('FAIL ')} FAIL"])


def ncu(stage, args):
    """What limits a few kernels, if Nsight Compute is installed."""
    tool = found("ncu", "/opt/nvidia", "nsight-compute/*/ncu")
    if not tool:
        return stage.note("ncu", "absent")
    sections = [word for name in SECTIONS for word in ("--section", name)]
    stage.run("ncu", [tool, "--clock-control", "none", *sections, "-k", "regex:nf4_|attention_",
                      *PROBE, "profiled"],
              told=lambda text: f"{text.count('Section: GPU Speed Of Light')} kernels profiled")


def found(name, folder, pattern):
    """A tool's path, or None."""
    return shutil.which(name) or next(map(str, Path(folder).glob(pattern)), None)


STAGES = {f.__name__: f for f in (env, cases, bench, step, streaming, tests, sanitize,
                               ncu)}
