"""Let plain `pytest` run the notebooks: each cell that asserts something is one test, run against the exported module.

A module notebook's cells see a copy of the exported module's names, so coverage counts the package itself. Any other
notebook gets a module of its own; one in `nbs/tutorials` runs whole, as one test that is slow (the front page's ten lines are not)."""
import ast
import importlib
import linecache
import os
import re
import sys
import types
from pathlib import Path

import pytest
from _pytest.assertion.rewrite import rewrite_asserts

os.environ.update(MPLBACKEND="Agg", HF_HUB_OFFLINE="1")  # before anything imports matplotlib or transformers
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before anything imports torch: threads that spin starve each other

from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

EXPORTED = {"export", "exports", "exporti", "default_exp"}
IS_TEST = re.compile(r"^\s*(assert\b|test_\w+\(|with expect_fail)", re.M)


class Notebook(pytest.File):
    "Yield the test cells of one notebook, and run its cells from the top, each once."
    def collect(self):
        nb, cfg = NBProcessor(self.path, procs=FrontmatterProc, process=True).nb, get_config()
        if str(getattr(nb, "frontmatter_", {}).get("skip_exec")).lower() == "true": return
        skip = EXPORTED | set(cfg.tst_flags.split()) - set(os.environ.get("NB_FLAGS", "").split())
        exports = [c.directives_["default_exp"][0] for c in nb.cells if "default_exp" in c.directives_]
        self.module, self.names, self.errors = exports and f"{cfg.lib_path.name}.{exports[0]}", None, {}
        self.todo = [c for c in nb.cells if c.cell_type == "code" and not skip & c.directives_.keys()
                     and c.directives_.get("eval:") != ["false"] and "nbdev_export(" not in c.source]
        self.folder = self.path.parent
        whole = self.path.parent.name == "tutorials"
        for cell in list(self.todo):
            if cell is self.todo[-1] or (not whole and IS_TEST.search(cell.source)):
                item = Cell.from_parent(self, name="whole" if whole else f"cell{cell.idx_}", cell=cell)
                if whole: item.add_marker("slow")  # CI runs them as a reader does, with nbdev_test
                yield item

    def namespace(self) -> dict:
        if self.module: names = dict(vars(importlib.import_module(self.module)))
        else:  # registered, so that dataclasses and pickles of what a cell defines find their module
            own = sys.modules[f"notebook_{self.path.stem}"] = types.ModuleType(f"notebook_{self.path.stem}")
            names = vars(own)
        names["display"] = lambda *shown, **how: None
        return names

    def run(self, cell) -> None:
        if self.names is None: self.names = self.namespace()
        name, src = f"{self.path}#cell{cell.idx_}", cell.source
        linecache.cache[name] = len(src), None, src.splitlines(True), name
        tree = ast.parse(src, name)
        rewrite_asserts(tree, src.encode(), name, self.config)
        here = Path.cwd()
        os.chdir(self.folder)  # the notebook's own at first, as in Jupyter; then wherever the last cell went
        try: exec(compile(tree, name, "exec", dont_inherit=True), self.names)
        finally:
            self.folder = Path.cwd()
            os.chdir(here)

    def run_to(self, cell) -> None:
        "Run what has not run yet, up to `cell`; raise the first error that no test has told."
        while self.todo and self.todo[0].idx_ <= cell.idx_:
            now = self.todo.pop(0)
            try: self.run(now)
            except (Exception, SystemExit, pytest.skip.Exception, pytest.fail.Exception) as e: self.errors[now.idx_] = e
        first = min(self.errors, default=cell.idx_ + 1)
        if first <= cell.idx_: raise self.errors.pop(first)


class Cell(pytest.Item):
    "One test: a cell that asserts, after the cells above it."
    def __init__(self, cell, **kw): super().__init__(**kw); self.cell = cell

    def reportinfo(self): return self.path, self.cell.idx_, f"{self.path.stem}:{self.name}"
    def runtest(self): self.parent.run_to(self.cell)
    def _traceback_filter(self, excinfo):
        own = [i for i, entry in enumerate(excinfo.traceback) if "#cell" in str(entry.path)]
        return type(excinfo.traceback)(excinfo.traceback[own[0]:]) if own else excinfo.traceback


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and file_path.name[0] not in "_.": return Notebook.from_parent(parent, path=file_path)


def pytest_runtest_setup(item):
    os.environ.pop("IN_TEST", None)  # nbdev's test_nb sets it and leaves it; nbdev_export then does nothing


def pytest_runtest_teardown(item):
    if "matplotlib.pyplot" in sys.modules: sys.modules["matplotlib.pyplot"].close("all")
