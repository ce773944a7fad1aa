"""The frame around the notebooks: how pytest runs them, the README, the docs, the text of a diff."""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from tools import docs, nbtext, readme

ROOT = Path(__file__).parents[1]
TITLE = "# Toy\n\n> Say one thing."

def write(path: Path, *sources: str) -> Path:
    "Write a notebook; what starts with # or > is prose."
    cells = [(new_markdown_cell if s.startswith(("# ", "> ")) else new_code_cell)(s) for s in sources]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return path

# Notebooks as tests

@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    "A package of one function, a notebook that tests it, and a tutorial."
    root = tmp_path_factory.mktemp("toy")
    for name in ("conftest.py", ".coveragerc"): (root/name).write_text((ROOT/name).read_text().replace("fine_tune_llm", "toy"))
    (root/"pytest.ini").write_text("[pytest]\ntestpaths = nbs\n")
    (root/"settings.ini").write_text("[DEFAULT]\nlib_name = toy\nlib_path = toy\nnbs_path = nbs\ntst_flags = slow\nuser = u\n")
    (root/"toy").mkdir()
    (root/"toy"/"__init__.py").touch()
    (root/"toy"/"core.py").write_text("def double(x):\n    return 2 * x\n\ndef unused():\n    return 0\n")
    write(root/"nbs"/"00_core.ipynb", TITLE, "#| default_exp core", "#| export\ndef double(x): return 3 * x", "two = double(1)\ndisplay(two)",
          "assert two == 2", "assert double(2) == 5", "#| slow\n1/0", "later = two + 1", "assert later == 3",
          "import os\nfrom pathlib import Path\nassert Path('00_core.ipynb').exists()\nos.environ['IN_TEST'] = '1'", "#| hide\nimport nbdev\n\nnbdev.nbdev_export()")
    write(root/"nbs"/"01_broken.ipynb", TITLE, "base = 1/0", "assert True", "assert base")
    write(root/"nbs"/"tutorials"/"01_story.ipynb", TITLE, "from dataclasses import dataclass",
          "@dataclass\nclass Point:\n    x: 'int'", "import pickle\nassert pickle.loads(pickle.dumps(Point(1))) == Point(1)", "import os\nassert 'two' not in globals() and 'IN_TEST' not in os.environ")
    return root

def run(project: Path, *args: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *args], cwd=project, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr

def test_notebooks_are_tests(project):
    out = run(project, "--cov=toy", "--cov-report=term")
    assert "PASSED nbs/00_core.ipynb::cell4" in out and "PASSED nbs/00_core.ipynb::cell8" in out and "cell6" not in out  # slow: skipped
    assert "FAILED nbs/00_core.ipynb::cell5 - assert 4 == 5" in out and "where 4 = <function double" in out and "00_core.ipynb#cell5:1" in out
    assert "PASSED nbs/tutorials/01_story.ipynb::whole" in out
    assert "FAILED nbs/01_broken.ipynb::cell2 - ZeroDivisionError" in out and "FAILED nbs/01_broken.ipynb::cell3 - NameError" in out
    assert [line.split()[1:4] for line in out.splitlines() if "toy/core.py" in line] == [["4", "1", "75%"]]  # unused() alone is missed

@pytest.mark.parametrize("which, told", [("cell8", "1 passed"), ("cell5", "1 failed"), ("cell3", "ZeroDivisionError")])
def test_one_cell_alone(project, which, told):
    "A cell that is asked for alone runs the cells above it, and tells their errors if it cannot do without them."
    file = "nbs/01_broken.ipynb" if which == "cell3" else "nbs/00_core.ipynb"
    out = run(project, file, "-k", which)
    assert told in out or (which == "cell8" and "assert 4 == 5" in out)

# README

def test_readme_is_up_to_date(): assert readme.main(ROOT, check=True) == 0

