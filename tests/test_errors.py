"""Every class of the family is raised by a real call, says what was found and how to go on, and one `except` at the edge catches it."""
import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fine_tune_llm as ft
from fine_tune_llm.audit.dossier import Dossier
from fine_tune_llm.core import errors
from fine_tune_llm.core.errors import FineTuneLLMError
from fine_tune_llm.core.trackers import export_events

ROOT = Path(__file__).parents[1]


def rows(n: int, seen: dict[str, list[str]]) -> ft.Predictions:
    ids, labels = [f"row{i}" for i in range(n)], ft.Labels(("a", "b"))
    return ft.Predictions(ids, labels, logits=np.array([[0.5, -0.5], [-1.0, 1.0]] * (n // 2)), y=np.arange(n) % 2, seen=seen)


def empty_run(folder: Path) -> None: Dossier.attach(ft.Run.create(folder / "run").path)
def no_row(folder: Path) -> None:
    from fine_tune_llm.training.evaluation import tally
    tally(np.array([[np.nan, 0.0]]), np.array([0]))


CALLS: dict[str, Callable[[Path], object]] = {
    "ConfigurationError": lambda folder: export_events(folder, to="excel"),
    "DataError": lambda folder: ft.read_rows(folder / "nothing.csv"),
    "ModelError": lambda folder: ft.load_model(folder / "nothing"),
    "TrainingError": no_row,
    "InferenceError": ft.load_bundle,
    "AuditError": empty_run,
    "RunError": ft.Run.attach,
    "OverlapError": lambda folder: ft.TemperatureScaling().fit(rows(40, {"training": ["row3"]})),
    "TooFewRowsError": lambda folder: ft.TemperatureScaling().fit(rows(2, {})),
}


def declared() -> dict[str, str]:
    "The classes of the family in the whole package, and the module of each."
    bases = {n.name: ({b.id for b in n.bases if isinstance(b, ast.Name)}, path) for path in (ROOT / "fine_tune_llm").rglob("*.py")
             for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ClassDef)}
    family = {"FineTuneLLMError"}
    while more := {name for name, (b, _) in bases.items() if b & family} - family: family |= more
    return {name: bases[name][1].relative_to(ROOT).as_posix() for name in family - {"FineTuneLLMError"}}


def test_the_table_holds_the_whole_family() -> None:
    found = declared()
    assert found.pop("Stopped") == "fine_tune_llm/apps/pipeline.py"  # the command line's own word for an interrupted run: tests/test_cli.py
    assert set(found) == set(CALLS) and set(found.values()) == {"fine_tune_llm/core/errors.py"}


@pytest.mark.parametrize("name", CALLS)
def test_each_is_raised_by_a_real_call(name: str, tmp_path: Path) -> None:
    with pytest.raises(FineTuneLLMError) as told: CALLS[name](tmp_path)
    assert type(told.value) is getattr(errors, name), "a leaf of its own, not a relative"
    e = told.value
    assert e.found and e.fix and "\n" not in str(e) and str(e).startswith(e.found) and str(e).endswith(f"Fix: {e.fix}")


def test_numbers_are_there_for_a_program() -> None:
    with pytest.raises(errors.OverlapError) as overlap: ft.TemperatureScaling().fit(rows(40, {"training": ["row3", "row5"]}))
    with pytest.raises(errors.TooFewRowsError) as few: ft.TemperatureScaling().fit(rows(2, {}))
    assert (overlap.value.ids, overlap.value.stage) == (["row3", "row5"], "training") and few.value.n == 2 < few.value.needed
