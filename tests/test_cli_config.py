"""`fine-tune-llm config ...` and `doctor` as a shell sees them: the real program, with good input and with bad."""
import json
from pathlib import Path

import pytest
import yaml
from commands import refused, shell

RUN = "data: {path: desk.csv}\ntraining: {epochs: 5}\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "run.prod.yaml").write_text("training: {epochs: 9}\n")
    return tmp_path


def test_show_prints_what_can_be_run(home):
    first = shell("config", "show", home / "run.yaml")
    assert first.returncode == 0 and yaml.safe_load(first.stdout)["training"]["epochs"] == 5
    (home / "again.yaml").write_text(first.stdout)
    assert shell("config", "show", home / "again.yaml").stdout == first.stdout
    changed = shell("config", "show", home / "run.yaml", "trust.alpha=0.2", "--json", "--env", "prod")
    assert json.loads(changed.stdout)["trust"]["alpha"] == 0.2 and json.loads(changed.stdout)["training"]["epochs"] == 9


def test_explain_names_each_source(home):
    done = shell("config", "explain", home / "run.yaml", "trust.alpha=0.2", "--json", FTLLM_TRAINING__SEED="7")
    source = {row["key"]: (row["value"], row["source"]) for row in json.loads(done.stdout)}
    assert source["training.epochs"] == (5, "run.yaml:2") and source["trust.alpha"] == (0.2, "command line")
    assert source["training.seed"] == (7, "FTLLM_TRAINING__SEED") and source["training.warmup"][1] == "default"
    lines = shell("config", "explain", home / "run.yaml").stdout.splitlines()
    assert any(line.split() == ["training.epochs", "5", "run.yaml:2"] for line in lines)


def test_diff_answers_with_its_exit_code(home):
    same = shell("config", "diff", home / "run.yaml", home / "run.yaml")
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "")
    (home / "more.yaml").write_text("extends: run.yaml\ntraining: {epochs: 6}\n")
    other = shell("config", "diff", home / "run.yaml", home / "more.yaml")
    assert (other.returncode, other.stdout) == (1, "training.epochs: 5 -> 6\n")
    assert json.loads(shell("config", "diff", home / "run.yaml", home / "more.yaml", "--json").stdout) == [{"key": "training.epochs", "a": 5, "b": 6}]


def test_schema_is_a_schema():
    done = shell("config", "schema")
    assert done.returncode == 0 and "training" in json.loads(done.stdout)["properties"]


def test_rollback_restores_to_the_letter(home):
    run = home / "run"
    run.mkdir()
    first = b"# mine\r\n" + RUN.encode()
    (run / "config.yaml").write_bytes(first)
    assert shell("config", "rollback", run).stdout.startswith("1 ")
    (run / "config.yaml").write_text("data: {path: other.csv}\n")
    listed = shell("config", "rollback", run).stdout.splitlines()
    assert len(listed) == 2 and listed[1].endswith("now")
    back = shell("config", "rollback", run, "1")
    assert back.returncode == 0 and back.stdout.startswith("now 3 ") and (run / "config.yaml").read_bytes() == first
    refused(shell("config", "rollback", run, "99"), "no version '99'", "choose one of")
    kept = sorted((run / "config").iterdir())[0]
    kept.write_text("data: {path: forged.csv}\n")
    (run / "config.yaml").write_text("data: {path: third.csv}\n")
    refused(shell("config", "rollback", run, "1"), "altered")


@pytest.mark.parametrize("text,words", [
    ("data: {path: a.csv}\ntraining: {epoch: 3}\n", ["training.epoch is no setting", "training.epochs is"]),
    ("data: {path: a.csv}\ntraining: {epochs: 0}\ntrust: {alpha: 2}\n", ["training.epochs = 0", "trust.alpha = 2"]),
    ("data: [", ["not YAML"]), ("", ["holds no settings"]), ("training: {epochs: 3}\n", ["data is missing"]),
    ("version: 99\ndata: {path: a.csv}\n", ["99"]), ("extends: gone.yaml\n", ["gone.yaml", "not there"]),
    ("data: {path: a.csv}\nhub_token: hf_" + "a" * 34 + "\n", ["looks like a secret"])])
def test_bad_files_end_in_one_line(tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    done = shell("config", "show", tmp_path / "run.yaml")
    refused(done, *words)
    assert "hf_aaa" not in done.stderr


def test_bad_arguments(home):
    refused(shell("config", "show", "nowhere.yaml"), "nowhere.yaml")
    refused(shell("config", "show", home), "config.yaml")
    refused(shell("config", "show", home / "run.yaml", "training.epochs"), "changes nothing")
    refused(shell("config", "show", home / "run.yaml", ".".join("x" * 3000) + "=1"))
    refused(shell("config", "show", home / "run.yaml", "--env", "../x"), "cannot be the name")
    refused(shell("config", "show", home / "run.yaml", FTLLM_TRAINING__EPOCHS="many"), "FTLLM_TRAINING__EPOCHS")
    refused(shell("config", "diff", home / "run.yaml"), "Missing argument", code=2)
    refused(shell("config", "shw"), "No such command", code=2)
    refused(shell("config", "rollback", home / "run.yaml"))


def test_doctor_looks_and_refuses(tmp_path):
    done = shell("doctor", "--device", "cpu", "--json", cwd=tmp_path)
    found = {c["name"]: c for c in json.loads(done.stdout)}
    assert {"python", "device", "memory", "disk", "hub"} <= found.keys() and found["hub"]["word"] == "ok"
    assert done.returncode == any(c["word"] == "fail" for c in found.values()) and "Traceback" not in done.stderr
    missing = shell("doctor", "--device", "tpu", cwd=tmp_path)
    assert missing.returncode == 1 and "no device 'tpu'" in missing.stdout and missing.stderr == ""
