"""`fine-tune-llm data FILE` as a shell sees it."""
import json
from pathlib import Path

import pytest
from commands import shell

LEAKS = Path(__file__).parents[2] / "shared" / "data" / "malformed"


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("text,label\n" + "".join(f"{t},{y}\n" for t, y in rows))
    return path


SOUND = [(f"{w} {v} on the way", "ab"[i % 2]) for i, w in enumerate("river letter kitchen market school bridge".split())
         for v in "morning evening street garden window".split()]


def test_exit_code_follows_the_findings(tmp_path):
    sound = shell("data", write(tmp_path / "sound.csv", SOUND), "--no-near")
    assert sound.returncode == 0 and "30 rows" in sound.stdout and sound.stderr == ""
    warned = shell("data", write(tmp_path / "warned.csv", [*SOUND, ("mail ann.lee@example.org", "a")]), "--no-near")
    assert warned.returncode == 0 and "e-mail address" in warned.stdout and "ann.lee" not in warned.stdout
    torn = shell("data", write(tmp_path / "torn.csv", [*SOUND, ("hello", "A")]), "--no-near")
    assert torn.returncode == 1 and "spelling of label" in torn.stdout and torn.stderr == ""


def test_json_is_one_object(tmp_path):
    done = shell("data", write(tmp_path / "one.csv", [(t, "same") for t, _ in SOUND]), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["stops"] is True and report["findings"][0]["check"] == "one class"


def test_a_file_that_cannot_be_read_ends_in_one_line(tmp_path):
    done = shell("data", write(tmp_path / "x.csv", SOUND), "--text", "body")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1 and "use one of: 'text', 'label'" in done.stderr


@pytest.mark.skipif(not LEAKS.is_dir(), reason="the data folder ../shared/data is not here")
def test_leaks_between_two_files():
    done = shell("data", LEAKS / "leak_train.csv", "--test", LEAKS / "leak_test.csv", "--json", "--examples", "0")
    count = {f["check"]: f["count"] for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1 and (count["exact leak"], count["folded leak"], count["exact copies"], count["conflicting labels"]) == (50, 80, 30, 5)
