"""Audit a million rows: 20 groups, 15 metrics, intervals, gaps and verdicts; beside it fairlearn's MetricFrame with bootstrap.

    python benchmarks/audit.py [--rows 1000000] [--boot 2]

CPU seconds are what counts; wall time depends on who else is at work. fairlearn repeats all metrics for each resample, so
its cost is measured on a few resamples and told per resample. Each part runs in a process of its own, for its peak memory.
"""
import argparse
import json
import resource
import subprocess
import sys
import time

METRICS = ["accuracy", "error rate", "selection rate", "base rate", "TPR", "FPR", "FNR", "PPV", "FOR", "NLL", "Brier", "ECE",
           "coverage", "set size", "expected cost"]


def data(rows):
    import numpy as np
    import pandas as pd
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, rows)
    p = 1 / (1 + np.exp(-odds))
    group = pd.Series(np.array([f"group {i:02}" for i in range(20)])[rng.integers(0, 20, rows)])
    return np.stack([1 - p, p], axis=1), (rng.random(rows) < p).astype(np.int64), group


def ours(rows, boot):
    import numpy as np

    from fine_tune_llm.audit.groups import group_metrics
    from fine_tune_llm.core.labels import Labels
    from fine_tune_llm.uncertainty.conformal import PredictionSets
    from fine_tune_llm.uncertainty.predictions import Predictions
    p, y, group = data(rows)
    labels = Labels(("no", "yes"))
    preds = Predictions(np.arange(rows).astype(str), labels, probs=p, y=y, groups=group.to_frame("group"))
    sets = PredictionSets(np.packbits(p >= 0.3, axis=1), preds.ids, labels, 0.1, "lac", "", 1000, 901)
    start = time.process_time(), time.perf_counter()
    found = group_metrics(preds, "group", sets=sets, metrics=METRICS)
    used = time.process_time() - start[0], time.perf_counter() - start[1]
    assert len(found.rows) == 20 * len(METRICS) == 300
    return {"cpu_s": used[0], "wall_s": used[1], "numbers": len(found.rows), "intervals": "all, and of all gaps"}


def fairlearn(rows, boot):
    import numpy as np
    import sklearn.metrics as sk
    from fairlearn import metrics as fl
    p, y, group = data(rows)
    answers = (p[:, 1] > 0.5).astype(int)
    each = {"accuracy": sk.accuracy_score, "selection rate": fl.selection_rate, "base rate": lambda t, q: np.mean(t),
            "TPR": fl.true_positive_rate, "FPR": fl.false_positive_rate, "FNR": fl.false_negative_rate, "PPV": sk.precision_score}
    start = time.process_time()
    fl.MetricFrame(metrics=each, y_true=y, y_pred=answers, sensitive_features=group)
    plain = time.process_time() - start
    start = time.process_time()
    fl.MetricFrame(metrics=each, y_true=y, y_pred=answers, sensitive_features=group, n_boot=boot, ci_quantiles=[0.025, 0.975],
                   random_state=0)
    per = (time.process_time() - start - plain) / boot
    return {"cpu_s": plain, "cpu_s_per_resample": per, "cpu_s_for_1000_resamples": plain + 1000 * per,
            "numbers": 20 * len(each), "intervals": "by bootstrap, of the metrics"}


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=int, default=1_000_000)
    ask.add_argument("--boot", type=int, default=2)
    ask.add_argument("--part", choices=["ours", "fairlearn"])
    a = ask.parse_args()
    if a.part:
        out = globals()[a.part](a.rows, a.boot)
        print(json.dumps({**out, "peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        return
    for part in ("ours", "fairlearn"):
        done = subprocess.run([sys.executable, __file__, "--part", part, "--rows", str(a.rows), "--boot", str(a.boot)],
                              capture_output=True, text=True)
        told = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
        print(f"{part}: {told}", flush=True)


if __name__ == "__main__":
    main()
