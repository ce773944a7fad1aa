"""Group metrics: awkward files, hostile names, hand-counted toys, clusters against a brute-force bootstrap, and crossings."""
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.audit.groupings import Grouping
from fine_tune_llm.audit.groups import group_metrics, rows_of
from fine_tune_llm.audit.measures import Metric
from fine_tune_llm.audit.parity import parity
from fine_tune_llm.audit.report import audit
from fine_tune_llm.audit.tallies import compared
from fine_tune_llm.core.errors import DataError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.risk import DecisionPolicy

BAD = Path(__file__).parents[2] / "shared/data/malformed"
YES_NO = Labels(("no", "yes"))
COLUMNS = ["metric", "group", "estimate", "low", "high", "n", "verdict"]
needs_data = pytest.mark.skipif(not BAD.is_dir(), reason="the data folder ../shared/data is not here")


def predictions(y, yhat, **groups):
    y, p = np.asarray(y), np.eye(2)[np.asarray(yhat)] * 0.8 + 0.1
    return Predictions(np.arange(len(y)).astype(str), YES_NO, probs=p, y=y, groups=pd.DataFrame(groups))


def read(name):
    t = pd.read_csv(BAD / name, keep_default_na=False)
    return predictions(t.y, t.yhat, group=t.group)


@needs_data
def test_sparse_groups():
    "README: rates for A and B with intervals; C and D too small; 3 missing apart; 'a' and 'A ' queried; NA is a word."
    found = group_metrics(read("groups_sparse.csv"), "group", metrics=["accuracy"])
    rows = {r.group: r for r in found.rows}
    assert {g: r.n for g, r in rows.items()} == {"A": 30, "A ": 1, "B": 30, "C": 2, "D": 1, "NA": 1, "a": 1, "null": 1, "(missing)": 3}
    t = pd.read_csv(BAD / "groups_sparse.csv", keep_default_na=False)
    for g in "AB":
        mine = t[t.group == g]
        assert rows[g].rate.value == (mine.y == mine.yhat).mean() and 0 < rows[g].rate.low < rows[g].rate.high < 1
    assert {r.verdict for r in rows.values()} <= {"pass", "not enough evidence"}  # no false gap of 100 %
    told = "\n".join(found.notices)
    assert "C (2), D (1)" in told and "3 rows have no value" in told and "'A', 'A ', 'a' look alike" in told


@needs_data
def test_no_positives():
    "README: the true-positive rate of B is undefined; it is said so, and no gap is a number."
    found = group_metrics(read("groups_no_positives.csv"), "group")
    rows = {(r.metric, r.group): r for r in found.rows}
    assert rows["TPR", "B"].rate is None and rows["TPR", "B"].gap is None and rows["TPR", "A"].gap is None
    assert rows["TPR", "B"].verdict == rows["TPR", "A"].verdict == "not enough evidence" and rows["TPR", "B"].n == 0
    assert any(n.startswith("TPR cannot be estimated for B") for n in found.notices)
    frame = found.to_frame(gaps=True).set_index(["metric", "group"])
    assert np.isnan(frame.loc[("TPR", "B"), ["estimate", "low", "high", "gap"]].astype(float)).all()
    odds = {r.criterion: r for r in parity(read("groups_no_positives.csv"), "group").rows}["equalised odds"]
    assert odds.unknown == ("B",) and odds.verdict != "pass"


# Hostile names

FORMULAS = ['=HYPERLINK("http://127.0.0.1/x")', "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "@SUM(1)",
            "{{7*7}} ${x} {% raw %}", "[link](javascript:alert(1)) | pipe", "bidi \u202etxet\u202c end", "nul\0 escape", "\u4f60\u597d",
            "-1+2", "+cmd|' /C calc'!A0", "\t=1", "lone \ud800"]


def inert(result):
    page, text, table = result._repr_html_(), result.to_markdown(), result.to_csv()
    for html in (page, text):
        tags = set(re.findall(r"<(\w+)", html))
        assert not tags & {"script", "img", "iframe", "a", "link"} and "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", html)
    assert all(t.isprintable() or t in "\n\t\u200d" for t in page + text + table)
    assert "](" not in text and "{{" not in text
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()} == {text.splitlines()[0].count("|")}
    rows = list(csv.reader(io.StringIO(table)))
    assert all(len(r) == len(rows[0]) for r in rows)
    for cell in (c for r in rows[1:] for c in r):
        try: float(cell)
        except ValueError: assert not cell.lstrip().startswith(("=", "+", "-", "@")), cell
    page.encode(), text.encode(), table.encode()


