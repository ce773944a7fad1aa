"""Streams: a bound that no enemy breaks, and an alarm that rings as seldom as it promises."""
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, kstest

from fine_tune_llm.core.errors import DataError, OverlapError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.monitor import (
    BETS,
    ExchangeabilityMonitor,
    bet,
    capital_path,
    next_p_value,
    stream_p_values,
)
from fine_tune_llm.uncertainty.online import AdaptiveConformal, adapt, miss_bound, rank_p_values
from fine_tune_llm.uncertainty.predictions import Predictions

LABELS = Labels(("a", "b", "c"))


def draw(n, name, rng, drift=0.0):
    z = rng.normal(0, 2, (n, 3))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    return Predictions([f"{name}{i}" for i in range(n)], LABELS, logits=(1 - drift) * z + drift * rng.normal(0, 3, (n, 3)), y=y)


# Adaptive conformal inference

ENEMIES = {"strange": lambda level: 1e-12, "ordinary": lambda level: 1.0, "just missed": lambda level: float(np.clip(level, 1e-12, 1)),
           "just kept": lambda level: float(np.clip(np.nextafter(level, 2), 1e-12, 1)), "mirror": lambda level: float(np.clip(1 - level, 1e-12, 1))}


@settings(max_examples=150, deadline=None)
@given(moves=st.lists(st.tuples(st.sampled_from(sorted(ENEMIES)), st.integers(1, 40)), min_size=1, max_size=20),
       alpha=st.floats(0.01, 0.99), step=st.floats(1e-3, 2))
def test_the_bound_holds_against_any_enemy(moves, alpha, step):
    level, misses, t = alpha, 0, 0
    for move, times in moves:
        for _ in range(times):
            (_, level), missed = adapt(np.array([ENEMIES[move](level)]), alpha, step, level)
            misses, t = misses + int(missed[0]), t + 1
            assert abs(misses / t - alpha) <= miss_bound(alpha, step, t) * (1 + 1e-9)
            assert -step - 1e-9 <= level <= 1 + step + 1e-9


def test_a_p_value_equal_to_the_level_is_a_miss():
    "The set holds p > alpha, so p = alpha is outside, and the two must agree."
    levels, missed = adapt(np.array([0.1, 0.1]), alpha=0.1, step=0.5, level=0.1)
    assert missed.tolist() == [True, False] and levels == pytest.approx([0.1, -0.35, -0.3])


def test_the_bound_is_the_published_formula():
    for a, g, n in ((0.1, 0.005, 1000), (0.7, 0.1, 50)): assert miss_bound(a, g, n) == pytest.approx((max(a, 1 - a) + g) / (g * n))


@settings(max_examples=50, deadline=None)
@given(past=st.lists(st.integers(0, 5), max_size=12), score=st.integers(-1, 6))
def test_p_values_by_counting(past, score):
    count = sum(s >= score for s in past) + 1
    assert rank_p_values(np.sort(np.array(past, dtype=float)), np.array([float(score)]))[0] == count / (len(past) + 1)


def test_sets_hold_the_truth_exactly_when_it_is_not_missed():
    rng = np.random.default_rng(0)
    aci = AdaptiveConformal(0.2, step=0.3).fit(draw(60, "c", rng))
    for i in range(150):
        row = draw(1, f"s{i}-", rng, drift=0.9)
        inside, before = aci.predict(row)[0, row.y[0]], aci.misses_
        assert aci.level_ > 0 or aci.predict(row).all()
        assert aci.level_ < 1 or not aci.predict(row).any()
        assert aci.update(row).misses_ - before == 1 - inside
    assert aci.rounds_ == 150 and abs(aci.misses_ / 150 - 0.2) <= miss_bound(0.2, 0.3, 150)


def test_first_sets_are_split_conformal():
    "At the level at which it starts, the set is {-log p <= s_(k)}, k = ceil((n + 1)(1 - alpha)): 91 of 100 at alpha 0.1."
    rng = np.random.default_rng(0)
    cal, test = draw(100, "c", rng), draw(500, "t", rng)
    threshold = np.sort(-cal.log_probs[np.arange(100), cal.y])[91 - 1]
    assert (AdaptiveConformal(0.1).fit(cal).predict(test) == (-test.log_probs <= threshold)).all()
    assert AdaptiveConformal(0.1).fit(cal.take(np.arange(8))).predict(test).all()  # 8 rows are too few for 0.1


def test_coverage_on_a_calm_stream_and_a_drifting_one():
    rng = np.random.default_rng(1)
    for drift in (0.0, 0.8):
        aci = AdaptiveConformal(0.1).fit(draw(500, "c", rng)).update(draw(500, "w", rng, drift))
        before = aci.misses_
        aci.update(draw(3000, "s", rng, drift))
        assert abs((aci.misses_ - before) / 3000 - 0.1) < 0.02


def test_states_survive_their_files(tmp_path):
    rng = np.random.default_rng(2)
    cal, stream, more = draw(50, "c", rng), draw(80, "s", rng, 0.9), draw(80, "m", rng)
    for e in (AdaptiveConformal(0.1), ExchangeabilityMonitor(0.05, jump=0.02, seed=3), ExchangeabilityMonitor(of="confidence")):
        e.fit(cal).update(stream).save(tmp_path / "e.json")
        again = type(e).load(tmp_path / "e.json")
        assert again.to_dict() == e.to_dict() and again.update(more).to_dict() == e.update(more).to_dict() and repr(again) == repr(e)
        json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)
        with pytest.raises(DataError, match="missing value"): type(e).from_dict({k: v for k, v in e.to_dict().items() if k != "ids"})


