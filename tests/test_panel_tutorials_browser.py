"""The tutorials of the panels, opened in JupyterLab: what the page shows as a picture is there alive, and says the same.

Each tutorial is run up to its first picture, with the panel itself in the place of the picture. With FTLLM_SCREENSHOTS=folder the
screenshots stay, and `tools/pictures.py folder` makes the pictures of the docs out of them. The harness is that of test_panel_browser."""
import html
import os
import re
from pathlib import Path

import nbformat
import pytest
from test_panel_browser import CHROMIUM, MISSING, browser, keep, lab, open_and_run, press  # noqa: F401, the fixtures
from test_panel_desks_browser import write_notebook
from test_panels_browser import check_rules

from fine_tune_llm.training.launch import launch

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM or bool(MISSING), reason="needs " + " and ".join(MISSING or ["a chromium"]))]

TUTORIALS = Path(__file__).parents[1] / "nbs" / "tutorials"
PICTURE = re.compile(r"^Page\(panel\.picture\(\).*\Z", re.M)
DESKS = {"12_data_panel": 4, "14_calibration_panel": 2, "15_conformal_panel": 4, "16_risk_panel": 6, "17_audit_panel": 15}  # visible controls


def words(text: str) -> str: return " ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split())


def live(name: str):
    "Give a tutorial up to its first picture, with the panel in its place, and the title that the picture had."
    nb = nbformat.read(TUTORIALS / f"{name}.ipynb", 4)
    at = next(i for i, c in enumerate(nb.cells) if PICTURE.search(c.source))
    still = next(o.data["text/html"] for o in nb.cells[at].outputs if "text/html" in o.get("data", {}))
    nb.cells = nb.cells[:at + 1]
    nb.cells[at].source = PICTURE.sub("panel", nb.cells[at].source)
    return nb, words(re.search("<h3[^>]*>(.*?)</h3>", still, re.S)[1])


@pytest.mark.parametrize("name", DESKS)
def test_a_tutorial_is_alive(name, lab, browser, tmp_path):  # noqa: F811
    ready, token, root = lab
    nb, title = live(name)
    nbformat.write(nb, root / f"{name}.ipynb")
    page = browser.new_page()
    page.set_default_timeout(120_000)
    open_and_run(page, ready(), token, f"{name}.ipynb")
    page.locator(".ft-panel svg").first.wait_for(state="attached")
    assert words(page.locator(".ft-panel h3").first.inner_text()) == title
    controls = page.locator(".ft-panel :is(select, button, textarea, input):visible")
    assert controls.count() == DESKS[name] and page.locator(".ft-panel [role=alert]").count() == 0
    check_rules(page)
    assert keep(page, ".ft-panel", f"tutorial_{name}", 1000, "JupyterLab Light", tmp_path, 3600).stat().st_size > 10_000
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


@pytest.mark.skipif(not os.environ.get("FTLLM_SCREENSHOTS"), reason="takes a minute or two to make one picture: set FTLLM_SCREENSHOTS")
def test_a_training_is_alive(lab, browser, tmp_path):  # noqa: F811
    "The embedded model learns on its embedded data, long enough for curves, and somebody halves the learning rate on the way."
    ready, token, root = lab
    training = dict(epochs=4, lora=dict(r=8), batch_size=8, learning_rate=5e-4, max_length=96)
    run = launch(dict(data=dict(path="docstrings", rows=80), model=dict(device="cpu"), training=training), out=tmp_path / "run")
    try:
        write_notebook(root / "training.ipynb", run.path)
        page = browser.new_page()
        page.set_default_timeout(300_000)
        open_and_run(page, ready(), token, "training.ipynb")
        reached = "share => { const [, at, of] = /step ([^ ]*) of (.*?)epoch/.exec(document.querySelector('.ft-panel')?.textContent ?? '') ?? []; \
return at && +at.replace(/\\D/g, '') > share * +of.replace(/\\D/g, '') }"
        page.wait_for_function(reached, arg=0.4)
        press(page, "ft-set", "Learning rate \u00d7 0.5", run)
        page.wait_for_function(reached, arg=0.65)
        check_rules(page)
        keep(page, ".ft-panel", "tutorial_training", 1000, "JupyterLab Light", tmp_path)
        assert "applied" in page.locator(".ft-live").inner_text() and page.locator(".ft-panel [role=alert]").count() == 0
        page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        page.close()
    finally:
        if run.process.poll() is None: run.process.kill()
        run.process.wait(30)
