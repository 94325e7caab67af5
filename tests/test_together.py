"""Files that change as one, and what a failing disk or a kill leaves of them: the old or the new,
at every operation; and locks that die with their process."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from disk import Disk, killed, no_space

from minilm import locks
from minilm.files import temporary, write_atomically
from minilm.interop import bitsandbytes, huggingface, peft
from minilm.peft import add_lora
from minilm.quantize import quantize_model
from minilm.together import settle, write_together
from minilm.transformer import Config, Transformer

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
OLD, NEW = ({"w": [b"old weights"], "c.json": [b"old"]},
            {"w": [b"new ", b"weights"], "c.json": [b"new"]})


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def joined(files):
    return {name: b"".join(parts) for name, parts in files.items()}


def in_a_child(job):
    """The wait status of a forked child that does the job."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        job()
        os._exit(0)
    finally:
        os._exit(1)


def outcomes(tmp_path, monkeypatch, before, write, look, kill, forever=False):
    """What look(folder) says after the write failed, or was killed, at each operation in turn."""
    found = []
    for k in range(1, 100):
        before(folder := tmp_path / str(k))
        if kill:
            def job(folder=folder, k=k):
                Disk(monkeypatch, k, killed)
                write(folder)
            ended = in_a_child(job) == 0
        else:
            with monkeypatch.context() as patch:
                disk = Disk(patch, k, no_space, forever)
                try:
                    write(folder)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                else:  # an error that does not matter, as of a mkdir of what is there
                    if disk.count >= k:
                        continue
            ended = disk.count < k
        found.append(look(folder))
        write(folder)  # what was left is in nobody's way, and does not stay
        assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name == ".saved"]
        if ended:
            return found
    raise AssertionError("it never ended")


def check_old_then_new(found, old, new):
    """Old up to one operation, new from there on."""
    assert all(x in (old, new) for x in found), found
    assert found[0] == old and found[-1] == new and len(found) > 8
    assert [x == new for x in found] == sorted(x == new for x in found)


@pytest.mark.parametrize("kill, forever", [(False, False), (False, True), (True, False)],
                         ids=["error", "errors from then on", "kill"])
def test_several_files_are_old_or_new_at_every_operation(tmp_path, monkeypatch, kill, forever):
    def before(folder):
        write_together(folder, OLD | {"other": [b"stays"]})

    def look(folder):
        settle(folder)
        assert contents(folder)["other"] == b"stays"
        return {name: contents(folder)[name] for name in OLD}

    found = outcomes(tmp_path, monkeypatch, before, partial(write_together, files=NEW), look, kill,
                     forever)
    check_old_then_new(found, joined(OLD), joined(NEW))


def test_a_reader_that_knows_nothing_of_it_never_sees_two_halves(tmp_path, monkeypatch):
    """It sees the old files, or no config, or the new ones."""
    seen = outcomes(tmp_path, monkeypatch, lambda folder: write_together(folder, OLD),
                    partial(write_together, files=NEW), lambda folder: tuple(
                        (folder / n).read_bytes() if (folder / n).exists() else None for n in NEW),
                    kill=True)
    whole = {tuple(joined(files).values()) for files in (OLD, NEW)}
    assert whole < set(seen) and all(config is None for w, config in set(seen) - whole)


def model(seed, **changes):
    return Transformer(Config.llama(**dict(vocab_size=11, context=8, layers=1, heads=2, width=8,
                                           hidden=8) | changes), seed)


def adapted(seed, targets):
    return add_lora(model(0), 2, 4, targets, seed=seed)


SAVES = {  # name: (save, load, an old one, a new one of another shape)
    "huggingface": (huggingface.save_model, huggingface.load_model, model(1), model(2, hidden=12)),
    "4 bits": (bitsandbytes.save_model, bitsandbytes.load_model, quantize_model(model(1), "nf4"),
               quantize_model(model(2, hidden=12), "nf4")),
    "adapter": (peft.save_adapter, lambda path: peft.load_adapter(model(0), path),
                adapted(1, ("q",)), adapted(2, ("up", "v"))),
}


@pytest.mark.parametrize("kill", [False, True], ids=["error", "kill"])
@pytest.mark.parametrize("kind", SAVES)
def test_a_save_that_fails_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch, kind, kill):
    save, load, old, new = SAVES[kind]

    def answer(loaded):
        return {name: t.data.tobytes() for name, t in loaded.named_tensors()}

    found = outcomes(tmp_path, monkeypatch, partial(save, old), partial(save, new),
                     lambda folder: answer(load(folder)), kill)
    save(old, tmp_path / "old")
    save(new, tmp_path / "new")
    check_old_then_new(found, *(answer(load(tmp_path / name)) for name in ("old", "new")))


@pytest.mark.parametrize("room", range(0, 3000, 149))
def test_a_disk_that_is_full_at_any_byte_leaves_the_old_model(tmp_path, room):
    """The kernel refuses what goes beyond `room` bytes of a file."""
    resource = pytest.importorskip("resource")
    huggingface.save_model(model(1), tmp_path)
    before = contents(tmp_path)

    def job():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            huggingface.save_model(model(2), tmp_path)
        except OSError:
            os._exit(3)

    assert os.waitstatus_to_exitcode(in_a_child(job)) == 3
    assert contents(tmp_path) == before


