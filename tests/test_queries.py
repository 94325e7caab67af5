"""Queries that are scored by running them: which answers are right, and that whatever is asked ends
at once, takes little memory and changes nothing.

Each hostile query stands for a family: what SQLite expands before the first step, what makes large
values, what never ends, what is large, what nests, and what reaches out of the table.
"""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.data import Record, queries, score
from minilm.data.tasks import CITIES

ROOT = Path(__file__).resolve().parents[1]
TABLE = "cities (name, country, population)"
NAMES = "SELECT name FROM cities WHERE country = 'France'"
SORTED = "SELECT name FROM cities WHERE country = 'France' order by population"
MOST = "SELECT MAX(population) FROM cities"


@pytest.mark.parametrize(
    "output, answer, right",
    [
        (NAMES, "select NAME from Cities where 'France' = country;", True),
        (NAMES, NAMES + " ORDER BY name", True),
        (NAMES, "SELECT name FROM cities WHERE population IN (2100000, 900000, 500000) -- ", True),
        (NAMES, "SELECT name, country FROM cities WHERE country = 'France'", False),
        (NAMES, NAMES + " LIMIT 2", False),
        (NAMES, NAMES.replace("WHERE", "JOIN (VALUES (1), (2)) WHERE"), False),  # each row twice
        (NAMES, NAMES.replace("France", "Italy"), False),
        (SORTED, SORTED, True),
        (SORTED, SORTED + " DESC", False),
        (SORTED, NAMES + " ORDER BY name DESC", False),
        (MOST, "SELECT population FROM cities ORDER BY population DESC LIMIT 1", True),
        (MOST, "SELECT 3700000.0", True),
        (MOST, "SELECT '3700000'", False),
    ],
)
def test_a_query_is_right_where_it_finds_the_same(output, answer, right):
    assert score(Record("SQL", "q", output, task="sql"), answer) is right


MANY = ", ".join(f"cities c{i}" for i in range(6))


@pytest.mark.parametrize(
    "output, answer",  # the answers find what the outputs find, if they may run
    [
        (NAMES, NAMES + "; SELECT 1"),
        (NAMES, NAMES + "; DROP TABLE cities"),
        (NAMES, "DELETE FROM cities WHERE country = 'France' RETURNING name"),
        (NAMES, "UPDATE cities SET name = name WHERE country = 'France' RETURNING name"),
        (NAMES, "INSERT INTO cities " + NAMES.replace("name", "name, 1, 2") + " RETURNING name"),
        (NAMES, NAMES.replace("name", "printf('%s', name)")),
        (NAMES, NAMES.replace("country = ", "country LIKE ")),
        (NAMES, f"SELECT * FROM ({NAMES})"),
        (NAMES, f"WITH n AS ({NAMES}) SELECT * FROM n"),
        (NAMES, NAMES + " " * 1000),
        (MOST, f"SELECT MAX(c0.population) FROM {MANY}"),
    ],
)
def test_a_query_that_may_not_run_is_wrong(output, answer):
    assert score(Record("SQL", "q", output, task="sql"), answer) is False


def tables(width, depth):
    """Nested common tables, each read `width` times by the next: no SELECT but the last is said."""
    names, query = "abcdefghijklmnopqrstuvwxyz", "WITH a(x) AS (VALUES (1))"
    for before, name in pairwise(names[:depth]):
        query += f",{name}(x)AS(VALUES({'+'.join([f'1 IN {before}'] * width)}))"
    return f"{query}SELECT 1 IN {names[depth - 1]}"


HOSTILE = {
    "nothing": ["", " ", ";", "-- SELECT", "no query", "SELECT", "SELECT nothing FROM cities"],
    "odd characters": ["SELECT 1\0", "SELECT '\ud800'", "SELECT CAST(x'ff' AS TEXT)"],
    "expanded first": [tables(4, 10), tables(4, 12), tables(9, 8), tables(2, 23), tables(1, 24),
                       "SELECT x+x+x+x AS x FROM (" * 10 + "SELECT population AS x FROM cities"
                       + ")" * 10,
                       "WITH a AS (VALUES (1, 2, 3, 4, 5, 6, 7)) SELECT " + ", ".join(["*"] * 60)
                       + " FROM " + ", ".join(f"a a{i}" for i in range(30))],
    "large values": ["SELECT zeroblob(1000000000)", "SELECT randomblob(1000000000)",
                     "SELECT printf('%.*c', 1000000000, 'x')", "SELECT hex(zeroblob(400000000))",
                     "SELECT replace(replace('aaaa', 'a', 'aaaaaaaa'), 'a', 'aaaaaaaaa')",
                     "SELECT group_concat(name) FROM " + MANY, "SELECT quote(zeroblob(500000000))",
                     "SELECT sum(population << 40) FROM cities"],
    "never ends": ["WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n) "
                   "SELECT * FROM n",
                   "SELECT COUNT(*) FROM " + MANY + ", "
                   + MANY.replace("c", "d").replace("dities", "cities"),
                   "SELECT * FROM " + ", ".join(f"cities c{i}" for i in range(60)),
                   "SELECT 1 FROM " + MANY + " GROUP BY c0.name, c1.name ORDER BY c2.name",
                   "SELECT DISTINCT * FROM " + MANY,
                   "SELECT sum(population) OVER (ORDER BY name) FROM cities JOIN " + MANY],
    "patterns": ["SELECT name LIKE '" + "%a" * 400 + "' FROM cities",
                 "SELECT '" + "a" * 400 + "' GLOB '" + "*a" * 200 + "b'"],
    "large": ["(" * 10**6, "SELECT " + "1," * 490 + "1", "SELECT 1 IN (" + "1," * 480 + "1)",
              "SELECT 1" + " UNION ALL VALUES (1)" * 45, "SELECT '" + "x" * 10**6 + "'"],
    "nests": ["SELECT " + "(" * 900, "SELECT " + "-" * 900, "SELECT " + "NOT " * 240 + "1",
              "SELECT " + "(" * 480 + "1" + ")" * 480, "SELECT " + "CASE WHEN " * 95 + "1",
              "SELECT 1 WHERE " + "1 BETWEEN " * 60 + "1" + " AND 1" * 60],
    "reaches out": ["SELECT load_extension('SELECT')", "PRAGMA user_version", "VACUUM", "BEGIN",
                    "ATTACH 'SELECT' AS a", "VACUUM INTO 'SELECT'",
                    "SELECT * FROM pragma_database_list", "SELECT writefile('SELECT', 'x')",
                    "SELECT readfile('/etc/passwd')", "SELECT edit('x')",
                    "PRAGMA hard_heap_limit = 0 -- SELECT",
                    "CREATE TABLE t AS SELECT 1", "CREATE VIRTUAL TABLE t USING fts5(SELECT)"],
}


