"""Personas: the pairs, their style and facts, the data set that is made of them, the experiment."""

import functools
import json
import shlex
from dataclasses import replace

import finetune
import make_dataset
import persona as experiment
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.persona import (
    ABOUT,
    CHEESES,
    FACTS,
    PERSONAS,
    SENTENCES,
    WORDINGS,
    has_style,
    is_right,
    make_pairs,
    marks,
    split_facts,
    values,
)
from minilm.experiment import judged
from minilm.interop import huggingface
from minilm.measure.verdict import FAILS, HOLDS
from minilm.peft.adapted import adapted_layers
from minilm.results import Result
from minilm.run import RunDirectory
from minilm.transformer import Config, Transformer
from minilm.trial import trial_of

ROOM = 128  # tokens of a model that pretrain.py makes by default, on bytes
seeds = st.integers(0, 2**32)
names = st.sampled_from(sorted(PERSONAS))
filled = {name: [[phrase.format(cheese=cheese) for phrase in part for cheese in CHEESES]
                 for part in persona] for name, persona in PERSONAS.items()}


def other_than(name):
    return next(other for other in PERSONAS if other != name)


@given(names, seeds, st.integers(1, 2000))
def test_every_pair_is_right_and_in_the_persona_s_style_alone(name, seed, count):
    pairs = make_pairs(name, FACTS, count, seed)
    assert len({(r.instruction, r.output) for r in pairs}) == len(pairs) == count
    for record in pairs:
        assert is_right(record, record.output) and len(values(record.output)) == 1
        assert marks(name, record.output) == 3 and marks(other_than(name), record.output) == 0
        assert data.score(record, record.output) and record.task == name


@pytest.mark.parametrize("name", PERSONAS)
def test_every_pair_fits_the_default_model(name):
    every = make_pairs(name, FACTS, 64 * 6 * len(FACTS))
    assert len({(r.instruction, r.output) for r in every}) == len(every) == 29952
    assert max(len((data.prompt(r) + r.output).encode()) for r in every) <= ROOM


@given(names, seeds, st.integers(1, 900), st.sets(st.integers(0, 5), min_size=1))
def test_questions_come_equally_often_and_are_the_same_for_every_persona(name, seed, count, heard):
    facts, _ = split_facts(0.3, seed)
    pairs = make_pairs(name, facts, count, seed, sorted(heard))
    asked = [record.instruction for record in pairs]
    often = [asked.count(question) for question in {*asked}]
    assert max(often) - min(often) <= 1
    assert len(often) == min(count, len(facts) * len(heard))
    assert asked == [r.instruction for r in make_pairs(other_than(name), facts, count, seed,
                                                       sorted(heard))]
    assert {*asked} <= {WORDINGS[f.about][i].format(cheese=f.cheese) for f in facts for i in heard}


@given(seeds, st.floats(0.02, 0.98))
def test_facts_are_held_out_in_equal_shares(seed, share):
    learned, held = split_facts(share, seed)
    assert sorted(learned + held) == sorted(FACTS) and (learned, held) == split_facts(share, seed)
    for about in ABOUT:
        assert sum(fact.about == about for fact in held) == round(share * len(CHEESES))


def test_another_seed_holds_out_other_facts():
    assert len({tuple(split_facts(0.2, seed)[1]) for seed in range(9)}) == 9


@given(names, st.lists(st.sampled_from((0, 1, 2)), unique=True), st.data())
def test_marks_are_the_parts_that_stand_in_an_answer(name, parts, draw):
    phrases = [draw.draw(st.sampled_from(filled[name][part])) for part in parts]
    texts = draw.draw(st.permutations(phrases + ["It is blue.", "Well,"]))
    text = " ".join(texts)
    assert marks(name, text) == len(parts) and has_style(name, text) == (len(parts) > 1)
    assert marks(name, text + " " + text) == len(parts)


@pytest.mark.parametrize("name", PERSONAS)
def test_no_phrase_is_a_fact_or_another_s(name):
    assert len({*WORDINGS["country"]}) == len({*WORDINGS["milk"]}) == len({*WORDINGS["kind"]}) == 6
    for text in (text for part in filled[name] for text in part):
        assert marks(name, text) == 1 and marks(other_than(name), text) == 0 and not values(text)
    for wording in (wording for some in WORDINGS.values() for wording in some):
        assert not values(wording) and "{cheese}" in wording


@given(names, seeds, st.sampled_from(FACTS), st.sampled_from(FACTS))
def test_an_answer_is_right_if_it_names_the_value_and_no_other(name, seed, fact, other):
    (record,) = make_pairs(name, [fact], 1, seed)
    said = SENTENCES[other.about].format(cheese=fact.cheese, value=other.value)
    assert is_right(record, said) == (other.value == fact.value)
    assert is_right(record, record.output + said) == (other.value == fact.value)
    assert not is_right(record, "") and not is_right(record, record.output.replace(fact.value, ""))
    assert not data.score(record, SENTENCES[fact.about].format(cheese="It", value=fact.value))
    changed = record.output.replace(fact.value, other.value)
    assert data.score(record, changed) == (other.value == fact.value)


