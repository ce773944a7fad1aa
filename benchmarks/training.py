"""LoRA fine-tuning of a language model on a CPU: tokens per CPU second, memory and the loss that is reached, beside transformers and TRL.

    python benchmarks/training.py --shape large --repeats 3     # vocabulary 151,936, width 256, 6 layers
    python benchmarks/training.py --shape small --repeats 3     # vocabulary 8,192, width 384, 8 layers
    python benchmarks/training.py --shape small --ladder        # what each part of ours adds
    python benchmarks/training.py --quick                       # 48 rows, one run of each: does it work at all

Each run is a process of its own and the contestants take turns (A B C A B C ...), one thread each. 200 rows with log-normal
lengths (median about 60, longest 512), the last 30 % of each supervised, in batches of 8: 25 steps for those that keep to a step
of 8 rows. Speed counts tokens that are not padding and the CPU time of the process during `train()`; for ours that includes what is
tried before step 1. Memory is the peak of the process, and its growth from the start of `train()`. The evaluation loss is that of
40 other rows after training, by the plain loss of the model. The weights are random: this compares arithmetic, not quality."""
import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {"large": dict(vocab_size=151_936, hidden_size=256, intermediate_size=704, num_hidden_layers=6),
          "small": dict(vocab_size=8_192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8)}
RATE, LORA = 1e-3, dict(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
Row = dict[str, list[int]]


def data(vocabulary: int, n: int, seed: int) -> list[Row]:
    "Draw rows whose tokens follow Zipf's law, so that there is something to learn."
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(58), 0.8, n), 8, 512).astype(int)
    rows = []
    for length in lengths:
        ids = np.minimum(rng.zipf(1.3, length) + 2, vocabulary - 1).tolist()
        rows.append(dict(input_ids=ids, labels=[-100] * (length - int(0.3 * length)) + ids[length - int(0.3 * length):]))
    return rows


def build(shape: str) -> Any:
    "Make the model with random weights, the same for all."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    size = SHAPES[shape]
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=size["hidden_size"] // 64, num_key_value_heads=size["hidden_size"] // 128,
                                        max_position_embeddings=1024, tie_word_embeddings=True, use_cache=False))


def with_adapter(model: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))


def common(folder: str) -> dict[str, Any]:
    return dict(output_dir=folder, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=RATE, lr_scheduler_type="linear",
                warmup_steps=0, report_to="none", save_strategy="no", logging_steps=1000, disable_tqdm=True, use_cpu=True, seed=0)


def hf(shape: str, rows: list[Row], folder: str, medium: bool = False) -> tuple[Any, Callable[[], Any]]:
    "transformers' Trainer with PEFT, rows padded to the longest of their batch."
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    module = with_adapter(build(shape))
    if medium: torch.set_float32_matmul_precision("medium")
    return module, Trainer(module, TrainingArguments(**common(folder), remove_unused_columns=False), train_dataset=rows,
                           data_collator=DataCollatorForSeq2Seq(tokenizer())).train


def tokenizer() -> Any:
    from fine_tune_llm.models.loading import load_model
    return load_model("pocket", device="cpu").tokenizer


