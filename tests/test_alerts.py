"""Each rule speaks about a run that deserves it and is silent about one that does not; an address gets what was said, once."""
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, hypergeom

from fine_tune_llm.core.alerts import (
    RULES,
    calibration_drift,
    check_alerts,
    disk_full,
    divergence,
    low_coverage,
    no_heartbeat,
    short_of,
    tail,
    tell_alerts,
)
from fine_tune_llm.core.locks import occupied
from fine_tune_llm.core.runs import Run

def run_with(folder: Path, *events: tuple[str, dict]) -> Run:
    run = Run.create(folder / "run")
    run.log("run_started", total_steps=100)
    for kind, values in events: run.log(kind, **values)
    return run


def steps(losses: list[float]) -> list[tuple[str, dict]]: return [("step", {"step": i, "loss": v}) for i, v in enumerate(losses, 1)]


@pytest.mark.parametrize("rule,deserves,does_not", [
    (divergence, steps([1 - i / 50 for i in range(40)] + [3.0] * 20), steps([1 - i / 80 + 0.3 * (i % 3) for i in range(60)])),
    (divergence, [("run_failed", {"error": "TrainingError: the loss is nan at step 9"})], [("run_failed", {"error": "OSError: no space left"})]),
    (divergence, steps([0.1] * 30 + [5.0] * 25), steps([0.1] * 30 + [5.0] * 5 + [0.1] * 25)),  # a jump that heals is none
    (calibration_drift, [("evaluated", {"step": 1, "ece": 0.02}), ("evaluated", {"step": 2, "ece": 0.09})], [("evaluated", {"step": 1, "ece": 0.09}), ("evaluated", {"step": 2, "ece": 0.06})]),
    (low_coverage, [("covered", {"coverage": 0.84, "promised": 0.9, "n": 1000})], [("covered", {"coverage": 0.84, "promised": 0.9, "n": 20})]),
], ids=["rises", "no number", "stays up", "drift", "coverage"])
def test_a_rule_knows_which_run_deserves_it(tmp_path, rule, deserves, does_not):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert rule(run_with(tmp_path / "a", *deserves), 0.0) and rule(run_with(tmp_path / "b", *does_not), 0.0) is None


def test_heartbeat_knows_the_living_from_the_dead(tmp_path):
    run = run_with(tmp_path, *steps([1.0, 1.0]))
    last = run.events()[-1]["time"]
    with occupied(run.path):
        assert no_heartbeat(run, last + 30) is None and "no event" in str(no_heartbeat(run, last + 61))
    assert no_heartbeat(run, last + 1) == (2, "the trainer is dead")  # its lock is free, and it never said goodbye
    run.log("run_finished", step=2, seconds=1.0)
    assert no_heartbeat(run, last + 1e6) is None


def test_disk(tmp_path):
    run = run_with(tmp_path)
    assert disk_full(run, 0.0, least=1e18) and disk_full(run, 0.0, least=1.0) is None


@pytest.mark.parametrize("n,p", [(1, 0.5), (50, 0.9), (3000, 0.95)])
def test_the_tail_is_the_binomial_one(n, p):
    for k in {0, n // 2, round(0.88 * n), n}: assert tail(k, n, p) == pytest.approx(binom.cdf(k, n, p), rel=1e-9, abs=1e-300)


def test_false_alarms_of_coverage_are_rare():
    "A promise that is kept exactly is doubted with a probability below one in a hundred, whatever n."
    for n in (10, 100, 1000):
        assert sum(binom.pmf(k, n, 0.9) for k in range(n + 1) if tail(k, n, 0.9) < 0.01) < 0.01


@pytest.mark.parametrize("n,k,m", [(1, 1, 1), (25, 24, 20), (50, 46, 5000), (500, 451, 40), (9, 10, 30)])
def test_the_law_of_both_draws(n, k, m):
    "The first k + h of n + m exchangeable scores hold at least k of calibration; a threshold beyond them covers everything."
    for h in {0, m // 2, round(0.9 * m), m}:
        assert short_of(h, m, n, k) == pytest.approx(hypergeom.sf(k - 1, n + m, n, k + h) if k <= n else float(h == m), rel=1e-7, abs=1e-300)


def test_a_promise_on_few_rows_is_doubted_as_rarely_as_it_says(tmp_path):
    "Fifty calibration rows, two thousand new ones, drawn again and again from one law; the binomial law alone would raise an alert in every third."
    rng = np.random.default_rng(0)
    scores = np.sort(rng.random((4000, 50)))[:, 45]  # rank 46 of 50: 0.9 is promised
    hits = rng.binomial(2000, scores)
    values, times = np.unique(hits, return_counts=True)
    both, alone = (sum(t for h, t in zip(values.tolist(), times) if law(h) < 0.01) / 4000 for law in (lambda h: short_of(h, 2000, 50, 46), lambda h: tail(h, 2000, 0.9)))
    assert both < 0.01 + 3 * np.sqrt(0.01 * 0.99 / 4000) and alone > 0.2
    kept = dict(promised=0.9, n=2000, calibration_rows=50, rank=46, step=1)
    for folder, share, told in (("a", 0.84, False), ("b", 0.6, True)):
        assert bool(low_coverage(run_with(make(tmp_path / folder), ("covered", {"coverage": share, **kept})), 0.0)) is told


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_an_address_hears_each_alert_once(tmp_path):
    heard: list[dict] = []

    class Ear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None: pass

    server = HTTPServer(("127.0.0.1", 0), Ear)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        run = run_with(tmp_path, *steps([0.1] * 30 + [5.0] * 30))
        told = tell_alerts(run, (), f"http://127.0.0.1:{server.server_port}/", (divergence,))
        assert tell_alerts(run, told, f"http://127.0.0.1:{server.server_port}/", (divergence,)) == told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert heard == [{"rule": "divergence", "run": "run", "step": 60, "text": "the loss rose from 0.1 to 5"}]


def test_a_rule_of_ones_own_needs_no_class(tmp_path):
    run = run_with(tmp_path)
    def always(run: Run, now: float) -> tuple[int, str]: return 0, "hello"
    assert [str(a) for a in check_alerts(run, [*RULES[:1], always])] == ["run, step 0: hello (always)"]
