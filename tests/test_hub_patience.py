"""A hub that stumbles is asked again, one that knows no such model is asked once, and one that is down is left alone."""
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fine_tune_llm.models.patience import Breaker, ask_again, is_passing, waits

POCKET = Path(__file__).parents[1] / "fine_tune_llm" / "models" / "pocket"
COMMIT = "0" * 40


@contextmanager
def hub(stumbles: int) -> Iterator[tuple[str, Counter]]:
    "Serve the pocket model as `me/there`, answering 503 to the first requests for it; give the address and the count of requests by name."
    asked: Counter = Counter()

    class Answers(BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            name, file = "/".join(self.path.split("/")[1:3]), self.path.rsplit("/", 1)[-1]
            asked[name] += 1
            found = POCKET / file
            code = 404 if name != "me/there" else 503 if asked[name] <= stumbles else 200 if found.is_file() else 404
            data = found.read_bytes() if code == 200 else b""
            self.send_response(code)
            if code == 404: self.send_header("X-Error-Code", "EntryNotFound" if name == "me/there" else "RepoNotFound")
            for key, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{file}"'), ("Content-Length", str(len(data)))): self.send_header(key, value)
            self.end_headers()
            if body: self.wfile.write(data)
        def do_HEAD(self) -> None: self.answer(False)
        def do_GET(self) -> None: self.answer(True)
        def log_message(self, *args: Any) -> None: pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_real_loader_survives_a_hub_that_stumbles_and_asks_once_for_what_is_not_there(tmp_path: Path) -> None:
    code = ("import fine_tune_llm, json\nfrom transformers import AutoConfig\nfrom huggingface_hub.constants import ENDPOINT\n"
            "from fine_tune_llm.models.patience import ask_hub, hub_breaker\n"
            "read = lambda name: ask_hub(name, lambda **how: AutoConfig.from_pretrained(name, **how))\n"
            "found = [read('me/there').model_type, hub_breaker(ENDPOINT).failures]\n"
            "try: read('me/nothing')\n"
            "except OSError as e: found.append('valid model identifier' in str(e))\n"
            "print(json.dumps(found))")
    with hub(stumbles=2) as (address, asked):
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    kind = json.loads((POCKET / "config.json").read_text())["model_type"]
    assert json.loads(done.stdout.splitlines()[-1]) == [kind, 0, True]
    assert asked["me/there"] >= 3 and asked["me/nothing"] == 1


def answer(code: int) -> httpx.Response: return httpx.Response(code, request=httpx.Request("GET", "https://hub.invalid/x"))

@pytest.mark.parametrize("error", [RepositoryNotFoundError("", response=answer(404)), GatedRepoError("", response=answer(403)),
                                   RevisionNotFoundError("", response=answer(404)), RemoteEntryNotFoundError("", response=answer(404)),
                                   HfHubHTTPError("", response=answer(401)), OfflineModeIsEnabled("off"), KeyError("x"), PermissionError("x")],
                         ids=lambda e: type(e).__name__)
def test_mistakes_are_told_at_once_however_deep_they_lie(error: Exception) -> None:
    outer = OSError("We couldn't connect")
    outer.__cause__ = ConnectionError("wrapped")
    outer.__cause__.__context__ = error
    assert not is_passing(error) and (isinstance(error, (KeyError, PermissionError)) or not is_passing(outer))


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_stumbles_pass(code: int) -> None:
    assert is_passing(HfHubHTTPError("", response=answer(code)))
    with pytest.raises(httpx.ConnectError) as refused: httpx.get("http://127.0.0.1:9/")  # nobody listens there
    assert is_passing(refused.value)


def test_the_last_failure_is_raised_as_it_was() -> None:
    slept: list[float] = []
    def ask() -> None: raise HfHubHTTPError("busy", response=answer(503))
    with pytest.raises(HfHubHTTPError, match="busy"): ask_again(ask, Breaker(limit=9), pauses=[1.0, 2.0], sleep=slept.append)
    assert slept == [1.0, 2.0]


@pytest.mark.parametrize("spent,asked", [(1.0, 3), (23.0, 1)])
def test_a_failure_that_took_long_is_not_repeated(spent: float, asked: int) -> None:
    "The hub's library waits for 23 seconds by itself before it gives up a connection."
    now, calls = [0.0], []
    def ask() -> None:
        calls.append(now[0])
        now[0] += spent
        raise ConnectionError("refused")
    with pytest.raises(ConnectionError, match="refused"): ask_again(ask, Breaker(limit=9, clock=lambda: now[0]), pauses=[1.0, 2.0], sleep=lambda s: None)
    assert len(calls) == asked


def test_waits_leave_the_random_numbers_of_the_caller_alone() -> None:
    import random
    random.seed(3)
    expected = random.random()
    random.seed(3)
    assert all(0 < w <= 8 for w in waits(12)) and random.random() == expected
