"""The examples: each file passes the real loader without a network, the first runs from the file to the bundle, the last fits its card."""
import csv
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import yaml

from fine_tune_llm.apps.bundle import load_bundle
from fine_tune_llm.apps.pipeline import run_pipeline
from fine_tune_llm.apps.plans import described_machine, step_need
from fine_tune_llm.core.config import load_config
from fine_tune_llm.core.errors import ConfigurationError
from fine_tune_llm.models.loading import load_model, locate
from fine_tune_llm.uncertainty.certificates import least_answers

EXAMPLES = Path(__file__).parents[1]/"examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
WORDS = "morning evening street garden window river letter kitchen market school bridge forest station harbour tower".split()

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "Nothing here may reach for a network."
    def refuse(*args, **how): raise AssertionError("an example reached for the network")
    for name in ("connect", "connect_ex"): monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("FTLLM_ENV", "HF_TOKEN"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_three_are_there():
    assert [f.name for f in FILES] == ["classification.yaml", "qlora_7b.yaml", "sft.yaml"] and (EXAMPLES/"Dockerfile").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_each_passes_the_loader_and_says_why(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    shutil.copy(path, tmp_path)
    (tmp_path/raw["data"]["path"]).touch()
    config = load_config(tmp_path/path.name, environ={})
    assert Path(config.data.path) == (tmp_path/raw["data"]["path"]).resolve()
    said = {s.key: s.source for s in config.explain()}
    assert all(said[f"{section}.{key}"].startswith(f"{path.name}:") for section in raw for key in raw[section] if key != "lora")
    lines = [line for line in text.splitlines() if ":" in line and not line.lstrip().startswith("#")]
    assert sum("#" in line for line in lines) > len(lines) / 4, "an example is there for its comments"


def test_a_slip_in_an_example_is_named(tmp_path):
    (tmp_path/"slip.yaml").write_text((EXAMPLES/"sft.yaml").read_text().replace("max_length:", "max_lenght:"))
    with pytest.raises(ConfigurationError, match=r"training.max_lenght is no setting \(slip.yaml:\d+\), training.max_length is"):
        load_config(tmp_path/"slip.yaml", environ={})


def test_free_answers_are_for_train_alone():
    config = load_config(EXAMPLES/"sft.yaml", environ={})
    with pytest.raises(ConfigurationError, match="fine-tune-llm train"): run_pipeline(config)


def test_the_classifier_runs_from_file_to_bundle(tmp_path):
    "The example as it stands, beside a file of 210 rows; only the number of epochs is less."
    rng = Random(0)
    rows = [(f"{a} and {b} in the {w}", w, rng.choice(["web", "phone"])) for w in ("rain", "sun") for i, a in enumerate(WORDS) for b in WORDS[:i]]
    with (tmp_path/"tickets.csv").open("w", newline="") as f: csv.writer(f).writerows([("text", "label", "channel"), *rows])
    shutil.copy(EXAMPLES/"classification.yaml", tmp_path)
    config = load_config(tmp_path/"classification.yaml", "training.epochs=2", "model.device=cpu", "model.dtype=float32", f"out={tmp_path/'run'}", environ={})
    outcome = run_pipeline(config, progress=False)
    assert outcome.run.state == "finished" and {r.column for r in outcome.report.rows} == {"channel"}
    assert outcome.sets.alpha == config.trust.alpha and outcome.run.events("evaluated")
    answer = load_bundle(outcome.bundle)("letter and river in the sun")
    assert answer.best_guess in ("rain", "sun") and 0.5 <= answer.confidence <= 1


def test_seven_billion_weights_fit_the_card(tmp_path):
    "A network of the shape of Qwen2.5-7B, planned without weights: under 24 GB, and the 7 GB that the comment says."
    from transformers import Qwen2Config
    for part in Path(locate("pocket")).iterdir():
        if "token" in part.name: shutil.copy(part, tmp_path)
    Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    config = load_config(EXAMPLES/"qlora_7b.yaml", environ={})
    t = config.training
    model = replace(load_model(**{**config.model.model_dump(), "name": str(tmp_path), "device": "cpu"}), device="cuda")
    need = step_need(model, t.batch_size // t.accumulate, t.max_length, t.lora)
    assert need.total < described_machine(24).memory and round(need.total / 1e9) == 7
    # by hand: half a byte for each of the 6.5 billion weights in the blocks and the scale of each 64, two bytes for those of the embedding and the head
    block = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert need.weights == pytest.approx(28 * block * (0.5 + 0.02) + 2 * 152064 * 3584 * 2, rel=0.03)
    sides = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)  # rows and columns of the seven layers that carry an adapter
    assert need.trained == 28 * 16 * sides


def test_the_row_counts_in_the_comments():
    text = (EXAMPLES/"classification.yaml").read_text(encoding="utf-8")
    said = int(re.search(r"needs about (\d+) calibration rows", text)[1])
    assert said == least_answers(0.05, 0.05 / 5)  # five starts share delta


def test_the_image_is_for_cpus_and_for_a_user_without_rights():
    text = (EXAMPLES/"Dockerfile").read_text(encoding="utf-8")
    steps = re.findall(r"^([A-Z]+) (.+)$", text, re.M)
    kinds = [k for k, _ in steps]
    assert kinds[0] == "FROM" and re.search(r"python:3\.1[0-3]", steps[0][1])
    assert kinds.index("USER") < kinds.index("ENTRYPOINT") and dict(steps)["USER"] not in ("root", "0")
    torch, package = text.index("grep '^torch=='"), text.index("pip install --no-cache-dir /src")
    assert torch < package
    copied = [name for kind, rest in steps if kind == "COPY" for name in rest.split()[:-1]]
    assert all((EXAMPLES.parent/name).exists() for name in copied) and {"setup.py", "settings.ini", "fine_tune_llm"} <= set(copied)
