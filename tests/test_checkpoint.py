"""minilm.checkpoint: at every file operation of a save, an error or a SIGKILL leaves a whole
checkpoint to load and a next save that works; a damaged checkpoint is skipped with a warning."""

import errno
import os
import re
import shutil
import signal
import warnings

import ml_dtypes
import numpy as np
import pytest
from disk import Disk, killed, no_space

from minilm import checkpoint, files
from minilm.files import FormatError

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


def contents(step, tag=0):
    """Tensors and state that tell one save from another."""
    tensors = {"w": np.full((2, 3), step, np.float32), "h": np.ones(3, ml_dtypes.bfloat16) * tag}
    return tensors, {"step": step, "tag": tag, "rng": {"state": 2**100 + step}, "loss": 0.1 * step}


def save(path, step, tag=0, keep=2):
    tensors, state = contents(step, tag)
    checkpoint.save(path, tensors, state, keep)


def load(path):
    """(step, tag) of what loads, after a look at every bit of it; no warning is let through."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors, state = checkpoint.load(path)
    expected, expected_state = contents(state["step"], state["tag"])
    assert state == expected_state
    assert {k: (x.dtype, x.shape, x.tobytes()) for k, x in tensors.items()} == {
        k: (x.dtype, x.shape, x.tobytes()) for k, x in expected.items()
    }
    return state["step"], state["tag"]


def names(path):
    return sorted(os.listdir(path))


def before(path):
    """Two checkpoints; saving step 3 then also removes one, saving step 2 again replaces one."""
    save(path, 1)
    save(path, 2)


def check_recovery(path, new, k):
    """What loads is the old checkpoint or the new one, and saving goes on; True if it is new."""
    loaded = load(path)
    assert loaded in [(2, 0), new], f"operation {k}"
    save(path, 4)
    assert load(path) == (4, 0)
    whole = [name for name in names(path) if not name.endswith(".tmp")]
    assert whole == names(path), "a dead save's folder was left"
    assert len(whole) == 2
    return loaded == new


def check_one_commit(outcomes):
    """Old up to one operation, new from there on: the save has exactly one moment of commit."""
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False and outcomes[-1] is True


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("new", [(3, 0), (2, 1)], ids=["next step", "same step again"])
def test_an_error_at_any_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, new, forever):
    outcomes = []
    for k in range(1, 200):
        path = tmp_path / str(k)
        before(path)
        with monkeypatch.context() as patch:
            disk = Disk(patch, k, no_space, forever)
            try:
                save(path, *new)
                finished = True
            except OSError as error:
                assert error.errno == errno.ENOSPC
                finished = False
        is_new = check_recovery(path, new, k)
        if not finished:
            outcomes.append(is_new)
        else:
            assert is_new  # a failed mkdir of a folder that is there does not matter
        if disk.count < k:
            break
    assert disk.count < k
    check_one_commit(outcomes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("new", [(3, 0), (2, 1)], ids=["next step", "same step again"])
def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, new):
    outcomes = []
    for k in range(1, 200):
        path = tmp_path / str(k)
        before(path)
        status = save_in_a_child_that_dies(path, new, k, monkeypatch)
        outcomes.append(check_recovery(path, new, k))
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0
    check_one_commit(outcomes)


def save_in_a_child_that_dies(path, new, k, monkeypatch):
    """The wait status of a forked child that saves and kills itself at its k-th operation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child uses no threads, no locks
        child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        Disk(monkeypatch, k, killed)
        save(path, *new)
        os._exit(0)
    finally:
        os._exit(1)


def test_what_stands_where_a_checkpoint_is_built_is_cleared_away(tmp_path):
    """Folders of kills, and what nobody knows the origin of."""
    (tmp_path / "step-00000001.tmp").touch()
    (tmp_path / "step-00000002.tmp").symlink_to(tmp_path / "nothing")
    (tmp_path / "step-00000003.tmp" / "x").mkdir(parents=True)
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_failed_save_frees_the_disk(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        Disk(patch, 8, no_space)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    with pytest.raises(TypeError, match="complex"):
        checkpoint.save(tmp_path, {"x": np.zeros(1, complex)}, {"step": 2})
    assert names(tmp_path) == ["step-00000001"]


def test_everything_is_on_the_disk_before_the_rename_and_nothing_goes_before_it(
    tmp_path, monkeypatch
):
    before(tmp_path)
    log, synced = [], set()
    replace, fsync, rmtree = os.replace, os.fsync, shutil.rmtree

    def logged_fsync(fd):
        synced.add(os.fstat(fd).st_ino)
        log.append(("sync", os.fstat(fd).st_ino))
        fsync(fd)

    def logged_replace(a, b):
        inodes = {p.stat().st_ino for p in (a, *a.glob("*"))} if a.is_dir() else {a.stat().st_ino}
        log.append(("rename", b.name, inodes <= synced))
        replace(a, b)

    def logged_rmtree(a, **settings):
        log.append(("remove", a.name))
        rmtree(a, **settings)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    monkeypatch.setattr(shutil, "rmtree", logged_rmtree)
    save(tmp_path, 3)
    moves = [entry for entry in log if entry[0] != "sync"]
    assert moves[:4] == [("rename", n, True) for n in (TENSORS, STATE, MANIFEST, "step-00000003")]
    assert [entry[:2] for entry in moves[4:]] == [
        ("rename", "step-00000001.tmp"),
        ("remove", "step-00000001.tmp"),
    ]
    commit = log.index(moves[3])
    assert log[commit + 1] == ("sync", tmp_path.stat().st_ino)


def test_the_first_save_forces_its_own_folder_to_the_disk(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.fstat(fd).st_ino))
    save(tmp_path / "checkpoints", 1)
    assert tmp_path.stat().st_ino in synced


