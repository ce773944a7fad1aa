"""Every kind of adapter through `finetune`: trained for three steps, saved, opened again, and the same answers to the bit."""
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainings as t

import fine_tune_llm as ft
from fine_tune_llm.core.errors import ConfigurationError
from fine_tune_llm.models.adapters import load_adapter, save_adapter
from fine_tune_llm.models.scoring import score_texts
from fine_tune_llm.training.tasks import base_module
from fine_tune_llm.training.trainer import finetune, trained_module

KINDS: dict[str, dict[str, Any]] = {
    "lora": {}, "qlora nf4": dict(load=dict(quantize="nf4")), "qlora int8": dict(load=dict(quantize="int8")), "dora": dict(lora=dict(method="dora", r=4)),
    "rslora": dict(lora=dict(method="rslora", r=4)), "pissa": dict(lora=dict(method="pissa", r=4)), "lora+": dict(lora=dict(method="lora+", r=4)),
    "adalora": dict(lora=dict(method="adalora", r=4)), "full": dict(lora=dict(method="full")), "lora bfloat16": dict(load=dict(dtype="bfloat16")),
    "full bfloat16": dict(lora=dict(method="full"), load=dict(dtype="bfloat16")),
}
QUICK = ("lora", "qlora nf4", "pissa", "full", "adalora", "lora bfloat16")
FAST: dict[str, Any] = dict(epochs=1, learning_rate=2e-2, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> str:
    return str(t.tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data() -> Any:
    return ft.load_data(t.weather(8), sizes=(0.42, 0.2, 0.19, 0.19), near=None)


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_a_kind_is_trained_saved_and_opened_again(base: str, data: Any, tmp_path: Path, kind: str) -> None:
    how = dict(KINDS[kind])
    model = ft.load_model(base, device="cpu", **how.pop("load", {}))
    options = {**dict(lora=dict(r=4)), **how, **FAST}
    run = finetune(model, data, out=tmp_path / "run", **options)
    told, texts = run.score(data.test.texts), data.test.texts
    assert run.events("run_finished")[0]["step"] == 3 and not [f for f in (run.path / "adapter").iterdir() if f.suffix not in (".json", ".safetensors")]
    again = finetune(model, data, resume=run.path, **options)
    assert np.array_equal(again.score(texts), told)
    save_adapter(trained_module(run), tmp_path / "copy")  # what a bundle does
    copied = load_adapter(base_module(model, data, run.settings), tmp_path / "copy")
    run.box["module"] = copied
    assert np.array_equal(run.score(texts), told)
    assert np.abs(score_texts(model, base_module(model, data, run.settings), texts) - told).max() > 1e-2


@pytest.mark.parametrize("kind", ["lora+", "pissa", pytest.param("dora", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)])
def test_a_kind_goes_on_to_the_same_bytes(base: str, data: Any, tmp_path: Path, kind: str) -> None:
    model, options = ft.load_model(base, device="cpu"), {**KINDS[kind], **FAST, "epochs": 2}
    whole = finetune(model, data, out=tmp_path / "whole", **options)
    half = finetune(model, data, out=tmp_path / "half", background=True, **options)
    half.stop()
    assert half.wait() == "stopped" and half.events("run_stopped")[0]["step"] < 6
    rest = finetune(model, data, resume=half.path, **options)
    assert weights(rest.path) == weights(whole.path) and rest.events("run_finished")[0]["step"] == 6


def weights(run: Path) -> list[bytes]: return [f.read_bytes() for f in sorted((run / "adapter").glob("*.safetensors"))]


def test_b_learns_faster_and_the_head_as_before(base: str, data: Any) -> None:
    "Each weight once, at the rate of its kind; plain LoRA keeps its two groups, of which checkpoints know the order."
    from fine_tune_llm.models.adapters import add_adapter
    from fine_tune_llm.training.loop import Settings, parameter_groups
    def rates(lora: dict[str, Any]) -> dict[str, float]:
        s = Settings(lora, learning_rate=1e-3)
        module = add_adapter(base_module(ft.load_model(base, device="cpu"), data, s), lora)
        groups = {id(p): g["lr"] for g in parameter_groups(module, s) for p in g["params"]}
        return {n: groups[id(p)] for n, p in module.named_parameters() if p.requires_grad}
    plus, plain, whole = rates(dict(r=2, plus_ratio=4)), rates(dict(r=2)), rates(dict(method="full"))
    assert {("B" if "lora_B" in n else "A" if "lora_A" in n else "head", lr) for n, lr in plus.items()} == {("A", 1e-3), ("B", 4e-3), ("head", 0.02)}
    assert {("head" if "lora_" not in n else "", lr) for n, lr in plain.items()} == {("", 1e-3), ("head", 0.02)}
    assert [n for n, lr in whole.items() if lr == 0.02] == ["score.weight"]


@pytest.mark.parametrize("task", ["classification", "sft"])
def test_adalora_takes_rank_away(base: str, data: Any, tmp_path: Path, task: str) -> None:
    "From 6 to 4 on average, during the run, with the penalty counted once however a step is split."
    import torch
    model, losses = ft.load_model(base, task=task, device="cpu"), {}
    asked = [dict(prompt=r["text"], completion=" it is " + r["label"]) for r in t.weather(6)]
    for accumulate in (1, 4):
        run = finetune(model, data if task == "classification" else asked, lora=dict(method="adalora", r=4, lora_dropout=0.0), out=tmp_path / str(accumulate),
                       accumulate=accumulate, exact=True, **{**FAST, "epochs": 4})
        losses[accumulate] = [e["loss"] for e in run.events("step")]
    assert len(losses[1]) == len(losses[4]) > 8 and np.allclose(losses[1], losses[4], atol=2e-3)
    ranks = [int((p != 0).sum()) for n, p in trained_module(run).named_parameters() if "lora_E" in n]
    whole = [p.numel() for n, p in trained_module(run).named_parameters() if "lora_E" in n]
    assert ranks == whole and sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1 and max(ranks) <= 6
    if task == "sft": assert run.read_json("plan.json")["selective"] and run.read_json("plan.json")["packed"]
    opened = finetune(model, data if task == "classification" else asked, lora=dict(method="adalora", r=4, lora_dropout=0.0), resume=run.path,
                      accumulate=4, exact=True, **{**FAST, "epochs": 4})
    batch = model.tokenizer("morning and street in the rain", return_tensors="pt")
    with torch.no_grad(): assert torch.allclose(trained_module(opened)(**batch).logits, trained_module(run)(**batch).logits, atol=1e-4)


def test_adalora_is_not_resumed(base: str, data: Any, tmp_path: Path) -> None:
    model, options = ft.load_model(base, device="cpu"), {**KINDS["adalora"], **FAST, "epochs": 2}
    half = finetune(model, data, out=tmp_path / "half", background=True, **options)
    half.stop()
    assert half.wait() == "stopped"
    before = (half.path / "events.jsonl").read_bytes()
    with pytest.raises(ConfigurationError, match="a run of AdaLoRA cannot be resumed"): finetune(model, data, resume=half.path, **options)
    with pytest.raises(ConfigurationError, match="leave best_by out"): finetune(model, data, out=tmp_path / "x", best_by="nll", **options)
    assert (half.path / "events.jsonl").read_bytes() == before and not (tmp_path / "x").exists()
