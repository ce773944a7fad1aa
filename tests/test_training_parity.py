"""The loop beside others: a plain torch loop written from the formulas, and TRL; every split of a step gives the same path."""
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from fine_tune_llm.core.labels import Labels
from fine_tune_llm.models.adapters import add_adapter
from fine_tune_llm.models.loading import build_classifier, load_model
from fine_tune_llm.training.arithmetic import Arithmetic
from fine_tune_llm.training.causal_loop import CausalPlan, make_causal_trainer
from fine_tune_llm.training.loop import Settings, epoch_order, make_trainer

SPLITS = [(8, 1), (8, 2), (8, 8)]  # rows of a step, pieces: 8 x 1, 4 x 2, 1 x 8
LORA = dict(r=4, lora_alpha=16, lora_dropout=0.0)
TEXT = np.random.default_rng(0)
EXAMPLES = [dict(input_ids=ids, labels=[-100] * k + ids[k:]) for n in TEXT.integers(6, 30, 21)
            for ids, k in [(TEXT.integers(3, 200, n).tolist(), int(TEXT.integers(1, 5)))]]


@pytest.fixture(scope="module")
def pocket(): return load_model("pocket", device="cpu", dtype="float32")


def language_model():
    "A tiny Llama with an adapter, the same at each call."
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return add_adapter(LlamaForCausalLM(config), LORA, seed=1)


class Losses(TrainerCallback):
    "Keep the loss of each step."
    def __init__(self): self.found = []
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs: self.found.append(logs["loss"])


def plan(packed): return CausalPlan(Arithmetic("float32", "highest", "as loaded"), packed, packed, packed, packed, ())


def ours(model, module, settings, work, packed, examples=EXAMPLES):
    losses = Losses()
    make_causal_trainer(model, module, examples, settings, work, losses, plan(packed)).train()
    return losses.found


def by_hand(module, steps, summed, settings):
    "AdamW on the mean loss of each step, a linear schedule with warmup, gradients clipped to norm 1: nothing else."
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=settings.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=settings.weight_decay)
    found, warm = [], math.ceil(settings.warmup * len(steps))
    module.train()
    for k, rows in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (k / warm if k < warm else (len(steps) - k) / (len(steps) - warm))
        parts = [summed(module, row) for row in rows]
        loss = sum(value for value, _ in parts) / sum(n for _, n in parts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def token_loss(module, row):
    "The summed loss of one document that stands alone, from full logits."
    logits = module(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
    labels = torch.tensor(row["labels"][1:])
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), int((labels != -100).sum())


def steps_of(lengths, settings):
    "The rows of each step, epoch after epoch; the last step of an epoch has what is left."
    orders = [epoch_order(lengths, settings.batch_size, settings.seed, e) for e in range(settings.epochs)]
    return [order[i:i + settings.batch_size] for order in orders for i in range(0, len(order), settings.batch_size)]


@pytest.mark.parametrize("packed", [True, False])
def test_a_language_model_takes_the_path_of_a_plain_loop(pocket, tmp_path, packed):
    settings = Settings(LORA, epochs=2, learning_rate=1e-2, batch_size=8, weight_decay=0.01)
    lengths = [1 if packed else len(e["input_ids"]) for e in EXAMPLES]
    module = language_model()
    truth = by_hand(module, [[EXAMPLES[i] for i in rows] for rows in steps_of(lengths, settings)], token_loss, settings)
    assert len(truth) == 6 and truth[-1] < truth[0] - 0.01  # it learned something, so the path is worth comparing
    for rows, pieces in SPLITS:
        other = language_model()
        found = ours(pocket, other, Settings(LORA, epochs=2, learning_rate=1e-2, batch_size=rows, accumulate=pieces, weight_decay=0.01), tmp_path, packed)
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-5)
        for (name, a), b in zip(module.named_parameters(), other.parameters()): torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=name)


def test_a_classifier_takes_the_path_of_a_plain_loop(pocket, tmp_path):
    ids = [e["input_ids"] for e in EXAMPLES]
    y, settings = np.array([len(i) % 2 for i in ids]), Settings(LORA, epochs=2, learning_rate=1e-3, head_learning_rate=1e-3, batch_size=8)
    def build(): return add_adapter(build_classifier(pocket, Labels(("even", "odd"))), LORA)
    def class_loss(module, i): return torch.nn.functional.cross_entropy(module(input_ids=torch.tensor([ids[i]])).logits, torch.tensor([y[i]]), reduction="sum"), 1
    truth = by_hand(build(), steps_of([len(i) for i in ids], settings), class_loss, settings)
    for rows, pieces in SPLITS:
        losses = Losses()
        make_trainer(pocket, build(), ids, y, Settings(LORA, epochs=2, learning_rate=1e-3, head_learning_rate=1e-3, batch_size=rows, accumulate=pieces), tmp_path, losses).train()
        np.testing.assert_allclose(losses.found, truth, rtol=0, atol=1e-5)


def test_a_mean_of_means_would_be_found_out():
    "The last window of 5 rows in pieces of 4 and 1: weighing the pieces alike is off by far more than the tolerance."
    module = language_model()
    with torch.no_grad(): parts = [token_loss(module, EXAMPLES[i]) for i in range(5)]
    exact = sum(v for v, _ in parts) / sum(n for _, n in parts)
    pieces = [parts[:4], parts[4:]]
    mean = sum(sum(v for v, _ in p) / sum(n for _, n in p) for p in pieces) / 2
    assert abs(exact - mean) > 1e-3


@pytest.mark.peers
@pytest.mark.parametrize("rows, pieces", SPLITS)
def test_trl_takes_the_same_path(pocket, tmp_path, rows, pieces):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    settings = Settings(LORA, epochs=1, learning_rate=1e-2, batch_size=rows, accumulate=pieces, warmup=0.2)
    module, losses = language_model(), Losses()
    order = epoch_order([1] * 21, rows, settings.seed, 0)
    dataset = Dataset.from_list([EXAMPLES[i] for i in order])
    config = SFTConfig(output_dir=str(tmp_path / "trl"), per_device_train_batch_size=rows // pieces, gradient_accumulation_steps=pieces, num_train_epochs=1,
                       learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=0.2, max_grad_norm=1.0, weight_decay=0.0, optim="adamw_torch", logging_steps=1, bf16=False,
                       use_cpu=True, gradient_checkpointing=False, max_length=None, packing=False, report_to="none", save_strategy="no", disable_tqdm=True,
                       train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, seed=0)
    trainer = SFTTrainer(module, config, train_dataset=dataset, processing_class=pocket.tokenizer, callbacks=[losses])
    trainer.train()
    assert len(losses.found) == 3
    np.testing.assert_allclose(ours(pocket, language_model(), settings, tmp_path, True), losses.found, rtol=0, atol=1e-5)
