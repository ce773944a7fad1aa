"""A real browser reviews an audit in JupyterLab from the keyboard alone: sort, drill down, challenge, answer, sign, reopen.

The harness is that of test_panel_browser: everything stays on this machine. FTLLM_SCREENSHOTS=folder keeps the pictures."""
import os
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from test_panel_browser import CHROMIUM, MISSING, browser, keep, lab, open_and_run, voila  # noqa: F401, the fixtures
from test_panels_browser import check_rules

from fine_tune_llm.audit.dossier import Dossier

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM or bool(MISSING), reason="needs " + " and ".join(MISSING or ["a chromium"]))]

AUDIT = """
from datetime import date
import numpy as np, pandas as pd
from fine_tune_llm.audit.dossier import Dossier
from fine_tune_llm.audit.slices import find_slices
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.panels.audit_panel import AuditPanel
from fine_tune_llm.uncertainty.predictions import Predictions

rng, n, labels = np.random.default_rng(4), 1200, Labels(("no", "yes"), description="whether a letter needs a call")
sent, ward = rng.choice(["mail", "fax", "phone"], n, p=[0.57, 0.4, 0.03]), rng.choice(["north", "south", "<img src=x onerror=window.hacked=1>"], n)
odds = rng.normal(0, 2.5, n)
wrong = rng.random(n) < np.where(sent == "fax", 0.25, 0.05)
p = 1 / (1 + np.exp(-odds))
preds = Predictions([f"r{i}" for i in range(n)], labels, probs=np.stack([1 - p, p], axis=1), y=np.where(wrong, odds < 0, odds > 0).astype(int),
                    groups=pd.DataFrame({"sent": sent, "ward": ward}), texts=[f"<img src=x onerror=window.hacked=1> letter {i} of a patient" for i in range(n)],
                    split="test", source="toy 1", seen={"training": ["t0"]})
dossier = Dossier.create(FOLDER, "Sorts letters of patients", owner="Ada")
report = dossier.audit(preds, groups=["sent", "ward"], metrics=["FPR", "FNR"], by="Ada")
for name in ("data", "limits", "calibration", "coverage", "risk", "groups"):
    dossier.waive(name, "a pilot of ten users with a person beside it", expires="2099-12-31", by="Ada")
panel = AuditPanel(report, preds, slices=find_slices(preds, words=0), dossier=dossier)
"""


# What stands outside its panel or its table, and so would have to be moved to be read
CUT = """() => [...document.querySelectorAll('.ft-audit')].flatMap(panel => [...panel.querySelectorAll('th, td, .chip, h3, h4, button, select')]
    .filter(e => e.offsetParent && e.getBoundingClientRect().right > panel.getBoundingClientRect().right - 12 + 1).map(e => e.textContent))"""


def write_notebook(path: Path, folder: Path) -> None:
    cells = [new_code_cell(f"FOLDER = {str(folder)!r}\n{AUDIT}"), new_code_cell("panel"), new_code_cell("print(panel.last_error)")]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)


