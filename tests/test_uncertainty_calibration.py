"""One contract for all calibrators, and what theory says about each."""
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.special import betaln, gammaln, softmax

from fine_tune_llm.core.errors import ConfigurationError, DataError, OverlapError, TooFewRowsError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty import calibration
from fine_tune_llm.uncertainty.calibration import TemperatureScaling, best_beta
from fine_tune_llm.uncertainty.calibration_choice import (
    calibrators,
    choose_calibrator,
    id_folds,
    load_calibrator,
    settings_name,
    unfitted,
)
from fine_tune_llm.uncertainty.calibration_curves import BetaCalibration, PlattScaling, log_complement, rows_from
from fine_tune_llm.uncertainty.calibration_maps import DirichletCalibration, VectorScaling
from fine_tune_llm.uncertainty.calibration_steps import HistogramBinning, IsotonicCalibration, isotonic_corners
from fine_tune_llm.uncertainty.predictions import Predictions, refuse_overlap

K = 4
LABELS = Labels(tuple("abcd"))
ALL = {settings_name(c): c for c in [*calibrators(), HistogramBinning(cuts="equal-width", prior=0), IsotonicCalibration("top-label", prior=0)]}
MAPS = (TemperatureScaling, VectorScaling, DirichletCalibration)


def draw(n=300, seed=0, name="r", dtype=np.float64, scale=2.0):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, K))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    return Predictions([f"{name}{i}" for i in range(n)], LABELS, logits=(scale * z + [0, 0, 0.8, 0]).astype(dtype), y=y, split="validation")


def mean_nll(preds): return -preds.log_probs[np.arange(len(preds)), preds.y].mean()


@pytest.fixture(params=ALL)
def make(request): return lambda: unfitted(ALL[request.param])


# The contract

def test_fit_returns_self_and_rows_sum_to_one(make):
    cal, test = make(), draw(200, 1, "t")
    assert cal.fit(draw()) is cal
    out = cal(test)
    assert out.logits is None and out.probs.shape == (200, K) and (out.probs >= 0).all()
    assert np.abs(out.probs.sum(axis=1) - 1).max() < 1e-12
    assert (out.ids == test.ids).all() and (out.y == test.y).all() and out.split == test.split and out.labels == test.labels


