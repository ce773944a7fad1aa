"""A changed file reaches a run that is under way within two steps, through the same commands as everything else."""
import threading
import time

import pytest

from fine_tune_llm.core.runs import Run
from fine_tune_llm.data.loading import load_data
from fine_tune_llm.models.loading import load_model
from fine_tune_llm.training.trainer import finetune

def rows() -> list[dict[str, str]]:
    return [{"text": f"{a} and {b}", "label": "ab"[i % 2]} for i, a in enumerate(["rain", "sun", "wind", "snow"] * 3) for b in "one two three four five six".split()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    "A run whose file is changed by another thread while it works: a halved rate and two settings that must not move, then a slip."
    out = tmp_path_factory.mktemp("live") / "run"
    wrote: list[int] = []

    def steps() -> int:
        return len(Run.attach(out).events("step")) if (out / "events.jsonl").exists() else 0

    def edit() -> None:
        end = time.monotonic() + 120
        for at, text in ((3, "training: {learning_rate: 0.0005, epochs: 99, batch_size: 3}\n"), (8, "training: {learning_rat: 1}\n")):
            while steps() < at and time.monotonic() < end: time.sleep(0.002)
            (out / ".live").write_text(text)
            (out / ".live").replace(out / "live.yaml")
            wrote.append(steps())

    editor = threading.Thread(target=edit)
    editor.start()
    finetune(load_model("pocket", device="cpu", dtype="float32"), load_data(rows()), lora={"r": 2, "lora_dropout": 0.0}, epochs=8, batch_size=8, learning_rate=1e-3,
             scheduler="constant", warmup=0.0, out=out, progress=False, sections={"data": {"path": "memory.csv"}})
    editor.join()
    found = Run.attach(out)
    found.__dict__["wrote"] = wrote
    return found


def test_the_rate_arrives_within_two_steps(run):
    told = run.events("config_reloaded")
    assert [e["asked"] for e in told] == [{"times": 0.5}]
    applied = next(e for e in run.events("command_applied") if e["id"] == told[0]["id"])
    assert applied["learning_rate"] == pytest.approx(5e-4) and applied["before"] == pytest.approx(1e-3)
    wrote = run.__dict__["wrote"][0]  # steps that had been told when the file was in place
    assert wrote <= applied["step"] <= wrote + 2
    rates = {e["step"]: e["learning_rate"] for e in run.events("step")}
    assert rates[applied["step"] - 1] == pytest.approx(1e-3) and rates[applied["step"] + 2] == pytest.approx(5e-4)


def test_what_may_not_change_is_named_once(run):
    fixed, slip = run.events("config_refused")
    assert fixed["fields"] == ["training.epochs", "training.batch_size"]
    assert "learning_rat is no setting" in slip["reason"] and "training.learning_rate is" in slip["reason"]
    assert run.state == "finished" and run.verify().torn == 0 and len(run.commands()) == 1


def test_a_resumed_run_keeps_what_the_file_had_changed(tmp_path, monkeypatch):
    "The file halves the rate at step 5 of two runs; one is stopped at step 9 and goes on: it ends with the same bytes as the other."
    import fine_tune_llm.training.control as control
    look = control.LiveFile.look

    def edited(live: control.LiveFile) -> None:
        n = len(live.run.events("step"))
        if n == 4: (live.run.path / "live.yaml").write_text("training: {evaluate_every: 7, learning_rate: 0.0005}\n")
        if n == 8 and live.run.path.name == "stopped" and not live.run.events("run_stopped"): live.run.stop()
        look(live)

    monkeypatch.setattr(control.LiveFile, "look", edited)
    model, data = load_model("pocket", device="cpu", dtype="float32"), load_data(rows())
    options = dict(lora={"r": 2, "lora_dropout": 0.0}, epochs=3, batch_size=8, learning_rate=1e-3, scheduler="constant", warmup=0.0, progress=False, sections={"data": {"path": "memory.csv"}})
    whole, stopped = finetune(model, data, out=tmp_path / "whole", **options), finetune(model, data, out=tmp_path / "stopped", **options)
    assert stopped.state == "stopped" and stopped.status.step == 9 < whole.status.step
    stopped = finetune(model, data, resume=stopped.path, **options)
    assert stopped.state == "finished"
    rates = [{e["step"]: e["learning_rate"] for e in r.events("step")} for r in (whole, stopped)]
    assert rates[0] == rates[1] and rates[1][whole.status.step] == pytest.approx(5e-4)
    assert len(stopped.events("config_reloaded")) == 1  # the file has not changed since
    assert (whole.path / "adapter/adapter_model.safetensors").read_bytes() == (stopped.path / "adapter/adapter_model.safetensors").read_bytes()
