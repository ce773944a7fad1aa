"""Real files. Skipped where ../shared/data is absent."""
import gzip
import json
from pathlib import Path

import pytest

from fine_tune_llm.core.errors import DataError
from fine_tune_llm.data.files import read_rows
from fine_tune_llm.data.forms import load_rows
from fine_tune_llm.data.loading import load_data

SHARED = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder ../shared/data is not here")
BAD = SHARED / "malformed"


@pytest.fixture(scope="module")
def bank():
    return load_data(SHARED / "intent/banking77_train.csv.gz", label="category", test=SHARED / "intent/banking77_test.csv")


def test_banking77_counts(bank):
    "Counts that the publishers and ../shared/data/README.md give: 10,003 and 3,080 rows, 77 classes."
    assert len(bank.labels) == 77 and len(bank.test) == 3080
    aside = [n for n in bank.notes if "set aside" in n]
    assert len(aside) == 1
    n = int(aside[0].split("later one: ")[1].split(" ")[0])
    assert sum(map(len, bank.splits[:3])) + n == 10003
    assert n == 7  # the texts that stand in both files


def test_banking77_texts_in_both_files(bank):
    "The 7 texts that are equal after lower-casing and collapsing blanks, found here without our hash."
    def plain(name): return {" ".join(t.lower().split()) for t in read_rows(SHARED / "intent" / name).frame["text"]}
    both = plain("banking77_train.csv.gz") & plain("banking77_test.csv")
    assert len(both) == 7
    for split in bank.splits[:3]: assert not both & {" ".join(t.lower().split()) for t in split.texts}


def test_banking77_splits_are_disjoint(bank):
    ids = [set(s.ids) for s in bank.splits]
    assert sum(map(len, ids)) == len(set.union(*ids)) == sum(map(len, bank.splits))
    assert sum(bank.train.y == 0) > 0 and len(set(bank.train.y)) == 77


def test_leak_files():
    "README: 50 test rows stand in train exactly, 80 without case, blanks and punctuation, of which ours folds the first two; 5 torn texts."
    data = load_data(BAD / "leak_train.csv", label="category", test=BAD / "leak_test.csv", sizes=(.9, .05, .05, 0))
    n = int(next(n for n in data.notes if "set aside" in n).split("later one: ")[1].split(" ")[0])
    assert 50 <= n <= 80 and any(note.startswith("Repeated texts: 30;") for note in data.notes)
    assert any(note.startswith("Texts with more than one label: 5 ") for note in data.notes)


FORMS = {  # file, rows by ../shared/data/README.md, form, what the columns become
    "fairness/bbq_Religion.jsonl.gz": (1200, "choice", "question choices answer"), "fairness/bbq_Nationality.jsonl.gz": (3080, "choice", "question choices answer"),
    "sft/gsm8k_train.jsonl.gz": (7473, "instruction", "prompt completion"), "sft/gsm8k_test.jsonl.gz": (1319, "instruction", "prompt completion"),
    "preference/hh_harmless_base_test.jsonl.gz": (2312, "preference", "prompt chosen rejected"),
    "mcq/csqa_dev_rand_split.jsonl": (1221, "choice", "question choices answer"), "mcq/agieval_logiqa-en.jsonl.gz": (651, "choice", "question choices answer"),
    "mcq/agieval_aqua-rat.jsonl": (254, "choice", "question choices answer"), "mcq/agieval_lsat-ar.jsonl": (230, "choice", "question choices answer"),
    "mcq/agieval_lsat-lr.jsonl.gz": (510, "choice", "question choices answer"), "intent/banking77_test.csv": (3080, "classification", "text label"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_published_data(name):
    n, form, columns = FORMS[name]
    rows = load_rows(SHARED / name, on_bad_row="quarantine")
    assert rows.read == n and rows.notes[-1 if form != "preference" else 0].startswith(f"Form: {form}; ")
    assert rows.table.column_names == columns.split() and len(rows.quarantine) < n / 100


def test_multiple_choice_keys():
    "The key points at the text that the file names, found here without our reader."
    source = [json.loads(line) for line in gzip.open(SHARED / "fairness/bbq_Religion.jsonl.gz", "rt")]
    rows = load_rows(SHARED / "fairness/bbq_Religion.jsonl.gz").frame
    assert [c[a] for c, a in zip(rows["choices"], rows["answer"])] == [r[f"ans{r['label']}"] for r in source]
    letters = [json.loads(line) for line in (SHARED / "mcq/agieval_lsat-ar.jsonl").open()]
    rows = load_rows(SHARED / "mcq/agieval_lsat-ar.jsonl").frame
    assert all(c[a].startswith(f"({r['label']})") for c, a, r in zip(rows["choices"], rows["answer"], letters))


def test_rows_inside_one_object():
    "CLINC150: 15,000, 3,000 and 4,500 rows, 150 intents."
    path, names = SHARED / "intent/clinc150_full.json.gz", ("text", "label")
    with pytest.raises(DataError, match="lists at oos_val .100., val .3000., train .15000."): load_rows(path)
    train = load_rows(path, field="train", names=names).frame
    assert len(train) == 15000 and train["label"].nunique() == 150
    assert [len(load_rows(path, field=f, names=names)) for f in ("val", "test", "oos_test")] == [3000, 4500, 1000]
