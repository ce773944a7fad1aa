"""A classifier on a table of texts: our finetune beside transformers' Trainer with PEFT, the same epochs, rates and ranks.

    python benchmarks/classification.py --model FOLDER --train banking77_train.csv.gz --test banking77_test.csv [--label category]

Each training runs in a fresh process, ours and theirs by turns, on `--threads` threads, with the same adapter (rank 16, every
linear layer), the same two learning rates, the same rows and batches of 32. Theirs draws rows at random and pads each batch to its
longest row, as Trainer does by default; ours lets rows of like length share a batch. Ours also validates after each epoch, writes
checkpoints and loads the weights, all of which is counted against it. CPU seconds of training; accuracy on the test rows, which decide nothing here.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def run(who: str, a: argparse.Namespace) -> dict:
    "Train once, in this process."
    import numpy as np
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    import fine_tune_llm as ft
    from fine_tune_llm.models.adapters import add_adapter
    from fine_tune_llm.models.loading import build_classifier, quiet
    from fine_tune_llm.models.scoring import encode, score_texts
    from fine_tune_llm.training.loop import Settings, parameter_groups
    torch.set_num_threads(a.threads)
    data = ft.load_data(a.train, label=a.label, test=a.test, sizes=(0.88, 0.04, 0.08, 0))
    model, settings = ft.load_model(a.model, device="cpu"), Settings({"r": 16}, epochs=a.epochs, learning_rate=1e-3)
    with quiet(): module = add_adapter(build_classifier(model, data.labels, 0), settings.lora, 0)
    ids, _ = encode(model, data.train.texts)
    rows = [{"input_ids": i, "labels": int(k)} for i, k in zip(ids, data.train.y)]
    steps = -(-len(rows) // 32) * a.epochs
    args = TrainingArguments(tempfile.mkdtemp(), num_train_epochs=a.epochs, per_device_train_batch_size=32, lr_scheduler_type="linear", warmup_steps=0.06,
                             use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=10**6, remove_unused_columns=False, seed=0)
    if who == "ours":
        with tempfile.TemporaryDirectory() as folder:
            start, wall = time.process_time(), time.perf_counter()
            trained = ft.finetune(model, data, lora={"r": 16}, epochs=a.epochs, learning_rate=1e-3, out=Path(folder) / "run", progress=False)
            spent, took = time.process_time() - start, time.perf_counter() - wall
            logits = trained.score(data.test.texts)
    else:
        optimizer = torch.optim.AdamW(parameter_groups(module, settings))
        from transformers import get_linear_schedule_with_warmup
        trainer = Trainer(module, args, train_dataset=rows, data_collator=DataCollatorWithPadding(model.tokenizer),
                          optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, int(0.06 * steps), steps)))
        start, wall = time.process_time(), time.perf_counter()
        trainer.train()
        spent, took = time.process_time() - start, time.perf_counter() - wall
        logits = score_texts(model, module, data.test.texts)
    return {"who": who, "cpu_s": spent, "wall_s": took, "accuracy": float((np.asarray(logits).argmax(1) == data.test.y).mean()), "rows": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("--model", "--train", "--test"): parser.add_argument(name, required=True)
    parser.add_argument("--label", default="category")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--who", choices=("ours", "trainer"))
    a = parser.parse_args()
    if a.who: return print(json.dumps(run(a.who, a)))
    print("| | CPU s | wall s | test accuracy | train rows |\n|---|---|---|---|---|")
    for _ in range(a.repeats):
        for who in ("ours", "trainer"):
            done = subprocess.run([sys.executable, *sys.argv, "--who", who], capture_output=True, text=True)
            if done.returncode: sys.exit(done.stderr[-2000:])
            r = json.loads(done.stdout.splitlines()[-1])
            print(f"| {who} | {r['cpu_s']:.0f} | {r['wall_s']:.0f} | {r['accuracy']:.3f} | {r['rows']:,} |", flush=True)


if __name__ == "__main__": main()
