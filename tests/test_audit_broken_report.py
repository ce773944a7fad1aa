"""The gate before a release reads any report.json: nonsense in the place of any value is a finding or a refusal, never a traceback."""
import json
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.audit.gate import verify_path
from fine_tune_llm.audit.report import audit
from fine_tune_llm.core.errors import FineTuneLLMError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.predictions import Predictions

@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 120)
    y = [int(rng.choice(3, p=q)) for q in p]
    rows = Predictions([f"r{i}" for i in range(120)], Labels(("a", "b", "c")), probs=p, y=y, split="test",
                       groups=pd.DataFrame({"channel": rng.choice(["app", "web"], 120)}))
    return audit(rows, groups="channel")


def leaves(value, path=()):
    "Every place in a nest of plain values; of a list, the first entry."
    parts = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from leaves(part, (*path, key))


def spoilt(whole, path, nonsense):
    value = place = deepcopy(whole)
    for key in path[:-1]: place = place[key]
    place[path[-1]] = nonsense
    return value


def test_a_whole_report_is_sound(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert verify_path(tmp_path / "report.json", again=report).code == 0


@pytest.mark.parametrize("nonsense", [None, "x", [], {"a": 1}, 7], ids=repr)
def test_nonsense_anywhere_is_found_or_refused(report, nonsense, tmp_path):
    report.save(tmp_path / "report.json")
    whole = json.loads((tmp_path / "report.json").read_text())
    for path in leaves(whole):
        bad = spoilt(whole, path, nonsense)
        if bad == whole or path[0] == "notes" or path == ("provenance", "software"): continue  # words and versions are not compared
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        try: assert verify_path(tmp_path / "bad.json", again=report).code == 1, path
        except FineTuneLLMError: assert path == ("kind",), path
