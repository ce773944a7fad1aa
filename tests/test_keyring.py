"""A token that only the keyring of the system holds: found by name, printed as stars, and told nowhere."""
import json
import sys
from pathlib import Path

import pytest
from commands import environment, shell

from fine_tune_llm.core.secrets import find_secret

keyring = pytest.importorskip("keyring", reason="keyring is not installed; pip install keyring")
SECRET = "hf_" + "Zq9" * 12

BACKEND = f'''
from keyring.backend import KeyringBackend

class Kept(KeyringBackend):
    "A keyring in memory."
    priority = 1
    def __init__(self): super().__init__(); self.kept = {{("fine_tune_llm", "hub_token"): "{SECRET}"}}
    def get_password(self, service, username): return self.kept.get((service, username))
    def set_password(self, service, username, password): self.kept[service, username] = password
    def delete_password(self, service, username): del self.kept[service, username]

class Locked(Kept):
    def get_password(self, service, username): raise RuntimeError(f"locked, with {SECRET}")
'''


@pytest.fixture
def backend(tmp_path: Path, monkeypatch):
    "A module with two keyrings, and a way to choose one."
    (tmp_path / "kept_here.py").write_text(BACKEND)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = keyring.get_keyring()
    import kept_here
    yield lambda name: keyring.set_keyring(getattr(kept_here, name)())
    keyring.set_keyring(before)
    sys.modules.pop("kept_here")


def test_the_keyring_is_asked_last(backend):
    backend("Kept")
    found = find_secret("hub_token", {})
    assert found is not None and found.get_secret_value() == SECRET and SECRET not in f"{found} {found!r} {[found]}"
    assert find_secret("hub_token", {"HF_TOKEN": "of the environment"}).get_secret_value() == "of the environment"
    assert find_secret("hub_token", {"HF_TOKEN": "b", "FTLLM_SECRETS__HUB_TOKEN": "a"}).get_secret_value() == "a"
    assert find_secret("other", {}) is None
    keyring.set_password("fine_tune_llm", "other", "x")
    assert find_secret("other", {}).get_secret_value() == "x"


def test_a_locked_keyring_is_as_none(backend):
    backend("Locked")
    assert find_secret("hub_token", {}) is None


@pytest.mark.parametrize("name,said", [("Kept", "with a token"), ("Locked", "without a token"), ("Gone", "without a token")])
def test_the_program_asks_it_and_does_not_tell(tmp_path, backend, name, said):
    more = environment()["PYTHONPATH"]
    how = dict(PYTHONPATH=f"{tmp_path}:{more}", PYTHON_KEYRING_BACKEND=f"kept_here.{name}", HF_TOKEN="", FTLLM_SECRETS__HUB_TOKEN="", HF_HUB_OFFLINE="1")
    done = shell("doctor", "--device", "cpu", "--json", cwd=tmp_path, **how)
    hub = next(c for c in json.loads(done.stdout) if c["name"] == "hub")
    assert hub["found"].endswith(said) and SECRET not in done.stdout + done.stderr and "Traceback" not in done.stderr
