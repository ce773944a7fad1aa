"""What stops a model from loading is one line that says the cause and the fix, and it is said before anything is read."""
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import fine_tune_llm  # noqa: F401  before transformers, so that its hints stay muted
from fine_tune_llm.core.errors import ModelError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.models.devices import free_memory
from fine_tune_llm.models.loading import build_causal, build_classifier, load_model, locate

AB = Labels(("a", "b"))


@contextmanager
def hub() -> Iterator[str]:
    "Serve a hub on this machine that knows one gated model and no other; give its address."
    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            gated = "secret" in self.path
            self.send_response(403 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        do_GET = do_HEAD
        def log_message(self, *args: Any) -> None: pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally: server.shutdown()


def told(names: list[str], **env: str) -> list[str]:
    "Try to load models in a fresh interpreter; give what is said of each."
    code = ("import sys; from fine_tune_llm.core.errors import ModelError; from fine_tune_llm.models.loading import load_model\n"
            "for name in sys.argv[1:]:\n    try: load_model(name, device='cpu')\n    except ModelError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_gated_and_a_missing_id(tmp_path: Path) -> None:
    with hub() as address: lines = told(["me/secret", "me/nothing"], HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    assert len(lines) == 2
    assert "gated" in lines[0] and lines[0].endswith("accept the model's licence on its page and log in with `hf auth login`")
    assert "valid model identifier" in lines[1] and "check the spelling of the hub id" in lines[1]


@pytest.mark.slow
def test_no_network(tmp_path: Path) -> None:
    lines = told(["me/there"], HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    assert len(lines) == 1 and lines[0].endswith("check the network, or pass a folder that holds the model")


def test_the_hub_switched_off(tmp_path: Path) -> None:
    lines = told(["me/there"], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert len(lines) == 1 and "the hub is switched off (HF_HUB_OFFLINE)" in lines[0]


@pytest.fixture()
def copy(tmp_path: Path) -> Path:
    "Give a copy of the pocket model to damage."
    return Path(shutil.copytree(locate("pocket"), tmp_path / "mine"))


def edit(folder: Path, **fields: Any) -> Path:
    "Change fields of a model's configuration."
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def cut(folder: Path) -> None: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100_000])
def garble(folder: Path) -> None: (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
def lose(folder: Path) -> None: (folder / "model.safetensors").unlink()
def lose_part(folder: Path) -> None:
    lose(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))

@pytest.mark.parametrize("damage", [cut, garble, lose, lose_part])
def test_damaged_weights(copy: Path, damage: Any) -> None:
    damage(copy)
    with pytest.raises(ModelError, match="check that the folder holds config.json, a tokenizer and") as error: build_classifier(load_model(copy, device="cpu"), AB)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_damaged_description(copy: Path, file: str) -> None:
    (copy / file).write_text('{"model_type": "lla')
    with pytest.raises(ModelError, match="check that the folder holds"): load_model(copy, device="cpu")


def test_weights_of_another_configuration(copy: Path) -> None:
    with pytest.raises(ModelError, match="lack 9 of the layers' tensors"): build_causal(load_model(edit(copy, num_hidden_layers=5), task="sft", device="cpu"))


def test_weights_that_cannot_fit_are_not_read(copy: Path) -> None:
    lose(copy)  # what is not there cannot be read
    layer = 4 * 4096 * 4096 + 3 * 4096 * 16384  # weights of a block
    deep = int(3 * free_memory("cpu") / (4 * layer))  # three times the free memory in float32, two fifths of it in four bits
    edit(copy, hidden_size=4096, intermediate_size=16384, num_hidden_layers=max(deep, 1), num_attention_heads=32, num_key_value_heads=32, head_dim=128)
    with pytest.raises(ModelError, match=r"take \d+(\.\d+)? GB with dtype='float32', and .* are free on cpu") as error: build_causal(load_model(copy, task="sft", device="cpu"))
    assert error.value.fix.startswith("pass quantize='nf4', which needs")
    with pytest.raises(ModelError, match="check that the folder holds"): build_causal(load_model(copy, task="sft", quantize="nf4", device="cpu"))
    edit(copy, hidden_size=65536, intermediate_size=262144, num_attention_heads=512, num_key_value_heads=512)  # 256 times as many
    with pytest.raises(ModelError, match="take a smaller model"): build_causal(load_model(copy, task="sft", quantize="nf4", device="cpu"))


@pytest.mark.parametrize("config, task, fix", [
    (dict(model_type="bert"), "sft", "pass task='classification'"),
    (dict(model_type="bert"), "label-words", "pass task='classification'"),
    (dict(model_type="t5"), "sft", "pass task='classification'"),
    (dict(model_type="glm4_moe"), "classification", "pass task='label-words'"),
])
def test_a_network_for_another_task(copy: Path, config: dict[str, Any], task: str, fix: str) -> None:
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=fix): load_model(copy, task=task, device="cpu")


def test_code_of_others_is_not_run(copy: Path) -> None:
    (copy / "strange.py").write_text(f"open({str(copy / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Strange(LlamaConfig): model_type = 'strange'\n")
    edit(copy, model_type="strange", auto_map={"AutoConfig": "strange.Strange"})
    with pytest.raises(ModelError, match="read the model's code, then pass trust_remote_code=True"): load_model(copy, device="cpu")
    assert not (copy / "ran").exists()


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="no device 'tpu' on this machine"): load_model("pocket", device="tpu")


def test_checkpointing_changes_no_gradient() -> None:
    import torch

    from fine_tune_llm.models.adapters import add_adapter
    grads = []
    for way in (True, False):
        net = add_adapter(build_causal(load_model("pocket", task="sft", device="cpu", checkpointing=way)), dict(r=2, lora_dropout=0.0)).train()
        ids = torch.arange(3, 35).reshape(2, 16)
        net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in net.named_parameters() if p.requires_grad})
    assert all(torch.allclose(g, grads[1][n], atol=1e-7) for n, g in grads[0].items()) and any(g.abs().max() > 0 for g in grads[0].values())