def test_the_file_is_bit_identical(make, tmp_path):
    cal, test = make().fit(draw()), draw(200, 1, "t")
    cal.save(tmp_path / "c.json")
    for again in (type(cal).load(tmp_path / "c.json"), load_calibrator(tmp_path / "c.json"), type(cal).from_dict(cal.to_dict())):
        assert again(test).probs.tobytes() == cal(test).probs.tobytes() and repr(again) == repr(cal)
        again.save(tmp_path / "d.json")
        assert (tmp_path / "c.json").read_bytes() == (tmp_path / "d.json").read_bytes()
    value = json.loads((tmp_path / "c.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert value["version"] == 1 and value["ids"] == draw().ids.tolist()


def test_a_file_with_a_value_too_few_or_too_many_is_refused(make):
    value = make().fit(draw()).to_dict()
    for key in set(value) - {"kind", "version"}:
        with pytest.raises(DataError, match=f"missing value .*key {key}"): type(make()).from_dict({k: v for k, v in value.items() if k != key})
    with pytest.raises(DataError, match="unknown value .*key __class__"): type(make()).from_dict({**value, "__class__": "x"})
    with pytest.raises(DataError, match="this is .* version 2, not .* version 1"): type(make()).from_dict({**value, "version": 2})


def test_order_of_labels_does_not_matter(make):
    order, preds, test = np.array([2, 0, 3, 1]), draw(), draw(200, 1, "t")
    moved = [Predictions(p.ids, Labels(tuple(LABELS[k] for k in order)), logits=p.logits[:, order], y=np.argsort(order)[p.y]) for p in (preds, test)]
    assert np.allclose(make().fit(preds)(test).probs[:, order], make().fit(moved[0])(moved[1]).probs, atol=1e-5)


def test_order_of_rows_does_not_matter(make):
    preds, test = draw(), draw(200, 1, "t")
    shuffled = preds.take(np.random.default_rng(3).permutation(len(preds)))
    assert np.allclose(make().fit(preds)(test).probs, make().fit(shuffled)(test).probs, atol=1e-5)
    cal, order = make().fit(preds), np.random.default_rng(3).permutation(200)[:50]
    assert np.allclose(cal(test).probs[order], cal(test.take(order)).probs, atol=1e-12)


def test_the_ledger_is_kept(make):
    test = replace(draw(200, 1, "t"), seen={"training": frozenset({"x"})})
    cal = make().fit(draw())
    out = cal(test)
    assert out.seen == {"training": {"x"}, cal.stage: set(draw().ids)} and cal.n_ == 300
    with pytest.raises(OverlapError, match=f"300 rows for a certificate were already used by {cal.stage}"): cal(draw()).refuse_overlap("a certificate")
    with pytest.raises(OverlapError): make().fit(cal(draw()))
    with pytest.raises(OverlapError, match="used by selection") as e: make().fit(replace(draw(), seen={"selection": frozenset({"r7"})}))
    assert e.value.ids == ["r7"]
    with pytest.raises(OverlapError, match="300 rows .* used by training"): make().fit(replace(draw(), split="train"))
    with pytest.raises(ConfigurationError, match="on the same rows before"): cal(out)


def test_unfit_samples_are_refused_by_name(make):
    preds = draw()
    with pytest.raises(TooFewRowsError, match="9 rows are too few .* at least 10"): make().fit(preds.take(np.arange(9)))
    with pytest.raises(TooFewRowsError, match="0 rows"): make().fit(preds.take(np.arange(0)))
    with pytest.raises(DataError, match="one class alone is true in all .*class b"): make().fit(preds.take(preds.y == 1))
    with pytest.raises(DataError, match="needs the true classes"): make().fit(replace(preds, y=None))
    with pytest.raises(DataError, match="logits are finite .logits, row 3"): make().fit(replace(preds, logits=np.where(np.arange(300)[:, None] == 3, np.nan, preds.logits)))
    with pytest.raises(ConfigurationError, match="is not fitted"): make()(preds)
    with pytest.raises(ConfigurationError, match="the labels are not those"): make().fit(preds)(replace(draw(9, 1, "t"), labels=Labels(tuple("dcba"))))


def test_input_is_left_as_it_was(make):
    preds = draw()
    before = preds.logits.copy(), preds.y.copy(), dict(preds.seen)
    for a in (preds.logits, preds.y): a.flags.writeable = False
    make().fit(preds)(draw(9, 1, "t"))
    assert (preds.logits == before[0]).all() and (preds.y == before[1]).all() and preds.seen == before[2]


def test_float32_agrees(make):
    wide, narrow = (make().fit(draw(dtype=d))(draw(200, 1, "t", d)).probs for d in (np.float64, np.float32))
    assert np.isclose(wide, narrow, atol=1e-4).mean() > 0.98  # a row on the edge of a bin may fall on either side


def test_probabilities_and_logits_agree(make):
    preds, test = draw(), draw(200, 1, "t")
    as_probs = [replace(p, logits=None, probs=softmax(p.logits, axis=1)) for p in (preds, test)]
    assert np.isclose(make().fit(preds)(test).probs, make().fit(as_probs[0])(as_probs[1]).probs, atol=1e-6).mean() > 0.99


def test_it_helps_a_boastful_model(make):
    test = draw(4000, 1, "t", scale=4)
    cal = make().fit(draw(2000, scale=4))
    if getattr(cal, "prior", 1): assert mean_nll(cal(test)) < mean_nll(test) - 0.2
    if getattr(cal, "mode", "") == "top-label" or isinstance(cal, TemperatureScaling): assert (cal(test).answers == test.answers).all()


def test_numbers_of_the_fit(make):
    cal = make().fit(draw())
    assert cal.nll_before_ == pytest.approx(mean_nll(draw()), rel=1e-12)
    assert cal.nll_after_ == pytest.approx(mean_nll(replace(draw(), logits=cal.transform(draw().log_probs))), rel=1e-9)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), n=st.integers(10, 60), k=st.integers(2, 6), scale=st.sampled_from([0.05, 1.0, 4.0, 30.0]))
