"""Contracts of the metrics: toys by hand, theory, slow implementations straight from the definitions, and properties."""
import copy
import json
import pickle
from fractions import Fraction
from functools import partial
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct
from scipy.special import erfinv

from fine_tune_llm.core.errors import ConfigurationError, DataError, FineTuneLLMError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty import metrics
from fine_tune_llm.uncertainty.calibration_error import error_size, null_gaps, null_gaps_rows, resampled, resampled_rows
from fine_tune_llm.uncertainty.metrics import CalibrationState, Estimate, Interval
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.reliability import binned, outcomes, sums_of
from fine_tune_llm.uncertainty.selective import ranking
from fine_tune_llm.uncertainty.smooth_ece import CELLS, fixed_width, on_grid
from fine_tune_llm.uncertainty.streaming import bin_sums

LABELS = Labels(("a", "b", "c"))
EVERY = ["accuracy", "top_k_accuracy", "f1", "nll", "brier", "ece", "mce", "classwise_ece", "smooth_ece",
         "aurc", "eaurc", "augrc", "prr", "risk_at_coverage", "coverage_at_risk"]
CALIBRATION = ["ece", "mce", "classwise_ece", "smooth_ece"]
SELECTIVE = ["aurc", "eaurc", "augrc", "prr", "risk_at_coverage", "coverage_at_risk"]
quick = settings(max_examples=40, deadline=None, derandomize=True)


def measure(name, *args, **named):
    """Few draws where nothing depends on their number."""
    return getattr(metrics, name)(*args, **({"n_boot": 25} if name == "smooth_ece" else {}), **named)


def from_arrays(confidence, right):
    """Two classes would put a confidence below 1/2 second, so the rest is shared by three others."""
    c = np.asarray(confidence, dtype=float)
    probs = np.concatenate([c[:, None], np.repeat((1 - c)[:, None] / 3, 3, axis=1)], axis=1)
    return Predictions(np.arange(len(c)), Labels(tuple("pqrs")), probs=probs, y=np.where(right, 0, 1))


def draw(n=300, seed=0, scale=1.5, dtype=np.float64):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, 3))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    return Predictions(np.arange(n), LABELS, logits=(scale * z).astype(dtype), y=y)


ROWS = st.lists(st.tuples(st.one_of(st.floats(0.25, 1), st.sampled_from([0.25, 0.4, 0.5, 0.8, 0.9, 1.0])), st.booleans()), min_size=1, max_size=30)


# An estimate is a float, and more