def test_a_review_from_the_keyboard(lab, browser, tmp_path):  # noqa: F811
    ready, token, root = lab
    address, folder = ready(), tmp_path / "letters"
    write_notebook(root / "audit.ipynb", folder)
    page = browser.new_page()
    page.set_default_timeout(60_000)
    open_and_run(page, address, token, "audit.ipynb")
    page.locator(".ft-audit .gaps svg[role=img]").first.wait_for(state="attached")
    assert "checks fail" in page.locator(".ft-audit h3").inner_text() and page.locator(".ft-audit [role=alert]").count() == 0
    unlabelled = """() => [...document.querySelectorAll('.ft-audit :is(input,select,textarea,button)')]
                    .filter(e => !e.labels?.[0]?.textContent.trim() && !e.textContent.trim()).map(e => e.outerHTML)"""
    assert page.evaluate(unlabelled) == []
    check_rules(page)
    keep(page, ".ft-audit", "audit_light_1100", 1100, "JupyterLab Light", tmp_path, 3600)
    keep(page, ".ft-audit", "audit_light_600", 600, "JupyterLab Light", tmp_path, 3600)
    assert page.evaluate(CUT) == []

    def choose(steps: int) -> None:
        "Choose in the focused list: while it is closed, JupyterLab takes arrows and letters for its own."
        page.keyboard.press("Space")
        for _ in range(steps): page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
    page.locator(".ft-sort select").focus()
    choose(2)
    page.wait_for_function("document.querySelector('.ft-status')?.textContent.includes('sorted by group')")
    assert page.locator(".gaps th[scope=rowgroup]").count() == 6
    page.keyboard.press("Tab")
    choose(1)
    page.wait_for_function("[...document.querySelectorAll('.gaps tbody .chip')].every(c => c.textContent === 'fail')")
    assert page.evaluate("document.activeElement.closest('.ft-verdict') !== null")  # the focus stays where it was
    for _ in range(2): page.keyboard.press("Tab")
    choose(1)  # the group that fails most
    page.wait_for_function("document.querySelector('.ft-examples h4')?.textContent.includes('sent = fax')")
    assert "hidden" in page.locator(".ft-examples").inner_text() and "letter" not in page.locator(".ft-examples").inner_text()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.ft-examples')?.textContent.includes('of a patient')")

    def write(what: str, words: str) -> None:
        page.locator(f".ft-{what} :is(input, textarea)").fill(words)
        page.keyboard.press("Tab")
    def press(what: str, told: str, where: str = ".ft-status") -> None:
        page.locator(f"button.ft-{what}").focus()
        page.keyboard.press("Enter")
        page.wait_for_function(f"document.querySelector('.ft-audit')?.querySelector('{where}')?.textContent.includes('{told}')")

    write("name", "Grace"), press("sign", "are open", "[role=alert]")
    page.locator(".ft-requirement select").select_option("robustness")
    write("name", "Ada"), write("expires", "2099-12-31"), write("words", "words of one kind only were tried"), press("waive", "Waived robustness")
    press("sign", "Signed by Ada")
    write("name", "Grace"), press("sign", "challenged nothing", "[role=alert]")
    write("words", "Why is fax so much worse than mail?"), press("challenge", "Challenged by Grace")
    write("name", "Ada"), write("words", "The scanner of March; it has been replaced."), press("answer", "Answered by Ada")
    write("name", "Grace"), press("sign", "Signed by Grace")
    assert page.locator(".ft-audit [role=alert]").count() == 0 and "reviewer: Grace" in page.locator(".ft-audit").inner_text()
    assert Dossier.attach(folder).verify().ok  # the folder is all that this process shares with the kernel
    keep(page, ".ft-audit", "audit_dark_640", 640, "JupyterLab Dark", tmp_path, 3600)
    check_rules(page)
    assert page.evaluate("document.querySelector('.ft-audit').scrollWidth <= document.querySelector('.ft-audit').clientWidth + 1")
    assert page.evaluate("window.hacked === undefined") and page.locator(".ft-audit img").count() == 0

    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code: 'panel.close()'}).done")
    picture = ".jp-OutputArea-output .look"
    page.wait_for_function(f"document.querySelector('{picture}')?.textContent.includes('reviewer: Grace') && !document.querySelector('.ft-choices')")
    assert "of a patient" not in page.locator(picture).first.inner_text()  # the picture keeps no text
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.goto(f"{address}/doc/tree/audit.ipynb?token={token}&reset")  # reopened: no cell is run, no widget is there
    page.wait_for_function(f"document.querySelector('{picture}')?.textContent.includes('reviewer: Grace')")
    assert keep(page, picture, "audit_saved_1100", 1100, "JupyterLab Light", tmp_path, 3600).stat().st_size > 10_000
    page.evaluate("() => window.jupyterapp.shell.currentWidget?.sessionContext?.shutdown()")
    page.close()


def strips(picture: Path, height: int = 120) -> list[int]:
    "Find the darkest pixel of each strip of a picture, 0 to 255."
    image = Image.open(picture).convert("L")
    return [image.crop((0, y, image.width, y + height)).getextrema()[0] for y in range(0, image.height - height, height)]


def test_a_review_in_voila(voila, browser, tmp_path):  # noqa: F811
    (ready, root), folder = voila, tmp_path / "letters"
    write_notebook(root / "audit.ipynb", folder)
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{ready()}/voila/render/audit.ipynb")
    page.locator(".ft-audit .gaps svg[role=img]").first.wait_for(state="attached")
    page.locator(".ft-sort select").focus()
    for key in ("Space", "ArrowDown", "ArrowDown", "Enter"): page.keyboard.press(key)
    page.wait_for_function("document.querySelector('.ft-status')?.textContent.includes('sorted by group')")
    page.locator(".ft-name input").fill("Grace")
    page.locator("button.ft-sign").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.ft-audit [role=alert]')?.textContent.includes('are open')")
    check_rules(page)
    page.keyboard.press("Shift+Tab")  # back to the top, as a reader goes there
    page.locator(".ft-sort select").focus()
    head = "(() => { const h = document.querySelector('.ft-audit h3').getBoundingClientRect(); return document.elementFromPoint(h.left + 5, h.top + 5)?.tagName })()"
    page.wait_for_function(f"{head} === 'H3'")  # painted, and nothing over it
    page.set_viewport_size({"width": 1100, "height": 3000})  # Voila scrolls a box of its own, and a picture holds what is in view
    picture = Path(os.environ.get("FTLLM_SCREENSHOTS") or tmp_path) / "audit_voila.png"
    page.locator(".ft-audit").screenshot(path=str(picture))
    for strip in strips(picture): assert strip < 255, "a strip of the picture is blank"
    assert page.evaluate("window.hacked === undefined") and page.locator(".ft-audit img").count() == 0
    assert Dossier.attach(folder).verify().altered == ()
    page.close()
