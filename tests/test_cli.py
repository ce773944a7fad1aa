"""The command line around its commands: logs in two forms, bars in terminals alone, watching, help without heavy modules, and no traceback."""
import io
import json
import logging
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import PROGRAM, environment, refused, shell, start

from fine_tune_llm.apps import cli
from fine_tune_llm.apps.model_cli import bars, beside_bars
from fine_tune_llm.core.errors import TrainingError
from fine_tune_llm.core.logs import logs, machine_reads
from fine_tune_llm.core.runs import Run, Status

def under_way(folder: Path, *, lock: bool = False) -> Run:
    run = Run.create(folder)
    run.log("run_started", total_steps=40, epochs=2)
    run.log("step", step=10, epoch=0.5, loss=1.25, eta_s=90)
    if lock: (folder / "trainer.lock").touch()  # nobody holds it
    return run


def test_ctrl_c_leaves_a_watch_and_not_the_run(tmp_path):
    run = under_way(tmp_path / "run")
    process = start("watch", run.path)
    assert process.stdout.readline() == "running, step 10 of 40 (25 %), epoch 1 of 2, 2 min left, loss 1.250\n"  # a whole line, since nobody can redraw it
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err and run.state == "running" and not run.commands()


def test_a_dead_trainer_ends_a_watch(tmp_path):
    done = shell("watch", under_way(tmp_path / "run", lock=True).path)
    assert done.returncode == 1 and "(no_heartbeat)" in done.stderr and done.stdout.startswith("running, step 10")


def test_a_file_gets_a_line_for_each_tenth(capsys):
    show = cli.by_tenths()
    for step in range(0, 101): show(Status("running", step, 100, step))
    show(Status("stopping", 100, 100, 100))
    assert len(capsys.readouterr().out.splitlines()) == 12
    show = cli.redrawn()
    for state in ("running", "stopped"): show(Status(state, 1))
    assert capsys.readouterr().out == "\rrunning, step 1\rstopped, step 1"


class Terminal(io.StringIO):
    def isatty(self) -> bool: return True


