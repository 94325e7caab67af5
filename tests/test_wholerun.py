"""The whole run: in which order, what goes on after a stop, what fails, what is kept."""

import json
import os
import shlex
import signal
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.files import FormatError
from minilm.lectures import Lecture, Line
from minilm.measure.verdict import verdict
from minilm.results import Result
from minilm.wholerun import Job, WholeRun, in_order, lasted, quickly, read_jobs

NAMES = [f"job{i}" for i in range(6)]
CLAIM = {"claim": "up", **vars(verdict([1.0, 1.1], "x", at_least=0))}


def command(name, needs=(), alone=False, minutes=1.0):
    words = " ".join(["work.py", name, *(f"{{{other}}}" for other in needs)])
    return Job(name, False, words, "", minutes, alone)


def line(*commands, claims=(), id="0.1"):
    return Line(id, "1", "says", dict.fromkeys(claims, ("*",)), dict.fromkeys(commands, ()),
                "", "", "")


@given(st.data())
def test_what_is_needed_comes_first_and_everything_once(data):
    needs = {name: data.draw(st.sets(st.sampled_from(NAMES[:i]))) if i else set()
             for i, name in enumerate(NAMES)}
    jobs = {name: command(name, sorted(needs[name])) for name in data.draw(st.permutations(NAMES))}
    first = data.draw(st.lists(st.sampled_from(NAMES), min_size=1))
    found = [job.name for job in in_order(jobs, [Lecture("000", "", (line(*first),))])]
    assert sorted(found) == NAMES
    for i, name in enumerate(found):
        assert needs[name] <= {*found[:i]}
    only = [job.name for job in in_order(jobs, [], first[:1])]
    wanted, more = set(), {first[0]}
    while more - wanted:
        wanted |= more
        more = set().union(*(needs[name] for name in wanted))
    assert {*only} == wanted and len(only) == len(wanted)


def test_the_order_is_that_of_the_lines():
    jobs = {name: command(name) for name in "abcd"} | {"e": Job("e", True, "x", "", 1)}
    lectures = [Lecture("000", "", (line("c", claims=["e"]), line("b", "c")))]
    assert [job.name for job in in_order(jobs, lectures)] == ["e", "c", "b", "a", "d"]
    with pytest.raises(FormatError, match=r"0\.1: run\.toml has no experiment 'a'"):
        in_order(jobs, [Lecture("000", "", (line(claims=["a"]),))])
    with pytest.raises(FormatError, match="has no command 'z'"):
        in_order(jobs, [Lecture("000", "", (line("z"),))])
    with pytest.raises(ValueError, match="there is no 'z' to run, only a, b, c, d, e"):
        in_order(jobs, lectures, ["z"])


RUN = """[bases]
two = "--model {a}/model"
[commands.a]
run = "scripts/a.py --out {a}"
quick = "scripts/a.py --steps 1"
minutes = 3
[experiments]
x = {base = "two", seeds = [0, 2], minutes = 5, alone = true}
y = {minutes = 1}
"""


