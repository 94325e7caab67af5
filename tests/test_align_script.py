"""Rollouts with the cache, rounds, rewards in folders, and scripts/align.py for its user."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from align import Settings, curves, draw, main
from hypothesis import given
from hypothesis import strategies as st

from minilm import aligning, data, ops
from minilm.align import PPO, Reward, Rounds, draw_answers, reference_of, reward_model, value_head
from minilm.align.rollouts import answers_of, rollouts
from minilm.asking import compared, judged
from minilm.data.preferences import Comparison, holds_comparisons, load_comparisons, ranked
from minilm.files import FormatError
from minilm.interop import bitsandbytes, load_adapter, load_model, save_model
from minilm.optim import AdamW
from minilm.peft import add_lora
from minilm.peft.adapted import adapted_layers
from minilm.quantize import quantize_model
from minilm.rewards import reward_of, save_reward
from minilm.run import RunDirectory
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

SIZES = dict(layers=2, heads=2, width=8, hidden=12)
SMALL = dict(prompt=4, tokens=5, test=4, batch=4, steps=6, eval_every=3, save_every=3, workers=1,
             comparisons=12, r=2)


def model_of(vocab=11, seed=0, family=Config.llama):
    sizes = SIZES if family == Config.llama else {k: v for k, v in SIZES.items() if k != "hidden"}
    model = Transformer(family(vocab_size=vocab, context=32, **sizes), seed)
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += 0.3 * rng.standard_normal(p.shape, dtype=np.float32)
    return model.eval()


def zero(tokens, counted): return np.zeros(len(tokens))


@pytest.mark.parametrize("family", [Config.llama, Config.gpt2])
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99),
       end=st.none() | st.integers(0, 10), most=st.integers(1, 6))
def test_answers_with_the_cache_are_those_without(family, sizes, seed, end, most):
    model, rng = model_of(family=family), np.random.default_rng(seed)
    prompts = [rng.integers(0, 11, n) for n in sizes]
    tokens, counted = draw_answers(model, prompts, most, end, seed)
    again = draw_answers(model, prompts, most, end, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["minilm.align.rollouts"], "caches", lambda model: False)
        slow = draw_answers(model, prompts, most, end, seed)
    for other in (again, slow):
        assert (tokens == other[0]).all() and (counted == other[1]).all()
    for row, prompt, answer in zip(tokens, prompts, answers_of(tokens, counted)):
        assert (row[: len(prompt)] == prompt).all()
        assert (row[len(prompt) : len(prompt) + len(answer)] == answer).all()
        ended = np.flatnonzero(answer == end) if end is not None else []
        assert len(answer) == (ended[0] + 1 if len(ended) else most)  # the end masks all after it
        assert (row[len(prompt) + len(answer) :] == (end or 0)).all()


@pytest.mark.parametrize("cached", [True, False])
def test_answers_are_drawn_as_the_policy_finds_them_likely(cached, monkeypatch):
    """Of 4000 answers of one token, the share of each is its probability: temperature 1."""
    monkeypatch.setattr(sys.modules["minilm.align.rollouts"], "caches", lambda model: cached)
    model = model_of()
    for p in model.parameters():
        p.data *= 2  # so that the tokens are not equally likely
    tokens, _ = draw_answers(model, [[1]] * 4000, 1, None)
    p = ops.softmax(model(np.array([[1]]))).data[0, -1]
    found = np.bincount(tokens[:, 1], minlength=11) / 4000
    assert np.abs(found - p).max() < 0.03 < np.ptp(p) / 3


def test_a_number_is_not_minus_zero(monkeypatch):
    """A KL that is estimated may be below 0, by less than is shown."""
    found = SimpleNamespace(tokens=np.array([[1, 2]]), counted=np.array([[True]]),
                            told=lambda: {"reward": 0.5, "kl": -1e-5, "length": -0.001})
    monkeypatch.setattr(aligning, "rollouts", lambda *args, **settings: found)
    _, line = aligning.answered(model_of(), SimpleNamespace(seed=0, tokens=1), SimpleNamespace(
        held_out=[np.array([1])]), data.ByteTokenizer(), zero)
    assert line.startswith("reward 0.500, kl 0.000, length -0.001, ")


def test_rollouts_know_both_models():
    model = add_lora(model_of(), r=2, alpha=4)
    base = model_of()
    for p in model.parameters():
        p.data += np.float32(0.5)
    r = rollouts(model, [[1, 2], [3]], 4, None, 0, score=zero)
    for found, by in ((r.log_probs, model), (r.reference, base)):
        log_p = ops.log_softmax(by(r.tokens[:, :-1])).data
        chosen = np.take_along_axis(log_p, r.tokens[:, 1:, None], -1)[..., 0]
        assert np.allclose(found, np.where(r.counted, chosen, 0), atol=1e-5)
    assert r.told()["kl"] != 0
    with pytest.raises(KeyError), reference_of(model):
        raise KeyError
    assert {layer.active for layer in adapted_layers(model).values()} == {"default"}
    with pytest.raises(ValueError, match="without adapters needs a frozen copy"), \
            reference_of(base):
        pass
    with pytest.raises(ValueError, match="do not fit the model's context of 32"):
        draw_answers(base, [[1] * 30], 3, None)
    with pytest.raises(ValueError, match="must be 1 finite numbers"):
        rollouts(model, [[1]], 2, None, score=lambda *_: [np.nan])


def taught(beta, value=0.1, steps=240):
    """A bandit: one token, whose reward is known. (the policy, the reference, the rewards)."""
    model, frozen = model_of(5), model_of(5).freeze()
    reward, head = np.array([0.0, 1.0, 0.5, -1.0, 0.2]), value_head(8)
    loss = PPO(head, beta=beta, lam=1.0, value=value)
    rounds = Rounds(model, [[1]] * 256, loss, score=lambda t, c: reward[t[:, 1]], batch=256, most=1,
                    end=None, seed=0, parts=1, head=head, frozen=frozen)
    params = model.parameters() + (head.parameters() if value else [])
    optimizer = AdamW(params, 5e-3, (0.9, 0.95), weight_decay=0.0)
    with Trainer(model, optimizer, loss=loss) as trainer:
        for step in range(steps):
            trainer.step(step, rounds[step], 5e-3 * (1 - step / steps), clip=1.0)
    p, q = (ops.softmax(m(np.array([[1]]))).data[0, 0].astype(float) for m in (model, frozen))
    return p, q, reward


def test_a_bandit_reaches_its_known_optimum():
    p, q, reward = taught(beta=0.5)
    best = q * np.exp(reward / 0.5)  # Rafailov, eq. (4)
    best /= best.sum()
    assert np.abs(p - best).sum() < 0.12 < np.abs(p - q).sum()


def test_where_kl_is_very_dear_the_policy_stays():
    """The critic is left out: it shares the policy's body, and moves it for returns so large."""
    p, q, _ = taught(beta=1e4, value=0.0)
    assert np.abs(p - q).sum() < 0.12


