"""Runs SQL that nobody has checked, in a process of its own.

A short query can ask for anything: a few hundred characters of nested common table expressions make
a statement of gigabytes before its first step. So a query runs where it can only fail. SQLite's
heap is limited there, and so are a query's length and steps; it may read one table and call a few
functions. The process is ended when its time is over, and only words come back from it.
"""

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing

FUNCTIONS = {"avg", "count", "max", "min", "sum"}  # that a query may call
CHARACTERS, STEPS = 1000, 10_000  # of a query, at most; a step is one of SQLite's machine
HEAP = 16 << 20  # bytes for all of SQLite
SECONDS = 20  # for starting the process and both queries; a right query takes milliseconds


def same_rows(table: str, rows, wanted: str, query: str) -> bool | None:
    """Does the query find what `wanted` finds in a table? None if `wanted` may not run or fails.

    table: such as "cities (name, country)", which has these rows. The order of what is found counts
    if `wanted` has ORDER BY. A query must be a single SELECT without another inside. One that is
    not, that fails, or that needs more than it may have, is wrong.
    """
    asked = json.dumps([table, [*map(list, rows)], wanted, query]).encode()
    try:
        # In a session of its own, Ctrl-C does not reach it: it would make an answer wrong.
        said = subprocess.run([sys.executable, "-I", "-S", __file__], input=asked, timeout=SECONDS,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              start_new_session=True).stdout
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout or b""
    words = said.decode().split()
    return "same" in words if "ran" in words else None


def main():
    """The process: read what is asked, say "ran" after `wanted`, then "same" or "other"."""
    table, rows, wanted, query = json.load(sys.stdin)
    expected = find(table, rows, wanted)
    if expected is None:
        return
    print("ran", flush=True)
    found = find(table, rows, query)
    if found is not None and "ORDER BY" not in wanted.upper():
        found, expected = Counter(found), Counter(expected)
    print("same" if found == expected else "other")


def find(table: str, rows, query: str) -> list[tuple] | None:
    """The rows that a query finds; None if it may not run, fails or needs too much."""
    if query.upper().count("SELECT") != 1:
        return None
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute(f"PRAGMA hard_heap_limit = {HEAP}")  # of the whole process
        database.execute(f"CREATE TABLE {table}")
        places = ", ".join("?" * len(rows[0]))
        database.executemany(f"INSERT INTO {table.split()[0]} VALUES ({places})", rows)
        database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, CHARACTERS)
        database.set_authorizer(_allow)
        database.set_progress_handler(lambda: True, STEPS)
        try:
            return database.execute(query).fetchall()
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError):
            return None


def _allow(action, _, function, *place):
    """Allow reading and calls of FUNCTIONS; nothing that writes, opens a file or loads code."""
    reads = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
    calls = action == sqlite3.SQLITE_FUNCTION and function in FUNCTIONS
    return sqlite3.SQLITE_OK if reads or calls else sqlite3.SQLITE_DENY


if __name__ == "__main__":
    main()
