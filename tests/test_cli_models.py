"""The commands that need a model: one run from a file, Ctrl-C, resume, and what a person does with what came out; and everything that can be named wrongly.

Most tests meet the program twice: forked from a process that has imported it, in every run of the tests, and as the installed script, among the slow ones."""
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import WORDS, Program, refused, shell, weather, write

from fine_tune_llm.core.runs import Run

@pytest.fixture(scope="module", params=["forked", pytest.param("installed", marks=pytest.mark.slow)])
def program(request) -> Program:
    "Two ways to start the same `main`."
    return Program(request.param == "forked")


FORKED, INSTALLED = (pytest.mark.parametrize("program", [way], indirect=True) for way in ("forked", "installed"))  # where one way says it all


def steps(path: Path) -> int:
    return len(Run.attach(path).events("step")) if (path / "events.jsonl").exists() else 0


SECRETS = {"HF_TOKEN": "hf_" + "Zq9" * 12, "FTLLM_SECRETS__HUB_TOKEN": "plain words nobody guesses", "DESK_PASSWORD": 'with "marks" in it'}

@pytest.fixture(scope="module")
def home(program, tmp_path_factory) -> SimpleNamespace:
    "A small classifier: started, interrupted, refused once, and ended. Beside it, rows that it has never seen."
    home = tmp_path_factory.mktemp("models")
    write(home / "weather.csv", weather())
    write(home / "fresh.csv", [(f"the {a} under a {w}", w) for w in ("rain", "sun") for a in WORDS * 2][:40])
    (home / "run.yaml").write_text("data: {path: weather.csv}\nmodel: {device: cpu, dtype: float32}\n"
                                   "training: {epochs: 4, batch_size: 16, learning_rate: 0.003, lora: {r: 4}}\ntrust: {abstain_cost: 0.3}\n")
    run = home / "run"
    process = program.start("run", home / "run.yaml", "--out", run, until=lambda: steps(run), **SECRETS)
    process.send_signal(signal.SIGINT)
    stopped = program.end(process)
    state, kept = Run.attach(run).state, (run / Run.attach(run).events("run_stopped")[0]["checkpoint"] / "manifest.json").exists()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("epochs: 4", "epochs: 5"))  # another run, so it is refused by name
    other = program("run", "--resume", run, **SECRETS)
    (run / "config.yaml").write_text(text)
    done = program("--log-format", "json", "run", "--resume", run, "--json", **SECRETS)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(path=home, run=run, stopped=stopped, state=state, kept=kept, other=other, done=done)


def test_ctrl_c_saves_and_names_the_way_on(home):
    *lines, last = home.stopped.stderr.splitlines()
    assert home.stopped.returncode == 130 and last.startswith("stopped: ") and f"fine-tune-llm run --resume {home.run}" in last and "Traceback" not in home.stopped.stderr
    assert home.state == "stopped" and home.kept
    assert any("data: reading" in line for line in lines) and any("[run] step: step 1, " in line for line in lines)
    assert "\r" not in home.stopped.stderr and "%|" not in home.stopped.stderr  # no bar where nobody sees one


def test_a_changed_run_is_not_resumed(home):
    assert home.other.returncode == 1 and "settings.epochs: 4 -> 5" in home.other.stderr and "Traceback" not in home.other.stderr
    assert sum(line.startswith("error: ") for line in home.other.stderr.splitlines()) == 1


def test_resume_ends_with_a_system_and_each_line_is_json(home):
    told, lines = json.loads(home.done.stdout), [json.loads(line) for line in home.done.stderr.splitlines()]
    assert told["bundle"] == str(home.run / "bundle") and "coverage" in {row["measure"] for row in told["summary"]} and told["verdict"]
    assert Run.attach(home.run).state == "finished" and Run.attach(home.run).verify().torn == 0
    assert {"run_started", "step", "run_finished", "covered"} <= {line["fields"]["event"] for line in lines if line.get("run") == "run"}
    assert len([line for line in lines if line.get("fields", {}).get("event") == "step"]) <= 11  # of 36


