"""Each of the 56 awkward files of ../shared/data/malformed yields what its README says. Skipped where the folder is absent.

Of files about predictions, groups and calibration only the reading is tested here: all rows, every value as written."""
import csv
import json
from pathlib import Path

import pytest

from fine_tune_llm.core.errors import DataError
from fine_tune_llm.data.files import read_rows
from fine_tune_llm.data.forms import load_rows
from fine_tune_llm.data.loading import load_data

BAD = Path(__file__).parents[2] / "shared" / "data" / "malformed"
pytestmark = pytest.mark.skipif(not BAD.is_dir(), reason="the data folder ../shared/data is not here")

# read_rows refuses, in one message that names file, place and cause; with quarantine: places kept, places set aside (None: still refused)
REFUSED = {
    "broken_line.jsonl": ("3 of 10 .*line 4: .*line 7: .*line 9: ", [1, 2, 3, 5, 6, 8, 10], [4, 7, 9]),
    "truncated_last_line.jsonl": ("1 of 10 .*line 10: ", list(range(1, 10)), [10]),
    "latin1.csv": ("3 of 10 .*it may be cp1252.*row 1 .line 2.: byte 0xf9 is not UTF-8", [4, 5, 6, 7, 8, 9, 10], [1, 2, 3]),
    "cp1252.csv": ("2 of 5 .*cp1252.*row 1 .line 2.: byte 0x93 is not UTF-8", [3, 4, 5], [1, 2]),
    "mixed_encodings.csv": ("1 of 3 .*two encodings are mixed.*row 2 .line 3.: byte 0xfc", [1, 3], [2]),
    "ragged.csv": ("3 of 5 .*row 2 .line 3.: 1 field .*row 3 .line 4.: 4 fields.*row 5 .line 6.: every field is empty", [1, 4], [2, 3, 5]),
    "unclosed_quote.csv": ("1 of 3 .*row 2 .line 3.: a quote that never closes", [1, 3], [2]),
    "nul_bytes.csv": ("row 2 .line 3.: a NUL character", [1], [2]),
    "empty.csv": ("the file is empty", None, None), "empty.jsonl": ("the file is empty", None, None),
    "header_only.csv": ("no rows", None, None), "blank_lines.jsonl": ("the file is empty", None, None),
    "nested.json": ("one object with keys version, data .*lists at data.train .5., data.test .0.*field='data.train'", None, None),
    "truncated.jsonl.gz": ("gzip archive is cut short", None, None),
    "odd_unicode.jsonl": ("line 1: half of a surrogate pair", [2, 3, 4, 5], [1]),
    "dup_keys.jsonl": ("line 1: a key occurs twice", [2], [1]),
    "deep_nesting.json": ("nested too deeply", None, None),
    "big_numbers.jsonl": ("line 1: a number beyond a double; line 2: .*; line 3: ", [4], [1, 2, 3]),
    "not_objects.jsonl": ("4 of 5 .*line 1: a text, not an object; line 2: a list, .*line 3: a number, .*line 4: null, ", [5], [1, 2, 3, 4]),
}

# read_rows reads: rows, and words that must stand in its notes
READ = {
    "no_final_newline.jsonl": (10, ""), "utf8_bom.csv": (5, ""), "utf8_bom.jsonl": (5, ""), "utf16le_bom.csv": (10, ""), "embedded_newlines.csv": (3, ""),
    "cr_only.csv": (2, ""), "mixed_line_ends.jsonl": (3, ""), "no_header.csv": (9, "taken for the header"), "dup_header.csv": (2, "'label' occurs 2 times"),
    "one_row.csv": (1, ""), "one_class.csv": (60, ""), "singleton_classes.csv": (77, ""), "leak_train.csv": (510, ""), "leak_test.csv": (150, ""),
    "label_variants.csv": (52, ""), "null_labels.jsonl": (10, ""), "mixed_type_labels.jsonl": (7, ""), "huge_row.jsonl": (5, ""), "huge_field.csv": (2, ""),
    "chat_roles.jsonl": (8, ""), "json_array_named.jsonl": (5, "a JSON array"), "jsonl_named.json": (5, "JSON Lines"),
    "gzip_named_plain.jsonl": (10, "gzip archive"), "plain_named.jsonl.gz": (10, ""), "zstd_named.gz": (10, ""), "zstd_named_plain.jsonl": (10, "zstd archive"),
    "zip_named.csv": (3, "zip archive"), "tsv_named.csv": (5, "separated by '\\t'"), "semicolon_decimal_comma.csv": (2, "separated by ';'"),
    "formula_and_html.csv": (6, ""), "probs_bad.csv": (10, ""), "logits_constant.csv": (40, ""), "tiny_calibration.csv": (5, ""), "prefs_bad.jsonl": (8, ""),
    "groups_sparse.csv": (70, ""), "groups_no_positives.csv": (None, ""), "ids_unsorted_preds.csv": (7, ""),
}

