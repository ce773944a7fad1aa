"Preferences: the rows, the loss of DPO against the paper's formula, the run folder, and probabilities that mean something."
import json
import math
import os
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trainings
import yaml

from fine_tune_llm.core.errors import ConfigurationError, DataError, OverlapError, RunError, TrainingError
from fine_tune_llm.core.locks import occupied
from fine_tune_llm.core.runs import Run
from fine_tune_llm.models.loading import load_model
from fine_tune_llm.training.choices import Judgements, load_judgements, load_pairs, split_pairs, unpair

pytest.importorskip("trl", reason="TRL, the extra [prefer], is not installed")
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from fine_tune_llm.models.adapters import lora_config
from fine_tune_llm.training.checkpoints import damage
from fine_tune_llm.training.margins import answer_template, answer_tokens, choice_predictions, margins
from fine_tune_llm.training.preference import PreferenceRun, open_preference, prefer, prompt_texts, train_preference
from fine_tune_llm.training.recipes import (
    PreferenceSettings,
    build_base,
    closed_trainer,
    trl_classes,
)
from fine_tune_llm.uncertainty.calibration import TemperatureScaling
from fine_tune_llm.uncertainty.predictions import Predictions

SHARED = Path(__file__).parents[2] / "shared/data"
HH = SHARED / "preference/hh_harmless_base_test.jsonl.gz"
STORIES = SHARED / "models/stories260K"
needs_data = pytest.mark.skipif(not (HH.is_file() and STORIES.is_dir()), reason="the data folder ../shared/data is not here")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A random Llama of two layers, with the tokenizer of the pocket model."
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), load_model("pocket", device="cpu").tokenizer
    shape = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder, task="sft", device="cpu")


def adding(n, m=5):
    return [dict(prompt=f"def add_{a}_{b}():\n", chosen=f"    return {a} + {b}", rejected=f"    {a} + {b}" + " # so" * (b % 3)) for a in range(n) for b in range(m)]


@pytest.fixture(scope="module")
def parts():
    return split_pairs(load_pairs(adding(6)), sizes=(.6, .2, .0, .2), near=None)


# ---- the loss is the paper's