def test_predict_a_line_for_a_line(program, home):
    answered = program("predict", home.run / "bundle", "-", text="river in the sun\n\nriver in the rain\n")
    lines = [json.loads(line) for line in answered.stdout.splitlines()]
    assert [line.get("best_guess") for line in lines] == ["sun", None, "rain"] and lines[1]["error"] == "the text is empty"
    assert answered.returncode == 1 and answered.stderr == ""  # one of three lines had no text
    alone = program("predict", home.run / "bundle", "river in the sun")
    assert alone.returncode == 0 and json.loads(alone.stdout)["best_guess"] == "sun"


def test_dry_run_reads_no_weights(program, home, tmp_path):
    (tmp_path / "model").mkdir()
    from fine_tune_llm.models.loading import locate
    for part in Path(locate("pocket")).iterdir():
        if part.suffix != ".safetensors": (tmp_path / "model" / part.name).write_bytes(part.read_bytes())
    done = program("run", home.path / "run.yaml", f"model.name={tmp_path / 'model'}", "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    train = 210 - sum(plan["splits"][s] for s in ("validation", "calibration", "test"))
    assert done.returncode == 0 and plan["splits"]["train"] == train and plan["steps"] == 4 * -(-train // 16) and plan["seconds"] > 0
    assert plan["need"]["trained"] > 0 and plan["fits"] and sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_evaluate_on_new_rows(program, home, tmp_path):
    done = program("evaluate", home.run, home.path / "fresh.csv", "--json", "--out", tmp_path / "p.parquet")
    report = json.loads(done.stdout)
    assert done.returncode == {"pass": 0, "fail": 1, "not enough evidence": 3}[report["verdict"]] and done.stderr == ""
    from fine_tune_llm.uncertainty.predictions import Predictions
    p = Predictions.load(tmp_path / "p.parquet")
    assert len(p) == 40 and len(p.seen["training"]) > 100 and p.probs is not None


def test_compare_a_run_with_what_it_was(program, home):
    done = program("compare", home.run / "predictions" / "test.parquet", home.run, "--json", "--metric", "accuracy")
    rows = json.loads(done.stdout)["rows"]
    assert done.returncode == 0 and [r["system"] for r in rows] == ["test.parquet", "run"]
    assert rows[0]["gap"] is None and rows[1]["gap"] == 0 and rows[1]["verdict"] == "not shown"  # a temperature moves no answer


def test_merge_export_and_push(program, home):
    merged = program("merge", home.run, home.path / "merged", "--json")
    found = json.loads(merged.stdout)
    assert merged.returncode == 0 and found["verdict"] in ("same", "recalibrate") and (home.path / "merged" / "model.safetensors").exists()
    ready = program("export", home.path / "merged", "--json")
    assert ready.returncode == 0 and json.loads(ready.stdout)["prompts"] == 0 and (home.path / "merged" / "SERVING.md").exists()
    listed = program("push", home.path / "merged", "me/weather", "--dry-run", "--json", HF_TOKEN="hf_" + "Zq9" * 12)
    assert listed.returncode == 0 and "model.safetensors" in json.loads(listed.stdout)["files"] and json.loads(listed.stdout)["url"] == ""
    assert "Zq9" not in listed.stdout + listed.stderr + (home.path / "merged" / "README.md").read_text()


def test_no_secret_is_left_anywhere(home):
    "Three starts had them in their environment: in no file, no event, no line."
    files = [p for p in home.path.rglob("*") if p.is_file()]
    told = [s.encode() for done in (home.stopped, home.other, home.done) for s in (done.stdout, done.stderr)]
    assert len(files) > 30
    for text in [*(p.read_bytes() for p in files), *told]: assert not any(s.encode() in text for s in ("Zq9Zq9", "nobody guesses", "marks"))


def test_audit_and_verify_what_the_run_left(program, home):
    audited = program("audit", home.run / "predictions" / "test.parquet", "--sets", home.run / "trust" / "conformal.json", "--json")
    assert audited.returncode in (0, 1, 3) and json.loads(audited.stdout)["verdict"] and audited.stderr == ""
    sound = program("verify", home.run / "audit" / "report.json")
    assert sound.returncode == 0 and sound.stdout.startswith("SOUND")


def test_recommend_for_a_machine(program, home):
    done = program("recommend", home.path / "weather.csv", "--memory", "8", "--device", "cpu", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["fits"] and done.stderr == ""


@pytest.mark.slow
@FORKED
def test_nothing_fits_a_machine_that_is_too_small(program, home):
    small = program("recommend", home.path / "weather.csv", "--memory", "0.01", "--device", "cpu", "--json")
    assert small.returncode == 1 and not json.loads(small.stdout)["fits"] and small.stderr == ""


@FORKED
def test_a_run_is_steered_and_its_broken_promise_raises_an_alert(program, home, tmp_path):
    "The test rows have wrong labels half the time: the sets that held on calibration rows cannot hold there."
    texts = [(f"{a} or {b} in the {w}", w if i % 2 else "sun") for i, a in enumerate(WORDS) for b in WORDS[:i] for w in ("rain", "sun")]
    write(tmp_path / "other.csv", texts)
    run, settings = tmp_path / "night", home.path / "run.yaml"
    process = program.start("run", settings, f"data.test={tmp_path / 'other.csv'}", "training.scheduler=constant", "training.warmup=0", "--out", run, until=lambda: steps(run))
    paused = shell("control", run, "pause")
    assert paused.returncode == 0 and paused.stdout.startswith("pause applied at step "), paused.stderr
    (tmp_path / "faster.yaml").write_text((run / "config.yaml").read_text().replace("learning_rate: 0.003", "learning_rate: 0.0015"))
    changed = program("control", run, "reload", "--config", tmp_path / "faster.yaml")
    assert changed.returncode == 0 and "learning rate 0.003 -> 0.0015" in changed.stdout, changed.stderr
    assert json.loads(shell("watch", run, "--once", "--json").stdout)["state"] == "paused"
    refused(shell("control", run, "fly"), "fly was refused")
    assert shell("control", run, "resume").returncode == 0
    done = program.end(process)
    assert done.returncode == 0 and " warning " in done.stderr and "(low_coverage)" in done.stderr, done.stderr
    at = next(e["step"] for e in Run.attach(run).events("command_applied") if e["command"] == "set")
    rates = {e["step"]: e["learning_rate"] for e in Run.attach(run).events("step")}
    assert rates[at] == pytest.approx(0.003) and rates[at + 2] == pytest.approx(0.0015)
    watched = shell("watch", run, "--once", "--json")
    assert watched.returncode == 1 and [a["rule"] for a in json.loads(watched.stdout)["alerts"]] == ["low_coverage"]
    quiet = shell("watch", home.run, "--once", "--json")
    assert quiet.returncode == 0 and json.loads(quiet.stdout)["alerts"] == [] and Run.attach(home.run).events("covered")
    assert shell("watch", home.run).stdout.startswith("finished, step 36 of 36")
    refused(shell("control", home.run, "stop"), "the run is finished; nothing can be asked of it")


@FORKED
def test_free_answers_are_trained_by_train_and_by_run(program, tmp_path):
    rows = [json.dumps({"prompt": f"What follows {i}?", "completion": f"{i + 1} follows."}) for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    (tmp_path / "sft.yaml").write_text("data: {path: chats.jsonl}\nmodel: {task: sft, device: cpu, dtype: float32}\ntraining: {epochs: 1, batch_size: 8, max_length: 64}\n")
    plan = program("train", tmp_path / "sft.yaml", "--dry-run", "--json")
    assert plan.returncode == 0 and json.loads(plan.stdout)["classes"] == 0, plan.stderr
    stopped = program.start("run", tmp_path / "sft.yaml", "training.epochs=40", "--out", tmp_path / "long", until=lambda: steps(tmp_path / "long"))
    stopped.send_signal(signal.SIGINT)
    left = program.end(stopped)
    assert left.returncode == 130 and f"fine-tune-llm run --resume {tmp_path / 'long'}" in left.stderr and "training alone" in left.stderr
    done = program("train", tmp_path / "sft.yaml", "--out", tmp_path / "run", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["state"] == "finished" and (Path(told["adapter"]) / "adapter_model.safetensors").exists()
    assert told["step"] == json.loads(plan.stdout)["steps"]
    again = program("run", tmp_path / "sft.yaml", "--out", tmp_path / "other", "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["step"] == told["step"], again.stderr
    assert (tmp_path / "other/adapter/adapter_model.safetensors").read_bytes() == (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    (tmp_path / "probe.csv").write_text("text\nWhat follows 3?\nWhat follows 9?\n")
    merged = program("merge", tmp_path / "run", tmp_path / "merged", "--probe", tmp_path / "probe.csv", "--json")
    assert json.loads(merged.stdout)["unit"] == "token", merged.stderr


@pytest.mark.slow
@INSTALLED
def test_the_demonstration(program, tmp_path):
    done = program("demo", "--rows", "30", "--out", tmp_path / "run", "--json")
    assert done.returncode == 0 and Path(json.loads(done.stdout)["bundle"]).is_dir() and "docstrings of " in done.stderr, done.stderr


@pytest.mark.parametrize("args,words", [
    (("demo", "--rows", 3), "rows"), (("run", "--accept"), "--accept"), (("train", "a.yaml", "--flag"), "--flag"), (("evaluate", "x"), "Missing argument"),
    (("compare",), "Missing argument"), (("recommend", "x.csv", "--batch-size", 0), "batch-size"), (("merge", "x"), "Missing argument"),
    (("export",), "Missing argument"), (("push", "x"), "Missing argument"), (("predict",), "Missing argument"), (("watch",), "Missing argument"),
    (("control", "x"), "Missing argument"), (("audit",), "Missing argument"), (("verify",), "Missing argument"), (("data",), "Missing argument"),
    (("doctor", "x"), "unexpected extra argument"), (("fly",), "No such command"), (("--log-format", "xml", "doctor"), "--log-format")], ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_arguments_that_a_command_does_not_know(args, words):
    done = shell(*args)
    refused(done, words, code=2)


@pytest.mark.parametrize("args,words", [
    (("train",), ["no configuration"]), (("train", "gone.yaml"), ["gone.yaml"]), (("run", "--resume", "."), ["config.yaml"]), (("predict", "nowhere"), ["no bundle"]),
    (("merge", "nowhere", "x"), ["no run folder"]), (("evaluate", "nowhere", "x.csv"), ["no bundle here"]), (("watch", "nowhere"), ["no run folder"]),
    (("compare", "a", "a"), ["different systems"]), (("push", ".", "no-slash", "--dry-run"), ["owner/name"]), (("control", "nowhere", "stop"), ["no run folder"])],
    ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_cheap_mistakes(tmp_path, args, words):
    refused(shell(*args, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


@FORKED
@pytest.mark.parametrize("args,words", [
    (("evaluate", "{h}/run", "{t}/gone.csv"), ["gone.csv"]), (("evaluate", "{h}/run", "{h}/weather.csv"), ["already used"]), (("evaluate", "{h}/run", "{t}/other.csv"), ["snow"]),
    (("merge", "{h}/run", "{t}/m", "--dtype", "int3"), ["int3"]), (("merge", "{h}/run", "{h}"), ["the folder exists"]),
    (("merge", "{h}/run", "{t}/m", "--probe", "{t}/gone.csv"), ["gone.csv"]), (("export", "{t}"), ["no model here"]),
    (("export", "{t}", "--template", "chat"), ["belong together"]), (("push", "{t}", "me/it", "--dry-run"), ["no model here"]), (("compare", "{h}/run", "{t}/other.csv"), ["cannot read predictions"]),
    (("recommend", "{h}/weather.csv", "--memory", "-3"), ["no memory"]), (("recommend", "{h}/weather.csv", "--memory", "9", "--device", "tpu"), ["tpu"]),
    (("recommend", "{h}/weather.csv", "--model", "{t}/gone/x/y"), ["no folder"]), (("recommend", "{h}/weather.csv", "--task", "dance"), ["dance"]),
    (("run", "{h}/run.yaml", "data.path={t}/gone.csv"), ["gone.csv"]), (("run", "{h}/run.yaml", "--out", "{h}/run"), ["not empty"]),
    (("train", "{h}/run.yaml", "--dry-run", "data.path={t}/gone.csv"), ["gone.csv"]), (("train", "{h}/run.yaml", "--dry-run", "training.lora={{rr: 3}}"), ["rr"])],
    ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_dear_mistakes(program, home, tmp_path, args, words):
    write(tmp_path / "other.csv", [("a b c", "snow"), ("d e f", "rain")])
    refused(program(*(str(a).format(h=home.path, t=tmp_path) for a in args), cwd=tmp_path), *words)
