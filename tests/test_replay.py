"""Old rows among new ones: how many, which, and where; finetune.py --replay; and the experiment."""

import json

import finetune
import numpy as np
import pytest
import replay
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.replay import Replay, most_old, old_a_step
from minilm.files import read_json
from minilm.interop import huggingface
from minilm.measure.verdict import FAILS, HOLDS
from minilm.run import RunDirectory
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

BYTES = data.ByteTokenizer()
TEXT = "A cat sat on a mat. " * 40
shares = st.one_of(st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.5]), st.floats(0, 0.9))
seeds = st.integers(0, 2**32)


class Rows:
    """Batches of rows of one number each, which says where a row comes from."""

    def __init__(self, first: int, batch: int, length: int):
        self.first, self.batch, self.length = first, batch, length

    def __getitem__(self, step):
        ids = self.first + step * self.batch + np.arange(self.batch)
        tokens = np.repeat(ids[:, None], self.length, axis=1).astype(np.int32)
        return tokens, tokens + 1


def mixed(batch, share, seed, beside, wide=3, narrow=2):
    old = Rows(-10**6, most_old(batch, share, beside), narrow)
    return Replay(Rows(0, batch, wide), old, share, seed, beside)


@given(st.integers(1, 20), shares, seeds, st.booleans(), st.integers(1, 60))
def test_old_rows_are_a_share_of_all(batch, share, seed, beside, steps):
    """In s steps floor(k s), up to what a float rounds; eq. (1) keeps the batch, (2) the new rows.
    """
    found = [mixed(batch, share, seed, beside)[step][0][:, 0] for step in range(steps)]
    old = sum(int((ids < 0).sum()) for ids in found)
    k = batch * share / (1 - share) if beside else batch * share
    assert old_a_step(batch, share, beside) == k
    assert k * steps - 1 - 1e-6 < old <= k * steps + 1e-6
    for ids in found:
        assert (ids >= 0).sum() == batch if beside else len(ids) == batch
    rows = sum(map(len, found))
    assert abs(old - share * rows) <= 1 + 1e-6  # of all rows that were seen


@given(st.integers(1, 20), shares, seeds, st.booleans(), st.integers(0, 1000))
def test_new_rows_stay_what_they_are(batch, share, seed, beside, step):
    """They come in their order, each at most once; the first old rows of the step come after."""
    both = mixed(batch, share, seed, beside)
    tokens, targets = both[step]
    ids = tokens[:, 0]
    new, old = ids[ids >= 0], ids[ids < 0]
    assert len(ids) == len(new) + len(old) and (np.diff(new) > 0).all()
    assert {*new.tolist()} <= {*(step * batch + np.arange(batch)).tolist()}
    assert (old == both.old[step][0][: len(old), 0]).all()
    of_new = ids >= 0
    assert (tokens[of_new] == new[:, None]).all() and (targets == tokens + 1)[of_new].all()
    if len(new):  # an old row is shorter, and filled up
        assert (tokens[~of_new, 2:] == 0).all() and (targets[~of_new, 2:] == data.IGNORED).all()
    again = mixed(batch, share, seed, beside)[step]
    assert (tokens == again[0]).all() and (targets == again[1]).all()


def test_every_new_row_has_the_same_chance():
    drawn = [mixed(4, 0.5, 0, False)[step][0][:, 0] % 4 for step in range(400)]
    places = np.bincount(np.concatenate([d[:2] for d in drawn]), minlength=4)  # the new rows
    assert places.sum() == 800 and places.min() > 160


@given(st.integers(1, 8), seeds)
def test_without_a_share_nothing_changes(batch, seed):
    records = data.make_tasks(["upper"], 20, 1, seed)[0]
    plain = data.InstructionBatches(records, BYTES, batch, None, seed)
    same = data.replay_text(plain, [TEXT], BYTES, 0.0)
    for step in range(3):
        for a, b in zip(plain[step], same[step], strict=True):
            assert (a == b).all()