def by_hand(model, pairs, settings):
    "Eq. 7 of Rafailov et al. 2023 in plain torch: all pairs in each step, AdamW, a rate that falls to 0, gradients clipped at 1."
    t = answer_tokens(pairs, model.tokenizer, answer_template(pairs.prompts, model.tokenizer), 256)
    reference = build_base(model, settings).eval()
    set_seed(settings.seed)
    policy = get_peft_model(build_base(model, settings), lora_config({"task_type": "CAUSAL_LM", "lora_dropout": 0.0, **settings.lora}))
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def logp(module, prompt, answer):
        ids = torch.tensor([prompt + answer])
        steps = torch.log_softmax(module(ids).logits[0, :-1], -1)
        return sum(steps[len(prompt) - 1 + k, token] for k, token in enumerate(answer))

    losses = []
    for step in range(settings.epochs):
        rows = []
        for prompt, won, lost in zip(t.prompts, *t.answers):
            with torch.no_grad(): kept = [logp(reference, prompt, a) for a in (won, lost)]
            ratio_won, ratio_lost = logp(policy, prompt, won) - kept[0], logp(policy, prompt, lost) - kept[1]
            rows.append(-torch.log(torch.sigmoid(settings.loss_beta * ratio_won - settings.loss_beta * ratio_lost)))
        loss = torch.stack(rows).mean()
        losses.append(float(loss.detach()))
        for group in optimizer.param_groups: group["lr"] = settings.learning_rate * (1 - step / settings.epochs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    return losses


@pytest.mark.parametrize("beta", [0.1, pytest.param(0.5, marks=pytest.mark.slow)])
def test_dpo_follows_equation_7(tiny, tmp_path, beta):
    pairs = load_pairs(adding(1, 4))
    dials = dict(beta=beta, lora=dict(r=2), epochs=5, learning_rate=1e-2, batch_size=4, warmup=0.0, seed=3)
    run = prefer(tiny, pairs, **dials, out=tmp_path / "r", progress=False)
    theirs, ours = [e["loss"] for e in run.events("step")], by_hand(tiny, pairs, PreferenceSettings(**dials))
    assert np.abs(np.array(theirs) - ours).max() < 1e-5
    assert theirs[0] == pytest.approx(math.log(2), abs=1e-6) and theirs[-1] < 0.9 * theirs[0]  # it moved, so there was something to compare


def test_beta_0_teaches_nothing(tiny, tmp_path):
    run = prefer(tiny, load_pairs(adding(2)), beta=0.0, lora=dict(r=2), learning_rate=1e-2, batch_size=5, out=tmp_path / "r", progress=False)
    assert all(e["loss"] == pytest.approx(math.log(2), abs=1e-6) for e in run.events("step"))
    assert not any(v.any() for k, v in load_file(run.path / "adapter/adapter_model.safetensors").items() if "lora_B" in k)


def test_probability_is_the_sigmoid_of_the_margin_and_swaps_with_the_answers(tiny, parts, tmp_path):
    run = prefer(tiny, parts["train"], beta=0.7, lora=dict(r=2), learning_rate=1e-2, batch_size=6, out=tmp_path / "r", progress=False)
    test = parts["test"]
    preds, other = run.predict(test), run.predict(replace(test, chosen=test.rejected, rejected=test.chosen), "swapped")
    assert np.allclose(margins(preds), -margins(other), atol=1e-9) and np.abs(margins(preds)).max() > 1e-3
    rows, one = np.arange(len(test)), 1 / (1 + np.exp(-margins(preds)))
    assert np.allclose(preds.probabilities[rows, preds.y], one)
    t = answer_tokens(test, tiny.tokenizer, run.template, 256)
    module, base = run.box["module"], build_base(tiny, run.settings).eval()
    def logp(m, a): return [float(torch.log_softmax(m(torch.tensor([p + x])).logits[0].detach().double(), -1)[range(len(p) - 1, len(p) + len(x) - 1), x].sum()) for p, x in zip(t.prompts, a)]
    won, lost = (np.array(logp(module, a)) - logp(base, a) for a in t.answers)
    assert np.allclose(margins(preds), 0.7 * (won - lost), atol=1e-4)


def test_a_temperature_finds_how_much_too_loud_the_margins_are():
    "Preferences drawn after Bradley and Terry; margins of three times the truth need the temperature 3."
    rng, n = np.random.default_rng(0), 2000
    truth = rng.normal(size=n) * 1.5
    sign = np.where(rng.random(n) < 1 / (1 + np.exp(-truth)), 3.0, -3.0)
    crowd = load_pairs([dict(prompt=f"{i}?", chosen=" a", rejected=" b") for i in range(n)])
    found = TemperatureScaling().fit(choice_predictions(crowd, sign * truth, np.zeros(n), "validation"))
    assert found.interval_[0] < 3 < found.interval_[1] and found.interval_[1] - found.interval_[0] < 1


# ---- rows

def test_every_row_is_kept_or_named():
    rows = [dict(chosen="\n\nHuman: Hi\n\nAssistant: Yes", rejected="\n\nHuman: Hi\n\nAssistant: No"),
            dict(chosen="\n\nHuman: Hi\n\nAssistant: Yes", rejected="\n\nHuman: Hi\n\nAssistant: Yes "),
            dict(chosen="\n\nHuman: Hi\n\nAssistant:", rejected="\n\nHuman: Hi\n\nAssistant: No"),
            dict(chosen="\n\nHuman: Hi\n\nAssistant: A\n\nHuman: So?\n\nAssistant: B", rejected="\n\nHuman: Hi\n\nAssistant: X\n\nHuman: So?\n\nAssistant: C"),
            dict(chosen="\n\nHuman: Hi\n\nAssistant: No", rejected="\n\nHuman: Hi\n\nAssistant: Yes"),
            dict(chosen="\n\nHuman: Hi\n\nAssistant: Yes", rejected="\n\nHuman: Hi\n\nAssistant: No"),
            dict(chosen="\n\nHuman: Hi\n\nAssistant: A", rejected="words without a speaker")]
    pairs = load_pairs(rows, on_bad_row="quarantine")
    told = {b.place: b.reason for b in pairs.quarantine}
    assert pairs.places.tolist() == [1, 5] and sorted(told) == [2, 3, 4, 6, 7] and pairs.read == len(rows) == len(pairs) + len(told)
    assert "same" in told[2] and "chosen answer is empty" in told[3] and "part at turn 2 of 4" in told[4] and told[6] == "the same as row 1" and "one side" in told[7]
    assert any("contradict" in n and "rows 1, 5" in n for n in pairs.notes)
    assert len(set(pairs.ids)) == 2 and pairs.ids[1].startswith(pairs.ids[0])
    with pytest.raises(DataError, match="4 of 7 rows cannot be used.*row 2.*row 3.*row 4.*row 7"): load_pairs(rows)


def test_the_usual_shapes_are_one_shape(tmp_path):
    turns = [dict(role="user", content="Tea?")]
    sides = {k: [*turns, dict(role="assistant", content=v)] for k, v in dict(chosen="Yes.", rejected="No.").items()}
    shapes = [dict(prompt="Tea?", **sides), sides, dict(prompt=turns, chosen="Yes.", rejected="No."),
              {k: f"\n\nHuman: Tea?\n\nAssistant: {v}" for k, v in dict(chosen="Yes.", rejected="No.").items()},
              dict(prompt="\n\nHuman: Tea?\n\nAssistant:", chosen="Yes.", rejected="No.")]
    for i, row in enumerate(shapes):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(row) + "\n")
        p = load_pairs(tmp_path / f"{i}.jsonl")
        assert (p.prompts, p.chosen, p.rejected) == ([turns], ["Yes."], ["No."])


