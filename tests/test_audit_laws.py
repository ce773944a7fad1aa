"""What the audit promises about its own errors, checked by drawing data whose truth is known.

Every number here is a share of draws, held against its promise; `slow` tests draw more than their plain twins."""
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from fine_tune_llm.audit.groups import group_metrics
from fine_tune_llm.audit.intervals import BinSums, calibration_error, exact, gap_of, student, wilson
from fine_tune_llm.audit.parity import largest_difference, pairs_of
from fine_tune_llm.audit.report import audit
from fine_tune_llm.audit.tallies import Tally
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.predictions import Predictions

SIZES, RATES = (50, 500, 5000), (0.3, 0.5, 0.7, 0.9)
YES_NO = Labels(("no", "yes"))


# Intervals of rates: no draws needed, the binomial law gives the coverage exactly

def exact_coverage(make, n, p):
    k = np.arange(n + 1)
    e = make(k, np.full(n + 1, n))
    return float(binom.pmf(k, n, p)[(e.low <= p) & (p <= e.high)].sum())


@pytest.mark.parametrize("n", SIZES)
def test_rates_cover(n):
    "Wilson's coverage wobbles around 95 % with p, so it is averaged over near rates; Clopper and Pearson's is never below."
    for p in RATES:
        near = np.linspace(p - 0.03, p + 0.03, 31 if n < 5000 else 7)
        assert 0.93 <= np.mean([exact_coverage(wilson, n, q) for q in near]) <= 0.97
        assert min(exact_coverage(exact, n, q) for q in near) >= 0.95


def test_the_textbook_interval_would_not_pass():
    "The same check refuses an interval that is known to be wrong (Wald's at a rate of 0.02)."
    def wald(k, n):
        half = 1.96 * np.sqrt(k / n * (1 - k / n) / n)
        return type(wilson([1], [2]))(k / n, k / n - half, k / n + half)
    assert exact_coverage(wald, 50, 0.02) < 0.70 < exact_coverage(wilson, 50, 0.02)


# Intervals of gaps

def gaps_cover(n, n_rest, p, q, draws, rng):
    e = gap_of(wilson(rng.binomial(n, p, draws), np.full(draws, n)), wilson(rng.binomial(n_rest, q, draws), np.full(draws, n_rest)))
    return float(((e.low <= p - q) & (p - q <= e.high)).mean())


@pytest.mark.parametrize("n", SIZES)
def test_gaps_cover(n):
    rng = np.random.default_rng(n)
    for p, q in ((0.7, 0.7), (0.9, 0.7), (0.3, 0.5), (0.52, 0.48)):
        for rest in (n, 4 * n):
            assert 0.93 <= gaps_cover(n, rest, p, q, 20_000, rng) <= 0.97, (n, rest, p, q)


@pytest.mark.parametrize("n", SIZES)
def test_gaps_of_means_cover(n):
    rng, draws = np.random.default_rng(n), 4000 if n < 5000 else 400
    a, b = rng.normal(1.0, 1.0, (draws, n)), rng.normal(0.7, 3.0, (draws, 2 * n))
    e = gap_of(*(student(x.sum(axis=1), (x ** 2).sum(axis=1), np.full(draws, x.shape[1])) for x in (a, b)))
    assert 0.93 <= ((e.low <= 0.3) & (0.3 <= e.high)).mean() <= 0.97


# Intervals of calibration errors

def stated(n, sharp, rng):
    "Confidences that are overstated (sharp > 1) or understated, whether the answer was right, and the true chance of it."
    odds = np.abs(rng.normal(0, 2, n))
    said, chance = 1 / (1 + np.exp(-sharp * odds)), 1 / (1 + np.exp(-odds))
    return said, rng.random(n) < chance, chance


def bin_sums(said, hit, groups, bins=15):
    code = np.arange(len(said)) % groups * bins + np.minimum((said * bins).astype(int), bins - 1)
    return BinSums(*(np.bincount(code, w, groups * bins).reshape(groups, bins) for w in (None, hit, said, said * said)))


def ece_cover(n, sharp, draws, seed):
    said, right, chance = stated(n * draws, sharp, np.random.default_rng(seed))
    whole = bin_sums(said, chance, 1)
    truth = 0.0 if sharp == 1 else float(np.abs(whole.hits - whole.said).sum() / len(said))
    e, _ = calibration_error(bin_sums(said, right, draws))
    return float(((e.low <= truth) & (truth <= e.high)).mean())


@pytest.mark.parametrize("n, draws", [(50, 2000), (500, 1000), (5000, 300)])
def test_ece_covers(n, draws):
    "Three standard errors of slack around 93 % and 97 %, so that the test itself does not err; the slow twin has none to speak of."
    for seed, sharp in enumerate((1.2, 3.0, 0.6)):
        slack = 3 * np.sqrt(0.95 * 0.05 / draws)
        assert 0.93 - slack <= ece_cover(n, sharp, draws, seed) <= 0.97 + slack, sharp


@pytest.mark.slow
@pytest.mark.parametrize("n, draws", [(50, 20_000), (500, 8000), (5000, 1200)])
def test_ece_covers_closely(n, draws):
    for seed, sharp in enumerate((1.6, 3.0, 0.6)):
        slack = 3 * np.sqrt(0.95 * 0.05 / draws)
        assert 0.93 - slack <= ece_cover(n, sharp, draws, seed) <= 0.97 + slack, sharp


