"""The loss on supervised tokens against the plain loss of transformers, architecture by architecture."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fine_tune_llm.core.errors import TrainingError
from fine_tune_llm.models.adapters import add_adapter
from fine_tune_llm.training.supervised_loss import (
    FrozenHead,
    body_and_head,
    check_supervised_loss,
    supervised_loss,
    trained_head,
)

tf = pytest.importorskip("transformers")

SIZE = dict(vocab_size=150, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=0.2, pad_token_id=0)
MODELS = {
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE)),
    "Llama, tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "Qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZE)),
    "Qwen3, tied": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZE, head_dim=8, tie_word_embeddings=True)),
    "Mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZE, sliding_window=8)),
    "Gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZE, head_dim=8)),
    "Gemma 2, capped": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=2.0)),
    "Phi, head with a bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZE)),
    "Cohere, scaled": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SIZE, logit_scale=0.25)),
    "Granite, scaled": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SIZE, logits_scaling=4.0)),
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=150, n_embd=32, n_layer=2, n_head=4)),
}


def built(name, **lora):
    torch.manual_seed(0)
    return add_adapter(MODELS[name](), dict(r=4, lora_dropout=0.0, init_lora_weights=False, **lora)).eval()


def batch(rows=3, tokens=40, supervised=12, seed=0):
    ids = torch.randint(3, 150, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return ids, torch.where(torch.arange(tokens) >= tokens - supervised, ids, -100)


def gradients(loss, module):
    trained = [p for p in module.parameters() if p.requires_grad]
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True))]


def assert_same(module, ids, labels, chunk=64):
    own = module(input_ids=ids, labels=labels).loss
    loss, count = supervised_loss(module, ids, labels, chunk=chunk)
    assert count == (labels[:, 1:] != -100).sum()
    assert float((loss / count).detach()) == pytest.approx(float(own.detach()), rel=1e-6)
    ours, theirs = gradients(loss / count, module), gradients(own, module)
    scale = max(g.abs().max() for g in theirs)
    assert scale > 0 and max((a - b).abs().max() for a, b in zip(ours, theirs)) <= 1e-6 * max(1.0, float(scale))


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model(name):
    module = built(name)
    check_supervised_loss(module, list(range(3, 30)))
    assert_same(module, *batch())


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 1000])
def test_pieces_of_any_size_give_the_same(chunk): assert_same(built("Llama"), *batch(), chunk=chunk)


@pytest.mark.parametrize("more", [dict(target_modules=["q_proj", "lm_head"]), dict(target_modules=["q_proj"], modules_to_save=["lm_head"])],
                         ids=["LoRA on the head", "a head that is trained"])
def test_a_head_that_learns_gets_its_gradient(more):
    module = built("Llama", **more)
    assert any("lm_head" in n for n, p in module.named_parameters() if p.requires_grad)
    assert_same(module, *batch(), chunk=16)


def test_tied_embeddings_that_are_trained():
    torch.manual_seed(0)
    module = MODELS["Llama, tied"]().eval()
    assert module.lm_head.weight is module.model.embed_tokens.weight and module.lm_head.weight.requires_grad
    assert_same(module, *batch())


def test_padding_changes_nothing():
    module, (ids, labels) = built("Llama"), batch()
    mask = torch.ones_like(ids)
    mask[1, 25:], labels[1, 25:] = 0, -100
    labels[1, 20:25] = ids[1, 20:25]
    loss, count = supervised_loss(module, ids, labels, attention_mask=mask)
    own = module(input_ids=ids, labels=labels, attention_mask=mask).loss
    assert count == 29 and float((loss / count).detach()) == pytest.approx(float(own.detach()), rel=1e-6)


def test_a_hand_computed_loss():
    hidden, weight = torch.zeros(3, 2, requires_grad=True), torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]])
    loss = FrozenHead.apply(hidden, weight, None, torch.tensor([0, 1, 2]), 64, 1.0, None)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(3 * math.log(4))  # all logits are 0, so each token has probability 1/4
    assert torch.allclose(hidden.grad, torch.tensor([[0.25 - 1, 0.25], [0.25, 0.25 - 1], [0.25, 0.25]]))


@pytest.mark.parametrize("rule", [(1.0, None), (0.5, None), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_and_trained_heads_agree_in_double_precision(rule, bias):
    g = torch.Generator().manual_seed(1)
    h, w = torch.randn(37, 8, generator=g, requires_grad=True), torch.randn(50, 8, generator=g)
    b, y = torch.randn(50, generator=g) if bias else None, torch.randint(50, (37,), generator=g)
    ours = FrozenHead.apply(h, w, b, y, 16, *rule)
    hd = h.detach().double().requires_grad_()
    z = (hd @ w.double().T + (0 if b is None else b)) * rule[0]
    truth = torch.nn.functional.cross_entropy(z if rule[1] is None else rule[1] * torch.tanh(z / rule[1]), y, reduction="sum")
    head = torch.nn.Linear(8, 50, bias=bias)
    head.weight.data = w
    if bias: head.bias.data = b
    other = trained_head(head, h, y, 16, *rule)
    (expected,) = torch.autograd.grad(truth, hd)
    for loss in (ours, other):
        assert float(loss.detach()) == pytest.approx(float(truth), rel=1e-6)
        assert (torch.autograd.grad(loss, h)[0] - expected).abs().max() < 1e-5


def test_extreme_logits_stay_finite():
    h = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    loss = FrozenHead.apply(h, torch.eye(2), None, torch.tensor([0, 0]), 64, 1.0, None)
    assert float(loss.detach()) == pytest.approx(1e4) and torch.isfinite(torch.autograd.grad(loss, h)[0]).all()


def test_bfloat16_is_as_exact_as_the_usual_way():
    g = torch.Generator().manual_seed(0)
    h, w, y = torch.randn(96, 64, generator=g), torch.randn(400, 64, generator=g) / 8, torch.randint(400, (96,), generator=g)
    hd = h.bfloat16().double().requires_grad_()
    (truth,) = torch.autograd.grad(torch.nn.functional.cross_entropy(hd @ w.bfloat16().double().T, y, reduction="sum"), hd)
    hb, wb = h.bfloat16().requires_grad_(), w.bfloat16()
    (ours,) = torch.autograd.grad(FrozenHead.apply(hb, wb, None, y, 64, 1.0, None), hb)
    (usual,) = torch.autograd.grad(torch.nn.functional.cross_entropy((hb @ wb.T).float(), y, reduction="sum"), hb)
    off = lambda x: float((x.double() - truth).norm() / truth.norm())
    assert off(ours) <= 1.1 * off(usual) < 0.01


class Largest(TorchDispatchMode):
    "Remember the largest tensor that any operation returns."
    def __init__(self): super().__init__(); self.numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tensor_has_all_tokens_times_all_words(frozen):
    head, rows, targets = torch.nn.Linear(32, 1500, bias=False).requires_grad_(not frozen), torch.randn(760, 32, requires_grad=True), torch.zeros(760, dtype=torch.long)
    with Largest() as ours:
        (FrozenHead.apply(rows, head.weight, None, targets, 16, 1.0, None) if frozen else trained_head(head, rows, targets, 16, 1.0, None)).backward()
    with Largest() as usual: torch.nn.functional.cross_entropy(head(rows), targets).backward()
    assert usual.numel == 760 * 1500 and ours.numel == 32 * 1500  # the head itself


def test_nothing_supervised_is_a_loss_of_zero():
    module, (ids, _) = built("Llama"), batch()
    loss, count = supervised_loss(module, ids, torch.full_like(ids, -100))
    assert float(loss.detach()) == 0 and count == 0 and all((g == 0).all() for g in gradients(loss, module))


def test_what_works_outside_the_layers_is_refused_by_name():
    from peft import PrefixTuningConfig, get_peft_model
    prefix = get_peft_model(MODELS["Llama"](), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(TrainingError, match="PREFIX_TUNING works outside"): body_and_head(prefix)
    activated = add_adapter(MODELS["Llama"](), dict(r=2, alora_invocation_tokens=[5, 6]))
    with pytest.raises(TrainingError, match="works outside"): body_and_head(activated)
    t5 = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(TrainingError, match="no body and head"): body_and_head(t5)
    classifier = tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZE))
    with pytest.raises(TrainingError, match="no body and head"): body_and_head(classifier)


def test_a_loss_that_differs_is_found():
    module = built("Llama")
    base = module.get_base_model()
    base.config.logits_scaling = 2.0  # the configuration speaks of a scale that this model doesn't have
    with pytest.raises(TrainingError, match="the model's own loss"): check_supervised_loss(module, list(range(3, 30)))