def test_what_a_checkpoint_holds(tmp_path):
    save(tmp_path / "run" / "checkpoints", 100)
    folder = tmp_path / "run" / "checkpoints" / "step-00000100"
    assert names(folder) == [MANIFEST, STATE, TENSORS]
    assert files.read_json(folder / MANIFEST) == {
        name: {"size": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)}
        for name in (TENSORS, STATE)
    }
    assert files.read_json(folder / STATE) == contents(100)[1]


def test_same_input_gives_same_bytes(tmp_path):
    save(tmp_path / "a", 7)
    save(tmp_path / "b", 7)
    for name in (TENSORS, STATE, MANIFEST):
        a, b = (tmp_path / run / "step-00000007" / name for run in "ab")
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_by_number_are_kept(tmp_path, keep):
    steps = [1, 2, 99_999_999, 100_000_000, 100_000_001]  # the last ones need nine digits
    for step in steps:
        save(tmp_path, step, keep=keep)
        assert load(tmp_path) == (step, 0)
    assert names(tmp_path) == sorted(f"step-{step:08d}" for step in steps[-keep:])


def test_a_step_saved_again_is_replaced(tmp_path):
    save(tmp_path, 1)
    for tag in range(12):  # past .9, where the order of names is not the order of numbers
        save(tmp_path, 2, tag)
        assert load(tmp_path) == (2, tag)
    assert names(tmp_path) == ["step-00000001", "step-00000002.11"]


def test_later_steps_are_left_alone(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-00000005", "step-00000010"]
    assert load(tmp_path) == (10, 0)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    for name in ("step-notes", "notes.tmp", "step-00000009x"):
        (tmp_path / name).write_text("mine")
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    assert load(tmp_path) == (2, 0)
    assert names(tmp_path) == ["notes.tmp", "step-00000002", "step-00000009x", "step-notes"]


def damages():
    """(name, function of the checkpoint's folder) of every way to damage a checkpoint."""
    for file in (TENSORS, STATE, MANIFEST):
        yield f"{file} is gone", lambda folder, file=file: (folder / file).unlink()
        for part in (0.0, 0.1, 0.5, 0.9, 1.0):
            yield f"{file} is cut at {part}", lambda f, file=file, part=part: cut(f / file, part)
        yield f"{file} has a bit flipped", lambda folder, file=file: flip(folder / file)
    yield "manifest is a list", lambda folder: files.write_json(folder / MANIFEST, [TENSORS])
    yield "the folder is empty", lambda folder: [(folder / name).unlink() for name in names(folder)]
    yield "the folder is a file", lambda folder: (shutil.rmtree(folder), folder.write_text("x"))


def cut(file, part):
    data = file.read_bytes()
    file.write_bytes(data[: min(int(part * len(data)), len(data) - 2)])  # not only the last newline


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("name", "damage"), list(damages()), ids=[name for name, _ in damages()])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-00000002")
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path / 'step-00000002'}: ")) as caught:
        assert checkpoint.load(tmp_path)[1] == contents(1)[1]
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_changed_state_that_is_still_json_is_noticed(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    state = tmp_path / "step-00000002" / STATE
    state.write_text(state.read_text().replace('"step": 2', '"step": 9'))
    with pytest.warns(UserWarning, match=re.escape(f"{state}: is {{'size': ")):
        assert checkpoint.load(tmp_path)[1]["step"] == 1


def test_none_whole_is_an_error_that_says_what_was_looked_at(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for folder in tmp_path.iterdir():
        (folder / MANIFEST).unlink()
    with (
        pytest.warns(UserWarning, match="skipped a damaged checkpoint"),
        pytest.raises(FormatError, match="looked at step-00000002, step-00000001"),
    ):
        checkpoint.load(tmp_path)


def test_no_checkpoint_at_all_is_not_a_damaged_one(tmp_path):
    (tmp_path / "step-00000001.tmp").mkdir()
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{path}: no checkpoint")):
            checkpoint.load(path)


@pytest.mark.parametrize("step", [None, "1", 1.0, True, -1])
def test_a_state_without_a_step_is_refused(tmp_path, step):
    with pytest.raises(ValueError, match=re.escape(repr(step))):
        checkpoint.save(tmp_path / "c", {}, {"step": step})
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.save(tmp_path / "c", {}, {"step": 1}, keep=0)
    assert not (tmp_path / "c").exists()


def test_what_is_no_folder_does_not_stop_a_save(tmp_path):
    """Files and links with a checkpoint's name are passed over, and removed as older ones are."""
    save(tmp_path, 3)
    for name in ("step-00000001", "step-00000002.tmp"):
        (tmp_path / name).write_text("no folder")
    (tmp_path / "step-00000002").symlink_to(tmp_path / "step-00000003")
    save(tmp_path, 4)
    assert load(tmp_path) == (4, 0)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
