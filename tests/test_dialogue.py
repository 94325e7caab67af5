"""A text that a model goes on with, turn after turn: answers are those without a cache, and only
what is new is run, also after an interruption and where an earlier text has changed."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.block import Block
from minilm.dialogue import Dialogue, agreement
from minilm.generate import stream
from minilm.nn import Module
from minilm.transformer import Config, Transformer

SMALL = dict(vocab_size=50, context=40, layers=2, heads=2, width=16)
MODELS = {"gpt2": Transformer(Config.gpt2(**SMALL, tied=False), seed=1),
          "llama": Transformer(Config.llama(**SMALL, hidden=24, kv_heads=1), seed=2)}
turns = st.lists(st.tuples(st.lists(st.integers(0, 49), min_size=1, max_size=6),
                           st.integers(0, 4)), min_size=1, max_size=4)


def fresh(model, text, count):
    """What `stream` draws, without anything kept."""
    return [int(ids[0]) for ids in islice(stream(model, [text], 0), count)]


@pytest.mark.parametrize("name", MODELS)
@given(turns=turns)
def test_answers_are_those_of_a_fresh_text_and_only_new_tokens_are_run(name, turns):
    dialogue, text, ran = Dialogue(MODELS[name], 0), [], 0
    for message, count in turns:
        text += message
        found = list(islice(dialogue.answer(text), count))
        assert found == fresh(MODELS[name], text, count)
        kept = 0 if not count else len(text) + count - 1  # the last was drawn, not run
        assert dialogue.ran == max(ran, kept)
        ran, text = dialogue.ran, text + found


def test_no_token_is_run_twice():
    dialogue = Dialogue(MODELS["gpt2"], 0)
    text = [1, 2, 3, 4, 5]
    text += list(islice(dialogue.answer(text), 3))
    assert dialogue.ran == 5 + 2
    list(islice(dialogue.answer([*text, 6, 7]), 4))
    assert dialogue.ran == 5 + 2 + 1 + 2 + 3 == len(text) + 2 + 3


@given(first=st.lists(st.integers(0, 49), min_size=1, max_size=12), place=st.integers(0, 11),
       rest=st.lists(st.integers(0, 49), min_size=1, max_size=5))
def test_what_follows_a_changed_token_is_run_again(first, place, rest):
    model = MODELS["llama"]
    dialogue, text = Dialogue(model, 0), [*first[:place], *rest]
    list(islice(dialogue.answer(first), 3))
    ran, common = dialogue.ran, agreement(dialogue.tokens, text)
    assert list(islice(dialogue.answer(text), 3)) == fresh(model, text, 3)
    assert dialogue.ran - ran == len(text) - min(common, len(text) - 1) + 2


@pytest.mark.parametrize("block, count", [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)])
def test_an_interruption_at_any_place_leaves_it_whole(monkeypatch, block, count):
    """In the prompt's pass, or in that of a single token, between a block's cache and the next."""
    model, text = MODELS["gpt2"], [1, 2, 3]
    dialogue = Dialogue(model, 0)
    list(islice(dialogue.answer(text), 2))
    text = [*text, 9, 9, 9]
    drawn = dialogue.answer(text)
    found = list(islice(drawn, count))
    put, calls = type(dialogue.cache.layers[block]).put, []

    def interrupted(buffer, k, v):
        calls.append(buffer)
        kept = put(buffer, k, v)
        if buffer is dialogue.cache.layers[block]:
            raise KeyboardInterrupt
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(type(dialogue.cache.layers[block]), "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(drawn)
    assert len(calls) == block + 1
    text += found
    assert list(islice(dialogue.answer(text), 5)) == fresh(model, text, 5)


def test_it_ends_where_the_context_is_full():
    dialogue, model = Dialogue(MODELS["gpt2"], 0), MODELS["gpt2"]
    text = list(range(37))
    found = list(dialogue.answer(text))
    assert found == fresh(model, text, 4)  # the last follows a full context
    assert list(dialogue.answer([*text, *found[:3]])) == found[3:]
    with pytest.raises(ValueError, match="takes 41 tokens, but the model's context is 40"):
        dialogue.answer([*text, *found])
    assert list(islice(dialogue.answer([5]), 2)) == fresh(model, [5], 2)


class Looking(Module):
    """A block that a cache cannot serve: its rows depend on each other."""

    def __init__(self, block: Block):
        self.block = block

    def forward(self, x, *rest):
        return self.block(x, *rest) * x.shape[1]


def test_a_model_without_a_cache_runs_the_whole_text():
    model = Transformer(Config.gpt2(**SMALL, tied=False), seed=1)
    model.blocks[0] = Looking(model.blocks[0])
    dialogue, text = Dialogue(model, 0), [4, 5, 6]
    text += list(islice(dialogue.answer(text), 3))
    assert text[3:] == fresh(model, text[:3], 3) and dialogue.ran == 3 + 4 + 5
    assert list(islice(dialogue.answer(text), 1)) == fresh(model, text, 1)


def test_draws_go_on_from_turn_to_turn():
    def drawn(seed):
        dialogue = Dialogue(MODELS["gpt2"], 1.0, seed=seed)
        return [list(islice(dialogue.answer([1, 2]), 8)) for _ in range(2)]

    first = [int(ids[0]) for ids in islice(stream(MODELS["gpt2"], [[1, 2]], 1.0, seed=3), 8)]
    assert drawn(3) == drawn(3) and drawn(3)[0] == first != drawn(3)[1]
    assert drawn(3) != drawn(4)


@pytest.mark.parametrize("setting", [dict(temperature=-1), dict(top_k=0), dict(top_p=2),
                                     dict(seed=-1)])
def test_bad_settings_are_refused_at_once(setting):
    with pytest.raises(ValueError, match=f"bad setting {next(iter(setting))}="):
        Dialogue(MODELS["gpt2"], **setting)


@pytest.mark.parametrize("tokens", [[], [50], [-1], [1.5], [[1]]])
def test_bad_tokens_are_refused_at_once(tokens):
    with pytest.raises(ValueError, match="tokens"):
        Dialogue(MODELS["gpt2"]).answer(np.array(tokens))


def test_a_model_that_fills_in_holds_no_dialogue():
    with pytest.raises(ValueError, match="only a causal model"):
        Dialogue(Transformer(Config.bert(**SMALL, hidden=16)))