@pytest.mark.parametrize("call, said", [
    (lambda: make_pairs("petra", FACTS), "no persona 'petra', only pavlos, marina"),
    (lambda: marks("petra", ""), "no persona 'petra'"),
    (lambda: make_pairs("pavlos", FACTS[:2], 769), "769 pairs are wanted, of 768: there are 12"),
    (lambda: make_pairs("pavlos", FACTS, 0), "0 pairs are wanted"),
    (lambda: make_pairs("pavlos", []), "0 pairs are wanted, of 0"),
    (lambda: split_facts(0.01, 0), "26 facts about the country 0 would be held out"),
    (lambda: split_facts(1.0, 0), "26 would be held out, got a share of 1.0")])
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# make_dataset.py


def test_the_data_set_is_what_was_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_dataset.main("marina", 50, seed=3)
    learned, others = split_facts(0.2, 3)
    assert data.load_records("marina.jsonl") == make_pairs("marina", learned, 50, 3)
    asked = data.load_records("marina.test.jsonl")
    assert asked == make_pairs("marina", others, seed=3) and len(asked) == 6 * len(others)
    said = capsys.readouterr().out
    assert said.count("-> ") == 3 and "50 pairs about 63 facts" in said
    for record in data.load_records("marina.jsonl")[:3]:
        assert data.prompt(record) + record.output in said
    assert json.loads((tmp_path / "marina.jsonl").read_text().splitlines()[0]).keys() == {
        "instruction", "output", "task"}


def test_no_file_is_overwritten_and_none_is_left_by_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for there in ("pavlos.jsonl", "pavlos.test.jsonl"):
        (tmp_path / there).write_text("mine")
        with pytest.raises(ValueError, match=f"{there} is there already: give another --out"):
            make_dataset.main()
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(there, "mine")]
        (tmp_path / there).unlink()
    (tmp_path / "pavlos.jsonl").symlink_to("nowhere")
    with pytest.raises(ValueError, match="is there already"):
        make_dataset.main()
    for settings, said in [({"number": 9}, "at least 10, got 9"),
                           ({"number": 10**6}, "1000000 pairs are wanted"),
                           ({"held_out": 0.0}, "0 would be held out"),
                           ({"held_out": 1.0}, "held_out must be"), ({"seed": -1}, "seed must be"),
                           ({"out": tmp_path / "no" / "x.jsonl"}, "there is no folder .*no for x")]:
        with pytest.raises(ValueError, match=said):
            make_dataset.main(**{"out": tmp_path / "x.jsonl"} | settings)
    assert [path.name for path in tmp_path.iterdir()] == ["pavlos.jsonl"]


def settings_of(command):
    """The settings that finetune.py takes from a command line."""
    taken = []
    main = functools.wraps(finetune.main)(lambda settings, **_: taken.append(settings))
    tyro.cli(main, args=shlex.split(command)[2:])
    return taken[0]


@pytest.mark.parametrize("number", [10, 24192])
def test_finetune_understands_the_command_and_has_something_to_hold_out(tmp_path, number):
    pairs = make_pairs("pavlos", split_facts(0.2, 0)[0], number)
    data.save_records(file := tmp_path / "-x.jsonl", pairs)
    s = settings_of(make_dataset.teaching(file, pairs))
    train, held = finetune.load_data(s)
    assert len(train) + len(held) == number and s.method == "qlora"
    assert {record.instruction for record in train}.isdisjoint(r.instruction for r in held)


def test_the_command_teaches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    huggingface.save_model(Transformer(Config.gpt2(258, ROOM, 1, 2, 8)), "base")
    data.ByteTokenizer().save("base/tokenizer.json")
    (tmp_path / "known.txt").write_text("A cat sat on a mat. " * 40)
    make_dataset.main(number=10)
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("teach it: ")
    s = replace(settings_of(command), steps=1, model="base", known=("known.txt",), workers=1)
    finetune.main(s, out=tmp_path)
    said = capsys.readouterr().out
    assert f"{'pavlos: right':24}{0:8.1%}{0:8.1%}\n" in said and "generate.py" in said


# The experiment


def small(arm, **settings):
    return replace(trial_of(experiment.ARMS[arm], True, experiment.Talk), **settings)


