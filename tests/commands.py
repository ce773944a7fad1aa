"""The command line in processes of its own: the installed program, or a fork of a process that has imported it all, which costs a tenth."""
import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fine_tune_llm

SCRIPT = Path(sys.executable).with_name("fine-tune-llm")
PROGRAM = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-c", "from fine_tune_llm.apps.cli import main; main()"]
WORDS = "morning evening street garden window river letter kitchen market school bridge forest station harbour tower".split()
Done = subprocess.CompletedProcess


def environment(**more: str) -> dict[str, str]:
    "What a child gets: the package where this process found it, and one thread, since there are never more tests than processors."
    path = os.pathsep.join([str(Path(fine_tune_llm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def shell(*args: object, cwd: Path | None = None, text: str = "", **environ: str) -> Done:
    "Run the installed program to its end."
    return subprocess.run([*PROGRAM, *map(str, args)], capture_output=True, text=True, cwd=cwd, input=text, env=environment(**environ))


def start(*args: object, cwd: Path | None = None, **environ: str) -> subprocess.Popen:
    "Start the installed program."
    return subprocess.Popen([*PROGRAM, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment(**environ),
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # tests in the background ignore it, and a child would too


def work(args: list[str], box: str, cwd: str | None, environ: dict[str, str]) -> None:
    "Be the program, with files for its three streams."
    for fd, name, mode in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY | os.O_CREAT), (2, "err", os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(f"{box}/{name}", mode), fd)
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")): setattr(sys, name, open(fd, mode, closefd=False))
    os.environ.update(environ)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if cwd: os.chdir(cwd)
    import torch

    from fine_tune_llm.apps.cli import main
    torch.set_num_threads(1)
    sys.argv = ["fine-tune-llm", *args]
    try: main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Forked:
    "A started command; `poll`, `send_signal` and `end` as of the other."
    def __init__(self, args: list[str], cwd: Path | None, text: str, environ: dict[str, str]):
        import trainings
        self.args, self.box = args, Path(tempfile.mkdtemp())
        (self.box / "in").write_text(text)
        self.process = trainings.start(args, str(self.box), str(cwd) if cwd else None, environ, work=work)

    def poll(self) -> int | None: return self.process.exitcode
    def send_signal(self, number: int) -> None: os.kill(self.process.pid, number)

    def end(self) -> Done:
        self.process.join(120)
        done = Done(self.args, self.process.exitcode, (self.box / "out").read_text(), (self.box / "err").read_text())
        shutil.rmtree(self.box)
        return done


def fork(*args: object, cwd: Path | None = None, text: str = "", **environ: str) -> Done:
    "Run the program to its end, in a fork."
    return Forked([*map(str, args)], cwd, text, environ).end()


class Program:
    "One of the two ways to run the program."
    def __init__(self, forked: bool): self.forked = forked

    def __call__(self, *args: object, **how: Any) -> Done: return fork(*args, **how) if self.forked else shell(*args, **how)

    def start(self, *args: object, until: Any, cwd: Path | None = None, **environ: str) -> Any:
        "Start it, and wait until something holds."
        process: Any = Forked([*map(str, args)], cwd, "", environ) if self.forked else start(*args, cwd=cwd, **environ)
        deadline = time.monotonic() + 120
        while not until():
            assert process.poll() is None and time.monotonic() < deadline, self.end(process).stderr
            time.sleep(0.005)
        return process

    def end(self, process: Any) -> Done:
        "Wait for its end."
        if self.forked: return process.end()
        out, err = process.communicate(timeout=120)
        return Done(process.args, process.returncode, out, err)


def refused(done: Done, *words: str, code: int = 1) -> None:
    "Hold an answer against what a person shall see: one line that says what is wrong, no traceback, no output."
    assert done.returncode == code and done.stdout == "" and "Traceback" not in done.stderr, (done.args, done.stderr)
    if code == 1:
        last = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(last) == 1 and done.stderr.endswith(f"{last[0]}\n") and done.stderr.count("\n") == 1 + sum(" info " in line for line in done.stderr.splitlines()), done.stderr
    for word in words: assert word in done.stderr, done.stderr


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    "Write texts and labels as CSV."
    with path.open("w", newline="") as f: csv.writer(f).writerows([("text", "label"), *rows])
    return path


def weather(words: list[str] = WORDS) -> list[tuple[str, str]]:
    "Texts that one word tells apart."
    return [(f"{a} and {b} in the {w}", w) for w in ("rain", "sun") for i, a in enumerate(words) for b in words[:i]]
