"""Laws that conformal prediction must obey, each with a mistake that the same test refuses.

The figures come from theory: the coverage of a calibration set of n continuous scores follows Beta(k, n + 1 - k) with
k = n + 1 - floor((n + 1) alpha), whatever the model.
"""
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, betabinom, binom, kstest, norm

from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.conformal_rank import coverage_law, marginal_rank, pac_rank, threshold
from fine_tune_llm.uncertainty.guarantees import weighted_thresholds
from fine_tune_llm.uncertainty.p_values import conformal_p_values
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.scores import SCORES

TWO, K = Labels(("no", "yes")), 7
LETTERS = Labels(tuple("abcdefg"))


# The coverage law

def uniform_rows(rng, n):
    """Rows whose true class 0 has a uniform probability: its lac score is -log U, so a threshold q covers 1 - exp(-q)."""
    p = rng.random(n)
    return Predictions(np.arange(n).astype(str), TWO, probs=np.stack([p, 1 - p], axis=1), y=np.zeros(n, dtype=int))


def exact(preds): return ConformalClassifier("lac", alpha=0.1).fit(preds).threshold_
def too_high(preds): return np.quantile(-np.log(preds.probs[:, 0]), ceil((len(preds) + 1) * 0.9) / len(preds), method="higher")
def uncorrected(preds): return np.quantile(-np.log(preds.probs[:, 0]), 0.9)


@pytest.mark.parametrize("n", [50, 100, 1000])
def test_coverage_follows_its_beta_law_and_two_known_mistakes_do_not(n):
    rng, k = np.random.default_rng(n), n + 1 - floor((n + 1) * Fraction(1, 10))
    rules = (exact, too_high, uncorrected)
    covered = np.array([[1 - np.exp(-rule(preds)) for rule in rules] for preds in (uniform_rows(rng, n) for _ in range(2000))])
    fit = [kstest(c, beta(k, n + 1 - k).cdf).pvalue for c in covered.T]
    assert fit[0] > 0.01 and fit[1] < 0.01 and fit[2] < 0.01, fit
    sd = beta(k, n + 1 - k).std() / np.sqrt(2000)
    means = [k / (n + 1), (k + 1) / (n + 1), ((n - 1) * 0.9 + 1) / (n + 1)]  # ours; one rank too high; numpy's interpolation
    assert (np.abs(covered.mean(axis=0) - means) < 4 * sd).all() and np.abs(np.subtract(means[1:], means[0])).min() > 4 * sd


TABLE = {  # n: k, mean, sd, 1%, 5%, 95%, 99% of the coverage, sd on 1000 test rows; alpha = 0.1
    50: (46, .9020, .0412, .7850, .8262, .9598, .9737, .0423), 100: (91, .9010, .0296, .8213, .8482, .9447, .9576, .0310),
    500: (451, .9002, .0134, .8668, .8773, .9213, .9289, .0164), 1000: (901, .9001, .0095, .8769, .8841, .9152, .9209, .0134),
    5000: (4501, .9000, .0042, .8899, .8930, .9069, .9096, .0104), 20000: (18001, .9000, .0021, .8950, .8965, .9035, .9049, .0097)}


@pytest.mark.parametrize("n", TABLE)
def test_table_of_the_law(n):
    k, mean, sd, *quantiles, tested = TABLE[n]
    law = coverage_law(n, marginal_rank(n, 0.1))
    found = [law.mean(), law.std(), *law.ppf([.01, .05, .95, .99]), betabinom(1000, k, n + 1 - k).std() / 1000]
    assert marginal_rank(n, 0.1) == k and np.abs(np.subtract(found, [mean, sd, *quantiles, tested])).max() <= 5.1e-5
    low, high = ConformalClassifier(alpha=0.1).fit(uniform_rows(np.random.default_rng(0), n)).predict(uniform_rows(
        np.random.default_rng(1), 1).take([])).law(1000, level=0.9)
    hits = betabinom(1000, k, n + 1 - k)
    assert hits.cdf(round(1000 * low) - 1) < 0.05 <= hits.cdf(round(1000 * low)) and hits.sf(round(1000 * high)) <= 0.05


@pytest.mark.parametrize("n, k", [(100, 96), (500, 462), (1000, 916), (5000, 4536)])
def test_pac_ranks(n, k):
    assert pac_rank(n, 0.1, 0.05) == k == ConformalClassifier(guarantee="pac", delta=0.05).fit(uniform_rows(np.random.default_rng(0), n)).rank_
    assert binom.sf(k - 1, n, 0.9) <= 0.05 < binom.sf(k - 2, n, 0.9)  # the definition
    assert .45 <= binom.sf(marginal_rank(n, 0.1) - 1, n, 0.9) <= .495  # how often the marginal rank falls short


