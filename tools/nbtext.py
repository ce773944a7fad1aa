"""Print a notebook as text, for `git diff`: each cell's kind, id and source, and no output.

Set it up once: git config diff.nb.textconv "python tools/nbtext.py"
"""
import json
import sys
from pathlib import Path

def text(path: str | Path) -> str:
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return "\n".join(f"## [{c['cell_type']}] {c.get('id', '')}\n{''.join(c['source'])}\n" for c in cells)


if __name__ == "__main__": print(text(sys.argv[1]))
