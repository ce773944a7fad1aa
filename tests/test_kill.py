"""Kill tests: whatever moment a training dies at, its folder is readable, loses no saved step, and goes on to the same end."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import trainings as t

from fine_tune_llm.core.runs import Run
from fine_tune_llm.training.checkpoints import last_checkpoint

OPTIONS = dict(lora=dict(r=4, lora_dropout=0.1), epochs=3, learning_rate=5e-3, batch_size=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(t.tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory) -> bytes:
    "The adapter of a run that nobody disturbed."
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert t.finish(base, str(out), OPTIONS) == ""
    return t.adapter(out)


def check(out: Path) -> tuple[int, int]:
    "What must hold after every kill; the newest good step, and the newest that the events acknowledge."
    run = Run.attach(out)
    assert run.verify().n == len(run.events()) and run.lives() is not True
    saved = max((e["step"] for e in run.events("checkpoint_saved")), default=0)
    place, _ = last_checkpoint(out / "checkpoints")
    good = int(place.name[5:]) if place else 0
    assert good >= saved and run.state in ("created", "running")
    return good, saved


@pytest.mark.slow
def test_killed_at_twenty_random_moments(base: str, tmp_path: Path) -> None:
    "One run, killed again and again; each time it goes on from where it was, and at last it ends with the very same adapter."
    out, rng, kills, begun, options = tmp_path / "run", random.Random(0), 0, [], {**OPTIONS, "epochs": 20}  # 240 steps, saved every 24
    assert t.finish(base, str(tmp_path / "whole"), options) == ""
    while kills < 20:
        fresh = not (out / "fingerprint.json").exists()
        if fresh and out.exists(): shutil.rmtree(out)
        process = t.start(base, str(out), options, resume=not fresh)
        seen = len(Run.attach(out).events()) if not fresh else 0
        if rng.random() < 0.8:  # while it trains; else at any moment, also before
            target = seen + rng.randint(1, 6)
            t.until(process, lambda target=target: (out / "events.jsonl").exists() and len(Run.attach(out).events()) >= target)
        process.join(rng.uniform(0, 0.1))
        if not t.kill(process): break
        kills += 1
        if (out / "events.jsonl").exists(): begun.append(check(out))
    if (out / "fingerprint.json").exists() and Run.attach(out).state != "finished": assert t.finish(base, str(out), options, resume=True) == ""
    run = Run.attach(out)
    assert kills == 20 and run.state == "finished" and run.verify().torn == 0 and t.adapter(out) == t.adapter(tmp_path / "whole")
    starts = [e["step"] for e in run.events("run_started")]
    assert starts == sorted(starts) and [g for g, _ in begun] == sorted(g for g, _ in begun)


WITHIN = ["half an optimizer file", "before the manifest", "after the manifest", "between two renames", "while old ones are removed", "half an event"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", WITHIN)
def test_killed_within_a_checkpoint(base: str, whole: bytes, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "run"
    process = t.start(base, str(out), OPTIONS, hook="hold_" + moment.replace(" ", "_"))
    t.until(process, lambda: (tmp_path / "held").exists())
    assert t.kill(process)
    good, saved = check(out)
    assert good >= 4, "the second checkpoint was being written, and the first is there"
    assert t.finish(base, str(out), OPTIONS, resume=True) == ""
    run = Run.attach(out)
    assert run.events("run_started")[-1]["step"] == good and run.verify().torn == 0 and t.adapter(out) == whole
    if moment == "half an event": assert any("torn line" in e["message"] for e in run.events("warning"))
    assert not list((out / "checkpoints").glob(".work/checkpoint-*"))


@pytest.mark.parametrize("what", ["torch.save", "manifest", "the adapter"])
def test_a_full_disk_leaves_the_last_good_checkpoint(base: str, whole: bytes, tmp_path: Path, what: str) -> None:
    out = tmp_path / "run"
    error = t.finish(base, str(out), OPTIONS, hook="full_" + what.split()[-1].replace(".", "_"))
    run = Run.attach(out)
    good, _ = last_checkpoint(out / "checkpoints")
    assert "could not be written: the disk is full" in error and good and f"goes on from {good.name}" in error
    assert run.state == "failed" and "the disk is full" in str(run.status) and run.verify().torn == 0
    assert not list((out / "checkpoints").glob(".work/*")), "the draft still takes room"
    assert t.finish(base, str(out), OPTIONS, resume=True) == "" if Path(f"{out}.error").unlink() is None else None
    assert Run.attach(out).state == "finished" and t.adapter(out) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(base: str, whole: bytes, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    process = t.start(base, str(out), OPTIONS)
    t.until(process, lambda: t.steps(out) >= 5)
    os.kill(process.pid, number)
    process.join(60)
    run = Run.attach(out)
    last = run.events()[-1]
    assert process.exitcode == 0 and run.state == "stopped" and last["step"] == t.steps(out)
    assert last_checkpoint(out / "checkpoints")[0] == out / last["checkpoint"]
    assert t.finish(base, str(out), OPTIONS, resume=True) == "" and t.adapter(out) == whole


@pytest.mark.slow
def test_a_kernel_interrupt_finishes_the_step_and_saves(base: str, tmp_path: Path) -> None:
    "What the stop button of a notebook sends, to a real kernel."
    from jupyter_client.manager import KernelManager
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(Path(__file__).parent))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(60)
        out = tmp_path / "run"
        client.execute(f"import sys; sys.path.insert(0, '.'); import trainings as t; t.train({base!r}, {str(out)!r}, dict(lora=dict(r=4), epochs=400, batch_size=4))")
        end = time.monotonic() + 90
        while t.steps(out) < 5: assert time.monotonic() < end
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)
        run = Run.attach(out)
        assert reply["content"]["status"] == "ok" and run.state == "stopped"
        assert last_checkpoint(out / "checkpoints")[0] == out / run.events()[-1]["checkpoint"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


MEMORY = """
import gc, sys
import trainings as t
import torch
from pathlib import Path
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from fine_tune_llm.core.errors import TrainingError
from fine_tune_llm.data.loading import load_data
from fine_tune_llm.models.loading import load_model
from fine_tune_llm.training.trainer import finetune
torch.set_num_threads(1)
home = Path(sys.argv[1])
def rss(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
data = load_data(t.weather(), sizes=(0.5, 0.2, 0.15, 0.15), near=None)
def run(name, base, **more):
    return finetune(load_model(base, device="cpu"), data, lora=dict(r=4), epochs=1, batch_size=16, out=home / name, progress=False, **more)
run("warm", sys.argv[2]).close()
before = rss()
background = run("big", str(home / "model"), background=True)
background.wait()
during = rss()
background.close()
after = rss()
try: run("failed", str(home / "model"), learning_rate=1e38)
except TrainingError: pass
print(before, during, after, background.box, "thread" in background.box)
"""


@pytest.mark.slow
def test_closing_gives_the_memory_back(base: str, tmp_path: Path) -> None:
    "A model of 33 million weights, 130 MB; the resident size is that of before, within a tenth."
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    tokens = AutoTokenizer.from_pretrained(base)
    config = LlamaConfig(vocab_size=len(tokens), hidden_size=768, intermediate_size=2048, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8,
                         max_position_embeddings=64, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokens.save_pretrained(tmp_path / "model")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), base], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, during, after = map(float, done.stdout.split()[:3])
    assert during > before + 100 and after < 1.1 * before, done.stdout


def test_a_second_trainer_is_kept_out(base: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = t.start(base, str(out), {**OPTIONS, "epochs": 200})
    t.until(first, lambda: t.steps(out) >= 2)
    assert "another trainer is at work here" in t.finish(base, str(out), {**OPTIONS, "epochs": 200}, resume=True)
    assert Run.attach(out).lives()
    t.kill(first)
    assert Run.attach(out).verify() and Run.attach(out).wait(timeout=30) == "running" and not Run.attach(out).lives()


def test_what_was_set_before_the_crash_is_set_again(base: str, tmp_path: Path) -> None:
    "The rate is halved after the last checkpoint, and the trainer killed: the resumed run halves it at the same step."
    out, twin, slow = tmp_path / "run", tmp_path / "twin", {**OPTIONS, "epochs": 2}  # 24 steps, saved every 3
    def obeyed(path: Path) -> list[dict]: return Run.attach(path).events("command_applied") if (path / "events.jsonl").exists() else []
    process = t.start(base, str(out), slow, hook="set_after_checkpoint")
    t.until(process, lambda: obeyed(out) and t.steps(out) > obeyed(out)[0]["step"])
    t.kill(process)
    first = obeyed(out)[0]
    good, _ = check(out)
    assert t.finish(base, str(out), slow, resume=True) == ""
    again = [e for e in obeyed(out) if e.get("again")]
    if good < first["step"]: assert [(e["id"], e["step"], e["learning_rate"]) for e in again] == [(first["id"], first["step"], first["learning_rate"])]
    assert t.finish(base, str(twin), slow, hook="set_after_checkpoint") == ""
    assert obeyed(twin)[0]["step"] == first["step"] and t.adapter(twin) == t.adapter(out)


def test_commands_to_a_dead_trainer_are_refused(base: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = t.start(base, str(out), OPTIONS)
    t.until(process, lambda: t.steps(out) >= 5)
    t.kill(process)
    key = Run.attach(out).stop()
    assert t.finish(base, str(out), OPTIONS, resume=True) == ""
    run = Run.attach(out)
    assert run.state == "finished" and [e["reason"] for e in run.events("command_refused") if e["id"] == key] == ["no trainer was at work when this was asked"]
    assert json.loads((out / "trainer.lock").read_text())["pid"] != process.pid
