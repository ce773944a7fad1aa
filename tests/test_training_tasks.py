"""Tasks, measures, ends and failures of a run, on a model of 0.15 million weights."""
import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import fine_tune_llm as ft
from fine_tune_llm.core.config import TrainingSection
from fine_tune_llm.core.errors import ConfigurationError, DataError, TrainingError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.core.runs import Run
from fine_tune_llm.training.checkpoints import damage
from fine_tune_llm.training.class_losses import CLASS_LOSSES
from fine_tune_llm.training.corpus import sft_data
from fine_tune_llm.training.evaluation import Tally, class_figures, evaluate_tokens, tally
from fine_tune_llm.training.loop import MEASURES, Settings, schedule_options, training_arguments
from fine_tune_llm.training.tasks import FIGURES
from fine_tune_llm.training.trainer import finetune, trained_module
from fine_tune_llm.uncertainty.metrics import aurc, brier, coverage_at_risk, ece, nll
from fine_tune_llm.uncertainty.predictions import Predictions

WORDS = "morning evening street garden window river letter kitchen market school bridge forest".split()
ROWS = [dict(text=f"{a} and {b} in the {w}", label=w) for w in ("rain", "sun") for i, a in enumerate(WORDS) for b in WORDS[i + 1:i + 6]]
NOISY = [dict(r, label=r["label"] if i % 3 else {"rain": "sun", "sun": "rain"}[r["label"]]) for i, r in enumerate(ROWS)]  # a third is wrong: it gets worse again
ASKED = [dict(prompt=f"What about the {a}?", completion=f"The {a} is beside the {b}.") for a, b in zip(WORDS, WORDS[1:])]
FAST = dict(lora=dict(r=4), learning_rate=2e-2, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny Llama with the tokenizer of pocket."
    place = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128,
                         bos_token_id=1, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(place)
    ft.load_model("pocket").tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def tiny(folder): return {task: ft.load_model(folder, task=task, device="cpu") for task in ("classification", "label-words", "sft")}
@pytest.fixture(scope="module")
def data(): return ft.load_data(ROWS, sizes=(0.5, 0.2, 0.15, 0.15))
@pytest.fixture(scope="module")
def noisy(): return ft.load_data(NOISY, sizes=(0.5, 0.2, 0.15, 0.15))


def adapter(run): return load_file(run.path / "adapter" / "adapter_model.safetensors")
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- measures, the best evaluation, and an early end

def one_of(names, kept):
    "All names, but only one of them in a plain run of the tests."
    return [pytest.param(n, marks=() if n == kept else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", one_of(FIGURES["classification"], "nll"))
def test_any_measure_can_choose_the_adapter(tiny, noisy, tmp_path, name):
    how = dict(epochs=3, evaluate_every=2, best_by=name, target_risk=0.3, **FAST)
    run = finetune(tiny["classification"], noisy, out=tmp_path / "run", **how)
    looks, end = run.events("evaluated"), run.events("run_finished")[0]
    best = max if MEASURES[name] > 0 else min
    assert end["best_value"] == best(e[name] for e in looks) and [e["step"] for e in looks if e["best"]][-1] == end["best_step"] < end["step"]
    preds = run.predict(noisy.validation)  # the adapter is that of the best step, which is not the last
    again = dict(nll=nll, brier=brier, selective_risk=aurc, ece=lambda p: ece(p, n_boot=0), coverage_at_risk=lambda p: coverage_at_risk(p, 0.3, n_boot=0), accuracy=ft.accuracy)[name](preds)
    assert again.value == pytest.approx(end["best_value"], abs=1e-5)
    opened = finetune(tiny["classification"], noisy, resume=run.path, **how)
    np.testing.assert_allclose(opened.score(noisy.validation.texts), preds.logits, atol=1e-5)


def test_patience_ends_a_run_that_gets_worse(tiny, data, tmp_path):
    run = finetune(tiny["classification"], data, **{**FAST, "learning_rate": 2.0}, epochs=9, evaluate_every=1, best_by="nll", patience=2, out=tmp_path / "run")
    looks, end = [e["nll"] for e in run.events("evaluated")], run.events("run_finished")[0]
    first = next(k for k in range(2, len(looks)) if min(looks[k - 1:k + 1]) >= min(looks[:k - 1]))  # the definition, by hand
    assert len(looks) == first + 1 == end["step"] < run.events("run_started")[0]["total_steps"]
    assert run.state == "finished" and end["reason"] == "2 evaluations without a better nll"


@pytest.mark.slow  # the short form of it: test_free_answers_are_learned_and_resumed_to_the_bit
def test_a_stop_after_the_best_evaluation_changes_nothing(tiny, noisy, tmp_path):
    how, stop = dict(epochs=4, evaluate_every=2, best_by="brier", **FAST), 9
    whole = finetune(tiny["classification"], noisy, out=tmp_path / "whole", **how)
    half = finetune(tiny["classification"], noisy, out=tmp_path / "half", background=True, **how)
    while half.state in ("created", "running") and not any(e["step"] >= stop for e in half.events("step")): half.box["thread"].join(0.002)
    half.stop()
    assert half.wait() == "stopped" and whole.events("run_finished")[0]["best_step"] < stop <= half.events("run_stopped")[0]["step"]
    rest = finetune(tiny["classification"], noisy, resume=half.path, **how)
    assert rest.events("run_finished")[-1]["best_step"] == whole.events("run_finished")[0]["best_step"] and same(adapter(whole), adapter(rest))


def test_the_last_step_is_evaluated_and_epochs_are_the_default(tiny, data, tmp_path):
    run = finetune(tiny["classification"], data, epochs=2, out=tmp_path / "a", **FAST)
    total = run.events("run_started")[0]["total_steps"]
    assert [e["step"] for e in run.events("evaluated")] == [total // 2, total] and "best" not in run.events("evaluated")[0]
    odd = finetune(tiny["classification"], data, epochs=1, evaluate_every=5, out=tmp_path / "b", **FAST)
    assert [e["step"] for e in odd.events("evaluated")] == [5, total // 2]


def test_sums_equal_the_metrics_of_all_rows_at_once():
    rng = np.random.default_rng(0)
    z, y = rng.normal(0, 3, (501, 7)).astype(np.float32), rng.integers(0, 7, 501)
    preds = Predictions(np.array([*map(str, range(501))]), Labels(tuple("abcdefg")), logits=z, y=y)
    for size in (1, 7, 100, 501):
        t = Tally()
        for i in range(0, 501, size): t = t.update(z[i:i + size], y[i:i + size])
        found = class_figures(t, 0.6)
        for name, metric in (("nll", nll), ("brier", brier), ("selective_risk", aurc), ("accuracy", ft.accuracy)): assert found[name] == pytest.approx(metric(preds).value, rel=1e-5)
        assert found["ece"] == pytest.approx(ece(preds, n_boot=0).value, rel=1e-5)
        assert found["coverage_at_risk"] == coverage_at_risk(preds, 0.6, n_boot=0).value


def test_an_evaluation_never_holds_the_logits():
    rows, classes, t = 4000, 1000, Tally()
    rng = np.random.default_rng(0)
    tracemalloc.start()
    for _ in range(rows // 50): t = t.update(rng.normal(size=(50, classes)), rng.integers(0, classes, 50))
    class_figures(t, n_boot=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert t.n == rows and peak < rows * classes * 8 / 8  # an eighth of what all logits would take


def test_a_tally_of_extreme_logits_is_finite():
    t = tally([[1e30, -1e30], [-1e30, 1e30]], [0, 0])
    assert math.isfinite(t.nll) and t.nll == 2e30 and t.brier == 2.0


# --- schedules, losses, settings

@pytest.mark.parametrize("name", [*schedule_options()])
def test_each_schedule_is_that_of_transformers(tiny, tmp_path, name):
    from transformers import get_scheduler
    options = dict(cosine_with_min_lr=dict(min_lr=1e-5), cosine_warmup_with_min_lr=dict(min_lr=1e-5), warmup_stable_decay=dict(num_decay_steps=4)).get(name, {})
    args = training_arguments(tiny["sft"], Settings(scheduler=name, scheduler_options=options, warmup=0.2), tmp_path, 20)
    def rates(kind, warm, kwargs):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, out = get_scheduler(kind, optimizer, warm, 20, kwargs), []
        for _ in range(20): out.append(optimizer.param_groups[0]["lr"]), optimizer.step(), schedule.step()
        return out
    assert rates(args.lr_scheduler_type, args.get_warmup_steps(20), args.lr_scheduler_kwargs) == rates(name, 4, options)


def test_a_schedule_reaches_the_optimizer(tiny, data, tmp_path):
    run = finetune(tiny["classification"], data, epochs=1, scheduler="cosine_with_min_lr", scheduler_options=dict(min_lr=1e-2), warmup=0.0, out=tmp_path / "run", **FAST)
    rates = [e["learning_rate"] for e in run.events("step")]
    n = len(rates)
    np.testing.assert_allclose(rates, [1e-2 + (2e-2 - 1e-2) * (1 + math.cos(math.pi * k / n)) / 2 for k in range(n)], rtol=1e-9)


@pytest.mark.parametrize("name", one_of(CLASS_LOSSES, "gambler"))
def test_each_loss_trains_and_predicts_only_classes(tiny, data, tmp_path, name):
    run = finetune(tiny["classification"], data, epochs=1, loss=name, loss_options={"payoff": 1.8} if name == "gambler" else {}, out=tmp_path / "run", **FAST)
    assert run.predict(data.test).logits.shape == (len(data.test), 2) and run.events("step")[-1]["loss"] is not None


def test_a_file_and_a_call_know_the_same_dials():
    call, file = {f.name: f for f in dataclasses.fields(Settings)}, TrainingSection.model_fields
    assert call.keys() == file.keys() - {"template", "preflight"}
    made = TrainingSection().model_dump()
    assert {k: made[k] for k in call} == dataclasses.asdict(Settings())


@pytest.mark.parametrize("bad, word", [
    (dict(scheduler="linaer"), "'linear'"), (dict(scheduler="greedy"), "no scheduler 'greedy'"), (dict(scheduler_options=dict(power=2)), "'power'"), (dict(batch_size=8, accumulate=16), "equal pieces"),
    (dict(best_by="loss_"), "'loss'"), (dict(patience=1), "best_by"), (dict(target_risk=1.0), "below 1"), (dict(epochs=1.5), "whole number"), (dict(evaluate_every=0), "above 0"), (dict(loss="focale"), "focal")])
def test_settings_that_no_run_could_follow_are_refused(bad, word):
    with pytest.raises((TrainingError, ConfigurationError), match=word): Settings(**bad)


# --- what is not finite

def test_a_broken_row_stops_the_run_and_is_named(folder, data, tmp_path):
    "One token whose embedding is infinite, in one training row: the run ends there, and what was saved before is whole."
    from transformers import AutoModelForCausalLM
    model = ft.load_model(folder, device="cpu")
    spoilt = dataclasses.replace(data.train, texts=[t + (" zebra" if i == 7 else "") for i, t in enumerate(data.train.texts)])
    token = next(i for i in model.tokenizer(" zebra")["input_ids"] if not any(i in model.tokenizer(t)["input_ids"] for t in data.train.texts))
    weights = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad(): weights.get_input_embeddings().weight[token] = math.inf
    weights.save_pretrained(tmp_path / "broken"), model.tokenizer.save_pretrained(tmp_path / "broken")
    with pytest.raises(TrainingError, match="is nan at step") as told:
        finetune(ft.load_model(tmp_path / "broken", device="cpu"), dataclasses.replace(data, train=spoilt), epochs=1, out=tmp_path / "run", **{**FAST, "batch_size": 4, "accumulate": 2})
    run = Run.attach(tmp_path / "run")
    named = told.value.where.removeprefix("rows ").split(", ")
    assert data.train.ids[7] in named and len(named) == 2 and set(named) <= set(data.train.ids)  # a piece of two rows
    assert run.state == "failed" and data.train.ids[7] in run.events("run_failed")[0]["error"]
    step = int(str(told.value).split("at step ")[1].split()[0])
    kept = sorted((run.path / "checkpoints").glob("step-*"))
    assert step > 1 and int(kept[-1].name[5:]) < step and not damage(kept[-1])
    assert all(torch.isfinite(v).all() for v in load_file(kept[-1] / "adapter_model.safetensors").values())


def test_a_broken_gradient_stops_before_the_weights(tiny, tmp_path):
    from fine_tune_llm.models.adapters import add_adapter
    from fine_tune_llm.models.loading import build_causal
    from fine_tune_llm.training.causal_loop import make_causal_trainer
    model, module = tiny["sft"], add_adapter(build_causal(tiny["sft"]), dict(r=2))
    weight = next(p for n, p in module.named_parameters() if "lora_B" in n)
    weight.register_hook(lambda g: g * math.inf)
    corpus = sft_data(ASKED, model, validation=0)
    trainer = make_causal_trainer(model, module, [*corpus.train.examples()], Settings(dict(r=2), batch_size=4), tmp_path, TrainerCallback(), names=corpus.names)
    with pytest.raises(TrainingError, match="norm of the gradient is (nan|inf) at step 1") as told: trainer.train()
    assert len(told.value.where.split(", ")) == 4 and "row " in told.value.where and torch.isfinite(weight).all()


# --- language models

def test_free_answers_are_learned_and_resumed_to_the_bit(tiny, tmp_path):
    how = dict(epochs=6, evaluate_every=2, best_by="loss", exact=True, **{**FAST, "batch_size": 4, "accumulate": 2})
    whole = finetune(tiny["sft"], ASKED, out=tmp_path / "whole", **how)
    losses = [e["loss"] for e in whole.events("evaluated")]
    assert losses[-1] < losses[0] and whole.events("run_started")[0]["task"] == "sft" and whole.read_json("plan.json")["packed"]
    half = finetune(tiny["sft"], ASKED, out=tmp_path / "half", background=True, **how)
    half.stop()
    assert half.wait() == "stopped"
    rest = finetune(tiny["sft"], ASKED, resume=half.path, **how)
    assert same(adapter(whole), adapter(rest)) and [e["loss"] for e in rest.events("evaluated")] == losses
    corpus = sft_data(ASKED, tiny["sft"])
    again = evaluate_tokens(tiny["sft"], trained_module(rest), [*corpus.validation.examples()])
    assert again["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_padded_rows_of_like_length_are_the_other_way(tiny, tmp_path):
    run = finetune(tiny["sft"], ASKED, epochs=2, packing=False, exact=True, out=tmp_path / "run", **FAST)
    assert run.read_json("plan.json")["packed"] is False and run.state == "finished"


def test_an_answer_that_would_lose_its_end_is_refused(tiny, tmp_path):
    with pytest.raises(DataError, match="answers"): finetune(tiny["sft"], ASKED, max_length=12, out=tmp_path / "a", **FAST)
    with pytest.raises(DataError, match="no supervised token|is missing|the answer"): finetune(tiny["sft"], [*ASKED, dict(prompt="What?", completion="")], out=tmp_path / "b", **FAST)
    assert not any((tmp_path / n).exists() for n in "ab")


@pytest.mark.parametrize("task", one_of(["sft", "label-words"], "sft"))
def test_another_template_is_refused_by_name(tiny, data, tmp_path, task):
    from fine_tune_llm.data.templates import completion, label_words
    rows, other = (ASKED, completion("Q {prompt} A", "{completion}")) if task == "sft" else (data, label_words("{text}\nClass:"))
    run = finetune(tiny[task], rows, epochs=1, out=tmp_path / "run", background=True, **FAST)
    run.stop(), run.wait()
    with pytest.raises(TrainingError, match=r"data\.template: ") as told: finetune(tiny[task], rows, epochs=1, template=other, resume=run.path, **FAST)
    assert "accept=" in told.value.fix and "data.train" in str(told.value)


def test_class_names_give_predictions_that_know_what_was_seen(tiny, data, tmp_path):
    run = finetune(tiny["label-words"], data, epochs=2, best_by="nll", out=tmp_path / "run", **FAST)
    preds = run.predict(data.test)
    assert preds.logits.shape == (len(data.test), 2) and preds.seen["training"] == frozenset(data.train.ids)
    with pytest.raises(DataError, match="already used by training"): run.predict(data.train).refuse_overlap("a promise")
    assert (run.path / "splits.json").exists() and FIGURES["classification"][0] in run.events("evaluated")[0]
    assert nll(run.predict(data.validation)).value == pytest.approx(run.events("run_finished")[0]["best_value"], rel=1e-4)


def test_tasks_refuse_what_they_cannot_use(tiny, data, tmp_path):
    for task, rows, options, word in (("classification", ROWS, {}, "load_data"), ("classification", data, dict(template="text"), "template"), ("label-words", ROWS, {}, "load_data"),
                                      ("sft", ASKED, dict(best_by="ece"), "loss"), ("sft", ASKED, dict(loss="focal"), "classification"), ("sft", ASKED, dict(best_by="loss", validation=0), "validation")):
        with pytest.raises((TrainingError, ConfigurationError), match=word): finetune(tiny[task], rows, out=tmp_path / "x", **{**FAST, **options})
    assert not (tmp_path / "x").exists()