def test_a_bar_is_for_a_terminal_and_lines_go_above_it(monkeypatch):
    from tqdm import tqdm
    for stream, as_json, shown in ((Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with logs(json=as_json) as log, beside_bars():
            assert bars() is shown and machine_reads() is as_json
            with tqdm(total=2, file=stream, disable=not shown) as bar:
                bar.update()
                log.info("half way")
        text = stream.getvalue()
        assert ("%|" in text) is shown and text.count("half way") == 1 and "half way\n" in text.replace('"}', "")
        if shown: assert "\r" in text[:text.index("half way")] and not text[:text.index("half way")].endswith("s/it]")  # the bar made room


def test_the_harvest_shows_a_bar_or_lines(monkeypatch, capsys):
    from fine_tune_llm.apps.pipeline import library_told
    said: list[str] = []
    for as_bar in (True, False):
        show = library_told(said.append, as_bar)
        show("numpy", 1, 2), show("torch", 2, 2)
    assert said == ["data: docstrings of numpy, 1 of 2", "data: docstrings of torch, 2 of 2"] and "harvesting docstrings" in capsys.readouterr().err


def test_errors_as_lines_and_as_json(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {path: a.csv, lable: label}\n")
    for command in (["config", "show"], ["run"], ["train"]): refused(shell(*command, "run.yaml", cwd=tmp_path), "data.lable is no setting", "data.label is")
    for done in (shell("--log-format", "json", "config", "show", "run.yaml", cwd=tmp_path), shell("config", "show", "run.yaml", cwd=tmp_path, FTLLM_LOG_FORMAT="JSON")):
        told = json.loads(done.stderr)
        assert done.returncode == 1 and done.stdout == "" and told["level"] == "error" and told["message"].startswith("data.lable is no setting")
    assert shell("doctor", FTLLM_LOG_LEVEL="loud").returncode == 2


def ended(monkeypatch, capsys, error: BaseException, as_json: bool) -> tuple[int, str]:
    "What `main` makes of an error that no command caught."
    def app(obj: dict) -> None:
        obj["json"] = as_json
        raise error
    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as e: cli.main()
    return int(e.value.code), capsys.readouterr().err


@pytest.mark.parametrize("error,code,level", [(TrainingError("token hf_" + "Zq9" * 12), 1, "error"), (OSError(28, "No space left on device", "x"), 1, "error"),
                                              (KeyboardInterrupt(), 130, "warning"), (ValueError("hf_" + "Zq9" * 12), 1, "critical")], ids=lambda v: type(v).__name__)
def test_the_last_words(monkeypatch, capsys, error, code, level):
    found, line = ended(monkeypatch, capsys, error, as_json=True)
    assert found == code and json.loads(line)["level"] == level and "Zq9" not in line and line.count("\n") == 1
    if level == "critical":
        assert "Traceback" in json.loads(line)["error"]
        with pytest.raises(ValueError): ended(monkeypatch, capsys, error, as_json=False)  # a mistake of ours keeps its traceback
    else:
        found, line = ended(monkeypatch, capsys, error, as_json=False)
        assert found == code and line.count("\n") == 1 and "Zq9" not in line and line.startswith("stopped" if code == 130 else "error: ")


def test_a_command_leaves_logging_as_it_was_and_tells_a_failure_once(monkeypatch, capsys, tmp_path):
    logger, runs = logging.getLogger("fine_tune_llm"), logging.getLogger("fine_tune_llm.core.runs")
    before = logger.level, logger.propagate, logger.handlers[:], runs.filters[:]
    def fail(*args: object, **how: object) -> None:
        Run.create(tmp_path / "run").log("run_failed", error="TrainingError: the loss is nan at step 3")
        raise TrainingError("the loss is nan at step 3")
    monkeypatch.setattr(cli, "chosen_config", lambda *args: SimpleNamespace(model=SimpleNamespace(task="classification")))
    monkeypatch.setattr(cli, "run_and_show", fail)
    for options, lines in ((), 1), (("--log-format", "json"), 2):  # a program finds it under the run as well
        monkeypatch.setattr(sys, "argv", ["fine-tune-llm", *options, "run", "x.yaml"])
        with pytest.raises(SystemExit) as e: cli.main()
        assert e.value.code == 1 and sum("the loss is nan" in line for line in capsys.readouterr().err.splitlines()) == lines
        shutil.rmtree(tmp_path / "run")
    assert (logger.level, logger.propagate, logger.handlers, runs.filters) == before


def commands() -> list[tuple[str, ...]]:
    "Every command of the program, as its own tree lists them."
    import typer
    def walk(group, above): return [found for name, c in group.commands.items() for found in (walk(c, (*above, name)) if hasattr(c, "commands") else [(*above, name)])]
    return walk(typer.main.get_command(cli.app), ())


def test_every_command_has_help_and_none_loads_a_model_library_for_it():
    names = commands()
    assert len(names) >= 19 and {("config", "show"), ("run",), ("push",), ("doctor",)} <= set(names)
    code = ("import sys, json\nfrom fine_tune_llm.apps.cli import main\nfor name in json.loads(sys.argv.pop()):\n    sys.argv[1:] = [*name, '--help']\n    try: main()\n"
            "    except SystemExit as e: assert not e.code\nassert not {'torch', 'transformers', 'numpy', 'pandas', 'scipy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(names)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and done.stdout.count("Usage: ") == len(names) and done.stderr == "", done.stderr
    top = shell("--help")
    assert top.returncode == 0 and "Exit codes: 0 done" in top.stdout and all(name[0] in top.stdout for name in names)


def test_the_version_is_that_of_the_package():
    import fine_tune_llm
    done = shell("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{fine_tune_llm.__version__}\n", "")


def test_each_command_of_the_table_is_tested_through_the_program():
    "A new command comes with tests in these files, by name."
    text = "".join(p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.glob("test_cli*.py")))
    for name in commands(): assert all(f'"{part}"' in text for part in name), name


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {path: a.csv}\n")
    done = subprocess.run(f"{shlex.join(PROGRAM)} config explain {tmp_path / 'run.yaml'} | head -1", shell=True, capture_output=True, text=True, env=environment())
    assert "Traceback" not in done.stderr and done.stdout.count("\n") == 1
