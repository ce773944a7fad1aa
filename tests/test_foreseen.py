"""What is settled before a run: a preflight that leaves no trace, activations computed twice to the same weights, and what a fingerprint holds of both."""
from pathlib import Path
from typing import Any

import pytest
import trainings as t

import fine_tune_llm as ft
from fine_tune_llm.core.errors import TrainingError
from fine_tune_llm.training.preflight import preflight_report
from fine_tune_llm.training.trainer import finetune

FAST: dict[str, Any] = dict(lora=dict(r=4, lora_dropout=0.1), epochs=1, learning_rate=2e-2, batch_size=8, progress=False)
ASKED = [dict(prompt=r["text"], completion=" it is " + r["label"]) for r in t.weather(6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> str:
    return str(t.tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data() -> Any:
    return ft.load_data(t.weather(8), sizes=(0.42, 0.2, 0.19, 0.19), near=None)


@pytest.mark.parametrize("task", ["classification", "sft"])
def test_activations_computed_twice_give_the_same_run(base: str, data: Any, tmp_path: Path, monkeypatch: Any, task: str) -> None:
    "With dropout, packing and lean layers; and each layer really runs twice in a step."
    from transformers.models.llama.modeling_llama import LlamaMLP
    calls, forward = {False: 0, True: 0}, LlamaMLP.forward
    for twice in (False, True):
        def counted(self: Any, x: Any, twice: bool = twice) -> Any:
            calls[twice] += self.training
            return forward(self, x)
        monkeypatch.setattr(LlamaMLP, "forward", counted)
        model = ft.load_model(base, task=task, device="cpu", checkpointing=twice)
        finetune(model, data if task == "classification" else ASKED, out=tmp_path / str(twice), exact=True, **FAST)
    assert t.adapter(tmp_path / "False") == t.adapter(tmp_path / "True")
    assert calls[True] == 2 * calls[False] > 0


def test_a_preflight_is_written_compared_and_leaves_no_trace(base: str, tmp_path: Path) -> None:
    model = ft.load_model(base, task="sft", device="cpu", checkpointing="auto")  # asks for a preflight by itself
    run = finetune(model, ASKED, out=tmp_path / "auto", exact=True, **FAST)
    names = [e["event"] for e in run.events()]
    assert names[0] == "preflight" and names[-2:] == ["memory_measured", "run_finished"]
    assert run.events("preflight")[0]["steps"] == run.events("run_finished")[0]["step"] and run.events("preflight")[0]["checkpointing"] is False
    report = preflight_report(run)
    assert report.notna().all(axis=None) and 0.5 < report.ratio["memory at most (MB)"] < 2
    plain = finetune(ft.load_model(base, task="sft", device="cpu"), ASKED, out=tmp_path / "plain", exact=True, **FAST)
    assert t.adapter(tmp_path / "auto") == t.adapter(tmp_path / "plain") and not plain.events("preflight")
    opened = finetune(model, ASKED, resume=run.path, exact=True, **FAST)  # still open, and answered by the folder
    assert opened.model and opened.model.checkpointing is False and len(opened.events("preflight")) == 1


def test_another_attention_or_checkpointing_is_refused_by_name(base: str, data: Any, tmp_path: Path) -> None:
    half = finetune(ft.load_model(base, device="cpu", attention="sdpa"), data, out=tmp_path / "half", background=True, **{**FAST, "epochs": 2})
    half.stop()
    assert half.wait() == "stopped"
    before = (half.path / "events.jsonl").read_bytes()
    for change, said in ((dict(attention="eager"), r"model\.attention: sdpa -> eager"), (dict(attention="sdpa", checkpointing=True), r"model\.checkpointing: False -> True")):
        with pytest.raises(TrainingError, match=said) as told: finetune(ft.load_model(base, device="cpu", **change), data, resume=half.path, **{**FAST, "epochs": 2})
        assert "accept=" in told.value.fix and (half.path / "events.jsonl").read_bytes() == before
    whole = finetune(ft.load_model(base, device="cpu", attention="sdpa"), data, resume=half.path, **{**FAST, "epochs": 2})
    assert whole.state == "finished"
