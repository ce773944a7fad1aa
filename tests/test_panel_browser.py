"""A real browser watches a run in JupyterLab: the panel moves while training goes on, and a click on Stop stops it, a pause waits.

Everything stays on this machine: the server listens on 127.0.0.1 at a free port, with a token and its own folders.
FTLLM_SCREENSHOTS=folder keeps the pictures."""
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from fine_tune_llm.core.runs import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("playwright", "jupyterlab") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM or bool(MISSING), reason="needs " + " and ".join(MISSING or ["a chromium"]))]

# The cell that starts training. It must return at once and leave `run`, a run whose folder is `FOLDER`.
TRAIN = """
import fine_tune_llm as ft

words = "morning evening street garden window river letter kitchen market school bridge forest station harbour tower".split()
rows = [dict(text=f"{a} and {b} in the {w}", label=w) for w in ("rain", "sun") for i, a in enumerate(words) for b in words[:i]]
run = ft.finetune(ft.load_model("pocket", device="cpu"), ft.load_data(rows), lora=dict(r=4), epochs=200, batch_size=16,
                  learning_rate=1e-3, out=FOLDER, background=True)
"""
STRIPS = 6  # plots once evaluations have come: loss, NLL, accuracy, ECE, learning rate, rows per second
SETTINGS = {"notification": '{"fetchNews": "false", "checkForUpdates": false}', "themes": '{"theme": "JupyterLab Light"}'}