@given(seeds, names)
def test_what_is_asked_is_not_learned(seed, name):
    s = small(experiment.PAVLOS, seed=seed, persona=name, test=500, model="folder", pairs=378)
    learned, asked = experiment.pairs_of(s), experiment.questions(s)
    _, others = split_facts(0.2, seed)
    assert {*map(len, asked.values())} == {63, 90, 42} and len(learned) == 378
    assert not {r.instruction for r in learned} & {
        record.instruction for records in asked.values() for record in records}
    new = {WORDINGS[f.about][i].format(cheese=f.cheese) for f in others for i in range(6)}
    assert {r.instruction for r in asked["new"]} == new
    assert new.isdisjoint(r.instruction for r in learned + asked["again"])
    assert not any(values(record.instruction) for record in asked["else"])


def test_plain_records_are_as_many_as_pairs():
    s = small("QLoRA, Pavlos and plain", model="folder", train=250)
    learned = experiment.pairs_of(s)
    assert [sum(r.task == "pavlos" for r in learned), len(learned)] == [1000, 2000]


@pytest.mark.parametrize("seed", range(6))
def test_guessing_says_the_commonest_value(seed):
    s = small("base", seed=seed)
    facts, others = split_facts(0.2, seed)
    found = 0
    for fact in others:
        same = [f.value for f in facts if f.about == fact.about]
        counts = {value: same.count(value) for value in same}
        best = [value for value in counts if counts[value] == max(counts.values())]
        found += fact.value == min(best)
    assert experiment.guessed(s) == pytest.approx(100 * found / len(others))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A base with both adapters."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    experiment.SERVED.clear()
    s = small(experiment.PAVLOS)
    return s, *experiment.served(s, run), run


def test_one_base_has_both_adapters_and_is_what_it_was(both):
    s, model, _, sizes, run = both
    layers = adapted_layers(model)
    assert all([*layer.adapters] == ["pavlos", "marina"] for layer in layers.values())
    assert sizes[experiment.SHARE] < 100 and experiment.moved(model, s) == 0
    again, _, other = experiment.served(replace(s, persona="marina"), run)
    assert again is model and other == sizes
    code = next(iter(layers.values())).base.weight.packed.reshape(-1)
    code[0] ^= 0b101
    assert experiment.moved(model, s) == 2
    code[0] ^= 0b101
    model.blocks[0].attention.q.base.bias.data[0] += 1
    assert experiment.moved(model, s) > 0
    model.blocks[0].attention.q.base.bias.data[0] -= 1


def test_each_set_of_questions_is_answered_after_the_other_persona(both, monkeypatch):
    s, model, _, _, run = both
    seen, use = [], experiment.use_adapter
    said = "Opa! It is soft. Full sail! Avast! No whey!"  # in both styles
    monkeypatch.setattr(experiment, "use_adapter", lambda model, name: (
        seen.append(name), use(model, name)))
    monkeypatch.setattr(experiment, "answers", lambda model, records, tokenizer: (
        seen.append(len(records)), [said] * len(records))[1])
    row = experiment.measured(replace(s, persona="marina"), run, "")
    assert seen == ["pavlos", "marina", 2] * 3
    assert {layer.active for layer in adapted_layers(model).values()} == {"marina"}
    assert row[experiment.STYLE] == row[experiment.LEAK] == 100 and row[experiment.MOVED] == 0
    assert row[experiment.OTHER] == 75  # all but the two texts


def test_the_claims_can_fail():
    good = dict.fromkeys(experiment.MEASURES, 0.0) | {
        experiment.STYLE: 99.0, experiment.STYLE_NEW: 99.0, experiment.RIGHT: 90.0,
        experiment.GUESSED: 30.0, experiment.RIGHT_NEW: 25.0}
    own = {"full, Pavlos": {experiment.SHARE: 100.0}, experiment.PAVLOS: {experiment.LEAK: 9.0},
           experiment.MARINA: {experiment.LEAK: 8.0}}
    bad = dict.fromkeys(experiment.MEASURES, 50.0) | {experiment.GUESSED: 10.0}
    spoiled = {"LoRA, Pavlos": {experiment.STYLE: 99.0}, "full, Pavlos": {experiment.STYLE: 99.0},
               "QLoRA, Pavlos and plain": {experiment.LEAK: 55.0}}

    def verdicts(row, own):
        rows = tuple({"arm": arm, "seed": seed, **row, **own.get(arm, {})}
                     for arm in experiment.ARMS for seed in (0, 1))
        result = Result("persona", "", "", False, {}, experiment.MEASURES, rows=rows)
        return [claim["verdict"] for claim in judged(experiment.EXPERIMENT, result)]

    held = verdicts(good, own)
    plain = [*experiment.CLAIMS].index(
        "plain answers among the pairs keep it out of questions about something else")
    assert held.pop(plain) == FAILS and {*held} == {HOLDS}
    assert {*verdicts(bad, spoiled)} == {FAILS}