def trl(shape: str, rows: list[Row], folder: str, bf16_weights: bool = False, **options: Any) -> tuple[Any, Callable[[], Any]]:
    "TRL's SFTTrainer, as it comes unless told otherwise; packed rows of 512 tokens stand for about 6 of ours, so one is a batch."
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
    model = build(shape)
    if bf16_weights: model = model.to(torch.bfloat16)
    torch.manual_seed(1)
    table = Dataset.from_list([dict(input_ids=r["input_ids"], completion_mask=[int(k != -100) for k in r["labels"]]) for r in rows])
    trainer = SFTTrainer(model, args=SFTConfig(**{**common(folder), "max_length": 512, **({"per_device_train_batch_size": 1} if options.get("packing") else {}), **options}), train_dataset=table,
                         processing_class=tokenizer(), peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"))
    return trainer.model, trainer.train


def ours(shape: str, rows: list[Row], folder: str, exact: bool = False, **changes: Any) -> tuple[Any, Callable[[], Any]]:
    from dataclasses import replace

    from transformers import TrainerCallback

    from fine_tune_llm.models.loading import Model
    from fine_tune_llm.training.causal_loop import make_causal_trainer, plan_causal
    from fine_tune_llm.training.loop import Settings
    module = with_adapter(build(shape))
    model = Model("benchmark", "", "sft", tokenizer(), module.config, "cpu", "float32")
    settings = Settings(dict(r=8), epochs=1, learning_rate=RATE, batch_size=8, warmup=0.0)
    def train() -> None:
        plan = replace(plan_causal(model, module, rows, exact), **changes)
        trainer = make_causal_trainer(model, module, rows, settings, Path(folder), TrainerCallback(), plan=plan)
        trainer.args.save_strategy = "no"
        trainer.train()
    return module, train


def rung(*parts: str) -> Callable[..., Any]:
    "Take parts of ours away, for the ladder."
    off = {part: False for part in ("selective", "apart", "lean") if part not in parts}
    if "oneDNN" in parts: return lambda *a: ours(*a, exact=True, **off)
    from fine_tune_llm.training.arithmetic import Arithmetic
    return lambda *a: ours(*a, exact=True, arithmetic=Arithmetic("float32", "highest", "for the ladder"), **off)


TRL_BEST = dict(bf16_weights=True, packing=True, gradient_checkpointing=False)
RUNS: dict[str, Callable[..., Any]] = {
    "transformers Trainer + PEFT": hf,
    "TRL": trl,
    "TRL, packing": lambda *a: trl(*a, packing=True),
    "TRL, packing, bf16 weights, no checkpointing": lambda *a: trl(*a, **TRL_BEST),
    "ours, float32": lambda *a: ours(*a, exact=True),
    "ours": ours,
    "+ packed steps": lambda *a: rung()(*a),
    "+ loss on supervised tokens": lambda *a: rung("selective")(*a),
    "+ attention within documents": lambda *a: rung("selective", "apart")(*a),
    "+ LoRA layers in one go": lambda *a: rung("selective", "apart", "lean")(*a),
    "+ oneDNN (ours, float32)": lambda *a: rung("selective", "apart", "lean", "oneDNN")(*a),
    "+ frozen weights in bfloat16 (ours)": ours}


def memory() -> tuple[float, float]:  # now and at the peak, GB
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["VmRSS"].split()[0]) / 1e6, int(told["VmHWM"].split()[0]) / 1e6


