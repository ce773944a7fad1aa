"""Tiny random networks of each family: an adapter goes where the preset says, its count can be worked out by hand, and a step teaches."""
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import fine_tune_llm  # noqa: F401  before transformers, so that its hints stay muted
from fine_tune_llm.core.errors import ConfigurationError
from fine_tune_llm.models.adapters import add_adapter, describe, lora_plus_groups
from fine_tune_llm.models.devices import weight_bytes
from fine_tune_llm.models.loading import load_model, quantization
from fine_tune_llm.models.presets import PRESETS, answer_end

H, INNER, KV, V, L, R = 64, 96, 32, 96, 2, 4  # hidden, inner, key and value, vocabulary, blocks, rank
SIZES: dict[str, Any] = dict(vocab_size=V, hidden_size=H, intermediate_size=INNER, num_hidden_layers=L, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=64)
LLAMA_LIKE = 2 * (H + H) + 2 * (H + KV) + 3 * (H + INNER)  # d_in + d_out of q, o; of k, v; of gate, up, down
ATTENTION = 2 * (H + H) + 2 * (H + KV)
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {  # model_type -> (fields of its config, d_in + d_out over all targets)
    "qwen2": ({}, L * LLAMA_LIKE),
    "qwen3": (dict(head_dim=16), L * LLAMA_LIKE),
    "llama": ({}, L * LLAMA_LIKE),
    "mistral": ({}, L * LLAMA_LIKE),
    "gemma2": (dict(head_dim=16), L * LLAMA_LIKE),
    "gemma3_text": (dict(head_dim=16), L * LLAMA_LIKE),
    "phi": ({}, L * (2 * (H + H) + 2 * (H + KV) + 2 * (H + INNER))),  # q, dense; k, v; fc1, fc2
    "phi3": (dict(pad_token_id=0), L * ((H + H + 2 * KV) + (H + H) + (H + 2 * INNER) + (INNER + H))),  # qkv; o; gate and up; down
    "glm4_moe": (dict(head_dim=16, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
                      first_k_dense_replace=1, n_group=1, topk_group=1), L * ATTENTION),  # the experts, the router, and the dense and the shared layers are left alone
}


def network(family: str, **kwargs: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **FAMILIES[family][0]), **kwargs)


def step(net: Any, rate: float = 0.01) -> tuple[float, float]:
    "Give the loss before and after one step of AdamW on one batch."
    import torch
    ids = torch.arange(24).reshape(2, 12)
    optimizer = torch.optim.AdamW(lora_plus_groups(net, rate, 1))
    losses = []
    for _ in range(2):
        loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_learns_and_its_count_is_right(family: str) -> None:
    net = network(family)
    total = sum(p.numel() for p in net.parameters())
    adapted = add_adapter(net, dict(r=R, lora_dropout=0.0))
    account = describe(adapted)
    assert account["adapter"] == account["trained"] == R * FAMILIES[family][1]
    assert account["weights"] == total + account["adapter"]
    assert account["share"] == account["trained"] / account["weights"]
    assert not any("lm_head" in n for n, p in adapted.named_parameters() if p.requires_grad)
    before, after = step(adapted)
    assert after < before


def test_the_experts_of_a_mixture_take_no_adapter() -> None:
    adapted = add_adapter(network("glm4_moe"), dict(r=R))
    assert any(".mlp.experts." in n for n, _ in adapted.named_parameters())
    assert not any("lora" in n for n, _ in adapted.named_parameters() if ".mlp." in n)


def test_the_trap_of_the_mixture_is_real() -> None:
    with pytest.raises(ConfigurationError, match="lora_dropout"): add_adapter(network("glm4_moe"), dict(r=R, target_modules="all-linear"))
    adapted = add_adapter(network("glm4_moe"), dict(r=R, target_modules="all-linear", lora_dropout=0.0))
    assert {n.split(".mlp.")[1].split(".")[0] for n, p in adapted.named_parameters() if p.requires_grad and ".mlp." in n} == {"experts", "gate"}


