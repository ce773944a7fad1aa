"""The same rows give the same splits, whatever they are stored in."""
import gzip
import json

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.core.errors import DataError
from fine_tune_llm.data.loading import load_data

AWKWARD = ["NA", "None", "nan", "null", "true", "007", "1e3", "2026-11-20", 'she said "hi", twice', "two\nlines", "=SUM(A1)",
           "Zürich — café", "你好", "-", "N/A", "#N/A", "<b>bold</b>", "a;b\tc"]
ROWS = [{"text": f"{AWKWARD[i % len(AWKWARD)]} {i}" if i >= len(AWKWARD) else AWKWARD[i],
         "label": ("NA", "None", "1")[i % 3], "channel": ("app", "mail")[i % 2]} for i in range(240)]


def lines(): return "".join(json.dumps(r) + "\n" for r in ROWS).encode()
def table(): return pd.DataFrame(ROWS).to_csv(index=False).encode()
def frame(): return pd.DataFrame(ROWS)


def dataset():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(ROWS)


def class_label():
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["1", "NA", "None"])
    return dataset().cast_column("label", names)


FILES = {"csv": table, "csv.gz": lambda: gzip.compress(table()), "jsonl": lines, "jsonl.gz": lambda: gzip.compress(lines()),
         "json": lambda: json.dumps(ROWS).encode(), "JSONL": lines, "parquet": None}
MEMORY = {"list": lambda: ROWS, "DataFrame": frame, "categorical": lambda: frame().astype({"label": "category"}),
          "Dataset": dataset, "ClassLabel": class_label}


def stored(form, folder):
    if form in MEMORY: return MEMORY[form]()
    path = folder / f"rows.{form}"
    if form == "parquet": frame().to_parquet(path)
    else: path.write_bytes(FILES[form]())
    return path


@pytest.mark.parametrize("form", [*FILES, *MEMORY])
def test_same_rows_same_fingerprint(form, tmp_path):
    expected = load_data(ROWS, groups=["channel"])
    data = load_data(stored(form, tmp_path), groups=["channel"])
    assert data.fingerprint == expected.fingerprint
    assert [s.texts for s in data.splits] == [s.texts for s in expected.splits]
    assert all(a.groups.equals(b.groups) for a, b in zip(data.splits, expected.splits))
    assert data.labels.names == ("1", "NA", "None")


def test_path_may_be_a_string(tmp_path):
    assert load_data(str(stored("csv", tmp_path))).fingerprint == load_data(ROWS).fingerprint


def test_every_value_survives(tmp_path):
    data = load_data(stored("csv", tmp_path))
    assert {t for s in data.splits for t in s.texts} == {r["text"] for r in ROWS}


def test_order_of_rows_moves_no_row():
    forward, backward = load_data(ROWS), load_data(ROWS[::-1])
    for a, b in zip(forward.splits, backward.splits): assert set(a.ids) == set(b.ids)
    assert forward.fingerprint != backward.fingerprint


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), pd.NA])
def test_missing_values_are_named(column, value):
    rows = [dict(r) for r in ROWS]
    rows[4][column] = value
    with pytest.raises(DataError, match=rf"'{column}' is missing in 1 row \(list; {column}: row 5\)"): load_data(rows)


def test_numbers_and_booleans_are_labels_of_one_kind():
    for values in ([0, 1], [False, True], [np.int64(0), np.int64(1)], [0.0, 1.0]):
        data = load_data([{"text": f"row {i}", "label": values[i % 2]} for i in range(100)])
        assert data.labels.names == tuple(sorted(str(v) for v in values))
    with pytest.raises(DataError, match="mixes bool, int, str"):
        load_data([{"text": f"row {i}", "label": (0, "0", True)[i % 3]} for i in range(100)])
