"fairlearn's MetricFrame and ours on the same rows: every metric that both know, by group, crossed, and as differences."
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.audit.groups import group_metrics
from fine_tune_llm.audit.parity import parity
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.predictions import Predictions

pytestmark = pytest.mark.peers
COMPAS = Path(__file__).parents[2] / "shared/data/fairness/compas_two_years.csv.gz"


def synthetic():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"race": rng.choice(["a", "b", "c"], 3000, p=[0.5, 0.4, 0.1]), "sex": rng.choice(["f", "m"], 3000)})
    score = rng.random(3000)
    return table, (rng.random(3000) < score).astype(int), (score > 0.45).astype(int)


def compas():
    if not COMPAS.exists(): pytest.skip(f"no {COMPAS.name}")
    with gzip.open(COMPAS, "rt") as f: t = pd.read_csv(f, keep_default_na=False)
    return t[["race", "sex"]], t.two_year_recid.to_numpy(), (t.score_text != "Low").to_numpy().astype(int)


@pytest.mark.parametrize("data", [synthetic, compas])
def test_metric_frame(data):
    fl, sk = pytest.importorskip("fairlearn.metrics"), pytest.importorskip("sklearn.metrics")
    table, y, yhat = data()
    shared = {"accuracy": sk.accuracy_score, "error rate": sk.zero_one_loss, "selection rate": fl.selection_rate,
              "TPR": fl.true_positive_rate, "FPR": fl.false_positive_rate, "FNR": fl.false_negative_rate, "PPV": sk.precision_score,
              "base rate": lambda t, p: t.mean(),
              "FOR": lambda t, p: t[p == 0].mean() if (p == 0).any() else np.nan}
    preds = Predictions(np.arange(len(y)).astype(str), Labels(("no", "yes")), probs=np.eye(2)[yhat] * 0.8 + 0.1, y=y, groups=table)
    for by in ("race", "sex", ("race", "sex")):
        features = table[list(by) if isinstance(by, tuple) else [by]]
        theirs = fl.MetricFrame(metrics=shared, y_true=y, y_pred=yhat, sensitive_features=features)
        ours = group_metrics(preds, [by], metrics=list(shared))
        for r in ours.rows:
            key = tuple(r.group.split(" & ")) if isinstance(by, tuple) else r.group
            if r.rate is not None: assert r.rate.value == pytest.approx(theirs.by_group.loc[key, r.metric], abs=1e-12), (r.metric, key)
        for name, e in ours.overall.items(): assert e.value == pytest.approx(theirs.overall[name], abs=1e-12)
    for r in (r for r in parity(preds, ["race", "sex"]).rows if r.estimate):
        f = table[r.column]
        known = {"demographic parity": fl.demographic_parity_difference, "equalised odds": fl.equalized_odds_difference}
        if r.criterion in known: assert r.estimate.value == pytest.approx(known[r.criterion](y, yhat, sensitive_features=f), abs=1e-12)
        assert r.estimate.low <= r.estimate.value + 1e-9 or r.criterion == "calibration within groups"


def test_bootstrap_intervals_agree():
    "Wilson's interval and fairlearn's bootstrap are close for rates away from 0 and 1, and the bootstrap has no length at 0 of n."
    fl = pytest.importorskip("fairlearn.metrics")
    table, y, yhat = synthetic()
    theirs = fl.MetricFrame(metrics={"selection rate": fl.selection_rate}, y_true=y, y_pred=yhat, sensitive_features=table.race, n_boot=300,
                            ci_quantiles=[0.025, 0.975], random_state=0).by_group_ci
    preds = Predictions(np.arange(len(y)).astype(str), Labels(("no", "yes")), probs=np.eye(2)[yhat] * 0.8 + 0.1, y=y, groups=table)
    for r in group_metrics(preds, "race", metrics=["selection rate"]).rows:
        ends = [q.loc[r.group, "selection rate"] for q in theirs]
        assert np.allclose([r.rate.low, r.rate.high], ends, atol=0.012)
