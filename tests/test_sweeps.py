"Sweeps: every run in the table, the same winner with and without Ray, and a sweep that was cut off goes on."
import json

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.core.errors import ConfigurationError, DataError, TrainingError
from fine_tune_llm.core.runs import Run
from fine_tune_llm.data.loading import load_data
from fine_tune_llm.models.loading import load_model
from fine_tune_llm.training.sweeps import collect_trials, luck, measured, points, sweep
from fine_tune_llm.training.trainer import finetune
from fine_tune_llm.uncertainty.metrics import accuracy, nll
from fine_tune_llm.uncertainty.predictions import Predictions

WORDS = "morning evening street garden window river letter kitchen market school".split()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A random Llama of one layer that learns to tell rain from sun."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), load_model("pocket", device="cpu").tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [dict(text=f"{a} and {b} in the {w}", label=w) for w in ("rain", "sun") for i, a in enumerate(WORDS) for b in WORDS[i + 1:i + 5]]
    return load_data(rows, sizes=(.5, .3, .1, .1)), load_model(folder, device="cpu")


def functions(data, model):
    "A train function and a judge, as a user writes them: closures, so that Ray can carry them to other processes."
    def train(rank, seed, **where):
        from fine_tune_llm.training.trainer import finetune
        return finetune(model, data, lora=dict(r=rank), seed=seed, epochs=2, batch_size=8, learning_rate=3e-2, progress=False, **where)
    def judge(run): return run.predict(data.validation)
    return train, judge


SPACE = dict(rank=[2, 4], seed=[0, 1])


def test_points():
    assert points(SPACE) == [dict(rank=r, seed=s) for r in (2, 4) for s in (0, 1)]
    drawn = points(dict(rate=lambda rng: rng.uniform(), seed=[0, 1]), samples=50)
    assert len(drawn) == 50 and len({p["rate"] for p in drawn}) == 50 and {p["seed"] for p in drawn} == {0, 1} and all(0 <= p["rate"] < 1 for p in drawn)
    assert len(points(SPACE, samples=99)) == 4  # no point of a grid twice
    for bad in ({}, dict(rank=[]), dict(rank="48")):
        with pytest.raises(ConfigurationError, match="nothing to try"): points(bad)


@pytest.mark.parametrize(("m", "exact"), [(1, 0.0), (2, 0.5641895835), (3, 0.8462843753), (4, 1.0293753730), (5, 1.1629644736), (10, 1.5387527308), (100, 2.5075936)])
def test_luck_is_the_table_of_normal_order_statistics(m, exact):
    "Harter 1961, Biometrika 48: expected values of normal order statistics."
    assert luck(m) == pytest.approx(exact, abs=1e-6)


def test_table_winner_and_notes(tmp_path):
    values = [0.5, 0.3, 0.4]
    for i, v in enumerate(values):
        Run.create(tmp_path / f"t{i}").write_json("trial.json", dict(settings=dict(seed=i), state="finished", metric="nll", value=v, low=v - .098, high=v + .098,
                                                                     low_all=v - .12, high_all=v + .12, n=100, split="validation"))
    Run.create(tmp_path / "t3").write_json("trial.json", dict(settings=dict(seed=3), state="failed", error="it broke"))
    found = collect_trials(tmp_path, ["t0", "t1", "t2", "t3"], larger=False)
    assert found.table.index.tolist() == ["t1", "t2", "t0", "t3"] and found.winner == "t1"
    assert collect_trials(tmp_path, ["t0", "t1", "t2"], larger=True).winner == "t0"
    # standard error 0.098 / 1.96 = 0.05, the best of 3 lies 0.8463 of them ahead; 0.4 and 0.5 overlap 0.3 + 0.12
    assert "up to 0.042 on the good side by luck alone" in found.notes[1] and "2 of the 2 others cannot be told apart" in found.notes[2] and "1 runs failed" in found.notes[3]
    sharp = found.table.copy()
    sharp["low_all"], sharp["high_all"] = sharp["value"] - .04, sharp["value"] + .04
    assert "0 of the 2 others" in type(found)(sharp, tmp_path, "nll", False).notes[2]


def test_the_winner_is_never_chosen_on_rows_that_must_stay_unread():
    from fine_tune_llm.core.labels import Labels
    def preds(split): return Predictions(np.array(list("abcdef")), Labels(("x", "y")), probs=np.tile([.7, .3], (6, 1)), y=np.array([0, 0, 0, 1, 1, 0]), split=split)
    for split in ("test", "calibration", "shift"):
        with pytest.raises(DataError, match=f"may not be chosen on the {split} split"): measured(preds(split), nll, 3)
    one, alone = measured(preds("validation"), accuracy, 3), accuracy(preds("validation"), level=1 - 0.05 / 3)
    assert (one["low_all"], one["high_all"]) == (alone.low, alone.high) and one["low_all"] < one["low"] and one["n"] == 6


def test_a_sweep_that_was_cut_off_goes_on(toy, tmp_path):
    small = dict(rank=[2, 4], seed=[1])
    train, judge = functions(*toy)
    whole = sweep(train, small, judge, out=tmp_path / "a")
    data, model = toy
    def stopped(rank, seed, **where):
        if (rank, seed) != (4, 1): return train(rank, seed, **where)
        run = finetune(model, data, lora=dict(r=rank), seed=seed, epochs=2, batch_size=8, learning_rate=3e-2, background=True, **where)
        run.stop()
        return run
    with pytest.raises(TrainingError, match="the run is stopped, and the sweep with it"): sweep(stopped, small, judge, out=tmp_path / "b")
    assert [(tmp_path / f"b/trial-00{i}/trial.json").exists() for i in range(2)] == [True, False]
    again = sweep(train, small, judge, out=tmp_path / "b")
    pd.testing.assert_frame_equal(again.table, whole.table)
    record = json.loads((tmp_path / "b/trial-001/trial.json").read_text())
    assert record["settings"] == dict(rank=4, seed=1) and record["split"] == "validation"
    assert record["value"] == pytest.approx(nll(Predictions.load(tmp_path / "b/trial-001/predictions/validation.parquet")).value)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    import fine_tune_llm.training.sweeps as home
    monkeypatch.setattr(home, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"fine_tune_llm\[sweep\]"): sweep(lambda **k: None, SPACE, len, out=tmp_path / "r", ray=True)


@pytest.mark.peers
def test_ray_finds_the_same_winner(toy, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray, the extra [sweep], is not installed")
    import torch
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train, judge = functions(*toy)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: alone = sweep(train, SPACE, judge, metric=accuracy, out=tmp_path / "a")
    finally: torch.set_num_threads(before)
    with_ray = sweep(train, SPACE, judge, metric=accuracy, out=tmp_path / "b", ray=True, workers=2)
    pd.testing.assert_frame_equal(with_ray.table, alone.table)
    assert all(Run.attach(tmp_path / "b" / n).state == "finished" and Run.attach(tmp_path / "b" / n).verify().n for n in with_ray.table.index)