def test_a_killed_write_is_cleared_away_by_the_next_and_a_living_one_is_not(tmp_path):
    (tmp_path / "g").mkdir()
    for make in (partial(write_atomically, tmp_path / "f", b"x"),
                 partial(write_together, tmp_path / "g", {"a": [b"x"]})):
        def job(make=make):
            with pytest.MonkeyPatch.context() as patch:
                Disk(patch, 3, killed)
                make()
        in_a_child(job)
        assert [p for p in tmp_path.rglob("*.tmp")]
        with temporary(tmp_path / "f") as own, temporary(tmp_path / "g" / "saved", True) as other:
            make()
            assert sorted(tmp_path.rglob("*.tmp")) == sorted([own, other])
        make()
        assert not [p for p in tmp_path.rglob("*.tmp")]


def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path):
    write_atomically(tmp_path / ("ä" * 127), b"x")
    assert os.listdir(tmp_path) == ["ä" * 127]


def test_a_folder_is_not_written_over(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file") as caught:
        write_atomically(tmp_path, b"x")
    assert caught.value.filename == str(tmp_path)


def test_four_loaders_at_once_settle_a_killed_save(tmp_path):
    """None removes the config that another has just put in its place."""
    write_together(tmp_path / "m", OLD)
    (tmp_path / "m" / ".saved").mkdir()
    for name, parts in NEW.items():
        (tmp_path / "m" / ".saved" / name).write_bytes(b"".join(parts))
    program = "import sys; from minilm.together import settle; sys.stdin.read(1); settle('m')"
    children = [subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=ENV,
                                 stdin=subprocess.PIPE) for _ in range(4)]
    for child in children:
        child.stdin.close()
    assert [child.wait(20) for child in children] == [0] * 4
    assert contents(tmp_path / "m") == joined(NEW)


def test_writers_at_once_take_turns(tmp_path):
    """None of them fails, and the files are one writer's."""
    program = ("import os, sys; from minilm.together import write_together; sys.stdin.read(1)\n"
               "os.fsync = lambda fd: None\n"
               "for i in range(60):\n"
               "    files = {n: [f'{sys.argv[1]} {i}'.encode()] for n in ('w', 'v', 'c.json')}\n"
               "    write_together('m', files)")
    writers = [subprocess.Popen([sys.executable, "-c", program, str(i)], cwd=tmp_path, env=ENV,
                                stdin=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(3)]
    for writer in writers:
        writer.stdin.write(b"x")
        writer.stdin.flush()
    said = [writer.communicate()[1].decode() for writer in writers]
    assert said == ["", "", ""]
    found = contents(tmp_path / "m")
    assert sorted(found) == ["c.json", "v", "w"] and len(set(found.values())) == 1


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_not_written_over(tmp_path, kind):
    """A rename would put a file in the place of /dev/null, for everybody."""
    if kind == "pipe":
        os.mkfifo(tmp_path / "out")
    else:
        (tmp_path / "out").symlink_to("/dev/null")
    before = os.lstat(tmp_path / "out")
    with pytest.raises(OSError, match=f"is a {kind}, expected a file") as caught:
        write_atomically(tmp_path / "out", b"x")
    assert caught.value.filename == str(tmp_path / "out")
    assert os.path.samestat(before, os.lstat(tmp_path / "out"))


# Locks


HOLDER = """
import os, sys, time
from minilm import locks
with locks.alone("."):
    if os.fork() == 0:  # as a worker that outlives its parent
        time.sleep(60)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_one_process_writes_in_a_folder_and_a_killed_one_lets_go(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=tmp_path, text=True,
                              env=ENV, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert int(holder.stdout.readline()) == holder.pid
        with pytest.raises(RuntimeError, match="in use: another process"), locks.alone(tmp_path):
            pass
        holder.kill()  # its child lives on
        holder.wait()
        with locks.alone(tmp_path):
            assert os.listdir(tmp_path) == [".lock"]
        assert os.listdir(tmp_path) == []
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_one_process_is_not_twice_alone(tmp_path):
    """Not by another name of the folder either; and the first one keeps it."""
    (tmp_path / "link").symlink_to(tmp_path)
    program = "import sys; from minilm import locks\nwith locks.alone(sys.argv[1]): pass"
    with locks.alone(tmp_path):
        for name in (tmp_path, tmp_path / "link"):
            with pytest.raises(RuntimeError, match="in use: this process writes there already"):
                with locks.alone(name):
                    pass
        other = subprocess.run([sys.executable, "-c", program, tmp_path], env=ENV,
                               capture_output=True, text=True)
        assert "in use: another process" in other.stderr
    with locks.alone(tmp_path):
        pass


def test_an_error_inside_lets_go_too(tmp_path):
    with pytest.raises(KeyError), locks.alone(tmp_path):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_what_is_held_is_held_once(tmp_path):
    (tmp_path / "f").touch()
    for path in (tmp_path, tmp_path / "f"):
        with locks.hold(path) as first, locks.hold(path, wait=False) as second:
            assert first and not second
        with locks.hold(path, wait=False) as again:
            assert again
    with locks.hold(tmp_path / "none") as held:
        assert not held


def test_without_locks_everything_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    write_together(tmp_path / "m", OLD)
    write_together(tmp_path / "m", NEW)
    assert contents(tmp_path / "m") == joined(NEW)
    assert np.all([Path(name).exists() for name in (tmp_path / "m" / "w", tmp_path / "m")])
