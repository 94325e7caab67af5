"""Runs chat templates that nobody has checked, in a process of its own.

A chat template is a program in Jinja's language that comes with a model. It may loop without end,
or ask for all memory. So it runs in Jinja's sandbox, in a process whose memory is limited. The
process dies if one text takes too long, and only texts come back from it.

The template finds what transformers gives it: the same settings, filters and globals, and blocks
of {% generation %}, which say what the assistant wrote.
"""

import json
import signal
import subprocess
import sys
from datetime import datetime
from typing import NamedTuple

CHARACTERS = 1 << 24  # of one text, at most
SECONDS = 5.0  # of the processor's time for one text; one of a usual template takes milliseconds
MEMORY = 1 << 30  # bytes of the process
OLDEST = (3, 1, 6)  # version of Jinja; older sandboxes have known holes


class Rendered(NamedTuple):
    """A text and the places [start, end) of its {% generation %} blocks; or why there is none."""

    text: str = ""
    spans: list[list[int]] = []
    error: str = ""


def render(source: str, requests: list[dict]) -> list[Rendered]:
    """What a template writes for each request: the names that it may use, and their values.

    The values are those of JSON. ImportError without Jinja.
    """
    lines = map(json.dumps, [[source, SECONDS], *requests])
    # In a session of its own, Ctrl-C does not reach it: the program decides what that means.
    done = subprocess.run([sys.executable, "-I", __file__], input="\n".join(lines).encode(),
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          start_new_session=True)
    found = [Rendered(**json.loads(line)) for line in done.stdout.splitlines()]
    if found and found[0].error == "no jinja2":
        from minilm.extras import install  # late: the process finds only what is installed

        raise ImportError("chat templates need jinja2 of version "
                          f"{'.'.join(map(str, OLDEST))} or later: {install('chat')}")
    late = getattr(signal, "SIGPROF", None) == -done.returncode
    why = f"takes more than {SECONDS:g} s" if late else "ended its process"
    return found + [Rendered(error=why)] * (len(requests) - len(found))


def main():
    """The process: for each line of JSON but the first, print what the template writes."""
    try:
        environment = _environment()
    except ImportError:
        print(json.dumps({"error": "no jinja2"}))
        return
    _limit_memory()
    (source, seconds), *requests = map(json.loads, sys.stdin)
    template = None
    for request in requests:
        _limit_time(seconds)
        try:
            template = template or environment.from_string(source)
            told = _rendered(environment, template, request)
        except MemoryError:
            told = {"error": f"needs more than {MEMORY >> 20} MiB"}
        except Exception as error:  # a template may raise anything
            told = {"error": _described(error)}
        _limit_time(0)
        print(json.dumps(told), flush=True)


def _rendered(environment, template, names) -> dict:
    parts, environment.written, environment.spans = [], 0, []
    for part in template.generate(**names):
        parts.append(part)
        environment.written += len(part)
        if environment.written > CHARACTERS:
            raise ValueError(f"writes more than {CHARACTERS:,} characters")
    return {"text": "".join(parts), "spans": environment.spans}


def _described(error) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"[:500]
    said = str(error)[:500]
    return said if type(error) in (TemplateError, ValueError) else f"{type(error).__name__}: {said}"


def _environment():
    """Jinja's sandbox as transformers sets it up. ImportError without Jinja, or with an old one."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < OLDEST:
        raise ImportError

    class Generation(Extension):
        """{% generation %}: its text stays as it is, and its place is noted."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

        def _note(self, caller):
            text, start = caller(), self.environment.written
            self.environment.spans.append([start, start + len(text)])
            return text

    class Plain(Namespace):
        """A namespace without the names by which Python's own parts are reached."""

        def __init__(*args, **names):
            if hidden := [name for name in dict(*args[1:], **names) if str(name).startswith("_")]:
                raise jinja2.TemplateError(f"a namespace may not have {hidden[0]!r}")
            Namespace.__init__(*args, **names)

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise jinja2.TemplateError(f"a namespace may not have {name!r}")
            Namespace.__setitem__(self, name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _json
    environment.globals |= {"strftime_now": lambda form: datetime.now().strftime(form),
                            "raise_exception": _raise, "namespace": Plain}
    return environment


def _json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own filter would write < as \\u003c."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _raise(message):
    from jinja2 import TemplateError

    raise TemplateError(message)


def _limit_memory():
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _limit_time(seconds: float):
    """Die when the process has worked for so long; 0 for no limit. A busy machine costs nothing."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
