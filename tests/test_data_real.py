"""Real files, and files that are broken in known ways. Skipped where ../shared/data is absent."""
from pathlib import Path

import pytest

from fine_tune_llm.core.errors import DataError
from fine_tune_llm.data.files import read_rows
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


REFUSED = {
    "broken_line.jsonl": "line 4.*line 7.*line 9", "truncated_last_line.jsonl": "line 10", "latin1.csv": "not UTF-8.*line 2",
    "cp1252.csv": "not UTF-8", "mixed_encodings.csv": "line 3", "ragged.csv": "row 2.*row 3", "unclosed_quote.csv": "row 2",
    "nul_bytes.csv": "NUL.*line 3", "empty.csv": "empty", "empty.jsonl": "empty", "header_only.csv": "no rows", "blank_lines.jsonl": "empty",
    "no_header.csv": "no column 'text'.*use one of", "dup_header.csv": "'label' occurs 2 times", "one_row.csv": "one class",
    "one_class.csv": "one class", "singleton_classes.csv": "of 77 classes have no row in train", "label_variants.csv": "spelt apart",
    "null_labels.jsonl": "text: lines 8, 9, 10; label: lines 2, 3, 4, 6", "mixed_type_labels.jsonl": "mixes bool, float, int, str.*line 7.*line 6",
    "nested.json": "keys", "truncated.jsonl.gz": "cut short", "zip_named.csv": "zip", "zstd_named.gz": "zstd", "zstd_named_plain.jsonl": "zstd",
    "tsv_named.csv": "no column 'text'", "semicolon_decimal_comma.csv": "fields|no column", "dup_keys.jsonl": "line 1: a key occurs twice",
    "deep_nesting.json": "nested too deeply", "not_objects.jsonl": "line 1.*line 2.*line 3.*line 4", "odd_unicode.jsonl": "surrogate.*line 1",
    "chat_roles.jsonl": "no column 'text'",
}


def columns(name):
    return {"text": "text", "label": "label" if name.endswith(("jsonl", "json", "gz")) or name == "dup_header.csv" else "category"}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_is_refused_in_one_message(name):
    with pytest.raises(DataError, match=f"(?s){REFUSED[name]}") as e: load_data(BAD / name, **columns(name))
    assert "\n" not in str(e.value) and name in str(e.value)


READ = {"no_final_newline.jsonl": 10, "utf8_bom.csv": 5, "utf8_bom.jsonl": 5, "utf16le_bom.csv": 10, "embedded_newlines.csv": 3, "cr_only.csv": 2,
        "mixed_line_ends.jsonl": 3, "huge_row.jsonl": 5, "huge_field.csv": 2, "json_array_named.jsonl": 5, "jsonl_named.json": 5,
        "gzip_named_plain.jsonl": 10, "plain_named.jsonl.gz": 10, "formula_and_html.csv": 6, "one_row.csv": 1, "groups_sparse.csv": 70}


@pytest.mark.parametrize("name", READ)
def test_odd_but_sound_files_are_read(name):
    assert len(read_rows(BAD / name)) == READ[name]


def test_values_of_sound_files():
    assert list(read_rows(BAD / "utf8_bom.csv").frame)[0] == "text"
    lines = read_rows(BAD / "embedded_newlines.csv").frame["text"]
    assert lines[0].split() == ["line", "one", "line", "two"] and "\n" in lines[0] and lines[1] == 'she said "hi"'
    assert {"NA", "null"} <= set(read_rows(BAD / "groups_sparse.csv").frame["group"])
