"""A toy package, made by hand in a folder on the path as pip would leave it, used through the public function."""
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import fine_tune_llm as ft
from fine_tune_llm.data.plugins import load_plugin, plugin_faults, plugins, read_source
from fine_tune_llm.data.steps import recipe
from fine_tune_llm.data.transforms import transform
from fine_tune_llm.models.loading import locate

CODE = '''
def letters(rest):
    for i in range(int(rest)): yield {"ask": f"letter {i}", "reply": "yes" if i % 2 else "no"}

def interview(row): return [(f"Q: {row['ask']}\\nA:", False), (f" {row['reply']}", True)]

def yes_only(rows):
    n = sum(v == "yes" for v in rows.frame["reply"])
    return [f"{n} of {len(rows)} replies are yes"] if n else []

def lower(text, only=""): return text.lower() if only in text else text

def raises(rows): raise ZeroDivisionError("no rows of kind x")
'''


def install(folder: Path, name: str, version: str, entries: str, **modules: str):
    "What pip leaves behind: modules, and a dist-info folder with METADATA and entry_points.txt."
    for module, code in modules.items(): (folder / f"{module}.py").write_text(code)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[fine_tune_llm.plugins]\n{entries}\n")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "toy-letters", "2.0", "source.letters = toy_letters:letters\ntemplate.interview = toy_letters:interview\n"
            "check.yes = toy_letters:yes_only\nstep.lower = toy_letters:lower\ncheck.raises = toy_letters:raises", toy_letters=CODE)
    yield tmp_path
    for module in [m for m in sys.modules if m.startswith(("toy_", "broken_"))]: del sys.modules[module]


def test_source_template_and_check_through_the_public_function(toy):
    t = AutoTokenizer.from_pretrained(locate("pocket"))
    truth = ft.data_truth("letters:6", t, template="interview", checks=["yes"])
    assert truth.rows.name == "letters:6" and truth.summary["kept"] == 6 and truth.notices == ("yes: 3 of 6 replies are yes",)
    by_hand = ft.data_truth([{"prompt": f"Q: letter {i}\nA:", "completion": " yes" if i % 2 else " no"} for i in range(6)], t, "completion")
    assert truth.ids.tolist() == by_hand.ids.tolist() and truth.fates.tolist() == by_hand.fates.tolist() and truth.template == "interview"


def test_step_through_transform(toy):
    data = ft.load_data([{"text": f"LOUD {i}", "label": "ab"[i % 2]} for i in range(60)])
    done = transform(data, recipe(("lower", {"only": "LOUD"})))
    assert done.counts == {"changed": len(data.train)} and done.data.train.texts == [t.lower() for t in data.train.texts]
    with pytest.raises(ft.ConfigurationError, match="'lower' does not take"): recipe(("lower", {"never": 1}))


def test_nothing_is_imported_until_it_is_used(toy):
    assert {(p.kind, p.name) for p in plugins() if p.package == "toy-letters 2.0"} == {
        ("source", "letters"), ("template", "interview"), ("check", "yes"), ("step", "lower"), ("check", "raises")}
    assert "toy_letters" not in sys.modules
    assert read_source("letters:2").places.tolist() == [1, 2] and "toy_letters" in sys.modules


BROKEN = {"source.gone = no_such_package:f": "ModuleNotFoundError", "source.gone = broken_module:f": "SyntaxError", "source.gone = toy_letters:nothing": "AttributeError",
          "source.gone = broken_exit:f": "SystemExit", "source.gone = toy_letters:__name__": "is a str, not a function"}


@pytest.mark.parametrize("entry", BROKEN)
def test_a_broken_plugin_is_named_and_breaks_nothing_else(toy, entry):
    install(toy, "broken", "0.9", entry, broken_module="def f(:\n", broken_exit="raise SystemExit(1)\n")
    assert len(read_source("letters:3")) == 3  # the others go on
    with pytest.raises(ft.ConfigurationError, match=BROKEN[entry]) as e: read_source("gone:x")
    assert "broken 0.9" in str(e.value) and "update that package, or uninstall it" in str(e.value)
    assert [BROKEN[entry] in f for f in plugin_faults("source")] == [True]


def test_a_plugin_that_fails_on_the_data_is_named(toy):
    with pytest.raises(ft.DataError, match="the source 'letters' failed: ValueError: .*toy-letters 2.0"): read_source("letters:many")
    t = AutoTokenizer.from_pretrained(locate("pocket"))
    with pytest.raises(ft.DataError, match="the check 'raises' failed: ZeroDivisionError: no rows of kind x"):
        ft.data_truth("letters:2", t, template="interview", checks=["raises"])
    with pytest.raises(ft.DataError, match=r"2 of 2 rows cannot be used \(list, rows 1, 2: KeyError: 'ask'\)"): ft.data_truth([{"a": 1}, {"a": 2}], t, template="interview")


def test_two_packages_with_one_name(toy):
    install(toy, "other-letters", "1.0", "source.letters = toy_letters:letters")
    with pytest.raises(ft.ConfigurationError, match="2 packages offer a source 'letters': other-letters 1.0, toy-letters 2.0"): load_plugin("source", "letters")


def test_import_of_the_package_survives_broken_plugins(toy):
    "In a fresh interpreter, with a plugin whose import ends the process."
    install(toy, "broken", "0.9", "source.gone = broken_exit:f\ntemplate.gone = broken_module:f", broken_module="def f(:\n", broken_exit="import os\nos._exit(9)\n")
    code = "import fine_tune_llm as ft; from fine_tune_llm.data.plugins import plugins; ft.data_truth; print(len([p for p in plugins() if p.package == 'broken 0.9']))"
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(toy)!r}); {code}"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr[-500:]


def test_names_that_are_no_plugin(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters:3").mkdir()
    with pytest.raises(ft.DataError, match="no file of rows"): read_source("letters:3")  # what stands on the disk goes first
    with pytest.raises(ft.DataError): read_source("C:\\rows.csv")
    with pytest.raises(ft.ConfigurationError, match="no template 'letters'. Fix: use one of .*interview"): ft.data_truth("letters:9", None, template="letters")
