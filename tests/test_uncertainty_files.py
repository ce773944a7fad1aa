"""A file that lacks a value, holds one too many, or holds nonsense in its place is refused by name; nothing is guessed."""
import json

import numpy as np
import pytest

from fine_tune_llm.core.errors import ConfigurationError, DataError, FineTuneLLMError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.calibration import TemperatureScaling
from fine_tune_llm.uncertainty.calibration_curves import BetaCalibration
from fine_tune_llm.uncertainty.calibration_maps import VectorScaling
from fine_tune_llm.uncertainty.calibration_steps import HistogramBinning, IsotonicCalibration
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.cross import cross_conformal
from fine_tune_llm.uncertainty.metrics import calibration_state
from fine_tune_llm.uncertainty.monitor import ExchangeabilityMonitor
from fine_tune_llm.uncertainty.online import AdaptiveConformal
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.risk import NEWER, DecisionPolicy

FITTED = [TemperatureScaling(), VectorScaling(), BetaCalibration(), IsotonicCalibration(), HistogramBinning(), AdaptiveConformal(),
          ExchangeabilityMonitor(), ConformalClassifier("raps", alpha=0.2), ConformalClassifier(guarantee="class"),
          DecisionPolicy(max_risk=0.9), DecisionPolicy(abstain_cost=0.3, max_abstention=0.5)]


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 60)
    y = [int(rng.choice(3, p=q)) for q in p]
    return Predictions([f"r{i}" for i in range(60)], Labels(("a", "b", "c")), probs=p, y=y)


def value_of(estimator, rows): return json.loads(json.dumps(estimator.fit(rows).to_dict()))


@pytest.mark.parametrize("estimator", FITTED, ids=lambda e: f"{type(e).__name__}")
def test_a_whole_file_comes_back(estimator, rows):
    value = value_of(estimator, rows)
    assert json.dumps(type(estimator).from_dict(value).to_dict()) == json.dumps(value)  # the order of its keys too


@pytest.mark.parametrize("estimator", FITTED, ids=lambda e: f"{type(e).__name__}")
def test_a_missing_value_is_named(estimator, rows):
    value = value_of(estimator, rows)
    for key in value.keys() - {"kind", "version", *(NEWER if isinstance(estimator, DecisionPolicy) else ())}:
        with pytest.raises(DataError, match="saved without its scores" if key == "line_" else rf"missing value .*key {key}"):
            type(estimator).from_dict({k: v for k, v in value.items() if k != key})


@pytest.mark.parametrize("estimator", FITTED, ids=lambda e: f"{type(e).__name__}")
def test_an_unknown_value_is_named(estimator, rows):
    with pytest.raises(DataError, match="unknown value .*key decide"): type(estimator).from_dict({**value_of(estimator, rows), "decide": 1})


@pytest.mark.parametrize("nonsense", [None, "x", [], {"a": 1}, 7, [[]], {"array": "x"}], ids=repr)
@pytest.mark.parametrize("estimator", FITTED, ids=lambda e: f"{type(e).__name__}")
def test_nonsense_raises_nothing_from_the_depths(estimator, nonsense, rows):
    "Some of it can be read, such as a seed of 7; what cannot is one of our errors, never a KeyError."
    value = value_of(estimator, rows)
    for key in value:
        try: type(estimator).from_dict({**value, key: nonsense})
        except FineTuneLLMError: pass


def test_a_policy_never_gets_a_limit_that_nobody_chose(rows):
    "An earlier reader filled a lost delta or max_risk with the default of the class."
    value = value_of(DecisionPolicy(max_risk=0.9, delta=0.01), rows)
    for key in ("delta", "max_risk", "certified_risk_", "feasible_"):
        with pytest.raises(DataError, match=f"key {key}"): DecisionPolicy.from_dict({k: v for k, v in value.items() if k != key})
    old = DecisionPolicy.from_dict({k: v for k, v in value.items() if k not in NEWER})
    assert old.promise == DecisionPolicy.from_dict(value).promise and (old.max_abstention, old.loss, old.void_) == (None, "errors", "")


def test_a_policy_whose_costs_do_not_fit_its_labels_is_refused(rows):
    value = value_of(DecisionPolicy(max_risk=0.9), rows)
    with pytest.raises(FineTuneLLMError, match=r"costs have shape \(2, 2\), not \(3, 3\)"): DecisionPolicy.from_dict({**value, "costs_": [[0, 1], [1, 0]]})
    with pytest.raises(FineTuneLLMError, match="delta must lie between 0 and 1, got 2"): DecisionPolicy.from_dict({**value, "delta": 2})


def test_a_state_with_broken_sums_is_refused(rows):
    value = calibration_state(rows).to_dict()
    for sums in (None, "x", {}, [1], [[[-1.0]]]):
        with pytest.raises(DataError): type(calibration_state(rows)).from_dict({**value, "sums": sums})
    with pytest.raises(DataError, match="broken: KeyError"): type(calibration_state(rows)).from_dict({k: v for k, v in value.items() if k != "sums"})


@pytest.mark.parametrize("alpha", [0, 1, 10, 90, -0.1, float("nan"), None, "0.1"], ids=repr)
def test_a_level_that_is_no_share_is_refused_when_it_is_written(alpha, rows):
    "It used to be a ValueError or a TypeError of the arithmetic, after the rows were scored."
    with pytest.raises(ConfigurationError, match="alpha must lie between 0 and 1, got"): ConformalClassifier(alpha=alpha)
    fitted = ConformalClassifier(alpha=0.2).fit(rows)
    if alpha is not None:
        with pytest.raises(ConfigurationError, match="alpha must lie between 0 and 1, got"): fitted.predict(rows, alpha=alpha)
    with pytest.raises(ConfigurationError, match="alpha must lie between 0 and 1, got"): cross_conformal([rows], [rows], alpha=alpha)