# load_data refuses; text and label columns, what it says
UNFIT = {
    "no_header.csv": ("text", "category", "no column 'text'.*use one of: 'how much does it"), "dup_header.csv": ("text", "label", "'label' occurs 2 times"),
    "one_row.csv": ("text", "category", "only one class"), "one_class.csv": ("text", "category", "only one class"),
    "singleton_classes.csv": ("text", "category", "of 77 classes have no row in train"),
    "label_variants.csv": ("text", "category", "labels look alike and are spelt apart"),
    "null_labels.jsonl": ("text", "label", "'text' is missing in 3 lines; 'label' is missing in 4 lines .*text: lines 8, 9, 10; label: lines 2, 3, 4, 6"),
    "mixed_type_labels.jsonl": ("text", "label", "'label' mixes bool, float, int, str.*lines? 7.*lines? 6"),
    "chat_roles.jsonl": ("text", "label", "no column 'text'"),
}


def test_every_file_is_here():
    "The tables cover the folder: 56 files."
    names = {p.name for p in BAD.iterdir()} - {"README.md"}
    assert len(names) == 56 and names == {*REFUSED, *READ}


def one_message(e):
    assert "\n" not in str(e.value) and "Traceback" not in str(e.value) and len(str(e.value)) < 2000


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_message(name):
    with pytest.raises(DataError, match=f"(?s){REFUSED[name][0]}") as e: read_rows(BAD / name)
    one_message(e)
    assert name in str(e.value)


@pytest.mark.parametrize("name", REFUSED)
def test_quarantine_keeps_the_good_rows(name):
    _, kept, aside = REFUSED[name]
    if kept is None:
        with pytest.raises(DataError, match=f"(?s){REFUSED[name][0]}"): read_rows(BAD / name, on_bad_row="quarantine")
        return
    rows = read_rows(BAD / name, on_bad_row="quarantine")
    assert rows.places.tolist() == kept and [b.place for b in rows.quarantine] == aside
    assert rows.read == len(rows) + len(rows.quarantine) == len(kept) + len(aside)
    assert all(b.file == name and b.reason for b in rows.quarantine)


@pytest.mark.parametrize("name", READ)
def test_read(name):
    n, note = READ[name]
    rows = read_rows(BAD / name)
    assert len(rows) == rows.read == (sum(1 for _ in (BAD / name).open()) - 1 if n is None else n)
    assert (note in " ".join(rows.notes)) if note else not rows.notes


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_for_classification(name):
    text, label, told = UNFIT[name]
    with pytest.raises(DataError, match=f"(?s){told}") as e: load_data(BAD / name, text=text, label=label)
    one_message(e)


def test_no_column_is_invented():
    "A file without header has no text column; a chat is no classification."
    for name in ("no_header.csv", "chat_roles.jsonl"):
        with pytest.raises(DataError, match="do not say what they hold|several forms|no columns text and label"): load_data(BAD / name)


@pytest.mark.parametrize("name", [n for n in READ if n.endswith(".csv") and n not in
                                  ("utf16le_bom.csv", "zip_named.csv", "tsv_named.csv", "semicolon_decimal_comma.csv", "utf8_bom.csv")])
def test_values_are_those_of_the_csv_module(name):
    "An independent reading of the sound CSV files, value by value."
    csv.field_size_limit(10**7)
    with (BAD / name).open(newline="", encoding="utf-8") as f: header, *expected = [r for r in csv.reader(f) if r]
    frame = read_rows(BAD / name).frame
    assert list(frame) == header and frame.to_numpy().tolist() == expected


@pytest.mark.parametrize("name", ["no_final_newline.jsonl", "utf8_bom.jsonl", "mixed_line_ends.jsonl", "mixed_type_labels.jsonl", "huge_row.jsonl", "jsonl_named.json",
                                  "plain_named.jsonl.gz", "prefs_bad.jsonl", "chat_roles.jsonl"])
def test_values_are_those_of_the_json_module(name):
    lines = (BAD / name).read_text(encoding="utf-8-sig").splitlines()
    expected = [json.loads(line) for line in lines if line.strip()]
    found = [{k: v for k, v in r.items() if v is not None} for r in read_rows(BAD / name).frame.to_dict("records")]
    assert found == [{k: v for k, v in r.items() if v is not None} for r in expected]
    assert [[type(v) for v in r.values()] for r in found] == [[type(v) for v in r.values() if v is not None] for r in expected]


