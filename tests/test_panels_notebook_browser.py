"""The same panels in Jupyter Notebook 7, whose page is not that of JupyterLab: opened, and worked from the keyboard."""
import importlib.util
import os
import secrets

import pytest
from test_panel_browser import CHROMIUM, MISSING, browser, free_port, serving  # noqa: F401, the fixtures
from test_panels_browser import describe, work, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM or bool(MISSING), reason="needs " + " and ".join(MISSING or ["a chromium"])),
              pytest.mark.skipif(importlib.util.find_spec("notebook") is None, reason="needs notebook")]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    "A Jupyter Notebook with folders, port and token of its own: (waits for its address, token, its root folder)."
    root, home, port, token = tmp_path_factory.mktemp("notebook"), tmp_path_factory.mktemp("home"), free_port(), secrets.token_hex(16)
    env = {**os.environ, "HOME": str(home), **{f"JUPYTER_{k}_DIR": str(home / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")},
           "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "IPYTHONDIR": str(home / "ipython")}
    env.pop("IN_TEST", None)
    command = ["notebook", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               "--JupyterNotebookApp.expose_app_in_browser=True", f"--ServerApp.root_dir={root}"]
    with serving(command, port, env, home / "notebook.log") as ready: yield ready, token, root


def test_panels_in_notebook(notebook, browser, tmp_path):  # noqa: F811
    ready, token, root = notebook
    write_notebook(root / "panels.ipynb")
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{ready()}/notebooks/panels.ipynb?token={token}")
    page.wait_for_function("window.jupyterapp?.commands.hasCommand('notebook:run-all-cells')")
    page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    work(page)
    describe(page)
    if folder := os.environ.get("FTLLM_SCREENSHOTS"): page.locator(".ft-panel").first.screenshot(path=os.path.join(folder, "data_notebook.png"))
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()
