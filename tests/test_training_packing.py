"""Packed steps, attention within documents, lean LoRA layers, and the trainer that puts them together."""
import dataclasses
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tune_llm.core.errors import TrainingError
from fine_tune_llm.models.adapters import add_adapter
from fine_tune_llm.models.loading import Model
from fine_tune_llm.training import arithmetic, causal_loop
from fine_tune_llm.training.arithmetic import Arithmetic, convert_frozen, matmul_precision, plan_arithmetic
from fine_tune_llm.training.causal_loop import CausalPlan, make_causal_trainer, plan_causal
from fine_tune_llm.training.document_attention import check_documents_apart, document_lengths, documents_apart
from fine_tune_llm.training.lean_adapters import lean_adapters
from fine_tune_llm.training.loop import Settings, epoch_order
from fine_tune_llm.training.packing import assert_packing, pack_rows, packing_errors, pad_rows, share_rows
from fine_tune_llm.training.supervised_loss import supervised_loss

tf = pytest.importorskip("transformers")

SIZE = dict(vocab_size=150, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=0.2, pad_token_id=0)
MODELS = {
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE)),
    "Qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZE)),
    "Qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZE, head_dim=8)),
    "Mistral, window": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZE, sliding_window=8)),
    "Gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZE, head_dim=8)),
    "Phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZE)),
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=150, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
                                                      attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)),
}


def built(name="Llama", **lora):
    torch.manual_seed(0)
    return add_adapter(MODELS[name](), dict(r=4, lora_dropout=0.0, init_lora_weights=False) | lora)


def documents(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 150, (n,), generator=g).tolist() for n in lengths]
    return [dict(input_ids=ids, labels=[-100] * (len(ids) // 2) + ids[len(ids) // 2:]) for ids in rows]


def step(module, batch):
    "Loss and gradients of a batch."
    loss, count = supervised_loss(module, **batch)
    (loss / count).backward()
    found = [p.grad.clone() for p in module.parameters() if p.requires_grad]
    module.zero_grad()
    return [(loss / count).detach(), *found]


def close(a, b, tolerance): return all((x - y).abs().max() <= tolerance * max(1.0, float(y.abs().max())) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", [n for n in MODELS if n != "GPT-2"])
def test_a_packed_step_is_the_padded_step(name):
    module, rows = built(name), documents([5, 70, 9, 33])
    padded, packed = pad_rows(rows, 0), pack_rows(rows, 0)
    usual = step(module, padded)
    assert close(step(module, packed), usual, 2e-6)
    with documents_apart(module): assert close(step(module, packed), usual, 2e-6)
    with documents_apart(module), lean_adapters(module) as taken:
        assert taken and close(step(module, packed), usual, 2e-6)


def test_learned_positions_can_be_packed_too():
    module, rows = built("GPT-2"), documents([5, 20, 9])
    assert_packing(module, rows)
    assert close(step(module, pack_rows(rows, 0)), step(module, pad_rows(rows, 0)), 2e-6)


@pytest.mark.parametrize("how", [dict(use_cache=True), dict(attention_mask=torch.ones(1, 64, dtype=torch.long))], ids=["use_cache", "a mask of ones"])
def test_the_trap_is_seen(how):
    module, rows = built(), documents([20, 12, 25])
    assert packing_errors(module, rows)[0] < 1e-5 and packing_errors(module, rows)[1] == 0
    with pytest.raises(TrainingError, match="packed documents see one another"): assert_packing(module, rows, **how)


def test_positions_that_are_ignored_are_seen():
    torch.manual_seed(0)
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=150, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2))
    with pytest.raises(TrainingError): assert_packing(bloom, documents([20, 12]))


def test_the_trap_is_seen_in_bfloat16():
    module, rows = built().bfloat16(), documents([20, 12, 25])
    assert_packing(module, rows)
    with pytest.raises(TrainingError): assert_packing(module, rows, use_cache=True)


def test_attention_within_documents_in_bfloat16_is_as_exact_as_the_usual_one():
    rows = documents([40, 70, 12])
    exact, packed = built(), pack_rows(rows, 0)
    truth = step(exact, packed)
    half = built()
    convert_frozen(half, "bfloat16")
    usual = step(half, packed)
    with documents_apart(half), lean_adapters(half): ours = step(half, packed)
    off = lambda found: sum(float((a - b).norm() ** 2) for a, b in zip(found, truth)) ** 0.5 / sum(float(b.norm() ** 2) for b in truth) ** 0.5
    assert off(ours) <= 1.5 * off(usual) < 0.2


def test_soft_caps_and_sinks_are_refused_and_the_setting_comes_back():
    module = tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZE, head_dim=8))
    before = module.config._attn_implementation
    with pytest.raises(TrainingError, match="more than causal attention"): check_documents_apart(module, documents([5, 6]))
    assert module.config._attn_implementation == before


