"""A run folder between processes: one writes, another watches, and one of them may die."""
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fine_tune_llm.core.errors import RunError
from fine_tune_llm.core.runs import Run

TRAINER = """
import sys, time
from fine_tune_llm.core.runs import Run
run = Run.attach(sys.argv[1])
run.log("run_started", total_steps=100_000, epochs=1)
for step in range(1, 100_001):
    time.sleep(0.002)
    run.log("step", step=step, loss=1 / step)
    for c in run.pending():
        run.log("command_applied", id=c["id"], command=c["command"], step=step)
        run.log("run_stopped", step=step)
        sys.exit(0)
"""


@pytest.fixture
def training(tmp_path):
    "A run, and the process that trains it."
    run = Run.create(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", TRAINER, str(run.path)])
    end = time.monotonic() + 60
    while len(run.events("step")) < 20:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    yield run, process
    process.kill()
    process.wait()


def test_another_process_obeys(training):
    run, process = training
    assert run.state == "running"
    key = run.stop()
    assert run.wait(timeout=30) == "stopped" and process.wait(30) == 0
    assert [e["id"] for e in run.events("command_applied")] == [key] and run.pending() == []
    assert run.verify().n == len(run.events()) == len(run.events("step")) + 3


def test_a_killed_trainer_leaves_a_readable_run(training):
    run, process = training
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    seen = run.events()
    assert run.verify().n == len(seen) and run.state == "running"  # nobody was left to say otherwise
    with open(run.path / "events.jsonl", "ab") as f: f.write(b'{"event":"step","lo')
    assert run.verify().torn == 19 and len(run.events()) == len(seen)
    Run.attach(run.path).log("run_stopped", step=1)
    kinds = [e["event"] for e in run.events()[len(seen):]]
    assert kinds == ["run_stopped", "warning"] and run.verify().torn == 0 and run.state == "stopped"


def test_commands_of_many_watchers_arrive_whole(tmp_path):
    run = Run.create(tmp_path / "run")
    code = "import sys; from fine_tune_llm.core.runs import Run\nfor i in range(50): Run.attach(sys.argv[1]).command('set', i=i)"
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: subprocess.run([sys.executable, "-c", code, str(run.path)], check=True), range(2)))
    commands = run.commands()
    assert len(commands) == len({c["id"] for c in commands}) == 100 and sorted(c["i"] for c in commands)[-2:] == [49, 49]


def test_readers_read_only_what_is_new(tmp_path, monkeypatch):
    run, watcher = Run.create(tmp_path / "run"), Run.attach(tmp_path / "run")
    for step in range(200): run.log("step", step=step)
    assert len(watcher.events()) == 200
    read, real = [], open
    class Counting:
        def __init__(self, *args): self.file = real(*args)
        def __enter__(self): return self
        def __exit__(self, *_): self.file.close()
        def seek(self, at): self.file.seek(at)
        def read(self):
            read.append(self.file.read())
            return read[-1]
    run.log("step", step=200)
    monkeypatch.setattr("builtins.open", Counting)
    assert len(watcher.events()) == len(watcher.events()) == 201
    monkeypatch.undo()
    assert len(read) == 1 and read[0].count(b"\n") == 1


@pytest.mark.parametrize("line", [1, 7, 12])
def test_every_altered_line_is_named(tmp_path, line):
    run = Run.create(tmp_path / "run")
    for step in range(12): run.log("step", step=step, loss=0.25)
    path = run.path / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace("0.25", "0.24")
    path.write_text("".join(lines))
    with pytest.raises(RunError, match=f"line {line}\\b"): run.verify()


def test_the_panel_is_found_by_its_entry_point(tmp_path):
    run = Run.create(tmp_path / "run")
    panel = run.panel()
    assert type(panel).__name__ == "TrainingPanel" and panel.run == run
    panel.close()
