"""Recipes touch train alone, every row can be followed to its line, and a failure leaves things as they were."""
import csv
import json
import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fine_tune_llm.core.errors import ConfigurationError, DataError
from fine_tune_llm.data import steps as steps_module
from fine_tune_llm.data import transforms
from fine_tune_llm.data.loading import load_data
from fine_tune_llm.data.splits import normalise
from fine_tune_llm.data.steps import CLEANING, mask_pii, recipe, squeeze_blanks, strip_html
from fine_tune_llm.data.transforms import clean_rows, transform

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder ../shared/data is not here")
TAGS = ["{}", "<b>{}</b>", "  {}", "{}\u00a0", "<p>{}</p>", "{} ann@mail.org"]
ROWS = [{"text": TAGS[i % 6].format(f"message {i} about {'ab'[i % 2]}"), "label": "ab"[i % 2], "channel": ("app", "mail")[i % 3 > 0]} for i in range(240)]
ALL = recipe("nfc", "strip_html", "mask_pii", "squeeze_blanks", ("drop_words", {"share": .3}), "swap_letters", seed=5)


def snapshot(data):
    return [(list(s.texts), s.ids.tolist(), s.y.tolist(), None if s.groups is None else s.groups.to_dict("list")) for s in data.splits], data.fingerprint, data.notes


def test_train_alone_is_touched():
    data = load_data(ROWS, groups=["channel"])
    before = snapshot(data)
    done = transform(data, ALL, source=ROWS)
    assert snapshot(data) == before and all(a is b for a, b in zip(done.data.splits[1:], data.splits[1:]))
    n = len(data.train)
    assert sum(done.counts.values()) == 3 * n == len(done.lineage) and done.counts["kept"] + done.counts["changed"] == n
    assert len(done.data.train) == n + done.counts["added"] == len(done.data.train.y) == len(done.data.train.groups)


def test_labels_and_groups_follow_the_parent():
    data = load_data(ROWS, groups=["channel"])
    train = transform(data, ALL).data.train
    truth = {i: (data.labels[y], g) for i, y, g in zip(data.train.ids, data.train.y, data.train.groups["channel"])}
    lineage = transform(data, ALL).lineage.dropna(subset="id").set_index("id")
    for i, y, g in zip(train.ids, train.y, train.groups["channel"]): assert truth[lineage.loc[i, "origin"]] == (data.labels[y], g)


def test_no_text_in_two_splits_and_no_id_twice():
    data = load_data(ROWS)
    done = transform(data, ALL)
    sides = [{normalise(t) for t in s.texts} for s in done.data.splits]
    assert all(not a & b for k, a in enumerate(sides) for b in sides[k + 1:])
    ids = [i for s in done.data.splits for i in s.ids]
    assert len(set(ids)) == len(ids) and len(set(map(normalise, done.data.train.texts))) == len(done.data.train)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_each_row_leads_to_its_line(tmp_path, form):
    "A CSV value with a line break inside, a JSON Lines file with empty lines, and a text that occurs twice."
    rows = [*({"text": r["text"] + ("\nsecond line" if i % 7 == 0 else ""), "label": r["label"]} for i, r in enumerate(ROWS)), {"text": ROWS[1]["text"], "label": "b"}]
    file = tmp_path / f"rows.{form}"
    if form == "csv":
        with open(file, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
        where = {i: r["text"] for i, r in enumerate(rows, 1)}
    else:
        text = "".join(json.dumps(r) + "\n" * (1 + i % 2) for i, r in enumerate(rows))
        file.write_text(text)
        where = {i: json.loads(line)["text"] for i, line in enumerate(text.split("\n"), 1) if line}
    data = load_data(file)
    done = transform(data, ALL, source=file)
    texts = dict(zip(data.train.ids, data.train.texts))
    places = done.lineage[done.lineage["outcome"] != "added"].drop_duplicates("origin").set_index("origin")["place"]
    assert set(places.index) == set(data.train.ids) and places.nunique() == len(data.train)
    for origin, place in places.items():
        name, unit, number = place.replace(",", "").split()
        assert name == file.name and unit == ("row" if form == "csv" else "line") and where[int(number)] == texts[origin]


def test_steps_are_told_where_they_changed_something():
    data = load_data(ROWS)
    lineage = transform(data, recipe("nfc", "strip_html", "mask_pii", "squeeze_blanks")).lineage
    for origin, steps, outcome in zip(lineage["origin"], lineage["steps"], lineage["outcome"]):
        text = data.train.texts[data.train.ids.tolist().index(origin)]
        expected = [name for name, hit in (("strip_html", "<" in text), ("mask_pii", "@" in text), ("squeeze_blanks", text.startswith((" ", "<p>")) or "\u00a0" in text)) if hit]
        assert list(steps) == expected and outcome == ("changed" if expected else "kept")


def test_copies_are_those_of_the_seed_and_the_row():
    "Drawn again without our code: the generator of Python, seeded with step, seed and id."
    data = load_data([{"text": f"one two three four five six {i}", "label": "ab"[i % 2]} for i in range(80)])
    done = transform(data, recipe(("drop_words", {"share": .3}), seed=9))
    for i, text in zip(data.train.ids, data.train.texts):
        words = text.split()
        gone = random.Random(f"0:9:{i}").sample(range(7), 2)
        made = done.lineage.query("origin == @i and outcome == 'added'")["id"]
        expected = " ".join(w for k, w in enumerate(words) if k not in gone)
        if len(made): assert done.data.train.texts[done.data.train.ids.tolist().index(made.iloc[0])] == expected
        else: assert expected in done.data.train.texts  # another row's copy came first
    other = transform(data, recipe(("drop_words", {"share": .3}), seed=8))
    assert other.data.train.texts != done.data.train.texts and other.data.fingerprint != done.data.fingerprint


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([*CLEANING]), max_size=4), st.integers(0, 3), st.lists(st.text(max_size=30), min_size=1, max_size=20, unique_by=normalise))
def test_counts_add_up_for_any_text(names, seed, texts):
    rows = [{"text": f"{t} {i}", "label": "ab"[i % 2], "part": "train"} for i, t in enumerate(texts)]
    rows += [{"text": f"{part} {i}", "label": "ab"[i % 2], "part": part} for part in ("train", "validation", "calibration", "test") for i in range(2)]
    try: data = load_data(rows, split="part")
    except DataError: return  # half of a surrogate pair, or the like
    made = recipe(*names, "swap_letters", seed=seed)
    done = transform(data, made, source=rows)
    assert len(done.lineage) == 2 * len(data.train) - done.counts.get("empty", 0)
    assert len(done.data.train) == done.lineage["id"].notna().sum() == sum(done.counts.get(f, 0) for f in ("kept", "changed", "added"))
    assert set(done.lineage["id"].dropna()) == set(done.data.train.ids) and all(map(str.strip, done.data.train.texts))
    assert [*map(made.clean, data.train.texts)] == [t for t in done.data.train.texts[:len(data.train)]] or "empty" in done.counts or "test" in done.counts