def test_padded_rows_are_refused_while_it_is_on():
    module = built()
    with documents_apart(module), pytest.raises(TrainingError):
        module(input_ids=torch.ones(2, 5, dtype=torch.long), attention_mask=torch.ones(2, 5, dtype=torch.long))


lists = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(lists, st.integers(5, 100))
def test_dealing_keeps_rows_order_and_limit(lengths, limit):
    rows = documents(lengths)
    parts = share_rows(rows, limit)
    assert [r for part in parts for r in part] == rows
    assert all(sum(len(r["input_ids"]) for r in part) <= limit or len(part) == 1 for part in parts)


@settings(max_examples=40, deadline=None)
@given(lists, st.sampled_from([1, 16, 64]))
def test_packing_keeps_tokens_targets_and_documents(lengths, multiple):
    rows = [dict(r, labels=r["input_ids"]) for r in documents(lengths)]  # the first token is supervised, and has nothing in front of it
    packed = {k: v[0].tolist() for k, v in pack_rows(rows, 0, multiple).items()}
    n = sum(lengths)
    assert packed["input_ids"][:n] == [i for r in rows for i in r["input_ids"]] and len(packed["input_ids"]) % multiple == 0
    assert sum(k != -100 for k in packed["labels"]) == sum(k != -100 for r in rows for k in r["labels"][1:])
    assert sum(k != -100 for k in packed["labels"]) == n - len(rows)
    found, filling = document_lengths(torch.tensor([packed["position_ids"]]))
    assert found == lengths and filling == len(packed["input_ids"]) - n


# the trainer

MODEL = Model("tiny", "", "sft", SimpleNamespace(pad_token_id=0), None, "cpu", "float32")
PLAIN = Arithmetic("float32", "highest", "for the test")
SETTINGS = Settings(dict(r=4), epochs=2, learning_rate=1e-2, batch_size=4, warmup=0.0)


def trained(module, rows, settings=SETTINGS, plan=None, resume=None, folder=None, callback=None, **arguments):
    "Train, and return the trained weights with the trainer."
    with tempfile.TemporaryDirectory() as work:
        trainer = make_causal_trainer(MODEL, module, rows, settings, Path(folder or work), callback or tf.TrainerCallback(), plan)
        for name, value in arguments.items(): setattr(trainer.args, name, value)
        trainer.train(resume_from_checkpoint=resume)
    return [p.detach().clone() for p in module.parameters() if p.requires_grad], trainer


def plain_loop(module, rows, order_lengths, s=SETTINGS):
    "The same training by hand: padded rows, the model's own logits, one mean over the tokens of a step."
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=s.learning_rate, weight_decay=0.0)
    steps = -(-len(rows) // s.batch_size) * s.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (steps - i) / steps)
    module.train()
    for epoch in range(s.epochs):
        order = epoch_order(order_lengths, s.batch_size, s.seed, epoch)
        for i in range(0, len(rows), s.batch_size):
            total, count = 0.0, 0
            for j in order[i:i + s.batch_size]:
                ids, labels = (torch.tensor([rows[j][k]]) for k in ("input_ids", "labels"))
                total = total + torch.nn.functional.cross_entropy(module(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100)
                count += int((labels[0, 1:] != -100).sum())
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return [p.detach() for p in params]


PLANS = {"all": CausalPlan(PLAIN, True, True, True, True, ()), "packed": CausalPlan(PLAIN, True, True, False, False, ()),
         "padded": CausalPlan(PLAIN, False, True, False, False, ()), "the model's own loss": CausalPlan(PLAIN, False, False, False, False, ())}


@pytest.mark.parametrize("name", PLANS)
def test_training_equals_a_loop_written_by_hand(name):
    rows = documents([5, 30, 9, 12, 25, 7, 40, 16, 11, 8])  # three steps an epoch, the last with two rows
    ours, trainer = trained(built(), rows, plan=PLANS[name])
    theirs = plain_loop(built(), rows, [1 if PLANS[name].packed else len(r["input_ids"]) for r in rows])
    assert trainer.state.global_step == 6 and close(ours, theirs, 2e-4)
    assert not close(ours, [p.detach() for p in built().parameters() if p.requires_grad], 1e-2)


@pytest.mark.parametrize("name", ["all", "padded"])
def test_accumulation_is_exact_in_the_last_partial_window_too(name, monkeypatch):
    rows = documents([5, 30, 9, 12, 25, 7, 40, 16, 11, 8])
    whole, one = trained(built(), rows, plan=PLANS[name])
    usual = causal_loop.training_arguments
    def split(*args):
        made = usual(*args)
        made.per_device_train_batch_size, made.gradient_accumulation_steps = 1, 4
        return made
    monkeypatch.setattr(causal_loop, "training_arguments", split)
    parts, four = trained(built(), rows, plan=PLANS[name])
    assert one.state.global_step == four.state.global_step == 6 and close(parts, whole, 1e-4)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (one, four)]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)