def test_judgements_from_a_file_and_from_pairs(tmp_path):
    rows = [dict(prompt="Tea?", completion="Yes.", label=i) for i in (True, False)] + [dict(prompt="Tea?", completion=" ", label=True), dict(prompt="Tea?", completion="Yes.", label=1)]
    (tmp_path / "k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_judgements(tmp_path / "k.jsonl", on_bad_row="quarantine")
    assert found.good == [True, False] and [b.place for b in found.quarantine] == [3, 4] and "contradict" in found.notes[-1]
    pairs = load_pairs(adding(2, 2))
    both = unpair(pairs)
    assert isinstance(both, Judgements) and both.answers[:2] == [pairs.chosen[0], pairs.rejected[0]] and len(set(both.ids)) == 2 * len(pairs)


def test_a_prompt_stands_in_one_split():
    rows = [dict(prompt=f"{w} and {v}?", chosen=f" {w}", rejected=f" {v} {i}") for i in range(2) for w in ("tea", "milk", "soup", "rice") for v in ("salt", "sugar", "bread", "fish")]
    dealt = split_pairs(load_pairs(rows), sizes=(.4, .2, .2, .2), near=None)
    sets = [set(p.prompts) for p in dealt.values()]
    assert sum(map(len, dealt.values())) == len(rows) and len(set().union(*sets)) == sum(map(len, sets)) == 16


def test_cut_answers_are_counted_and_refused(tiny):
    pairs, plain = load_pairs(adding(1, 3)), answer_template(["x"], tiny.tokenizer)
    t = answer_tokens(pairs, tiny.tokenizer, plain, 256)
    sizes = [[len(p) + len(a) for p, a in zip(t.prompts, side)] for side in t.answers]
    limit = max(map(min, zip(*sizes)))  # at least one answer is longer
    cut = [[n > limit for n in side] for side in sizes]
    n, rows = sum(map(sum, cut)), [i for i in range(3) if cut[0][i] or cut[1][i]]
    with pytest.raises(DataError, match=rf"max_length={limit} cuts {n} answers \({sum(cut[0])} chosen, {sum(cut[1])} rejected\) in {len(rows)} of 3 rows") as e:
        answer_tokens(pairs, tiny.tokenizer, plain, limit)
    assert f"max_length={max(map(max, sizes))} cuts none" in e.value.fix
    assert answer_tokens(pairs, tiny.tokenizer, plain, max(map(max, sizes))).notes == t.notes
    dropped = answer_tokens(pairs, tiny.tokenizer, plain, limit, "drop")
    assert dropped.rows.tolist() == [i for i in range(3) if i not in rows] and f"{len(rows)} of 3 rows are left out" in dropped.notes[0]
    kept = answer_tokens(pairs, tiny.tokenizer, plain, limit, "keep")
    assert len(kept) == 3 and all(len(p) + len(a) <= limit for side in kept.answers for p, a in zip(kept.prompts, side))


def test_answer_ends_with_the_end_token_and_the_prompt_is_shared(tiny):
    pairs = load_pairs([dict(prompt="Tea?", chosen=[dict(role="assistant", content="Yes.")], rejected=[dict(role="assistant", content="No.")])])
    t = answer_tokens(pairs, tiny.tokenizer, answer_template(pairs.prompts, tiny.tokenizer), 64)
    asked = tiny.tokenizer.decode(t.prompts[0], skip_special_tokens=True)
    assert asked.endswith("Tea?\nAssistant:") and [tiny.tokenizer.decode(s[0]) for s in t.answers] == [" Yes.<eos>", " No.<eos>"]
    assert prompt_texts(pairs.prompts, tiny.tokenizer, answer_template(pairs.prompts, tiny.tokenizer)) == [asked]


# ---- the run folder

def planned(model, train, folder, **dials):
    held = PreferenceRun(Path(), model, train, None, PreferenceSettings(**dials), answer_template(train.prompts, model.tokenizer))
    return open_preference(held, folder, None, (), {})


def test_commands_are_obeyed(tiny, parts, tmp_path):
    dials = dict(lora=dict(r=2), epochs=2, batch_size=6, learning_rate=1e-3, warmup=0.0)
    run = replace(planned(tiny, parts["train"], tmp_path / "r", **dials), validation=parts["validation"])
    for name, values in (("set", dict(times=0.5)), ("evaluate", {}), ("checkpoint", {}), ("pause", {}), ("resume", {}), ("dance", {})): run.command(name, **values)
    train_preference(run, False, None)
    assert run.wait() == "finished"
    done = {e["command"]: e["step"] for e in run.events("command_applied")}
    assert done == dict.fromkeys(("set", "evaluate", "checkpoint", "pause", "resume"), 1) and run.events("command_refused")[0]["command"] == "dance"
    assert run.events("checkpoint_saved")[0]["step"] == 1 and run.events("evaluated")[0]["step"] == 1
    rates = [e["learning_rate"] for e in run.events("step")]
    n = len(rates)  # a line from the top to 0, and half of it from the second step on
    assert rates == pytest.approx([1e-3 * (1 - k / n) / (2 if k else 1) for k in range(n)])
    assert set(run.events("evaluated")[-1]) >= {"accuracy", "accuracy_low", "accuracy_high", "margin", "nll", "brier", "ece", "ece_low", "ece_high", "ece_null"}


OTHERS = ["orpo", "kto", "reward", "grpo"]


def length(prompt, answer): return -float(len(answer))


def run_with(method, tiny, parts, folder=None, **more):
    extra = dict(reward_functions=[length], answer_length=6, batch_size=8) if method == "grpo" else dict(batch_size=6)
    return prefer(tiny, parts["train"], method, **(dict(lora=dict(r=2), learning_rate=5e-3, validation=parts["validation"], out=folder, progress=False) | extra | more))


@pytest.mark.parametrize("method", ["dpo", *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)])
def test_resumed_is_as_if_never_stopped(tiny, parts, tmp_path, method):
    whole = run_with(method, tiny, parts, tmp_path / "a")
    half = open_stopped(method, tiny, parts, tmp_path / "b")
    assert half.state == "stopped" and half.events("run_stopped")[0]["step"] == 1 < whole.events("run_started")[0]["total_steps"]
    again = run_with(method, tiny, parts, resume=half.path)
    one, two = (load_file(r.path / "adapter/adapter_model.safetensors") for r in (whole, again))
    assert again.state == "finished" and one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert [e["loss"] for e in whole.events("step")] == [e["loss"] for e in again.events("step")]
    assert again.verify().n == len(again.events())


