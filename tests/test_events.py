"""Events are heard once and in order, from this process and from another; the small table agrees with a count by hand; trackers get what the folder holds."""
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tune_llm.core.errors import ConfigurationError, RunError
from fine_tune_llm.core.events import (
    COLUMNS,
    find_runs,
    follow_events,
    replay_events,
    subscribe,
    summarize_runs,
    work_of,
)
from fine_tune_llm.core.runs import Run
from fine_tune_llm.core.trackers import curve_points, export_events

def told(folder: Path, *events: tuple[str, dict[str, Any]]) -> Run:
    run = Run.create(folder)
    for kind, values in events: run.log(kind, **values)
    return run


def test_every_event_is_heard_once_while_another_thread_writes(tmp_path: Path) -> None:
    run, heard = told(tmp_path / "run", ("run_started", {"total_steps": 200})), []
    with subscribe(run, heard.append, kinds=["step"], pause=0.001) as ear:
        def write() -> None:
            for i in range(200): run.log("step", step=i)
            run.log("run_finished", step=200)
        thread = threading.Thread(target=write)
        thread.start()
        assert ear.wait(30)
        thread.join()
    assert [e["step"] for e in heard] == list(range(200))


def test_what_came_before_is_left_out_and_what_comes_after_the_call_is_not(tmp_path: Path) -> None:
    for i in range(20):
        run, heard = told(tmp_path / str(i), ("run_started", {})), []
        ear = subscribe(run, heard.append, pause=0.001)
        run.log("step", step=1)  # at once: the thread may not have looked yet
        run.log("run_finished", step=1)
        assert ear.wait(20) and [e["event"] for e in heard] == ["step", "run_finished"]


def test_another_process_follows(tmp_path: Path) -> None:
    run = told(tmp_path / "run", ("run_started", {}))
    code = "import sys; from fine_tune_llm.core.events import follow_events\nfor e in follow_events(sys.argv[1], pause=0.01): print(e['event'], flush=True)"
    other = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "run_started\n"
    run.log("step", step=1)
    assert other.stdout.readline() == "step\n"
    run.log("run_stopped", step=1)
    assert other.communicate(timeout=30)[0] == "run_stopped\n" and other.returncode == 0


def test_a_dead_trainer_ends_what_follows_it(tmp_path: Path) -> None:
    run = told(tmp_path / "run", ("run_started", {}))
    (run.path / "trainer.lock").touch()  # nobody holds it
    assert [e["event"] for e in follow_events(run)] == ["run_started"]


def test_an_altered_run_is_not_replayed(tmp_path: Path) -> None:
    run = told(tmp_path / "run", ("step", {"step": 1, "loss": 0.5}), ("step", {"step": 2, "loss": 0.25}))
    assert list(replay_events(run)) == run.events()
    log = run.path / "events.jsonl"
    log.write_text(log.read_text().replace("0.5", "0.4"))
    with pytest.raises(RunError, match="altered"): next(replay_events(run.path))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 100), st.booleans(), st.floats(0, 1e5)), max_size=6))
def test_work_is_what_was_done_between_starts_and_last_words(sittings: list[tuple[int, float, bool, float]]) -> None:
    "Sittings of some steps, each so many seconds long, ended with a word or by a kill, with a night in between and a resume one step earlier."
    events, now, at, seconds, steps = list[dict[str, Any]](), 0.0, 0, 0.0, 0
    for n, pace, ends, night in sittings:
        events.append({"event": "run_started", "time": now, "step": at, "rows": 8})
        for _ in range(n):
            now, at = now + pace, at + 1
            events.append({"event": "step", "time": now, "step": at, "epoch": at / 4})
        seconds, steps = seconds + n * pace, steps + n
        if ends: events.append({"event": "run_stopped", "time": now, "step": at})
        now, at = now + night, at - 1
        events.append({"event": "warning", "time": now, "message": "accepted on resume"})
    work = work_of(events)
    assert len(work) == len(events) and sum(w[0] for w in work) == pytest.approx(seconds, abs=1e-6)
    assert sum(w[1] for w in work) == steps and sum(w[2] for w in work) == pytest.approx(2 * steps)  # 8 rows in 4 steps: 2 for each


def test_the_table_agrees_with_a_count_by_hand(tmp_path: Path) -> None:
    told(tmp_path / "a", ("run_started", {"rows": 40, "step": 0}), *(("step", {"step": s, "epoch": s / 10, "loss": 1 / s, "learning_rate": 0.1 * s}) for s in (5, 10)),
         ("evaluated", {"step": 5, "nll": 0.7, "ece": 0.01, "accuracy": 0.9}), ("evaluated", {"step": 10, "nll": 0.8, "ece": 0.02, "accuracy": 0.8}), ("run_finished", {"step": 10}))
    told(tmp_path / "deep" / "b", ("warning", {"message": "x"}))
    table = summarize_runs(tmp_path)
    assert tuple(table.columns) == COLUMNS and list(table.run) == ["a", "deep/b"] == list(find_runs(tmp_path))
    a, b = table.iloc[0], table.iloc[1]
    assert (a.state, a.steps, a.rows, a.loss, a.nll, a.ece, a.accuracy, a.learning_rate, a.evaluations) == ("finished", 10, 40, 0.1, 0.7, 0.01, 0.9, 1.0, 2)
    assert (b.state, b.steps, b.warnings) == ("created", 0, 1) and pd.isna(b.nll)
    days = summarize_runs(tmp_path, per="day")
    assert days.steps.sum() == 10 and days.rows.sum() == 40 and days.nll.min() == 0.7
    assert summarize_runs(tmp_path, per="run and day").steps.sum() == 10


def test_a_point_for_each_step_the_later_one_where_a_step_was_done_twice(tmp_path: Path) -> None:
    run = told(tmp_path / "run", ("step", {"step": 1, "loss": 0.9}), ("step", {"step": 2, "loss": 0.8}), ("run_started", {"step": 1}), ("step", {"step": 2, "loss": 0.7, "note": "x", "flag": True}),
               ("step", {"step": 3, "loss": float("inf")}), ("preflight", {"peak_bytes": 5}))
    assert [(p.name, p.step, p.value) for p in curve_points(run.events())] == [("training/loss", 1, 0.9), ("training/loss", 2, 0.7)]


@pytest.mark.parametrize("tool", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_by_name(tmp_path: Path, tool: str) -> None:
    if find_spec(tool): pytest.skip(f"{tool} is installed here")
    with pytest.raises(ConfigurationError, match=f"{tool} is not installed") as error: export_events(tmp_path / "not read", to=tool)
    assert error.value.fix == f"pip install {tool}"


def test_tensorboard_goes_into_the_run_and_leaves_it_a_run(tmp_path: Path) -> None:
    run = told(tmp_path / "run", ("step", {"step": 1, "loss": 0.5}))
    place = Path(export_events(run.path))
    assert place == run.path / "tensorboard" and len(list(place.iterdir())) == 1 and run.verify().n == 1