@given(seeds, st.sampled_from([0.25, 0.5]), st.booleans())
def test_old_text_is_text_and_as_long_as_a_record(seed, share, beside):
    """Each token of an old row is a target, so its loss is that of pretraining."""
    records = data.make_tasks(["upper", "last"], 20, 1, seed)[0]
    plain = data.InstructionBatches(records, BYTES, 8, None, seed)
    tokens, targets = data.replay_text(plain, [TEXT], BYTES, share, beside)[5]
    k = int(8 * share / (1 - share) if beside else 8 * share)
    assert tokens.shape[1] == plain[5][0].shape[1] == plain.widths[0]
    for row, wanted in zip(tokens[-k:], targets[-k:]):
        ids = np.append(row, wanted[-1])
        assert (row[1:] == wanted[:-1]).all() and (wanted >= 0).all()
        assert BYTES.decode(ids) in TEXT or BYTES.end in ids
    assert (targets[:-k] == data.IGNORED).any()


def test_one_long_record_does_not_make_old_rows_long():
    records = [data.Record("Say", str(i), "x") for i in range(9)]
    long = data.Record("Say", "", "x" * 99)
    plain = data.InstructionBatches([*records, long], BYTES, 4, None, 0)
    old = data.replay_text(plain, [TEXT], BYTES, 0.5).old
    assert plain.widths.max() > 99 and old.length < 12


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match="share must be at least 0 and below 1, got"):
        Replay(Rows(0, 4, 2), Rows(0, 4, 2), share, 0)


def test_too_few_old_rows_are_refused():
    with pytest.raises(ValueError, match="step 0 takes 2 old rows, but a batch of them has 1"):
        Replay(Rows(0, 4, 2), Rows(0, 1, 2), 0.5, 0)[0]


# finetune.py --replay


@pytest.fixture
def base(tmp_path):
    """The folder of a model whose run says that it was trained on a text, with a half held out."""
    run = tmp_path / "pretrain-1"
    (run / "model").mkdir(parents=True)
    model = Transformer(Config.gpt2(258, 40, layers=1, heads=2, width=16), seed=1)
    huggingface.save_model(model, run / "model", BYTES)
    file = tmp_path / "text.txt"
    file.write_text("old " * 60 + "held out " * 27)
    corpus = data.load_corpus(str(file))
    (run / "run.json").write_text(json.dumps({
        "settings": {"corpus": [str(file)], "validation": 0.5},
        "corpora": [{"name": str(file), "sha256": corpus.sha256}]}))
    return run / "model"


def settings(base, **changes):
    small = dict(model=str(base), known=(str(base.parents[1] / "text.txt"),), data=("upper",),
                 train=20, test=3, method="full", batch=4, steps=4, warmup=1, eval_every=4,
                 save_every=2, workers=1)
    return finetune.Settings(**small | changes)


def seen(monkeypatch, s, out):
    """The batches of a run."""
    found, step = [], Trainer.step

    def looks(trainer, number, batch, *rest):
        found.append(batch)
        return step(trainer, number, batch, *rest)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", looks)
        finetune.main(s, out)
    return found


def test_a_run_replays_what_its_base_was_trained_on(tmp_path, base, monkeypatch):
    """Of four rows two are old, and none of what was held out is among them."""
    for tokens, targets in seen(monkeypatch, settings(base, replay=0.5), tmp_path / "runs"):
        assert len(tokens) == 4
        for row, wanted in zip(tokens[2:], targets[2:]):
            assert BYTES.decode(np.append(row, wanted[-1])).strip("old ") == ""
        assert all("Upper" in BYTES.decode(row) for row in tokens[:2])
    run = read_json(tmp_path / "runs" / "finetune-full-1" / "run.json")
    assert run["settings"]["replay"] == 0.5
    assert any(file["name"].startswith("replay: ") for file in run["base"])