def open_stopped(method, tiny, parts, folder):
    "The run of `run_with`, with a stop left in its folder before it begins."
    asked = {}
    import fine_tune_llm.training.preference as home
    begin = home.train_preference
    def stopped_at_once(run, resume, progress):
        run.stop()
        asked["run"] = run
        begin(run, resume, progress)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(home, "train_preference", stopped_at_once)
        run_with(method, tiny, parts, folder)
    return asked["run"]


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_run(tmp_path):
    "A kill at a step that is no checkpoint: the steps since then are done again, and the end has the same bytes."
    base, whole, half = str(trainings.tiny_llama(tmp_path / "model")), tmp_path / "whole", tmp_path / "half"
    options = dict(lora=dict(r=4), epochs=3, learning_rate=5e-3, batch_size=6)  # 90 pairs: 45 steps, saved every 5
    victim = trainings.start(base, str(half), options, work=trainings.prefer)
    trainings.until(victim, lambda: trainings.steps(half) >= 13)
    assert trainings.kill(victim) and Run.attach(half).state == "running"
    done = trainings.steps(half)
    assert trainings.finish(base, str(half), {**options, "beta": 0.3}, resume=True, work=trainings.prefer).count("settings.beta: 0.1 -> 0.3") == 1
    Path(f"{half}.error").unlink()
    assert trainings.finish(base, str(half), options, resume=True, work=trainings.prefer) == "" == trainings.finish(base, str(whole), options, work=trainings.prefer)
    begun, ends = Run.attach(half).events("run_started")[-1]["step"], [Run.attach(r) for r in (half, whole)]
    assert 0 < begun <= done < 45 and all(r.state == "finished" and r.verify().torn == 0 for r in ends) and trainings.adapter(half) == trainings.adapter(whole)
    losses = {e["step"]: e["loss"] for e in ends[1].events("step")}
    assert all(e["loss"] == losses[e["step"]] for e in ends[0].events("step")) and {e["step"] for e in ends[0].events("step")} == set(losses)


