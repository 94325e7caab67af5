"""Trials: arms are settings of finetune.py; what they say of a model is what finetune.py says."""

import numpy as np
import pytest

from minilm import data, trial
from minilm.experiment import Experiment
from minilm.interop import save_model
from minilm.peft import add_lora
from minilm.run import RunDirectory
from minilm.transformer import Config, Transformer
from minilm.trial import (
    KEPT,
    KNOWN,
    LOSS,
    MEASURES,
    RIGHT,
    ROOM,
    SHARE,
    TRAINED,
    Trial,
    program,
    tried,
)

ARMS = {"base": {"steps": 0}, "full": {"method": "full", "lr": 1e-2}, "LoRA": {"r": 1, "lr": 3e-2}}
TINY = Trial(**trial.QUICK, seed=1, tasks=("upper", "sort"), lr=1e-2)


def experiment(file="rates.py", **changes):
    """An experiment of ARMS."""
    given = {"claims": {}, "slide": {}, "measures": MEASURES, "arms": ARMS} | changes
    return Experiment(str(file), "Which?", given["slide"], given["arms"], given["measures"],
                      given["claims"], None)


def test_arms_run_at_their_own_rates_or_at_those_given(tmp_path, capsys):
    main = program(experiment(tmp_path / "rates.py"))
    result = main(seeds=(0,), quick=True, out=tmp_path)
    assert result.arms == ["base", "full", "LoRA"]
    whole = sum(p.size for p in trial.base("")[0].parameters())
    assert [row[TRAINED] for row in result.rows[:2]] == [0, whole]
    swept = main(seeds=(0,), quick=True, out=tmp_path, rates=(1e-2, 0.3), arms=("full", "base"))
    assert swept.arms == ["full, lr 0.01", "full, lr 0.3"]
    assert swept.command.endswith("--arms full base --rates 0.01 0.3 --quick")
    first, again = result.rows[1], swept.rows[0]
    assert [first[m] for m in (LOSS, KNOWN, RIGHT)] == [again[m] for m in (LOSS, KNOWN, RIGHT)]
    assert swept.rows[1][LOSS] != again[LOSS]


def test_a_trial_has_its_seed_and_takes_the_bases_in_turn(tmp_path):
    def measured(s, run, title):
        found.append((s.seed, s.model, title))
        return dict.fromkeys(MEASURES, 0.0)
    found, folders, (model, tokenizer) = [], (tmp_path / "a", tmp_path / "b"), trial.base("")
    for folder in folders:
        save_model(model, folder, tokenizer)
    main = program(experiment(arms={"full": ARMS["full"]}), measured)
    main(seeds=(0, 3, 4), model=folders, out=tmp_path)
    assert found == [(seed, str(folders[seed % 2]), f"full, seed {seed}") for seed in (0, 3, 4)]


