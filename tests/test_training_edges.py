"""What the training floor says about settings and failures at the edge of what it takes."""
from pathlib import Path

import pytest

from fine_tune_llm.core.errors import TrainingError
from fine_tune_llm.core.runs import Run
from fine_tune_llm.data.loading import load_data
from fine_tune_llm.models.loading import load_model
from fine_tune_llm.training.loop import Settings
from fine_tune_llm.training.margins import answer_logprobs
from fine_tune_llm.training.recipes import PreferenceSettings
from fine_tune_llm.training.sitting import note_failure
from fine_tune_llm.training.sweeps import run_trial
from fine_tune_llm.training.tasks import check_task
from fine_tune_llm.uncertainty.metrics import nll

@pytest.mark.parametrize("name,value", [("weight_decay", -0.1), ("weight_decay", float("nan")), ("weight_decay", float("inf")), ("warmup", -0.1), ("warmup", 1.0)])
def test_dials_out_of_range_are_refused_before_a_run(name: str, value: float) -> None:
    "Both kinds of settings refuse what the configuration refuses; the limits themselves pass."
    for kind in (Settings, PreferenceSettings):
        with pytest.raises(TrainingError, match=f"{name} must be"): kind(**{name: value})  # type: ignore[arg-type]
        assert getattr(kind(**{name: 0.0}), name) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("processes,fits", [(1, True), (2, True), (3, False), (8, False)])
def test_a_step_is_shared_evenly(processes: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    "Four rows in two pieces: one process or two; three would take one row each, and the run would be another."
    model = load_model("pocket", device="cpu")
    data = load_data([{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)])
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if fits: return check_task(model, data, Settings(batch_size=4, accumulate=2))
    with pytest.raises(TrainingError, match=rf"4 rows cannot pass in 2 equal pieces through {processes} processes.*batch_size that {2 * processes} divides"):
        check_task(model, data, Settings(batch_size=4, accumulate=2))


def test_a_failure_that_is_written_down_holds_no_piece_of_a_token(tmp_path: Path) -> None:
    "The token lies across the place where the message is cut: it is redacted first."
    token = "hf_" + "a1B2" * 9
    def fail(most: int) -> None: raise OSError("x" * (most - 20) + f" {token}")
    run = Run.create(tmp_path / "run")
    try: fail(500)
    except OSError as e: note_failure(run, {}, e)
    run_trial(lambda **point: fail(300), lambda run: run, nll, {}, tmp_path / "trial", 1)  # type: ignore[arg-type,return-value]
    for file in (tmp_path / "run/events.jsonl", tmp_path / "trial/trial.json"):
        assert "OSError: xx" in file.read_text() and "hf_" not in file.read_text()


def test_answers_of_a_model_whose_text_settings_lie_one_level_down() -> None:
    "Gemma 3 of 4 billion weights and more is such a model; the sum is that of its own log softmax."
    import torch
    from transformers import AutoModelForCausalLM, Gemma3Config
    text = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    sight = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    module = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=sight)).eval()
    assert not hasattr(module.config, "vocab_size")
    found = answer_logprobs(module, [[1, 2, 3], [9]], [[4, 5], [7, 8, 6]])
    for prompt, answer, value in (([1, 2, 3], [4, 5], found[0]), ([9], [7, 8, 6], found[1])):
        with torch.inference_mode(): said = module(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        assert abs(value - sum(float(said[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))) < 1e-4
