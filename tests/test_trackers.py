"""A run copied to MLflow and to W&B, on this machine alone, and read back with their own readers."""
import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from fine_tune_llm.core.errors import ConfigurationError, RunError
from fine_tune_llm.core.runs import Run
from fine_tune_llm.core.trackers import export_events, facts_of, mark_of

pytestmark = pytest.mark.peers
SECRET = "hf_" + "Zq9" * 12


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "No account, no settings of whoever runs this, and no machine but this one."
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    connect = socket.socket.connect
    def near(self: Any, address: Any) -> Any:
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost"), f"reached for {address}"
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", near)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    "Forty steps, of which the last was done twice, an evaluation, a promise; a secret where somebody pasted it."
    run = Run.create(tmp_path / "night shift")
    (run.path / "config.yaml").write_text(f"data: {{path: 'https://ann:letmein@host/x'}}\ntraining: {{learning_rate: 0.003, lora: {{r: 4}}, 'odd (name)': {SECRET}}}\n")
    run.log("run_started", total_steps=40, rows=160, device="cpu", step=0)
    for step in [*range(1, 41), 40]: run.log("step", step=step, loss=1 / step, learning_rate=0.003 * step)
    run.log("evaluated", step=40, nll=0.5, accuracy=0.875, improved=True)
    run.log("run_finished", step=40)
    run.log("covered", step=40, coverage=0.91, promised=0.9, n=500)
    return run


def nowhere(folder: Path) -> bool:
    "Whether a secret stands in any file."
    return not any(s in p.read_bytes() for p in folder.rglob("*") if p.is_file() for s in (SECRET.encode(), b"letmein"))


