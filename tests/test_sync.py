"""The package is what the notebooks export: no line edited by hand, no module whose notebook is gone."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def copy(root: Path, to: Path) -> Path:
    "Copy what an export reads and writes."
    for name in ("nbs", "fine_tune_llm"):
        shutil.copytree(root/name, to/name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(root/name, to)
    return to


def modules(root: Path) -> dict[str, str]: return {str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in root.glob("fine_tune_llm/**/*.py")}


def out_of_step(root: Path, scratch: Path) -> list[str]:
    "Export into a copy that holds no module, and name the files that differ."
    copy(root, scratch)
    for f in scratch.glob("fine_tune_llm/**/*.py"):
        if f.name != "__init__.py": f.unlink()
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # with IN_TEST set, nbdev_export does nothing and says nothing
    subprocess.run([sys.executable, "-c", "import nbdev; nbdev.nbdev_export()"], cwd=scratch, env=env, check=True)
    here, fresh = modules(root), modules(scratch)
    return sorted(name for name in here.keys() | fresh.keys() if here.get(name) != fresh.get(name))


def test_exported_code_in_step(tmp_path):
    assert out_of_step(ROOT, tmp_path/"fresh") == [], "run nbdev_export; delete a module whose notebook is gone"


@pytest.mark.parametrize("name, change", [("fine_tune_llm/core/errors.py", lambda f: f.write_text(f.read_text() + "x = 1\n")),
                                          ("fine_tune_llm/core/labels.py", Path.unlink),
                                          ("fine_tune_llm/core/gone.py", Path.touch)], ids=["edited", "missing", "stale"])
def test_refuses(name, change, tmp_path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    here = copy(ROOT, tmp_path/"here")
    before = out_of_step(here, tmp_path/"one")
    change(here/name)
    assert set(out_of_step(here, tmp_path/"two")) - set(before) == {name}