def test_the_vision_tower_of_gemma_is_left_alone() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    net = Gemma3ForConditionalGeneration(Gemma3Config(text_config={**SIZES, "head_dim": 16}, vision_config=vision, mm_tokens_per_image=4))
    trained = [n for n, p in add_adapter(net, dict(r=R)).named_parameters() if p.requires_grad]
    assert trained and not any("vision" in n or "projector" in n for n in trained)
    assert describe(net)["adapter"] == R * L * LLAMA_LIKE


def test_gemma_2_is_computed_eagerly() -> None:
    assert network("gemma2").config._attn_implementation == "eager"


def saved(family: str, folder: Path) -> Path:
    from transformers import AutoTokenizer
    network(family).save_pretrained(folder)
    AutoTokenizer.from_pretrained(load_model("pocket").path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_qlora_trains_on_a_processor(family: str, bits: str, tmp_path: Path) -> None:
    import torch

    from fine_tune_llm.models.loading import build_causal
    net = build_causal(load_model(saved(family, tmp_path), task="sft", quantize=bits, device="cpu"))
    kinds = {type(m).__name__ for m in net.modules()}
    assert ("Linear4bit" if bits == "nf4" else "Linear8bitLt") in kinds
    adapted = add_adapter(net, dict(r=R, lora_dropout=0.0))
    account = describe(adapted)
    assert account["adapter"] == R * FAMILIES[family][1]
    assert account["weights"] - account["adapter"] == sum(p.numel() for p in network(family).parameters())
    frozen = {n: p.data.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    before, after = step(adapted)
    assert after < before
    assert all(torch.equal(p.data, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_an_evaluation_leaves_the_gradient_alone(bits: str, tmp_path: Path) -> None:
    import torch

    from fine_tune_llm.models.loading import build_causal
    net = add_adapter(build_causal(load_model(saved("llama", tmp_path), task="sft", quantize=bits, device="cpu")), dict(r=R, lora_dropout=0.0))
    ids = torch.arange(24).reshape(2, 12)
    def gradient() -> list[Any]:
        net.train().zero_grad()
        net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for n, p in net.named_parameters() if "lora_B" in n]
    before = gradient()
    with torch.no_grad(): net.eval()(input_ids=ids)
    assert all(g.abs().max() > 0 for g in before)
    assert all(torch.equal(a, b) for a, b in zip(before, gradient()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, "nf4", "int8"])
def test_the_size_is_known_before_it_is_read(family: str, bits: str | None, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    net = network(family)
    told = weight_bytes(AutoModelForCausalLM, net.config, "float32", bits)
    net.save_pretrained(tmp_path)
    model = load_model("pocket", quantize=bits, device="cpu")
    kwargs: dict[str, Any] = dict(quantization_config=quantization(model), device_map={"": "cpu"}) if bits else {}
    there = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **kwargs)
    held = {p.data_ptr(): p for p in [*there.parameters(), *there.buffers()]}.values()
    real = sum(p.numel() * p.element_size() for p in held)
    for p in held:
        if (state := getattr(p, "quant_state", None)) is not None: real += state.absmax.nbytes + state.state2.absmax.nbytes
        if (scales := getattr(p, "SCB", None)) is not None: real += scales.nbytes
    assert abs(told - real) <= (0.005 * real if bits == "nf4" else 0)  # a last block of scales may be half full


SHIPPED = {"qwen2_5": "qwen2", "qwen3": "qwen3", "llama3": "llama", "phi3": "phi3", "gemma": "gemma2", "gemma3": "gemma3_text", "glm4moe": "glm4_moe"}

@pytest.mark.parametrize("template", SHIPPED)
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL, which holds the families' chat templates, is not installed")
def test_the_end_that_is_listed_is_the_end_that_is_written(template: str) -> None:
    import trl
    tokenizer = load_model("pocket").tokenizer
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end|>", "<|user|>", "<end_of_turn>", "</s>"]
    tokenizer.add_special_tokens({"extra_special_tokens": marks, "bos_token": "<s>"})
    assert answer_end(tokenizer) == PRESETS[SHIPPED[template]].end
