"""The conformal floor beside MAPIE and crepes: equal where they are right; elsewhere the peer's value, ours and the theory's."""
import numpy as np
import pytest
from scipy.stats import kstest

from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.conformal_rank import marginal_rank
from fine_tune_llm.uncertainty.cutoffs import block_sets
from fine_tune_llm.uncertainty.guarantees import cut_of
from fine_tune_llm.uncertainty.p_values import conformal_p_values
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.scores import Score, ahead, class_block, true_block

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
K = 12


def draw(rng, n, k=K, spread=2.0):
    z = rng.normal(0, spread, (n, k))
    p = np.exp(z)
    return p / p.sum(axis=1, keepdims=True), (z + rng.gumbel(size=z.shape)).argmax(axis=1)


def preds(p, y, name):
    return Predictions([f"{name}{i}" for i in range(len(p))], Labels(tuple(f"c{i}" for i in range(p.shape[1]))), probs=p, y=y)


def mapie(score, cal, y, test, last="randomized", alpha=0.1, seed=7):
    """MAPIE's threshold, sets and score object, on probabilities that are given."""
    pytest.importorskip("mapie")
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin
    class Given(ClassifierMixin, BaseEstimator):
        def __init__(self): self.classes_, self.is_fitted_ = np.arange(cal.shape[1]), True
        def fit(self, x, y): return self
        def predict_proba(self, x): return np.asarray(x)
        def predict(self, x): return np.asarray(x).argmax(axis=1)
    model = SplitConformalClassifier(Given(), confidence_level=1 - alpha, conformity_score=score, prefit=True, random_state=seed)
    model.conformalize(cal, y)
    sets = model.predict_set(test, conformity_score_params={} if score == "lac" else {"include_last_label": last})[1][:, :, 0]
    function = model._mapie_classifier.conformity_score_function_
    return float(np.ravel(function.quantiles_)[0]), sets, function


def their_coins(n, seed=7): return 1 - np.random.RandomState(seed).uniform(size=n)  # MAPIE subtracts u p, we add it


@pytest.mark.parametrize("n", [20, 99, 500])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_lac_is_mapies(n, alpha):
    rng = np.random.default_rng(n)
    (cal, y), (test, _) = draw(rng, n), draw(rng, 400)
    theirs, sets, _ = mapie("lac", cal, y, test, alpha=alpha)
    ours = ConformalClassifier("lac", alpha=alpha).fit(preds(cal, y, "c"))
    assert 1 - np.exp(-ours.threshold_) == pytest.approx(theirs, abs=1e-12)
    assert (ours.predict(preds(test, None, "t")).matrix == sets).all()


@pytest.mark.parametrize("n", [20, 99, 500])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_aps_is_mapies_with_its_coins(n, alpha):
    rng = np.random.default_rng(n)
    (cal, y), (test, _) = draw(rng, n), draw(rng, 400)
    theirs, sets, _ = mapie("aps", cal, y, test, alpha=alpha)
    ours = cut_of(true_block(cal, y, their_coins(n), Score("aps")), alpha).value
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert (block_sets(test, their_coins(400), np.full(400, ours), Score("aps"), 4)[0] == sets).all()


def raps_part(cal, y, share, seed=7):
    """The rows that MAPIE leaves for calibration: its stratified split, remade with scikit-learn."""
    from sklearn.model_selection import StratifiedShuffleSplit
    return next(StratifiedShuffleSplit(n_splits=1, test_size=share, random_state=seed).split(cal, y))[0]


def test_raps_threshold_is_mapies_and_its_sets_up_to_one_place_after_the_free_ones():
    rng = np.random.default_rng(0)
    (cal, y), (test, _) = draw(rng, 500), draw(rng, 800)
    theirs, sets, function = mapie("raps", cal, y, test)
    score, kept = Score("raps", lam=float(np.ravel(function.lambda_star)[0]), k_reg=int(np.ravel(function.k_star)[0])), raps_part(cal, y, function.size_raps)
    ours = cut_of(true_block(cal[kept], y[kept], their_coins(len(kept)), score), 0.1).value
    assert ours == pytest.approx(theirs, abs=1e-12)
    inside, size = block_sets(test, their_coins(800), np.full(800, ours), score, 4)
    short = size <= score.k_reg
    assert short.mean() > 0.5 and (inside[short] == sets[short]).all()


def test_mapies_raps_sets_that_are_longer_keep_a_label_too_many():
    """MAPIE tests the last label of a set of L with V = (s - q) / (p - lam (L - k)+ + lam 1{L > k}), though its s already holds the
    fine; for L > k + 1 the denominator can be negative, and the label then stays whatever the coin. We keep it when
    rho + u p + lam (r - k)+ <= q. Theory: coverage k / (n + 1) on average."""
    rng, found, n, m = np.random.default_rng(1), [], 600, 2000
    for seed in range(30):
        (cal, y), (test, truth) = draw(rng, n, 20, 1.0), draw(rng, m, 20, 1.0)
        theirs, sets, function = mapie("raps", cal, y, test, seed=seed)
        score, kept = Score("raps", lam=float(np.ravel(function.lambda_star)[0]), k_reg=int(np.ravel(function.k_star)[0])), raps_part(cal, y, function.size_raps, seed)
        ours = cut_of(true_block(cal[kept], y[kept], their_coins(len(kept), seed), score), 0.1).value
        assert ours == pytest.approx(theirs, abs=1e-12)
        inside, _ = block_sets(test, their_coins(m, seed), np.full(m, ours), score, 20)
        assert not (inside & ~sets).any()  # the same threshold and coins: theirs holds ours, and more
        found.append([s[np.arange(m), truth].mean() for s in (inside, sets)] + [(sets & ~inside).sum(axis=1).mean()])
    (right, peer, more), theory = np.mean(found, axis=0), marginal_rank(len(kept), 0.1) / (len(kept) + 1)
    error = np.std(np.array(found)[:, 0], axis=0) / np.sqrt(30), np.ptp(np.array(found)[:, :2], axis=1).std() / np.sqrt(30)
    assert abs(right - theory) < 4 * error[0] and peer > right + 2 * error[1] and more > 0.1  # 0.902, 0.906, and 0.17 labels a row