# A failure

def broken(text):
    if "7" in text: raise KeyError("seven")
    return text


@pytest.mark.parametrize("step, told", [(broken, "KeyError: 'seven'"), (lambda text: None if "7" in text else text, "gave a NoneType, not a text")])
def test_a_failed_step_names_the_row_and_changes_nothing(monkeypatch, step, told):
    monkeypatch.setitem(steps_module.CLEANING, "mine", step)
    data = load_data(ROWS)
    before = snapshot(data)
    first = next(t for t in data.train.texts if "7" in t)
    with pytest.raises(DataError, match=told) as e: transform(data, recipe("nfc", "mine"), source=ROWS)
    assert f"train, list, row {[r['text'] for r in ROWS].index(first) + 1})" in str(e.value) and "'mine'" in str(e.value)
    assert snapshot(data) == before
    frame = pd.DataFrame(ROWS)
    with pytest.raises(DataError, match=told): clean_rows(frame, recipe("mine"), ["text"])
    assert frame.to_dict("records") == ROWS


@pytest.mark.parametrize("at", [1, 2, 3, "rename"])
def test_a_failed_save_leaves_no_folder(tmp_path, monkeypatch, at):
    done, calls, write = transform(load_data(ROWS), ALL), [], transforms.write_lines
    def fails(path, records):
        calls.append(path)
        if len(calls) == at:
            path.write_text("half a line")
            raise OSError("no space left on device")
        write(path, records)
    def no_rename(a, b): raise OSError("no")
    monkeypatch.setattr(transforms, "write_lines", fails)
    if at == "rename": monkeypatch.setattr(transforms.os, "rename", no_rename)
    with pytest.raises(OSError): done.save(tmp_path / "clean")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert sorted(f.name for f in done.save(tmp_path / "clean").iterdir()) == ["lineage.jsonl", "recipe.json", "rows.jsonl"] and len(list(tmp_path.iterdir())) == 1


def test_saved_rows_load_as_the_same_splits(tmp_path):
    data = load_data(ROWS, groups=["channel"])
    done = transform(data, ALL, source=ROWS)
    folder = done.save(tmp_path / "clean")
    again = load_data(folder / "rows.jsonl", split="split", groups=["channel"])
    assert [s.texts for s in again.splits] == [s.texts for s in done.data.splits] and all(np.array_equal(a.y, b.y) for a, b in zip(again.splits, done.data.splits))
    assert [s.ids.tolist() for s in again.splits] == [s.ids.tolist() for s in done.data.splits] and again.train.groups.equals(done.data.train.groups)
    assert recipe(*json.loads((folder / "recipe.json").read_text())["steps"], seed=5).hash == ALL.hash
    lines = [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()]
    assert len(lines) == len(done.lineage) and {line["outcome"] for line in lines} == set(done.counts) and all(line["place"] for line in lines)


