"""A reviewer sits at the panels for data, calibration, conformal prediction and risk: JupyterLab and Voila, from the keyboard alone.

The harness is that of test_panel_browser: everything stays on this machine. FTLLM_SCREENSHOTS=folder keeps the pictures."""
import importlib.util
import os
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_panel_browser import CHROMIUM, MISSING, browser, keep, lab, open_and_run, voila  # noqa: F401, the fixtures

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM or bool(MISSING), reason="needs " + " and ".join(MISSING or ["a chromium"]))]

WORLD = """
import numpy as np, pandas as pd
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.data.report import check_data
from fine_tune_llm.panels.calibration_panel import CalibrationPanel
from fine_tune_llm.panels.conformal_panel import ConformalPanel
from fine_tune_llm.panels.data_panel import DataPanel
from fine_tune_llm.panels.risk_panel import RiskPanel
from fine_tune_llm.panels.start_panel import StartPanel
from fine_tune_llm.uncertainty.predictions import Predictions

EVIL = "<img src=x onerror=window.hacked=1>"
rng, labels = np.random.default_rng(0), Labels(("bill", "card", EVIL))
def world(n, split):
    logits = rng.normal(size=(n, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = (p.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return Predictions(np.array([f"{split}{i}" for i in range(n)]), labels, logits=logits * 1.5, y=y, split=split,
                       groups=pd.DataFrame({"channel": np.where(rng.random(n) < 0.3, EVIL, "web")}))
validation, calibration, test = world(500, "validation"), world(800, "calibration"), world(2000, "test")
rows = [dict(text=f"{EVIL} please refund order {i}", label=("Refund", "refund ", "Card")[i % 3]) for i in range(60)]
"""
PANELS = {"data": "DataPanel(check_data(rows, text='text', label='label'))", "calibration": "CalibrationPanel(validation, test)",
          "conformal": "ConformalPanel(calibration, test, answer=lambda text: [0.6, 0.3, 0.1])",
          "risk": "RiskPanel(calibration, test, abstain_cost=0.3, max_risk=0.2)", "start": "StartPanel()"}


def write_notebook(path: Path) -> None:
    "Write a notebook with one cell for each panel."
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cells = [new_code_cell(WORLD), *(new_code_cell(f"{name}_panel = {code}\n{name}_panel") for name, code in PANELS.items())]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)