@given(seed=st.integers(0, 99), sharpness=st.sampled_from([0.5, 2.0]))
def test_made_labels_are_bradley_terrys(seed, sharpness):
    rng, n = np.random.default_rng(seed), 2000
    wins = sum(ranked([0.3, -0.4], sharpness, rng)[0] == 0 for _ in range(n))
    p = 1 / (1 + np.exp(-sharpness * 0.7))
    assert abs(wins - n * p) < 6 * np.sqrt(n * p * (1 - p))
    assert ranked([0.1, 0.3, 0.2], np.inf, rng).tolist() == [1, 2, 0]


def test_comparisons_are_ranked_and_drawn_in_parts(monkeypatch):
    """Each prompt has its own answers, the best first, however many are drawn at a time."""
    monkeypatch.setattr("minilm.asking.DRAWN", 4)
    settings = SimpleNamespace(answers=3, tokens=3, sharpness=np.inf)
    prompts = [np.array(prompt) for prompt in ([1, 2], [3], [4, 5])]
    def score(tokens, counted): return (tokens[:, 1:] * counted).sum(-1)
    found = compared(model_of(), prompts, score, settings, None, [0])
    assert found.tokens.shape == (3, 3, 5) and (found.counted.sum(-1) == 3).all()
    for prompt, texts, counted in zip(prompts, *found):
        assert (texts[:, : len(prompt)] == prompt).all()
        scores = score(texts, counted)
        assert (np.diff(scores) <= 0).all() and np.ptp(scores)


def test_equal_rewards_are_half_right():
    assert judged(np.array([[1.0, 1.0], [2.0, 1.0]]))["right"] == 0.75


