"""The metrics beside torchmetrics, netcal and scikit-learn: equal where they are right; where they are not, all three values stand here."""
import warnings

import numpy as np
import pytest

from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty import metrics
from fine_tune_llm.uncertainty.metrics import CalibrationState
from fine_tune_llm.uncertainty.predictions import Predictions

pytestmark = pytest.mark.peers
BINS = 15


@pytest.fixture(scope="module")
def torch(): return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def binary(): return pytest.importorskip("torchmetrics.functional.classification").binary_calibration_error


def draw(n=5000, k=4, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, k))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    p = np.exp(1.7 * z)
    return Predictions(np.arange(n), Labels(tuple("abcdefghij"[:k])), probs=(p / p.sum(axis=1, keepdims=True)).astype(dtype), y=y)


def of_binary(torch, binary, c, right, dtype=None, **settings):
    """Torchmetrics' binary metric compares a probability with a 0/1 target, so it takes (confidence, right) as it is."""
    c = torch.as_tensor(np.asarray(c), dtype=dtype or torch.float32)
    return float(binary(c, torch.as_tensor(np.asarray(right)).int(), n_bins=settings.pop("bins", BINS), **settings))


# torchmetrics

@pytest.mark.parametrize("ours, norm", [("l1", "l1"), ("l2", "l2"), ("max", "max")])
@pytest.mark.parametrize("k", [2, 4, 10])
def test_torchmetrics_agrees_below_confidence_one(torch, ours, norm, k):
    theirs = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    preds = draw(k=k, dtype=np.float32)
    value = float(theirs(torch.tensor(preds.probs), torch.tensor(preds.y), num_classes=k, n_bins=BINS, norm=norm))
    mine = metrics.mce(preds, BINS, n_boot=0) if ours == "max" else metrics.ece(preds, BINS, norm=ours, n_boot=0)
    assert mine == pytest.approx(value, rel=2e-4)  # they count in float32


def test_torchmetrics_gives_confidence_one_a_bin_of_its_own(torch, binary):
    """Their issue 3510. A mistake at 1.00 and a right answer at 0.95, ten bins. Theory: |-1 + 0.05| / 2 = 0.475."""
    c, right = np.array([1.0, 0.95]), np.array([False, True])
    ours = float(metrics.ece(CalibrationState.empty(10).update(c, right), 10, n_boot=0))
    assert ours == pytest.approx(0.475, abs=1e-12)
    assert of_binary(torch, binary, c, right, bins=10) == pytest.approx(0.525, abs=1e-6)  # (1 + 0.05) / 2
    assert metrics.mce(CalibrationState.empty(10).update(c, right), 10, n_boot=0) == pytest.approx(0.475)
    assert of_binary(torch, binary, c, right, bins=10, norm="max") == pytest.approx(1.0)


@pytest.mark.slow
def test_torchmetrics_counts_stop_at_two_to_the_24th(torch, binary):
    """Twenty million rows of confidence 0.75, three in four right: calibrated, ECE 0. Their float32 sums stall at 2^24: the
    counts and, rounded up by 1/4 at each step past 2^23, the confidences. So they find |15,000,000 / 2^24 - 1| = 0.106."""
    n = 20_000_000
    c, right = np.full(n, 0.75, dtype=np.float32), np.arange(n) % 4 != 0
    state = CalibrationState.empty().update(c, right)
    assert state.n == n and metrics.ece(state, n_boot=0) == 0
    assert of_binary(torch, binary, c, right, validate_args=False) == pytest.approx(1 - 15_000_000 / 2**24, abs=1e-6)


def test_torchmetrics_debiased_l2_agrees(torch):
    """Their formula, which no public function reaches: Kumar et al. 2019, sum of w (d^2 - a (1 - a) / (n_b - 1))."""
    private = pytest.importorskip("torchmetrics.functional.classification.calibration_error")
    preds = draw(k=4)
    c, right = torch.tensor(preds.confidence), torch.tensor((preds.answers == preds.y).astype(float))
    theirs = float(private._ce_compute(c, right, torch.linspace(0, 1, BINS + 1, dtype=c.dtype), norm="l2", debias=True))
    assert metrics.ece(preds, BINS, norm="l2", debiased=True, n_boot=0) == pytest.approx(theirs, rel=1e-9)


