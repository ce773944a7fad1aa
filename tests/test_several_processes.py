"""One run in two processes: the same losses as in one, one writer, and one will."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trainings as t

from fine_tune_llm.core.runs import Run

SCRIPT = """
import json, sys
import trainings as t
base, out, options, resume = json.loads(sys.argv[1])
t.train(base, out, options, resume=resume, rows=t.weather(9), hook=sys.argv[2] if len(sys.argv) > 2 else "")
"""
OPTIONS = dict(lora=dict(r=4, lora_dropout=0.0), epochs=2, learning_rate=5e-4, batch_size=4)  # 35 rows: 9 steps an epoch, the last of 3 rows


def launched(folder: Path, n: int, *args: object, hook: str = "") -> str:
    "Run the script under accelerate's launcher, or by itself; what it said."
    script = folder / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    many = ["-m", "accelerate.commands.launch", "--num_processes", str(n), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", "0", "--multi_gpu"] if n > 1 else []
    done = subprocess.run([sys.executable, *many, str(script), json.dumps(args), *([hook] if hook else [])], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_take_the_path_of_one(tmp_path: Path) -> None:
    base = str(t.tiny_llama(tmp_path / "model"))
    launched(tmp_path, 1, base, str(tmp_path / "one"), OPTIONS, False)
    launched(tmp_path, 2, base, str(tmp_path / "two"), OPTIONS, False)
    one, two = (Run.attach(tmp_path / name) for name in ("one", "two"))
    losses = [{e["step"]: e["loss"] for e in run.events("step")} for run in (one, two)]
    assert len(losses[0]) == 18 and losses[0].keys() == losses[1].keys()
    assert np.allclose(list(losses[0].values()), list(losses[1].values()), rtol=0, atol=1e-6)
    assert [e["event"] for e in one.events()] == [e["event"] for e in two.events()]  # one of the two wrote
    for e in two.events("step")[:-1]: assert np.isclose(e["rows_per_second"] * e["eta_s"], 4 * (18 - e["step"]))  # the rows of both processes, whatever the clock says
    assert two.verify().torn == 0 and two.state == "finished" and (two.path / "adapter/adapter_model.safetensors").exists()
    saved = sorted((two.path / "checkpoints").glob("step-*"))
    assert len(saved) == 2 and {"rng_state_0.pth", "rng_state_1.pth"} <= set(json.loads((saved[0] / "manifest.json").read_text()))


@pytest.mark.slow
def test_two_processes_stop_and_go_on_together(tmp_path: Path) -> None:
    "A stop is heard by the first process only; both end after the same step, and the run goes on to the adapter of a run that was not stopped."
    base, out = str(t.tiny_llama(tmp_path / "model")), tmp_path / "run"
    launched(tmp_path, 2, base, str(out), OPTIONS, False, hook="stop_at_five")
    run = Run.attach(out)
    assert run.state == "stopped" and run.events("run_stopped")[0]["step"] == 5
    launched(tmp_path, 2, base, str(out), OPTIONS, True)
    launched(tmp_path, 2, base, str(tmp_path / "whole"), OPTIONS, False)
    assert Run.attach(out).state == "finished" and t.adapter(out) == t.adapter(tmp_path / "whole")
    launched(tmp_path, 1, base, str(tmp_path / "whole"), OPTIONS, True)
    error = (tmp_path / "whole.error").read_text()
    assert re.search(r"processes: 2 -> 1", error)
