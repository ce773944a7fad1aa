"""The resume contract: whatever a run holds, killed at a random step it ends with the same bytes; and whatever changed is refused by name."""
import random
import shutil
from pathlib import Path

import pytest
import trainings as t

from fine_tune_llm.core.runs import Run

BASE = dict(lora=dict(r=4, lora_dropout=0.1), epochs=2, learning_rate=5e-3, batch_size=4, warmup=0.1)  # 45 rows: 12 steps an epoch, 24 in all, saved every 3
MATRIX = {
    "LoRA dropout": {}, "accumulation": dict(accumulate=2), "DoRA": dict(lora=dict(r=4, lora_dropout=0.1, use_dora=True)),
    "QLoRA NF4": dict(load=dict(quantize="nf4"), kill=(13, 22)), "mid-epoch": dict(kill=(4, 9)), "after evaluation": dict(kill=(13, 16), evaluate_every=3),
    "warm-up": dict(warmup=0.5, kill=(2, 8)), "packing": dict(task="label-words", packing=True), "best by nll": dict(evaluate_every=2, best_by="nll"),
    "cosine": dict(scheduler="cosine"), "bfloat16": dict(load=dict(dtype="bfloat16")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(t.tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_killed_and_resumed_is_the_same_run(base: str, tmp_path: Path, name: str) -> None:
    case = dict(MATRIX[name])
    low, high, load, task = *case.pop("kill", (1, 22)), case.pop("load", {}), case.pop("task", "classification")
    options, whole, half = {**BASE, **case}, tmp_path / "whole", tmp_path / "half"
    victim, at = t.start(base, str(half), options, load=load, task=task), random.Random(name).randint(low, high)
    t.until(victim, lambda: t.steps(half) >= at)
    assert t.kill(victim), "it had ended already"
    seen = Run.attach(half)
    done, saved = t.steps(half), max((e["step"] for e in seen.events("checkpoint_saved")), default=0)
    assert seen.verify() and seen.lives() is False
    assert t.finish(base, str(half), options, resume=True, load=load, task=task) == ""
    assert t.finish(base, str(whole), options, load=load, task=task) == ""
    seen, other = Run.attach(half), Run.attach(whole)
    begun = seen.events("run_started")[-1]["step"]
    assert saved <= begun <= done and seen.state == other.state == "finished" and seen.verify().torn == 0
    assert t.adapter(half) == t.adapter(whole)
    losses = {e["step"]: e["loss"] for e in other.events("step")}
    assert all(e["loss"] == losses[e["step"]] for e in seen.events("step")) and {e["step"] for e in seen.events("step")} == set(losses)


@pytest.fixture(scope="module")
def stopped(base: str, tmp_path_factory) -> Path:
    "A run with two checkpoints whose process was killed."
    out = tmp_path_factory.mktemp("runs") / "stopped"
    process = t.start(base, str(out), BASE)
    t.until(process, lambda: t.steps(out) >= 7)
    t.kill(process)
    return out


REFUSED = {  # what is changed, and how the refusal names it
    "data": (dict(rows=t.weather(9)), "splits: "), "order": (dict(rows=t.weather()[::-1]), "train_order: "),
    "learning rate": (dict(learning_rate=1e-3), "settings.learning_rate: 0.005 -> 0.001"), "accumulation": (dict(accumulate=2), "settings.accumulate: 1 -> 2"),
    "seed": (dict(seed=1), "settings.seed: 0 -> 1"), "lora_alpha": (dict(lora=dict(r=4, lora_dropout=0.1, lora_alpha=64)), "settings.lora.lora_alpha: absent -> 64"),
    "the measure": (dict(evaluate_every=2, best_by="nll"), "settings.best_by: None -> nll"), "rank": (dict(lora=dict(r=8, lora_dropout=0.1)), "settings.lora.r: 4 -> 8"), "batch size": (dict(batch_size=8), "settings.batch_size: 4 -> 8"),
    "epochs": (dict(epochs=3), "settings.epochs: 2 -> 3"), "quantization": (dict(load=dict(quantize="nf4")), "model.quantize: none -> nf4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_changed_run_is_refused_by_name(base: str, stopped: Path, what: str) -> None:
    change = dict(REFUSED[what][0])
    before = (stopped / "events.jsonl").read_bytes()
    error = t.finish(base, str(stopped), {**BASE, **{k: v for k, v in change.items() if k not in ("rows", "load")}}, resume=True,
                     **{k: v for k, v in change.items() if k in ("rows", "load")})
    assert "cannot go on as it began" in error and REFUSED[what][1] in error and (stopped / "events.jsonl").read_bytes() == before
    Path(f"{stopped}.error").unlink()


@pytest.mark.slow
def test_another_template_is_refused(base: str, tmp_path: Path) -> None:
    out, words = tmp_path / "words", dict(task="label-words")
    process = t.start(base, str(out), {**BASE, "lora": dict(r=4)}, **words)
    t.until(process, lambda: t.steps(out) >= 3)
    t.kill(process)
    error = t.finish(base, str(out), {**BASE, "lora": dict(r=4), "template": "text"}, resume=True, **words)
    assert "cannot go on as it began" in error and "data.template: " in error


def test_other_weights_are_refused(stopped: Path, tmp_path: Path) -> None:
    error = t.finish(str(t.tiny_llama(tmp_path / "other", seed=1)), str(stopped), BASE, resume=True)
    assert "model.weights: " in error and "tokenizer" not in error
    Path(f"{stopped}.error").unlink()


def test_a_missing_optimizer_is_named(base: str, stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(stopped, out)
    newest, older = sorted((out / "checkpoints").glob("step-*"), reverse=True)[:2]
    (newest / "optimizer.pt").unlink()
    assert t.finish(base, str(out), BASE, resume=True) == ""
    run = Run.attach(out)
    assert run.events("run_started")[-1]["step"] == int(older.name[5:])
    assert f"checkpoint skipped: {newest.name}: optimizer.pt is missing" in [e["message"] for e in run.events("warning")]
    shutil.rmtree(out)
    shutil.copytree(stopped, out)
    for place in (out / "checkpoints").glob("step-*"): (place / "optimizer.pt").unlink()
    error = t.finish(base, str(out), BASE, resume=True)
    assert "no good checkpoint to resume from" in error and error.count("optimizer.pt is missing") == 2


def test_a_difference_that_is_accepted_is_written_down(base: str, stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(stopped, out)
    assert t.finish(base, str(out), {**BASE, "weight_decay": 0.01, "accept": ["settings.weight_decay"]}, resume=True) == ""
    assert "accepted on resume: settings.weight_decay: 0.0 -> 0.01" in [e["message"] for e in Run.attach(out).events("warning")]
