"""The laws of the house. Each check takes a folder and says what breaks it; each is also shown a house that it must refuse."""
import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from nbdev.clean import clean_nb

ROOT, LIB = Path(__file__).parents[1], "fine_tune_llm"
TRUST = ("core", "uncertainty", "audit", "panels")  # floors that never import a deep learning library
HEAVY = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
DEV = ("fastcore", "nbdev", "execnb", "pytest")  # not there when only the package is installed

@dataclass(frozen=True)
class Notebook:
    path: Path
    name: str  # relative to the root
    module: str  # dotted, "" if it exports nothing
    cells: list[dict]

    @property
    def number(self) -> int: return int((re.match(r"\d+", self.path.name) or ["-1"])[0])

    def exported(self) -> list[str]:
        "The sources of the exported cells."
        return [s for c in self.cells if c["cell_type"] == "code" and re.search(r"^#\|\s*export[si]?\b", s := source(c), re.M)]

def source(cell: dict) -> str: return "".join(cell["source"])

def notebooks(root: Path) -> list[Notebook]:
    found = []
    for path in sorted(root.glob("nbs/**/*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        exps = [m[1] for c in cells if c["cell_type"] == "code" and (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M))]
        found.append(Notebook(path, str(path.relative_to(root)), f"{LIB}.{exps[0]}" if exps else "", cells))
    return found

def imports(nb: Notebook) -> list[tuple[str, str]]:
    "Every (module, name or '') that an exported cell imports, also inside functions, relative ones made absolute."
    found = []
    for node in (n for s in nb.exported() for n in ast.walk(ast.parse(s))):
        if isinstance(node, ast.Import): found += [(a.name, "") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(nb.module.split(".")[:-node.level]) if node.level else ""
            found += [(".".join(filter(None, (base, node.module))), a.name) for a in node.names]
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            if node.args and isinstance(node.args[0], ast.Constant): found.append((str(node.args[0].value), ""))
    return found


# The checks

def titles(root: Path) -> list[str]:
    "A title, a subtitle of one sentence, and no bullet that nbdev would take for front matter."
    bad = []
    for nb in notebooks(root):
        head = source(nb.cells[0]) if nb.cells and nb.cells[0]["cell_type"] == "markdown" else ""
        subtitle = re.findall(r"^> ?(.*)$", head, re.M)
        if not re.match(r"# \S", head): bad.append(f"{nb.name}: the first cell is no title")
        elif len(subtitle) != 1: bad.append(f"{nb.name}: {len(subtitle)} lines of subtitle (>), must be one")
        elif not re.search(r"[.!?]$", subtitle[0]) or re.search(r"[.!?] [A-Z]", subtitle[0]):
            bad.append(f"{nb.name}: the subtitle is not one sentence: {subtitle[0]}")
        if re.search(r"^-\s+\S.*:.*\S\s*$", head, re.M): bad.append(f"{nb.name}: a bullet with a colon in the title cell becomes front matter")
    return bad

def long_cells(root: Path) -> list[str]:
    "No exported cell over 60 lines."
    return [f"{nb.name}: an exported cell of {n} lines" for nb in notebooks(root) for s in nb.exported()
            if (n := sum(1 for line in s.splitlines() if line.strip() and not line.startswith("#|"))) > 60]

def untested(root: Path) -> list[str]:
    "Who exports also asserts."
    return [f"{nb.name}: exports and asserts nothing" for nb in notebooks(root) if nb.module and not any(
        re.search(r"^\s*(assert\b|test_\w+\()", source(c), re.M) for c in nb.cells if c["cell_type"] == "code")]

def heights(root: Path) -> list[str]:
    "An exported notebook imports only from lower numbers, and never through the front door."
    nbs = [nb for nb in notebooks(root) if nb.module]
    bad, height = [], {nb.module: nb.number for nb in nbs}
    for nb in nbs:
        if nb.number < 0: bad.append(f"{nb.name}: exports and has no number")
        twins = [o.name for o in nbs if o.number == nb.number and o.name < nb.name]
        if twins: bad.append(f"{nb.name}: has the number of {twins[0]}")
        for module, name in imports(nb):
            if module == LIB and (f"{LIB}.{name}" not in height) and name != "__version__":
                bad.append(f"{nb.name}: imports {name or LIB} through the front door; name its module")
            for target in {module, f"{module}.{name}"} & height.keys() - {nb.module}:
                if height[target] >= nb.number: bad.append(f"{nb.name}: imports {target}, which stands no lower")
    return bad

def walls(root: Path) -> list[str]:
    "The trust half names no deep learning library, no exported cell a star or a development tool."
    bad = []
    for nb in notebooks(root):
        floor = nb.module.removeprefix(f"{LIB}.").split(".")[0]
        for module, name in imports(nb):
            top = module.split(".")[0]
            if floor in TRUST and top in HEAVY: bad.append(f"{nb.name}: the trust half imports {module}")
            if top in DEV: bad.append(f"{nb.name}: exports an import of {module}, a development tool")
            if name == "*": bad.append(f"{nb.name}: exports `from {module} import *`")
    return bad

def mixed(root: Path) -> list[str]:
    "Outside exported cells, imports stand alone: the docs build runs every cell that imports, and no other."
    bad = []
    for nb in (nb for nb in notebooks(root) if nb.module):
        for cell in nb.cells:
            if cell["cell_type"] != "code" or source(cell) in nb.exported() or "nbdev_export(" in source(cell): continue
            tree = ast.parse(source(cell))
            if any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(tree)) and not all(
                    isinstance(n, ast.Import | ast.ImportFrom) for n in tree.body):
                bad.append(f"{nb.name}: cell {cell.get('id')} mixes imports and other code; move them to the test imports")
    return bad

def fresh(root: Path, code: str, *args: str) -> list[str]:
    "Run code in a fresh interpreter that sees the house at `root`; give what it prints, and its error if it fails."
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=root, capture_output=True, text=True)
    return done.stdout.splitlines() + ([done.stderr.splitlines()[-1]] if done.returncode else [])

def modules(root: Path, *floors: str) -> list[str]:
    "Dotted names of all modules, or of those of some floors."
    files = sorted(f for floor in floors or ("",) for f in (root/LIB/floor).glob("**/*.py") if f.name != "_modidx.py")
    return [".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for f in files]

LOADS = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {'torch', 'transformers'} & sys.modules.keys()
    if heavy: print(f'{name}: loads {min(heavy)}'); break
"""

def trust_floors(root: Path) -> list[str]:
    "core, uncertainty, audit and panels work with no deep learning library."
    return fresh(root, LOADS, *modules(root, *TRUST))

def front_door(root: Path) -> list[str]:
    "`import fine_tune_llm` is cheap."
    return fresh(root, LOADS, LIB)

NAMES = """
import importlib, sys, types
for name in sys.argv[1:]: importlib.import_module(name)
front = sys.modules[sys.argv[1]]
for name in front.__all__:
    try: value = getattr(front, name)
    except Exception as e: print(f'{name}: {type(e).__name__}: {e}')
    else:
        if isinstance(value, types.ModuleType) and not callable(value): print(f'{name}: is a module')
        if name not in dir(front): print(f'{name}: not in dir()')
"""

def public_names(root: Path) -> list[str]:
    "Every name in `__all__` of the package resolves, also after all modules are loaded (a floor can hide a function)."
    return fresh(root, NAMES, *modules(root))

def dirty(root: Path) -> list[str]:
    "nbdev_clean would change nothing."
    bad = []
    for nb in notebooks(root):
        before = json.loads(nb.path.read_text(encoding="utf-8"))
        after = json.loads(json.dumps(before))
        clean_nb(after)
        if before != after: bad.append(f"{nb.name}: not clean; run nbdev_clean")
    return bad

NOISE = {"a path of one machine": r"(?<![\w.:])/(home|root|Users|tmp|work|opt|mnt|var)/\w", "a memory address": r"\b0x[0-9a-f]{6,}",
         "a warning": r"\b\w+Warning: ", "a progress bar": r"\d+%\|| it/s\b|s/it\b"}

def noise(root: Path) -> list[str]:
    "Outputs that no other machine, or no second run, would give; and errors."
    bad = []
    for nb in notebooks(root):
        for cell in nb.cells:
            for out in cell.get("outputs", []):
                if out["output_type"] == "error": bad.append(f"{nb.name}: cell {cell.get('id')} shows a traceback")
                texts = [out.get("text", "")] + [v for k, v in out.get("data", {}).items() if not k.startswith("image/png")]
                text = "\n".join("".join(t) if isinstance(t, list | str) else json.dumps(t) for t in texts)
                bad += [f"{nb.name}: cell {cell.get('id')} shows {what}: {m[0]}" for what, p in NOISE.items() if (m := re.search(p, text))]
    return bad

def sidebar(root: Path) -> list[str]:
    "_quarto.yml lists every notebook once, in reading order."
    def walk(items): return [f for i in items for f in ([i] if isinstance(i, str) else walk(i.get("contents", [])))]
    listed = walk(yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])
    there = [nb.name.removeprefix("nbs/") for nb in notebooks(root)]
    bad = [f"_quarto.yml: lists {f}, which is not there" for f in listed if f not in there]
    bad += [f"_quarto.yml: {f} is not listed; run python tools/docs.py --sidebar" for f in there if f not in listed]
    modules = [f for f in listed if re.search(r"/\d+_", f) and not f.startswith(("guide/", "tutorials/"))]
    return bad + ([] if modules == sorted(modules, key=lambda f: int(re.search(r"/(\d+)_", f)[1])) else ["_quarto.yml: not in reading order"])

CHECKS = [titles, long_cells, untested, heights, walls, mixed, trust_floors, front_door, public_names, dirty, noise, sidebar]

@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_house(check):
    found = check(ROOT)
    assert not found, "\n" + "\n".join(found)


# Each check refuses what it is there to refuse

TITLE = "# One\n\n> Say one thing."

def house(root: Path, cells: dict[str, list], files: dict[str, str] | None = None) -> Path:
    "Build a house of notebooks (a cell is markdown if it starts with # or >, and an (source, output) pair is code) and files."
    for name, sources in cells.items():
        nb = []
        for i, s in enumerate(sources):
            s, out = s if isinstance(s, tuple) else (s, None)
            kind = "markdown" if re.match(r"# |> ", s) else "code"
            nb.append({"cell_type": kind, "id": f"c{i}", "metadata": {}, "source": s.splitlines(True)})
            if kind == "code": nb[-1] |= {"execution_count": None, "outputs": [out] if out else []}
        (root/"nbs"/name).parent.mkdir(parents=True, exist_ok=True)
        (root/"nbs"/name).write_text(json.dumps({"cells": nb, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    for name, text in (files or {}).items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(text)
    return root

def exporting(name: str, *exported: str) -> list[str]: return [TITLE, f"#| default_exp {name}", *(f"#| export\n{e}" for e in exported), "assert True"]

def stream(text: str) -> tuple: return "1", {"output_type": "stream", "name": "stdout", "text": [text]}

def lower(*imports: str) -> dict: return {"core/00_a.ipynb": exporting("core.a", *imports), "core/01_b.ipynb": exporting("core.b")}

BROKEN = [
    (titles, {"00_a.ipynb": ["x = 1"]}, {}, "no title"),
    (titles, {"00_a.ipynb": ["# One"]}, {}, "0 lines of subtitle"),
    (titles, {"00_a.ipynb": ["# One\n\n> Say one. Then two."]}, {}, "not one sentence"),
    (titles, {"00_a.ipynb": [TITLE + "\n\n- note: this"]}, {}, "front matter"),
    (long_cells, {"00_a.ipynb": exporting("core.a", "x = 1\n" * 61)}, {}, "61 lines"),
    (untested, {"00_a.ipynb": exporting("core.a")[:-1]}, {}, "asserts nothing"),
    (heights, lower("from fine_tune_llm.core.b import x"), {}, "imports fine_tune_llm.core.b"),
    (heights, lower("from fine_tune_llm.core import b"), {}, "imports fine_tune_llm.core.b"),
    (heights, lower("import fine_tune_llm.core.b as b"), {}, "imports fine_tune_llm.core.b"),
    (heights, lower("def f():\n    from .b import x"), {}, "imports fine_tune_llm.core.b"),
    (heights, lower("def f():\n    from ..core import b"), {}, "imports fine_tune_llm.core.b"),
    (heights, lower("x = importlib.import_module('fine_tune_llm.core.b')"), {}, "imports fine_tune_llm.core.b"),
    (heights, lower("import fine_tune_llm as ft"), {}, "front door"),
    (heights, {"core/00_a.ipynb": exporting("core.a"), "data/00_b.ipynb": exporting("data.b")}, {}, "has the number of"),
    (heights, {"core/a.ipynb": exporting("core.a")}, {}, "no number"),
    (walls, lower("def f():\n    import torch.nn"), {}, "the trust half imports torch.nn"),
    (walls, lower("from fastcore.test import test_eq"), {}, "development tool"),
    (walls, lower("from math import *"), {}, "import *"),
    (mixed, {"00_a.ipynb": [*exporting("core.a"), "def f():\n    import math\nf()"]}, {}, "mixes imports"),
    (trust_floors, {}, {"fine_tune_llm/__init__.py": "", "fine_tune_llm/core/a.py": "import torch", "torch.py": ""}, "core.a: loads torch"),
    (trust_floors, {}, {"fine_tune_llm/__init__.py": "", "fine_tune_llm/core/a.py": "1/0"}, "ZeroDivisionError"),
    (front_door, {}, {"fine_tune_llm/__init__.py": "import transformers", "transformers.py": ""}, "fine_tune_llm: loads transformers"),
    (public_names, {}, {"fine_tune_llm/__init__.py": "__all__ = ['x']"}, "x: AttributeError"),
    (public_names, {}, {"fine_tune_llm/__init__.py": "__all__ = ['core']\ndef core(): pass", "fine_tune_llm/core/__init__.py": ""}, "core: is a module"),
    (noise, {"a.ipynb": [TITLE, stream("saved to /home/ann/x")]}, {}, "a path of one machine"),
    (noise, {"a.ipynb": [TITLE, stream("<f at 0x7f12ab34>")]}, {}, "a memory address"),
    (noise, {"a.ipynb": [TITLE, stream("UserWarning: slow")]}, {}, "a warning"),
    (noise, {"a.ipynb": [TITLE, stream("50%|#### ")]}, {}, "a progress bar"),
    (noise, {"a.ipynb": [TITLE, ("1/0", {"output_type": "error", "ename": "E", "evalue": "", "traceback": []})]}, {}, "a traceback"),
    (sidebar, {"a.ipynb": [TITLE]}, {"_quarto.yml": "website: {sidebar: {contents: []}}"}, "a.ipynb is not listed; run python tools/docs.py --sidebar"),
    (sidebar, {}, {"_quarto.yml": "website: {sidebar: {contents: [{section: S, contents: [a.ipynb]}]}}"}, "not there"),
    (sidebar, lower(), {"_quarto.yml": "website: {sidebar: {contents: [core/01_b.ipynb, core/00_a.ipynb]}}"}, "reading order"),
]

@pytest.mark.parametrize("check, cells, files, told", BROKEN, ids=[f"{b[0].__name__}-{b[3].split()[-1]}-{i}" for i, b in enumerate(BROKEN)])
def test_refuses(check, cells, files, told, tmp_path):
    found = check(house(tmp_path, cells, files))
    assert len(found) == 1 and told in found[0]

def test_refuses_dirty(tmp_path):
    house(tmp_path, {"a.ipynb": [TITLE, "x = 1"]})
    assert dirty(tmp_path) == []
    nb = json.loads((tmp_path/"nbs/a.ipynb").read_text())
    nb["cells"][1]["execution_count"] = 7
    (tmp_path/"nbs/a.ipynb").write_text(json.dumps(nb))
    assert dirty(tmp_path) == ["nbs/a.ipynb: not clean; run nbdev_clean"]

def test_lower_numbers_are_free(tmp_path):
    cells = {"core/00_a.ipynb": exporting("core.a"),
             "core/01_b.ipynb": exporting("core.b", "from fine_tune_llm.core.a import x", "from fine_tune_llm import __version__", "from .a import y")}
    assert heights(house(tmp_path, cells)) == walls(tmp_path) == titles(tmp_path) == []
