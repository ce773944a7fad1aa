"Real data: the error rates that ProPublica published in 2016 on the COMPAS scores."
import csv
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from fine_tune_llm.audit.groups import error_rates, group_metrics, group_rows
from fine_tune_llm.audit.parity import parity
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.predictions import Predictions

COMPAS = Path(__file__).parents[2] / "shared/data/fairness/compas_two_years.csv.gz"
# "How We Analyzed the COMPAS Recidivism Algorithm" (Larson et al., ProPublica, 2016): the contingency tables
PUBLISHED = {  # group: (false alarms, did not reoffend), (misses, reoffended), rates in percent
    "African-American": ((805, 1795), (532, 1901), 44.85, 27.99),
    "Caucasian": ((349, 1488), (461, 966), 23.45, 47.72)}


@pytest.fixture(scope="module")
def compas():
    if not COMPAS.exists(): pytest.skip(f"no {COMPAS.name}")
    with gzip.open(COMPAS, "rt", newline="") as f: rows = list(csv.DictReader(f))
    assert len(rows) == 7214
    y = np.array([int(r["two_year_recid"]) for r in rows])
    high = np.array([int(r["score_text"] != "Low") for r in rows])
    return error_rates(y, high, positive=1), pd.DataFrame({"race": [r["race"] for r in rows], "sex": [r["sex"] for r in rows]})


@pytest.fixture(scope="module")
def defendants(compas):
    "The same rows as predictions: the score says high or not, and states no probability worth the name."
    (alarm, miss), groups = compas
    y, high = miss.among.astype(int), alarm.hit.astype(int)
    return Predictions(np.arange(len(y)).astype(str), Labels(("stays out", "reoffends")), probs=np.eye(2)[high] * 0.6 + 0.2, y=y, groups=groups)


def test_published_rates(compas):
    metrics, groups = compas
    every = np.ones(len(groups), dtype=bool)
    assert [m.count(every) for m in metrics] == [(1282, 3963), (1216, 3251)]  # 32.35% and 37.40% of all defendants
    rows = {(r.metric, r.group): r for r in group_rows(metrics, groups, ["race"])}
    for group, (alarms, misses, fpr, fnr) in PUBLISHED.items():
        for name, counts, percent in (("false-positive rate", alarms, fpr), ("false-negative rate", misses, fnr)):
            row = rows[name, group]
            assert (row.hits, row.n) == counts
            assert round(100 * row.rate.value, 2) == percent
            assert row.verdict == "fail"


def test_rare_groups_stay_and_lack_evidence(compas):
    metrics, groups = compas
    rows = group_rows(metrics, groups, ["race"])
    assert len(rows) == 2 * groups.race.nunique()
    rare = [r for r in rows if r.n < 15]
    assert {r.group for r in rare} == {"Asian", "Native American"}  # 32 and 18 people
    assert all(r.verdict == "not enough evidence" and r.rate is not None for r in rare)


def test_published_rates_with_intervals(defendants):
    found = group_metrics(defendants, "race", metrics=["FPR", "FNR"]).to_frame().set_index(["metric", "group"])
    for group, (alarms, misses, fpr, fnr) in PUBLISHED.items():
        for name, (k, n), percent in (("FPR", alarms, fpr), ("FNR", misses, fnr)):
            row, known = found.loc[(name, group)], binomtest(k, n).proportion_ci(method="wilson")
            assert round(100 * row.estimate, 2) == percent and row.n == n and row.verdict == "fail"
            assert row.low == pytest.approx(known.low) and row.high == pytest.approx(known.high)


def test_both_teams_were_right(defendants):
    "Between the two groups of the table: error rates differ, PPV does not clearly, and the note says why both had to be."
    two = defendants.take(defendants.groups.race.isin(PUBLISHED).to_numpy())
    found = parity(two, "race", positive="reoffends")
    by = {r.criterion: r for r in found.rows}
    assert by["equalised odds"].verdict == "fail" and by["equalised odds"].estimate.value == pytest.approx(805 / 1795 - 349 / 1488)
    assert by["predictive parity"].verdict == "not enough evidence" and by["predictive parity"].estimate.value < 0.05
    assert any("Base rates differ: 0.514 in African-American, 0.394 in Caucasian" in n for n in found.notices)


def test_crossed_groups_of_few_rows_stay(defendants):
    rows = group_metrics(defendants, [("race", "sex")], metrics=["FPR"]).rows
    assert len(rows) == 12 and sum(r.n for r in rows) == 3963
    assert {r.group for r in rows if r.n < 10} >= {"Native American & Female", "Asian & Female"}