def test_an_estimate_is_a_float_that_keeps_its_interval_through_copies():
    e = Estimate(0.25, 0.1, 0.4, n=9, name="x", null=0.3)
    for again in (e, copy.copy(e), copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        assert again == 0.25 and again.interval == (0.1 + 0.15, 0.1, 0.4) and (again.n, again.name, again.null) == (9, "x", 0.3)
    assert json.loads(json.dumps({"e": e})) == {"e": 0.25} and 4 * e == 1 and f"{e:.1f} {e}" == "0.2 0.250 [0.100, 0.400]"


def test_zero_is_an_estimate_too():
    assert Estimate(0.0, 0.0, 0.1, n=30) and Estimate(0.0, 0.0, 0.1, n=30) == 0
    assert not [e for e in (None, Estimate(0.0, 0, 0, 1)) if e is None and e]


@pytest.mark.parametrize("name", EVERY)
def test_two_forms(name):
    metric, preds = partial(measure, name), draw()
    plain, three = metric(preds), metric(preds, interval=True)
    assert isinstance(plain, float) and isinstance(three, Interval) and plain.interval == three == (plain.value, plain.low, plain.high)
    assert plain.low <= plain <= plain.high and plain.n == 300 and plain.level == 0.95 and metric(preds, interval=False).interval == three
    wide = metric(preds, level=0.99)
    assert wide.low <= plain.low and wide.high >= plain.high and (wide.low, wide.high) != (plain.low, plain.high)


@pytest.mark.parametrize("name", EVERY)
def test_rows_in_any_order(name):
    preds, order = draw(), np.random.default_rng(5).permutation(300)
    coarse = Predictions(preds.ids, LABELS, probs=(p := np.round(preds.probabilities * 6) + 1) / p.sum(axis=1, keepdims=True), y=preds.y)
    for x in (preds, coarse): assert measure(name, x.take(order)) == pytest.approx(measure(name, x), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["accuracy", "nll", "brier", *CALIBRATION, *SELECTIVE])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_precision_costs_little(name, dtype):
    wide, narrow = (measure(name, Predictions(np.arange(300), LABELS, probs=draw().probabilities.astype(t), y=draw().y)) for t in (np.float64, dtype))
    assert np.isfinite(narrow) and abs(narrow - wide) < 0.02


# Bad input

@pytest.mark.parametrize("name", EVERY)
def test_no_rows_are_not_a_number(name):
    nobody = draw().take(np.array([], dtype=int))
    e = getattr(metrics, name)(nobody)
    assert np.isnan(e) and np.isnan(e.value) and e.n == 0 and e.low < e.high


@pytest.mark.parametrize("name", EVERY)
def test_one_row_is_a_number(name):
    e = getattr(metrics, name)(draw().take([0]))
    assert e.n == 1 and (name == "prr" or np.isfinite(e))


@pytest.mark.parametrize("name", [*EVERY, "brier_parts", "confusion_matrix", "reliability", "risk_coverage", "calibration_state", "summary"])
def test_truth_is_needed(name):
    with pytest.raises(DataError, match="needs the true classes"): getattr(metrics, name)(Predictions(["a"], LABELS, probs=[[1, 0, 0]]))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("level", [0, 1, 95, -0.1, float("nan")])
def test_levels_out_of_range(name, level):
    with pytest.raises(ConfigurationError, match="level must lie between 0 and 1"): getattr(metrics, name)(draw(20), level=level)


@pytest.mark.parametrize("probs", [[[np.nan, .5, .5]], [[-.1, .6, .5]], [[.5, .2, .1]], [[.5, .6, .1]], [[np.inf, 0, 0]], [[.5, .5]], [[1]]])
def test_bad_probabilities_never_reach_a_metric(probs):
    with pytest.raises(DataError): metrics.summary(Predictions(["a"], LABELS, probs=probs, y=[0]))


def test_one_class_is_refused():
    with pytest.raises(ConfigurationError, match="at least two"): Predictions(["a"], Labels(("x",)), probs=[[1]], y=[0])


@pytest.mark.parametrize("name", EVERY)
def test_read_only_input_stays_as_it_was(name):
    preds = draw(60)
    preds.logits.flags.writeable = preds.y.flags.writeable = False
    before = preds.logits.copy()
    measure(name, preds)
    assert (preds.logits == before).all()


@quick
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=20), st.integers(1, 20))
def test_any_confidence_is_counted_or_refused(values, bins):
    c, fine = np.array(values), all(0 <= v <= 1.001 for v in values)
    try: sums = bin_sums(c, c > 0.5, bins)
    except FineTuneLLMError as e: assert not fine and "outside 0 to 1 (row " in str(e)
    else: assert fine and sums[0].sum() == len(values) and np.isfinite(sums).all()


# Calibration error, straight from the definition

