"The report as a file: offline, bounded in size, escaped, refused when its rows were used before."
import json
import re

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.audit.report import AuditReport, audit
from fine_tune_llm.core.errors import OverlapError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.calibration import TemperatureScaling
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.risk import DecisionPolicy

EIGHT = Labels(tuple("ABCDEFGH"))


def predictions(n, split, seed, sharp=1.5, columns=2, values=8):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 3, (n, 8))
    groups = pd.DataFrame({f"column {c}": rng.integers(0, values, n).astype(str) for c in range(columns)})
    groups.loc[:11, "column 0"] = "rare"
    return Predictions([f"{split}{i}" for i in range(n)], EIGHT, logits=sharp * z, y=(z + rng.gumbel(size=z.shape)).argmax(axis=1),
                       groups=groups, split=split, seen={"training": ["train0"]})


@pytest.fixture(scope="module")
def system():
    cal = TemperatureScaling().fit(predictions(800, "validation", 1))
    fresh = cal(predictions(800, "calibration", 2))
    return cal, ConformalClassifier(alpha=0.1).fit(fresh), DecisionPolicy(abstain_cost=0.3, max_risk=0.2).fit(fresh)


def report(system, n, **shape) -> AuditReport:
    cal, sets, policy = system
    test = predictions(n, "test", 3, **shape)
    return audit(cal(test), sets, policy, groups=list(test.groups), before=test)


def test_offline_and_strict_json(system, tmp_path):
    r = report(system, 3000)
    r.save(tmp_path / "r.html"), r.save(tmp_path / "r.json")
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"<script|https?:|src=|url\(|@import|<link|<img|<iframe", page)
    assert page.count('role="img"') == page.count("<desc>") >= 5
    values = json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert values["verdict"] == r.verdict and len(values["rows"]) == len(r.rows) == 4 * (9 + 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json"]


def test_size_does_not_grow_with_rows_and_is_bounded_by_checks(system, tmp_path):
    sizes = []
    for n, shape in ((2000, {}), (30_000, {}), (4000, dict(columns=3, values=40))):  # the last: close to 500 checks
        report(system, n, **shape).save(tmp_path / "r.html")
        sizes.append((tmp_path / "r.html").stat().st_size)
    assert sizes[1] < 1.1 * sizes[0] and sizes[2] < 1_000_000


def test_a_calibrated_exchangeable_system_fails_rarely(system):
    # groups are drawn at random and calibration is exact, so every fail is a false alarm: at most 2.5 % of checks each way
    cal, sets, policy = system
    rows = [r for seed in range(10, 18) for r in audit(cal(predictions(1500, "test", seed)), sets, policy, groups=["column 1"]).rows]
    assert sum(r.verdict == "fail" for r in rows) < 0.025 * len(rows)


def test_rows_used_before_are_refused(system):
    cal, sets, policy = system
    used = predictions(800, "calibration", 2)
    renamed = Predictions(used.ids, EIGHT, logits=used.logits, y=used.y, split="test")
    for part in (dict(sets=sets), dict(policy=policy), dict(sets=sets.predict(renamed))):
        with pytest.raises(OverlapError, match="already used by"): audit(cal(renamed), **part)