@pytest.mark.parametrize("n", (50, 500))
def test_ece_of_a_calibrated_model_covers_zero(n):
    "At the edge only one side can miss: 95 % to 99 %. The plain bootstrap covers it never."
    assert 0.94 <= ece_cover(n, 1.0, 1000, 5) <= 0.99


# Equalised odds

@pytest.mark.parametrize("n, rates", [(50, (0.7, 0.2)), (500, (0.7, 0.2)), (500, (0.9, 0.1))])
def test_simultaneous_equalised_odds_cover(n, rates):
    "Both gaps of two groups hold together, and so does the larger of them, in at least 95 % of draws."
    rng, draws, together, largest = np.random.default_rng(n), 1500, 0, 0
    truth = (rates[0] - 0.6, rates[1] - 0.15)  # TPR and FPR of the groups
    for _ in range(draws):
        found = []
        for p, q in ((rates[0], 0.6), (rates[1], 0.15)):
            t = Tally(np.array([[n, n], (k := rng.binomial(n, (p, q))), k], dtype=float))
            found.append(pairs_of(wilson(t.hits, t.n, 1 - 0.05 / 2), t.n))
        together += all(low[0] <= abs(d) <= high[0] for (_, low, high, _), d in zip(found, truth))
        largest += max(f[1][0] for f in found) <= max(map(abs, truth)) <= max(f[2][0] for f in found)
    se = np.sqrt(0.95 * 0.05 / draws)
    assert together / draws >= 0.95 - 2 * se and largest / draws >= 0.95 - 2 * se


# The audit as a whole

def draw(n, groups, rng, gap=0.0):
    "A calibrated yes-no model on `groups` groups of n rows; in the first, a share `gap` of right answers is made wrong."
    odds = rng.normal(0, 2.2, n * groups)
    p = 1 / (1 + np.exp(-odds))
    y = (rng.random(n * groups) < p).astype(int)
    right = (p > 0.5) == (y == 1)
    flip = (np.arange(n * groups) < n) & right & (rng.random(n * groups) < gap / right.mean())
    return Predictions(np.arange(n * groups).astype(str), YES_NO, probs=np.stack([1 - p, p], axis=1), y=np.where(flip, 1 - y, y),
                       groups=pd.DataFrame({"g": np.repeat([f"g{i}" for i in range(groups)], n)}), split="test")


def share_failed(n, draws, seed, **how):
    rng = np.random.default_rng(seed)
    return np.mean([any(r.verdict == "fail" for r in group_metrics(draw(n, 5, rng), "g", **how).rows) for _ in range(draws)])


@pytest.mark.slow
@pytest.mark.parametrize("n", (40, 500))
def test_family_wise_error_of_1000_audits(n):
    "Without any gap, and even with next to no tolerance, at most 5 % of audits fail anybody."
    rates = ["accuracy", "selection rate", "TPR", "FPR", "PPV", "FOR"]
    assert share_failed(n, 1000, n, metrics=rates, tolerance=1e-6) <= 0.05


def test_family_wise_error():
    "All metrics, means and calibration errors included, at the default tolerance: of 40 audits of small groups at most one fails."
    assert share_failed(50, 40, 1) <= 1 / 40


def test_a_gap_of_20_points_is_found():
    rng, found = np.random.default_rng(2), []
    for _ in range(30):
        rows = {(r.metric, r.group): r for r in group_metrics(draw(500, 4, rng, gap=0.2), "g").rows}
        found.append(rows["accuracy", "g0"].verdict == "fail")
    assert np.mean(found) >= 0.9


@pytest.mark.slow
def test_report_finds_the_gap_and_fails_nobody_else():
    "`ft.audit` itself: a gap of 0.2 at 500 rows a group is found in at least 90 % of 100, and no gap fails in at most 5 %."
    rng, found, false = np.random.default_rng(3), 0, 0
    for _ in range(100):
        found += any(r.verdict == "fail" and r.group == "g0" for r in audit(draw(500, 4, rng, gap=0.2), groups=["g"]).rows)
        false += any(r.verdict == "fail" for r in audit(draw(100, 4, rng), groups=["g"]).rows)
    assert found >= 90 and false <= 5


def test_small_groups_never_pass_nor_fail():
    rng = np.random.default_rng(4)
    for n in (1, 4, 9):
        preds = draw(400, 2, rng)
        preds = preds.take(np.r_[0:n, 400:800])
        rows = [r for r in group_metrics(preds, "g").rows if r.group == "g0"]
        assert {r.verdict for r in rows} == {"not enough evidence"}


def test_the_largest_difference_pays_for_all_its_pairs():
    "Five groups without any difference: ten pairs, and the lower end is above 0 in 5 % of draws, within three standard errors."
    rng, false = np.random.default_rng(5), 0
    for _ in range(600):
        k = rng.binomial(300, 0.4, 5)
        e, _, _ = largest_difference({"TPR": Tally(np.array([[300] * 5, k, k], dtype=float))}, list("abcde"))
        false += e.low > 0
    assert false / 600 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)  # without the correction it would be over 0.2


def test_the_largest_difference_pays_for_all_its_rates():
    "Two groups without any difference on six rates: six chances to be wrong, and still at most 5 %, within three standard errors."
    rng, false = np.random.default_rng(6), 0
    for _ in range(600):
        rates = {f"rate {i}": Tally(np.array([[300, 300], k, k], dtype=float)) for i, k in enumerate(rng.binomial(300, 0.4, (6, 2)))}
        e, _, _ = largest_difference(rates, ["a", "b"])
        false += e.low > 0
    assert false / 600 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)  # without the correction it would be over 0.2
