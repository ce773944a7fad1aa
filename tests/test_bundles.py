"""Bundles of every kind of run: class names, heads that abstain, merged weights; the same probabilities, or a refusal by name."""
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainings as t

import fine_tune_llm as ft
from fine_tune_llm.apps.bundle import Bundle, bundle, load_bundle, merge_bundle
from fine_tune_llm.core.errors import ConfigurationError, InferenceError, ModelError
from fine_tune_llm.models.merging import merge
from fine_tune_llm.training.trainer import finetune

FAST: dict[str, Any] = dict(lora=dict(r=4), epochs=2, learning_rate=2e-2, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> str:
    return str(t.tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data() -> Any:
    return ft.load_data(t.weather(9), sizes=(0.4, 0.2, 0.2, 0.2), near=None)


def made(run: Any, data: Any) -> Bundle:
    cal = ft.TemperatureScaling().fit(run.predict(data.validation))
    probs = cal(run.predict(data.calibration))
    return bundle(run, cal, ft.ConformalClassifier("lac", alpha=0.2).fit(probs), ft.DecisionPolicy(abstain_cost=0.2).fit(probs))


@pytest.mark.parametrize("task, how", [("label-words", dict(template="words", epochs=4, learning_rate=4e-2)), ("classification", dict(loss="gambler", loss_options=dict(payoff=1.8))),
                                       ("classification", dict(lora=dict(method="pissa", r=4)))])
def test_a_bundle_says_the_same_elsewhere(base: str, data: Any, tmp_path: Path, task: str, how: dict[str, Any]) -> None:
    from fine_tune_llm.data.templates import label_words
    if "template" in how: how = {**how, "template": label_words("{text} it is")}
    run = finetune(ft.load_model(base, task=task, device="cpu"), data, out=tmp_path / "run", **{**FAST, **how})
    b = made(run, data)
    opened = load_bundle(b.save(tmp_path / "bundle"))
    told = run.predict(data.test).logits
    assert told.shape == (len(data.test), 2) and np.ptp(told[:, 0]) > 1e-3
    assert np.array_equal(b.score(data.test.texts), told) and np.array_equal(opened.score(data.test.texts), told)
    assert opened(data.test.texts) == b(data.test.texts)
    assert np.array_equal(load_bundle(opened.save(tmp_path / "again")).score(data.test.texts), told)


def test_what_no_bundle_can_hold_is_refused(base: str, data: Any, tmp_path: Path) -> None:
    run = finetune(ft.load_model(base, task="label-words", device="cpu"), data, out=tmp_path / "run", template=lambda row: [(row["text"], False), (" " + row["label"], True)], **{**FAST, "epochs": 1})
    with pytest.raises(ConfigurationError, match="is a program, and a bundle holds none"): made(run, data)
    asked = [dict(prompt=r["text"], completion=" it is " + r["label"]) for r in t.weather(5)]
    free = finetune(ft.load_model(base, task="sft", device="cpu"), asked, out=tmp_path / "free", **{**FAST, "epochs": 1})
    with pytest.raises(InferenceError, match="free answers have no classes"): bundle(free, None, None, None)  # type: ignore[arg-type]


def test_merged_weights_ask_their_certificate(base: str, data: Any, tmp_path: Path) -> None:
    "A merge that moved nothing keeps the promises; one that moved something refuses those of before, here and when the folder is opened."
    run = finetune(ft.load_model(base, device="cpu"), data, out=tmp_path / "run", **FAST)
    b = made(run, data)
    c = merge(run, out=tmp_path / "same", probe=data.test, calibrator=b.cal, sets=b.sets)
    assert c.verdict == "same"
    folder = merge_bundle(b, tmp_path / "same").save(tmp_path / "bundle")
    opened = load_bundle(folder)
    assert not (folder / "adapter").exists() and opened.merged and np.allclose(opened.score(data.test.texts), b.score(data.test.texts), atol=1e-4)
    held = tmp_path / "same" / "certificate.json"
    held.write_text(json.dumps({**json.loads(held.read_text()), "verdict": "recalibrate", "reasons": ["coverage moved"]}))
    with pytest.raises(ModelError, match="TemperatureScaling and ConformalClassifier of the model before the merge: coverage moved"): merge_bundle(b, tmp_path / "same")
    with pytest.raises(ModelError, match="TemperatureScaling and ConformalClassifier of the model before the merge"): load_bundle(folder)
    other = ft.TemperatureScaling().fit(run.predict(data.test))
    with pytest.raises(ModelError, match="before the merge") as told: merge_bundle(b, tmp_path / "same", cal=other)
    assert str(told.value).startswith("ConformalClassifier of")
    held.unlink()
    with pytest.raises(ModelError, match="no certificate"): load_bundle(folder)
