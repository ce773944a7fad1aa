"""A prediction made in one process is compared with what a run in another, clean process then takes."""
import json
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys, tempfile
import numpy as np, torch
torch.set_num_threads(1)
import fine_tune_llm as ft
from fine_tune_llm.training.preflight import keep_peak, keep_preflight, peak_memory, preflight, reset_peak
job, longest, batch, quantize = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] or None
rng = np.random.default_rng(0)
words = np.array("alpha beta gamma delta model tensor array frame index value".split())
counts = np.clip(rng.lognormal(-1.2, 0.6, 200), 0.02, 1) * longest
data = ft.load_data([{"text": " ".join([*rng.choice(words, int(n) + 2), str(i)]), "label": "ab"[i % 2]} for i, n in enumerate(counts)])
model = ft.load_model("pocket", device="cpu", quantize=quantize)
how = dict(lora=dict(r=8), epochs=1, batch_size=batch)
if job == "predict":
    found = preflight(model, data, **how)
    print(json.dumps(dict(peak=found.peak_bytes, steps=found.steps)))
else:
    reset_peak("cpu")
    run = ft.finetune(model, data, out=tempfile.mkdtemp() + "/run", progress=False, **how)
    print(json.dumps(dict(peak=peak_memory("cpu"), steps=run.events("run_finished")[-1]["step"])))
"""


def measure(job: str, *args: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, job, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's high water mark is read on Linux")
@pytest.mark.parametrize("args", [("200", "16", ""), ("60", "16", "nf4")])
def test_the_memory_of_a_run_is_predicted(args: tuple[str, str, str]) -> None:
    told, happened = measure("predict", *args), measure("run", *args)
    assert told["steps"] == happened["steps"]
    assert 0.8 < told["peak"] / happened["peak"] < 1.2, (told, happened)
