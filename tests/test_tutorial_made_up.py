"The tutorial on auditing reads posts that are not everywhere: without them it makes some up, and must go the same way to its end."
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "nbs/tutorials/11_auditing_your_own.ipynb"
FOLDER = "../../../shared/data/fairness"


@pytest.mark.slow
def test_the_made_up_posts_go_to_the_signature(tmp_path, monkeypatch, capsys):
    cells = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    source = "\n".join(cells)
    assert source.count(FOLDER) == 1
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "made_up"}
    exec(compile(source.replace(FOLDER, "nowhere"), str(NOTEBOOK), "exec"), names)  # its own assertions are in it
    told = capsys.readouterr().out
    assert "made-up posts" in told and "refused: 4 requirements are open" in told and "SOUND" in told and "altered: audit/report.json" in told
    assert "HateXplain" not in names["origin"] and not names["home"].exists()
