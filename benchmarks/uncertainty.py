"""Time and memory of the uncertainty floor beside other libraries, on one machine in one run.

    python benchmarks/uncertainty.py            # the sizes of the claims: about two minutes and 4 GB of memory
    python benchmarks/uncertainty.py --quick    # a tenth of the rows
    python benchmarks/uncertainty.py --stream   # also 1,000,000 rows x 1000 classes, in chunks

Each item runs in a process of its own (its peak memory is then its own), in turns A B A B; the figures are medians of the
turns. CPU seconds, one thread: wall time depends on the neighbours. "Above the input" is the peak of the resident memory
minus what was resident when the libraries and the arrays were loaded (Linux only). All libraries get the same probabilities.
"""
import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import numpy as np

HERE, ALPHA = Path(__file__).resolve().parent, 0.1
sys.path.insert(0, str(HERE.parent))


# Data: softmax of random logits, and true classes drawn from it

def make(folder: Path, name: str, n: int, k: int) -> None:
    rng, p = np.random.default_rng(k + n), np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (n, k))
    y = np.empty(n, dtype=np.int64)
    for a in range(0, n, 5000):
        z = rng.standard_normal((min(5000, n - a), k), dtype=np.float32) * 3
        y[a:a + len(z)] = (z + rng.gumbel(size=z.shape).astype(np.float32)).argmax(axis=1)
        z = np.exp(z - z.max(axis=1, keepdims=True))
        p[a:a + len(z)] = z / z.sum(axis=1, keepdims=True)
    np.save(folder / f"{name}_y.npy", y)


def predictions(p, y, name):
    from fine_tune_llm.uncertainty.predictions import Predictions
    return Predictions([f"{name}{i}" for i in range(len(p))], tuple(map(str, range(p.shape[1]))), probs=p, y=y)


# Items: each loads what it needs, and gives a function to time

def ours(score, d):
    from fine_tune_llm.uncertainty.conformal import ConformalClassifier
    def run():
        sets = ConformalClassifier(score, alpha=ALPHA).fit(predictions(d["cal"], d["cal_y"], "c")).predict(predictions(d["test"], None, "t"))
        return sets.sizes.mean(), float((sets.bits[np.arange(len(sets)), d["test_y"] >> 3] >> (7 - (d["test_y"] & 7)) & 1).mean())
    return run


def our_kernel(score, d):
    """The same without making `Predictions` of the arrays, which checks each row and id: scores, rank, cut-offs, packed sets."""
    from fine_tune_llm.uncertainty.conformal import ConformalClassifier
    cal, test = predictions(d["cal"], d["cal_y"], "c"), predictions(d["test"], None, "t")
    def run():
        sets = ConformalClassifier(score, alpha=ALPHA).fit(cal).predict(test)
        return sets.sizes.mean(), float((sets.bits[np.arange(len(sets)), d["test_y"] >> 3] >> (7 - (d["test_y"] & 7)) & 1).mean())
    return run


def given(k):
    from sklearn.base import BaseEstimator, ClassifierMixin
    class Given(ClassifierMixin, BaseEstimator):
        "A classifier whose probabilities are its input."
        def __init__(self): self.classes_, self.is_fitted_ = np.arange(k), True
        def fit(self, x, y): return self
        def predict_proba(self, x): return np.asarray(x)
        def predict(self, x): return np.asarray(x).argmax(axis=1)
    return Given()


def mapie(score, d):
    from mapie.classification import SplitConformalClassifier
    params = {} if score == "lac" else {"include_last_label": "randomized"}
    def run():
        model = SplitConformalClassifier(given(d["cal"].shape[1]), confidence_level=1 - ALPHA, conformity_score=score, prefit=True, random_state=0)
        sets = model.conformalize(d["cal"], d["cal_y"]).predict_set(d["test"], conformity_score_params=params)[1][:, :, 0]
        return sets.sum(axis=1).mean(), sets[np.arange(len(sets)), d["test_y"]].mean()
    return run