def test_pac_keeps_its_word():
    """At most a share delta of calibration sets covers less than promised; the marginal rank falls short in nearly half."""
    rng, short = np.random.default_rng(5), {"pac": 0, "marginal": 0}
    for _ in range(1000):
        preds = uniform_rows(rng, 100)
        for name in short: short[name] += 1 - np.exp(-ConformalClassifier(alpha=0.1, guarantee=name).fit(preds).threshold_) < 0.9
    assert short["pac"] / 1000 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000) and short["marginal"] > 400


# The rank, exactly

CELLS = [(n, a) for n in (*range(20, 400), 500, 1000, 2000, 5000, 10_000, 20_000) for a in (.01, .05, .1, .2, .3) if (n + 1) * Fraction(str(a)) >= 1]


def test_rank_is_exact_in_every_cell():
    """The alphas come as floats, also as 1 - 0.9 and the like; the check is exact, in fractions of the decimals."""
    assert len(CELLS) == 1851
    truth = [n + 1 - floor((n + 1) * Fraction(str(a))) for n, a in CELLS]
    assert [marginal_rank(n, a) for n, a in CELLS] == truth
    assert [marginal_rank(n, 1 - round(1 - a, 2)) for n, a in CELLS] == truth  # 1 - 0.9 is not 0.1
    assert [threshold(np.arange(1, n + 1), marginal_rank(n, a)) for n, a in CELLS] == truth
    recipe = [np.quantile(np.arange(1, n + 1), min(1, ceil((n + 1) * (1 - a)) / n), method="higher") for n, a in CELLS]
    assert sum(r != k for r, k in zip(recipe, truth)) == 1732  # the textbook recipe: wrong wherever k < n
    inverted = [np.quantile(np.arange(1, n + 1), k / n, method="inverted_cdf") for (n, a), k in zip(CELLS, truth)]
    assert sum(r != k for r, k in zip(inverted, truth)) == 28  # the right k, turned into a float and back
    assert sum(ceil((n + 1) * round(1 - a, 2)) != k for (n, a), k in zip(CELLS, truth)) == 0 < sum(
        floor((n + 1) * (1 - round(1 - a, 2))) != n + 1 - k for (n, a), k in zip(CELLS, truth))  # floats: one form right, one wrong


# Guarantees

def table_rows(rng, n, name, groups=None, scale=1.0, dtype=np.float64):
    z = rng.normal(0, 2, (n, K))
    y = (np.reshape(scale, (-1, 1)) * z + rng.gumbel(size=z.shape)).argmax(axis=1)
    return Predictions([f"{name}{i}" for i in range(n)], LETTERS, logits=z.astype(dtype), y=y,
                       groups=None if groups is None else pd.DataFrame({"channel": groups}))


def test_mondrian_law_in_each_group():
    """Web and phone have scores of different laws and sizes; each coverage follows the Beta law of its own number of rows."""
    rng, sizes, covered, single = np.random.default_rng(5), {"web": 60, "phone": 25}, {"web": [], "phone": []}, []
    channel = np.repeat(list(sizes), list(sizes.values()))
    power = np.where(channel == "phone", 3.0, 1.0)  # p = U ** power: the score is power * Exp(1)
    for _ in range(600):
        p = rng.random(85) ** power
        preds = Predictions(np.arange(85).astype(str), TWO, probs=np.stack([p, 1 - p], axis=1), y=np.zeros(85, dtype=int),
                            groups=pd.DataFrame({"channel": channel}))
        cuts = ConformalClassifier(alpha=0.1, guarantee="group", column="channel").fit(preds).threshold_
        for name in sizes: covered[name].append(1 - np.exp(-cuts[name] / (3 if name == "phone" else 1)))
        single.append(1 - np.exp(-ConformalClassifier(alpha=0.1).fit(preds).threshold_ / 3))
    for name, n in sizes.items():
        k = n + 1 - floor((n + 1) * Fraction(1, 10))
        assert kstest(covered[name], beta(k, n + 1 - k).cdf).pvalue > 0.01
        assert kstest(covered[name], beta(k - 1, n + 2 - k).cdf).pvalue < 1e-4
    assert np.mean(single) < 0.8  # one threshold for both leaves the phone behind


