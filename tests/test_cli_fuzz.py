"""A thousand mutated configurations through the program's own `main`: an answer, or one line and an exit code, and never a traceback."""
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fine_tune_llm.apps import cli
from fine_tune_llm.core.config import Config, known_keys

SOUND = {"data": {"path": "tickets.csv", "label": "intent", "groups": ["channel"]}, "model": {"name": "pocket", "quantize": None},
         "training": {"epochs": 3, "lora": {"r": 16}, "learning_rate": 5e-4}, "trust": {"alpha": 0.1}, "out": "runs/first"}
TEXT = yaml.safe_dump(SOUND, sort_keys=False)
KEYS = st.one_of(st.sampled_from(known_keys()), st.sampled_from(["extends", "version", "training.epoch", "data", "a.b.c", "training.lora.r.s", "", ".", "…"]), st.text(max_size=8))
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-10**20, 10**20), st.floats(), st.text(max_size=12), st.sampled_from(["run.yaml", "../x", "hf_" + "b" * 34, "nf4", "1e-3", "\0"])),
                      lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=5)
CUTS = st.lists(st.tuples(st.integers(0, len(TEXT)), st.integers(0, 8), st.sampled_from(["", ":", "- ", "[", "}", "&a ", "*a", "!!set ", "\t", "\n", "'", '"', "|", "? ", "\x07", "é", "---\n", "%"])), max_size=3)
COMMANDS = st.sampled_from([("show",), ("show", "--json"), ("explain",), ("explain", "--json"), ("diff", "run.yaml")])


@pytest.fixture(scope="module", autouse=True)
def built() -> Iterator[None]:
    "Build the tree of commands once, which is half of the time of a call."
    before, cli.app = cli.app, typer.main.get_command(cli.app)  # type: ignore[assignment]
    yield
    cli.app = before


def told(*args: str) -> tuple[int, str, str]:
    "Call `main` as the console script does; anything but SystemExit is a traceback that a person would see."
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    try:
        sys.argv = ["fine-tune-llm", *args]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): cli.main()
    except SystemExit as e: return int(e.code or 0), out.getvalue(), err.getvalue()
    finally: sys.argv = before
    return 0, out.getvalue(), err.getvalue()


def mutated(changes: list, cuts: list) -> str:
    "Put values where they may not belong, and cut the text."
    tree = yaml.safe_load(TEXT)
    for key, value in changes:
        into = tree
        *above, last = key.split(".")
        for part in above: into = into.setdefault(part, {}) if isinstance(into.get(part, {}), dict) else {}
        into[last] = value
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    for at, length, new in cuts: text = text[:at] + new + text[at + length:]
    return text


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(KEYS, VALUES), max_size=3), CUTS, COMMANDS, st.lists(st.one_of(st.tuples(KEYS, VALUES).map(lambda kv: f"{kv[0]}={kv[1]}"), st.text(min_size=1, max_size=6)), max_size=2))
def test_a_thousand_configurations_through_the_program(tmp_path, monkeypatch, changes, cuts, command, more):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_bytes(mutated(changes, cuts).encode("utf-8", "surrogatepass"))
    extra = [] if command[0] == "diff" else ["--", *more]
    code, out, err = told("config", command[0], "run.yaml", *command[1:], *extra)
    assert code in (0, 1), (code, err)
    if code == 0:
        assert err == "" and "hf_bbb" not in out
        if command == ("show",): Config.model_validate(yaml.safe_load(out)) if "\0" not in out else None
    else: assert err.startswith("error: ") and not any(ord(c) < 32 and c != "\n" for c in err) and "hf_bbb" not in err and out == ""


def test_the_mutations_reach_both_ends(tmp_path, monkeypatch):
    "The test above would say nothing if every file were refused, or none."
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(TEXT)
    assert told("config", "show", "run.yaml")[0] == 0 and told("config", "diff", "run.yaml", "run.yaml") == (0, "", "")
    Path("run.yaml").write_text(mutated([("training.epochs", 0)], []))
    assert told("config", "show", "run.yaml")[0] == 1
