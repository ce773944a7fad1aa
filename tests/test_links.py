"""Links of the docs: between notebooks as they stand, and between the pages that are made of them."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/"tools"))
import docs
from nbformat.v4 import new_code_cell, new_notebook, new_output, new_raw_cell

LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")

def dead(root: Path) -> list[str]:
    "The relative links in prose that lead to no file."
    found = []
    for path in sorted(root.glob("nbs/**/*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        prose = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
        prose = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", prose, flags=re.S)
        found += [f"{path.relative_to(root)}: {link}" for link in LINK.findall(prose) if not (path.parent/link).exists()]
    return found


def test_links_in_prose_lead_somewhere():
    assert dead(ROOT) == []


def test_a_dead_link_is_named(tmp_path):
    (tmp_path/"nbs").mkdir()
    cell = {"cell_type": "markdown", "source": "[a](a.ipynb) [b](b.ipynb#top) [c](https://c.d) `[d](e)` $[0](1)$"}
    (tmp_path/"nbs"/"a.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert dead(tmp_path) == ["nbs/a.ipynb: b.ipynb"]


def test_a_dead_link_between_pages_is_named(tmp_path):
    (tmp_path/"core").mkdir()
    (tmp_path/"index.html").write_text('<a href="core/a.html#top">a</a> <a class="x" href="core/gone.html">b</a> <a href="https://c.d/e">c</a> <a href="#here">d</a>')
    (tmp_path/"core"/"a.html").write_text('<a href="../index.html">up</a>')
    assert docs.broken(tmp_path) == ["index.html: a link leads nowhere: core/gone.html"]


def test_a_reference_that_failed_is_named():
    "nbdev prints the traceback of show_doc as a text."
    failed = new_code_cell("#| echo: false\nshow_doc(f)", id="f", outputs=[new_output("stream", text="Traceback (most recent call last)\nValueError")])
    page = new_notebook(cells=[new_raw_cell("---\ntitle: Toy\n---\n"), failed])
    assert docs.page_html(page, "a.ipynb", [])[1] == ["a.ipynb: cell f shows an error"]