def hostile_groups(names):
    rng = np.random.default_rng(0)
    n = 20 * len(names)
    return predictions(rng.integers(0, 2, n), rng.integers(0, 2, n), **{"=team": pd.Series(names * 20, dtype=object)})


def test_hostile_names_are_inert():
    preds = hostile_groups(FORMULAS)
    found = group_metrics(preds, "=team", metrics=["accuracy", "TPR"])
    inert(found)
    inert(parity(preds, "=team"))
    assert {r.group for r in found.rows} == {n.replace("\ud800", r"\ud800") for n in FORMULAS}  # otherwise unchanged
    page = audit(preds, groups=["=team"])._repr_html_()
    assert "<script" not in page and "<img" not in page
    page.encode()


@needs_data
def test_hostile_files_are_inert():
    texts = pd.read_csv(BAD / "formula_and_html.csv").text.tolist()
    odd = [json.loads(line)["text"] for line in (BAD / "odd_unicode.jsonl").read_text().splitlines()]
    assert len(texts) == 6 and len(odd) == 5
    inert(group_metrics(hostile_groups(texts + odd), "=team", metrics=["accuracy"]))


# The frame and its rows

def test_frame_has_one_line_per_metric_and_group_and_groups_never_drop_out():
    preds = predictions([0, 1] * 50, [0, 1] * 40 + [1, 0] * 10, g=["x"] * 60 + [None] * 10 + ["y"] * 30)
    frame = group_metrics(preds, {"g": ["x", "y", "z"]}).to_frame()
    assert list(frame) == COLUMNS and not frame.duplicated(["metric", "group"]).any()
    assert set(frame.group) == {"x", "y", "z", "(missing)"} and (frame.groupby("metric").size() == 4).all()
    z = frame[frame.group == "z"]
    assert (z.n == 0).all() and z.estimate.isna().all() and (z.verdict == "not enough evidence").all()


def test_values_by_hand():
    "Twenty rows of one group: 5 true alarms, 3 false, 2 missed, 10 rightly quiet."
    y, yhat = [1] * 5 + [0] * 3 + [1] * 2 + [0] * 10, [1] * 5 + [1] * 3 + [0] * 2 + [0] * 10
    preds = predictions(y * 2, yhat + [0] * 20, g=["a"] * 20 + ["b"] * 20)
    rows = {r.metric: r for r in group_metrics(preds, "g").rows if r.group == "a"}
    by_hand = {"accuracy": 15 / 20, "error rate": 5 / 20, "base rate": 7 / 20, "selection rate": 8 / 20, "TPR": 5 / 7, "FPR": 3 / 13,
               "FNR": 2 / 7, "PPV": 5 / 8, "FOR": 2 / 12}
    for name, value in by_hand.items(): assert rows[name].rate.value == pytest.approx(value), name
    right, wrong = -np.log(0.9), -np.log(0.1)
    assert rows["NLL"].rate.value == pytest.approx((15 * right + 5 * wrong) / 20)
    assert rows["Brier"].rate.value == pytest.approx((15 * 0.02 + 5 * 1.62) / 20)
    assert rows["ECE"].rate.value == pytest.approx(0.9 - 15 / 20) and rows["expected cost"].rate.value == pytest.approx(5 / 20)


def test_sets_and_policy_bring_their_metrics():
    rng = np.random.default_rng(1)
    def draw(n, name):
        p = rng.dirichlet([1.0, 1.0], n)
        return Predictions([f"{name}{i}" for i in range(n)], YES_NO, probs=p, y=(rng.random(n) < p[:, 1]).astype(int),
                           groups=pd.DataFrame({"g": rng.choice(["a", "b"], n)}), split=name)
    fit, test = draw(500, "calibration"), draw(800, "test")
    sets, policy = ConformalClassifier(alpha=0.1).fit(fit), DecisionPolicy(abstain_cost=0.2).fit(fit)
    rows = {(r.metric, r.group): r for r in group_metrics(test, "g", sets, policy).rows}
    a, found, done = (test.groups.g == "a").to_numpy(), sets.predict(test), policy.decide(test)
    assert rows["coverage", "a"].rate.value == pytest.approx(found.matrix[np.arange(800), test.y][a].mean())
    assert rows["set size", "a"].rate.value == pytest.approx(found.sizes[a].mean())
    assert rows["abstention", "a"].rate.value == pytest.approx((done.action[a] < 0).mean())
    given = a & (done.action >= 0)
    assert rows["selective risk", "a"].rate.value == pytest.approx((done.action != test.y)[given].mean()) and rows["selective risk", "a"].n == given.sum()
    cost = np.where(done.action < 0, 0.2, done.action != test.y)
    assert rows["expected cost", "a"].rate.value == pytest.approx(cost[a].mean())
    with pytest.raises(DataError, match="sets= holds other rows"): group_metrics(test, "g", sets.predict(fit))


