"""The command line as a user meets it: a run from a file, Ctrl-C, resume, and answers in a fresh process."""
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fine_tune_llm.core.runs import Run

WORDS = "morning evening street garden window river letter kitchen market school bridge forest station harbour tower".split()
PROGRAM = [sys.executable, "-c", "from fine_tune_llm.apps.cli import main; main()"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "A folder with a file of 210 texts and a configuration that names it."
    home = tmp_path_factory.mktemp("cli")
    with (home / "weather.csv").open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["text", "label"])
        for w in ("rain", "sun"): out.writerows([f"{a} and {b} in the {w}", w] for i, a in enumerate(WORDS) for b in WORDS[:i])
    (home / "run.yaml").write_text("data: {path: weather.csv}\ntraining: {epochs: 12, batch_size: 16, learning_rate: 0.003, lora: {r: 4}}\n"
                                   f"trust: {{abstain_cost: 0.3}}\nout: {home / 'run'}\n")
    return home


def shell(*args: object, **kwargs: object) -> subprocess.CompletedProcess:
    return subprocess.run([*PROGRAM, *map(str, args)], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]


def test_ctrl_c_saves_and_resume_ends_with_answers(folder: Path) -> None:
    process = subprocess.Popen([*PROGRAM, "run", str(folder / "run.yaml")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ((folder / "run/events.jsonl").exists() and Run.attach(folder / "run").events("step")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    run = Run.attach(folder / "run")
    assert process.returncode == 130 and f"run --resume {run.path}" in err and "Traceback" not in err
    assert run.state == "stopped" and (run.path / run.events("run_stopped")[0]["checkpoint"] / "manifest.json").exists()

    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("epochs: 12", "epochs: 13"))  # another run, so it is refused by name
    refused = shell("run", "--resume", run.path)
    assert refused.returncode == 1 and "settings.epochs: 12 -> 13" in refused.stderr and len(refused.stderr.strip().splitlines()) <= 4
    (run.path / "config.yaml").write_text(text)

    done = shell("run", "--resume", run.path)
    assert done.returncode == 0, done.stderr
    assert "coverage" in done.stdout and str(run.path / "bundle") in done.stdout
    assert Run.attach(run.path).state == "finished" and run.verify().torn == 0

    answered = shell("predict", run.path / "bundle", "-", input="river in the sun\n\nriver in the rain\n")
    lines = [json.loads(line) for line in answered.stdout.splitlines()]
    assert [line.get("best_guess") for line in lines] == ["sun", None, "rain"] and lines[1]["error"] == "the text is empty"
    assert answered.returncode == 1  # one of three lines had no text
    assert shell("predict", run.path / "bundle", "river in the sun").returncode == 0


def test_mistakes_end_in_one_line(folder: Path) -> None:
    (folder / "typo.yaml").write_text("data: {path: weather.csv, lable: label}\n")
    typo = shell("run", folder / "typo.yaml")
    assert typo.returncode == 1 and "data.lable is no setting" in typo.stderr and len(typo.stderr.strip().splitlines()) == 1
