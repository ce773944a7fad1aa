"""Each line of a log knows its run, no line holds a secret, nothing that comes from outside makes a line of its own, and the call may be repeated."""
import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fine_tune_llm.core.errors import ConfigurationError
from fine_tune_llm.core.logs import configure_logging, log_as, logs, machine_reads
from fine_tune_llm.core.runs import Run

@pytest.fixture()
def lines() -> Iterator[io.StringIO]:
    "Give a stream, and leave logging as it was."
    logger = logging.getLogger("fine_tune_llm")
    before = logger.level, logger.propagate, logger.handlers[:]
    yield io.StringIO()
    logger.setLevel(before[0])
    logger.propagate, logger.handlers[:] = before[1], before[2]


def test_runs_in_threads_do_not_mix(lines: io.StringIO) -> None:
    log = configure_logging(json=True, stream=lines).getChild("x")
    gate = threading.Barrier(4)
    def work(name: str) -> None:
        with log_as(name):
            gate.wait(20)
            for _ in range(5): log.info("%s at work", name)
    threads = [threading.Thread(target=work, args=(f"run-{i}",)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    told = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert len(told) == 20 and all(t["message"] == f"{t['run']} at work" for t in told)
    with log_as("outer"):
        with log_as("inner"): log.info("x")
        log.info("x")
    log.info("x")
    assert [json.loads(line).get("run") for line in lines.getvalue().splitlines()[-3:]] == ["inner", "outer", None]


@pytest.mark.parametrize("as_json", [True, False])
def test_no_secret_in_any_place_of_a_record(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_json: bool) -> None:
    monkeypatch.setenv("MY_PASSWORD", 'with "marks" in it')
    secret = "hf_" + "Zz9" * 10
    log = configure_logging("DEBUG", as_json, lines)
    run = Run.create(tmp_path / secret)  # as the name of a run
    run.log("step", nested={"a": [secret], secret: 1}, words='with "marks" in it')
    log.info("token %s", secret)
    with log_as(secret): log.warning("x", extra={"fields": {"url": "https://ann:letmein@host"}})
    try: raise ValueError(f"bad {secret}")
    except ValueError: log.exception('with "marks" in it')
    text = lines.getvalue()
    assert len(text.splitlines()) >= 4 and "Zz9" not in text and "marks" not in text and "letmein" not in text and "**********" in text


def test_a_message_cannot_forge_a_line(lines: io.StringIO) -> None:
    log = configure_logging(stream=lines)
    with log_as("a\nb"): log.info("x\r\n03:00:00 error   [night] all is lost")
    log.info("\x1b[2K\u2028gone \u00e9")
    assert len(lines.getvalue().splitlines()) == 2 and lines.getvalue().endswith("\\x1b[2K\\u2028gone \u00e9\n")


def test_the_call_replaces_its_own_handler_and_no_other(lines: io.StringIO) -> None:
    logger, mine = logging.getLogger("fine_tune_llm"), logging.NullHandler()
    logger.addHandler(mine)
    for _ in range(3): configure_logging(json=True, stream=io.StringIO())
    configure_logging(stream=lines).info("once")
    assert len(lines.getvalue().splitlines()) == 1 and mine in logger.handlers and [h.name for h in logger.handlers].count("fine_tune_llm") == 1
    for level in ("LOUD", None, True):
        with pytest.raises(ConfigurationError, match="no log level"): configure_logging(level)  # type: ignore[arg-type]


def test_levels_of_events(lines: io.StringIO, tmp_path: Path) -> None:
    configure_logging("WARNING", json=True, stream=lines)
    run = Run.create(tmp_path / "night")
    for kind, values in (("run_started", {}), ("step", {"step": 1}), ("warning", {"message": "cut"}), ("run_failed", {"error": "gone"})): run.log(kind, **values)
    told = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [(t["level"], t["run"], t["message"]) for t in told] == [("warning", "night", "warning: cut"), ("error", "night", "run_failed: gone")]


def test_nothing_is_printed_unless_asked_for(tmp_path: Path) -> None:
    code = "import sys; from fine_tune_llm.core.runs import Run; Run.create(sys.argv[1]).log('run_failed', error='gone')"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("steps", [0, 3])
def test_a_record_with_odd_fields_harms_nobody(lines: io.StringIO, steps: int, capsys: pytest.CaptureFixture) -> None:
    log = configure_logging(stream=lines, steps=steps)
    for fields in (None, 7, ["event"], {"event": "step"}, {"event": "step", "step": None}, {"event": "run_started", "total_steps": None}, {"event": 3, "x": 0.123456}):
        log.info("told", extra={"fields": fields})
    assert len(lines.getvalue().splitlines()) == 7 and "3: x 0.1235" in lines.getvalue() and capsys.readouterr().err == ""


def test_steps_of_two_runs_are_told_apart(lines: io.StringIO, tmp_path: Path) -> None:
    configure_logging(stream=lines, steps=2, json=True)
    a, b = Run.create(tmp_path / "a"), Run.create(tmp_path / "b")
    a.log("run_started", total_steps=100), b.log("run_started", total_steps=10)
    for step in range(1, 101):
        a.log("step", step=step)
        if step <= 10: b.log("step", step=step)
    told = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [(t["run"], t["fields"]["step"], t["level"]) for t in told if t["fields"]["event"] == "step"] == [
        ("a", 1, "info"), ("b", 1, "info"), ("b", 5, "info"), ("b", 10, "info"), ("a", 50, "info"), ("a", 100, "info")]


def test_logs_for_a_while(lines: io.StringIO) -> None:
    logger = logging.getLogger("fine_tune_llm")
    before = logger.level, logger.propagate, logger.handlers[:]
    with pytest.raises(ValueError), logs("debug", stream=lines) as log:
        log.debug("inside")
        assert not machine_reads()
        with logs(json=True, stream=lines):
            log.info("within")
            assert machine_reads()
        log.debug("inside again")
        raise ValueError
    log.warning("outside")
    assert (logger.level, logger.propagate, logger.handlers) == before and [("{" in x) for x in lines.getvalue().splitlines()] == [False, True, False]
