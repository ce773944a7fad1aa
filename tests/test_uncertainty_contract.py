"""Contracts that every estimator of the uncertainty floor keeps; parametrised, so they would bore a reader of its notebooks."""
import json

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.core.errors import OverlapError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.calibration import TemperatureScaling
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.metrics import accuracy, brier, ece, nll
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.risk import DecisionPolicy

K = 5
LABELS = Labels(tuple("abcde"), harm=(("b", 2.0),), critical=(("c", "d", 7.0),), description="five letters")
COSTS = [[0, 1, 1, 1, 1], [2, 0, 2, 2, 2], [1, 1, 0, 7, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 0]]


def draw(n=400, seed=0, name="r", dtype=np.float64):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 3, (n, K))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    return Predictions([f"{name}{i}" for i in range(n)], LABELS, logits=(1.5 * z).astype(dtype), y=y, split="calibration",
                       groups=pd.DataFrame({"channel": rng.choice(["web", "app"], n), "age": rng.integers(18, 90, n)}))


def relabelled(preds, order):
    """Move column `order[j]` to place j, with the truth and the names."""
    return Predictions(preds.ids, Labels(tuple(preds.labels[k] for k in order)), logits=preds.logits[:, order],
                       y=np.argsort(order)[preds.y], split=preds.split)


ESTIMATORS = {
    "temperature": TemperatureScaling,
    **{f"{s}-{a}": lambda s=s, a=a: ConformalClassifier(s, alpha=a) for s in ("lac", "aps", "raps") for a in (0.1, 0.001)},
    "aps-plain": lambda: ConformalClassifier("aps", randomized=False),
    "raps-settings": lambda: ConformalClassifier("raps", lam=0.3, k_reg=2, seed=7),
    "policy": DecisionPolicy,
    "policy-costs": lambda: DecisionPolicy(COSTS, abstain_cost=0.4),
    "policy-certified": lambda: DecisionPolicy(max_risk=0.2, delta=0.1),
    "policy-infeasible": lambda: DecisionPolicy(max_risk=0.001),
}


def apply(estimator, preds):
    if isinstance(estimator, TemperatureScaling): return estimator(preds).probs
    if isinstance(estimator, ConformalClassifier): return estimator.predict(preds).matrix
    return estimator.decide(preds).action


@pytest.fixture(params=ESTIMATORS)
def make(request): return ESTIMATORS[request.param]


def test_save_and_load_are_exact(make, tmp_path):
    estimator, test = make().fit(draw()), draw(200, 1, "t")
    estimator.save(tmp_path / "e.json")
    again = type(estimator).load(tmp_path / "e.json")
    assert again.to_dict() == estimator.to_dict() and repr(again) == repr(estimator)
    assert apply(again, test).tobytes() == apply(estimator, test).tobytes()
    assert json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)["version"] == 1  # no NaN, no Infinity
    again.save(tmp_path / "f.json")
    assert (tmp_path / "e.json").read_bytes() == (tmp_path / "f.json").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"e.json", "f.json"}


def test_order_of_calibration_rows_does_not_matter(make):
    preds, test = draw(), draw(200, 1, "t")
    shuffled = preds.take(np.random.default_rng(3).permutation(len(preds)))
    assert np.allclose(apply(make().fit(preds), test), apply(make().fit(shuffled), test))


def test_each_row_is_treated_alone(make):
    estimator, test = make().fit(draw()), draw(200, 1, "t")
    order = np.random.default_rng(3).permutation(200)[:50]
    assert np.allclose(apply(estimator, test)[order], apply(estimator, test.take(order)))


def test_order_of_labels_does_not_matter(make):
    if make().__dict__.get("costs") is not None: pytest.skip("the costs would have to be reordered too")
    order, preds, test = np.array([3, 0, 4, 1, 2]), draw(), draw(200, 1, "t")
    plain, moved = apply(make().fit(preds), test), apply(make().fit(relabelled(preds, order)), relabelled(test, order))
    if plain.ndim == 2: assert np.allclose(plain[:, order], moved)
    else: assert (np.where(moved < 0, -1, order[moved]) == plain).all()


def test_float32_agrees(make):
    wide, narrow = (apply(make().fit(draw(dtype=d)), draw(200, 1, "t", d)) for d in (np.float64, np.float32))
    assert np.isclose(wide, narrow, atol=1e-5).mean() > 0.99  # a row on the threshold may fall on either side


def test_input_is_left_as_it_was(make):
    preds = draw()
    before = preds.logits.copy(), preds.y.copy(), dict(preds.seen)
    apply(make().fit(preds), preds)
    assert (preds.logits == before[0]).all() and (preds.y == before[1]).all() and preds.seen == before[2]


@pytest.mark.parametrize("stage", ["training", "temperature", "selection"])
def test_used_rows_are_refused(make, stage):
    if isinstance(make(), DecisionPolicy) and make().max_risk is None: pytest.skip("promises nothing")
    preds = draw()
    used = Predictions(preds.ids, LABELS, logits=preds.logits, y=preds.y, seen={stage: preds.ids[5:8]})
    with pytest.raises(OverlapError, match=f"3 rows for .* were already used by {stage}") as e: make().fit(used)
    assert e.value.ids == ["r5", "r6", "r7"] and e.value.stage == stage


@pytest.mark.parametrize("metric", [accuracy, nll, brier, ece])
def test_metrics_ignore_the_order_of_rows_and_labels(metric):
    preds = draw()
    for other in (preds.take(np.arange(400)[::-1]), relabelled(preds, np.array([3, 0, 4, 1, 2]))):
        assert metric(other).value == pytest.approx(metric(preds).value, rel=1e-12)
        assert metric(preds).low <= metric(preds).value <= metric(preds).high


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["probs", "logits"])
def test_predictions_survive_their_file(kind, dtype, tmp_path):
    preds = draw(50, dtype=dtype)
    scores = preds.logits if kind == "logits" else preds.probabilities.astype(dtype)
    preds = Predictions(preds.ids, LABELS, **{kind: scores}, y=preds.y, groups=preds.groups, texts=[f"é {i}" for i in range(50)],
                        split="test", source="m@3", seen={"training": ["x", "y"], "temperature": []})
    preds.save(tmp_path / "p.parquet")
    again = Predictions.load(tmp_path / "p.parquet")
    assert getattr(again, kind).tobytes() == scores.tobytes() and getattr(again, kind).dtype == dtype
    for name in ("labels", "texts", "split", "source", "seen"): assert getattr(again, name) == getattr(preds, name)
    assert (again.ids == preds.ids).all() and (again.y == preds.y).all()
    pd.testing.assert_frame_equal(again.groups, preds.groups, check_dtype=False)
    assert "pickle" not in (tmp_path / "p.parquet").read_bytes().decode("latin1")
