"""Contracts of the configuration: no file gives a traceback, layers win in order, no secret is written, versions go back to the letter."""
import json
import random
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fine_tune_llm.core.config import Config, DataSection, TrainingSection, content_hash, diff, json_schema, load_config
from fine_tune_llm.core.errors import ConfigurationError
from fine_tune_llm.core.layers import parse_yaml
from fine_tune_llm.core.runs import Run
from fine_tune_llm.core.secrets import find_secret, redact
from fine_tune_llm.core.versions import keep_version, rollback, versions

WHOLE = """# a run
version: 2
data: {path: tickets.csv, label: intent, groups: [channel, 'on'], seed: 1}
model:
  name: "pocket"
  quantize: nf4
training: {epochs: 3, lora: {r: 16, lora_alpha: 32.0}, learning_rate: 5e-4, warmup: .06, max_length: 96}
trust: {alpha: 0.1, score: lac, abstain_cost: 0.2, max_risk: ~}
out: runs/first
"""
TOKENS = ["[", "]", "{", "}", ":", ": ", "- ", "#", "&a ", "*a", "!!python/object:os.system ", "!!int ", "!!binary ", "<<: ", "|", ">", "%", "@", "`", '"', "'", "\t", "\n", "\n\n",
          "---\n", "...\n", "null", "true", "1e-3", ".inf", ".nan", "010", "0x1f", "12:30", "2026-11-21", "9" * 30, "-1", "\0", "\x07", "\u2028", "\ud7ff", "é", "extends: ", "extends: run.yaml",
          "version: 1", "version: 99", "data:", "epochs", "? ", "training: ", "~", "hf_" + "a" * 34, "\\", '"\\0"', "a" * 300]


def load(folder: Path, text: str | bytes, *changes: str, **more) -> Config:
    (folder / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return load_config(folder / "run.yaml", *changes, **{"environ": {}, **more})


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 12), st.one_of(st.sampled_from(TOKENS), st.text(max_size=6), st.just(""))), min_size=1, max_size=4))
def test_a_thousand_mutated_files(tmp_path, cuts):
    text = WHOLE
    for at, length, new in cuts: text = text[:at] + new + text[at + length:]
    try: config = load(tmp_path, text)
    except ConfigurationError as e: assert "run.yaml" in str(e)
    else:
        assert load(tmp_path, config.to_yaml()) == config
        assert "hf_aaaa" not in config.to_yaml()


def test_an_unknown_version_names_its_file(tmp_path):
    (tmp_path / "base.yaml").write_text("version: 99")
    with pytest.raises(ConfigurationError, match=r"version = 99 is unknown.*base\.yaml"): load(tmp_path, "extends: base.yaml\n" + WHOLE)
    with pytest.raises(ConfigurationError, match=r"version = 99 is unknown.*run\.yaml"): load(tmp_path, WHOLE.replace("version: 2", "version: 99"))


def test_bytes_that_are_no_text(tmp_path):
    noise = random.Random(0)
    for _ in range(200):
        raw = bytearray(WHOLE.encode())
        for _i in range(3): raw[noise.randrange(len(raw))] = noise.randrange(256)
        try: load(tmp_path, bytes(raw))
        except ConfigurationError: pass
    with pytest.raises(ConfigurationError, match="too many"): load(tmp_path, "#" * 1_000_001)
    with pytest.raises(ConfigurationError, match="nested too deeply"): load(tmp_path, "data: " + "[" * 3000 + "]" * 3000)