def test_likelihood_of_the_fitted_rows_never_falls(seed, n, k, scale):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, scale, (n, k))
    preds = Predictions(np.arange(n).astype(str), Labels(tuple(map(str, range(k)))), logits=z, y=np.where(rng.random(n) < 0.6, z.argmax(1), rng.integers(0, k, n)))
    assume(len(set(preds.y)) > 1)
    try: temperature, vector, matrix = (C().fit(preds) for C in MAPS)
    except DataError as e: assume("no more probable than the others" not in str(e)); raise
    assert temperature.nll_after_ <= temperature.nll_before_ + 1e-12
    assert vector.nll_after_ <= temperature.nll_after_ + 1e-9 and matrix.nll_after_ <= temperature.nll_after_ + 1e-9
    assert temperature.temperature_ > 0 and (temperature(replace(preds, ids=[f"t{i}" for i in range(n)])).answers == preds.answers).all()


# Temperature

@pytest.mark.parametrize("scale", [0.02, 0.1, 0.5, 1, 2, 5, 20, 100])
@pytest.mark.parametrize("k", [2, 3, 77])
def test_newton_needs_few_passes(monkeypatch, scale, k):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, (800, k))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    logp = np.log(softmax(scale * z, axis=1)) if scale < 5 else scale * z - (scale * z).max(1, keepdims=True)
    passes, terms = [], calibration.nll_terms
    monkeypatch.setattr(calibration, "nll_terms", lambda *a: passes.append(1) or terms(*a))
    beta = best_beta(logp, y)
    assert len(passes) <= (7 if 0.5 <= scale <= 5 else 11) and beta > 0
    assert abs(terms(beta, logp, y)[1]) * beta < 1e-6 * len(y) and 0.7 < beta * scale < 1.4  # stationary, near 1 / scale


def test_blocks_of_rows_change_nothing(monkeypatch):
    preds = draw()
    whole = calibration.nll_terms(0.7, preds.log_probs, preds.y)
    monkeypatch.setattr(calibration, "row_blocks", lambda n, k: [slice(i, i + 7) for i in range(0, n, 7)])
    assert calibration.nll_terms(0.7, preds.log_probs, preds.y) == pytest.approx(whole, rel=1e-12)


def test_likelihood_ratio_test_has_its_level():
    "Uniform p-values when the model is calibrated: 400 samples, the share below 0.05 within three standard errors."
    small = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        z = rng.normal(0, 2, (100, 3))
        y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
        small += TemperatureScaling().fit(Predictions(np.arange(100).astype(str), Labels(("a", "b", "c")), logits=z, y=y)).needed_
    assert abs(small / 400 - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 400)


# Maps

def test_dirichlet_probabilities_need_dirichlet_calibration():
    """If the probability vectors of class j have the law Dirichlet(a_j), the truth is W log p + b with W = a - 1 and
    b = log of the class share less the log of the normaliser (Kull et al. 2019)."""
    rng = np.random.default_rng(0)
    a, share = np.array([[6., 2, 1], [1, 4, 2], [2, 1, 5]]), np.array([0.5, 0.3, 0.2])
    def sample(n, name):
        y = rng.choice(3, n, p=share)
        p = rng.gamma(a[y])  # gamma variables over their sum have a Dirichlet law
        return Predictions([f"{name}{i}" for i in range(n)], Labels(("a", "b", "c")), probs=p / p.sum(1, keepdims=True), y=y)
    rows, test = sample(30_000, "r"), sample(2000, "t")
    posterior = softmax(test.log_probs @ (a - 1).T + np.log(share) - (gammaln(a).sum(1) - gammaln(a.sum(1))), axis=1)
    free = DirichletCalibration(off_diagonal_sd=10, weight_sd=10, shift_sd=10).fit(rows)
    assert np.abs(free(test).probs - posterior).mean() < 0.01
    assert np.abs(TemperatureScaling().fit(rows)(test).probs - posterior).mean() > 0.05
    gaps = free.weights_ - free.weights_[0]
    assert np.allclose(gaps, a - a[0], atol=0.5)