# The monitor

def test_p_value_by_counting():
    rng = np.random.default_rng(0)
    past = sorted(rng.integers(0, 4, 30).astype(float))
    for score in (-1.0, 0.0, 2.0, 5.0):
        higher, equal = sum(s > score for s in past), sum(s == score for s in past)
        assert next_p_value(past, score, 0.3) == (higher + 0.3 * (equal + 1)) / 31
    grown = list(past)
    stream_p_values(grown, np.array([5.0, -1.0, 2.0]), np.zeros(3))
    assert grown == sorted([*past, 5.0, -1.0, 2.0])


def test_p_values_of_an_exchangeable_stream_are_independent_and_uniform():
    "Scores with many ties: over 60 streams the KS test itself is uniform, and neighbours fill a 4 x 4 grid evenly."
    levels, grid = [], np.zeros((4, 4))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scores = np.round(rng.normal(size=430), 1)
        p = stream_p_values(sorted(scores[:30]), scores[30:], rng.random(400))
        levels.append(kstest(p, "uniform").pvalue)
        grid += np.histogram2d(p[1::2], p[::2], bins=4, range=[[0, 1]] * 2)[0]
    assert kstest(levels, "uniform").pvalue > 0.001
    assert ((grid - 750) ** 2 / 750).sum() < 37.7  # chi square, 15 degrees of freedom, 0.001; 12,000 pairs in 16 fields
    fixed = [next_p_value(sorted(scores[:30]), s, u) for s, u in zip(scores[30:], rng.random(400), strict=True)]
    assert kstest(fixed, "uniform").pvalue < 1e-6  # a fixed past is found out


@pytest.mark.parametrize("jump", [0.001, 0.01, 0.2])
def test_the_game_is_fair_and_never_below_its_floor(jump):
    "The mean of the capital over uniform p is what it was (a line in p: the mean of its ends); the idle player keeps (1 - jump)."
    stakes = np.array([.1, .2, .05, .4, .25])
    assert np.mean([bet(stakes, p, jump)[1] for p in (0.0, 1.0)]) == pytest.approx(1, abs=1e-12)
    for seed in range(5):
        path, last = capital_path(np.random.default_rng(seed).beta(0.5, 0.5, 400), np.full(5, 0.2), jump)
        assert (path >= np.log(0.2) + np.arange(1, 401) * np.log(1 - jump) - 1e-9).all() and last.sum() == pytest.approx(1)
    assert (1 + BETS * 0.5 >= 0).all() and (1 - BETS * 0.5 >= 0).all()


def test_false_alarms_are_as_rare_as_promised():
    "300 exchangeable streams of 200 rows, watched to the end: no more alarms than Ville allows, by a binomial test at 0.001."
    rng, rang = np.random.default_rng(4), 0
    for _ in range(300):
        monitor = ExchangeabilityMonitor(false_alarm=0.1).fit(draw(40, "c", rng)).update(draw(200, "s", rng))
        rang += monitor.alarm_ is not None
        assert (monitor.alarm_ is not None) == (monitor.log_peak_ >= np.log(10))
    assert rang <= binom.isf(0.001, 300, 0.1)


@pytest.mark.parametrize("of", ["truth", "confidence"])
def test_a_planted_shift_is_found(of):
    rng = np.random.default_rng(5)
    monitor = ExchangeabilityMonitor(of=of).fit(draw(300, "c", rng)).update(draw(300, "calm", rng))
    assert monitor.alarm_ is None
    z = draw(400, "odd", rng)
    monitor.update(replace(z, logits=z.logits / 4 if of == "confidence" else -z.logits))
    assert monitor.alarm_.startswith("odd") and int(monitor.alarm_[3:]) < 200
    first = monitor.alarm_
    assert monitor.update(draw(10, "later", rng)).alarm_ == first


def test_better_than_before_rings_too():
    rng = np.random.default_rng(6)
    z = draw(800, "s", rng)
    sure = replace(z, logits=np.where(np.arange(3) == z.y[:, None], 9.0, 0.0))
    assert ExchangeabilityMonitor().fit(draw(300, "c", rng)).update(sure).alarm_ is not None


def test_a_row_is_played_once():
    rng = np.random.default_rng(7)
    cal, stream = draw(50, "c", rng), draw(50, "s", rng)
    monitor = ExchangeabilityMonitor().fit(cal).update(stream)
    for again in (cal, stream, stream.take([3])):
        with pytest.raises(OverlapError, match="the monitor were already used by"): monitor.update(again)
    with pytest.raises(OverlapError, match="used by training"): ExchangeabilityMonitor().fit(replace(cal, split="train"))
    with pytest.raises(OverlapError, match="used by temperature"): AdaptiveConformal().fit(cal.used_by("temperature", ["c3"]))
    with pytest.raises(OverlapError, match="the stream"): AdaptiveConformal().fit(cal).predict(cal)
