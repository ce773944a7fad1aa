"""Calibrators beside scikit-learn's and netcal's, from the same probabilities."""
import numpy as np
import pytest
from scipy.special import softmax

from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.calibration import TemperatureScaling
from fine_tune_llm.uncertainty.calibration_curves import BetaCalibration, PlattScaling
from fine_tune_llm.uncertainty.calibration_maps import DirichletCalibration, VectorScaling
from fine_tune_llm.uncertainty.calibration_steps import HistogramBinning, IsotonicCalibration
from fine_tune_llm.uncertainty.predictions import Predictions

pytestmark = pytest.mark.peers


def draw(n, k, seed, name):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, k))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    return Predictions([f"{name}{i}" for i in range(n)], Labels(tuple(map(str, range(k)))), logits=2.5 * z + np.linspace(0, 1, k), y=y)


def sklearn_peer(preds, method):
    "scikit-learn's calibrator on a model whose decision function is our logits."
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression
    k, identity = len(preds.labels), LogisticRegression()
    identity.coef_ = np.array([[-1.0, 1.0]]) if k == 2 else np.eye(k)
    identity.intercept_, identity.classes_, identity.n_features_in_ = np.zeros(len(identity.coef_)), np.arange(k), k
    return CalibratedClassifierCV(FrozenEstimator(identity), method=method).fit(preds.logits, preds.y)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_temperature_of_sklearn(k):
    rows, test = draw(1000, k, 0, "r"), draw(500, k, 1, "t")
    assert np.abs(sklearn_peer(rows, "temperature").predict_proba(test.logits) - TemperatureScaling().fit(rows)(test).probs).max() < 1e-3


def test_temperature_of_netcal():
    from netcal.scaling import TemperatureScaling as Peer
    rows, test = draw(1000, 3, 0, "r"), draw(500, 3, 1, "t")
    peer = Peer()
    peer.fit(softmax(rows.logits, axis=1), rows.y)
    assert np.abs(peer.transform(softmax(test.logits, axis=1)) - TemperatureScaling().fit(rows)(test).probs).max() < 2e-3


def test_platt_of_sklearn():
    rows, test = draw(800, 2, 0, "r"), draw(500, 2, 1, "t")
    assert np.abs(sklearn_peer(rows, "sigmoid").predict_proba(test.logits) - PlattScaling().fit(rows)(test).probs).max() < 1e-4


def test_isotonic_of_sklearn():
    "Two classes: scikit-learn fits one curve on the logit of class 1, and so do we on its probability; equal at the fitted rows."
    rows = draw(800, 2, 0, "r")
    ours = IsotonicCalibration(prior=0).fit(rows)
    assert np.allclose(sklearn_peer(rows, "isotonic").predict_proba(rows.logits), np.exp(ours.transform(rows.log_probs)), atol=1e-9)


def test_isotonic_one_vs_rest_from_sklearns_curves():
    from sklearn.isotonic import IsotonicRegression
    rows, test = draw(800, 4, 0, "r"), draw(500, 4, 1, "t")
    p = [softmax(x.logits, axis=1) for x in (rows, test)]
    g = np.column_stack([IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(p[0][:, j], rows.y == j).predict(p[1][:, j]) for j in range(4)])
    ok = g.sum(axis=1) > 0
    assert np.allclose(IsotonicCalibration(prior=0).fit(rows)(test).probs[ok], (g / np.maximum(g.sum(axis=1, keepdims=True), 1e-300))[ok], atol=1e-9)


def test_free_dirichlet_is_multinomial_logistic_regression():
    "Without a hold, Dirichlet calibration is logistic regression on log probabilities: scikit-learn's, unpenalised."
    from sklearn.linear_model import LogisticRegression
    rows, test = draw(1500, 3, 0, "r"), draw(500, 3, 1, "t")
    peer = LogisticRegression(C=np.inf, max_iter=5000, tol=1e-10).fit(rows.log_probs, rows.y)
    free = DirichletCalibration(off_diagonal_sd=1e4, weight_sd=1e4, shift_sd=1e4).fit(rows)
    assert np.abs(free(test).probs - peer.predict_proba(test.log_probs)).max() < 1e-3


def test_free_vector_scaling_against_a_general_optimiser():
    from scipy.optimize import minimize
    rows, test = draw(600, 3, 0, "r"), draw(300, 3, 1, "t")
    def price(t): return -np.log(softmax(rows.log_probs * t[:3] + t[3:], axis=1)[np.arange(600), rows.y]).sum()
    peer = minimize(price, np.ones(6) * 0.5, method="BFGS").x
    free = VectorScaling(weight_sd=1e4, shift_sd=1e4).fit(rows)
    assert np.abs(free(test).probs - softmax(test.log_probs * peer[:3] + peer[3:], axis=1)).max() < 1e-3


def test_beta_of_netcal():
    "netcal's beta calibration has no prior targets, ours Platt's: with 4,000 rows they agree to the third digit."
    from netcal.scaling import BetaCalibration as Peer
    rows, test = draw(4000, 2, 0, "r"), draw(500, 2, 1, "t")
    peer = Peer()
    peer.fit(softmax(rows.logits, axis=1)[:, 1], rows.y)
    assert np.abs(peer.transform(softmax(test.logits, axis=1)[:, 1]).ravel() - BetaCalibration().fit(rows)(test).probs[:, 1]).max() < 0.01


def test_histogram_of_netcal():
    "Equal-width bins of the textbook, prior 0: the same shares in the same bins."
    from netcal.binning import HistogramBinning as Peer
    rows, test = draw(3000, 2, 0, "r"), draw(500, 2, 1, "t")
    peer = Peer(bins=10)
    peer.fit(softmax(rows.logits, axis=1)[:, 1], rows.y)
    ours = HistogramBinning(bins=10, cuts="equal-width", prior=0).fit(rows)(test).probs[:, 1]
    assert np.abs(peer.transform(softmax(test.logits, axis=1)[:, 1]).ravel() - ours).max() < 1e-6