def test_comparisons_of_a_file(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert load_comparisons(file) == [Comparison("a", "b", "c")]
    for bad, said in (('{"prompt": "a", "chosen": "b"}', "rejected: the field is missing"),
                      ('{"prompt": "a", "chosen": "b", "rejected": "c", "x": 1}',
                       "'x': the field is unknown, expected prompt, chosen, rejected"),
                      ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "are the same"),
                      ('{"prompt": "", "chosen": "b", "rejected": "c"}', "prompt: the text is"),
                      ('{"prompt": 1, "chosen": "b", "rejected": "c"}', "expected str, got int")):
        file.write_text(bad)
        with pytest.raises(FormatError, match=f"line 1: .*{said}"):
            load_comparisons(file)


@pytest.mark.parametrize("name, line, holds", [
    ("a.jsonl", '{"prompt": "a"}', True), ("a.json", '{"chosen": "a"}', True),
    ("a.jsonl", '{"text": "a"}', False), ("a.txt", "a text of its own", False),
    ("a.jsonl", "{broken", True), ("a.jsonl", '{"text": "a", "chosen": "b"}', True)])
def test_what_a_file_holds_is_seen_by_its_fields(tmp_path, name, line, holds):
    (tmp_path / name).write_text(line)
    assert holds_comparisons(tmp_path / name) == holds
    assert not holds_comparisons(tmp_path) and not holds_comparisons(tmp_path / "none.jsonl")


@pytest.fixture
def folder(tmp_path):
    save_model(model_of(258), tmp_path / "base", data.ByteTokenizer())
    data.ByteTokenizer().save(tmp_path / "base" / "tokenizer.json")
    return tmp_path / "base"


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(0).choice(["The", "cat", "sat", "on", "a", "mat.\n"], 300)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return str(tmp_path / "text.txt")


def test_a_reward_model_of_another_vocabulary_is_refused(tmp_path, folder):
    tokenizer, model = data.ByteTokenizer(), load_model(folder)
    save_reward(Reward(reward_model(model_of(300)), 1.0, 2.0), tmp_path / "other", tokenizer)
    with pytest.raises(ValueError, match=r"vocabulary of 300 tokens, but .* one of 258"):
        reward_of(str(tmp_path / "other"), folder, model, tokenizer)
    save_reward(Reward(reward_model(model_of(258)), 1.0, 2.0), tmp_path / "same", tokenizer)
    data.ByteTokenizer().save(tmp_path / "same" / "tokenizer.json")
    again = reward_of(str(tmp_path / "same"), folder, model, tokenizer)
    assert (again.mean, again.sd) == (1.0, 2.0)
    data.CharTokenizer("abc").save(tmp_path / "same" / "tokenizer.json")
    with pytest.raises(ValueError, match="different tokenizers"):
        reward_of(str(tmp_path / "same"), folder, model, tokenizer)
    with pytest.raises(ValueError, match="neither a folder nor one of vowels"):
        reward_of("nothing", folder, model, tokenizer)
    with pytest.raises(ValueError, match=r"base holds no reward model, as reward\.json is"):
        reward_of(str(folder), folder, model, tokenizer)


def kept(run):
    """Every bit that a run has learned, and its records without the times."""
    files = {p.relative_to(run).as_posix(): p.read_bytes() for p in run.glob("*/*.safetensors")}
    return files, [{k: v for k, v in r.items() if k != "seconds"}
                   for r in RunDirectory(run).records()]