class Seat:
    "Work one panel of a page as a person without a mouse does."
    def __init__(self, page, i: int): self.page, self.i, self.panel = page, i, page.locator(".ft-panel").nth(i)
    def title(self) -> str: return self.panel.locator("h3").first.inner_text()
    def changed(self, before: str) -> str:
        "Wait for another title."
        self.page.wait_for_function("([i, b]) => { const h = document.querySelectorAll('.ft-panel')[i]?.querySelector('h3'); return h && h.innerText !== b }", arg=[self.i, before])
        return self.title()
    def changed_by(self, act) -> str:
        "Do something, and wait until the title is another."
        before = self.title()
        act()
        return self.changed(before)
    def press(self, what: str, *keys: str) -> str:
        "Focus a control, press keys, and wait until the title is another."
        def act():
            self.panel.locator(what).first.focus()
            for key in keys:
                self.page.keyboard.press(key)
                if key == "Space": self.page.wait_for_function("!CSS.supports('selector(:open)') || document.activeElement.matches(':open')")  # a list opens in its own time
        return self.changed_by(act)
    def drag(self, what: str, share: float) -> None:
        "Take the knob of a slider with the pointer, and let it go at a share of the way."
        self.panel.locator(f"{what} .noUi-touch-area").scroll_into_view_if_needed()
        knob, way = (self.panel.locator(f"{what} .{part}").bounding_box() for part in ("noUi-touch-area", "noUi-base"))
        y = knob["y"] + knob["height"] / 2
        self.page.mouse.move(knob["x"] + knob["width"] / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(way["x"] + way["width"] * share, y)
        self.page.mouse.up()


def work(page) -> None:
    "Use every panel of the page, and check what it says."
    page.wait_for_function("document.querySelectorAll('.ft-panel h3').length >= 5")
    data, calibration, conformal, risk, start = (Seat(page, i) for i in range(5))
    assert "would stop training" in data.title()
    data.panel.locator(".ft-accept button, button.ft-accept").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('.ft-panel')[0].innerText.includes('applied')")

    assert "before calibration overconfident" in calibration.title().replace("\n", " ").lower()
    below = "Space", "ArrowDown", "Enter"  # a closed list: JupyterLab takes arrows for its own
    first = calibration.press(".ft-group select", *below)  # rows of the hostile group alone
    assert "ECE" in first and first != calibration.press(".ft-group select", *below)

    assert "target\u00a00.900" in conformal.title()
    assert "target\u00a00.890" in conformal.press(".ft-alpha input", "ArrowUp")
    assert "target\u00a00.750" in conformal.press(".ft-alpha input", "Control+a", *"0.25", "Enter")  # typed
    assert "target\u00a00.900" in conformal.changed_by(lambda: conformal.drag(".ft-alpha", (0.1 - 0.01) / 0.49))
    conformal.panel.locator(".ft-text input").focus()
    page.keyboard.type("where is my bill")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('.ft-panel')[2].innerText.includes('Set at \u03b1 = 0.10: bill')")

    assert "% of test rows are answered" in risk.title()
    assert "certified 0.205" in risk.press(".ft-max-risk input", "ArrowUp")
    assert start.panel.locator("button.ft-start").is_disabled()
    start.panel.locator(".ft-path input").focus()
    page.keyboard.type("nowhere.csv")
    page.keyboard.press("Tab")
    page.wait_for_function("document.querySelectorAll('.ft-panel')[4].innerText.includes('there is no file nowhere.csv')")
    assert page.evaluate("window.hacked === undefined") and page.locator(".ft-panel img").count() == 0
    assert page.locator(".ft-panel [role=alert]").count() == 0


def describe(page) -> None:
    "Check what a screen reader is told: each plot has a name and its numbers, each control a label, each figure a table."
    plots = page.locator(".ft-panel svg[role=img]")
    assert plots.count() >= 9 and page.locator(".ft-panel svg[role=img] > desc").count() == plots.count()
    for desc in page.locator(".ft-panel svg[role=img] > desc").all_text_contents(): assert any(c.isdigit() for c in desc), desc
    bare = page.evaluate("""() => [...document.querySelectorAll('.ft-panel select, .ft-panel input, .ft-panel button')]
        .filter(e => e.offsetParent && !(e.labels?.length || e.getAttribute('aria-label') || e.innerText.trim() || e.title)).map(e => e.outerHTML.slice(0, 120))""")
    assert not bare, bare
    assert page.locator(".ft-panel details table").count() >= 4
    assert {"\u03b1", "A person costs", "Risk at most"} <= said(page, "spinbutton") and not said(page, "slider")


def said(page, role: str) -> set[str]:
    "Collect the names of what a screen reader finds in a role; the handle of a slider of ipywidgets has none."
    found = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return {n.get("name", {}).get("value", "") for n in found if not n["ignored"] and n["role"]["value"] == role}


def check_rules(page) -> None:
    "Let axe-core look for what shuts people out: names, contrast, roles, order."
    if importlib.util.find_spec("axe_playwright_python") is None: return
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page, context=".ft-panel", options={"runOnly": ["wcag2a", "wcag2aa"]}).response["violations"]
    serious = {(v["id"], n["html"][:200]) for v in found if v["impact"] in ("serious", "critical") for n in v["nodes"]}
    assert not serious, serious


def test_panels_in_lab(lab, browser, tmp_path):  # noqa: F811
    ready, token, root = lab
    address = ready()
    write_notebook(root / "panels.ipynb")
    page = browser.new_page()
    page.set_default_timeout(60_000)
    open_and_run(page, address, token, "panels.ipynb")
    work(page)
    describe(page)
    check_rules(page)
    for width, theme in ((1100, "Light"), (640, "Dark")):
        for i, name in enumerate(PANELS):
            assert keep(page, f":nth-match(.ft-panel, {i + 1})", f"{name}_{width}_{theme.lower()}", width, f"JupyterLab {theme}", tmp_path).stat().st_size > 10_000
    check_rules(page)  # in the dark too
    assert page.evaluate("() => [...document.querySelectorAll('.ft-panel')].every(p => p.scrollWidth <= p.clientWidth + 1)")  # all of it fits
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


TRUTH = """
from fine_tune_llm.data.report import check_data
from fine_tune_llm.data.truth import data_truth
from fine_tune_llm.models.loading import load_model
from fine_tune_llm.panels.data_panel import DataPanel

EVIL = "<img src=x onerror=window.hacked=1>"
rows = [dict(prompt="Name a module.", completion=" numpy"), dict(prompt="Of all that one could import, and there is much, name one module " * 2, completion=" os"),
        dict(prompt=f"Say {EVIL}", completion=" what a whole library of modules could be for, and then some more of it, until nobody reads any further")]
truth = data_truth(rows, load_model("pocket", device="cpu").tokenizer, "completion", max_length=24, cut="prompt-left", on_cut="drop")
panel = DataPanel(check_data([dict(text=f"row {i} {w}", label=w) for i, w in enumerate("ab" * 20)], text="text", label="label"), truth)
"""
SEEN = """() => [...document.querySelectorAll('.ft-live [role=group]')].map(g => {
    const look = getComputedStyle(g.firstChild)
    return [g.getAttribute('aria-label'), g.querySelectorAll('span').length, look.color, (look.borderBottomColor.endsWith(', 0)') ? 'bare' : look.borderBottomStyle) + ' ' + look.textDecorationLine]
})"""


