"""Several desks at one run, in a real browser: two notebooks and a Voila page watch and steer a training in a process of its own.

A page is reloaded, a kernel is restarted and attaches again, and each press is acknowledged at its panel. How long that took is told by clocks
that were there anyway: the browser's at the press and at the change of the page, the kernel's in the run folder. The harness is that of
test_panel_browser: everything stays on this machine. FTLLM_SCREENSHOTS=folder keeps the pictures."""
import os
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_panel_browser import CHROMIUM, MISSING, browser, keep, lab, open_and_run, press, voila  # noqa: F401, the fixtures
from test_panels_browser import check_rules

from fine_tune_llm.training.launch import launch

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM or bool(MISSING), reason="needs " + " and ".join(MISSING or ["a chromium"]))]

def write_notebook(path: Path, folder: Path) -> None:
    "Write a notebook that attaches to a run."
    code = f"from fine_tune_llm import TrainingPanel\nTrainingPanel.attach({str(folder)!r})"
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)


@pytest.fixture
def run(tmp_path):
    "A training in a process of its own."
    words = "morning evening street garden window river letter kitchen market school bridge forest".split()
    lines = [f"{a} and {b} in the {w},{w}" for w in ("rain", "sun") for i, a in enumerate(words) for b in words[:i]]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    config = dict(data=dict(path=str(tmp_path / "rows.csv")), model=dict(device="cpu"), training=dict(epochs=800, lora=dict(r=4), batch_size=16, learning_rate=1e-3))
    run = launch(config, out=tmp_path / "run")
    try: yield run
    finally:
        if run.process.poll() is None: run.process.kill()
        run.process.wait(30)


class Desk:
    "A page with the panel of the run."
    def __init__(self, page): self.page = page
    def wait(self, condition: str, arg=None) -> None: self.page.wait_for_function(condition, arg=arg)
    def sees_it_move(self) -> None:
        "Wait for the curve, and for another one."
        self.page.locator(".ft-live path").first.wait_for(state="attached")
        before = self.page.locator(".ft-live").inner_html()
        self.wait("before => document.querySelector('.ft-live')?.innerHTML !== before", before)
        self.wait("document.querySelectorAll('.ft-panel [role=alert]').length === 0")


def test_desks_of_one_run(lab, voila, browser, run, tmp_path, record_property):  # noqa: F811
    (lab_ready, token, lab_root), (voila_ready, voila_root), folder = lab, voila, run.path
    for place in (lab_root / "one.ipynb", lab_root / "two.ipynb", voila_root / "three.ipynb"): write_notebook(place, folder)
    one, two, three = (Desk(browser.new_page()) for _ in range(3))
    for desk in (one, two, three): desk.page.set_default_timeout(90_000)
    address, took = lab_ready(), {}
    open_and_run(one.page, address, token, "one.ipynb")
    open_and_run(two.page, address, token, "two.ipynb")
    for desk in (one, two): desk.sees_it_move()
    faces = "face => [...document.querySelectorAll('.ft-pause')].some(b => b.textContent === face)"

    took["pause"] = press(one.page, "ft-pause", "Pause", run)  # asked at one desk, seen at both
    for desk in (one, two): desk.wait(faces, "Resume")
    assert run.state == "paused"
    took["learning rate"] = press(two.page, "ft-set", "Learning rate × 0.5", run)
    for desk in (one, two): desk.wait("() => document.querySelector('.ft-live')?.textContent.includes('Learning rate × 0.5')")

    one.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    one.page.reload()  # the kernel goes on, the page finds its panel again
    one.wait("() => document.querySelector('.ft-panel .ft-status')?.textContent.startsWith('Learning rate × 0.5')")
    took["resume"] = press(one.page, "ft-pause", "Resume", run)
    for desk in (one, two): desk.wait(faces, "Pause")
    one.sees_it_move()

    one.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    one.wait("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
    one.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")  # attach again
    one.wait("() => document.querySelector('.ft-panel .ft-status')?.textContent.startsWith('Resume')")
    one.sees_it_move()
    took["evaluate"] = press(one.page, "ft-evaluate", "Evaluate", run)
    check_rules(one.page)
    keep(one.page, ".ft-panel", "training_1100_light", 1100, "JupyterLab Light", tmp_path)
    keep(one.page, ".ft-panel", "training_640_dark", 640, "JupyterLab Dark", tmp_path)
    check_rules(one.page)
    assert one.page.evaluate("() => { const p = document.querySelector('.ft-panel'); return p.scrollWidth <= p.clientWidth + 1 }")

    three.page.goto(f"{voila_ready()}/voila/render/three.ipynb")
    three.sees_it_move()
    if os.environ.get("FTLLM_SCREENSHOTS"): three.page.locator(".ft-panel").first.screenshot(path=str(Path(os.environ["FTLLM_SCREENSHOTS"]) / "training_voila.png"))
    took["stop"] = press(three.page, "ft-stop", "Stop", run)
    assert run.wait(timeout=60) == "stopped" and run.verify().torn == 0
    for desk in (one, two, three): desk.wait("() => [...document.querySelectorAll('.look')].some(e => e.textContent.includes('Stopped, step'))")

    assert [c["command"] for c in run.commands()] == ["pause", "set", "resume", "evaluate", "stop"]
    for command, (written, said) in took.items():
        record_property(command, f"written after {written:.3f} s, acknowledged after {said:.3f} s")
        print(f"{command}: written after {written:.3f} s, acknowledged after {said:.3f} s")
        assert written < 1 and said < 1, took
    for desk in (one, two):
        desk.page.evaluate("() => window.jupyterapp.shell.currentWidget?.sessionContext?.shutdown()")
        desk.page.close()
    three.page.close()
