"""Check, split, tokenise and search for near duplicates in a million generated rows.

    python benchmarks/data_checks.py [--rows 1000000]

Each part runs at a quarter of the rows and at all of them, in a process of its own: the ratio of the two times is 4 for a
linear cost, and 4 times log(n) / log(n/4), about 4.4, for a sort. CPU seconds, one thread; wall time depends on the
neighbours. "Above the rows" is the peak of the resident memory minus what was resident when rows and libraries were loaded
(Linux only). One row in twenty is a copy of another one: as it is, in capitals, with a word more, or with a letter changed.
`template`, run on a tenth of the rows, is the worst case for the search: every row is one of 200 sentences with a number in
it, so that buckets are full, and each row costs at most 64 comparisons.
"""
import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PARTS = ("near duplicates", "check", "check without near duplicates", "split", "tokenise", "near duplicates, template")


def texts(n: int, template: bool = False) -> list[str]:
    "n sentences of 6 to 16 made-up words, one in twenty a copy."
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    if template:
        stems = [" ".join(rng.choices(words, k=10)) for _ in range(200)]
        return [f"{stems[i % 200]} number {rng.randrange(10**8)}" for i in range(n)]
    out = [" ".join(rng.choices(words, k=rng.randint(6, 16))) for _ in range(n)]
    for i in range(n // 20):
        t, at = out[rng.randrange(n)], rng.randrange(30)
        out[rng.randrange(n)] = (t, t.upper() + "!", t + " indeed", t[:at] + "z" + t[at + 1:])[i % 4]
    return out


def resident() -> float:  # MB now
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * resource.getpagesize() / 2**20


def run(part: str, n: int) -> dict:
    "Run one part on n rows, in this process."
    import pandas as pd

    from fine_tune_llm.data.dealing import split_data
    from fine_tune_llm.data.duplicates import families
    from fine_tune_llm.data.report import check_data
    from fine_tune_llm.models.loading import load_model
    from fine_tune_llm.models.scoring import encode
    families(texts(100))  # loads what is loaded at first use
    model = load_model("pocket", device="cpu") if part == "tokenise" else None
    rows = texts(n, "template" in part)
    frame = pd.DataFrame({"text": rows, "label": [f"class {i % 50}" for i in range(n)]})
    before, start, wall = resident(), time.process_time(), time.perf_counter()
    if part.startswith("near"): found = f"{len(set(families(rows))):,} families"
    elif part == "split": found = repr(split_data(rows)).split("\n")[0]
    elif model: found = f"{sum(map(len, encode(model, rows)[0])):,} tokens"
    else: found = check_data(frame, near=None if "without" in part else 0.8).title
    return {"part": part, "rows": n, "cpu_s": time.process_time() - start, "wall_s": time.perf_counter() - wall, "found": found,
            "above_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}


def measure(rows: int = 1_000_000, parts: tuple[str, ...] = PARTS) -> list[dict]:
    "Run each part on a quarter of the rows and on all, each in a fresh process, and print as they come."
    out = []
    print(f"{'part':32}{'rows':>11}{'CPU s':>9}{'rows / CPU s':>14}{'growth':>8}{'MB above the rows':>19}")
    for part in parts:
        most = rows // 10 if "template" in part else rows
        for n in (most // 4, most):
            done = subprocess.run([sys.executable, __file__, "--part", part, "--rows", str(n)], capture_output=True, text=True, check=True)
            out.append(r := json.loads(done.stdout.splitlines()[-1]))
            growth = f"{r['cpu_s'] / out[-2]['cpu_s']:.2f}" if n == most else ""
            print(f"{part:32}{n:>11,}{r['cpu_s']:>9.1f}{n / r['cpu_s']:>14,.0f}{growth:>8}{r['above_mb']:>19,.0f}   {r['found']}", flush=True)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part", choices=PARTS)
    args = parser.parse_args()
    if args.part: print(json.dumps(run(args.part, args.rows)))
    else: measure(args.rows)
