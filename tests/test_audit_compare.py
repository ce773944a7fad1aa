"Comparison of systems: paired intervals keep their level, and a table of nothing shows nothing."
from math import comb

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.audit.comparison import compare, joined_gap, related
from fine_tune_llm.audit.measures import Metric, score_metrics
from fine_tune_llm.audit.pairs import discordant, mcnemar, paired_mean_gap, paired_rate_gap
from fine_tune_llm.core.errors import DataError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.risk import DecisionPolicy

LABELS = Labels(("a", "b", "c"))


def pair(n, seed, noise=1.0, split="test"):
    "Two systems that see the truth through noise of one size: neither is better."
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (n, 3))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    groups = pd.DataFrame({"g": rng.choice(["u", "v"], n)})
    def said(sd): return Predictions([f"{split}{i}" for i in range(n)], LABELS, logits=z + rng.normal(0, sd, z.shape), y=y, groups=groups, split=split)
    return {"one": said(1.0), "two": said(noise)}


@pytest.mark.parametrize("n", range(1, 12))
def test_mcnemar_by_counting(n):
    for b in range(n + 1):
        tail = sum(comb(n, i) for i in range(min(b, n - b) + 1))
        assert mcnemar(b, n - b) == pytest.approx(min(1, 2 * tail / 2 ** n))


def test_mcnemar_keeps_its_level():
    "The exact law of the p-value: at most 5 % of fair coins fall at or below 0.05."
    for n in range(1, 40):
        assert sum(comb(n, b) / 2 ** n for b in range(n + 1) if mcnemar(b, n - b) <= 0.05) <= 0.05


@pytest.mark.parametrize("n, pb, pc", [(10, 0.1, 0.1), (20, 0.02, 0.1), (40, 0.3, 0.1)])
def test_paired_interval_covers(n, pb, pc):
    rng = np.random.default_rng(n)
    counts = rng.multinomial(n, [pb, pc, 1 - pb - pc], size=1000)
    kinds, times = np.unique(counts, axis=0, return_counts=True)
    covers = [e.low <= pc - pb <= e.high for e in (paired_rate_gap(int(b), int(c), n) for b, c, _ in kinds)]
    assert (np.array(covers) * times).sum() / 1000 > 0.925  # three standard errors below 0.95


def test_paired_is_the_mirror_of_itself():
    a, b = paired_rate_gap(3, 8, 50), paired_rate_gap(8, 3, 50)
    assert (a.value, a.low, a.high) == (-b.value, -b.high, -b.low)
    x, y = np.array([1.0, 5, 2]), np.array([2.0, 4, 9])
    assert paired_mean_gap(x, y).low == -paired_mean_gap(y, x).high


def test_rows_that_agree_cancel():
    "A paired interval does not depend on how hard the rows are, only on how many changed."
    easy, hard = np.ones(100, dtype=bool), np.zeros(100, dtype=bool)
    one, two = easy.copy(), hard.copy()
    one[:4], two[:4] = False, True
    assert discordant(easy, one) == (4, 0) and discordant(two, hard) == (4, 0)


def scored(n, seed, scales):
    "Systems that state the true logits times a number: 1 is calibrated."
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, 3))
    y, ids = (z + rng.gumbel(size=z.shape)).argmax(axis=1), [f"t{i}" for i in range(n)]
    return [score_metrics(Predictions(ids, LABELS, logits=s * z, y=y))[2] for s in scales]


@pytest.mark.parametrize("scales", [(1.0, 1.6), (1.6, 1.0), (0.6, 1.6)])
def test_calibration_gap_covers(scales):
    "The true ECE comes from 400,000 rows, in which noise adds less than 0.004."
    large = scored(400_000, 1, scales)
    true = [np.abs(np.bincount(np.minimum((m.said * 15).astype(int), 14), m.hit - m.said)).sum() / 400_000 for m in large]
    true = [0.0 if s == 1 else t for s, t in zip(scales, true)]
    found = [joined_gap(*scored(500, seed, scales), np.arange(500), 0.95) for seed in range(100, 220)]
    covered = np.mean([e.low <= true[1] - true[0] <= e.high for e in found])
    assert covered >= 0.88, covered  # 120 runs of nominal 0.95: below 0.88 once in a thousand