@pytest.mark.parametrize("kind, answer",
                         [(kind, query) for kind, family in HOSTILE.items() for query in family])
def test_hostile_answers_are_wrong_at_once(kind, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert score(Record("SQL", "q", MOST, task="sql"), answer) is False
    assert time.perf_counter() - start < 2  # of which the process takes a tenth to start
    assert not list(tmp_path.iterdir())


def test_hostile_queries_take_little_memory():
    """The most that any of the processes ever had, and that of the one that asks.

    A process counts as its own what its parent had when it was made, so it is made by a small one.
    """
    program = ("import json, resource, sys\n"
               "from minilm.data.queries import same_rows\n"
               f"for query in json.load(sys.stdin): same_rows({TABLE!r}, {CITIES!r}, query, '')\n"
               "for who in resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF:\n"
               "    print(resource.getrusage(who).ru_maxrss >> 10)")
    asked = json.dumps([query for family in HOSTILE.values() for query in family[:3]])
    small = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    words = [sys.executable, "-I", "-S", "-c", small, sys.executable, "-c", program]
    done = subprocess.run(words, input=asked, text=True, check=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    most, own = map(int, done.stdout.split())
    assert most < 128 and own < 256  # MiB


def test_an_output_is_bounded_too():
    for output in (tables(4, 12), "SELECT a FROM b", "SELECT COUNT(*) FROM " + MANY, "("):
        with pytest.raises(ValueError, match="must be a query on cities, got "):
            score(Record("SQL", "q", output, task="sql"), "SELECT 1")


def test_a_process_that_takes_long_is_ended(monkeypatch):
    """Whatever keeps it: here, that it had no time at all."""
    monkeypatch.setattr(queries, "SECONDS", 0)
    assert queries.same_rows(TABLE, CITIES, MOST, MOST) is None


def test_a_process_that_dies_after_the_output_is_a_wrong_answer(monkeypatch, tmp_path):
    program = tmp_path / "dies.py"
    program.write_text("import os\nprint('ran', flush=True)\nos.abort()\n")
    monkeypatch.setattr(queries, "__file__", str(program))
    assert queries.same_rows(TABLE, CITIES, MOST, MOST) is False


def test_ctrl_c_while_a_query_runs_does_not_make_it_wrong(tmp_path):
    """A terminal sends it to every process of the group; the first one only asks to stop."""
    program = ("import os, signal, subprocess\n"
               "from minilm.data import queries\n"
               "begin = subprocess.Popen.__init__\n"
               "def init(*words, **settings):\n"
               "    begin(*words, **settings)\n"
               "    os.killpg(0, signal.SIGINT)\n"
               "subprocess.Popen.__init__ = init\n"
               "signal.signal(signal.SIGINT, lambda *_: print('heard'))\n"
               f"print(queries.same_rows({TABLE!r}, {CITIES!r}, {MOST!r}, {MOST!r}))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    assert (done.stdout.split(), done.stderr) == (["heard", "True"], "")


SQL = "SELECT FROM WHERE ORDER BY GROUP COUNT(*) name cities population * , ( ) = > 'x' 1 ; -- NULL"


@given(st.text() | st.lists(st.sampled_from(SQL.split()), max_size=12).map(" ".join))
def test_no_query_raises(query):
    assert type(queries.find(TABLE, CITIES, query)) in (list, type(None))


def test_saying_nothing_is_not_finding_nothing():
    nothing = Record("SQL", "q", "SELECT name FROM cities WHERE country = 'Spain'", task="sql")
    answers = ["", ";", "-- none", "SELECT name FROM cities WHERE name = 'Madrid'"]
    assert [score(nothing, answer) for answer in answers] == [False, False, False, True]
