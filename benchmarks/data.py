"""Rows per CPU second for loading, and peak memory, beside plain `datasets` in the same run.

    python benchmarks/data.py --rows 1000000           # generated files, CSV and JSON Lines
    python benchmarks/data.py --rows 0 --megabytes 2000 # one large CSV: memory only

Each measurement runs in a process of its own, one thread, CPU time of that process; the two libraries take turns."""
import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [f"word{i}" for i in range(2000)]


def generate(folder: Path, rows: int) -> None:
    "Write the same rows as CSV (one in ten with quotes and a comma) and as JSON Lines."
    rng = random.Random(0)
    some = [(" ".join(rng.choices(WORDS, k=12)) + (', "as they say"' if i % 10 == 0 else ""), f"label {i % 77}") for i in range(10_000)]
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as c, (folder / "rows.jsonl").open("w", encoding="utf-8") as j:
        out = csv.writer(c, lineterminator="\n")
        out.writerow(["text", "label"])
        for i in range(rows):
            text, label = some[i % len(some)]
            out.writerow([f"{text} {i}", label])
            j.write(json.dumps({"text": f"{text} {i}", "label": label}) + "\n")


def ours(path: Path) -> int:
    from fine_tune_llm.data.files import read_rows
    return len(read_rows(path, progress=False))


def theirs(path: Path) -> int:
    "Load, and map once over all rows as every recipe does."
    import datasets
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        data = datasets.load_dataset("csv" if path.suffix == ".csv" else "json", data_files=str(path), split="train", cache_dir=cache)
        return len(data.map(lambda batch: {"text": [t.strip() for t in batch["text"]]}, batched=True))


def load_only(path: Path) -> int:
    import datasets
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        return len(datasets.load_dataset("csv" if path.suffix == ".csv" else "json", data_files=str(path), split="train", cache_dir=cache))


TASKS = {"ours": ours, "datasets load + map": theirs, "datasets load": load_only}


def warm(task: str) -> None:
    "Import what the task needs, so that the time is that of the rows."
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.csv"
        small.write_text("text,label\na,b\n")
        TASKS[task](small)


def anonymous() -> float:  # MiB
    "Memory that is not a mapped file: what the system cannot take back."
    status = Path("/proc/self/status")
    if not status.exists(): return float("nan")
    return sum(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon")) / 1024


def child(task: str, path: Path) -> None:
    import threading
    warm(task)
    before, start, top, done = anonymous(), time.process_time(), [0.0], threading.Event()
    def watch() -> None:
        while not done.wait(0.02): top[0] = max(top[0], anonymous())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    n = TASKS[task](path)
    seconds = time.process_time() - start
    done.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": n, "seconds": seconds, "peak": peak, "extra": max(top[0], anonymous()) - before}))


def measure(task: str, path: Path) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ARROW_IO_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, "--child", task, str(path)], env=env, capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--rows", type=int, default=1_000_000)
    args.add_argument("--megabytes", type=int, default=0, help="also read one CSV of this size")
    args.add_argument("--repeat", type=int, default=3)
    args.add_argument("--child", nargs=2)
    given = args.parse_args()
    if given.child: return child(given.child[0], Path(given.child[1]))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if given.rows:
            generate(home, given.rows)
            print(f"{given.rows:,} rows; CSV {(home / 'rows.csv').stat().st_size / 1e6:.0f} MB, JSON Lines {(home / 'rows.jsonl').stat().st_size / 1e6:.0f} MB")
            print(f"{'file':12} {'task':22} {'CPU s':>7} {'rows/CPU s':>12} {'peak MiB':>9} {'extra MiB':>10}")
            for path in (home / "rows.csv", home / "rows.jsonl"):
                runs: dict[str, list[dict]] = {t: [] for t in TASKS}
                for _ in range(given.repeat):
                    for task in TASKS: runs[task].append(measure(task, path))
                best = {t: min(r, key=lambda x: x["seconds"]) for t, r in runs.items()}
                for task, b in best.items():
                    print(f"{path.name:12} {task:22} {b['seconds']:7.2f} {b['rows'] / b['seconds']:12,.0f} {b['peak']:9,.0f} {b['extra']:10,.0f}")
                ratio = best["ours"]["seconds"] / best["datasets load + map"]["seconds"]
                print(f"{path.name:12} ours / datasets load + map = {ratio:.2f} (at most 1.5); / load alone = {best['ours']['seconds'] / best['datasets load']['seconds']:.2f}")
        if given.megabytes:
            generate(home, 100_000)
            header, _, body = (home / "rows.csv").read_bytes().partition(b"\n")
            with (home / "large.csv").open("wb") as out:
                out.write(header + b"\n")
                while out.tell() < given.megabytes * 10**6: out.write(body)
            b = measure("ours", home / "large.csv")
            print(f"{given.megabytes:,} MB: {b['rows']:,} rows, {b['seconds']:.1f} CPU s, {b['extra']:,.0f} MiB beyond the start that are no mapped file, peak with mapped pages {b['peak']:,.0f} MiB")


if __name__ == "__main__": main()
