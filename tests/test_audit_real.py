"Real data: the error rates that ProPublica published in 2016 on the COMPAS scores."
import csv
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.audit.groups import error_rates, group_rows

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
    return error_rates(y, high, positive=1), pd.DataFrame({"race": [r["race"] for r in rows]})


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