def test_each_layer_beats_the_one_below(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {path: t.csv}\ntraining: {epochs: 2, seed: 2, batch_size: 2, warmup: .2, weight_decay: .2, learning_rate: .2}\n")
    (tmp_path / "run.prod.yaml").write_text("training: {batch_size: 4, warmup: .4, weight_decay: .4, learning_rate: .4}\n")
    text = "extends: base.yaml\ntraining: {seed: 3, batch_size: 3, warmup: .3, weight_decay: .3, learning_rate: .3}\n"
    environ = {"FTLLM_ENV": "prod", "FTLLM_TRAINING__WARMUP": ".5", "FTLLM_TRAINING__WEIGHT_DECAY": ".5", "FTLLM_TRAINING__LEARNING_RATE": ".5"}
    config = load(tmp_path, text, "training.weight_decay=.6", "training.learning_rate=.6", environ=environ, training__learning_rate=.7)
    t = config.training
    assert (t.max_length, t.epochs, t.seed, t.batch_size, t.warmup, t.weight_decay, t.learning_rate) == (None, 2, 3, 4, .5, .6, .7)
    sources = {s.key.removeprefix("training."): s.source for s in config.explain()}
    assert [sources[k] for k in ("max_length", "epochs", "seed", "batch_size", "warmup", "weight_decay", "learning_rate")] == [
        "default", "base.yaml:2", "run.yaml:2", "run.prod.yaml:1", "FTLLM_TRAINING__WARMUP", "command line", "keyword"]
    assert load(tmp_path, text, env="prod").training.batch_size == 4 and load(tmp_path, text).training.batch_size == 3
    assert {key for key, *_ in diff(config, load(tmp_path, text))} == {f"training.{k}" for k in ("batch_size", "warmup", "weight_decay", "learning_rate")}


def test_relative_paths_belong_to_the_file_that_says_them(tmp_path):
    (tmp_path / "shared").mkdir()
    for folder in (tmp_path, tmp_path / "shared"): (folder / "desk.csv").write_text("text,label\n")
    (tmp_path / "shared/base.yaml").write_text("data: {path: desk.csv, test: desk.csv}\n")
    config = load(tmp_path, "extends: shared/base.yaml\ndata: {test: desk.csv}\n")
    assert (config.data.path, config.data.test) == (str(tmp_path / "shared/desk.csv"), str(tmp_path / "desk.csv"))


def test_all_problems_at_once(tmp_path):
    with pytest.raises(ConfigurationError) as e:
        load(tmp_path, "data: {path: t.csv, lable: x}\nmodel: {quantize: nf5}\n", "training.epochs=0", environ={"FTLLM_TRUST_ALPHA": "0.2", "FTLLM_TRUST__ALPHA": "2"})
    for part in ("data.lable is no setting (run.yaml:1), data.label is", "model.quantize = 'nf5': input should be 'nf4' or 'int8' (run.yaml:2)",
                 "training.epochs = 0: input should be greater than or equal to 1 (command line)", "trust_alpha is no setting (FTLLM_TRUST_ALPHA), trust.alpha is",
                 "trust.alpha = 2: input should be less than 1 (FTLLM_TRUST__ALPHA)"): assert part in e.value.found
    assert e.value.where.endswith("run.yaml")


@pytest.mark.parametrize("text", ["training: {learning_rate: .inf}", "training: {learning_rate: .nan}", "trust: {alpha: .nan}", "training: 5", "data: [path]", "version: 3", "version: true"])
def test_refused(tmp_path, text):
    with pytest.raises(ConfigurationError): load(tmp_path, f"data: {{path: t.csv}}\n{text}\n" if "data" not in text else text)


def test_the_training_section_knows_every_dial():
    from fine_tune_llm.training.loop import Settings
    defaults, section = Settings(), TrainingSection()
    for dial in fields(Settings): assert getattr(section, dial.name, "missing") == getattr(defaults, dial.name), dial.name


def test_yaml_reads_as_two_independent_readers_agree(tmp_path):
    text = "a: 1\nb: -2.5\nc: [x, true, null, '1']\nd: {e: 1.0e+3, f: 'no'}\n"  # what 1.1 and 1.2 have in common
    assert parse_yaml(text, "x")[0] == yaml.safe_load(text)
    for value in ("no", "1e-3", "010", "12:30", "2026-11-21", "~", "", "a: b", "é", "1_000", "0x1f", ".5"):
        config = Config(data=DataSection(path="t.csv", label=value))
        assert load(tmp_path, config.to_yaml()) == config and yaml.safe_load(config.to_yaml())["data"]["label"] == value


def test_schema_accepts_and_refuses_what_the_loader_does(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    assert check.is_valid(parse_yaml(WHOLE, "x")[0]) and load(tmp_path, WHOLE)
    for bad in ("training: {epochs: 0}", "training: {epoch: 1}", "model: {quantize: nf5}", "trust: {alpha: 1}"):
        assert not check.is_valid(parse_yaml(bad, "x")[0])
        with pytest.raises(ConfigurationError): load(tmp_path, f"data: {{path: t.csv}}\n{bad}")
    assert schema["$defs"]["TrustSection"]["properties"]["alpha"]["description"] == "share of prediction sets that may miss"


def test_a_planted_secret_is_in_no_file(tmp_path, monkeypatch):
    secret = "hf_" + "Zq9" * 12
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("FTLLM_SECRETS__HUB_TOKEN", secret)
    token = find_secret("hub_token")
    assert token is not None and token.get_secret_value() == secret
    config = load(tmp_path, "data: {path: t.csv}\n", environ={**{"FTLLM_SECRETS__HUB_TOKEN": secret}})
    run = Run.create(tmp_path / "run")
    (run.path / "config.yaml").write_text(config.to_yaml())
    keep_version(run.path)
    run.write_json("explain.json", [list(s) for s in config.explain()])
    run.log("run_started", token=token, settings={"token": token})
    said = []
    for text in (f"data: {{path: {secret}}}", f"training: {{epochs: {secret}}}", f"{secret}: 1", f"data: {{path: a, lable: {secret}}}", f"a: [{secret}", f"- {secret}", f"extends: '{secret}'"):
        with pytest.raises(ConfigurationError) as e: load(tmp_path, text)
        said.append(f"{e.value} {e.value!r} {e.value.args}")
    (tmp_path / "run.yaml").unlink()
    run.log("run_failed", error=redact(f"401 for {secret}"))
    artefacts = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(artefacts) >= 4
    for p in artefacts: assert secret.encode() not in p.read_bytes(), p.name
    assert not [s for s in said if secret in s]
    assert secret not in repr(config) + json.dumps(config.model_dump(mode="json")) + repr(token)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.data())
def test_rollback_is_bit_identical(tmp_path_factory, contents, data):
    run = tmp_path_factory.mktemp("run")
    for raw in contents:
        (run / "config.yaml").write_bytes(raw)
        keep_version(run)
    to = data.draw(st.sampled_from(versions(run)))
    was = to.path.read_bytes()
    rollback(run, to.number)
    assert (run / "config.yaml").read_bytes() == was and was in contents
    assert [v.number for v in versions(run)] == list(range(1, len(versions(run)) + 1))


def test_equal_values_equal_hash(tmp_path):
    a, b = load(tmp_path, "data: {path: t.csv}\n"), load(tmp_path, "data: {path: t.csv}\n", "training.epochs=3")
    assert a == b and content_hash(a) == content_hash(b) and a.explain() != b.explain()
    assert content_hash(load(tmp_path, "data: {path: t.csv}\n", "training.epochs=4")) != content_hash(a)


@pytest.mark.parametrize("values", [{"version": "hf_" + "b" * 34}, {"data": {"path": "x.csv"}, "training": {"epochs": ["x" * 55, "hf_" + "b" * 34]}}])
def test_a_secret_is_not_repeated_in_part(values, tmp_path):
    "Neither where a number should stand, nor where a long value is cut."
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigurationError) as refused: load_config(tmp_path / "run.yaml")
    assert "hf_b" not in str(refused.value)