def test_a_replaying_run_goes_on_bit_for_bit(tmp_path, base, monkeypatch):
    s, step = settings(base, replay=0.2), Trainer.step
    finetune.main(s, tmp_path / "a")

    def fails(trainer, number, *rest):
        if number == 3:
            raise MemoryError("no room")
        return step(trainer, number, *rest)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", fails)
        with pytest.raises(MemoryError):
            finetune.main(s, tmp_path / "b")
    finetune.main(resume=tmp_path / "b" / "finetune-full-1")
    a, b = ((tmp_path / name / "finetune-full-1" / "model" / "model.safetensors").read_bytes()
            for name in "ab")
    assert a == b
    (base.parents[1] / "text.txt").write_text("another text " * 60)
    with pytest.raises(ValueError, match=r"text\.txt is not measured: the text is not what it was"):
        finetune.main(resume=tmp_path / "b" / "finetune-full-1")


def test_the_text_can_be_named(tmp_path, base, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("xyz" * 200)
    s = settings(base, replay=0.5, replay_from=(str(other),))
    tokens, _ = seen(monkeypatch, s, tmp_path / "runs")[0]
    assert {*BYTES.decode(tokens[2:].ravel())} == {*"xyz"}


@pytest.mark.parametrize("change, words", [
    (dict(replay=1.0), "replay must be at least 0 and below 1"),
    (dict(replay=0.5, replay_from=("nowhere",)), "'nowhere' is neither a path nor one of"),
])
def test_a_replay_that_makes_no_sense_is_refused(tmp_path, base, change, words):
    with pytest.raises(ValueError, match=words):
        finetune.main(settings(base, **change), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_model_of_unknown_origin_wants_a_named_text(tmp_path, base):
    (base.parent / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run\.json says which text .* give --replay-from"):
        finetune.main(settings(base, replay=0.5), tmp_path / "runs")


def test_a_named_text_without_a_share_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match="replay_from is given, but replay is 0"):
        finetune.main(settings(base, replay_from=("python-reference",)), tmp_path / "runs",
                      given=frozenset({"replay_from"}))


# The experiment


def rows(known, loss=(0.1, 0.2, 0.3)):
    """Rows of base model, 0 %, 20 %, on two seeds that differ a little."""
    return [{"arm": arm, "seed": seed, replay.KNOWN: x + seed / 100, replay.LOSS: y + seed / 100}
            for seed in (0, 1)
            for arm, x, y in zip((replay.BASE, replay.NONE, "20 %"), known, loss)]


def test_the_claim_that_replay_saves_most_can_fail():
    most = replay.CLAIMS["20 % of old text takes away most of the forgetting"]
    assert most(rows((1.75, 6.0, 2.0))).verdict == HOLDS
    assert most(rows((1.75, 6.0, 5.0))).verdict == FAILS
    assert abs(most(rows((1.0, 5.0, 2.0))).mean - (1 - 0.5 * 4)) < 1e-9
    cost = replay.CLAIMS["20 % costs learning: with fewer rows of the tasks their loss is higher"]
    assert cost(rows((1, 2, 3))).verdict == HOLDS
    assert cost(rows((1, 2, 3), (0.1, 0.3, 0.2))).verdict == FAILS


@pytest.mark.parametrize("share, added, counted", [(0.0, False, 16), (0.5, False, 8),
                                                   (0.5, True, 16)])
def test_rows_are_counted_as_they_come(tmp_path, monkeypatch, share, added, counted):
    s = replay.Replaying(method="full", share=share, added=added, batch=4, steps=4, warmup=1,
                         workers=1, train=20, test=2, documents=1)
    batches = []
    taught = replay.taught

    def looks(model, given, *rest):
        batches.extend(given[step] for step in range(s.steps))
        return taught(model, given, *rest)

    monkeypatch.setattr(replay, "taught", looks)
    found = replay.measured(s, RunDirectory(tmp_path), "x")
    whole = [(targets != data.IGNORED).all(axis=1) for _, targets in batches]
    assert found[replay.ROWS] == sum(int((~old).sum()) for old in whole) == counted
    tokens = sum(int(old.sum()) * len(old_rows[0]) for old, (old_rows, _) in zip(whole, batches))
    assert found[replay.OLD] * 1000 == tokens and (tokens > 0) == (share > 0)
