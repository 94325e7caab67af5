"""The lectures line by line: each is shown by claims and commands that are there, as the page says.

The page that is kept in scripts/lectures is what report.py makes of the results that are kept.
"""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import report
from test_report import text

from minilm.experiment import Experiment, judged
from minilm.files import FormatError
from minilm.lectures import chosen, parts, read_lectures
from minilm.measure.verdict import FAILS, Verdict
from minilm.results import Result
from minilm.wholerun import read_jobs

SCRIPTS = Path(__file__).parents[1] / "scripts"
FOLDER = SCRIPTS / "experiments"
LECTURES = read_lectures(SCRIPTS / "lectures")
LINES = [line for lecture in LECTURES for line in lecture.lines]
JOBS = read_jobs(SCRIPTS / "lectures")
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.py"))
KEPT = sorted(path.stem for path in FOLDER.glob("*.json"))


def experiment_of(name):
    """By its file: another program may have the same name."""
    spec = importlib.util.spec_from_file_location(f"{name}_here", FOLDER / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return next(x for x in vars(module).values() if isinstance(x, Experiment))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_claim_judges_a_line_and_every_pattern_fits_one(name):
    texts = list(experiment_of(name).claims)
    patterns = [p for line in LINES for p in line.claims.get(name, ())]
    assert [p for p in patterns if not chosen([p], texts)] == []
    assert chosen(patterns, texts) == texts


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_result_is_judged_as_its_file_judges(name):
    """If it is not: replace(result, claims=judged(EXPERIMENT, result)).save(path)."""
    result = Result.load(FOLDER / f"{name}.json")
    assert result.claims == judged(experiment_of(name), result)


@pytest.mark.parametrize("name", KEPT)
def test_what_does_not_hold_has_a_reason(name):
    failed = [c for c in Result.load(FOLDER / f"{name}.json").claims if c["verdict"] == FAILS]
    assert [c["claim"] for c in failed if not c.get("likely")] == []


def test_every_experiment_is_run():
    assert sorted(job.name for job in JOBS.values() if job.experiment) == EXPERIMENTS


def test_numbers_rise_and_belong_to_their_lecture():
    for i, lecture in enumerate(LECTURES):
        assert lecture.number == f"{i:03}"
        assert [line.id for line in lecture.lines] == [
            f"{i}.{n}" for n in range(1, len(lecture.lines) + 1)]
    assert all(re.fullmatch(r"(\d+:)?[\d, -]+(; \d{3}:[\d, -]+)*", line.at) for line in LINES)
    shown = [line for line in LINES if line.wrong]
    assert all(line.claims or line.commands for line in shown)  # it can be looked up


@pytest.mark.parametrize("job", [job for job in JOBS.values() if not job.experiment],
                         ids=lambda job: job.name)
def test_a_command_is_a_program_that_has_these_options(job):
    for words in filter(None, map(shlex.split, [job.run, job.quick])):
        if words[0] == "-m":
            assert (SCRIPTS.parent / words[-1]).exists()
            continue
        program = SCRIPTS.parent / words[0]
        source = program.read_text(encoding="utf-8") + "".join(
            (SCRIPTS.parent / "minilm" / f"{room}.py").read_text(encoding="utf-8")
            for room in ("loop", "adapting"))
        for word in words[1:]:
            if word.startswith("--"):
                assert f" {word[2:].replace('-', '_')}:" in source, word


def test_the_parts_of_outputs_are_there():
    for path in (SCRIPTS / "lectures").glob("*.txt"):
        begins = [b for line in LINES for b in line.commands.get(path.stem, ())]
        for begin in begins:
            assert parts(path.read_text(encoding="utf-8"), (begin,)), (path.stem, begin)


@pytest.mark.parametrize("old, new, complaint", [
    ('id = "0.1"', 'id = 1', r"lines\[0\]: id is 1, expected str"),
    ('says = "a"', "", r"lines\[0\]: \['says'\] missing"),
    ('claims.x = ["c"]', "", r"the line 0.1 needs claims, commands or not_small"),
    ('claims.x = ["c"]', 'claims.x = "c"', r"lines\[0\]: claims is"),
    ('claims.x', 'claim.x', r"\['claim'\] unknown"),
    ("[[lines]]", "[lines]", "lines is"),
    ("title", "titel", r"\['title'\] missing"),
    ("[[lines]]", "[[lines", r"000\.toml: "),
])
def test_a_wrong_lecture_is_refused(tmp_path, old, new, complaint):
    good = 'title = "t"\n[[lines]]\nid = "0.1"\nat = "1"\nsays = "a"\nclaims.x = ["c"]\n'
    (tmp_path / "000.toml").write_text(good)
    assert read_lectures(tmp_path)[0].lines[0].claims == {"x": ["c"]}
    (tmp_path / "000.toml").write_text(good.replace(old, new, 1))
    with pytest.raises(FormatError, match=complaint):
        read_lectures(tmp_path)


THREE = ["LoRA is within 4 points of full fine-tuning", "LoRA with 9k is better than BitFit",
         "LoRA with 9k is better than PrefixEmbed"]


@pytest.fixture
def made(tmp_path):
    """A page of a result of which a line has three claims, and of the outputs of one command."""
    claims = tuple({"claim": claim, **vars(Verdict(verdict, "x", 0.0, None, 1, 1.0))}
                   for claim, verdict in zip(THREE, ["holds", "does not hold", "cannot be told"]))
    Result("adaptation_methods", "Which?", "python a.py", False, {}, {"m": 0}, "", "", "",
           ({"arm": "a", "seed": 0, "m": 1.0},), claims).save(tmp_path / "a.json")
    (tmp_path / "lectures.txt").write_text("GPT-4  1\n   x  2\n\n16 bits & <more>\n")
    return report.page([tmp_path / "a.json"], tmp_path)


def line_of(made, id):
    return text(re.search(rf'<li id="line-{re.escape(id)}">.*?(?=<li id="line|</section>)',
                          made, re.DOTALL)[0])


def test_a_line_has_its_verdicts(made):
    seen = line_of(made, "0.8")
    for mark, claim in zip("✓✗?", THREE):
        assert f"{mark} {claim}" in seen
    assert "✓ 1 ✗ 1 ? 1 scripts/experiments/adaptation_methods.py" in seen
    assert "Not measured yet: scripts/experiments/table_to_text.py" in seen
    assert '<a href="#adaptation_methods">' in made and '<section id="adaptation_methods">' in made
    assert "000:157-164" in seen and "Not among the claims" in line_of(made, "4.42")


def test_a_line_has_the_part_of_the_output_that_shows_it(made):
    assert line_of(made, "1.9").endswith("scripts/plan_memory.py --lectures GPT-4 1 x 2")
    assert "16 bits & <more>" in line_of(made, "2.15") and "GPT-4" not in line_of(made, "2.15")
    assert line_of(made, "0.2").endswith("scripts/distill.py")
    assert "Cannot be shown small: These models are of text." in line_of(made, "4.47")


def test_the_summary_counts(made):
    seen = text(made)
    assert "✓ 1 claims hold ✗ 1 do not hold ? 1 cannot be told" in seen
    assert f"1 of {len(EXPERIMENTS)} experiments are measured. Of the {len(LINES)} lines" in seen
    judged = [line for line in LINES if chosen(line.claims.get("adaptation_methods", ()), THREE)]
    printed = [line for line in LINES if line.commands and line not in judged]
    small = [line for line in LINES if line.not_small]
    waiting = len(LINES) - len(judged) - len(printed) - len(small)
    assert (f"{len(judged)} have a verdict here, {len(printed)} are shown by what a command "
            f"prints, {waiting} wait for an experiment, and {len(small)} cannot be shown small"
            ) in seen
    wrong = [line for line in LINES if line.wrong]
    assert len(wrong) >= 10
    assert len(re.findall(r'<span class="wrong">', made)) == len(wrong)
    for line in wrong:
        assert seen.count(line.wrong.replace(" -", " −")) == 2  # in front, and at its line
    hours = sum(job.minutes for job in JOBS.values()) / 60
    assert f"It takes about {hours:.1f} hours of one core" in seen


def test_links_lead_somewhere(made):
    ids = re.findall(r'\bid="([^"]+)"', made)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)', made)) <= set(ids)


