"""Score 77 class names behind prompts of 60 to 100 tokens: our tree, our cache, lm-evaluation-harness, and the plain way.

    python benchmarks/label_scoring.py [--prompts 6] [--rounds 2] [--size small] [--skip plain]

Two random decoders: `small` (vocabulary 8,192, width 384, 8 layers) and `large` (151,936; 256; 6). One thread, CPU seconds
of the process around the whole call, tokenising and our self-check included, all ways in turn (A B C A B C), the median of
the rounds. `lm-eval` is HFLM of lm-eval 0.4.13 with its defaults and batches of 16 (skipped where it is not installed; it is
no dependency of ours). `plain` is batches of 16 whole texts with all their logits. The names are those of BANKING77 and the prompts are
of its test texts where ../shared/data has them, made-up words of like lengths otherwise; the tokenizer is a byte-level BPE of 8,192, trained
on the same texts. "apart" is the largest difference of a log-likelihood from the plain way's, or from lm-eval's without it.
"""
import argparse
import csv
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {"small": (8192, 384, 8, 1024), "large": (151_936, 256, 6, 704)}  # vocabulary, width, layers, feed-forward


def banking() -> tuple[list[str], list[str]]:
    "Names of classes, and texts."
    folder = ROOT.parent / "shared" / "data" / "intent"
    if folder.is_dir():
        with open(folder / "banking77_test.csv", newline="", encoding="utf-8") as f: texts = [row["text"] for row in csv.DictReader(f)]
        return [n.replace("_", " ") for n in json.loads((folder / "banking77_categories.json").read_text())], texts
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    names = sorted({" ".join(rng.choices(words[:60], k=rng.randint(1, 5))) for _ in range(90)})[:77]
    return names, [" ".join(rng.choices(words, k=rng.randint(6, 16))) for _ in range(3000)]


def train_tokenizer(texts: list[str]) -> Any:
    "A byte-level BPE that knows these texts."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8192, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                       show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", model_max_length=512)


def make_prompts(texts: list[str], tokenizer: Any, n: int) -> list[str]:
    "Texts put together until a prompt has 60 to 100 tokens."
    out, words, rng = [], (word for text in texts for word in text.split()), random.Random(0)
    while len(out) < n:
        wanted, prompt = rng.randint(60, 100), next(words)
        while len(tokenizer(prompt)["input_ids"]) < wanted: prompt += " " + next(words)
        out.append(prompt)
    return out


def plain(module: Any, tokenizer: Any, prompts: list[str], names: list[str]) -> Any:
    "Whole texts in batches of 16, with all their logits."
    import numpy as np
    import torch
    pairs = [(tokenizer(p)["input_ids"], tokenizer(f"{p} {n}")["input_ids"]) for p in prompts for n in names]
    out = []
    with torch.inference_mode():
        for i in range(0, len(pairs), 16):
            part = pairs[i:i + 16]
            batch = tokenizer.pad({"input_ids": [whole for _, whole in part]}, return_tensors="pt")
            logits = module(**batch).logits
            for (prompt, whole), row in zip(part, logits):
                steps = row[len(prompt) - 1:len(whole) - 1].log_softmax(-1)
                out.append(float(steps.gather(1, torch.tensor(whole[len(prompt):])[:, None]).double().sum()))
    return np.array(out).reshape(len(prompts), len(names))


def ways(module: Any, tokenizer: Any, names: list[str], skip: list[str]) -> dict[str, Callable[[list[str]], Any]]:
    "Each way as a function of the prompts."
    import numpy as np

    from fine_tune_llm.data.templates import label_words
    from fine_tune_llm.models.label_scoring import score_label_words
    from fine_tune_llm.models.loading import Model
    model = Model("random", "", "label-words", tokenizer, module.config, "cpu", "float32")
    def ours(way: str) -> Callable[[list[str]], Any]:
        return lambda prompts: score_label_words(model, module, prompts, names, label_words("{text}", " {label}"), way=way)
    found: dict[str, Callable[[list[str]], Any]] = {"tree (ours)": ours("auto"), "cache (ours)": ours("cache")}
    if "lm-eval" not in skip:
        try:
            from lm_eval.api.instance import Instance
            from lm_eval.models.huggingface import HFLM
        except ImportError: print("lm-eval is not installed: skipped")
        else:
            peer = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=16, max_length=512, device="cpu")
            def lm_eval(prompts: list[str]) -> Any:
                asked = [Instance("loglikelihood", {}, (p, f" {n}"), i) for p in prompts for i, n in enumerate(names)]
                return np.array([score for score, _ in peer.loglikelihood(asked, disable_tqdm=True)]).reshape(len(prompts), len(names))
            found["lm-eval"] = lm_eval
    if "plain" not in skip: found["plain"] = lambda prompts: plain(module, tokenizer, prompts, names)
    return found


def measure(size: str, prompts: int = 6, rounds: int = 2, skip: list[str] | None = None) -> dict[str, tuple[float, float, Any]]:
    "CPU seconds per prompt, distance from the plain way, and scores, by way."
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fine_tune_llm.models.label_tokens import ask_labels
    from fine_tune_llm.models.label_trie import build_trie
    torch.set_num_threads(1)
    names, texts = banking()
    tokenizer = train_tokenizer([*texts, *names])
    asked = make_prompts(texts, tokenizer, prompts)
    rows = ask_labels(asked, names, tokenizer)
    vocabulary, width, layers, inner = SIZES[size]
    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 64,
                                          num_key_value_heads=width // 64, tie_word_embeddings=True, max_position_embeddings=512)).eval()
    print(f"\n{size}: {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M weights, {len(names)} names of {sum(map(len, rows[0].answers))} tokens, "
          f"{len(build_trie(rows[0].answers))} inner nodes, {prompts} prompts of {min(len(r.prompt) for r in rows)} to {max(len(r.prompt) for r in rows)} tokens", flush=True)
    runs = ways(module, tokenizer, names, skip or [])
    for way in runs.values(): way(asked[:1])  # what is loaded or planned at first use
    spent: dict[str, list[float]] = {name: [] for name in runs}
    scores: dict[str, Any] = {}
    for _ in range(rounds):
        for name, way in runs.items():
            start = time.process_time()
            scores[name] = way(asked)
            spent[name].append((time.process_time() - start) / prompts)
    truth = scores[next(name for name in ("plain", "lm-eval", "cache (ours)") if name in scores)]
    return {name: (statistics.median(spent[name]), float(np.abs(scores[name] - truth).max()), scores[name]) for name in runs}


def table(found: dict[str, tuple[float, float, Any]]) -> str:
    "The measurements in Markdown."
    slowest = found.get("lm-eval")
    lines = ["| way | CPU ms per prompt | less CPU than lm-eval | apart |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {1000 * s:,.0f} | {f'{slowest[0] / s:.1f} x' if slowest else ''} | {apart:.1e} |" for name, (s, apart, _) in found.items()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--skip", nargs="*", default=[], choices=["lm-eval", "plain"])
    args = parser.parse_args()
    for size in [args.size] if args.size else SIZES: print(table(measure(size, args.prompts, args.rounds, args.skip)), flush=True)
