"""Build the docs into _docs/: by Quarto where it is on PATH, else as plain HTML pages by nbconvert.

`--sidebar` writes the list of notebooks into _quarto.yml instead. Pages come from _proc/, where nbdev puts the notebooks
without hidden cells and with the reference of what they export. nbdev takes the whole title cell for front matter, so
the story below the subtitle is put back. Nothing here installs Quarto, as `nbdev_docs` would."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).parents[1]
FLOORS = ("guide", "tutorials", "core", "uncertainty", "audit", "data", "models", "training", "panels", "apps")
LIST = "    contents:"  # the line of _quarto.yml below which the list stands

def pages(folder: Path) -> list[str]:
    "Name the notebooks below a folder, in reading order."
    there = (p.relative_to(folder) for p in folder.glob("**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    return sorted(map(str, there), key=lambda p: (FLOORS.index(p.split("/")[0]) if "/" in p else -1, p))

def sidebar(root: Path) -> str:
    "Give _quarto.yml with every notebook listed, in reading order."
    there, text = pages(root/"nbs"), (root/"_quarto.yml").read_text(encoding="utf-8")
    lines = [f"      - {p}" for p in there if "/" not in p]
    for floor in FLOORS:
        own = [p for p in there if p.startswith(f"{floor}/")]
        if own: lines += [f"      - section: {floor.capitalize()}", "        contents:", *(f"          - {p}" for p in own)]
    return "\n".join([text[:text.index(LIST) + len(LIST)], *lines]) + "\n"

def story(title_cell: str) -> str:
    "Give what stands below the title and the subtitle."
    return re.sub(r"\A\s*# .*\n*(> .*\n*)?", "", title_cell).strip()

def process(root: Path) -> Path:
    "Let nbdev write the notebooks of the pages into _proc/, then put back each story."
    os.chdir(root)
    shutil.rmtree(root/"_proc", ignore_errors=True)
    proc_nbs(n_workers=2)
    for page in pages(root/"_proc"):
        nb, first = nbformat.read(root/"_proc"/page, 4), nbformat.read(root/"nbs"/page, 4).cells[0]
        if story(first.source): nb.cells.insert(1, new_markdown_cell(story(first.source), id="story"))
        nbformat.write(nb, root/"_proc"/page)
    return root/"_proc"

def target(page: str) -> str:
    "Name a page as nbdev's links do: without the number."
    return re.sub(r"(^|/)\d+[a-z]?_", r"\1", page).removesuffix(".ipynb") + ".html"

def plain(cell):
    "Do for nbconvert what Quarto would: show only the output of a cell that says `echo: false`."
    if cell.cell_type != "code" or not re.search(r"^#\| *echo: *false", cell.source, re.M): return cell
    shown = ["".join(o.data["text/markdown"]) for o in cell.outputs if "text/markdown" in o.get("data", {})]
    return new_markdown_cell(re.sub(r'\{target="_blank"[^}]*\}', "", "\n\n".join(shown)))

def page_html(nb, page: str, there: list[str]) -> tuple[str, list[str]]:
    "Give a page as HTML that links to the others, and what is wrong with it."
    from nbconvert import HTMLExporter  # here, as the workers of proc_nbs import this file and need it not
    failed = lambda o: o.output_type == "error" or "Traceback (most recent call last)" in o.get("text", "")  # of show_doc it is but a text
    bad = [f"{page}: cell {c.get('id')} shows an error" for c in nb.cells for o in c.get("outputs", []) if failed(o)]
    head = yaml.safe_load(nb.cells[0].source.strip().strip("-")) if nb.cells and nb.cells[0].cell_type == "raw" else {}
    if "title" not in head: return "", [*bad, f"{page}: no title"]
    up, cfg = "../" * page.count("/"), get_config()
    links = " · ".join(f"[{Path(target(p)).stem}]({up}{target(p)})" for p in there)
    nb.cells[:1] = [new_markdown_cell(links), new_markdown_cell(f"# {head['title']}\n\n> {head.get('description', '')}")]
    nb.cells = [plain(c) for c in nb.cells]
    html, _ = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(nb, {"metadata": {"name": head["title"]}})
    html = html.replace(f'href="{cfg.doc_host}{cfg.doc_baseurl}/', f'href="{up}')
    return re.sub(r'(?<=href=")(?!https?:)[^"]*\.ipynb\b', lambda m: target(m[0]), html), bad

def render(proc: Path, docs: Path) -> list[str]:
    "Write one HTML page for each notebook; give what is wrong with them."
    shutil.rmtree(docs, ignore_errors=True)
    found, there = [], pages(proc)
    for page in there:
        html, bad = page_html(nbformat.read(proc/page, 4), page, there)
        (docs/page).parent.mkdir(parents=True, exist_ok=True)
        (docs/target(page)).write_text(html, encoding="utf-8")
        found += bad
    if (proc/"images").exists(): shutil.copytree(proc/"images", docs/"images")
    return found

def broken(docs: Path) -> list[str]:
    "Name the links between pages that lead nowhere."
    found = []
    for page in sorted(docs.glob("**/*.html")):
        links = set(re.findall(r'<a\b[^>]*\bhref="(?![a-z]+:|[#/])([^"#?]+)', page.read_text(encoding="utf-8")))
        found += [f"{page.relative_to(docs)}: a link leads nowhere: {link}" for link in sorted(links) if not (page.parent/unquote(link)).exists()]
    return found

def main(root: Path) -> int:
    proc, docs = process(root), root/"_docs"
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render", "--no-cache"], cwd=proc, check=True)
        shutil.rmtree(docs, ignore_errors=True)
        shutil.move(proc/docs.name, docs)
        bad = broken(docs)
        print(*bad, sep="\n")
        return bool(bad)
    bad = render(proc, docs) + broken(docs)
    print(*bad, f"{len(pages(proc))} pages in {docs.name}/, by nbconvert (no Quarto here, so no search and no sidebar)", sep="\n")
    return bool(bad)

if __name__ == "__main__":
    if "--sidebar" in sys.argv[1:]: (ROOT/"_quarto.yml").write_text(sidebar(ROOT), encoding="utf-8")
    else: sys.exit(main(ROOT))
