"""A hub id works without a network when the hub's cache holds it, and fails in one line when it does not."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fine_tune_llm.core.labels import Labels
from fine_tune_llm.models.loading import build_classifier, load_model, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_hub_id_from_a_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--me--tiny"
    shutil.copytree(locate("pocket"), repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMIT)
    code = ("import fine_tune_llm as ft; from fine_tune_llm.models.loading import *; m = load_model('me/tiny', device='cpu'); "
            "n = build_classifier(m, ft.Labels(('a', 'b'))); print(weights_fingerprint(m), n.score.out_features)")
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [COMMIT, "2"]


STORIES = Path(__file__).parents[2] / "shared/data/models/stories260K"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared data lie beside the project and are absent here")
def test_another_decoder_without_padding_token() -> None:
    model = load_model(STORIES, device="cpu")
    net = build_classifier(model, Labels(("a", "b", "c")))
    assert model.tokenizer.pad_token is not None and net.score.out_features == 3
