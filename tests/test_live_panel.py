"""What a live view draws piece by piece is what it would draw at once; and what a run tells of its padding and memory, by hand."""
import random
import time

import numpy as np
import pytest

from fine_tune_llm.core.labels import Labels
from fine_tune_llm.core.runs import Run
from fine_tune_llm.models.adapters import add_adapter
from fine_tune_llm.models.loading import build_causal, build_classifier, load_model
from fine_tune_llm.panels.curves import Course, curves
from fine_tune_llm.panels.happenings import happenings
from fine_tune_llm.panels.traces import Sketch, Trace, stretch
from fine_tune_llm.panels.training import (
    TrainingPanel,
    facts_line,
    head_parts,
    log_part,
    scene,
    strips_part,
    training_view,
)
from fine_tune_llm.training.causal_loop import CausalPlan, collate, make_causal_trainer
from fine_tune_llm.training.loop import Settings, make_trainer

def story(seed: int, steps: int) -> tuple[list[dict], list[dict]]:
    "Events and commands of a run that is stopped and resumed, with losses that are missing, in the order of time."
    noise, clock, events, commands = random.Random(seed), 0.0, [], []
    def log(kind: str, **values) -> None: events.append(dict(event=kind, time=clock, **values))
    log("run_started", total_steps=steps, epochs=2, rows=4 * steps, device="cpu", dtype="float32", step=0)
    ends = sorted(noise.sample(range(10, steps), 2)) + [steps]
    begin = 0
    for n, end in enumerate(ends):
        for s in range(begin + 1, end + 1):
            clock += noise.random()
            loss = None if noise.random() < 0.02 else abs(noise.gauss(1 + 5 / s, 0.3))
            log("step", step=s, epoch=s / steps, loss=loss, learning_rate=1e-4 * min(1, s / 20), rows_per_second=noise.uniform(5, 2000), eta_s=1.0, padding=0.1, memory_bytes=10**9 + s)
            if noise.random() < 0.05: log("evaluated", step=s, nll=1 / s, accuracy=noise.random(), ece=0.05, ece_low=0.03, ece_high=0.06, ece_null=0.02)
            if noise.random() < 0.03: log("checkpoint_saved", step=s, path="x")
            if noise.random() < 0.02: log("warning", message="<odd>")
            if noise.random() < 0.02:
                commands.append(dict(id=f"c{len(commands)}", time=clock, command="set", times=0.5))
                log(noise.choice(["command_applied", "command_refused"]), id=commands[-1]["id"], command="set", step=s, reason="why")
        if n < 2:
            begin = max(0, end - noise.randrange(0, 40))
            log("run_stopped", step=end)
            log("run_started", total_steps=steps, epochs=2, rows=4 * steps, device="cpu", step=begin)
    log("run_finished", step=steps)
    return events, commands


