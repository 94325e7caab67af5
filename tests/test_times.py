"""The experiments on time: what is claimed can hold and can fail, and what is no time is exact."""

import latency
import numpy as np
import pytest
import training_step

from minilm.measure.verdict import FAILS, HOLDS
from minilm.peft import add_lora, unload_lora
from minilm.peft.adapted import adapted_layers
from minilm.transformer import Config, Transformer


def rows(seeds=(0, 1, 2), **of_arms):
    """Rows whose arms have these numbers, a little apart by seed."""
    return [{"arm": arm, "seed": seed} | {m: x + seed / 100 for m, x in numbers.items()}
            for arm, numbers in of_arms.items() for seed in seeds]


def verdicts(experiment, rows, *words):
    """The verdicts of the claims that have all of these words."""
    return {judge(rows).verdict for claim, judge in experiment.CLAIMS.items()
            if all(word in claim for word in words)}


@pytest.mark.parametrize("step, twice, faster, at_all", [
    (200, HOLDS, FAILS, FAILS), (110, FAILS, FAILS, FAILS), (75, FAILS, FAILS, HOLDS),
    (40, FAILS, HOLDS, HOLDS)])
@pytest.mark.parametrize("size", training_step.SIZES)
def test_each_of_the_two_slides_may_be_right(size, step, twice, faster, at_all):
    arms = {arm: {training_step.time(size): step} for arm in ("LoRA, q v", "LoRA, all-linear")}
    found = rows(**arms)
    assert verdicts(training_step, found, "004", size) == {twice}
    assert verdicts(training_step, found, "001", "much faster", size) == {faster}
    assert verdicts(training_step, found, "faster at all", size) == {at_all}


@pytest.mark.parametrize("time, said", [(70, HOLDS), (95, FAILS), (50, FAILS)])
def test_time_may_go_with_the_operations(time, said):
    found = rows(**{"LoRA, all-linear": {training_step.time("M"): time,
                                         training_step.work("M"): 68}})
    assert verdicts(training_step, found, "time goes", "M") == {said}


@pytest.mark.parametrize("job", latency.JOBS)
def test_a_merged_model_may_cost_something(job):
    for cost, said in [(0, HOLDS), (-4, HOLDS), (20, FAILS)]:
        found = rows(**{"LoRA merged": {latency.over(job): cost}})
        assert verdicts(latency, found, "merged", "latency", job) == {said}


def test_an_adapter_may_cost_nothing_or_the_same_in_all_jobs():
    costs = {latency.over(job): 10 * i for i, job in enumerate(reversed(latency.JOBS), -1)}
    found = rows(**dict.fromkeys(latency.ARMS[2:], costs))
    assert verdicts(latency, found, "adds latency: 64 tokens") == {FAILS}
    assert verdicts(latency, found, "adds latency: 32 x 128") == {HOLDS}
    assert verdicts(latency, found, "costs more than at 32 x 128") == {FAILS}


def test_merged_and_beside_are_the_same_function_and_no_other_arm_is():
    found = {arm: latency.measured(arm, 5, quick=True) for arm in latency.ARMS}
    for arm, row in found.items():
        far = arm not in ("LoRA merged", "LoRA beside")
        assert (row[latency.LAYERS] > 1e5) == (row[latency.LOGITS] > 1e5) == far
        assert far or (row[latency.LAYERS] < 5 and row[latency.LOGITS] < 5)
    assert found["LoRA merged"][latency.ADDED] == found["base"][latency.ADDED] == 0
    sizes = 4 * (16 + 16) + 2 * (16 + 64)  # of r = 2 in two blocks
    assert found["LoRA beside"][latency.ADDED] == 2 * 2 * sizes


def test_a_wrong_scale_is_seen():
    config = Config.gpt2(64, 32, 2, 2, 16)
    def lora(): return latency.numbers_for(add_lora(Transformer(config), 2, 4), 0)
    beside, other = lora(), lora()
    for layer in adapted_layers(other).values():
        layer.adapters["default"].scale *= 1.001
    assert latency.layers_off(lora(), beside, np.random.default_rng(0)) < 5
    assert latency.layers_off(other, beside, np.random.default_rng(0)) > 50
    assert latency.logits_off(other, beside, 0) > 50
    assert latency.logits_off(unload_lora(other), beside, 0) > 1e4
