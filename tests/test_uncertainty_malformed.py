"""Broken tables of predictions, and what their README says they should yield. Skipped where ../shared/data is absent."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.core.errors import DataError, TooFewRowsError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.calibration import TemperatureScaling
from fine_tune_llm.uncertainty.calibration_choice import calibrators, settings_name
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.joining import order_by_id
from fine_tune_llm.uncertainty.metrics import accuracy, nll
from fine_tune_llm.uncertainty.predictions import Predictions

BAD = Path(__file__).parents[2] / "shared" / "data" / "malformed"
pytestmark = pytest.mark.skipif(not BAD.is_dir(), reason="the data folder ../shared/data is not here")


def table(name, **fields): return pd.read_csv(BAD / name, **fields)


def predictions(frame, kind="probs"):
    columns = [c for c in frame if c[1:].isdigit()]
    return Predictions(frame["id"].astype(str).to_numpy(), Labels(tuple(map(str, range(len(columns))))), y=frame["label"].to_numpy(),
                       **{kind: frame[columns].to_numpy()})


def test_probs_bad():
    "Rows 2 to 5 are no probabilities, 6 and 8 have no label that exists; 9 sums to 0.99; 1, 7 and 10 are good."
    frame = table("probs_bad.csv")
    for row in (2, 3, 4, 5, 9):
        with pytest.raises(DataError, match=r"1 of 1 rows are refused: rows of probabilities sum to 1 \(probs, row 0\)"):
            predictions(frame[frame["id"] == row].assign(label=0))
    with pytest.raises(DataError, match=r"5 of 10 rows are refused.*\(probs, row 1\)"): predictions(frame.assign(label=0))
    for row in (6, 8):
        with pytest.raises(DataError, match=r"y must hold 1 class numbers 0\.\.2"): predictions(frame[frame["id"] == row])
    good = predictions(frame[frame["id"].isin([1, 7, 10])].astype({"label": int}))
    assert len(good) == 3 and nll(good).value == pytest.approx(-np.log([0.7, 0.5, 1]).mean())


def test_a_hard_zero_on_the_truth_has_a_finite_price():
    frame = table("probs_bad.csv").query("id == 10").assign(label=1)
    assert nll(predictions(frame)).value == pytest.approx(-np.log(np.finfo(np.float64).tiny))


def test_logits_constant():
    "All logits equal: no temperature; accuracy is that of the first class on ties; sets hold both classes."
    preds = predictions(table("logits_constant.csv"), "logits")
    with pytest.raises(DataError, match="equally probable in every row: no temperature can be found"): TemperatureScaling().fit(preds)
    assert (preds.answers == 0).all() and accuracy(preds).value == (preds.y == 0).mean() == 0.5
    for score in ("lac", "aps"):
        sets = ConformalClassifier(score, alpha=0.1, **({"randomized": False} if score == "aps" else {})).fit(preds).predict(preds)
        assert (sets.sizes == 2).all()


@pytest.mark.parametrize("cal", calibrators(), ids=settings_name)
def test_logits_constant_never_gives_nonsense(cal):
    preds = predictions(table("logits_constant.csv"), "logits")
    try: probs = np.exp(cal.fit(preds).transform(preds.log_probs))
    except DataError as e: assert "no temperature can be found" in str(e)
    else: assert np.allclose(probs, 0.5)


def test_tiny_calibration():
    "Five rows at alpha 0.1: rank ceil(6 * 0.9) = 6 > 5, every set is full and the promise says why; at alpha 0.2 rank 5 is finite."
    preds = predictions(table("tiny_calibration.csv"))
    full = ConformalClassifier("lac", alpha=0.1).fit(preds)
    assert full.threshold_ == np.inf and full.predict(preds).matrix.all()
    assert "5 calibration rows are too few for alpha = 0.1" in full.predict(preds).guarantee
    finite = ConformalClassifier("lac", alpha=0.2).fit(preds)
    assert finite.threshold_ == pytest.approx(-np.log(0.9)) and (finite.predict(preds).sizes == 1).all()


@pytest.mark.parametrize("cal", calibrators(), ids=settings_name)
def test_tiny_calibration_is_too_small_for_a_calibrator(cal):
    with pytest.raises(TooFewRowsError, match="5 rows are too few .* at least 10"): cal.fit(predictions(table("tiny_calibration.csv")))


def test_one_class():
    "Sixty texts of one class: as labels of predictions, one column alone; as truths of two labels, no calibration."
    names = table("one_class.csv")["category"]
    preds = Predictions(np.arange(60).astype(str), Labels((names[0], "other")), probs=np.tile([0.8, 0.2], (60, 1)), y=np.zeros(60, dtype=int))
    for cal in calibrators():
        with pytest.raises(DataError, match="one class alone is true in all 60 rows .*class card_arrival"): cal.fit(preds)


def test_ids_unsorted_preds():
    "Predictions out of order, id 2 twice, id 9 unknown: joined by id, the repeat and the stranger named."
    frame = table("ids_unsorted_preds.csv")
    probs = np.eye(2)[frame["pred"]]
    with pytest.raises(DataError, match=r"1 ids occur more than once \(ids 2\)"): Predictions(frame["id"].to_numpy(), Labels(("0", "1")), probs=probs)
    with pytest.raises(DataError, match=r"1 repeated \(ids 2\); 1 unknown \(ids 9\)"): order_by_id(frame["id"], range(1, 6))
    good = frame.drop_duplicates("id")[lambda f: f["id"] <= 5]
    assert good["pred"].to_numpy()[order_by_id(good["id"], range(1, 6))].tolist() == [1, 0, 1, 0, 1]  # by position: 1, 1, 1, 0, 0