# The steps

class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.out, self.hidden = [], 0
        self.feed(text)
        self.close()
    def handle_starttag(self, tag, attrs): self.hidden += tag in ("script", "style"); self.out.append("" if tag in steps_module.INLINE.split("|") else " ")
    def handle_endtag(self, tag): self.hidden -= tag in ("script", "style"); self.out.append("" if tag in steps_module.INLINE.split("|") else " ")
    def handle_data(self, data): self.out.append("" if self.hidden else data)


PAGES = ["<p>one</p><p>two <b>three</b>four</p>", "a<br>b<BR/>c", "<div class=\"x\">&lt;b&gt; &amp; &eacute;</div>", "<script>x = '<p>';</script>after<!-- gone -->!",
         "<style>p {}</style>text", "2 < 3 and 5 > 4", "<a href='http://x.org/?a=1&b=2'>link</a>s", "no tags at all"]


@pytest.mark.parametrize("page", PAGES)
def test_html_as_the_parser_of_python_reads_it(page):
    assert strip_html(page).split() == "".join(Reader(page).out).split()


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_blanks_keep_words_and_breaks(text):
    done = squeeze_blanks(text)
    assert done.split() == text.replace("\r\n", "\n").split() and squeeze_blanks(done) == done and "  " not in done and "\n\n\n" not in done


def test_pii_in_harmless_text_stays():
    for text in ("version 1.2.3", "2026-11-20", "1,234,567.89", "ISBN 978-3-16-148410-0"[:4], "at 10:15:30", "call me @home", "a@b", "12:30-13:45", "room 4111"):
        assert mask_pii(text) == text


def test_recipe_is_refused_as_a_whole():
    for bad, told in ((["lower"], "no step 'lower'"), ([("mask_pii", {"kinds": ["name"]})], "no kind of personal data"), ([("drop_words", {"rate": 1})], "does not take"),
                      (["swap_letters", "nfc"], "stands behind an augmentation")):
        with pytest.raises(ConfigurationError, match=told): recipe("nfc", *bad)


def test_the_hash_knows_order_settings_and_seed():
    hashes = [recipe(*s, seed=seed).hash for s, seed in ((("nfc", "strip_html"), 0), (("strip_html", "nfc"), 0), (("nfc", "strip_html"), 1), (("nfc",), 0),
                                                          (("nfc", ("mask_pii", {"kinds": ["ip"]})), 0), (("nfc", ("mask_pii", {"kinds": ["card"]})), 0))]
    assert len(set(hashes)) == 6 and recipe("nfc").hash == recipe(("nfc", {})).hash == recipe(["nfc", {}]).hash


def test_same_recipe_twice_is_refused():
    done = transform(load_data(ROWS), ALL)
    with pytest.raises(DataError, match=f"the recipe {ALL.hash} was applied to this data before"): transform(done.data, ALL)
    assert len(transform(done.data, recipe("nfc")).data.manifest["recipes"]) == 2


@pytest.mark.parametrize("held", ["validation", "calibration", "test"])
def test_a_leak_made_by_cleaning_is_set_aside(held):
    data = load_data(ROWS)
    plain = next(t for t in getattr(data, held).texts if t == recipe(*CLEANING).clean(t))
    dirty = replace(data, train=replace(data.train, texts=[f"<i>{plain.upper()}</i>", *data.train.texts[1:]]))
    assert set(transform(dirty, recipe("nfc")).counts) == {"kept"}  # with its tag it is another text
    done = transform(dirty, recipe("strip_html"))
    assert done.counts[held] == 1 and done.lineage.iloc[0]["outcome"] == held and pd.isna(done.lineage.iloc[0]["id"])
    assert len(done.data.train) == len(data.train) - 1 and normalise(plain) not in map(normalise, done.data.train.texts)
    assert any(f"set aside by the recipe: 1 {held}" in note for note in done.data.notes)


@needs_data
def test_banking77_keeps_every_row():
    data = load_data(SHARED / "intent/banking77_train.csv.gz", label="category")
    done = transform(data, recipe("nfc", "strip_html", "mask_pii", "squeeze_blanks"), source=SHARED / "intent/banking77_train.csv.gz")
    assert sum(done.counts.values()) == len(data.train) and set(done.counts) <= {"kept", "changed"}
    assert len(done.data.train) == len(data.train) and set(done.data.train.ids) == set(data.train.ids)  # blanks alone were changed
    changed = done.lineage.query("outcome == 'changed'")
    assert set(changed["steps"]) == {("squeeze_blanks",)} and len(changed) == sum(squeeze_blanks(t) != t for t in data.train.texts) > 0
