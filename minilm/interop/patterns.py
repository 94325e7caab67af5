"""Regular expressions that nobody has checked, matched in a process of its own.

A few characters, such as (a*)*b, can keep Python's matcher busy for longer than the sun shines, and
nothing stops it from inside. So an expression runs where it can only fail: in a process that is
ended when its time is over. One of plain letters needs no such care.
"""

import json
import re
import subprocess
import sys

SECONDS = 5  # for starting the process and all that is asked of it; it takes milliseconds


def match(expressions, names, form: str | None = None) -> dict[str, dict[str, str]]:
    """{expression: {name that it matches: what its group idx caught, or ""}}.

    An expression must match the whole name, or else, if there is a form to put it in for {}, that
    must match its beginning. ValueError for what is no regular expression, or for some that need
    more than SECONDS.
    """
    expressions, names = list(expressions), list(names)
    if all(re.fullmatch(r"\^?[\w.-]*", e) for e in expressions):
        return found(expressions, names, form)
    asked = json.dumps([expressions, names, form]).encode()
    try:
        said = subprocess.run([sys.executable, "-I", "-S", __file__], input=asked, timeout=SECONDS,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              start_new_session=True).stdout
    except subprocess.TimeoutExpired:
        raise ValueError(f"takes more than {SECONDS} seconds to match") from None
    answer = json.loads(said) if said else "needs too much memory"
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def found(expressions, names, form):
    """What `match` returns."""
    answer = {}
    for expression in expressions:
        pattern = re.compile(form.replace("{}", expression) if form else expression)
        how = pattern.match if form else pattern.fullmatch
        matches = {name: how(name) for name in names}
        answer[expression] = {name: m.groupdict().get("idx") or "" for name, m in matches.items()
                              if m}
    return answer


def main():
    """The process: read what is asked, and write what was found, or what is wrong with it."""
    try:
        answer = found(*json.load(sys.stdin))
    except (re.error, RecursionError, OverflowError) as error:
        answer = f"is no regular expression: {error}"
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