def test_a_row_as_the_model_sees_it(lab, browser, tmp_path):  # noqa: F811
    "What is learned, masked, cut off or dropped is told apart by name, by colour and by pattern, row by row, from the keyboard."
    ready, token, root = lab
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(TRUTH), new_code_cell("panel")], metadata=kernel), root / "truth.ipynb")
    page = browser.new_page()
    page.set_default_timeout(120_000)  # the kernel imports a tokenizer, and torch with it
    open_and_run(page, ready(), token, "truth.ipynb")
    page.wait_for_function("document.querySelectorAll('.ft-live [role=group]').length > 1")
    rows = [page.evaluate(SEEN)]
    for n in (2, 3):
        page.locator(".ft-place input").focus()
        for key in ("Control+a", str(n), "Enter"): page.keyboard.press(key)
        page.wait_for_function(f"[...document.querySelectorAll('.ft-live h3')].some(h => h.textContent.includes('row {n}'))")
        rows.append(page.evaluate(SEEN))
        for width, theme in ((1100, "Light"), (640, "Dark")) if n == 2 else ():
            assert keep(page, ".ft-panel", f"data_truth_{width}_{theme.lower()}", width, f"JupyterLab {theme}", tmp_path).stat().st_size > 10_000
    assert [[fate for fate, *_ in row] for row in rows] == [["masked", "supervised"], ["truncated", "masked", "supervised"], ["dropped"]]
    assert sum(n for _, n, *_ in rows[1][1:]) == 24  # as many as a row may keep
    looks = [(colour, pattern) for *_, colour, pattern in rows[1]]
    assert len({colour for colour, _ in looks}) == 3 and len({pattern for _, pattern in (*looks, rows[2][0][2:])}) == 4, looks  # without colour too
    check_rules(page)
    assert page.locator(".ft-panel [role=alert]").count() == 0 and page.evaluate("window.hacked === undefined") and page.locator(".ft-panel img").count() == 0
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


MANY = """
import tempfile, time
from pathlib import Path
from fine_tune_llm.core.runs import Run
from fine_tune_llm.panels.training import TrainingPanel
run = Run.create(Path(tempfile.mkdtemp()) / "run")
run.log("run_started", total_steps=400, epochs=1, rows=400, device="cpu", dtype="float32")
def step(s):
    run.log("step", step=s, epoch=s / 400, loss=0.4 + 1 / s, learning_rate=1e-4, rows_per_second=50.0)
    if s % 50 == 0: run.log("evaluated", step=s, nll=0.4 + 1 / s, accuracy=0.9, ece=0.03, ece_low=0.02, ece_high=0.04)
for s in range(1, 101): step(s)
panel = TrainingPanel(run)
panel.publisher.close()
"""
UPDATES = "for s in range(101, 301): step(s), panel.refresh(), time.sleep(0.015)"
FRAMES = """() => {
    window.frames_seen = []
    const frame = () => {
        const live = document.querySelector('.ft-live')
        window.frames_seen.push([live?.getBoundingClientRect().height ?? 0, live?.querySelectorAll('svg[role=img] path').length ?? 0])
        requestAnimationFrame(frame)
    }
    requestAnimationFrame(frame)
}"""


def test_no_frame_collapses(lab, browser):  # noqa: F811
    "Two hundred updates, and not one frame in which the figure is gone or lower than before."
    ready, token, root = lab
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(MANY), new_code_cell("panel")], metadata=kernel), root / "many.ipynb")
    page = browser.new_page()
    page.set_default_timeout(60_000)
    open_and_run(page, ready(), token, "many.ipynb")
    page.wait_for_function("document.querySelectorAll('.ft-live svg[role=img]').length === 6")
    page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
    page.evaluate(FRAMES)
    page.evaluate("code => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code}).done", UPDATES)
    page.wait_for_function("/Running, step 300/.test(document.querySelector('.ft-panel')?.textContent)")
    seen = page.evaluate("window.frames_seen")
    heights, paths = [h for h, _ in seen], [n for _, n in seen]
    lower = [(a, b) for a, b in zip(heights, heights[1:]) if b < a - 1]  # it may grow: the list of events does
    assert len(seen) > 50 and min(heights) > 100 and not lower and min(paths) >= 6, (len(seen), min(heights), lower, min(paths))
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


def test_panels_in_voila(voila, browser):  # noqa: F811
    ready, root = voila
    write_notebook(root / "panels.ipynb")
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{ready()}/voila/render/panels.ipynb")
    work(page)
    describe(page)
    check_rules(page)
    if os.environ.get("FTLLM_SCREENSHOTS"):
        for i, name in enumerate(PANELS): page.locator(".ft-panel").nth(i).screenshot(path=str(Path(os.environ["FTLLM_SCREENSHOTS"]) / f"{name}_voila.png"))
    page.close()
