"""Write README.md from nbs/index.ipynb, without Quarto. With --check: change nothing, and fail if it is out of date.

Every cell becomes Markdown: prose as it is, code in a fence that names its language, outputs as text below. nbdev's marks
hold: `#| hide` drops a cell, `#| echo: false` its code, `#| output: false` its outputs."""
import re
import sys
from pathlib import Path

from nbdev.process import NBProcessor

ROOT = Path(__file__).parents[1]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LINK = re.compile(r'(\]\(|\b(?:src|href)=")(?![a-z]+:|[#/])([^)"#\s]+)')

def shown(output: dict) -> str:
    "Give one output as Markdown, from its plainest form."
    data = output.get("data", {"text/plain": output.get("text", "")})
    if any(kind.startswith("image/") for kind in data):
        raise SystemExit("nbs/index.ipynb: an output is an image. Fix: save it under nbs/images and link it in a prose cell")
    if "text/markdown" in data: return "".join(data["text/markdown"])
    return "```text\n" + ANSI.sub("", "".join(data.get("text/plain", ""))).rstrip() + "\n```"

def cell_text(cell) -> str:
    "Give one cell as Markdown, empty if it is hidden."
    marks, source = cell.directives_, re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    if {"hide", "default_exp"} & marks.keys() or cell.cell_type == "raw" or not source: return ""
    if cell.cell_type == "markdown": return source
    code = "" if marks.get("echo:") == ["false"] or "hide_input" in marks else f"```python\n{source}\n```"
    quiet = marks.get("output:") == ["false"] or "hide_output" in marks
    return "\n\n".join(filter(None, [code, *([] if quiet else map(shown, cell.get("outputs", [])))]))

def readme(index: Path) -> str:
    "Give the README of an index notebook, its links seen from the project's root."
    text = "\n\n".join(filter(None, map(cell_text, NBProcessor(index).nb.cells))) + "\n"
    here = index.parent
    return LINK.sub(lambda m: m[1] + (f"{here.name}/{m[2]}" if (here/m[2]).exists() else m[2]), text)

def main(root: Path, check: bool) -> int:
    index, target = root/"nbs"/"index.ipynb", root/"README.md"
    if not index.exists(): raise SystemExit("nbs/index.ipynb is missing: README.md is made from it")
    text = readme(index)
    if not check: target.write_text(text, encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != text:
        print("README.md is not what nbs/index.ipynb says. Fix: python tools/readme.py")
        return 1
    return 0

if __name__ == "__main__": sys.exit(main(ROOT, "--check" in sys.argv[1:]))