@pytest.mark.parametrize("method, more", [
    ("ppo", dict(ptx=0.1)), ("ppo", dict(value=0.0)), ("grpo", dict(group=2)),
    ("dpo", {}), ("reward", dict(answers=3))])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, folder, text, method, more, monkeypatch,
                                                 capsys):
    """It is killed in its fifth step; the checkpoint is of the third, within a round."""
    if "ptx" in more:
        more = dict(replay_from=(text,), **more)
    s = Settings(model=str(folder), data=text, method=method, **SMALL, **more)
    main(s, tmp_path / "whole")
    whole, said = tmp_path / "whole" / f"align-{method}-1", capsys.readouterr().out
    log = RunDirectory.log

    def killed(run, **record):
        log(run, **record)
        if record["step"] == 5:
            raise SystemExit
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunDirectory, "log", killed)
        main(s, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr("minilm.asking.compared", None)  # it draws no comparisons again
        main(resume=tmp_path / "killed" / f"align-{method}-1")
    assert kept(tmp_path / "killed" / f"align-{method}-1") == kept(whole)
    assert "before     after" in said and f"curves: {whole / 'curves.png'}" in said
    assert (whole / "curves.png").read_bytes() == (
        tmp_path / "killed" / f"align-{method}-1" / "curves.png").read_bytes()
    if method == "reward":
        assert "pairs: right" in said and (whole / "reward" / "reward.json").exists()
        assert load_model(whole / "reward").config.labels == ("reward",)
    else:
        assert "answers: kl" in said
        assert any(p.data.any() for p in load_adapter(load_model(folder), whole / "adapter")
                   .parameters())


@pytest.mark.parametrize("change, words", [
    (None, None),  # as of a run of an earlier version: it draws them again
    (lambda t: t.pop("compared.tokens"), r"d\.tokens is float64 \(0,\), expected int64"),
    (lambda t: t.update({"compared_held_out.counted": np.ones(3)}), "counted is float64"),
    (lambda t: t["compared.tokens"].put(0, 258), "must be at least 0 and below 258"),
])
def test_comparisons_that_a_run_keeps_are_looked_at(tmp_path, folder, text, change, words):
    s = Settings(model=str(folder), data=text, method="dpo", **SMALL)
    main(s, tmp_path)
    run = tmp_path / "align-dpo-1"
    tensors, whole = read_tensors(file := run / "comparisons.safetensors"), kept(run)
    if not change:
        file.unlink()
        main(resume=run)
        assert kept(run) == whole
        return
    change(tensors)
    write_tensors(file, tensors)
    with pytest.raises(FormatError, match=words):
        main(resume=run)


def test_comparisons_of_a_file_are_not_kept_twice(tmp_path, folder):
    lines = [f'{{"prompt": "{i}", "chosen": "a", "rejected": "b"}}' for i in range(12)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    s = Settings(model=str(folder), data=str(tmp_path / "c.jsonl"), method="dpo", lr=1e-3,
                 **SMALL | {"steps": 1})
    main(s, tmp_path)
    assert not [*(tmp_path / "align-dpo-1").glob("*.safetensors")]


RECORDS = [  # of PPO, of which a round takes two steps
    {"step": 0, "answers": {"reward": 0.1, "kl": 0.0, "length": 5.0, "entropy": 2.0}},
    {"step": 1, "loss": 0.5, "reward": 0.2, "kl": 0.01, "length": 5.0, "entropy": None},
    {"step": 2, "loss": 0.4},
    {"step": 2, "answers": {"reward": 0.3, "kl": 1e200, "length": 4.0, "entropy": 1.0}}]


def test_a_rounds_numbers_are_of_the_policy_before_its_first_step():
    assert curves(RECORDS, "answers", "reward") == ([(0, 0.2)], [(0, 0.1), (2, 0.3)])
    assert curves(RECORDS, "answers", "kl") == ([(0, 0.01)], [(0, 0.0)])  # 1e200 is no place
    assert curves(RECORDS, "answers", "entropy") == ([], [(0, 2.0), (2, 1.0)])
    assert curves(RECORDS, "pairs", "loss") == ([(0, 0.5), (1, 0.4)], [])


@pytest.mark.parametrize("looked, panels", [
    ({"answers": {"kl": 0.0, "length": 3.0}}, ["KL (nats an answer)", "length (tokens)"]),
    ({"pairs": {"right": 1.0, "loss": 0.1}}, ["pairs in the right order", "loss (nats a pair)"]),
    ({"answers": {"reward": None}}, [])])
def test_the_picture_has_a_panel_for_each_number(tmp_path, looked, panels, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    run, drawn = RunDirectory.create(tmp_path, "align-ppo", {}, []), []
    for step in (0, 3):
        run.log(step=step, **looked)
    savefig = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda *a, **k: (drawn.append(a[0]), savefig(*a, **k)))
    assert draw(run) == run.path / "curves.png" and (run.path / "curves.png").stat().st_size > 999
    assert [axes.get_ylabel() for axes in drawn[0].axes if axes.axison and panels] == panels
    for axes in drawn[0].axes[: len(panels)]:
        assert [[*line.get_xdata()] for line in axes.lines] == [[0], [0, 3]]


@pytest.mark.parametrize("changes, given, said", [
    (dict(method="dpo", ptx=0.1), {"ptx"}, "ptx is given, but the method is dpo"),
    (dict(method="dpo", beta=0.0), set(), "beta must be positive for dpo"),
    (dict(replay_from=("x",)), {"replay_from"}, "ptx is 0")])
def test_settings_that_mean_nothing_are_refused(folder, text, changes, given, said):
    with pytest.raises(ValueError, match=said):
        main(Settings(model=str(folder), data=text, **changes), given=frozenset(given))


def test_dpo_learns_from_a_file_and_keeps_a_model(tmp_path, folder):
    file = tmp_path / "c.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}", "chosen": "good", "rejected": "bad"}}\n'
                            for i in range(12)))
    main(Settings(model=str(folder), data=str(file), method="dpo", merged=True, lr=1e-2,
                  **SMALL | dict(steps=30)), tmp_path / "runs")
    records = RunDirectory(tmp_path / "runs" / "align-dpo-1").records()
    looks = [r for r in records if "pairs" in r]
    assert looks[-1]["pairs"]["right"] == 1 and looks[0]["pairs"]["right"] == 0.5
    assert "reward" not in looks[-1]["answers"]
    load_model(tmp_path / "runs" / "align-dpo-1" / "model")