def test_an_interrupt_finishes_the_step_and_saves(tiny, parts, tmp_path):
    run, lived = planned(tiny, parts["train"], tmp_path / "r", lora=dict(r=2), batch_size=6), []
    def interrupt(step, total, note):
        if not lived: os.kill(os.getpid(), signal.SIGINT)
        lived.append(run.lives())
    train_preference(run, False, interrupt)
    assert run.wait() == "stopped" and lived[0] and not run.lives()
    end = run.events("run_stopped")[0]
    assert 0 < end["step"] < run.events("run_started")[0]["total_steps"] and not damage(run.path / end["checkpoint"])


def test_one_trainer_at_a_time_and_a_closed_run_is_free(tiny, parts, tmp_path):
    parts = {**parts, "validation": None}
    half = open_stopped("dpo", tiny, parts, tmp_path / "b")
    with occupied(half.path), pytest.raises(RunError, match="another trainer is at work here"): run_with("dpo", tiny, parts, resume=half.path)
    half.command("pause")  # nobody reads it
    again = run_with("dpo", tiny, parts, resume=half.path)
    assert again.state == "finished" and again.events("command_refused")[-1]["reason"] == "no trainer was at work when this was asked"
    held = weakref.ref(again.box["module"])
    again.close()
    assert held() is None and again.box == {}
    with pytest.raises(TrainingError, match="has no model"): again.predict(parts["test"])
    with pytest.raises(TrainingError, match="never began"): run_with("dpo", tiny, parts, resume=Run.create(tmp_path / "empty").path)


def test_a_changed_run_is_refused_by_name(tiny, parts, tmp_path):
    half = open_stopped("dpo", tiny, parts, tmp_path / "b")
    for change, told in ((dict(beta=0.2), "settings.beta: 0.1 -> 0.2"), (dict(method="orpo"), "settings.method"), (dict(lora=dict(r=4)), "settings.lora.r: 2 -> 4"),
                         (dict(seed=1), "settings.seed: 0 -> 1"), (dict(options={"loss_type": ["ipo"]}), "settings.options.loss_type")):
        with pytest.raises(TrainingError, match=told): run_with(change.pop("method", "dpo"), tiny, parts, resume=half.path, **change)
    fewer = {**parts, "train": parts["train"].take(slice(0, -1))}
    with pytest.raises(TrainingError, match="data.train"): run_with("dpo", tiny, fewer, resume=half.path)
    swapped = {**parts, "train": replace(parts["train"], chosen=parts["train"].rejected, rejected=parts["train"].chosen)}
    with pytest.raises(TrainingError, match="data.train"): run_with("dpo", tiny, swapped, resume=half.path)