def test_mlflow_holds_what_the_folder_holds(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed; pip install mlflow-skinny sqlalchemy alembic")
    pytest.importorskip("sqlalchemy", reason="sqlalchemy is not installed; MLflow keeps no file without it")
    from mlflow import MlflowClient
    box = tmp_path / "box"
    key = export_events(run, "mlflow", box)
    client = MlflowClient(f"sqlite:///{box / 'mlflow.db'}")
    copy = client.get_run(key)
    assert copy.info.run_name == "night shift" and copy.info.status == "FINISHED"
    assert copy.info.end_time == round(1000 * run.events("run_finished")[0]["time"]) and copy.info.start_time == round(1000 * run.events()[0]["time"])
    steps = client.get_metric_history(key, "training/loss")
    assert [(m.step, m.value) for m in sorted(steps, key=lambda m: m.step)] == [(s, 1 / s) for s in range(1, 41)]
    assert {m.timestamp for m in steps} == {round(1000 * e["time"]) for e in run.events("step")} - {round(1000 * run.events("step")[39]["time"])} | {round(1000 * run.events("step")[40]["time"])}
    assert copy.data.metrics["validation/accuracy"] == 0.875 and copy.data.metrics["coverage/coverage"] == 0.91 and "validation/improved" not in copy.data.metrics
    assert copy.data.params["training.learning_rate"] == "0.003" and copy.data.params["training.lora.r"] == "4" and copy.data.params["rows"] == "160"
    assert copy.data.params["training.odd _name_"] == "**********" and copy.data.params["data.path"] == "https://**********@host/x"
    assert copy.data.tags["fine_tune_llm.run"] == run.events()[0]["hash"][:16] == mark_of(run) and nowhere(box)

    run.log("run_started", total_steps=41, rows=160, device="cpu", step=40)  # resumed, and under way
    run.log("step", step=41, loss=0.01, learning_rate=0.1)
    client.set_tag(key, "note", "the best one")
    again = export_events(run, "mlflow", box)
    copy = client.get_run(again)
    assert again == key and copy.info.status == "RUNNING" and copy.data.tags["note"] == "the best one" and copy.data.params["total_steps"] == "40"
    assert len(client.get_metric_history(key, "training/loss")) == 41 and len(client.search_runs([copy.info.experiment_id])) == 1


def test_mlflow_takes_many_numbers_and_names_a_server_that_is_not_there(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed; pip install mlflow-skinny sqlalchemy alembic")
    pytest.importorskip("sqlalchemy", reason="sqlalchemy is not installed; MLflow keeps no file without it")
    from mlflow import MlflowClient
    long = Run.create(tmp_path / "long")
    for step in range(1, 1202): long.log("step", step=step, loss=1.0, learning_rate=0.5)  # 2,402 numbers in three requests
    key = export_events(long, "mlflow", tmp_path / "box")
    client = MlflowClient(f"sqlite:///{tmp_path / 'box' / 'mlflow.db'}")
    assert len(client.get_metric_history(key, "training/loss")) == len(client.get_metric_history(key, "training/learning_rate")) == 1201
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:letmein@127.0.0.1:{port}")
    with pytest.raises(RunError, match="mlflow took no copy") as error: export_events(run, "mlflow")
    assert "letmein" not in str(error.value) and run.verify().n == len(run.events())


def test_a_slim_mlflow_without_a_database_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fine_tune_llm.core.trackers as trackers
    real = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: real("json") if name == "mlflow" else None if name == "sqlalchemy" else real(name))
    with pytest.raises(ConfigurationError, match="writes no file") as error: export_events(run, "mlflow", tmp_path / "box")
    assert "sqlalchemy" in error.value.fix and not (tmp_path / "box").exists()


def records(folder: Path) -> list[Any]:
    "Read the one run that W&B has written offline, record by record."
    from wandb.proto.wandb_internal_pb2 import Record
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    raw, at, whole, found = path.read_bytes(), 7, b"", []  # LevelDB's log behind a header of 7 bytes: blocks of 32 KiB, no head of a piece across their end
    assert raw[:4] == b":W&B"
    while at < len(raw):
        if (left := 32768 - at % 32768) < 7: at += left
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        whole, at = whole + raw[at + 7:at + 7 + length], at + 7 + length
        if kind in (1, 4): found, whole = [*found, Record.FromString(whole)], b""  # a whole record, or the last piece of one
    return found


def test_wandb_holds_what_the_folder_holds(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed; pip install wandb")
    box = tmp_path / "box"
    for _ in range(2): key = export_events(run, "wandb", box)  # the second takes the place of the first
    found = records(box)
    told = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    config = {u.key: json.loads(u.value_json) for u in told.config.update}
    assert told.run_id == key == mark_of(run) and told.display_name == "night shift" and told.project == "fine_tune_llm"
    assert config["training.learning_rate"] == 0.003 and config["training.lora.r"] == 4 and config["rows"] == 160 and SECRET not in str(config)
    rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in found if r.WhichOneof("record_type") == "history"]
    assert [(r["_step"], r["training/loss"]) for r in rows] == [(s, 1 / s) for s in range(1, 41)]
    assert rows[-1]["validation/accuracy"] == 0.875 and rows[-1]["coverage/coverage"] == 0.91
    assert rows[4]["_timestamp"] == pytest.approx(run.events("step")[4]["time"], abs=1e-3)  # when it was trained, not when it was copied
    kinds = {r.WhichOneof("record_type") for r in found}
    assert next(r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit") == 0 and not kinds & {"stats", "environment", "output_raw"}
    assert nowhere(box) and str(Path.cwd()).encode() not in b"".join(p.read_bytes() for p in box.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_failed_run_and_one_that_is_open(run: Run, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed; pip install wandb")
    bad = Run.create(tmp_path / "bad")
    bad.log("step", step=1, loss=0.5)
    bad.log("run_failed", error="OSError: gone")
    mine = wandb.init(project="mine", dir=str(tmp_path / "mine"), mode="offline", settings=wandb.Settings(silent=True))
    export_events(bad, "wandb", tmp_path / "box")
    mine.log({"own": 1})
    assert wandb.run is mine  # what somebody does beside it goes on
    mine.finish()
    assert next(r.exit.exit_code for r in records(tmp_path / "box") if r.WhichOneof("record_type") == "exit") == 1
    assert not any("training/loss" in str(r) for r in records(tmp_path / "mine"))


def test_facts_are_flat_and_hold_no_secret(run: Run) -> None:
    facts = facts_of(run)
    assert facts["training.lora.r"] == 4 and facts["device"] == "cpu" and not {"event", "time", "hash", "prev"} & facts.keys() and SECRET not in str(facts)