def slow_groups(c, bins, kind):
    if kind == "equal-width": return [min(int(Fraction(x) * bins), bins - 1) for x in c] if bins in (1, 2, 4, 8, 16) else None
    ends = [sorted(c)[-(-j * len(c) // bins) - 1] for j in range(1, bins)]
    return [sum(x > end for end in ends) for x in c]


def slow_error(c, right, groups, norm, debiased):
    parts = []
    for g in set(groups):
        rows = [i for i in range(len(c)) if groups[i] == g]
        a, m = np.mean([right[i] for i in rows]), len(rows)
        d, var = abs(a - np.mean([c[i] for i in rows])), (a * (1 - a) / (m - 1) if m > 1 and debiased else 0)
        noise = np.mean(abs(d + np.sqrt(var) * NORMAL)) - d if norm == "l1" and debiased else 0
        parts.append((m / len(c), d, var, noise))
    if norm == "max": return max(d for _, d, _, _ in parts)
    if norm == "l1": return max(0.0, sum(w * (d - noise) for w, d, _, noise in parts))
    return max(0.0, sum(w * (d * d - v) for w, d, v, _ in parts)) ** 0.5


NORMAL = np.sqrt(2) * erfinv(2 * (np.arange(20_000) + 0.5) / 20_000 - 1)


@quick
@given(ROWS, st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from(["equal-width", "equal-mass"]), st.sampled_from(["l1", "l2", "max"]), st.booleans())
def test_calibration_error_is_its_definition(rows, bins, kind, norm, debiased):
    c, right = map(list, zip(*rows))
    slow = slow_error(c, right, slow_groups(c, bins, kind), norm, debiased and norm != "max")
    preds = from_arrays(c, right)
    ours = metrics.mce(preds, bins, kind, n_boot=0) if norm == "max" else metrics.ece(preds, bins, kind, norm, debiased, n_boot=0)
    assert ours == pytest.approx(slow, abs=2e-4 if debiased and norm == "l1" else 1e-7 if norm == "l2" else 1e-12)


@quick
@given(ROWS, st.integers(1, 20))
def test_bounds_of_calibration_errors(rows, bins):
    preds = from_arrays(*map(list, zip(*rows)))
    l1, l2, top = metrics.ece(preds, bins, n_boot=0), metrics.ece(preds, bins, norm="l2", n_boot=0), metrics.mce(preds, bins, n_boot=0)
    whole = abs(np.mean([r for _, r in rows]) - np.mean([c for c, _ in rows]))
    assert whole - 1e-12 <= l1 <= l2 + 1e-12 <= top + 2e-12 <= 1 + 3e-12  # Jensen; one bin is the smallest
    for norm in ("l1", "l2"): assert metrics.ece(preds, bins, norm=norm, debiased=True, n_boot=0) <= metrics.ece(preds, bins, norm=norm, n_boot=0) + 1e-9


def test_confidence_one_is_in_the_last_bin():
    assert metrics.ece(from_arrays([1.0, 0.95], [False, True]), 10, n_boot=0) == pytest.approx(0.475)  # |-1 + 0.05| / 2
    assert metrics.ece(CalibrationState.empty(10).update(np.array([1, .95], np.float32), [0, 1]), 10, n_boot=0) == pytest.approx(0.475, abs=1e-7)


@pytest.mark.parametrize("n", [1000, 8000])  # drawn by rows, and from sums
def test_the_bias_of_a_calibrated_model_is_the_theory(n):
    rng = np.random.default_rng(3)
    c = rng.beta(4, 1.5, n)
    state = [CalibrationState.empty().update(c, rng.random(n) < c) for _ in range(200)]
    found = np.array([float(metrics.ece(s, n_boot=0)) for s in state])
    _, p, p2 = state[0].sums.sum(axis=1)
    theory = np.sqrt(2 * (p - p2) / np.pi).sum() / n
    assert abs(found.mean() - theory) < 4 * found.std() / np.sqrt(200) + 0.01 * theory
    x = state[0] if n > 5000 else from_arrays(np.maximum(c, 0.2501), rng.random(n) < c)
    assert metrics.null_band(x).estimate == pytest.approx(theory, rel=0.05)
    inside = np.mean(found <= metrics.ece(x).null)
    assert 0.90 < inside < 0.985


def test_debiased_l2_is_unbiased():
    """Twelve confidences, truth 0.2 lower, 20 rows each: the squared error is 0.04; plain adds the variance a(1-a)/20."""
    rng, c = np.random.default_rng(4), np.repeat(np.linspace(0.45, 0.98, 8), 20)
    sums = [bin_sums(c, rng.random(len(c)) < c - 0.2, 16) for _ in range(400)]
    squared = {}
    for debiased in (False, True):
        sizes = [error_size(s[0].sum(axis=0), s[0, 1] - s[1].sum(axis=0), s[1].sum(axis=0), "l2", debiased) for s in sums]
        squared[debiased] = np.square(sizes)
    noise = np.mean((np.unique(c) - 0.2) * (1.2 - np.unique(c))) / 20
    for debiased, truth in ((False, 0.04 + noise), (True, 0.04)):
        assert abs(squared[debiased].mean() - truth) < 4 * squared[debiased].std() / 20
    assert noise > 8 * squared[True].std() / 20  # the test can tell the two apart


def test_sums_and_rows_draw_the_same_worlds():
    preds, rng = draw(3000, scale=2.0), np.random.default_rng(0)
    (place, gap), (c, _), sums = binned(preds), outcomes(preds), sums_of(preds)
    by_rows, by_sums = resampled_rows(place, gap, c, 15, 400, rng), resampled(sums, 4000, rng)
    big = sums[0].sum(axis=0) > 50
    for a, b in zip(by_rows, by_sums):
        assert np.allclose(a[:, big].mean(axis=0), b[:, big].mean(axis=0), rtol=0.05, atol=2.5)
        assert np.allclose(a[:, big].std(axis=0), b[:, big].std(axis=0), rtol=0.15, atol=0.3)
    assert np.allclose(null_gaps_rows(place, c, 15, 400, rng)[:, big].std(axis=0), null_gaps(sums, 4000, rng)[:, big].std(axis=0), rtol=0.15)


def test_equal_gaps_have_no_spread():
    """All wrong at 0.4, all right at 0.9: another sample changes the counts and nothing else."""
    halves = bin_sums(np.repeat([0.4, 0.9], 100), np.repeat([False, True], 100), 2)
    rows, gap, _ = resampled(halves, 50, np.random.default_rng(0))
    assert np.allclose(gap, rows * [-0.4, 0.1], atol=1e-5)


def test_the_grid_keeps_the_centre_of_the_gaps():
    rng = np.random.default_rng(0)
    c, right = rng.uniform(0.01, 0.99, 500), rng.random(500) < 0.7
    centres = (np.arange(CELLS) + 0.5) / CELLS
    assert on_grid(c, right)[0] @ centres == pytest.approx(((right - c) * c).sum(), rel=1e-9)


def test_bootstrap_interval_of_a_miscalibrated_model_holds():
    rng, truth, held = np.random.default_rng(6), 0.15, 0
    for _ in range(200):
        c = rng.uniform(0.6, 0.99, 6000)
        e = metrics.ece(CalibrationState.empty().update(c, rng.random(6000) < c - truth), n_boot=200)
        held += e.low <= truth <= e.high
    assert 0.90 <= held / 200 <= 0.99


@quick
@given(ROWS, st.integers(1, 9), st.sampled_from(["equal-width", "equal-mass"]))
def test_classwise_is_the_mean_over_classes(rows, bins, kind):
    preds = from_arrays(*map(list, zip(*rows)))
    p, y = preds.probabilities, preds.y
    each = []
    for k in range(4):
        c = np.minimum(p[:, k], 1)
        ends = [np.sort(c)[-(-j * len(c) // bins) - 1] for j in range(1, bins)]
        where = np.array([sum(x > end for end in ends) if kind == "equal-mass" else min(int(x * bins), bins - 1) for x in c])
        each.append(sum(abs(((y == k) - c)[where == b].sum()) for b in range(bins)) / len(c))
    assert metrics.classwise_ece(preds, bins, kind, n_boot=0) == pytest.approx(np.mean(each), abs=1e-12)


# Streaming

@quick
@given(ROWS, st.lists(st.integers(0, 30), max_size=4), st.integers(1, 20))
def test_merged_parts_are_one_pass(rows, cuts, bins):
    c, right = (np.array(v) for v in zip(*rows))
    whole = CalibrationState.empty(bins).update(c, right)
    parts = [CalibrationState.empty(bins).update(a, b) for a, b in zip(np.split(c, sorted(cuts)), np.split(right, sorted(cuts)))]
    for order in (parts, parts[::-1]):
        merged = sum(order, CalibrationState.empty(bins))
        assert (merged.sums[0] == whole.sums[0]).all() and np.allclose(merged.sums, whole.sums, rtol=1e-12, atol=0)
        assert metrics.ece(merged, bins if bins == 15 else merged.bins, n_boot=0) == pytest.approx(metrics.ece(from_arrays(c, right), bins, n_boot=0), abs=1e-12)
    again = CalibrationState.from_dict(json.loads(json.dumps(whole.to_dict())))
    assert again.sums.tobytes() == whole.sums.tobytes() and again.n == len(rows)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_eighths_add_up_exactly(kind):
    """Multiples of 1/8 are exact in every precision, so batches, order and precision leave every bit the same."""
    rng = np.random.default_rng(0)
    c, right = rng.integers(0, 9, 50_000) / 8, rng.random(50_000) < 0.5
    whole = bin_sums(c, right, 8)
    pieces = sum((bin_sums(a.astype(kind), b, 8) for a, b in zip(np.array_split(c, 13), np.array_split(right, 13))), np.zeros((3, 2, 8)))
    assert pieces.tobytes() == whole.tobytes()
    assert whole[0].sum() == 50_000 and whole[0, 1].sum() == right.sum() and whole[1].sum() == c.sum()


def test_counts_pass_two_to_the_24th():
    state = CalibrationState.empty().update(np.full(1000, 0.99), np.ones(1000, bool))
    for _ in range(17): state = state + state
    assert state.n == 1000 * 2**17 > 1e8 and metrics.ece(state, n_boot=0) == pytest.approx(0.01, rel=1e-9)


# Smooth ECE

@pytest.mark.parametrize("c, share", [(0.3, 0.5), (0.9, 0.6), (1.0, 0.75), (0.75, 1.0)])
def test_smooth_ece_of_one_confidence_is_the_gap(c, share):
    """A kernel keeps the integral, so one place on the scale gives |share - c| whatever the width."""
    preds = from_arrays(np.full(20, c), np.arange(20) < 20 * share)
    assert metrics.smooth_ece(preds, n_boot=0) == pytest.approx(abs(share - c), abs=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_smooth_ece_is_its_definition(seed):
    """Kernel at all mirror images, integral by the midpoint rule, width by scanning for the crossing."""
    rng = np.random.default_rng(seed)
    c, right = rng.uniform(0.3, 1, 40), rng.random(40) < 0.6
    t, ours = (np.arange(4000) + 0.5) / 4000, float(metrics.smooth_ece(from_arrays(c, right), n_boot=0))
    def size(sigma):
        centres = np.concatenate([2 * j + s * c for j in range(-3, 4) for s in (1, -1)])
        kernel = np.exp(-0.5 * ((t[:, None] - centres) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        return np.abs(kernel @ np.tile(right - c, 14)).mean() / 40
    assert size(ours - 0.002) > ours - 0.002 and size(ours + 0.002) < ours + 0.002


@quick
@given(ROWS)
def test_smooth_ece_lies_between_its_bounds(rows):
    c, right = (np.array(v) for v in zip(*rows))
    e = metrics.smooth_ece(from_arrays(c, right), n_boot=0)
    assert abs((right - c).mean()) - 1e-6 <= e <= np.abs(right - c).mean() + 1e-6


def test_smooth_ece_moves_little_when_confidences_do():
    rng = np.random.default_rng(0)
    c, right = rng.uniform(0.3, 0.99, 500), rng.random(500) < 0.7
    base = fixed_width(dct(on_grid(c, right)[0], norm="ortho")[None] / 500)[0]
    for shift in (1e-4, 1e-3, 5e-3):
        assert abs(metrics.smooth_ece(from_arrays(c + shift, right), n_boot=0) - base) <= 2 * shift


# Brier parts, F1, top-k

@quick
@given(ROWS, st.integers(1, 20))
def test_brier_parts_add_up(rows, bins):
    preds = from_arrays(*map(list, zip(*rows)))
    parts = metrics.brier_parts(preds, bins)
    assert parts.brier == pytest.approx(metrics.brier(preds), abs=1e-12)
    assert parts.reliability >= -1e-12 and -1e-12 <= parts.resolution <= parts.uncertainty + 1e-12


def test_brier_parts_without_spread_are_murphys():
    """Five days at 0.8 with four rainy, five at 0.4 with one: REL = (0 + 0.04)/2, RES = (0.09 + 0.09)/2, UNC = 0.25, for each of two classes."""
    probs = np.repeat([[0.2, 0.8], [0.6, 0.4]], 5, axis=0)
    preds = Predictions(np.arange(10), Labels(("dry", "rain")), probs=probs, y=[1, 1, 1, 1, 0, 1, 0, 0, 0, 0])
    assert np.allclose(metrics.brier_parts(preds, 10), 2 * np.array([0.02, 0.09, 0.25, 0]))


def test_top_k_grows_to_one():
    preds = draw()
    shares = [metrics.top_k_accuracy(preds, k) for k in (1, 2, 3, 9)]
    assert shares[0] == metrics.accuracy(preds) <= shares[1] <= shares[2] == shares[3] == 1


# Selective prediction

SHORT = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.2, 0.3]), st.sampled_from([0, 0, 1])), min_size=2, max_size=6)


def slow_curve(losses): return np.array([np.mean(losses[:k]) for k in range(1, len(losses) + 1)])


@quick
@given(SHORT)
def test_areas_are_means_over_all_orders_of_ties(rows):
    s, wrong = (np.array(v, dtype=float) for v in zip(*rows))
    n, preds = len(s), from_arrays(np.full(len(s), 0.5), wrong == 0)
    areas, general, half = [], [], []
    for p in map(list, permutations(range(n))):
        ranked = wrong[p][np.argsort(-s[p], kind="stable")]
        risks = slow_curve(ranked)
        total = np.r_[0, np.cumsum(ranked)]
        areas.append(risks.mean()), half.append(risks[n - n // 2:].mean()), general.append(((total[1:] + total[:-1]) / 2).mean() / n)
    assert metrics.aurc(preds, s) == pytest.approx(np.mean(areas)) and metrics.augrc(preds, s) == pytest.approx(np.mean(general))
    best = slow_curve(np.sort(wrong))
    assert metrics.eaurc(preds, s) == pytest.approx(np.mean(areas) - best.mean(), abs=1e-12)
    assert metrics.oracle_aurc(int(wrong.sum()), n) == pytest.approx(best.mean(), abs=1e-12)
    to_go = wrong.mean() - best[n - n // 2:].mean()
    if to_go > 1e-12: assert metrics.prr(preds, s) == pytest.approx((wrong.mean() - np.mean(half)) / to_go)
    else: assert np.isnan(metrics.prr(preds, s))


@quick
@given(SHORT, st.integers(1, 20), st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 1.0]))
def test_points_of_the_curve(rows, twentieths, limit):
    s, wrong = (np.array(v, dtype=float) for v in zip(*rows))
    n, preds, coverage = len(s), from_arrays(np.full(len(s), 0.5), wrong == 0), twentieths / 20
    expected = [Fraction(0)]
    for v in sorted(set(s), reverse=True):
        inside = s == v
        for _ in range(inside.sum()): expected.append(expected[-1] + Fraction(int(wrong[inside].sum()), int(inside.sum())))
    k = -(-twentieths * n // 20)
    assert metrics.risk_at_coverage(preds, coverage, s, n_boot=0) == pytest.approx(float(expected[k] / k))
    within = [j for j in range(1, n + 1) if expected[j] <= Fraction(limit).limit_denominator(100) * j]
    assert metrics.coverage_at_risk(preds, limit, s, n_boot=0) == pytest.approx(max(within, default=0) / n)


@quick
@given(st.lists(st.tuples(st.floats(-5, 5).map(lambda v: round(v, 1)), st.floats(0, 3)), min_size=2, max_size=60), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_change_one_bit(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    a, b = (ranking(*zip(*x)) for x in (rows, shuffled))
    assert a.expected.tobytes() == b.expected.tobytes()
    preds = draw(len(rows))
    for name in SELECTIVE:
        found = [getattr(metrics, name)(preds, score=[v for v, _ in x], loss=[v for _, v in x], **({"n_boot": 0} if "at" in name else {})) for x in (rows, shuffled)]
        assert found[0].interval[0] == found[1].interval[0] or np.isnan(found[0]) and np.isnan(found[1])


@quick
@given(SHORT)
def test_turning_the_score_and_monotone_maps(rows):
    s, wrong = (np.array(v, dtype=float) for v in zip(*rows))
    n, preds = len(s), from_arrays(np.full(len(s), 0.5), wrong == 0)
    assert metrics.aurc(preds, s) == metrics.aurc(preds, np.exp(7 * s))  # only the order counts
    assert metrics.augrc(preds, s) + metrics.augrc(preds, -s) == pytest.approx(wrong.mean())  # AUROC and 1 - AUROC
    assert metrics.aurc(preds, np.zeros(n)) == pytest.approx(wrong.mean())  # all tied: a random order
    assert metrics.oracle_aurc(int(wrong.sum()), n) - 1e-12 <= metrics.aurc(preds, s) and 0 <= metrics.augrc(preds, s) <= 0.5


def test_oracle_in_the_limit():
    """n large: r + (1 - r) ln(1 - r), Geifman et al. 2019."""
    for r in (0.05, 0.3, 0.9): assert metrics.oracle_aurc(int(r * 1_000_000), 1_000_000) == pytest.approx(r + (1 - r) * np.log(1 - r), abs=1e-5)


def test_jackknife_agrees_with_the_bootstrap():
    preds = draw(800)
    rng = np.random.default_rng(0)
    for name in ("aurc", "eaurc", "augrc", "prr"):
        e, metric = getattr(metrics, name)(preds), getattr(metrics, name)
        wrong, c = preds.answers != preds.y, preds.confidence
        resamples = [rng.integers(800, size=800) for _ in range(300)]
        sd = np.std([float(metric(preds, c[i], wrong[i].astype(float))) for i in resamples])
        assert (e.high - e.low) / 2 / 1.96 == pytest.approx(sd, rel=0.15)


# The summary holds what the metrics say

def test_summary():
    card = metrics.summary(draw())
    assert list(card) == ["accuracy", "macro F1", "nll", "brier", "ece", "classwise ece", "smooth ece", "aurc", "augrc"]
    for name, metric in (("accuracy", "accuracy"), ("ece", "ece"), ("augrc", "augrc"), ("macro F1", "f1")):
        assert card[name].interval == getattr(metrics, metric)(draw()).interval
