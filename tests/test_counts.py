"""minilm.measure.counts: the formulas count what the methods train, and give the slides' counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_methods import CONFIGS

from minilm.measure import counts
from minilm.measure.lecture_numbers import kinds
from minilm.measure.step import KINDS, METHODS, parameters
from minilm.peft import add_adalora, add_bitfit, add_bottleneck, add_dora, add_lora, train_top
from minilm.transformer import Config, Transformer


def trained(model):
    return sum(p.size for p in model.parameters())


@pytest.mark.parametrize("family", CONFIGS)
@given(m=st.integers(1, 5), form=st.sampled_from("HPL"), skip=st.integers(0, 1),
       norms=st.booleans(), targets=st.sampled_from([("q", "v"), ("k", "down"), "all-linear"]))
def test_the_formulas_are_what_is_trained(family, m, form, skip, norms, targets):
    c, norms = CONFIGS[family], norms and form == "H"
    def model(): return Transformer(c)
    for count, add in ((counts.lora, add_lora), (counts.dora, add_dora),
                       (counts.adalora, add_adalora)):
        assert count(c, m, targets) == trained(add(model(), m, 1, targets))
    assert counts.bottleneck(c, m, form, skip, norms) == trained(
        add_bottleneck(model(), m, form, skip, norms))
    assert counts.bitfit(c) == trained(add_bitfit(model()))
    for k in (1, 2):
        assert counts.top(c, k) == trained(train_top(model(), k))


@pytest.mark.parametrize("row", counts.ROWS, ids=lambda row: f"{row.model}, {row.method}")
def test_the_slides(row):
    """With the slide's digits, but for three that say why."""
    digits = len(row.slide.partition(".")[2])
    assert (f"{row.count() / 1e6:.{digits}f}" == row.slide) == (not row.why)


def test_the_numbers_themselves():
    gpt3, m = counts.GPT3, counts.GPT2_M
    assert [row.count() for row in counts.ROWS[:7]] == [  # of which the slides have few digits
        12 * 2 * 8 * 2 * 768, 12 * (2 * 768 * 16 + 16 + 768), 12 * (2 * 768 * 48 + 48 + 768),
        24 * 2 * 8 * 2 * 1024, 24 * (2 * 1024 * 16 + 16 + 1024), 48 * (2 * 1024 * 8 + 8 + 1024),
        48 * 2 * 16 * 2 * 1536]
    assert [counts.bottleneck(gpt3, r) for r in (1, 8)] == [7_078_080, 40_109_568]
    assert [counts.lora(gpt3, r) for r in (1, 8)] == [4_718_592, 37_748_736]
    assert counts.bitfit(gpt3) == 11 * 12288 * 96 + 12288 == 12_988_416
    assert 12 * 12288 * 96 == 14_155_776  # the slide's 14.2M
    assert counts.top(m, 2) == 25_192_448 + 2 * 1024  # 25.19M with the last norm and without
    assert [counts.bottleneck(m, r, "L") for r in (6, 224)] == [368_784, 11_089_152]
    assert counts.lora(m, 4) == 393_216 and int(parameters(m) / 1e5) == 3548  # 0.1 % are 0.35M


@given(C=st.integers(1, 50), m=st.integers(1, 9), places=st.integers(1, 9))
def test_the_papers_formula(C, m, places):
    """|Theta| = L_adpt (2 d r + r + d) + 2 L_LN d, section 5.1 of Hu et al."""
    c = Config.gpt2(9, 8, layers=places, heads=1, width=C)
    assert counts.bottleneck(c, m, "P") == places * (2 * C * m + m + C)
    assert counts.bottleneck(c, m, norms=True) == 2 * places * (2 * C * m + m + C) + 4 * places * C


def test_no_m_gives_the_slides_adapter_h():
    found = np.array([counts.bottleneck(counts.GPT2_M, m, norms=norms) / 1e6
                      for m in range(1, 300) for norms in (False, True)])
    assert np.abs(found - 11.09).min() > 0.02


def test_every_method_but_full_is_of_one_kind():
    """The lecture's three, "additive, selective, reparameterization"."""
    found = [method for methods in KINDS.values() for method in methods]
    assert len(KINDS) == 3 and sorted(["full", *found]) == sorted(METHODS)


def test_what_each_kind_trains():
    m = counts.GPT2_M
    trained = {method: (kind, int(n.replace(",", ""))) for kind, method, n, _ in kinds()[1:]}
    assert trained["top"] == ("selective", counts.top(m, 2))
    assert trained["bitfit"] == ("selective", counts.bitfit(m))
    assert trained["ia3"] == ("additive", counts.ia3(m)) == ("additive", 24 * (1024 + 1024 + 4096))
    assert trained["prompt"] == ("additive", 16 * 1024)
    assert trained["lora"] == ("reparametrised", counts.lora(m, 8))
    assert trained["lora"][1] / parameters(m) == pytest.approx(0.00222, abs=5e-6)
    assert kinds()[7][1:] == ["lora", "786,432", "0.222%"]