def torchcp(score, d):
    import torch
    from torchcp.classification.predictor import SplitPredictor
    from torchcp.classification.score import APS, LAC
    torch.set_num_threads(1)
    def run():
        predictor = SplitPredictor({"aps": APS, "lac": LAC}[score](score_type="identity"), alpha=ALPHA)
        predictor.calculate_threshold(torch.from_numpy(d["cal"]), torch.from_numpy(d["cal_y"]), ALPHA)
        sets = predictor.predict_with_logits(torch.from_numpy(d["test"])).numpy()
        return sets.sum(axis=1).mean(), sets[np.arange(len(sets)), d["test_y"]].mean()
    return run


def our_p(_, d):
    from fine_tune_llm.uncertainty.conformal import ConformalClassifier
    from fine_tune_llm.uncertainty.p_values import conformal_p_values
    cal, test = predictions(d["cal"], d["cal_y"], "c"), predictions(d["test"], None, "t")
    def run():
        p = conformal_p_values(ConformalClassifier("lac").fit(cal), test, smoothed=True)
        return p.mean(), p[np.arange(len(p)), d["test_y"]].mean()
    return run


def crepes_p(_, d):
    from crepes import ConformalClassifier
    from crepes.extras import hinge
    def run():
        model = ConformalClassifier().fit(hinge(d["cal"], np.arange(d["cal"].shape[1]), d["cal_y"]), seed=0)
        p = model.predict_p(hinge(d["test"]), smoothing=True, seed=0)
        return p.mean(), p[np.arange(len(p)), d["test_y"]].mean()
    return run


def read_floor(_, d): return lambda: (float(d["cal"].max() + d["test"].max()), 0.0)
def sort_floor(_, d):
    def run():
        for a in range(0, len(d["test"]), 250): np.sort(d["test"][a:a + 250], axis=1)
        return 0.0, 0.0
    return run


def stream(times, d):
    """Chunks of 10,000 rows, over and over with new ids; the packed sets go to a file."""
    from fine_tune_llm.uncertainty.conformal import ConformalClassifier
    fitted = ConformalClassifier("aps", alpha=ALPHA).fit(predictions(d["cal"], d["cal_y"], "c"))
    def run():
        rows = classes = 0
        with tempfile.TemporaryFile() as out:
            for i in range(int(times)):
                a = i * 10_000 % len(d["test"])
                sets = fitted.predict(predictions(d["test"][a:a + 10_000], None, f"{i}-"))
                out.write(sets.bits.tobytes())
                rows, classes = rows + len(sets), classes + int(sets.sizes.sum())
        return classes / rows, float(rows)
    return run


ITEMS = {"ours": ours, "kernel": our_kernel, "mapie": mapie, "torchcp": torchcp, "our_p": our_p, "crepes_p": crepes_p, "read": read_floor,
         "sort": sort_floor, "stream": stream}


def resident() -> float:
    "Megabytes resident now."
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_resident(reset: bool = False) -> float:
    "Megabytes resident at most since the start, or since the last reset."
    if reset: Path("/proc/self/clear_refs").write_text("5")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def item(name: str, option: str, folder: Path) -> None:
    "Run one item in this process and print its figures."
    import warnings
    warnings.filterwarnings("ignore")
    d = {f.stem: np.load(f) for f in folder.glob("*.npy")}
    run = ITEMS[name](option, d)
    peak_resident(reset=True)
    before, cpu, wall = resident(), time.process_time(), time.perf_counter()
    size, covered = run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = peak_resident()
    print(json.dumps({"cpu": cpu, "wall": wall, "peak": peak, "above": max(0.0, peak - before), "size": float(size), "covered": float(covered)}))