def test_readme(tmp_path):
    nb = new_notebook(cells=[
        new_markdown_cell("# Toy\n\n> Say one thing.\n\n![a](images/a.png) [b](https://x.y/images/a.png) [c](#top)"), new_code_cell("#| hide\nsecret"),
        new_code_cell("x", outputs=[new_output("stream", name="stdout", text="\x1b[1mbold\x1b[0m\n")]),
        new_code_cell("#| echo: false\ny", outputs=[new_output("display_data", data={"text/plain": "plain", "text/html": "<b>rich</b>"})])])
    (tmp_path/"nbs"/"images").mkdir(parents=True)
    (tmp_path/"nbs"/"images"/"a.png").touch()
    nbformat.write(nb, tmp_path/"nbs"/"index.ipynb")
    assert readme.main(tmp_path, check=True) == 1  # not written yet
    assert readme.main(tmp_path, check=False) == 0 == readme.main(tmp_path, check=True)
    assert (tmp_path/"README.md").read_text() == (
        "# Toy\n\n> Say one thing.\n\n![a](nbs/images/a.png) [b](https://x.y/images/a.png) [c](#top)\n\n```python\nx\n```\n\n"
        "```text\nbold\n```\n\n```text\nplain\n```\n")
    (tmp_path/"README.md").write_text("by hand")
    assert readme.main(tmp_path, check=True) == 1

def test_readme_refuses_images():
    with pytest.raises(SystemExit, match="nbs/images"): readme.shown(new_output("display_data", data={"image/png": "", "text/plain": "<Figure>"}))

# Docs

def test_story_is_what_follows_the_subtitle():
    assert docs.story("# Toy\n\n> Say one thing.\n\nOnce.\n\nTwice.") == "Once.\n\nTwice."
    assert docs.story("# Toy\n> Say one thing.") == "" == docs.story("# Toy")

def test_page_names():
    assert docs.target("core/00_errors.ipynb") == "core/errors.html" and docs.target("../index.ipynb") == "../index.html"
    assert docs.target("02_a_b.ipynb") == "a_b.html"

def test_sidebar_keeps_reading_order(tmp_path):
    for name in ("index", "apps/70_c", "core/00_a", "core/01_b", "tutorials/01_t"): write(tmp_path/"nbs"/f"{name}.ipynb", TITLE)
    (tmp_path/"_quarto.yml").write_text("website:\n  sidebar:\n    contents:\n      - gone.ipynb\n")
    got = docs.sidebar(tmp_path)
    order = [line.split("- ")[1] for line in got.splitlines() if line.endswith(".ipynb")]
    assert order == ["index.ipynb", "tutorials/01_t.ipynb", "core/00_a.ipynb", "core/01_b.ipynb", "apps/70_c.ipynb"]
    (tmp_path/"_quarto.yml").write_text(got)
    assert docs.sidebar(tmp_path) == got

def test_pages(tmp_path):
    head = new_raw_cell("---\ndescription: Say one\n  thing.\ntitle: Toy\n\n---\n\n")
    shown = new_output("execute_result", data={"text/markdown": '[source](https://x.y){target="_blank" style="a"} ### double'})
    good = new_notebook(cells=[head, new_markdown_cell("[other](../core/00_a.ipynb)"), new_code_cell("#| echo: false\nshow_doc(double)", outputs=[shown])])
    (tmp_path/"proc"/"core").mkdir(parents=True)
    nbformat.write(good, tmp_path/"proc"/"core"/"01_b.ipynb")
    assert docs.render(tmp_path/"proc", tmp_path/"docs") == []
    page = (tmp_path/"docs"/"core"/"b.html").read_text()
    assert "Say one thing." in page and 'href="../core/a.html"' in page and "show_doc" not in page and "_blank" not in page
    bad = new_notebook(cells=[head, new_code_cell("1/0", outputs=[new_output("error", ename="E", evalue="", traceback=[])])])
    nbformat.write(bad, tmp_path/"proc"/"core"/"01_b.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path/"proc"/"index.ipynb")
    found = docs.render(tmp_path/"proc", tmp_path/"docs")
    assert len(found) == 2 and found[0] == "index.ipynb: no title" and "shows an error" in found[1]

# Diffs

def test_text_of_a_notebook(tmp_path):
    path = write(tmp_path/"a.ipynb", TITLE, "1 + 1")
    nb = nbformat.read(path, 4)
    assert nbtext.text(path) == f"## [markdown] {nb.cells[0].id}\n{TITLE}\n\n## [code] {nb.cells[1].id}\n1 + 1\n"