def test_encodings():
    for encoding in ("latin-1", "cp1252", "detect"):
        texts = " ".join(read_rows(BAD / "latin1.csv", encoding=encoding).frame["text"])
        assert all(word in texts for word in ("Où", "Zürich", "Señor"))
    for encoding in ("cp1252", "detect"): assert "€20" in read_rows(BAD / "cp1252.csv", encoding=encoding).frame["text"][0]
    assert any("cp1252" in n for n in read_rows(BAD / "latin1.csv", encoding="detect").notes)
    with pytest.raises(DataError, match="row 2"): read_rows(BAD / "mixed_encodings.csv", encoding="detect")
    assert "Où" in read_rows(BAD / "utf16le_bom.csv").frame["text"][0]
    assert list(read_rows(BAD / "utf8_bom.csv").frame)[0] == "text"
    for path in BAD.iterdir():
        try: rows = read_rows(path, on_bad_row="quarantine")
        except DataError: continue
        assert "\ufffd" not in rows.table.to_pandas().to_csv()


def test_values_of_odd_files():
    lines = read_rows(BAD / "embedded_newlines.csv").frame["text"]
    assert lines[0] == "line one\r\nline two" and lines[1] == 'she said "hi"' and "\n\n" in lines[2]
    assert {"NA", "null", "a", "A ", ""} <= set(read_rows(BAD / "groups_sparse.csv").frame["group"])
    assert read_rows(BAD / "semicolon_decimal_comma.csv").frame["score"].tolist() == ["0,93", "0,07"]
    assert list(read_rows(BAD / "tsv_named.csv").frame) == ["text", "category"]
    assert len(read_rows(BAD / "huge_field.csv").frame["text"][0]) >= 200_000 - 50 and max(map(len, read_rows(BAD / "huge_row.jsonl").frame["text"])) >= 200_000 - 50
    assert read_rows(BAD / "big_numbers.jsonl", on_bad_row="quarantine").frame["score"].tolist() == ["0.5"]
    assert read_rows(BAD / "null_labels.jsonl").frame["label"].tolist() == ["x", None, None, "", "NaN", None, "None", "x", "y", "y"]
    assert read_rows(BAD / "mixed_type_labels.jsonl").frame["label"].tolist() == [1, "1", 1.0, True, 0, [1], {"id": 1}]
    assert read_rows(BAD / "probs_bad.csv").frame["p0"].tolist()[3:5] == ["nan", "inf"]


def test_paths_into_nested_json():
    rows = read_rows(BAD / "nested.json", field="data.train")
    assert len(rows) == 5
    with pytest.raises(DataError, match="no rows"): read_rows(BAD / "nested.json", field="data.test")
    from fine_tune_llm.data.rows import column
    assert all(isinstance(t, str) for t in column(rows, "input.text")) and column(rows, "meta.label")[0] == "transfer_fee_charged"


def test_chat_roles():
    "README: lines 1, 2 and 8 usable; 3 to 7 named with a reason each."
    rows = load_rows(BAD / "chat_roles.jsonl", form="chat", on_bad_row="quarantine")
    assert rows.places.tolist() == [1, 2, 8] and [b.place for b in rows.quarantine] == [3, 4, 5, 6, 7]
    reasons = [b.reason for b in rows.quarantine]
    assert len(set(reasons)) == 5 and "wizard" in reasons[3] and "without a question" in reasons[0] and "without an answer" in reasons[1]
    assert rows.frame["messages"].tolist()[:2] == [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]] * 2
    with pytest.raises(DataError, match="several forms"): load_rows(BAD / "chat_roles.jsonl")
    with pytest.raises(DataError, match="5 of 8 .*line 3: .*line 7: "): load_rows(BAD / "chat_roles.jsonl", form="chat")


def test_prefs_bad():
    "README: 2 identical, 3 no rejected, 6 no prompt, 7 empty chosen, 8 lists; 4 contradicts 1 and 5 repeats it."
    rows = load_rows(BAD / "prefs_bad.jsonl", on_bad_row="quarantine")
    assert rows.places.tolist() == [1, 4, 5]
    assert {b.place: b.reason.split(":")[0] for b in rows.quarantine} == {
        2: "both sides are the same", 3: "'rejected' is missing", 6: "'prompt' is missing", 7: "'chosen' is missing", 8: "'chosen'"}
    assert "Pairs that contradict each other: lines 1, 4, 5." in rows.notes and "Pairs that occur again: lines 1, 5." in rows.notes


def test_missing_labels_in_quarantine():
    data = read_rows(BAD / "null_labels.jsonl")
    rows = load_rows(BAD / "null_labels.jsonl", on_bad_row="quarantine")
    assert rows.places.tolist() == [1, 5, 7] and rows.read == data.read == 10 and rows.frame["label"].tolist() == ["x", "NaN", "None"]