def measure(jobs: list[tuple[str, str, Path]], turns: int) -> dict[tuple[str, str], dict[str, float]]:
    "Run each job in a process of its own, in turns, and take medians."
    found: dict[tuple[str, str], list[dict[str, float]]] = {job[:2]: [] for job in jobs}
    for _ in range(turns):
        for name, option, folder in jobs:
            done = subprocess.run([sys.executable, __file__, "--item", name, option, str(folder)], capture_output=True, text=True)
            if done.returncode: print(f"  {name} {option} failed: {done.stderr.strip().splitlines()[-1]}")
            else: found[name, option].append(json.loads(done.stdout.splitlines()[-1]))
    return {job: {k: median(r[k] for r in rows) for k in rows[0]} for job, rows in found.items() if rows}


def table(title: str, found: dict, base: tuple[str, str]) -> None:
    "Print the figures beside those of `base`."
    print(f"\n{title}\n  {'':20} {'CPU s':>8} {'x':>7} {'above input MB':>15} {'x':>6} {'peak MB':>8} {'mean':>8} {'true':>6}")
    for (name, option), r in found.items():
        b = found[base]
        print(f"  {name + ' ' + option:20} {r['cpu']:8.3f} {r['cpu'] / b['cpu']:7.1f} {r['above']:15.0f} {r['above'] / max(b['above'], 1):6.1f} "
              f"{r['peak']:8.0f} {r['size']:8.3f} {r['covered']:6.3f}")


def main(quick: bool, with_stream: bool, turns: int) -> None:
    f, there = 10 if quick else 1, {m: importlib.util.find_spec(m) is not None for m in ("mapie", "torchcp", "crepes")}
    print("not installed, left out:", ", ".join(m for m, ok in there.items() if not ok) or "nothing")
    with tempfile.TemporaryDirectory() as tmp:
        wide, narrow = Path(tmp) / "wide", Path(tmp) / "narrow"
        for folder, k, cal, test in (wide, 1000, 20_000 // f, 50_000 // f), (narrow, 100, 20_000 // f, 2_000):
            folder.mkdir()
            make(folder, "cal", cal, k)
            make(folder, "test", test, k)
        peers = [(m, "aps", wide) for m in ("mapie", "torchcp") if there[m]]
        aps = measure([("ours", "aps", wide), ("kernel", "aps", wide), *peers, ("read", "", wide), ("sort", "", wide)], turns)
        table(f"APS: calibrate on {20_000 // f:,} rows and give sets for {50_000 // f:,}, 1000 classes (mean: set size; true: coverage)", aps, ("ours", "aps"))
        for floor in "read", "sort":
            print(f"  distance to one {floor} of the data: ours {aps['ours', 'aps']['cpu'] / aps[floor, '']['cpu']:.1f}, "
                  f"kernel {aps['kernel', 'aps']['cpu'] / aps[floor, '']['cpu']:.1f}")
        lac = measure([("ours", "lac", wide), *[(m, "lac", wide) for m, *_ in peers]], turns)
        table("LAC, the same", lac, ("ours", "lac"))
        ps = measure([("our_p", "", narrow), *[("crepes_p", "", narrow)] * there["crepes"]], turns)
        table(f"smoothed p-values: {20_000 // f:,} calibration rows, 2,000 rows x 100 classes (mean: all p-values; true: of true classes)", ps, ("our_p", ""))
        if with_stream:
            chunks = [str(10 // f or 1), str(100 // f)]
            many = measure([("stream", c, wide) for c in chunks], 1)
            table("APS in chunks of 10,000 rows x 1000 classes (option: chunks; mean: set size; true: rows)", many, ("stream", chunks[0]))
    sys.path.insert(0, str(HERE))
    import calibration_error
    print(f"\n{calibration_error.table(calibration_error.measure())}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--stream", action="store_true", help="also a million rows, in chunks")
    parser.add_argument("--turns", type=int, default=3, help="how often each item runs")
    parser.add_argument("--item", nargs=3, metavar=("NAME", "OPTION", "FOLDER"), help="used by the program itself")
    args = parser.parse_args()
    if args.item: item(args.item[0], args.item[1], Path(args.item[2]))
    else: main(args.quick, args.stream, args.turns)
