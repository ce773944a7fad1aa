"""Laws of adapters: where they start, what they count, that saving, stacking and merging change no answer, and PEFT's own LoRA+."""
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fine_tune_llm  # noqa: F401  before transformers, so that its hints stay muted
from fine_tune_llm.core.errors import ConfigurationError, ModelError
from fine_tune_llm.models.adapters import (
    METHODS,
    add_adapter,
    describe,
    load_adapter,
    lora_plus_groups,
    merge_adapter,
    rank_allocator,
    save_adapter,
    stack_adapters,
    switch_adapter,
)

SIZES: dict[str, Any] = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                             max_position_embeddings=64, pad_token_id=0)


def network(kind: str = "causal") -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "causal" else LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3))


def batch() -> dict[str, Any]:
    import torch
    return dict(input_ids=torch.arange(1, 25).reshape(2, 12))


def logits(net: Any) -> Any:
    import torch
    with torch.no_grad(): return net.eval()(**batch()).logits


def train(net: Any, steps: int = 8, seed: int = 0) -> list[float]:
    import torch
    net.train()
    torch.manual_seed(seed)
    labels = torch.tensor([0, 2]) if any("score" in n for n, _ in net.named_parameters()) else batch()["input_ids"]
    optimizer, callback, losses = torch.optim.AdamW(lora_plus_groups(net, 5e-3, 1)), rank_allocator(net), []
    for i in range(steps):
        optimizer.zero_grad()
        loss = net(**batch(), labels=labels).loss
        loss.backward()
        optimizer.step()
        if callback: callback.on_optimizer_step(None, SimpleNamespace(global_step=i), None)
        losses.append(loss.item())
    return losses


def lora(method: str, **fields: Any) -> dict[str, Any]:
    return dict(method=method) if method == "full" else dict(method=method, r=4, **fields)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_learns_returns_and_merges(method: str, kind: str, tmp_path: Path) -> None:
    import torch
    net = add_adapter(network(kind), lora(method), steps=8)
    assert torch.allclose(logits(net), logits(network(kind)), atol=1e-5)
    losses = train(net)
    assert losses[-1] < losses[0]
    before = logits(net)
    save_adapter(net, tmp_path)
    assert not [f for f in tmp_path.rglob("*") if f.suffix not in (".json", ".safetensors")]
    assert torch.allclose(logits(load_adapter(network(kind), tmp_path)), before, atol=1e-5)
    merged = merge_adapter(net)
    assert torch.allclose(logits(merged), before, atol=1e-5)
    assert not any("lora" in n for n, _ in merged.named_parameters())


@pytest.mark.parametrize("extra", [dict(), dict(use_rslora=True), dict(use_dora=True), dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})])
def test_an_adapter_of_pissa_fits_the_original_base(extra: dict[str, Any], tmp_path: Path) -> None:
    import torch
    net = add_adapter(network(), lora("pissa", **extra))
    train(net)
    save_adapter(net, tmp_path / "mine")
    back = load_adapter(network(), tmp_path / "mine")
    assert torch.allclose(logits(back), logits(net), atol=1e-5)
    with back.disable_adapter(): assert torch.equal(logits(back), logits(network()))
    net.save_pretrained(tmp_path / "raw")
    with pytest.raises(ModelError, match="changed the weights below it"): stack_adapters(network(), {"raw": tmp_path / "raw", "mine": tmp_path / "mine"})


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_rates_are_those_of_loraplus_in_peft(method: str) -> None:
    import torch
    from peft.optimizers import create_loraplus_optimizer
    net = add_adapter(network(), lora(method))
    theirs = create_loraplus_optimizer(net, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
    def rates(groups: list[dict[str, Any]], field: str) -> dict[int, float]: return {id(p): g[field] for g in groups for p in g["params"]}
    ours = lora_plus_groups(net, 1e-4, 16, weight_decay=0.1)
    assert rates(ours, "lr") == rates(theirs.param_groups, "lr")
    if method == "lora": assert rates(ours, "weight_decay") == rates(theirs.param_groups, "weight_decay")
    assert set(rates(ours, "lr")) == {id(p) for p in net.parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_new_head_has_a_rate_of_its_own(method: str) -> None:
    net = add_adapter(network("classifier"), lora(method))
    rates = {id(p): g["lr"] for g in lora_plus_groups(net, 1e-4, 1, head_learning_rate=3e-3) for p in g["params"]}
    assert [n for n, p in net.named_parameters() if rates.get(id(p)) == 3e-3] == (["score.weight"] if method == "full" else ["base_model.model.score.modules_to_save.default.weight"])


def test_adalora_ends_with_the_ranks_that_were_asked_for() -> None:
    net = add_adapter(network(), lora("adalora"), steps=20)
    targets = [m for m in net.modules() if hasattr(m, "lora_E")]
    assert all(m.lora_E["default"].numel() == 6 for m in targets)  # 1.5 times the rank
    train(net, 20)
    assert sum(int((m.lora_E["default"] != 0).sum()) for m in targets) == 4 * len(targets)


def test_stacked_corrections_add_up(tmp_path: Path) -> None:
    import torch
    weights = {}
    for seed, name in enumerate(("a", "b")):
        net = add_adapter(network("classifier"), dict(r=2 + seed, lora_dropout=0.0), seed)
        train(net, 4, seed)
        save_adapter(net, tmp_path / name)
        weights[name] = dict(merge_adapter(net).named_parameters())
    both = stack_adapters(network("classifier"), {name: tmp_path / name for name in ("a", "b")})
    assert not any(p.requires_grad for p in both.parameters())
    for name in ("b", "a"):
        assert torch.equal(logits(switch_adapter(both, name)), logits(load_adapter(network("classifier"), tmp_path / name)))
    merged, base = dict(merge_adapter(switch_adapter(both, "a", "b")).named_parameters()), dict(network("classifier").named_parameters())
    for n, w in base.items():
        if n != "score.weight": assert torch.allclose(merged[n], weights["a"][n] + weights["b"][n] - w, atol=1e-6), n
    assert torch.equal(merged["score.weight"], weights["a"]["score.weight"])  # the first one speaks


def test_the_share_is_of_all_weights() -> None:
    whole, part = describe(add_adapter(network("classifier"), dict(method="full"))), describe(add_adapter(network("classifier"), dict(r=2)))
    total = sum(p.numel() for p in network("classifier").parameters())
    assert whole["weights"] == whole["trained"] == total and whole["share"] == 1 and whole["adapter"] == 0
    assert part["weights"] == total + part["adapter"] and part["head"] == 3 * 32
    assert sum(part["places"].values()) == part["trained"] and part["blocks"] == "blocks 0 to 1"


def test_one_block_alone() -> None:
    account = describe(add_adapter(network(), dict(r=2, target_modules=["q_proj"], layers_to_transform=[1])))
    assert account["places"] == {"q_proj": 2 * (32 + 32)} and account["blocks"] == "blocks 1 to 1"


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_what_four_and_eight_bits_refuse(bits: str) -> None:
    from fine_tune_llm.models.loading import build_causal, load_model
    def base() -> Any: return build_causal(load_model("pocket", task="sft", quantize=bits, device="cpu"))
    with pytest.raises(ConfigurationError, match="without quantize"): add_adapter(base(), dict(method="full"))
    with pytest.raises(ConfigurationError, match="load the model without quantize"): add_adapter(base(), dict(method="pissa"))
    with pytest.raises(ModelError, match="rounds them again"): merge_adapter(add_adapter(base(), dict(r=2)))