def test_a_changed_reward_is_refused(tiny, tmp_path):
    from fine_tune_llm.training.preference import as_pairs, preference_fingerprint
    def name_it(code):
        (tmp_path / f"r{len(code)}.py").write_text(code)
        space = {}
        exec(compile(code, str(tmp_path / f"r{len(code)}.py"), "exec"), space)
        return space["reward"]
    held = as_pairs(["a", "b"])
    made = [preference_fingerprint(PreferenceRun(Path(), tiny, held, None, PreferenceSettings("grpo"), answer_template(held.prompts, tiny.tokenizer), (name_it(code),)))
            for code in ("def reward(p, a):\n    return 1.0\n", "def reward(p, a):\n    return 1.5  # more\n")]
    assert {k for k in made[0] if made[0][k] != made[1][k]} == {"rewards.reward"} and made[0]["versions.trl"]


def test_nothing_leaves_the_folder(tiny, parts, tmp_path, monkeypatch):
    import trl.trainer.base_trainer as base
    said = []
    monkeypatch.setattr(base, "send_telemetry", lambda *a, **k: said.append(k))
    monkeypatch.delenv("CI", raising=False)
    run = prefer(tiny, parts["train"], lora=dict(r=2), batch_size=9, out=tmp_path / "r", progress=False)
    assert said == [] and not (run.path / "adapter/README.md").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["r"]
    assert closed_trainer(trl_classes("dpo")[1])._send_telemetry is not trl_classes("dpo")[1]._send_telemetry
    dials = yaml.safe_load((run.path / "config.yaml").read_text())["preference"]
    assert dials["method"] == "dpo" and dials["beta"] == 0.1 and dials["lora"] == {"r": 2}
    assert all("pickle" not in p.suffix and p.suffix != ".bin" for p in run.path.rglob("*"))


def test_four_bits_keep_their_gradient_after_an_evaluation(tiny):
    "bitsandbytes 0.50 repacks 4-bit weights on some CPUs at the first evaluation, into a layout without a gradient."
    model = replace(tiny, quantize="nf4")
    def gradients(evaluate):
        module = get_peft_model(build_base(model, PreferenceSettings()), lora_config({"task_type": "CAUSAL_LM", "r": 2, "lora_dropout": 0.0}))
        g, ids = torch.Generator().manual_seed(1), torch.tensor([[5, 6, 7, 8, 9]])
        for name, p in module.named_parameters():
            if "lora_" in name: p.data = torch.randn(p.shape, generator=g) * 0.05
        if evaluate:
            module.eval()
            with torch.inference_mode(): module(input_ids=ids)
        module.train()
        module(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in module.parameters() if p.requires_grad]
    before, after = gradients(False), gradients(True)
    assert before and all(torch.equal(a, b) for a, b in zip(before, after))
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in build_base(model, PreferenceSettings()).modules())  # keep_layout, in read_weights


def test_refusals():
    with pytest.raises(ConfigurationError, match="use one of dpo"): PreferenceSettings("ppo")
    for way in ("pissa", "olora", "loftq"):
        with pytest.raises(ConfigurationError, match="another model"): PreferenceSettings(lora=dict(init_lora_weights=way))
    PreferenceSettings("orpo", lora=dict(init_lora_weights="pissa"))  # has no reference
    for bad in (dict(batch_size=0), dict(learning_rate=-1.0), dict(epochs=0)):
        with pytest.raises(TrainingError, match="above 0"): PreferenceSettings(**bad)


# ---- real weights, real pairs

@needs_data
def test_every_pair_of_hh_rlhf_is_accounted_for():
    pairs = load_pairs(HH, on_bad_row="quarantine")
    told = [b.reason for b in pairs.quarantine]
    assert (pairs.read, len(pairs)) == (2312, 2303) and sum("chosen answer is empty" in r for r in told) == 4 and sum("part at turn" in r for r in told) == 5
    assert all(p[-1]["role"] == "user" for p in pairs.prompts)
    with pytest.raises(DataError, match="9 of 2312 rows cannot be used"): load_pairs(HH)