@pytest.mark.parametrize("options, text", [
    ({"arms": ("lora",)}, "there is no arm 'lora', only 'base', 'full', 'LoRA'"),
    ({"rates": (1e-3,), "keep": True, "given": frozenset({"keep"})}, "keep is given, but these"),
    ({"model": ("x",), "given": frozenset({"model"})}, "a quick run makes a tiny model"),
    ({"out": "x", "resume": "y", "given": frozenset({"out"})}, "give --resume or --out"),
])
def test_options_that_cannot_be_together(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        program(experiment())(**{"quick": True, "out": tmp_path} | options)
    assert not list(tmp_path.iterdir())


def test_rates_of_arms_that_learn_nothing_are_refused(tmp_path):
    still = {"base": {"steps": 0}, "random": {"lr": 0.0}}
    with pytest.raises(ValueError, match="base, random learns nothing"):
        program(experiment(arms=still))(quick=True, out=tmp_path, rates=(0.1,))
    assert not list(tmp_path.iterdir())
    swept = trial.narrowed(experiment(arms=still | ARMS), (), (0.1,))
    assert list(swept.arms) == ["full, lr 0.1", "LoRA, lr 0.1"]


@pytest.mark.parametrize("own, text", [
    ({"method": "bitfit"}, "BitFit trains biases, but no layer"),
    ({"method": "prefix", "length": 48}, "48"),
    ({"method": "prefix", "length": 40}, "takes .* tokens, but"),
    ({"r": 9}, "r must be 1 to 8"),
    ({"r": 1, "beside": 48}, "48"),
])
def test_a_base_that_is_not_for_an_arm_is_refused_before_the_run(own, text, tmp_path):
    llama = Config.llama(258, 48, layers=1, heads=2, width=8, hidden=8)
    save_model(Transformer(llama), tmp_path / "llama", data.ByteTokenizer())
    program_of = program(experiment(arms={"base": {"steps": 0}, "mine": own}))
    with pytest.raises(ValueError, match=f"llama is not for the arm 'mine': .*{text}"):
        program_of(seeds=(0,), model=(tmp_path / "llama",), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_trial_that_stopped_after_its_last_step_knows_how_long_steps_took(tmp_path):
    records = trial.records_of(TINY)[0]
    first, again = (trial.learned(*trial.base(""), records, TINY, RunDirectory(tmp_path), "")
                    for _ in range(2))
    assert first[2] == again[2] > 0


def test_the_numbers_of_a_trial(tmp_path):
    run = RunDirectory(tmp_path)
    found = tried(TINY, run, "x")
    assert found.keys() == MEASURES.keys() | {"upper, %", "sort, %", ROOM}
    assert found[RIGHT] == np.mean([found["upper, %"], found["sort, %"]])
    adapted = add_lora(trial.base("")[0], 8, 16, "all-linear")
    assert found[TRAINED] == sum(p.size for p in adapted.parameters() if p.requires_grad)
    joined = 2 * 4 * 6 * 8 * 64  # a GPT-2's q, k, v are one layer there: each layer's B has zeros
    names = 1e3 * found[KEPT] - 4 * found[TRAINED] - joined
    assert 0 < names < 4000
    held = sum(t.data.nbytes for _, t in trial.base("")[0].named_tensors())
    assert found[SHARE] == pytest.approx(1e5 * found[KEPT] / held)
    untrained = tried(Trial(**trial.QUICK | {"steps": 0}, tasks=("upper",)), run, "x")
    assert untrained[TRAINED] == untrained[KEPT] == untrained[SHARE] == 0
    assert untrained[KNOWN] == pytest.approx(np.log2(258), abs=0.1)  # it knows nothing


def test_the_answers_that_count_are_those_of_all_tasks_alike():
    """Each task weighs the same, and an answer is right or wrong."""
    class Parrot:
        """Stands for a model."""

    _, test = data.make_tasks(("upper", "add"), 0, 2, 0)
    said = {record: record.output for record in test[:3]}

    def answers(model, records, tokenizer):
        return [said.get(record, "?") for record in records]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "answers", answers)
        found = trial.right(Parrot(), None, test)
    assert found == {RIGHT: 75, "upper, %": 100, "add, %": 50}


def test_a_prefix_learns_beside_low_rank(tmp_path):
    beside = Trial(**trial.QUICK, r=1, beside=3, lr=1e-2)
    model, tokenizer = trial.base("")
    records, _ = data.make_tasks(("upper",), 16, 1, 0)
    model, trained, _ = trial.learned(model, tokenizer, records, beside, RunDirectory(tmp_path), "")
    moved = [name for name, p in model.named_parameters() if p.requires_grad and p.grad.any()]
    assert any("front" in name for name in moved) and any(".B" in name for name in moved)
    assert trained == sum(p.size for p in model.parameters() if p.requires_grad)
    config, low_rank = model.config, sum(p.size for n, p in model.named_parameters() if ".B" in n
                                         or ".A" in n)
    assert trained == low_rank + 2 * config.layers * config.width * 3  # keys and values
