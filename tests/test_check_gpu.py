"""bench/check_gpu.py without a GPU: a piece of its dry run, its clock, and what it collects."""

import ast
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import check_gpu
import gpu_cases
import gpu_probe
import gpu_stages
import gpu_step
import gpu_table
import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_piece_of_the_dry_run(tmp_path):
    done = subprocess.run(
        ["sh", ROOT / "scripts" / "bench" / "check_gpu.sh", "--dry-run", "--stages", "env", "cases",
         "--only", "adam", "--out", tmp_path], capture_output=True, text=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert "cases     adam                         ok" in summary and "28 checks" in summary
    assert "done adam: 28 checks" in (tmp_path / "cases.log").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"env.log", "cases.log", "summary.txt"}


def test_every_log_and_file_together_are_eight():
    logs = {check_gpu.LOGS.get(name, name) for name in gpu_stages.STAGES}
    assert len(logs) + len(["summary.txt", "RESULTS.md"]) == 8
    assert set(check_gpu.LIMITS) == set(gpu_stages.STAGES)
    assert all(f"\n    {name} " in check_gpu.__doc__ for name in gpu_stages.STAGES)


def test_all_cases_groups_and_tests_are_run():
    assert set(gpu_stages.CASES) == set(gpu_cases.CASES) >= set(gpu_stages.SANITIZED)
    groups = gpu_probe.gpu_kernels.GROUPS | gpu_probe.gpu_rows.GROUPS
    assert set(gpu_stages.GROUPS) == {*groups, "pages"}
    take_cupy = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")
                 if "cupy" in arguments(path)}
    assert take_cupy == {*gpu_stages.TESTS, "check_gpu", "sanitizers"}


def arguments(path):
    """The names of all arguments of a file's functions."""
    return {node.arg for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.arg)}


def test_a_process_that_fails_or_takes_too_long_does_not_stop_the_rest(tmp_path, capsys):
    stage = check_gpu.Stage("cases", tmp_path, 60)
    python = partial(stage.run, command=[sys.executable, "-c", "print('FAIL so'); 1 / 0"])
    stage.at_once([partial(python, "wrong"),
                   partial(stage.run, "slow", ["sleep", "60"], 0.2),
                   partial(stage.run, "none", ["sh", "-c", "exit 5"], absent=5),
                   partial(stage.run, "good", ["echo", "12 checks"])], 4)
    assert {row[0]: (row[1], row[3]) for row in stage.rows} == {
        "good": ("ok", "12 checks"), "slow": ("too long", ""), "wrong": ("exit 1", "FAIL so"),
        "none": ("absent", "")}
    stage.limit = 1.0
    assert stage.run("late", ["echo"]) == ("", None) and stage.rows[-1][1] == "no time"
    stage.log.close()
    assert "ZeroDivisionError" in (tmp_path / "cases.log").read_text()


def test_a_stage_that_breaks_leaves_the_others_their_turn(tmp_path, monkeypatch, capsys):
    ran = []
    stages = {"env": lambda stage, args: 1 / 0,
              "cases": lambda stage, args: ran.append(stage.limit),
              "bench": lambda stage, args: args.table.extend(["Measured on a card.", "| a | b |"])}
    monkeypatch.setattr(check_gpu, "STAGES", stages)
    args = SimpleNamespace(stages=list(stages), dry_run=False, budget=100.0, out=tmp_path,
                           environment={}, table=[])
    done = check_gpu.run_stages(args)
    assert done[0].rows == [("env", "broken", 0.0, "ZeroDivisionError: division by zero")]
    assert ran == [pytest.approx(75, abs=1)]  # 20 of 100 seconds are the last stage's
    table = (tmp_path / "RESULTS.md").read_text()
    assert table.startswith("Measured on a card.\n\n    sh scripts/bench/check_gpu.sh")
    assert table.endswith(f"{gpu_table.HEAD}\n| a | b |\n")


def test_every_option_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        check_gpu.main()
    options = capsys.readouterr().out.partition("options:\n")[2].splitlines()
    named = [line for line in options if line.lstrip().startswith("--")]
    described = " ".join(line for line in options if not line.lstrip().startswith("--"))
    assert len(named) == 6 and "which stages to run" in described
    assert "folder for the logs" in " ".join(options)


def test_the_command_of_the_table_is_what_a_shell_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--only", "a b", "it's"])
    check_gpu.write_table(tmp_path, ["| a | b |"])
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if "check_gpu" in line]
    assert shlex.split(line)[2:] == ["--only", "a b", "it's"]


def test_rows_that_fail_or_come_late(tmp_path, monkeypatch, capsys):
    row = gpu_table.Row("a row", ((4e6, 0),), None)
    rows = [row._replace(title=name) for name in ("one", "two", "three", "four")]
    clock = iter([0.0, 0.0, 4.0, 4.0, 6.0, 6.0, 12.0, 12.0])  # two a row, and the first

    def measured(row, ceilings, rounds):
        if row.title == "two":
            raise RuntimeError("wrong | so")
        return gpu_table.line(row, ceilings, [1e-6] * rounds)

    monkeypatch.setattr(gpu_probe, "rows_of", lambda *_: [(r, gpu_table.H200) for r in rows])
    monkeypatch.setattr(gpu_probe, "measured_line", measured)
    monkeypatch.setattr(gpu_probe.time, "perf_counter", lambda: next(clock))
    gpu_probe.rows(tmp_path / "none", "any", 3, 11.0)
    table = gpu_stages.table_of(capsys.readouterr().out)
    assert [text.split(" | ")[0] for text in table] == ["| one", "| two", "| three", "| four"]
    assert "1.00 us (1.00 - 1.00)" in table[0] and "FAILED: RuntimeError: wrong / so" in table[1]
    assert "1.00 us" in table[2] and "no time left" in table[3]
    assert all(text.count("|") == 8 for text in table)
    assert gpu_stages.met("\n".join(table)) == "4 rows, 0 met, 0 missed, 1 FAILED, 1 late"


def test_rows_of_the_steps_that_ran(tmp_path, capsys):
    for name in "ours-22", "ours-4", "torch-4":
        (tmp_path / f"{name}.json").write_text("[1073741824, 0.02, 0.03, 0.04]")
    (tmp_path / "ceilings.json").write_text("[4e12, 8e14]")
    gpu_probe.step_rows(tmp_path / "ceilings.json", tmp_path)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 3 and all(text.count("|") == 8 for text in table)
    assert "30.00 ms (20.00 - 40.00)" in table[0] and "1.00 GiB" in table[1]
    assert "PyTorch: 30.00 ms" in table[2] and table[2].endswith("at least 1.0 x as fast: met |")


def test_no_step_takes_a_name_that_is_not_there():
    """The programs run only on a card; their names are those of the modules they use."""
    for name in ("our_model", "random_batch", "torch_qlora", "step_row", "step_lines", "LLAMA"):
        assert hasattr(gpu_step, name)
    assert all((check_gpu.ROOT / "kernels" / file).exists() for file, *_ in gpu_probe.KERNELS)


def test_our_step_as_it_is_profiled(cupy, monkeypatch, capsys):
    tiny = gpu_step.Config.llama(97, 16, layers=2, heads=4, width=64, hidden=320, kv_heads=2)
    monkeypatch.setattr(gpu_step, "BATCH", 2)
    peak, times = gpu_probe.our_steps(tiny)
    assert peak > 0 and len(times) == 7
    losses = [line.split()[1] for line in capsys.readouterr().out.splitlines()
              if line.startswith("loss")]
    assert len(losses) == 10