def test_the_kept_page_is_that_of_the_kept_results():
    """If it is not: python scripts/report.py --keep."""
    made = report.page(sorted((SCRIPTS / "experiments").glob("*.json")), SCRIPTS / "lectures")
    kept = (SCRIPTS / "lectures" / "index.html").read_text(encoding="utf-8")
    assert kept == made
    assert len(kept.encode()) < 3_000_000


RUN = """[commands.a]
run = "scripts/a.py {a}"
quick = "scripts/a.py quick"
minutes = 120
[commands.b]
run = "scripts/b.py"
minutes = 60
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository with one lecture and two commands; b stops as if by Ctrl-C until it may run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "FOLDER", tmp_path / "scripts")
    for folder in ("scripts/lectures", "scripts/experiments"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "scripts/lectures/run.toml").write_text(RUN)
    (tmp_path / "scripts/lectures/000.toml").write_text(
        'title = "t"\n[[lines]]\nid = "0.1"\nat = "1"\nsays = "a"\ncommands.a = ["part"]\n'
        '[[lines]]\nid = "0.2"\nat = "2"\nsays = "b"\ncommands.b = []\n')
    (tmp_path / "scripts/a.py").write_text('import sys; print("part", *sys.argv[1:])')
    (tmp_path / "scripts/b.py").write_text('import os; print(open("may").read())')
    for template in SCRIPTS.glob("*.jinja"):
        (tmp_path / "scripts" / template.name).write_text(template.read_text())
    return tmp_path


def test_a_whole_run_its_failure_and_how_it_goes_on(house, capsys):
    with pytest.raises(RuntimeError, match="these have failed, the page is without them: b"):
        report.main(run=True, out=Path("page.html"))
    said = capsys.readouterr().out
    assert ("runs/lectures: 2 of 2 to run, about 3.0 hours of one core, 1.5 hours on two with "
            "--jobs 2\n") in said
    assert "b: FAILED, see runs/lectures/b.log" in said
    assert "part runs/lectures/a" in text(Path("page.html").read_text())
    (house / "may").write_text("b may run")
    report.main(run=True, keep=True)
    said = capsys.readouterr().out
    assert ("runs/lectures: 1 of 2 to run, about 60 min of one core, 30 min on two with "
            "--jobs 2\nb: ") in said
    kept = house / "scripts/lectures"
    assert (kept / "b.txt").read_text() == "b may run\n"
    assert "b may run" in text((kept / "index.html").read_text())
    report.main(run=True, only=("a",))
    assert "0 of 1 to run\n" in capsys.readouterr().out


def test_a_quick_run_begins_anew_and_keeps_nothing(house, capsys):
    for _ in range(2):
        report.main(run=True, quick=True, out=Path("page.html"))
        assert "runs/lectures-quick: 1 of 1 to run\na: " in capsys.readouterr().out
    assert "part quick" in text(Path("page.html").read_text())
    assert list((house / "scripts/lectures").glob("*.txt")) == []


def test_ctrl_c_says_how_to_go_on(house, capsys, monkeypatch):
    def stopped(*args, **more): raise KeyboardInterrupt
    monkeypatch.setattr(report.WholeRun, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        report.main(run=True, keep=True, only=("b",), jobs=2)
    assert re.search(r"go on with: .*report\.py --run --keep --only b --jobs 2\n$",
                     capsys.readouterr().out)


@pytest.mark.parametrize("settings, complaint", [
    ({"quick": True}, "quick is given, but they decide how to run: give --run, too"),
    ({"jobs": 2}, "jobs is given"),
    ({"keep": True, "out": Path("a")}, "out is given, but what is kept has its place"),
    ({"run": True, "quick": True, "keep": True}, "quick is given, but what is kept"),
    ({"run": True, "results": (Path("a"),)}, "run is given, but the page is of the results"),
    ({"run": True, "jobs": 0}, "jobs must be at least 1, got 0"),
])
def test_options_that_decide_nothing_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        report.main(**settings, given=frozenset(settings))