def held_out_loss(module: Any, rows: list[Row]) -> float:  # nats per supervised token
    import torch
    total, count = 0.0, 0
    module.eval()
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            logits = module(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
            count += int((labels[0, 1:] != -100).sum())
    return total / count


def one(name: str, shape: str, n: int) -> dict[str, Any]:
    "Measure one run in this process."
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch
    torch.set_num_threads(1)
    rows, others = data(SHAPES[shape]["vocab_size"], n, 0), data(SHAPES[shape]["vocab_size"], 40, 1)
    with tempfile.TemporaryDirectory() as folder:
        module, train = RUNS[name](shape, rows, folder)
        start = memory()[0]
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        began = time.process_time()
        train()
        cpu, peak = time.process_time() - began, memory()[1]
    tokens = sum(len(r["input_ids"]) for r in rows)
    return {"name": name, "cpu_s": cpu, "speed": tokens / cpu, "peak": peak, "growth": max(0.0, peak - start),
            "loss": held_out_loss(module, others)}


def roof(shape: str) -> tuple[float, float]:  # GFLOP/s in float32 and bfloat16 of a typical product of this shape
    import torch
    torch.set_num_threads(1)
    d, m = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    def rate(dtype: Any) -> float:
        a, b, times = torch.ones(640, d, dtype=dtype), torch.ones(d, 2 * m, dtype=dtype), []
        for _ in range(30):
            began = time.process_time()
            for _ in range(5): a @ b
            times.append((time.process_time() - began) / 5)
        return 2 * 640 * d * 2 * m / statistics.median(times) / 1e9
    return rate(torch.float32), rate(torch.bfloat16)


def useful(shape: str) -> float:  # GFLOP that a token needs: two passes of the body and 30 % of the head, frozen
    s = SHAPES[shape]
    d, m = s["hidden_size"], s["intermediate_size"]
    body = s["num_hidden_layers"] * (2 * d * d + 2 * d * d // 2 + 3 * d * m)
    return 4 * (body + 0.3 * d * s["vocab_size"]) / 1e9


def measure(shape: str, n: int, repeats: int, names: list[str]) -> list[dict[str, Any]]:  # medians, and all speeds
    "Measure the contestants in turns."
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    for turn in range(repeats):
        for name in names:
            done = subprocess.run([sys.executable, __file__, "--one", name, "--shape", shape, "--rows", str(n)], env=env, capture_output=True, text=True)
            if done.returncode: print(f"{name}: {(done.stderr.splitlines() or ['failed'])[-1]}", file=sys.stderr)
            else:
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{turn + 1} {name}: {runs[name][-1]['speed']:.0f} tokens per CPU s", file=sys.stderr, flush=True)
    return [{"name": name, "speeds": [x["speed"] for x in r], **{k: statistics.median(x[k] for x in r) for k in ("speed", "peak", "growth", "loss")}}
            for name, r in runs.items() if r]


def table(rows: list[dict[str, Any]], shape: str) -> str:
    "Lay the medians out as Markdown, with ratios to the first row."
    base, roofs = rows[0], roof(shape)
    lines = [f"| {shape}: {SHAPES[shape]['vocab_size']:,} tokens of vocabulary | tokens/CPU s | speed | peak GB | peak | growth GB | loss | of the bf16 roof |",
             "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['name']} | {r['speed']:.0f} | {r['speed'] / base['speed']:.1f}x | {r['peak']:.2f} | {r['peak'] / base['peak']:.0%} "
                     f"| {r['growth']:.2f} | {r['loss']:.4f} | {r['speed'] * useful(shape) / roofs[1]:.0%} |")
    spread = max((max(r["speeds"]) - min(r["speeds"])) / r["speed"] for r in rows)
    return "\n".join([*lines, "", f"Medians of {len(rows[0]['speeds'])} runs in turns, one thread; the widest spread of a row's speeds is {spread:.0%}. "
                      f"The roof is a matrix product of this shape: {roofs[0]:.0f} GFLOP/s in float32, {roofs[1]:.0f} in bfloat16."])


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--shape", choices=SHAPES, default="small")
    ask.add_argument("--rows", type=int, default=200)
    ask.add_argument("--repeats", type=int, default=3)
    ask.add_argument("--quick", action="store_true", help="48 rows, one run of each")
    ask.add_argument("--ladder", action="store_true", help="what each part of ours adds, in place of the contestants")
    ask.add_argument("--only", help="parts of names, separated by semicolons")
    ask.add_argument("--one", help=argparse.SUPPRESS)
    a = ask.parse_args()
    if a.one:
        print(json.dumps(one(a.one, a.shape, a.rows)))
        return
    n, repeats = (48, 1) if a.quick else (a.rows, a.repeats)
    ladder = [name for name in RUNS if name.startswith("+")]
    names = [name for name in RUNS if name == "transformers Trainer + PEFT" or (name in ladder) == a.ladder]
    if a.only: names = [name for name in RUNS if any(part.strip() == name or part.strip() in name and part.strip() != "ours" for part in a.only.split(";"))]
    print(table(measure(a.shape, n, repeats, names), a.shape))


if __name__ == "__main__": main()