def test_vector_scaling_is_dirichlet_without_the_off_diagonal():
    preds, test = draw(), draw(100, 1, "t")
    tight = DirichletCalibration(off_diagonal_sd=1e-8).fit(preds)
    assert np.allclose(tight(test).probs, VectorScaling().fit(preds)(test).probs, atol=1e-4)
    still = VectorScaling(weight_sd=1e-8, shift_sd=1e-8).fit(preds)
    assert np.allclose(still(test).probs, TemperatureScaling().fit(preds)(test).probs, atol=1e-6)


def test_maps_start_at_the_temperature_of_any_scale():
    for scale in (0.1, 10):
        temperature = [TemperatureScaling().fit(replace(draw(), logits=s * draw().logits)) for s in (1, scale)]
        assert temperature[1].temperature_ == pytest.approx(scale * temperature[0].temperature_, rel=1e-9)
        assert temperature[1].nll_after_ == pytest.approx(temperature[0].nll_after_, rel=1e-9)


# Curves and steps

def test_log_complement_is_exact_near_one():
    for gap in (1.0, 40.0, 700.0):
        z = np.array([[gap, 0.0, 0.0]])
        logp = z - np.log(np.exp(-gap) * 2 + 1) - gap
        assert log_complement(logp)[0, 0] == pytest.approx(np.log(2) - gap - np.log1p(2 * np.exp(-gap)), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 6), c=st.floats(1e-9, 1 - 1e-9))
def test_top_label_keeps_the_answer(seed, k, c):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(k), 5)
    out = np.exp(rows_from(np.full((5, 1), np.log(c)), np.log(p), "top-label"))
    assert (out.argmax(1) == p.argmax(1)).all() and np.allclose(out.sum(1), 1)
    top2 = np.sort(p, axis=1)[:, ::-1]
    assert np.allclose(out.max(1), np.maximum(c, top2[:, 1] / (1 - top2[:, 0] + top2[:, 1])), atol=1e-9)
    if k > 2:  # the others keep their ratios
        others = [np.delete(m, p.argmax(1)[0], axis=1)[0] for m in (p, out)]
        assert np.allclose(others[0] / others[0].sum(), others[1] / others[1].sum(), atol=1e-9)


@pytest.mark.parametrize("C", [PlattScaling, BetaCalibration])
def test_a_calibrated_model_is_left_alone(C):
    rng = np.random.default_rng(1)
    z = rng.normal(0, 2, 20_000)
    preds = Predictions(np.arange(20_000).astype(str), Labels(("no", "yes")), logits=np.column_stack([0 * z, z]),
                        y=(rng.random(20_000) < 1 / (1 + np.exp(-z))).astype(int))
    ideal = np.tile([1., 0] if C is PlattScaling else [1., 1, 0], (2, 1))
    assert np.allclose(C().fit(preds).curves_, ideal, atol=0.15)
    if C is PlattScaling: assert np.allclose(C().fit(preds).curves_[0], C().fit(preds).curves_[1] * [1, -1], atol=1e-5)


def test_beta_curve_recovers_two_beta_laws():
    "Scores with laws Beta(4, 2) for hits and Beta(2, 3) for misses: the odds are p^2 (1-p)^-1 B(2,3)/B(4,2) by Bayes."
    rng = np.random.default_rng(0)
    n = 40_000
    hit = rng.random(n) < 0.5
    p = np.where(hit, rng.beta(4, 2, n), rng.beta(2, 3, n))
    preds = Predictions(np.arange(n).astype(str), Labels(("no", "yes")), probs=np.column_stack([1 - p, p]), y=hit.astype(int))
    a, b, c = BetaCalibration().fit(preds).curves_[1]
    assert (a, b, c) == pytest.approx((2, 1, betaln(2, 3) - betaln(4, 2)), abs=0.12)


