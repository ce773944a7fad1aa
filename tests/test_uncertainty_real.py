"""Reproduce the figures of a real fine-tune (MiniLM with LoRA on BANKING77) from its stored test logits.

The reference figures come from another implementation (minilm_banking77_result.json beside the logits); calibration and
evaluation are its two halves of one seeded permutation. Skipped where the files are absent.
"""
import json
from pathlib import Path

import numpy as np
import pytest

from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.calibration import TemperatureScaling
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.metrics import accuracy, ece, nll
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.risk import DecisionPolicy

OUTPUTS = Path(__file__).parents[2] / "shared" / "data" / "outputs"


@pytest.fixture(scope="module")
def reference():
    if not (OUTPUTS / "minilm_banking77_result.json").exists(): pytest.skip("the stored logits are not here")
    return json.loads((OUTPUTS / "minilm_banking77_result.json").read_text())


@pytest.fixture(scope="module")
def preds(reference):
    with np.load(OUTPUTS / "minilm_banking77_test_logits.npz", allow_pickle=False) as z: logits, y = z["logits"], z["labels"]
    return Predictions([f"row{i}" for i in range(len(y))], Labels(tuple(f"intent {k}" for k in range(logits.shape[1]))),
                       logits=logits, y=y, split="test", source="minilm_banking77")


@pytest.fixture(scope="module")
def halves(preds):
    order = np.random.default_rng(0).permutation(len(preds))
    return preds.take(order[:1540]), preds.take(order[1540:])


def test_accuracy_nll_and_ece(reference, preds, halves):
    assert accuracy(preds).value == pytest.approx(reference["acc_all"], abs=1e-12)
    assert accuracy(halves[1]).value == pytest.approx(reference["acc_evalhalf"], abs=1e-12)
    assert nll(preds).value == pytest.approx(reference["nll_all_before"], abs=1e-6)
    e = ece(preds, n_boot=100)
    assert e.value == pytest.approx(reference["ece_all_before"], abs=2e-4)  # float32 there, float64 here
    assert e.low <= e.value <= e.high


def test_temperature_has_nothing_to_fix(reference, halves):
    cal = TemperatureScaling().fit(halves[0])
    assert cal.temperature_ == pytest.approx(reference["T"], abs=2e-3)
    assert cal.interval_[0] < 1 < cal.interval_[1] and not cal.needed_ and "no evidence" in repr(cal)
    assert nll(cal(halves[1])).value == pytest.approx(reference["nll_eval_after"], abs=1e-5)


def test_lac(reference, halves):
    conformal, truth = ConformalClassifier("lac", alpha=0.1).fit(halves[0]), reference["lac_before"]
    sets = conformal.predict(halves[1])
    assert 1 - np.exp(-conformal.threshold_) == pytest.approx(truth["qhat"], abs=1e-6)
    assert sets.coverage(halves[1].y).value == pytest.approx(truth["coverage"], abs=1e-12)
    assert sets.sizes.mean() == pytest.approx(truth["size"], abs=1e-12)
    assert sets.empty / len(sets) == pytest.approx(truth["empty"], abs=1e-12)
    low, high = sets.law(len(sets))
    assert low <= truth["coverage"] <= high


def test_aps_with_and_without_coins(reference, halves):
    tossed, plain = (ConformalClassifier("aps", randomized=r).fit(halves[0]).predict(halves[1]) for r in (True, False))
    for sets in (tossed, plain):
        low, high = sets.law(len(sets))
        assert low <= sets.coverage(halves[1].y).value <= high
    assert [round(reference[k]["size"], 1) for k in ("aps_rand_before", "aps_det_before")] == [1.2, 6.6]  # as 140_conformal says
    assert plain.sizes.mean() == pytest.approx(reference["aps_det_before"]["size"], abs=0.01)
    assert plain.coverage(halves[1].y).value == pytest.approx(reference["aps_det_before"]["coverage"], abs=0.001)
    assert tossed.sizes.mean() == pytest.approx(reference["aps_rand_before"]["size"], abs=0.05)  # other coins


def test_coverage_law_over_splits(preds):
    """Two hundred half splits: the mean coverage is k / (n + 1), here with the second half as a finite population."""
    rng, covered = np.random.default_rng(1), []
    for _ in range(200):
        order = rng.permutation(len(preds))
        rest = preds.take(order[1540:])
        covered.append(ConformalClassifier().fit(preds.take(order[:1540])).predict(rest).coverage(rest.y).value)
    assert abs(np.mean(covered) - 1387 / 1541) < 4 * np.std(covered) / np.sqrt(200)


def test_certificate(halves):
    policy = DecisionPolicy(max_risk=0.05).fit(halves[0])
    decisions = policy.decide(halves[1])
    assert policy.feasible_ and decisions.selective_risk(halves[1].y).low <= 0.05
    assert decisions.abstention().value < 0.2
