"""`fine-tune-llm audit` and `verify` as a shell sees them: exit codes, JSON, and mistakes that end in one line."""
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import shell
from typer.testing import CliRunner

from fine_tune_llm.apps.cli import app
from fine_tune_llm.audit.dossier import Dossier
from fine_tune_llm.core.errors import FineTuneLLMError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.risk import DecisionPolicy

def quick(*args: object) -> subprocess.CompletedProcess:
    "The same in this process, since each start of Python takes seconds."
    done = CliRunner().invoke(app, [*map(str, args)])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return subprocess.CompletedProcess(args, done.exit_code, done.stdout, done.stderr)


def predictions(n: int, split: str, seed: int, worse: float = 0.0) -> Predictions:
    "A calibrated model; in group a, a share `worse` of the rows has its label turned."
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 4, (n, 2))
    y, group = (z + rng.gumbel(size=z.shape)).argmax(axis=1), rng.choice(["a", "b"], n)
    y = np.where((group == "a") & (rng.random(n) < worse), 1 - y, y)
    return Predictions([f"{split}{seed}-{i}" for i in range(n)], Labels(("no", "yes")), logits=z, y=y, groups=pd.DataFrame({"desk": group, "day": rng.choice(["mon", "tue"], n)}),
                       split=split, seen={"training": ["t0"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("gate")
    calibration, test = predictions(2000, "calibration", 1), predictions(6000, "test", 2)
    test.save(home / "fair.parquet")
    predictions(6000, "test", 3, worse=0.3).save(home / "unfair.parquet")
    predictions(60, "test", 4).save(home / "few.parquet")
    calibration.save(home / "calibration.parquet")
    ConformalClassifier(alpha=0.1).fit(calibration).save(home / "sets.json")
    DecisionPolicy(abstain_cost=0.4, max_risk=0.3).fit(calibration).save(home / "policy.json")
    d = Dossier.create(home / "case", "Routes letters of patients", owner="Ada")
    d.audit(test, groups=["desk"], by="Ada")
    return home


def test_a_pass_a_fail_and_too_little(folder, tmp_path):
    fair = shell("audit", folder / "fair.parquet", "--group", "desk", "--sets", folder / "sets.json", "--policy", folder / "policy.json",
                 "--tolerance", "0.1", "--out", tmp_path / "r.html", "--out", tmp_path / "r.json")
    assert fair.returncode == 0 and fair.stderr == "" and fair.stdout.startswith("AUDIT, pass: All") and "coverage" in fair.stdout and "selective risk" in fair.stdout
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "pass" and (tmp_path / "r.html").stat().st_size < 1_000_000
    unfair = quick("audit", folder / "unfair.parquet", "--group", "desk", "--group", "desk&day", "--json")
    report = json.loads(unfair.stdout)
    assert unfair.returncode == 1 and report["verdict"] == "fail" and {r["column"] for r in report["rows"]} == {"desk", "desk & day"}
    few = quick("audit", folder / "few.parquet", "--group", "desk")
    assert few.returncode == 3 and "not enough evidence" in few.stdout and few.stderr == ""

    sound = quick("verify", tmp_path / "r.json")
    assert sound.returncode == 0 and sound.stdout.startswith("SOUND: report") and "not computed again" in sound.stdout
    (tmp_path / "forged.json").write_text(json.dumps({**report, "verdict": "pass", "title": "All 6 checks pass"}))
    forged = quick("verify", tmp_path / "forged.json", "--json")
    assert forged.returncode == 1 and any("fail does" in a for a in json.loads(forged.stdout)["altered"])


def test_verify_names_one_byte(folder, tmp_path):
    shutil.copytree(folder / "case", tmp_path / "case")
    found = quick("verify", tmp_path / "case", "--json", "--write", tmp_path / "page.html", "--write", tmp_path / "card.md")
    state = json.loads(found.stdout)
    assert found.returncode == 3 and state["altered"] == [] and any("robustness" in o for o in state["open"]) and state["kind"] == "dossier"
    assert "Routes letters" in (tmp_path / "card.md").read_text() and "Routes letters" in (tmp_path / "page.html").read_text()
    target = tmp_path / "case" / "audit" / "report.json"
    raw = bytearray(target.read_bytes())
    raw[len(raw) // 2] ^= 1
    target.write_bytes(raw)
    hurt = shell("verify", tmp_path / "case")
    assert hurt.returncode == 1 and hurt.stdout.startswith("ALTERED") and "audit/report.json: changed" in hurt.stdout and hurt.stderr == ""


@pytest.mark.parametrize("args, told", [
    (("audit", "few.parquet", "--group", "shoe"), "no group column 'shoe'"), (("audit", "nowhere.parquet"), "cannot read predictions"),
    (("audit", "calibration.parquet"), "is no test set"), (("audit", "few.parquet", "--metric", "speed", "--group", "desk"), "no metric 'speed'"),
    (("audit", "few.parquet", "--tolerance", "7", "--group", "desk"), "tolerance"), (("audit", "sets.json"), "cannot read predictions"),
    (("audit", "few.parquet", "--sets", "few.parquet"), "few.parquet"), (("verify", "sets.json"), "no audit report"), (("verify", "few.parquet"), "few.parquet"),
    (("verify", "case", "--write", "x.pdf"), "use .html, .md or .json"), (("verify", "."), "no run folder")])
def test_mistakes_end_in_one_line(folder, args, told, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(FineTuneLLMError) as e: quick(*args)
    assert told in str(e.value) and "\n" not in str(e.value)


def test_the_program_says_it_in_one_line(folder):
    done = shell("audit", folder / "few.parquet", "--group", "shoe")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("error: no group column 'shoe'") and done.stderr.count("\n") == 1