@needs_data
def test_a_real_decoder_learns_from_hh_rlhf(tmp_path):
    model, pairs = load_model(STORIES, task="sft", device="cpu"), load_pairs(HH, on_bad_row="quarantine")
    short = pairs.take([i for i in range(len(pairs)) if sum(len(t["content"]) for t in pairs.prompts[i]) + len(pairs.chosen[i]) + len(pairs.rejected[i]) < 200][:36])
    dealt = split_pairs(short, sizes=(.5, .3, .0, .2))
    with pytest.raises(DataError, match="cuts .* answers"): answer_tokens(short, model.tokenizer, answer_template(short.prompts, model.tokenizer), 32)
    run = prefer(model, dealt["train"], lora=dict(r=8), epochs=3, learning_rate=2e-2, batch_size=9, max_length=128, on_cut="drop",
                 validation=dealt["validation"], out=tmp_path / "r", progress=False)
    losses, test = [e["loss"] for e in run.events("step")], run.predict(dealt["test"])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < 0.5 and run.events("evaluated")[-1]["ece_null"] is not None
    assert (margins(learned := run.predict(dealt["train"])) > 0).mean() > 0.9
    back = Predictions.load(run.path / "predictions/test.parquet")
    assert len(back) == len(test) <= len(dealt["test"]) and back.seen["training"] == frozenset(map(str, dealt["train"].ids))
    with pytest.raises(OverlapError, match="already used by training"): TemperatureScaling().fit(learned)


# ---- the other methods

@pytest.mark.slow
@pytest.mark.parametrize("method", ["orpo", "kto", "reward"])
def test_the_others_learn_the_rule(tiny, parts, tmp_path, method):
    run = run_with(method, tiny, parts, tmp_path / "r", epochs=6, learning_rate=2e-2)
    found = run.figures(parts["test"])
    assert found["accuracy"].value == 1.0 and found["nll"].value < math.log(2) and found["margin"].low > 0
    warned = [e["message"] for e in run.events("warning") if "unstable in TRL" in e["message"]]
    assert bool(warned) == (method == "orpo")
    opened = run_with(method, tiny, parts, resume=run.path, epochs=6, learning_rate=2e-2)
    assert np.allclose(opened.predict(parts["test"]).logits, run.predict(parts["test"]).logits, atol=1e-5)


