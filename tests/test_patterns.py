"""minilm.interop.patterns: Python's own matching, in this process or in another, with an end."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.interop import patterns
from minilm.interop.patterns import found, match

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "model.norm", "lm_head"]


@given(st.lists(st.text("^amodelyrs.q_-01", max_size=12), max_size=4),
       st.sampled_from([None, r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."]))
def test_plain_ones_need_no_process(expressions, form):
    """^ stands in front alone; elsewhere it would need one."""
    expressions = [e[0] + e[1:].replace("^", "") if e else e for e in expressions]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns.subprocess, "run", None)
        assert match(expressions, NAMES, form) == found(expressions, NAMES, form)


def test_the_whole_name_or_the_beginning_of_the_form():
    evens = r".*\.(q|up)_proj"
    assert match([evens, "model"], NAMES) == {evens: dict.fromkeys(NAMES[:2], ""), "model": {}}
    assert match(["lay[e]rs"], NAMES, r".*?\.{}\.(?P<idx>\d+)\.") == {
        "lay[e]rs": {NAMES[0]: "0", NAMES[1]: "11"}}
    # as it stands, without brackets around it: then a | ends the form
    assert match(["x|model"], NAMES, r"(^|.*\.){}$") == {"x|model": {}}
    assert match(["model|x"], NAMES, r"(^|.*\.){}$") == {"model|x": dict.fromkeys(NAMES[:3], "")}
    assert match(["(?i)LM_HEAD"], NAMES)["(?i)LM_HEAD"] == {"lm_head": ""}


@pytest.mark.parametrize("wrong", ["(", "*", "a{3,1}", r"\p", "(?P<x", "(" * 3000])
def test_no_expression(wrong):
    with pytest.raises(ValueError, match="is no regular expression"):
        match([wrong], NAMES)


def test_a_long_one_is_ended(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.4)
    evil = r"(.*.*)*!"
    with pytest.raises(ValueError, match=r"takes more than 0\.4 seconds"):
        match([evil], NAMES)
    assert re.compile(evil)  # it is a right one


def test_a_process_that_dies_says_nothing_itself(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(patterns, "__file__", str(tmp_path / "absent.py"))
    with pytest.raises(ValueError, match="needs too much memory"):
        match(["a|b"], NAMES)
    assert capfd.readouterr() == ("", "")