def pool_adjacent_violators(y):
    "Isotonic regression of a sequence, the textbook's loop."
    blocks = []
    for v in y:
        blocks.append([float(v), 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (m2, n2), (m1, n1) = blocks.pop(), blocks.pop()
            blocks.append([(m1 * n1 + m2 * n2) / (n1 + n2), n1 + n2])
    return np.concatenate([[m] * n for m, n in blocks])


@settings(max_examples=50, deadline=None)
@given(hit=st.lists(st.booleans(), min_size=2, max_size=40))
def test_isotonic_corners_are_the_pooled_blocks(hit):
    p = np.arange(1, len(hit) + 1) / 100
    assert np.allclose(np.interp(p, *isotonic_corners(p, np.array(hit))), pool_adjacent_violators(hit))


def test_one_row_of_prior_by_hand():
    "Four rows, textbook isotonic 0, 1/2, 1/2, 1; with one row of prior (4 g + p) / 5, then scaled to sum to 1 with its twin."
    p = np.tile([.1, .2, .3, .4], 3)
    preds = Predictions(np.arange(12).astype(str), Labels(("no", "yes")), probs=np.column_stack([1 - p, p]), y=[0, 1, 0, 1] * 3)
    test = Predictions(["t"], preds.labels, probs=[[.9, .1]])
    assert np.allclose(IsotonicCalibration(prior=0).fit(preds)(test).probs, [[1, 0]])
    yes, no = (12 * 0 + .1) / 13, (12 * 1 + .9) / 13
    assert np.allclose(IsotonicCalibration().fit(preds)(test).probs, [[no / (yes + no), yes / (yes + no)]])
    bins = HistogramBinning(bins=2, cuts="equal-width").fit(preds)
    yes, no = (6 + p.mean()) / 13, (6 + 1 - p.mean()) / 13
    assert np.allclose(bins.values_[1], [yes, 0.75]) and np.allclose(bins(test).probs, [[no / (yes + no), yes / (yes + no)]])


# The choice

def test_choice_takes_the_least_held_out_price():
    preds = draw(200)
    cal, table = choose_calibrator(preds, [TemperatureScaling(), IsotonicCalibration(), VectorScaling()], folds=4, seed=3)
    fold, prices = id_folds(preds.ids, 4, 3), {}
    for c in (TemperatureScaling(), IsotonicCalibration(), VectorScaling()):
        prices[settings_name(c)] = sum(mean_nll(replace(out := preds.take(fold == f), logits=None, probs=unfitted(c).fit(preds.take(fold != f))(out).probs))
                                       * (fold == f).sum() for f in range(4)) / 200
    prices["as given"] = mean_nll(preds)
    assert dict(zip(table.calibrator, table.nll, strict=True)) == pytest.approx(prices, rel=1e-9)
    assert settings_name(cal) == min((k for k in prices if k != "as given"), key=prices.get) and set(cal.ids_) == set(preds.ids)
    assert table.nll.is_monotonic_increasing and table["worse by"][0] == 0


def test_choice_is_refused_on_used_rows():
    with pytest.raises(OverlapError, match="the choice of a calibrator"): choose_calibrator(replace(draw(), seen={"tuning": frozenset({"r1"})}))


# The ledger

def test_overlap_can_be_waived_for_a_reason_alone():
    seen = {"training": frozenset({"a", "b"}), "tuning": frozenset({"c"})}
    assert refuse_overlap(["d"], seen, "x") == "" == refuse_overlap(["d"], seen, "x", accept="why")
    for accept in ("", "  "):
        with pytest.raises(OverlapError, match="1 rows for x were already used by training .ids a"): refuse_overlap(["a", "d"], seen, "x", accept)
    void = refuse_overlap(["a", "c"], seen, "x", accept="no other rows")
    assert void == ("no guarantee: 1 rows for x were already used by training (ids a); "
                    "1 rows for x were already used by tuning (ids c); accepted: no other rows")