@pytest.mark.parametrize("last", [True, False])
def test_mapies_other_options_mix_two_variants_of_aps(last):
    """include_last_label=True or False predicts without coins what was calibrated with coins: coverage is not 1 - alpha but well
    above, or below. Ours uses one variant in both phases."""
    rng, found = np.random.default_rng(2), []
    for seed in range(30):
        (cal, y), (test, truth) = draw(rng, 300), draw(rng, 2000)
        sets = mapie("aps", cal, y, test, last, seed=seed)[1]
        plain = ConformalClassifier("aps", randomized=False).fit(preds(cal, y, f"c{seed}")).predict(preds(test, truth, f"t{seed}"))
        found.append([sets[np.arange(2000), truth].mean(), plain.coverage(truth).value])
    (peer, ours), error = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(30)
    theory = marginal_rank(300, 0.1) / 301
    assert abs(ours - theory) < 4 * error[1]
    assert peer > theory + 0.02 if last else peer < theory - 0.02


def test_too_few_rows():
    """Eight rows cannot carry 90%: theory +inf and full sets. MAPIE refuses; so no peer's number looks fine here."""
    rng = np.random.default_rng(3)
    (cal, y), (test, _) = draw(rng, 8, 3), draw(rng, 5, 3)
    y[:3] = np.arange(3)
    with pytest.raises(ValueError): mapie("lac", cal, y, test)
    ours = ConformalClassifier("lac").fit(preds(cal, y, "c"))
    assert ours.threshold_ == np.inf and ours.predict(preds(test, None, "t")).matrix.all()


def crepes_fitted(cal, y, **kw):
    crepes = pytest.importorskip("crepes")
    from crepes.extras import hinge
    return crepes.ConformalClassifier().fit(hinge(cal, np.arange(cal.shape[1]), y), **kw), hinge


@pytest.mark.parametrize("n, alpha", [(20, 0.1), (99, 0.05), (500, 0.3)])
def test_sets_and_p_values_are_those_of_crepes(n, alpha):
    rng = np.random.default_rng(n)
    (cal, y), (test, _) = draw(rng, n), draw(rng, 300)
    theirs, hinge = crepes_fitted(cal, y)
    ours, rows = ConformalClassifier("lac", alpha=alpha).fit(preds(cal, y, "c")), preds(test, None, "t")
    p = theirs.predict_p(hinge(test), smoothing=False)
    assert np.allclose(conformal_p_values(ours, rows), p, atol=1e-12)
    assert (ours.predict(rows).matrix == theirs.predict_set(hinge(test), confidence=1 - alpha, smoothing=False).astype(bool)).all()


def test_mondrian_p_values_are_those_of_crepes():
    import pandas as pd
    rng = np.random.default_rng(9)
    (cal, y), (test, _), bins = draw(rng, 300), draw(rng, 200), rng.integers(3, size=500)
    theirs, hinge = crepes_fitted(cal, y, bins=bins[:300])
    ids = [f"r{i}" for i in range(500)]
    groups = pd.DataFrame({"part": bins.astype(str)})
    labels = Labels(tuple(f"c{i}" for i in range(K)))
    a, b = (Predictions(ids[s], labels, probs=p, y=t, groups=groups[s].reset_index(drop=True)) for s, p, t in (
        (slice(0, 300), cal, y), (slice(300, 500), test, None)))
    ours = ConformalClassifier("lac", guarantee="group", column="part").fit(a)
    assert np.allclose(conformal_p_values(ours, b), theirs.predict_p(hinge(test), bins=bins[300:], smoothing=False), atol=1e-12)


def test_smoothed_p_values_have_crepes_law():
    """Other coins, the same law: uniform, also where scores tie."""
    rng, ours, theirs = np.random.default_rng(4), [], []
    for i in range(150):
        p, y = draw(rng, 60, 4)
        p = p.round(1) + 0.05
        p /= p.sum(axis=1, keepdims=True)
        model, hinge = crepes_fitted(p[:50], y[:50])
        theirs.append(model.predict_p(hinge(p[50:]), smoothing=True, seed=i)[0, y[50]])
        c = ConformalClassifier("lac").fit(preds(p[:50], y[:50], f"c{i}"))
        ours.append(conformal_p_values(c, preds(p[50:], None, f"t{i}"), smoothed=True)[0, y[50]])
    assert kstest(ours, "uniform").pvalue > 0.01 and kstest(theirs, "uniform").pvalue > 0.01


def test_margin_is_crepes():
    rng = np.random.default_rng(5)
    pytest.importorskip("crepes")
    from crepes.extras import margin
    p, y = draw(rng, 200)
    assert np.allclose(class_block(p, np.ones(200), Score("margin")), margin(p))
    assert np.allclose(true_block(p, y, np.ones(200), Score("margin")), margin(p, np.arange(K), y))


def test_places_are_mapies():
    rng = np.random.default_rng(6)
    pytest.importorskip("mapie")
    from mapie.conformity_scores.sets.utils import get_true_label_position
    p, y = draw(rng, 200)
    assert (ahead(p, y)[1] == get_true_label_position(p, y)[:, 0] + 1).all()  # they count from 0