def write_notebook(path: Path, run_folder: Path) -> None:
    "Write a notebook that starts a run in the background and opens its panel."
    cells = [new_code_cell(f"FOLDER = {str(run_folder)!r}\n{TRAIN}"), new_code_cell("run.panel()")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(command: list[str], port: int, env: dict[str, str], log: Path):
    "Start a server, hand out what waits until it answers and returns its address, and stop it."
    with open(log, "w") as out: server = subprocess.Popen([sys.executable, "-m", *command], env=env, stdout=out, stderr=subprocess.STDOUT)

    def ready() -> str:
        end = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            try: socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
            except OSError: time.sleep(0.1)
            else: return f"http://127.0.0.1:{port}"

    try: yield ready  # a browser can start meanwhile
    finally:
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab with folders, port and token of its own: (waits for its address, token, its root folder)."
    root, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    for name, text in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / "apputils-extension" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    folders = {f"JUPYTER_{k}_DIR": str(home / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")}
    env = {**os.environ, **folders, "HOME": str(home), "IPYTHONDIR": str(home / "ipython"),
           "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    env.pop("IN_TEST", None)
    port, token = free_port(), secrets.token_hex(16)
    command = ["jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={root}"]
    with serving(command, port, env, home / "lab.log") as ready: yield ready, token, root


@pytest.fixture(scope="module")
def voila(tmp_path_factory):
    "A Voila with folders and port of its own, which shows the notebooks of a folder: (waits for its address, the folder)."
    if importlib.util.find_spec("voila") is None: pytest.skip("needs voila")
    root, home, port = tmp_path_factory.mktemp("voila"), tmp_path_factory.mktemp("home"), free_port()
    env = {**os.environ, "HOME": str(home), **{f"JUPYTER_{k}_DIR": str(home / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")}}
    env.pop("IN_TEST", None)
    command = ["voila", str(root), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1", "--show_tracebacks=True"]
    with serving(command, port, env, home / "voila.log") as ready: yield ready, root


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "A headless Chromium with a profile of its own."
    from playwright.sync_api import sync_playwright
    args = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
            "--disable-background-timer-throttling", "--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows"]
    with sync_playwright() as pw:
        context = pw.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, headless=True, args=args,
            viewport={"width": 1280, "height": 1100})
        yield context
        context.close()


def open_and_run(page, address: str, token: str, name: str) -> None:
    "Open a notebook in JupyterLab and run all of its cells."
    page.goto(f"{address}/doc/tree/{name}?token={token}&reset")
    page.wait_for_function("window.jupyterapp?.commands.hasCommand('notebook:run-all-cells')")
    kernel = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status"
    page.wait_for_function(f"{kernel} === 'idle'")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")


WATCH = """() => {
    window.told = []
    const look = () => {
        const words = document.querySelector('.ft-panel .ft-status')?.textContent
        if (words && words !== window.told.at(-1)?.[1]) window.told.push([Date.now(), words])
    }
    look()
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true})
    document.addEventListener('click', () => { window.pressed = Date.now() }, true)
}"""
SAID = "words => window.told.find(([at, said]) => at >= window.pressed && said.startsWith(words))?.[0]"


def press(page, button: str, words: str, run) -> tuple[float, float]:  # seconds until the command was written, and until the panel said so
    "Press a button from the keyboard, wait until the panel acknowledges it, and let the clocks of browser and kernel tell how long that took."
    n = len(run.commands())
    page.evaluate(WATCH)
    page.locator(f".ft-panel .{button}").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(SAID, arg=words)
    pressed, said = page.evaluate("window.pressed"), page.evaluate(SAID, words)
    assert len(run.commands()) == n + 1
    return run.commands()[-1]["time"] - pressed / 1000, (said - pressed) / 1000


def keep(page, what: str, name: str, width: int, theme: str, tmp_path: Path, height: int = 1600) -> Path:
    "Take a picture of a part of the page, at a width and in a theme."
    folder = Path(os.environ.get("FTLLM_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": width + 164, "height": height})  # Lab's own margins
    page.evaluate(f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
    page.wait_for_function(f"document.body.dataset.jpThemeLight === '{str('Light' in theme).lower()}'")
    page.wait_for_timeout(400)  # the style sheet of the theme is still being painted
    page.locator(what).last.screenshot(path=str(folder / f"{name}.png"))
    return folder / f"{name}.png"


def test_panel_moves_and_is_steered(lab, browser, tmp_path, record_property):
    ready, token, root = lab
    address, folder = ready(), tmp_path / "run"
    write_notebook(root / "panel.ipynb", folder)
    page = browser.new_page()
    page.set_default_timeout(180_000)  # the kernel imports torch first
    open_and_run(page, address, token, "panel.ipynb")

    curve = page.locator(".ft-live path").first  # the loss, as reported
    curve.wait_for(state="attached")
    before = curve.get_attribute("d")
    page.wait_for_function("d => document.querySelector('.ft-live path')?.getAttribute('d') !== d", arg=before)
    run = Run.attach(folder)  # another process than the kernel's: the folder is all they share
    assert run.state == "running" and page.locator(".ft-live svg[role=img]").count() >= 3
    page.wait_for_function(f"document.querySelectorAll('.ft-live svg[role=img]').length === {STRIPS}")
    assert "Loss" in page.locator(".ft-panel h3").inner_text() and page.locator(".ft-panel [role=alert]").count() == 0
    keep(page, ".ft-panel", "panel_running_1100", 1100, "JupyterLab Light", tmp_path)
    if os.environ.get("FTLLM_SCREENSHOTS"): keep(page, ".ft-panel", "panel_running_dark_640", 640, "JupyterLab Dark", tmp_path)

    took = {"pause": press(page, "ft-pause", "Pause", run)}  # no mouse is needed
    page.wait_for_function("document.querySelector('.ft-pause')?.textContent === 'Resume'")
    assert run.state == "paused"
    page.get_by_role("button", name="LR × 0.5").click()
    page.wait_for_function("document.querySelector('.ft-live')?.textContent.includes('Learning rate × 0.5')")
    if os.environ.get("FTLLM_SCREENSHOTS"): keep(page, ".ft-panel", "panel_paused_1100", 1100, "JupyterLab Light", tmp_path)
    took["resume"] = press(page, "ft-pause", "Resume", run)
    page.wait_for_function("document.querySelector('.ft-pause')?.textContent === 'Pause'")
    applied = run.events("command_applied")
    assert [e["command"] for e in applied] == ["pause", "set", "resume"] and applied[1]["learning_rate"] * 2 == applied[1]["before"]

    took["learning rate"] = press(page, "ft-set", "Learning rate × 0.5", run)
    took["stop"] = press(page, "ft-stop", "Stop", run)
    for command, (written, said) in took.items():
        record_property(command, f"written after {written:.3f} s, acknowledged after {said:.3f} s")
        assert written < 1 and said < 1, took
    picture = ".jp-OutputArea-output .look"  # at the end, a static picture takes the place of the panel
    ended = f"document.querySelector('{picture}')?.textContent.includes('Stopped, step')"
    page.wait_for_function(f"{ended} && !document.querySelector('.ft-panel')")
    assert run.wait(timeout=30) == "stopped" and run.events()[-1]["event"] == "run_stopped"
    assert [c["command"] for c in run.commands()] == ["pause", "set", "resume", "set", "stop"] and run.verify().torn == 0
    assert "applied" in page.locator(picture).inner_text() and (folder / run.events()[-1]["checkpoint"] / "manifest.json").exists()

    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.goto(f"{address}/doc/tree/panel.ipynb?token={token}&reset")  # reopened: no cell is run, no widget is there
    page.wait_for_function(ended)
    assert keep(page, picture, "panel_saved_1100", 1100, "JupyterLab Light", tmp_path).stat().st_size > 10_000
    if os.environ.get("FTLLM_SCREENSHOTS"): keep(page, picture, "panel_saved_dark_640", 640, "JupyterLab Dark", tmp_path)
    page.evaluate("() => window.jupyterapp.shell.currentWidget?.sessionContext?.shutdown()")
    page.close()
