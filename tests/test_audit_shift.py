"Shift and robustness: no alarm where nothing moved, an alarm where something did, and no number from no rows."
import numpy as np
import pandas as pd
import pytest
from scipy.stats import hypergeom

from fine_tune_llm.audit.robustness import (
    CHANGES,
    altered_texts,
    change_verdict,
    invariance,
    robustness,
    swapped,
    typos,
    upper,
)
from fine_tune_llm.audit.shift import (
    auc,
    classifier_test,
    coverage_monitor,
    share_p_value,
    share_shift,
    shift,
    shift_verdict,
    stability_index,
    value_shift,
)
from fine_tune_llm.core.errors import ConfigurationError, DataError, TooFewRowsError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.metrics import Estimate
from fine_tune_llm.uncertainty.predictions import Predictions

LABELS = Labels(("a", "b", "c"))


def sample(n, seed, sharp=1.0, bias=0.0, first=0):
    rng = np.random.default_rng(seed)
    z = sharp * rng.normal(0, 2, (n, 3)) + np.array([bias, 0, 0])
    return Predictions([f"{seed}-{i}" for i in range(first, first + n)], LABELS, logits=z, y=(z + rng.gumbel(size=z.shape)).argmax(axis=1),
                       texts=["word " * int(k) for k in rng.integers(1, 9, n)], groups=pd.DataFrame({"g": rng.choice(["u", "v"], n)}))


def test_two_classes_are_fisher_s_test():
    "With two classes the deal is hypergeometric: the p-value is a sum that can be written down."
    old, new = np.array([9, 3]), np.array([4, 8])
    law, far = hypergeom(24, 13, 12), abs(9 / 12 - 4 / 12)
    exact = sum(law.pmf(k) for k in range(13) if abs(k / 12 - (13 - k) / 12) >= far - 1e-12)
    assert share_p_value(old, new, deals=200_000) == pytest.approx(exact, abs=0.003)


def test_a_permutation_p_value_is_never_zero(): assert share_p_value([50, 0], [0, 50], deals=99) == 1 / 100


def test_share_interval_covers_and_shrinks():
    rng, p, q = np.random.default_rng(0), np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
    found = [share_shift(rng.multinomial(200, p), rng.multinomial(300, q)) for _ in range(300)]
    assert np.mean([e.low <= 0.2 <= e.high for e in found]) >= 0.95  # a bound that holds for all shares is never short
    assert share_shift(p * 1e6, q * 1e6).low > 0.195
    many = [share_shift(rng.multinomial(50, [1 / 8] * 8), rng.multinomial(50, [1 / 8] * 8)) for _ in range(200)]
    assert min(e.low for e in many) == max(e.low for e in many) == 0  # nothing moved


def test_value_interval_covers():
    rng = np.random.default_rng(1)
    found = [value_shift(rng.random(150), rng.random(150) + 0.25)[0] for _ in range(200)]
    assert np.mean([e.low <= 0.25 <= e.high for e in found]) >= 0.95


def test_psi_is_symmetric_and_finite():
    a, b = [5, 0, 7], [1, 9, 2]
    assert stability_index(a, b) == pytest.approx(stability_index(b, a)) and np.isfinite(stability_index([9, 0], [0, 9]))


def test_nothing_moved_nothing_alarms():
    "Five quantities judged together raise any alarm in at most 5 % of simulations."
    loud = sum(any(r.verdict == "fail" for r in shift(sample(150, 2 * s), sample(150, 2 * s + 1), tolerance=0.01).rows) for s in range(150))
    assert loud <= 15  # Binomial(150, 0.05): more than 15 once in 150


def test_what_moved_is_named():
    report = shift(sample(2000, 1), sample(2000, 2, bias=3.0))
    verdicts = {r.what: r.verdict for r in report.rows}
    assert verdicts["labels"] == verdicts["answers"] == "fail" and verdicts["g"] == "pass"
    few = shift(sample(20, 1), sample(20, 2, bias=3.0), tolerance=0.02)
    assert "pass" not in {r.verdict for r in few.rows}  # twenty rows give no all-clear


@pytest.mark.parametrize("value, high, p, verdict", [(0.05, 0.09, 0.001, "pass"), (0.05, 0.3, 0.001, "not enough evidence"),
                                                     (0.2, 0.3, 0.001, "fail"), (0.2, 0.3, 0.2, "not enough evidence")])
def test_verdicts_by_hand(value, high, p, verdict):
    assert shift_verdict(Estimate(value, 0.0, high, 9), p, 0.1) == verdict
    assert change_verdict(Estimate(-value, -high, 0.0, 9), p, 0.1) == verdict


def test_a_tiny_shift_in_many_rows_passes():
    e = share_shift([500_000, 500_000], [505_000, 495_000])
    assert share_p_value([500_000, 500_000], [505_000, 495_000]) < 0.01 and e.high < 0.1


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 30), rng.integers(1, 6, 20)
    pairs = (b[None] > a[:, None]).mean() + (b[None] == a[:, None]).mean() / 2
    assert auc(a, b) == pytest.approx(pairs)