def test_jobs_are_read(tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    a, x, y = read_jobs(tmp_path).values()
    assert (a.run, a.quick, a.needs) == ("scripts/a.py --out {a}", "scripts/a.py --steps 1", [])
    assert x.run == "scripts/experiments/x.py --seeds 0 2 --model {a}/model"
    assert x.needs == ["a"] and x.alone and (x.minutes, y.minutes, y.alone) == (5, 1, False)
    assert y.run == "scripts/experiments/y.py"
    quick = {job.name: job for job in quickly([a, x, y])}
    assert quick["x"].run == "scripts/experiments/x.py --quick --seeds 0"
    assert quick["x"].needs == [] and not quick["x"].alone and len(quick) == 3
    assert quickly([command("b")]) == []
    (tmp_path / "times.json").write_text('{"x": 7.5}')
    assert [job.minutes for job in read_jobs(tmp_path).values()] == [3, 7.5, 1]
    for wrong in ('["x"]', '{"x": "7"}'):
        (tmp_path / "times.json").write_text(wrong)
        with pytest.raises(FormatError, match=r"times\.json: is .* expected minutes by job"):
            read_jobs(tmp_path)


@pytest.mark.parametrize("old, new, complaint", [
    ("minutes = 3", 'minutes = "3"', "commands.a: minutes is '3', expected float"),
    ("minutes = 3", "", r"commands.a: \['minutes'\] missing"),
    ('base = "two"', 'base = "one"', "experiments.x: there is no base 'one'"),
    ("{a}/model", "{b}/model", "x: there is no command 'b'"),
    ("seeds = [0, 2]", "seeds = 0", "experiments.x: seeds is 0"),
    ("[bases]", "[bases", "run.toml: "),
])
def test_a_wrong_run_toml_is_refused(tmp_path, old, new, complaint):
    (tmp_path / "run.toml").write_text(RUN.replace(old, new, 1))
    with pytest.raises(FormatError, match=complaint):
        read_jobs(tmp_path)


WORK = """
import sys, time, pathlib, os
name = sys.argv[1]
log = open("order", "a")
print("+" + name, file=log, flush=True)
if name.startswith("long"):
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("!" + name, file=log, flush=True)
        raise
if name.startswith("bad"):
    sys.exit("wrong")
waits = {"slow": "-swift", "swift": "+slow"}.get(name, "")
while waits not in open("order").read():
    time.sleep(0.02)
time.sleep(0.5 if name in ("slow", "late") else 0.05)
print(name, *sys.argv[2:], os.getcwd())
print("-" + name, file=log, flush=True)
"""


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    return WholeRun(tmp_path / "runs" / "all", tmp_path)


def order(whole):
    return (whole.root / "order").read_text().split()


def test_one_after_another_then_nothing_is_left(whole):
    jobs, told = [command("a"), command("b", ["a"], minutes=30)], []
    assert whole.run(jobs, tell=told.append) == []
    assert order(whole) == ["+a", "-a", "+b", "-b"]
    assert whole.output(jobs[1]).read_text() == f"b runs/all/a {whole.root}\n"
    assert told[0].endswith("; 1 left, about 30 min of one core") and told[1].startswith("b: ")
    assert set(whole.times()) == {"a", "b"}
    assert whole.run(jobs, tell=told.append) == [] and len(told) == 2
    (whole.folder / "a.txt").unlink()  # as if it had been killed
    (whole.folder / "a" / "half").touch()
    assert whole.times()["a"] > 0
    (whole.folder / "times.json").write_text('{"a": 5}')
    whole.run(jobs, tell=told.append)
    assert order(whole)[4:] == ["+a", "-a"] and not (whole.folder / "a" / "half").exists()
    assert 5 < whole.times()["a"] < 6


def test_two_at_once_but_who_is_alone(whole):
    jobs = [command("slow"), command("swift"), command("c", alone=True), command("late"),
            command("e", ["late"])]
    assert whole.run(jobs, 2, tell=lambda line: None) == []
    said = order(whole)  # slow ends after swift, which ends after slow has begun
    assert {*said[:2]} == {"+slow", "+swift"}
    assert said[2:] == ["-swift", "-slow", "+c", "-c", "+late", "-late", "+e", "-e"]


def test_what_fails_stops_only_what_needs_it(whole):
    jobs = [command("bad"), command("b", ["bad"]), command("c", ["b"]), command("d")]
    told = []
    assert whole.run(jobs, tell=told.append) == ["bad", "b", "c"]
    assert told[0].startswith("bad: FAILED, see runs/all/bad.log")
    assert (whole.folder / "bad.log").read_text() == "wrong\n"
    assert order(whole) == ["+bad", "+d", "-d"] and whole.done(jobs[3]) and not whole.done(jobs[0])


def test_ctrl_c_stops_what_runs(whole):
    jobs = [command("long1"), command("long2"), command("c")]

    def press():
        while not (whole.root / "order").exists() or len(order(whole)) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    try:
        threading.Thread(target=press).start()
        with pytest.raises(KeyboardInterrupt):
            whole.run(jobs, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(order(whole)) == ["!long1", "!long2", "+long1", "+long2"]
    assert not any(map(whole.done, jobs))


def result(claims=(CLAIM,)):
    return Result("x", "Is it up?", "python x.py", False, {}, {"m": 0}, "", "", "",
                  ({"arm": "a", "seed": 0, "m": 1.0},), tuple(claims))


def test_an_experiment_goes_on_until_it_has_verdicts(whole):
    job = Job("x", True, "scripts/experiments/x.py --seeds 0 1", "", 1)
    plain = ["scripts/experiments/x.py", "--seeds", "0", "1"]
    assert whole.words(job) == [*plain, "--out", "runs/all"] and not whole.done(job)
    (whole.folder / "x-1").mkdir(parents=True)
    result(()).save(whole.result(job))
    assert whole.words(job) == [*plain, "--resume", "runs/all/x-1"] and not whole.done(job)
    result().save(whole.result(job))
    assert whole.done(job) and whole.run([job]) == []


def test_what_is_done_is_kept(whole, tmp_path):
    jobs = [command("a"), Job("x", True, "x.py", "", 1), Job("y", True, "y.py", "", 1)]
    whole.run(jobs[:1], tell=lambda line: None)
    for job, claims in zip(jobs[1:], ([CLAIM], [])):
        whole.result(job).parent.mkdir()
        result(claims).save(whole.result(job))
    whole.result(jobs[1]).with_suffix(".svg").write_text("<svg/>")
    experiments, lectures = tmp_path / "experiments", tmp_path / "lectures"
    for folder in (experiments, lectures):
        folder.mkdir()
    (lectures / "times.json").write_text('{"old": 3, "a": 99}')
    whole.keep(jobs, experiments, lectures)
    assert sorted(p.name for p in experiments.iterdir()) == ["x.json", "x.svg"]
    assert Result.load(experiments / "x.json") == result()
    assert sorted(p.name for p in lectures.iterdir()) == ["a.txt", "times.json"]
    times = json.loads((lectures / "times.json").read_text())
    assert times["old"] == 3 and times["a"] == whole.times()["a"] < 1


def test_the_python_that_runs_is_this_one(whole):
    (whole.root / "which.py").write_text("import sys; print(sys.executable)")
    job = Job("w", False, shlex.join(["which.py"]), "", 1)
    whole.run([job], tell=lambda line: None)
    assert whole.output(job).read_text().strip() == sys.executable


def test_what_a_model_writes_is_kept_as_text(whole):
    (whole.root / "say.py").write_text(r"import sys; sys.stdout.buffer.write(b'\a\xff\tb\n')")
    job = Job("s", False, "say.py", "", 1)
    whole.run([job], tell=lambda line: None)
    assert whole.output(job).read_text() == "\ufffd\ufffd      b\n"


def test_times_are_readable():
    assert [lasted(x) for x in (3.4, 89, 91, 5399, 5401)] == [
        "3 s", "89 s", "2 min", "90 min", "1.5 hours"]