class Stop(tf.TrainerCallback):
    "Stop after some steps."
    def __init__(self, at): self.at = at
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at: control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(at, tmp_path):
    rows, lora = documents([5, 30, 9, 12, 25, 7, 40, 16, 11, 8]), dict(lora_dropout=0.2)
    through, _ = trained(built(**lora), rows, plan=PLANS["all"])
    trained(built(**lora), rows, plan=PLANS["all"], folder=tmp_path, callback=Stop(at))
    resumed, _ = trained(built(**lora), rows, plan=PLANS["all"], folder=tmp_path, resume=str(tmp_path / f"checkpoint-{at}"))
    assert all(torch.equal(a, b) for a, b in zip(through, resumed, strict=True))


def test_what_was_set_is_set_back_even_after_an_error():
    class Break(tf.TrainerCallback):
        def on_step_end(self, *args, **kwargs): raise KeyboardInterrupt
    module, plan = built(), dataclasses.replace(PLANS["all"], arithmetic=Arithmetic("float32", "medium", ""))
    with pytest.raises(KeyboardInterrupt): trained(module, documents([5, 6, 7]), plan=plan, callback=Break())
    assert torch.get_float32_matmul_precision() == "highest" and module.get_base_model().config._attn_implementation == "sdpa"
    assert not any("forward" in vars(m) for n, m in module.named_modules() if n.endswith("_proj"))


def test_a_model_that_cannot_be_packed_is_padded_and_says_why():
    torch.manual_seed(0)
    bloom = add_adapter(tf.BloomForCausalLM(tf.BloomConfig(vocab_size=150, hidden_size=32, n_layer=1, n_head=4, initializer_range=0.2)), dict(r=2))
    plan = plan_causal(MODEL, bloom, documents([20, 12, 8]), exact=True)
    assert plan.selective and not plan.packed and not plan.apart and "rows are padded, not packed" in plan.notes[0]
    assert plan_causal(MODEL, built(), documents([20, 12, 8]), exact=True, packing=False).packed is False


def test_a_capped_attention_is_packed_all_the_same():
    gemma = add_adapter(tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZE, head_dim=8)), dict(r=2))
    plan = plan_causal(MODEL, gemma, documents([20, 12, 8]), exact=True)
    assert plan.packed and plan.selective and not plan.apart and "attention on the whole row" in plan.notes[0]


@pytest.mark.parametrize("fast, medium, error, expected", [
    (4.0, 2.0, 1e-6, ("bfloat16", "medium")),  # an AMD core with AVX512_BF16
    (8.0, 3.0, 1e-3, ("bfloat16", "highest")),  # AMX: "medium" rounds
    (0.2, 1.0, 1e-6, ("float32", "highest")),  # no bfloat16 at all
    (2.2, 2.0, 1e-6, ("float32", "medium"))])  # bfloat16 hardly faster than oneDNN's float32
def test_the_choice_of_arithmetic(monkeypatch, fast, medium, error, expected):
    monkeypatch.setattr(arithmetic, "measure_processor", lambda: (fast, medium, error))
    found = plan_arithmetic(MODEL)
    assert (found.dtype, found.matmul) == expected and plan_arithmetic(MODEL, exact=True).dtype == "float32"
    assert plan_arithmetic(dataclasses.replace(MODEL, device="cuda", dtype="bfloat16")).matmul == "highest"
    assert plan_arithmetic(dataclasses.replace(MODEL, quantize="nf4")).dtype == "float32"


def test_bfloat16_weights_train_to_the_same_loss():
    rows = documents([30] * 12)
    half = dataclasses.replace(PLANS["all"], arithmetic=Arithmetic("bfloat16", "highest", ""))
    losses = []
    for plan in (PLANS["all"], half):
        module = built(init_lora_weights=True)
        trained(module, rows, plan=plan)
        assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
        with torch.no_grad(): losses.append(float(supervised_loss(module.eval(), **pack_rows(rows, 0))[0]))
    assert losses[1] == pytest.approx(losses[0], rel=0.005)


def test_precision_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), matmul_precision("medium"): raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"
