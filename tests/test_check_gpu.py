"""bench/check_gpu.py without a GPU: a piece of its dry run, its clock, and what it collects."""

import ast
import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import check_gpu
import gpu_cases
import gpu_pages
import gpu_probe
import gpu_stages
import gpu_step
import gpu_table
import pytest

from minilm.optim import AdamW

ROOT = Path(__file__).resolve().parents[1]
TINY = gpu_step.Config.llama(97, 16, layers=2, heads=4, width=64, hidden=320, kv_heads=2)


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
        (tmp_path / f"plain-{name}.json").write_text("[1073741824, 0.02, 0.03, 0.04]")
    (tmp_path / "ceilings.json").write_text("[4e12, 8e14]")
    gpu_probe.step_rows(tmp_path / "ceilings.json", tmp_path)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 3 and all(text.count("|") == 8 for text in table)
    assert "30.00 ms (20.00 - 40.00)" in table[0] and "1.00 GiB" in table[1]
    assert f"{gpu_step.PEER}: 30.00 ms" in table[2]
    assert table[2].endswith("at least 1.0 x as fast: met |")


def test_no_step_takes_a_name_that_is_not_there():
    """The programs run only on a card; their names are those of the modules they use."""
    for name in ("our_model", "random_batch", "torch_qlora", "step_row", "step_lines", "LLAMA"):
        assert hasattr(gpu_step, name)
    assert all((check_gpu.ROOT / "kernels" / file).exists() for file, *_ in gpu_probe.KERNELS)


def test_rows_of_streaming(tmp_path, capsys):
    """22 layers: states on the card 30 ms and in pages 31 ms, checkpoints 40 ms beside 50 ms."""
    def rows():
        gpu_probe.streaming_rows(tmp_path / "none", tmp_path)
        return capsys.readouterr().out.splitlines()

    assert rows() == []
    for name, ms in (("plain-ours", 30), ("pages-32-ours", 31), ("pages-8-ours", 33),
                     ("checkpoint-ours", 40), ("checkpoint-torch", 50)):
        (tmp_path / f"{name}-22.json").write_text(json.dumps([1 << 30, ms / 1e3, ms / 1e3]))
    (tmp_path / "needs-plain.json").write_text("[[5.0, 4.0], 100]")
    for kind, losses in ("plain", [5.0]), ("pages-8", [5.0, 4.0]):
        (tmp_path / f"within-{kind}.json").write_text(json.dumps([1 << 30, losses]))
    table = rows()
    assert len(table) == 3 + 2 + 2 + 1 and all(text.count("|") == 8 for text in table)
    assert "a checkpoint a block | " in table[0] and "40.00 ms (40.00 - 40.00)" in table[0]
    assert f"{gpu_step.PEER}: 50.00 ms" in table[0] and "tokens a second" in table[1]
    for text, size, ms, outcome in (table[3], 32, 31, "met"), (table[5], 8, 33, "missed"):
        assert f"in pages of {size} MiB |" in text and f"| {ms}.00 ms" in text
        assert "states on the card: 30.00 ms" in text and text.endswith(f": {outcome} |")
    assert "out of memory in step 3 |" in table[7] and "AdamW: out of memory in step 2" in table[7]
    (tmp_path / "checkpoint-torch-22.json").unlink()
    assert "PyTorch" not in rows()[0]


def test_small_steps_in_a_pool_between_two_needs(cupy, tmp_path, monkeypatch, capsys):
    """What needs and within of gpu_pages do is tested in test_gpu_benchmark.py."""
    def needs(config, batch, optimizer):
        assert (config, batch) == (gpu_step.LLAMA, gpu_step.BATCH)
        return [5.0, 4.0], 700 if optimizer is AdamW else 501

    def within(config, batch, optimizer, limit):
        return [5.0] if optimizer is AdamW else [5.0, float(limit)]

    monkeypatch.setattr(gpu_pages, "needs", needs)
    monkeypatch.setattr(gpu_pages, "within", within)
    for job in "needs", "within":
        for kind in "plain", "pages-8":
            gpu_probe.main(job, kind, str(tmp_path))
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found == {"needs-plain": [[5.0, 4.0], 700], "needs-pages-8": [[5.0, 4.0], 501],
                     "within-plain": [600, [5.0]], "within-pages-8": [600, [5.0, 600.0]]}


def test_streaming_runs_its_kinds_and_only_if_it_is_named(tmp_path, monkeypatch, capsys):
    ran, given = [], SimpleNamespace(scratch=tmp_path, table=[])
    monkeypatch.setattr(check_gpu.Stage, "run", lambda stage, what, command, *_, **__: (
        ran.append(command[2:]), ("| a row |", 0))[1])
    stage = check_gpu.Stage("streaming", tmp_path, 60)
    gpu_stages.streaming(stage, given)
    stage.log.close()
    assert given.table == ["| a row |"] and (tmp_path / "step.log").exists()
    assert [c[-1] for c in ran if c[0] == "step"] == [
        "plain", "pages-32", "pages-8", "checkpoint", "checkpoint"]
    assert {c[-1] for c in ran if c[0] == "step"} == set(gpu_probe.KINDS)
    assert sorted(c[:2] for c in ran if c[0] in ("needs", "within")) == [
        [job, kind] for job in ("needs", "within") for kind in ("pages-8", "plain")]
    stages = []
    monkeypatch.setattr(check_gpu, "run_stages", lambda args: stages.append(args.stages) or [])
    for words in [], ["--stages", "streaming"]:
        monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--dry-run", "--out", str(tmp_path),
                                          *words])
        with pytest.raises(SystemExit):
            check_gpu.main()
    assert stages == [[s for s in gpu_stages.STAGES if s != "streaming"], ["streaming"]]


@pytest.mark.parametrize("kind", ["checkpoint", "pages-8"])
def test_our_step_as_it_is_profiled(cupy, monkeypatch, capsys, kind):
    monkeypatch.setattr(gpu_step, "BATCH", 2)
    made = []
    monkeypatch.setattr(gpu_step, "our_model", lambda *args, whole=gpu_step.our_model: (
        made.append(whole(*args)), made[-1])[1])
    peak, times = gpu_probe.our_steps(TINY, *gpu_probe.KINDS[kind])
    assert peak > 0 and len(times) == 7 and made[0].checkpoint_every == (kind == "checkpoint")
    losses = [line.split()[1] for line in capsys.readouterr().out.splitlines()
              if line.startswith("loss")]
    assert len(losses) == 10