def test_order_of_rows_and_names_of_groups_change_nothing():
    rng = np.random.default_rng(2)
    preds = predictions(rng.integers(0, 2, 300), rng.integers(0, 2, 300), g=rng.choice(["a", "b", "c"], 300))
    other = preds.take(rng.permutation(300))
    a, b = (group_metrics(p, "g").to_frame() for p in (preds, other))
    pd.testing.assert_frame_equal(a, b)
    renamed = Predictions(preds.ids, YES_NO, probs=preds.probs, y=preds.y, groups=preds.groups.replace({"g": {"a": "z"}}))
    c = group_metrics(renamed, "g").to_frame()
    np.testing.assert_allclose(a[a.group == "a"].low.to_numpy(), c[c.group == "z"].low.to_numpy())


def test_crossed_groups_are_the_rows_in_both():
    rng = np.random.default_rng(3)
    table = dict(a=rng.choice(["x", "y"], 500), b=rng.choice(["u", "v"], 500), c=rng.choice(["1", "2"], 500))
    preds = predictions(rng.integers(0, 2, 500), rng.integers(0, 2, 500), **table)
    rows = group_metrics(preds, ["a", "b", "c"], depth=3, metrics=["accuracy"]).rows
    assert len(rows) == 6 + 3 * 4 + 8
    one = next(r for r in rows if r.group == "x & v & 2")
    inside = (table["a"] == "x") & (table["b"] == "v") & (table["c"] == "2")
    assert one.n == inside.sum() and one.rate.value == pytest.approx((preds.answers == preds.y)[inside].mean())


def test_clusters_widen_as_a_bootstrap_over_clusters_does():
    "An independent way: resample whole clusters 3,000 times and take the standard deviation of rate and gap."
    rng = np.random.default_rng(4)
    size = rng.integers(1, 12, 150)
    cluster = np.repeat(np.arange(150), size)
    hit = rng.random(len(cluster)) < np.repeat(rng.beta(4, 2, 150), size)
    code = np.where(rng.random(150) < 0.4, 0, 1)[cluster]
    row = rows_of(compared(Metric("m", hit, np.ones(len(hit), dtype=bool)), Grouping("g", ("a", "b"), code), cluster), 0.05)[0]
    k = np.array([np.bincount(cluster, hit & (code == g), 150) for g in (0, 1)])
    n = np.array([np.bincount(cluster, code == g, 150) for g in (0, 1)])
    weight = rng.multinomial(150, np.full(150, 1 / 150), 3000)
    rates = (weight @ k.T) / (weight @ n.T)
    naive = rows_of(compared(Metric("m", hit, np.ones(len(hit), dtype=bool)), Grouping("g", ("a", "b"), code)), 0.05)[0]
    for e, other, se in ((row.rate, naive.rate, rates[:, 0].std()), (row.gap, naive.gap, (rates[:, 0] - rates[:, 1]).std())):
        assert (e.high - e.low) / (2 * 1.96 * se) == pytest.approx(1, abs=0.12) and e.high - e.low > 1.2 * (other.high - other.low)


def test_report_and_group_metrics_agree():
    rng = np.random.default_rng(5)
    preds = predictions(rng.integers(0, 2, 400), rng.integers(0, 2, 400), g=rng.choice(["a", "b"], 400))
    report = audit(preds, groups=["g"], tolerances={"accuracy": 0.2}).to_frame()
    own = group_metrics(preds, "g", metrics=["accuracy"], tolerances={"accuracy": 0.2}).to_frame()
    assert list(report) == COLUMNS
    pd.testing.assert_frame_equal(report[report.group != "(all)"].reset_index(drop=True), own, check_dtype=False)
    assert {"accuracy", "NLL", "ECE"} <= set(report[report.group == "(all)"].metric)