@pytest.mark.parametrize("seed, steps", [(0, 60), (1, 300), (2, 700), (3, 1700)])
def test_drawing_piece_by_piece_is_drawing_at_once(seed, steps):
    "After each handful of events: every part, letter by letter, through resumes, gaps and the thinning of long curves."
    events, commands = story(seed, steps)
    course, sketch, noise, n = Course(), Sketch(), random.Random(seed), 0
    while n < len(events):
        n = min(len(events), n + noise.choice([1, 2, 3, 40]) * (1 + steps // 400))
        asked = [c for c in commands if c["time"] <= events[n - 1]["time"]]
        grown, whole = scene(events[:n], asked, course), scene(events[:n], asked)
        assert grown.data == curves(events[:n]) and (grown.top, grown.seen, grown.now, grown.last) == (whole.top, whole.seen, whole.now, whole.last)
        assert strips_part(grown, sketch) == strips_part(whole)
        assert head_parts(grown, 1e4) == head_parts(whole, 1e4) and log_part(grown) == log_part(whole)
    assert head_parts(scene(events, commands)) == head_parts(grown)


@pytest.mark.parametrize("kind", ["step", "evaluated"])
def test_the_later_record_of_a_step_counts(kind):
    "A run that was resumed one step before its end tells that step again."
    events = [dict(event=kind, time=float(s), step=s, loss=1.0 / s) for s in (1, 2)]
    course = Course()
    course.follow(events)
    assert course.follow(again := [*events, dict(event=kind, time=3.0, step=2, loss=9.0)]) == curves(again)
    assert (course.data.loss or [e["loss"] for e in course.data.evaluations]) == [1.0, 9.0]


def test_a_panel_that_has_watched_shows_what_one_that_comes_later_shows(tmp_path):
    events, commands = story(4, 200)
    run = Run.create(tmp_path / "run")
    panel = TrainingPanel(run)
    panel.publisher.close()
    panel.publisher.thread.join(20)
    for i, e in enumerate(events):
        run.log(e["event"], **{k: v for k, v in e.items() if k not in ("event", "time")})
        if i % 5 == 0: panel.refresh()
    panel.refresh()
    late = TrainingPanel.attach(run.path)
    late.publisher.thread.join(20)
    for part in ("head", "live", "lines", "data", "note", "silent"): assert getattr(panel, part).value == getattr(late, part).value, part
    assert panel.last_error is None and late.last_error is None and panel.stage == "finished"
    for p in (panel, late): p.close()


def test_words_that_waited_are_said(tmp_path):
    "Steps alone do not move the words within a second; the next look after it does, though nothing else has happened."
    run = Run.create(tmp_path / "run")
    run.log("run_started", total_steps=9)
    panel = TrainingPanel(run)
    panel.publisher.close()
    panel.publisher.thread.join(20)
    run.log("step", step=1, loss=1.0)
    panel.refresh()  # the first step is news
    run.log("step", step=2, loss=0.5)
    panel.said = (panel.said[0] + 1e6, panel.said[1])  # as if that had been this very moment, however slow the machine
    panel.refresh()
    assert panel.waiting and "step\u202f2" not in panel.head.value and "step\u00a01:" in panel.head.value and "L2 " in panel.live.value
    panel.said = (panel.said[0] - 2e6, panel.said[1])
    panel.refresh()
    assert not panel.waiting and "step\u00a02:" in panel.head.value
    panel.close()


def test_a_refresh_sends_one_message(tmp_path):
    "A new step within a second of the last words changes the curves alone; without news nothing is set."
    run = Run.create(tmp_path / "run")
    run.log("run_started", total_steps=99)
    run.log("step", step=1, loss=1.0, learning_rate=1e-4)
    panel = TrainingPanel(run)
    panel.publisher.close()
    panel.publisher.thread.join(20)
    changed: list[str] = []
    for name in ("head", "live", "lines", "data", "note", "alert", "silent"): getattr(panel, name).observe(lambda _, name=name: changed.append(name), "value")
    panel.said = (panel.said[0] + 1e6, panel.said[1])
    for s in range(2, 30):
        run.log("step", step=s, loss=1 / s, learning_rate=1e-4)
        panel.refresh()
    assert changed == ["live"] * 28
    panel.drawn = (*panel.drawn[:2], int(time.time() / 5), panel.drawn[3])
    panel.refresh()
    assert changed == ["live"] * 28
    panel.close()


# Paths

@pytest.mark.parametrize("n", [2, 7, 400])
def test_a_trace_grows_to_what_it_would_be(n):
    "Whatever the steps in which it is asked, gaps included; never more points than were allowed, and the highest and the lowest among them."
    noise = random.Random(n)
    ys = [None if noise.random() < 0.1 else noise.random() for _ in range(3 * n + 50)]
    trace = Trace(n)
    for end in range(1, len(ys) + 1):
        path = trace.path(range(end), ys[:end])
        if end % 7 == 0 or end < 30: assert path == Trace(n).path(range(end), ys[:end])
        places = [p.split() for p in path.replace("M", "L").split("L")[1:]]
        known = [y for y in ys[:end] if y is not None]
        assert len(places) <= n + 3 and (not known or {f"{max(known):.5g}", f"{min(known):.5g}"} <= {y.lstrip("-") for _, y in places})

def test_stretches_are_powers_of_two_and_leave_at_most_n_points():
    for n in (2, 10, 400):
        for count in range(1, 50 * n, max(1, n // 3)):
            size = stretch(count, n)
            assert size & (size - 1) == 0 and (size == 1) == (count <= n) and (size == 1 or 2 * -(-count // size) <= n + 2)


# Padding and memory

def test_padding_of_a_classifier_by_hand(tmp_path):
    "Rows of 2, 4, 6 and 8 tokens in one batch: 20 of 4 x 8 places. In two parts: the places of the batches that were laid out."
    pocket = load_model("pocket", device="cpu")
    from transformers import TrainerCallback
    def history(lengths, batch_size, accumulate=1):
        module = add_adapter(build_classifier(pocket, Labels(("a", "b"))), dict(r=2))
        trainer = make_trainer(pocket, module, [[5] * n for n in lengths], np.arange(len(lengths)) % 2, Settings(dict(r=2), epochs=1, batch_size=batch_size, accumulate=accumulate),
                               tmp_path, TrainerCallback())
        trainer.train()
        return [h["padding"] for h in trainer.state.log_history if "loss" in h]
    assert history([2, 4, 6, 8], 4) == [0.375]
    assert sorted(history([2, 2, 6, 6], 2)) == [0, 0]  # rows of like length share a batch
    assert history([3, 3, 3], 1) == [0, 0, 0]
    assert history([1, 3], 2, accumulate=2) == [0]  # each row a part of its own


def test_padding_of_a_language_model_by_hand(tmp_path):
    "20 tokens: packed into one row that is rounded up to 128; padded into four rows of 16."
    rows = [dict(input_ids=[5] * n, labels=[5] * n, row=i) for i, n in enumerate((2, 4, 6, 8))]
    plan = CausalPlan(None, True, True, True, True, ())
    packed, padded = collate(rows, plan, 0), collate(rows, CausalPlan(None, False, True, False, True, ()), 0)
    assert packed["tokens"] == padded["tokens"] == 20
    assert [p["input_ids"].numel() for p in packed["parts"]] == [128] and [p["input_ids"].numel() for p in padded["parts"]] == [64]
    from transformers import TrainerCallback
    pocket = load_model("pocket", task="sft", device="cpu")
    for packing, share in ((True, 1 - 20 / 128), (False, 1 - 20 / 64)):
        module = add_adapter(build_causal(pocket), dict(r=2))
        trainer = make_causal_trainer(pocket, module, rows, Settings(dict(r=2), epochs=1, batch_size=4, packing=packing), tmp_path, TrainerCallback())
        trainer.train()
        assert trainer.plan.packed == packing
        assert [h["padding"] for h in trainer.state.log_history if "loss" in h] == [round(share, 4)]


def test_what_a_run_tells_and_what_the_panel_says(tmp_path):
    "A real small run: shares and bytes are told at each report, and the numbers that are shown are their mean, the last and the highest."
    import psutil

    import fine_tune_llm as ft
    words = "morning evening street garden window river".split()
    data = ft.load_data([dict(text=f"{a} and {b} in the {w}", label=w) for w in ("rain", "sun") for a in words for b in words])
    run = ft.finetune(ft.load_model("pocket", device="cpu"), data, lora=dict(r=2), epochs=1, batch_size=8, out=tmp_path / "run", progress=False)
    steps = run.events("step")
    assert steps and all(0 <= e["padding"] < 1 and 0.3 < e["memory_bytes"] / psutil.Process().memory_info().rss < 3 for e in steps)
    memory = [e["memory_bytes"] / 1e9 for e in steps]
    said = facts_line(curves(run.events()), "cpu")
    assert f"{100 * np.mean([e['padding'] for e in steps]):.1f}\u00a0%</b> of tokens" in said
    assert f"{memory[-1]:.2f}\u00a0GB</b> now, <b>{max(memory):.2f}\u00a0GB</b> at most" in said and said in run.panel().picture()


def test_runs_of_before_open(tmp_path):
    "A run that was written without padding and memory shows neither, and has no column for them."
    old = Run.create(tmp_path / "old")
    old.log("run_started", total_steps=9)
    for s in range(1, 4): old.log("step", step=s, loss=1 / s)
    panel = TrainingPanel.attach(old.path)
    assert panel.last_error is None and "Padding" not in panel.picture() and "Memory" not in panel.picture() + panel.head.value
    assert not {"padding", "memory_bytes"} & set(panel.snapshot().columns)
    old.log("step", step=4, loss=0.2, padding=0.25, memory_bytes=2e9)  # and goes on under a newer version
    assert "25.0" in panel.picture() and panel.snapshot()["memory_bytes"].tolist()[-1] == 2e9
    panel.close()


# Last events

def test_every_kind_of_event_is_told_and_escaped():
    evil = "<script>x()</script>"
    kinds = [dict(event=k, time=float(i), step=i, message=evil, error=evil, reason=evil, file=evil, command=evil, id="q", device=evil, asked={"save_every": 3}) for i, k in enumerate(
        ["run_started", "evaluated", "checkpoint_saved", "command_applied", "command_refused", "config_reloaded", "config_refused", "warning", "run_failed", evil])]
    for e in kinds:
        html = training_view([e])
        assert "<script" not in html and "Last events" in html
    assert {h.kind for h in happenings(kinds, n=20)} == {"Started", "Evaluated", "Checkpoint", "Applied", "Refused", "Reloaded", "Warning", "Failed", evil.capitalize()}
