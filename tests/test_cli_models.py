"""The commands for models through the real program: one small run, and what a person does with it; and everything that can be named wrongly."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).with_name("fine-tune-llm")
PROGRAM = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-c", "from fine_tune_llm.apps.cli import main; main()"]
WORDS = "morning evening street garden window river letter kitchen market school bridge forest station harbour tower".split()


def shell(*args: object, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess:
    import fine_tune_llm
    path = os.pathsep.join([str(Path(fine_tune_llm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([*PROGRAM, *map(str, args)], capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": path, **environ})


def refused(done: subprocess.CompletedProcess, *words: str, code: int = 1) -> None:
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    for word in words: assert word in done.stderr, done.stderr
    if code == 1: assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as f: csv.writer(f).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    "A folder with a finished run of a small classifier, and rows that it has never seen."
    home = tmp_path_factory.mktemp("models")
    write(home / "weather.csv", [(f"{a} and {b} in the {w}", w) for w in ("rain", "sun") for i, a in enumerate(WORDS) for b in WORDS[:i]])
    write(home / "fresh.csv", [(f"the {a} under a {w}", w) for w in ("rain", "sun") for a in WORDS * 2][:40])
    (home / "run.yaml").write_text("data: {path: weather.csv}\nmodel: {device: cpu, dtype: float32}\ntraining: {epochs: 3, batch_size: 16, learning_rate: 0.003, lora: {r: 4}}\ntrust: {abstain_cost: 0.3}\n")
    done = shell("run", home / "run.yaml", "--out", home / "run", "training.epochs=4")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return home


def test_dry_run_reads_no_weights(home, tmp_path):
    (tmp_path / "model").mkdir()
    from fine_tune_llm.models.loading import locate
    for part in Path(locate("pocket")).iterdir():
        if part.suffix != ".safetensors": (tmp_path / "model" / part.name).write_bytes(part.read_bytes())
    done = shell("run", home / "run.yaml", f"model.name={tmp_path / 'model'}", "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    train = len([1 for _ in (home / "weather.csv").open()]) - 1 - sum(plan["splits"][s] for s in ("validation", "calibration", "test"))
    assert done.returncode == 0 and plan["splits"]["train"] == train and plan["steps"] == 3 * -(-train // 16) and plan["seconds"] > 0
    assert plan["need"]["trained"] > 0 and plan["fits"] and sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_evaluate_on_new_rows(home, tmp_path):
    done = shell("evaluate", home / "run", home / "fresh.csv", "--json", "--out", tmp_path / "p.parquet")
    report = json.loads(done.stdout)
    assert done.returncode == {"pass": 0, "fail": 1, "not enough evidence": 3}[report["verdict"]] and done.stderr == ""
    from fine_tune_llm.uncertainty.predictions import Predictions
    p = Predictions.load(tmp_path / "p.parquet")
    assert len(p) == 40 and len(p.seen["training"]) > 100 and p.probs is not None


def test_compare_a_run_with_what_it_was(home):
    raw = home / "run" / "predictions" / "test.parquet"
    done = shell("compare", raw, home / "run", "--json", "--metric", "accuracy")
    rows = json.loads(done.stdout)["rows"]
    assert done.returncode == 0 and [r["system"] for r in rows] == ["test.parquet", "run"]
    assert rows[0]["gap"] is None and rows[1]["gap"] == 0 and rows[1]["verdict"] == "not shown"  # a temperature moves no answer


def test_merge_export_and_push(home):
    merged = shell("merge", home / "run", home / "merged", "--json")
    found = json.loads(merged.stdout)
    assert merged.returncode == 0 and found["verdict"] in ("same", "recalibrate") and (home / "merged" / "model.safetensors").exists()
    ready = shell("export", home / "merged", "--json")
    assert ready.returncode == 0 and json.loads(ready.stdout)["prompts"] == 0 and (home / "merged" / "SERVING.md").exists()
    listed = shell("push", home / "merged", "me/weather", "--dry-run", "--json", HF_TOKEN="hf_" + "Zq9" * 12)
    assert listed.returncode == 0 and "model.safetensors" in json.loads(listed.stdout)["files"] and json.loads(listed.stdout)["url"] == ""
    assert "Zq9" not in listed.stdout + listed.stderr + (home / "merged" / "README.md").read_text()


def test_cheap_mistakes(tmp_path):
    refused(shell("train"), "no configuration")
    refused(shell("train", tmp_path / "gone.yaml"), "gone.yaml")
    refused(shell("train", "--resume", tmp_path), "config.yaml")
    refused(shell("evaluate", tmp_path), "Missing argument", code=2)
    refused(shell("compare"), "Missing argument", code=2)
    refused(shell("recommend", "x.csv", "--batch-size", 0), "batch-size", code=2)
    refused(shell("push", tmp_path, "no-slash", "--dry-run"), "owner/name")


@pytest.mark.slow
@pytest.mark.parametrize("args,words", [
    (("evaluate", "{t}", "{h}/fresh.csv"), ["no bundle here"]), (("evaluate", "{h}/run", "{t}/gone.csv"), ["gone.csv"]),
    (("evaluate", "{h}/run", "{h}/weather.csv"), ["already used"]), (("evaluate", "{h}/run", "{t}/other.csv"), ["snow"]),
    (("merge", "{t}", "{t}/m"), ["no run folder"]), (("merge", "{h}/run", "{t}/m", "--dtype", "int3"), ["int3"]),
    (("merge", "{h}/run", "{h}"), ["the folder exists"]),
    (("merge", "{h}/run", "{t}/m", "--probe", "{t}/gone.csv"), ["gone.csv"]), (("export", "{t}"), ["no model here"]),
    (("export", "{t}", "--template", "chat"), ["belong together"]), (("push", "{t}", "me/it", "--dry-run"), ["no model here"]),
    (("compare", "{h}/run", "{h}/run"), ["different systems"]), (("compare", "{h}/run", "{t}/other.csv"), ["cannot read predictions"]),
    (("recommend", "{h}/weather.csv", "--memory", "-3"), ["no memory"]), (("recommend", "{h}/weather.csv", "--memory", "9", "--device", "tpu"), ["tpu"]),
    (("recommend", "{h}/weather.csv", "--model", "{t}/gone/x/y"), ["no folder"]), (("recommend", "{h}/weather.csv", "--task", "dance"), ["dance"]),
    (("run", "{h}/run.yaml", "model.task=sft"), ["free answers", "train"]), (("train", "{h}/run.yaml", "--dry-run", "data.path={t}/gone.csv"), ["gone.csv"]),
    (("train", "{h}/run.yaml", "--dry-run", "training.lora={{rr: 3}}"), ["rr"])], ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_dear_mistakes(home, tmp_path, args, words):
    write(tmp_path / "other.csv", [("a b c", "snow"), ("d e f", "rain")])
    refused(shell(*(a.format(h=home, t=tmp_path) for a in args), cwd=tmp_path), *words)


@pytest.mark.slow
def test_train_alone_and_resume_nothing(home, tmp_path):
    rows = [json.dumps({"prompt": f"What follows {i}?", "completion": f"{i + 1} follows."}) for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    (tmp_path / "sft.yaml").write_text("data: {path: chats.jsonl}\nmodel: {task: sft, device: cpu, dtype: float32}\ntraining: {epochs: 1, batch_size: 8, max_length: 64}\n")
    plan = shell("train", tmp_path / "sft.yaml", "--dry-run", "--json")
    assert plan.returncode == 0 and json.loads(plan.stdout)["classes"] == 0, plan.stderr
    done = shell("train", tmp_path / "sft.yaml", "--out", tmp_path / "run", "--json")
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and told["state"] == "finished" and (Path(told["adapter"]) / "adapter_model.safetensors").exists()
    assert told["step"] == json.loads(plan.stdout)["steps"]
    (tmp_path / "probe.csv").write_text("text\nWhat follows 3?\nWhat follows 9?\n")
    merged = shell("merge", tmp_path / "run", tmp_path / "merged", "--probe", tmp_path / "probe.csv", "--json")
    assert json.loads(merged.stdout)["unit"] == "token", merged.stderr


@pytest.mark.slow
@pytest.mark.parametrize("hidden,layers,rows,length,checkpointing", [(768, 8, 16, 128, False), (512, 6, 24, 112, False)])
def test_predicted_memory_is_measured(tmp_path, hidden, layers, rows, length, checkpointing):
    "A random network of some size, planned and then trained in a process of its own, whose peak the system reports."
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fine_tune_llm.models.loading import locate
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(locate("pocket")).save_pretrained(tmp_path / "model")
    text = " ".join(WORDS * 12)
    write(tmp_path / "long.csv", [(f"{a} {i} {text}", "ab"[i % 2]) for i, a in enumerate(WORDS * 7)])
    (tmp_path / "run.yaml").write_text(f"data: {{path: long.csv}}\nmodel: {{name: model, device: cpu, dtype: float32, checkpointing: {str(checkpointing).lower()}}}\n"
                                       f"training: {{epochs: 1, batch_size: {rows}, max_length: {length}, lora: {{r: 16}}}}\n")
    plan = json.loads(shell("train", tmp_path / "run.yaml", "--dry-run", "--json").stdout)
    code = "import resource, sys; from fine_tune_llm.apps.cli import app; app(sys.argv[1:], standalone_mode=False); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    done = subprocess.run([sys.executable, "-c", code, "train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")], capture_output=True, text=True)
    measured = int(done.stdout.split()[-1])
    print(f"predicted {plan['peak'] / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, of which before {plan['machine']['held'] / 1e6:.0f}, ratio {plan['peak'] / measured:.3f}, need {plan['need']}")
    assert 0.8 <= plan["peak"] / measured <= 1.2
