"""What a move of a slider costs on a million predictions, and what a look at a live run costs.

    python benchmarks/panels.py [--rows 1000000]

Kernel time only: from setting the attribute that a slider stands for to the new SVG text in the widget, CPU milliseconds on one
thread. Each slider is moved 40 times; the first drawing, which computes the table that moves look into, is counted apart. The
live row redraws a training panel of 2,000 reported steps after each new event.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from fine_tune_llm.core.labels import Labels  # noqa: E402
from fine_tune_llm.core.runs import Run  # noqa: E402
from fine_tune_llm.panels.conformal_panel import ConformalPanel  # noqa: E402
from fine_tune_llm.panels.risk_panel import RiskPanel  # noqa: E402
from fine_tune_llm.panels.training import TrainingPanel  # noqa: E402
from fine_tune_llm.uncertainty.predictions import Predictions  # noqa: E402

def world(n: int, split: str, rng: np.random.Generator) -> Predictions:
    "n rows of ten classes and eight groups, whose stated probabilities are true."
    p = np.exp(2 * rng.standard_normal((n, 10)).astype(np.float32))
    p /= p.sum(axis=1, keepdims=True)
    y = (p.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return Predictions(np.array([f"{split}{i}" for i in range(n)]), Labels(tuple("abcdefghij")), probs=p, y=y, split=split,
                       groups=pd.DataFrame({"group": rng.integers(8, size=n).astype(str)}))


def cpu(work) -> float:  # milliseconds
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def moves(panel, trait: str, values) -> list[float]:
    "Set a trait to each value, and check that the drawing follows."
    times, seen = [], set()
    for v in values:
        times.append(cpu(lambda v=v: setattr(panel, trait, float(v))))
        seen.add(panel.plots.value)
    assert len(seen) > len(times) // 2 and panel.last_error is None
    return times


def live(steps: int = 2000) -> tuple[float, list[float]]:
    "Redraw the panel of a run after each of 40 new events."
    run = Run.create(Path(tempfile.mkdtemp()) / "run")
    run.log("run_started", total_steps=2 * steps, epochs=1, rows=9999, device="cpu", dtype="float32")
    for s in range(1, steps + 1): run.log("step", step=s, epoch=s / steps, loss=1 / s + 0.4, learning_rate=1e-4, rows_per_second=50.0)
    panel, times = TrainingPanel(run), []
    panel.publisher.close()
    panel.publisher.thread.join()
    for s in range(steps + 1, steps + 41):
        run.log("step", step=s, epoch=1.0, loss=0.4, learning_rate=1e-4, rows_per_second=50.0)
        times.append(cpu(panel.refresh))
    return 0.0, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    n, rng, out = parser.parse_args().rows, np.random.default_rng(0), []
    calibration, test = world(20_000, "calibration", rng), world(n, "test", rng)
    made: dict = {}
    first = cpu(lambda: made.update(c=ConformalPanel(calibration, test, group="group")))
    out.append(("conformal, alpha", first, moves(made["c"], "alpha", np.arange(2, 42) / 100)))
    first = cpu(lambda: made.update(r=RiskPanel(calibration, test, abstain_cost=0.3, max_risk=0.2)))
    out.append(("risk, limit", first, moves(made["r"], "max_risk", np.arange(20, 60) / 200)))
    out.append(("risk, price of a person", first, moves(made["r"], "abstain_cost", made["r"].tables[1].prices[20:60])))
    out.append(("training, a new event", *live()))
    print(f"| {n:,} predictions | first drawing, s | median, ms | slowest, ms |\n|---|---|---|---|")
    for name, first, times in out: print(f"| {name} | {first / 1000:.1f} | {statistics.median(times):.1f} | {max(times):.1f} |")


if __name__ == "__main__": main()