def test_classifier_test_keeps_its_level():
    rng = np.random.default_rng(0)
    p = [classifier_test(rng.normal(size=(40, 3)), rng.normal(size=(40, 3)), seed=s)[1] for s in range(60)]
    assert np.mean(np.array(p) <= 0.05) <= 0.12  # Binomial(60, 0.05): more than 7 once in 50
    told, q = classifier_test(["old word"] * 50, ["new word"] * 50)
    assert told.value == 1 and told.low < 1 and q < 1e-6
    with pytest.raises(TooFewRowsError): classifier_test(["a"] * 19, ["b"] * 50)


def test_monitor_spends_its_alarms():
    "A kept promise, watched for ten batches, raises any alarm in at most 5 % of simulations."
    loud, batch = 0, np.repeat(np.arange(10), 40)
    for seed in range(100):
        sets = ConformalClassifier(alpha=0.1).fit(sample(200, seed))
        new = sample(400, 1000 + seed, first=1000)
        loud += "fail" in set(coverage_monitor(sets.predict(new), new.y, batch)["verdict"])
    assert loud <= 11  # Binomial(100, 0.05): more than 11 less than once in 200


def test_monitor_sees_a_broken_promise():
    sets, new = ConformalClassifier(alpha=0.1).fit(sample(500, 1)), sample(1000, 2)
    y = np.where(np.arange(1000) >= 500, np.random.default_rng(0).integers(0, 3, 1000), new.y)
    found = coverage_monitor(sets.predict(new), y, np.arange(1000) // 250)
    assert found["verdict"].tolist()[2:] == ["fail", "fail"] and "fail" not in found["verdict"].tolist()[:2]


def test_samples_that_cannot_be_compared():
    with pytest.raises(DataError, match="different labels"): shift(sample(30, 1), Predictions(["x"], Labels(("a", "b")), probs=np.array([[0.5, 0.5]])))
    with pytest.raises(ConfigurationError, match="tolerance"): shift(sample(30, 1), sample(30, 2), tolerance=0)
    with pytest.raises(TooFewRowsError): share_shift([0, 0], [1, 1])


def model(rule):
    def predict(texts): return Predictions([str(i) for i in range(len(texts))], LABELS, probs=np.eye(3)[[rule(t) for t in texts]])
    return predict


def test_a_robust_model_passes_and_a_fragile_one_fails():
    texts = [f"{w} number {i} please" for i in range(200) for w in ("refund", "order")]
    y = [int("refund" in t) for t in texts]
    solid = robustness(model(lambda t: int(sorted(t.lower().split()[0])[-1] == "u")), texts, y)  # "u" is the last letter of refund alone
    assert {r.verdict for r in solid.rows if r.gap.n} == {"pass"}
    fragile = robustness(model(lambda t: int("refund" in t)), texts, y)
    assert {r.change: r.verdict for r in fragile.rows}["upper case"] == "fail"


def test_coin_flips_are_no_loss():
    "Answers that change at random lose nothing on average: no alarm in most of 200 trials."
    rng, texts, y = np.random.default_rng(0), [f"text {i}" for i in range(100)], np.zeros(100, dtype=int)
    loud = sum(robustness(model(lambda t: int(rng.random() < 0.3)), texts, y, {"upper case": upper}, tolerance=0.001).rows[0].verdict == "fail" for _ in range(200))
    assert loud <= 18


def test_only_changed_rows_count():
    rows, new = altered_texts(["123", "abc", "ABC"], upper, 0)
    assert rows.tolist() == [1] and new == ["ABC"]
    r = robustness(model(lambda t: 0), ["123"], [0], {"upper case": upper}).rows[0]
    assert r.gap.n == 0 and np.isnan(r.flips.value) and r.verdict == "not enough evidence"


@pytest.mark.parametrize("text", ["", "a", "1234 5678", "kettle", "Grüße aus Köln", "aaaa bbbb", "日本語のテキスト", "a\x00b\n\tcdef"])
def test_changes_keep_what_they_promise(text):
    for change in CHANGES.values(): assert isinstance(change(text, np.random.default_rng(0)), str)
    for seed in range(5): assert sorted(typos(text, np.random.default_rng(seed))) == sorted(text)


def test_terms_swap_back():
    swap = swapped({"he": "she", "Mr.x": "Ms.x", "$5": "$6"})
    for text in ("He said she left", "the shelf of Hester", "HE AND SHE"): assert swap(swap(text, None), None) == text
    assert swap("the shelf", None) == "the shelf"
    for bad in ({"a": "b", "b": "c"}, {"a": "a"}, {"": "x"}):
        with pytest.raises(ConfigurationError): swapped(bad)


def test_invariance_by_group():
    texts = [f"he is {w} {i}" for w in ("in", "out") for i in range(150)]
    found = invariance(model(lambda t: int("she" in t and " out " in t)), texts, swapped({"he": "she"}), pd.Series(["in"] * 150 + ["out"] * 149 + [None]))
    assert dict(zip(found["group"], found["verdict"])) == {"(all)": "fail", "in": "pass", "out": "fail", "(missing)": "not enough evidence"}