def test_class_guarantee_in_each_class():
    rng = np.random.default_rng(8)
    share = {"class": [], "marginal": []}
    for i in range(40):
        calibration, test = table_rows(rng, 700, f"c{i}"), table_rows(rng, 2000, f"t{i}")
        for preds in calibration, test: preds.logits[:, 0] -= 2  # the model underrates class a
        for kind in share:
            sets = ConformalClassifier(alpha=0.1, guarantee=kind).fit(calibration).predict(test)
            share[kind].append(sets.hits(test.y)[test.y == 0].mean())
    error = np.std(share["class"]) / np.sqrt(40)
    assert 0.9 - 4 * error < np.mean(share["class"]) < 0.9 + 4 * error + 0.02 and np.mean(share["marginal"]) < 0.75


def test_weights_of_a_known_shift_belong_to_their_scores():
    """x ~ N(0, 1) calibrates, x ~ N(1, 1) comes: the ratio is exp(x - 1/2). Scores grow with x, so no weights under-cover;
    weights and scores sorted apart, as in one published library, over-cover by far."""
    rng, found = np.random.default_rng(4), []
    for _ in range(300):
        x, new = rng.normal(0, 1, 300), rng.normal(1, 1, 300)
        s, w, own = rng.normal(np.maximum(x, 0), 1), np.exp(x - 0.5), np.exp(new - 0.5)
        qs = (weighted_thresholds(s, w, own, 0.1), weighted_thresholds(np.sort(s), np.sort(w), own, 0.1), threshold(s, 271))
        found.append([norm.cdf(q - np.maximum(new, 0)).mean() for q in qs])
    (right, apart, plain), error = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(300)
    assert 0.9 - 4 * error[0] <= right <= 0.92 and plain < 0.8 and apart > 0.93


def test_weighted_classifier_covers_after_the_shift():
    """Half the new rows are hard, against a fifth of the calibration rows: the ratio is 2.5 for hard rows, 0.625 for others."""
    rng, covered = np.random.default_rng(6), []
    for i in range(60):
        hard = [rng.random(n) < share for n, share in ((400, 0.2), (1000, 0.5))]
        calibration, test = (table_rows(rng, len(h), f"{i}{len(h)}", scale=np.where(h, 0.2, 1.0)) for h in hard)
        w = [np.where(h, 2.5, 0.625) for h in hard]
        weighted = ConformalClassifier("aps", guarantee="weighted").fit(calibration, weights=w[0]).predict(test, weights=w[1])
        covered.append([s.hits(test.y).mean() for s in (weighted, ConformalClassifier("aps").fit(calibration).predict(test))])
    (right, plain), error = np.mean(covered, axis=0), np.std(covered, axis=0) / np.sqrt(60)
    assert 0.9 - 4 * error[0] <= right <= 0.9 + 4 * error[0] + 0.01 and plain < 0.9 - 6 * error[1]


def test_clustered_sets_cover_each_cluster():
    rng, share = np.random.default_rng(9), []
    for i in range(40):
        calibration, test = table_rows(rng, 1000, f"c{i}"), table_rows(rng, 1500, f"t{i}")
        for preds in calibration, test: preds.logits[:, :2] -= 2  # two classes that score alike, and badly
        c = ConformalClassifier(alpha=0.1, guarantee="clustered", tuning_share=0.4, clusters=2, seed=i).fit(calibration)
        of, hits = c.line_.clusters, c.predict(test).hits(test.y)
        assert of[0] == of[1] and (of[2:] != of[0]).all()
        share.append([hits[np.isin(test.y, (0, 1))].mean(), hits[test.y > 1].mean()])
    error = np.std(share, axis=0) / np.sqrt(40)
    assert (np.mean(share, axis=0) > 0.9 - 4 * error).all() and (np.mean(share, axis=0) < 0.9 + 4 * error + 0.02).all()


# Invariances, for every score

@pytest.mark.parametrize("kind", [dict(), dict(guarantee="pac"), dict(guarantee="class"), dict(guarantee="group", column="channel"),
                                  dict(guarantee="weighted"), dict(guarantee="clustered", tuning_share=0.4, clusters=2)],
                         ids=lambda k: k.get("guarantee", "marginal"))
@pytest.mark.parametrize("score", SCORES)
def test_sets_are_nested_in_alpha(score, kind):
    rng = np.random.default_rng(0)
    calibration, test = (table_rows(rng, n, str(n), groups=rng.choice(["web", "phone"], n)) for n in (400, 300))
    weights = [dict(weights=rng.random(n)) if kind.get("guarantee") == "weighted" else {} for n in (400, 300)]
    c = ConformalClassifier(score, **kind).fit(calibration, **weights[0])
    sets = [c.predict(test, alpha=a, **weights[1]).bits for a in (0.4, 0.3, 0.2, 0.1, 0.05, 0.01)]
    assert all(not (small & ~large).any() for small, large in zip(sets, sets[1:])) and (sets[0] != sets[3]).any()


