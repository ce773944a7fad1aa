"""The whole path on a real decoder of a megabyte: tuned on answers and on class names, in 4 and 8 bits too, merged, and asked."""
from pathlib import Path

import numpy as np
import pytest
import torch

import fine_tune_llm as ft
from fine_tune_llm.models.generation import generate_answers
from fine_tune_llm.models.merging import merge
from fine_tune_llm.training.trainer import TrainingRun, trained_module

STORIES = Path(__file__).parents[2] / "shared/data/models/stories260K"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared data lie beside the project and are absent here")

NAMES = "Lily Tom Sam Mia Ben Anna Max Sue".split()
THINGS = "ball box cat dog bird tree cake car".split()
ROWS = [dict(prompt=f"{name} saw a {thing}.", completion=f"{name} was happy with the {thing}.") for name in NAMES for thing in THINGS]
TYPES = {"person": ("Who was the man?", "Who saw the girl?", "Who is her friend?", "Who had a boat?"),
         "place": ("Where is the park?", "Where was the dog?", "Where did the boy go?", "Where is her house?"),
         "time": ("When did the sun come?", "When was the day?", "When is it night?", "When did the bird sing?")}
QUESTIONS = [dict(text=f"{opener} {question}", label=label) for label, questions in TYPES.items() for question in questions for opener in ("Tell me.", "Mom said:", "Then he said:", "Listen.", "One day,", "Oh!")]


def fit(tmp_path: Path, quantize: str | None = None) -> TrainingRun:
    "Eight passes at most over 58 rows."
    model = ft.load_model(STORIES, task="sft", device="cpu", quantize=quantize)
    return ft.finetune(model, ROWS, lora=dict(r=8, lora_dropout=0.0), epochs=4, learning_rate=1e-2, batch_size=8, out=tmp_path / (quantize or "full"), progress=False)


def test_tuned_on_answers_merged_and_asked(tmp_path: Path) -> None:
    run = fit(tmp_path)
    model, module = run.model, trained_module(run)
    tokens = model.tokenizer
    with torch.no_grad():
        def likelihood(answer: str) -> float:
            prompt, whole = tokens("Lily saw a cake.\n")["input_ids"], tokens("Lily saw a cake.\n" + answer)["input_ids"]
            return float(torch.log_softmax(module(torch.tensor([whole])).logits[0, :-1].float(), -1)[range(len(prompt) - 1, len(whole) - 1), whole[len(prompt):]].sum())
        with module.disable_adapter(): before = likelihood("Lily was happy with the cake.")
        assert likelihood("Lily was happy with the cake.") > before + 5  # at least 150 times likelier than before
    first, last = run.events("step")[0]["loss"], run.events("evaluated")[-1]["loss"]
    assert last < first / 2 and run.state == "finished"
    certificate = merge(run, out=tmp_path / "merged", probe=[row["prompt"] for row in ROWS[:8]])
    assert certificate.verdict == "same", certificate
    answers = generate_answers(model, module, ["Lily saw a cake.\n"], n=3, max_new_tokens=12, seed=1)
    assert len(answers.texts[0]) == 3 and np.isfinite(answers.log_probs).all() and (answers.log_probs < 0).all()


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantized_weights_are_tuned_on_a_cpu(tmp_path: Path, quantize: str) -> None:
    "The base stays in 4 or 8 bits, the adapter learns, and a fresh process would load the same answers."
    run = fit(tmp_path, quantize)
    steps = [e["loss"] for e in run.events("step")]
    assert run.state == "finished" and np.mean(steps[-4:]) < np.mean(steps[:4]) / 1.5
    module = trained_module(run)
    kinds = {type(p).__name__ for p in module.parameters() if not p.requires_grad}
    assert kinds & {"Params4bit", "Int8Params"} and all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)


def test_class_names_as_answers(tmp_path: Path) -> None:
    "Twelve questions of three types, said in six ways; a guess would be right a third of the time."
    data = ft.load_data(QUESTIONS, sizes=(0.6, 0.1, 0.1, 0.2), near=None)
    model = ft.load_model(STORIES, task="label-words", device="cpu")
    run = ft.finetune(model, data, lora=dict(r=8, lora_dropout=0.0), epochs=4, learning_rate=1e-2, batch_size=8, out=tmp_path / "words", progress=False)
    probabilities = run.predict(data.test).probabilities
    assert np.allclose(probabilities.sum(1), 1) and (probabilities.argmax(1) == data.test.y).mean() > 0.8