@pytest.mark.slow
def test_orpo_loss_is_the_papers(tiny, tmp_path):
    "Eqs. 4 to 7 of Hong et al. 2024 on the first step: the likelihood of prompt and chosen answer, and the log odds ratio of mean log probabilities."
    pairs = load_pairs(adding(1, 4))
    run = prefer(tiny, pairs, "orpo", beta=0.3, lora=dict(r=2), batch_size=4, out=tmp_path / "r", progress=False)
    t, base = answer_tokens(pairs, tiny.tokenizer, run.template, 256), build_base(tiny, run.settings).eval()
    nll, odds = [], []
    for p, won, lost in zip(t.prompts, *t.answers):
        mean = []
        for a in (won, lost):
            steps = torch.log_softmax(base(torch.tensor([p + a])).logits[0].detach().double(), -1)
            mean.append(float(steps[range(len(p) - 1, len(p) + len(a) - 1), a].mean()))
            if a is won: nll += [-float(steps[k, token]) for k, token in enumerate((p + a)[1:])]
        odds.append(mean[0] - math.log(1 - math.exp(mean[0])) - mean[1] + math.log(1 - math.exp(mean[1])))
    expected = np.mean(nll) - 0.3 * np.mean([math.log(1 / (1 + math.exp(-o))) for o in odds])
    assert run.events("step")[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_kto_takes_judgements_and_starts_at_a_half(tiny, parts, tmp_path):
    "At the start the reward is 0 and so is the reference point: each loss is 1 - sigmoid(0) (Ethayarajh et al. 2024, eq. 8)."
    run = prefer(tiny, unpair(parts["train"]), "kto", lora=dict(r=2), batch_size=6, out=tmp_path / "r", progress=False, validation=parts["validation"])
    assert run.events("step")[0]["loss"] == pytest.approx(0.5, abs=1e-6) and "nll" in run.events("evaluated")[-1]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    "A random Llama that says one of nine words or nothing, each to be read off its text."
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast
    folder, words = tmp_path_factory.mktemp("speaker"), ["<eos>", "it", "is", "sun", "snow", "wind", "rain", "fog", "hail", "frost"]
    plain = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, unk_token="it"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>", model_max_length=32).save_pretrained(folder)
    shape = LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
                        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False, initializer_range=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    return load_model(folder, task="sft", device="cpu")


def test_grpo_climbs_its_reward(speaker, tmp_path):
    """One step of GRPO by hand, where it can be done by hand: answers of one token, and an adapter B A on the last matrix before the head alone.

    While the policy is the one that answered, the gradient of the loss of Shao et al. (2024, eq. 3) by the logit of word j is -1/N (the sum of a_i over
    the answers that say j, less p_j times the sum of all a_i), with a_i = (r_i - mean r) / sd r over the group. All a_i add up to 0. So a word that was
    not drawn gets no push, one that is better than the group's mean is pushed up and one that is worse down: push_j. Through the head W and the norm
    h / rms(h) this is a direction d at the hidden state h. B starts at 0, so its gradient is the outer product of d and s A x, for the input x of the
    matrix and LoRA's factor s, and A has none. The first step of Adam is the rate times the sign of each, so h moves to h + rate s |A x|_1 sign(d).
    """
    said, rate, n = [], 2.0, 16
    def rain(prompt, answer):
        said.append((prompt, answer.strip()))
        return float(said[-1][1] == "rain")
    run = prefer(speaker, ["it is"], "grpo", reward_functions=[rain], validation=["it is"], lora=dict(r=4, lora_alpha=8, target_modules=["down_proj"]),
                 learning_rate=rate, warmup=0.0, batch_size=n, generations=n, answer_length=1, out=tmp_path / "r", progress=False)
    words, drawn = speaker.tokenizer.convert_ids_to_tokens(range(10)), [w or "<eos>" for _, w in said[:n]]
    reward = np.array([w == "rain" for w in drawn], float)
    advantage = (reward - reward.mean()) / reward.std(ddof=1)
    push, best = np.array([advantage[[w == d for d in drawn]].sum() for w in words]), words.index("rain")
    assert 0 < reward.sum() < n and abs(push.sum()) < 1e-9 and (push == 0).any() and push[best] > 0 > push.min()  # all three kinds are there

    base, ids, seen = build_base(speaker, run.settings).eval(), speaker.tokenizer(said[0][0], return_tensors="pt"), {}
    for name, module in (("x", base.model.layers[-1].mlp.down_proj), ("h", base.model.norm)):
        module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0][0, -1].double().numpy()}))
    with torch.no_grad(): old, new = (m(**ids).logits[0, -1].double().numpy() for m in (base, run.box["module"]))
    x, h, head = seen["x"], seen["h"], base.lm_head.weight.detach().double().numpy()  # the weight of the norm is 1
    def norm(h): return h / np.sqrt((h ** 2).mean() + base.config.rms_norm_eps)
    np.testing.assert_allclose(head @ norm(h), old, atol=1e-6)
    d = head.T @ push - norm(h) * (norm(h) @ (head.T @ push)) / len(h)
    d /= np.sqrt((h ** 2).mean() + base.config.rms_norm_eps)
    a = next(v for k, v in load_file(run.path / "adapter/adapter_model.safetensors").items() if "lora_A" in k).double().numpy()
    inner = 8 / 4 * a @ x
    assert run.events("step")[0]["grad_norm"] == pytest.approx(np.linalg.norm(d) * np.linalg.norm(inner) / n, rel=1e-3)
    np.testing.assert_allclose(new, head @ norm(h + rate * np.abs(inner).sum() * np.sign(d)), atol=1e-4)
    assert np.abs(new - old).max() > 0.1 and np.exp(new[best]) / np.exp(new).sum() > np.exp(old[best]) / np.exp(old).sum()
    assert run.events("rewarded")[0]["reward"] == pytest.approx(reward.mean()) and run.events("evaluated")[-1]["reward"] == float(new.argmax() == best) == 1.0
    with pytest.raises(TrainingError, match="no probability of a preference"): run.predict(load_pairs(adding(1, 2)), "x")


@pytest.mark.slow
def test_a_reward_that_is_no_number_fails_the_run(tiny, tmp_path):
    with pytest.raises(TrainingError, match="gave None"):
        prefer(tiny, ["a", "b"], "grpo", reward_functions=[lambda p, a: None], lora=dict(r=2), batch_size=4, answer_length=4, out=tmp_path / "r", progress=False)
    assert Run.attach(tmp_path / "r").state == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [dict(dtype="bfloat16"), dict(quantize="nf4"), dict(quantize="int8")], ids=str)
def test_other_precisions_train(tiny, parts, tmp_path, kind):
    run = run_with("dpo", load_model(tiny.path, task="sft", device="cpu", **kind), parts, tmp_path / "r", epochs=2, learning_rate=2e-2)
    assert run.events("step")[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and run.figures(parts["test"])["margin"].low > 0