@pytest.mark.parametrize("score", SCORES)
def test_labels_can_be_permuted(score):
    rng, order = np.random.default_rng(1), np.array([3, 0, 6, 1, 5, 2, 4])
    calibration, test = table_rows(rng, 400, "c"), table_rows(rng, 300, "t")
    def moved(preds): return Predictions(preds.ids, Labels(tuple(LETTERS[k] for k in order)), logits=preds.logits[:, order], y=np.argsort(order)[preds.y])
    for kind in ("marginal", "class"):
        plain = ConformalClassifier(score, guarantee=kind).fit(calibration).predict(test).matrix
        assert (ConformalClassifier(score, guarantee=kind).fit(moved(calibration)).predict(moved(test)).matrix == plain[:, order]).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("given", ["probs", "logits"])
def test_float32_differs_on_the_threshold_alone(score, given):
    sets = []
    for dtype in np.float32, np.float64:
        rng = np.random.default_rng(2)
        pair = [table_rows(rng, n, str(n), dtype=dtype) for n in (400, 2000)]
        if given == "probs": pair = [Predictions(p.ids, LETTERS, probs=p.probabilities.astype(dtype), y=p.y) for p in pair]
        c = ConformalClassifier(score).fit(pair[0])
        sets.append((c.threshold_, c.predict(pair[1]).matrix))
    assert sets[0][0] == pytest.approx(sets[1][0], rel=1e-5, abs=1e-6) and (sets[0][1] != sets[1][1]).mean() < 1e-3


@pytest.mark.parametrize("score", SCORES)
def test_smoothed_p_values_are_uniform(score):
    """One fresh row per calibration set, so that the p-values are independent; probabilities are rounded, so that scores tie."""
    rng, found = np.random.default_rng(11), {True: [], False: []}
    p = rng.dirichlet(np.ones(4) * 2, 31 * 300).round(1) + 0.02
    p /= p.sum(axis=1, keepdims=True)
    y = (rng.random((len(p), 1)) > np.cumsum(p, axis=1)).sum(axis=1).clip(0, 3)
    every = Predictions(np.arange(len(p)).astype(str), Labels(tuple("abcd")), probs=p, y=y)
    for i in range(300):
        rows = every.take(np.arange(31 * i, 31 * i + 31))
        c = ConformalClassifier(score, randomized=False).fit(rows.take(np.arange(30)))
        for smoothed in found: found[smoothed].append(conformal_p_values(c, rows.take([30]), smoothed)[0, rows.y[30]])
    assert kstest(found[True], "uniform").pvalue > 0.01
    assert all((np.array(found[False]) <= a).mean() <= a + 3 * np.sqrt(a * (1 - a) / 300) for a in (0.05, 0.1, 0.3))


# Files that real life brings

MALFORMED = Path(__file__).parents[2] / "shared" / "data" / "malformed"


def file_rows(name, **kind):
    if not (MALFORMED / name).exists(): pytest.skip("the malformed files are not here")
    table = pd.read_csv(MALFORMED / name)
    (key,) = kind
    return Predictions(table["id"].astype(str), TWO, **{key: table[kind[key]].to_numpy()}, y=table["label"].to_numpy())


def test_five_calibration_rows():
    """Rank 6 of 5 at 10%: infinite, every set full, and said so; rank 5 at 20%: finite."""
    c = ConformalClassifier("lac", alpha=0.1).fit(file_rows("tiny_calibration.csv", probs=["p0", "p1"]))
    new = uniform_rows(np.random.default_rng(0), 50)
    assert c.threshold_ == np.inf and c.predict(new).matrix.all() and "every set is full" in repr(c)
    assert "5 calibration rows are too few for alpha = 0.1, which needs 9" in c.predict(new).guarantee
    assert not c.predict(new, alpha=0.2).matrix.all() and "too few" not in c.predict(new, alpha=0.2).guarantee


def test_constant_logits_give_both_classes():
    preds = file_rows("logits_constant.csv", logits=["l0", "l1"])
    c = ConformalClassifier("lac", alpha=0.1).fit(preds)
    assert c.threshold_ == pytest.approx(np.log(2)) and c.predict(preds).matrix.all()


@pytest.mark.parametrize("score", SCORES)
def test_one_class_read_only_and_half_precision(score):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 3)).astype(np.float16)
    z.flags.writeable = False
    preds = Predictions([f"{i}" for i in range(40)], Labels(tuple("abc")), logits=z, y=np.zeros(40, dtype=int))
    c = ConformalClassifier(score, guarantee="class").fit(preds)
    assert c.predict(preds).matrix[:, 1:].all() and "2 of 3 have too few rows" in c.predict(preds).guarantee