def test_torchmetrics_half_precision(torch, binary):
    """In float16 a bin of 200,000 rows overflows past 65,504 and the error is no number; ours widens each block."""
    n = 200_000
    c, right = np.full(n, 0.75, dtype=np.float16), np.arange(n) % 4 != 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = of_binary(torch, binary, c, right, dtype=torch.float16)
    assert np.isnan(theirs)
    assert metrics.ece(CalibrationState.empty().update(c, right), n_boot=0) == 0  # theory: three in four at 0.75


def test_torchmetrics_keeps_every_prediction(torch):
    module = pytest.importorskip("torchmetrics.classification").BinaryCalibrationError(n_bins=BINS)
    rng, state = np.random.default_rng(0), CalibrationState.empty()
    for _ in range(10):
        c = rng.random(1000).astype(np.float32)
        right = rng.random(1000) < c
        module.update(torch.as_tensor(c), torch.as_tensor(right).int())
        state = state.update(c, right)
    assert float(module.compute()) == pytest.approx(float(metrics.ece(state, n_boot=0)), rel=1e-4)
    assert sum(t.numel() for t in module.confidences) == 10_000 and state.sums.size == 3 * 2 * BINS


# netcal

@pytest.mark.parametrize("seed", range(3))
def test_netcal_agrees(seed):
    netcal = pytest.importorskip("netcal.metrics")
    preds = draw(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {name: getattr(netcal, name)(BINS).measure(preds.probs, preds.y) for name in ("ECE", "MCE")}
    assert metrics.ece(preds, BINS, n_boot=0) == pytest.approx(theirs["ECE"], rel=1e-9)
    assert metrics.mce(preds, BINS, n_boot=0) == pytest.approx(theirs["MCE"], rel=1e-9)


def test_netcal_puts_confidence_one_where_we_do():
    netcal = pytest.importorskip("netcal.metrics")
    theirs = netcal.ECE(10).measure(np.array([1.0, 0.95]), np.array([0, 1]))
    assert theirs == pytest.approx(0.475) == metrics.ece(CalibrationState.empty(10).update([1.0, 0.95], [0, 1]), 10, n_boot=0)


# scikit-learn

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [2, 5])
def test_scikit_learn_agrees(seed, k):
    sk = pytest.importorskip("sklearn.metrics")
    preds = draw(800, k, seed)
    y, answers, p = preds.y, preds.answers, preds.probs
    assert metrics.accuracy(preds) == pytest.approx(sk.accuracy_score(y, answers), abs=1e-15)
    for average in ("macro", "weighted"):
        assert metrics.f1(preds, average, n_boot=0) == pytest.approx(sk.f1_score(y, answers, average=average), rel=1e-12)
    assert (metrics.confusion_matrix(preds) == sk.confusion_matrix(y, answers, labels=range(k))).all()
    assert metrics.nll(preds) == pytest.approx(sk.log_loss(y, p, labels=range(k)), rel=1e-12)
    assert metrics.brier(preds) == pytest.approx(sk.brier_score_loss(y, p, labels=range(k), scale_by_half=False), rel=1e-12)
    if k > 2:
        for top in (1, 2, 3): assert metrics.top_k_accuracy(preds, top) == pytest.approx(sk.top_k_accuracy_score(y, p, k=top, labels=range(k)))


def test_f1_with_classes_that_never_occur():
    sk = pytest.importorskip("sklearn.metrics")
    preds = Predictions(np.arange(4), Labels(tuple("abcd")), probs=np.eye(4)[[0, 1, 0, 0]], y=[0, 0, 0, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for average in ("macro", "weighted"):
            assert metrics.f1(preds, average, n_boot=0) == pytest.approx(sk.f1_score(preds.y, preds.answers, average=average, zero_division=0))


def test_reliability_is_scikit_learns_curve():
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    preds = draw()
    share, confidence = curve(preds.answers == preds.y, preds.confidence, n_bins=10, strategy="uniform")
    rows, ours, right = metrics.reliability(preds, 10)
    assert np.allclose(ours[rows > 0], confidence) and np.allclose(right[rows > 0], share)


def test_augrc_from_scikit_learns_auroc():
    """Traub et al. 2024: AUGRC = (1 - AUROC) r (1 - r) + r^2 / 2, also with ties."""
    sk = pytest.importorskip("sklearn.metrics")
    preds = draw()
    right = preds.answers == preds.y
    for score in (preds.confidence, preds.confidence.round(1)):
        r = 1 - right.mean()
        assert metrics.augrc(preds, score) == pytest.approx((1 - sk.roc_auc_score(right, score)) * r * (1 - r) + r * r / 2, rel=1e-12)
