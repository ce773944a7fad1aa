"""What a move of a slider costs on a million predictions, and what a look at a live run costs.

    python benchmarks/panels.py [--rows 1000000] [--pairs 4]

Kernel time only: from setting the attribute that a slider stands for to the new SVG text in the widget, CPU milliseconds on one
thread. Each slider is moved 40 times; the first drawing, which computes the table that moves look into, is counted apart. The
live row redraws a training panel of 2,000 reported steps and ten evaluations after each new event.

The last lines come from a real kernel with open comms, three ways. Pairs: the same small training without and with a shown panel that
publishes ten times a second, in turn (A B, B A, ...), so that a machine that grows slower hurts both alike. Turns: one longer training
whose panel publishes in every second stretch of two seconds, each compared with the stretches around it, which a slow drift of the machine
does not touch. And the CPU time of the publisher's thread, and of the thread of ipykernel that hands its messages on, over the time of the
run: that does not depend on what else the machine does, the throughput does. The first redraws, while the axes grow, and the last, which
leaves a picture, are counted.
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
    for s in range(1, steps + 1):
        run.log("step", step=s, epoch=s / steps, loss=1 / s + 0.4, learning_rate=1e-4, rows_per_second=50.0)
        if s % (steps // 10) == 0: run.log("evaluated", step=s, nll=1 / s + 0.4, accuracy=0.9, ece=0.03, ece_low=0.02, ece_high=0.04, ece_null=0.03)
    panel, times = TrainingPanel(run), []
    panel.publisher.close()
    panel.publisher.thread.join()
    for s in range(steps + 1, steps + 41):
        run.log("step", step=s, epoch=1.0, loss=0.4, learning_rate=1e-4, rows_per_second=50.0)
        times.append(cpu(panel.refresh))
    return 0.0, times


TRAIN = """
import json, tempfile, threading, time
import torch
import fine_tune_llm as ft
from pathlib import Path
from IPython.display import display
torch.set_num_threads(1)
words = "morning evening street garden window river letter kitchen market school bridge forest".split()
data = ft.load_data([dict(text=f"{a} and {b} in the {w}", label=w) for w in ("rain", "sun") for i, a in enumerate(words) for b in words[:i]])
model = ft.load_model("pocket", device="cpu")

def start(steps):
    return ft.finetune(model, data, lora=dict(r=4), epochs=max(1, steps * 4 // 87), batch_size=4, evaluate_every=10**6, out=Path(tempfile.mkdtemp()) / "run", background=True)

def cpu(thread): return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))

def watch(run, when=lambda: True):
    "Show the panel of a run, publish ten times a second, and give what adds up the CPU seconds of its thread."
    panel, spent = run.panel(), [0.0]
    draw = panel.publisher.draw
    def timed():
        try: return draw() if when() else True
        finally: spent[0] = time.thread_time()
    panel.publisher.draw, panel.publisher.pause = timed, 0.1
    display(panel)
    return spent

def go(shown, steps=STEPS):
    "Steps per second, shares of a core of publisher and messenger, and CPU milliseconds of the whole process per step."
    messenger = next(t for t in threading.enumerate() if t.name == "IOPub")
    before, began = cpu(messenger), time.process_time()
    run = start(steps)
    spent = watch(run) if shown else [0.0]
    run.wait()
    all_of_it, events = time.process_time() - began, run.events("step")
    rate = (events[-1]["step"] - events[0]["step"]) / (events[-1]["time"] - events[0]["time"])
    span = events[-1]["time"] - run.events("run_started")[0]["time"]
    print(json.dumps([rate, spent[0] / span, (cpu(messenger) - before) / span, 1000 * all_of_it / events[-1]["step"]]))

def turns(steps, length=2.0):
    "Throughput in each stretch with a panel that publishes, over that of the stretches around it."
    run = start(steps)
    watch(run, lambda: int(time.time() / length) % 2)
    run.wait()
    done = {}
    events = run.events("step")[2:]
    for a, b in zip(events, events[1:]):
        w = int(a["time"] / length)
        if w == int(b["time"] / length): done.setdefault(w, []).append((b["step"] - a["step"], b["time"] - a["time"]))
    rates = {w: sum(n for n, _ in part) / sum(t for _, t in part) for w, part in done.items() if sum(t for _, t in part) > length / 2}
    print(json.dumps([2 * rates[w] / (rates[w - 1] + rates[w + 1]) for w in rates if w % 2 and w - 1 in rates and w + 1 in rates]))

go(False, 60)
"""


def throughput(pairs: int, steps: int) -> tuple[list[list[list[float]]], list[float]]:  # of each pair, without and with a panel: what `go` prints; what `turns` prints
    "Train without and with a panel in turn, in a kernel of its own."
    import json

    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name="python3")

    def run(code: str) -> list[float]:
        said: list[str] = []
        def hear(m):
            if m["msg_type"] == "stream" and m["content"]["name"] == "stdout": said.append(m["content"]["text"])
        reply = client.execute_interactive(code, output_hook=hear, timeout=1200)
        assert reply["content"]["status"] == "ok", reply["content"]
        return json.loads("".join(said).strip().splitlines()[-1])
    try:
        run(TRAIN.replace("STEPS", str(steps)))
        found = [{shown: run(f"go({shown})") for shown in ((False, True), (True, False))[i % 2]} for i in range(pairs)]
        return [[pair[False], pair[True]] for pair in found], run(f"turns({3 * steps})")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def with_interval(values: list[float]) -> str:
    "The mean with its 95 % interval, Student's t."
    from scipy.stats import t
    mean = statistics.mean(values)
    if len(values) < 2: return f"{mean:.3f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=4, help="trainings without and with a panel; 0 to leave them out")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    args = parser.parse_args()
    n, rng, out = args.rows, np.random.default_rng(0), []
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
    if not args.pairs: return
    found, alternating = throughput(args.pairs, args.steps)
    print(f"\n| {args.steps} steps of pocket, one thread | without, steps/s | with a panel at 10 Hz | ratio | CPU per step, ratio | publisher, share of a core | messenger |\n|---|---|---|---|---|---|---|")
    rows = [(bare[0], watched[0], watched[0] / bare[0], watched[3] / bare[3], watched[1], watched[2]) for bare, watched in found]
    for i, (bare, watched, ratio, cost, share, sent) in enumerate(rows, 1): print(f"| pair {i} | {bare:.1f} | {watched:.1f} | {ratio:.3f} | {cost:.3f} | {share:.4f} | {sent:.4f} |")
    ratios, costs, shares, messages = ([row[k] for row in rows] for k in (2, 3, 4, 5))
    print(f"| mean [95 %] | | | {with_interval(ratios)} | {with_interval(costs)} | {statistics.mean(shares):.4f} | {statistics.mean(messages):.4f} |")
    print(f"| in turns within one training, {len(alternating)} stretches of 2 s | | | {with_interval(alternating)} | | | |")


if __name__ == "__main__": main()