def test_ppo_asks_the_prompts_of_a_file(tmp_path, folder):
    file = tmp_path / "c.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}", "chosen": "good", "rejected": "bad"}}\n'
                            for i in range(24)))
    s = Settings(model=str(folder), data=str(file), reward="vowels", **SMALL)
    main(s, tmp_path / "runs")
    records = RunDirectory(tmp_path / "runs" / "align-ppo-1").records()
    assert all(0 <= r["answers"]["reward"] <= 1 for r in records if "answers" in r)


@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo", "reward"])
@pytest.mark.parametrize("own", [True, False])
def test_what_does_not_fit_the_model_is_refused_before_a_run_begins(tmp_path, folder, text, method,
                                                                    own):
    file = tmp_path / "c.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}{"x" * 30}", "chosen": "yes", "rejected": "no"}}\n'
                            for i in range(24)))
    s = Settings(model=str(folder), data=str(file) if own else text, method=method,
                 **SMALL | dict(prompt=30))
    with pytest.raises(ValueError, match=r"a text of \d+ tokens.* must fit the model's context of"):
        main(s, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_an_answer_that_does_not_fit_is_refused_before_a_run_begins(tmp_path, folder, method):
    file = tmp_path / "c.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}", "chosen": "{"x" * 40}", "rejected": "no"}}\n'
                            for i in range(24)))
    with pytest.raises(ValueError, match=r"c.jsonl: line 1: a text of 4\d tokens must fit the mod"):
        main(Settings(model=str(folder), data=str(file), method=method, **SMALL), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_reward_model_of_a_quantized_base_is_refused(tmp_path, text):
    model = quantize_model(Transformer(Config.gpt2(258, 32, 1, 2, 64), 0), "nf4")
    bitsandbytes.save_model(model, tmp_path / "base", data.ByteTokenizer())
    s = Settings(model=str(tmp_path / "base"), data=text, method="reward", **SMALL)
    with pytest.raises(ValueError, match="base is quantized, and a reward model learns in all of"):
        main(s, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_file_of_few_comparisons_names_the_option(tmp_path, folder):
    (tmp_path / "c.jsonl").write_text('{"prompt": "p", "chosen": "yes", "rejected": "no"}\n' * 4)
    s = Settings(model=str(folder), data=str(tmp_path / "c.jsonl"), method="dpo", **SMALL)
    with pytest.raises(ValueError, match=r"4 of the comparisons .*jsonl has 4: give a smaller"):
        main(s, tmp_path / "runs")


def test_a_reward_model_of_a_file_is_scaled_by_answers_of_any_length(tmp_path, folder):
    """A long prompt leaves room for short answers only, so --tokens is no idle option."""
    (tmp_path / "c.jsonl").write_text("".join(
        f'{{"prompt": "p{i:02}{"x" * 24}", "chosen": "yes", "rejected": "no"}}\n'
        for i in range(12)))
    s = Settings(model=str(folder), data=str(tmp_path / "c.jsonl"), method="reward",
                 **SMALL | dict(tokens=3))
    main(s, tmp_path / "runs", given={"tokens"})
    assert (tmp_path / "runs" / "align-reward-1" / "reward" / "reward.json").exists()