def test_ratio_gap_covers():
    "Errors among the answers of two policies that answer different rows: the truth is 0.3 - 0.2."
    rng, hits, n = np.random.default_rng(0), 0, 200
    for _ in range(300):
        first, wrong = rng.random(n) < 0.6, rng.random(n)
        second = first ^ (rng.random(n) < 0.2)
        e = joined_gap(Metric("r", wrong < 0.3, first), Metric("r", wrong < 0.2, second), np.arange(n), 0.95)
        hits += e.low <= -0.1 <= e.high
    assert hits >= 273  # Binomial(300, 0.95): fewer than 273 once in 500


def test_related_is_what_drawing_rows_again_gives():
    a, b = scored(2000, 3, (1.8, 2.2))  # so far off that no bin can change its sign
    def size(m, rows): return np.abs(np.bincount(np.minimum((m.said[rows] * 15).astype(int), 14), (m.hit - m.said)[rows])).sum()
    drawn = np.array([[size(m, r) for m in (a, b)] for r in np.random.default_rng(0).integers(2000, size=(400, 2000))])
    assert related(a, b, np.arange(2000)) == pytest.approx(np.corrcoef(drawn.T)[0, 1], abs=0.1)


def test_nothing_to_find_is_not_found():
    "Neither system is better; a table may show any difference in at most 5 % of simulations."
    metrics = ["accuracy", "NLL", "Brier"]
    loud = sum(any(r.verdict in ("better", "worse") for r in compare(pair(300, seed), metrics=metrics, groups=["g"]).rows) for seed in range(200))
    assert loud <= 18  # Binomial(200, 0.05): more than 18 less than once in a hundred


def test_something_to_find_is_found():
    c = compare(pair(600, 5, noise=6.0), metrics=["accuracy", "NLL"])
    assert [r.verdict for r in c.rows] == ["", "worse", "", "worse"] and c.rows[1].p < 0.001
    turned = compare(pair(600, 5, noise=6.0), metrics=["accuracy", "NLL"], baseline="two")
    assert [r.verdict for r in turned.rows] == ["", "better", "", "better"] and turned.rows[1].gap.value == -c.rows[1].gap.value


def test_every_number_of_an_audit_stands_there():
    systems, calibration = pair(400, 1), pair(400, 2, split="calibration")
    sets = {k: ConformalClassifier(alpha=0.2).fit(p) for k, p in calibration.items()}
    policies = {k: DecisionPolicy(abstain_cost=0.3, max_risk=0.4).fit(p) for k, p in calibration.items()}
    names = set(compare(systems, sets, policies).to_frame()["metric"])
    assert {"accuracy", "error rate", "coverage", "abstention", "selective risk", "NLL", "Brier", "ECE", "set size", "expected cost"} == names
    assert "coverage" not in set(compare(systems, {"one": sets["one"]}).to_frame()["metric"])  # not of both


def test_pairs_that_are_none_are_refused():
    one, two = pair(50, 1).values()
    for other in (two.take(np.arange(49)), two.take(np.arange(50)[::-1])):
        with pytest.raises(DataError, match="other rows"): compare({"one": one, "two": other})
    from dataclasses import replace
    with pytest.raises(DataError, match="other true classes"): compare({"one": one, "two": replace(two, y=(two.y + 1) % 3)})
    with pytest.raises(DataError, match="other labels"): compare({"one": one, "two": replace(two, labels=Labels(("x", "y", "z")))})
    with pytest.raises(DataError, match="no rows"): compare({"one": one.take(slice(0)), "two": two.take(slice(0))})


def test_too_few_rows_have_no_bound():
    c = compare(pair(8, 1), metrics=["ECE"])
    assert c.rows[1].gap.high == np.inf and c.rows[1].verdict == "not shown"
