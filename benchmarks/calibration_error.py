"""How much CPU and memory one calibration error costs: ours, torchmetrics and netcal on the same confidences.

    python benchmarks/calibration_error.py [rows] [repeats]

Each run is a process of its own, so that its peak memory is its own; runs alternate (A B C A B C ...), with one thread each.
CPU seconds are user + system time of the measured call alone, without imports and data; the ratio is that of the medians. The
extra memory is the peak during the call above what the process held before it. The floor is one pass that only reads the input."""
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BINS = 15


def data(n: int) -> tuple[np.ndarray, np.ndarray]:  # (confidence in float32, whether right), both [n]
    "Draw confidences like a language model's, and outcomes 5 points below them."
    rng = np.random.default_rng(0)
    c = np.sqrt(rng.random(n, dtype=np.float32))
    return c, rng.random(n, dtype=np.float32) < c - 0.05


def floor(c: np.ndarray, right: np.ndarray) -> Callable[[], float]:
    return lambda: float(c.max()) + float(right.any())


def ours(c: np.ndarray, right: np.ndarray) -> Callable[[], float]:
    from fine_tune_llm.uncertainty.metrics import CalibrationState, ece
    return lambda: float(ece(CalibrationState.empty(BINS).update(c, right), n_boot=0))


def ours_with_interval(c: np.ndarray, right: np.ndarray) -> Callable[[], float]:
    from fine_tune_llm.uncertainty.metrics import CalibrationState, ece
    return lambda: float(ece(CalibrationState.empty(BINS).update(c, right)))


def torchmetrics(c: np.ndarray, right: np.ndarray, validate: bool = True) -> Callable[[], float]:
    import torch
    from torchmetrics.functional.classification import binary_calibration_error
    torch.set_num_threads(1)
    a, b = torch.from_numpy(c), torch.from_numpy(right.astype(np.int64))
    return lambda: float(binary_calibration_error(a, b, n_bins=BINS, validate_args=validate))


def torchmetrics_unchecked(c: np.ndarray, right: np.ndarray) -> Callable[[], float]: return torchmetrics(c, right, validate=False)


def netcal(c: np.ndarray, right: np.ndarray) -> Callable[[], float]:
    from netcal.metrics import ECE
    b = right.astype(np.int64)
    return lambda: float(ECE(BINS).measure(c, b))


RUNS = {"one read pass": floor, "ours": ours, "ours, interval and null": ours_with_interval, "torchmetrics": torchmetrics,
        "torchmetrics, unchecked": torchmetrics_unchecked, "netcal": netcal}


def now_mb() -> float:
    "Tell how much memory this process holds now."
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def one(name: str, n: int) -> dict[str, Any]:
    "Measure one call in this process."
    arrays = data(n)
    RUNS[name](*(a[:1000] for a in arrays))()  # imports and first-use costs
    call = RUNS[name](*arrays)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = now_mb(), time.process_time()
    value = call()
    cpu = time.process_time() - start
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"name": name, "n": n, "cpu_s": cpu, "extra_mb": max(0.0, peak / 1024 - before), "value": value}


def measure(n: int = 5_000_000,  # rows
            repeats: int = 3,  # runs of each
           ) -> list[dict[str, Any]]:  # one row per library: medians, and ratios of CPU seconds to ours
    "Measure all libraries that are installed, in turns."
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
    for _ in range(repeats):
        for name in RUNS:
            done = subprocess.run([sys.executable, __file__, "--one", name, str(n)], env=env, capture_output=True, text=True)
            if done.returncode == 0: runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            else: print(f"{name}: {done.stderr.splitlines()[-1]}", file=sys.stderr)
    rows = [{"name": name, "n": n, "repeats": len(r), "cpu_s": statistics.median(x["cpu_s"] for x in r),
             "extra_mb": statistics.median(x["extra_mb"] for x in r), "value": r[0]["value"]} for name, r in runs.items() if r]
    base = next(r["cpu_s"] for r in rows if r["name"] == "ours")
    return [{**r, "ratio": r["cpu_s"] / base} for r in rows]


def table(rows: list[dict[str, Any]]) -> str:
    "Lay the measurements out as text."
    head = f"ECE with {BINS} bins of {rows[0]['n']:,} predictions, medians of {rows[0]['repeats']} runs, one thread"
    lines = [f"{r['name']:26}{r['cpu_s']:9.3f}{r['ratio']:13.1f}{r['extra_mb']:11.0f}   {'-' if r['name'] == 'one read pass' else round(r['value'], 10)}"
             for r in rows]
    return "\n".join([head, f"{'':26}{'CPU s':>9}{'times ours':>13}{'extra MB':>11}   ECE", *lines])


def main() -> None:
    if sys.argv[1:2] == ["--one"]: print(json.dumps(one(sys.argv[2], int(sys.argv[3]))))
    else: print(table(measure(*(int(a) for a in sys.argv[1:3]))))


if __name__ == "__main__": main()
