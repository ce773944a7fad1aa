"""Slices: what is planted is found and confirmed, what is not there is not, and the same rows are told once."""
import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.audit.slices import find_slices, p_value, worst_slices
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.predictions import Predictions

TWO = Labels(("bank", "shop"))
WORDS = np.array("card parcel address refund ticket order late money account help phone train hotel letter key".split())


def desk(n, seed, planted=True, base=0.15):
    "Tickets with random words and columns; in a fifth, those that hold a number, the error is twice that of the others."
    rng = np.random.default_rng(seed)
    bad = rng.random(n) < 0.2
    texts = [" ".join(w) + (" 77" if b else "") for w, b in zip(rng.choice(WORDS, (n, 5)), bad)]
    y = rng.integers(0, 2, n)
    wrong = rng.random(n) < base * (1 + (bad & planted))
    table = pd.DataFrame({"channel": rng.choice(["chat", "mail", "phone"], n), "age": rng.normal(40, 10, n)})
    return Predictions([f"{seed}-{i}" for i in range(n)], TWO, probs=np.eye(2)[np.where(wrong, 1 - y, y)] * 0.8 + 0.1, y=y, texts=texts,
                       groups=table)


def runs(draws, n, planted, base=0.15):
    return [find_slices(desk(n, seed, planted, base), words=50, seed=seed) for seed in range(draws)]


def is_it(row): return "text has a digit" in (row.name, *row.also)


def test_a_planted_slice_is_confirmed():
    found = runs(20, 2000, True)
    assert sum(any(map(is_it, r.confirmed)) for r in found) >= 18
    assert all(r.candidates > 40 and r.halves == (1000, 1000) for r in found)


def test_nothing_planted_nothing_confirmed():
    assert sum(bool(r.confirmed) for r in runs(20, 1000, False)) <= 2  # 5 % of 20 is 1; three or more has a chance of 7.5 %


@pytest.mark.slow
def test_a_planted_slice_is_confirmed_in_90_of_100():
    found = runs(100, 2000, True)
    assert sum(any(map(is_it, r.confirmed)) for r in found) >= 90


@pytest.mark.slow
def test_nothing_planted_nothing_confirmed_in_95_of_100():
    assert sum(bool(r.confirmed) for r in runs(100, 2000, False)) <= 5


def test_the_search_alone_would_be_wrong():
    "Tested on the half that was searched, the worst of fifty innocent slices looks bad far more often than in 5 % of runs."
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        loss, candidates = rng.random(1000) < 0.2, {str(i): rng.random(1000) < 0.3 for i in range(50)}
        (worst, _), *_ = worst_slices(loss.astype(float), candidates)
        alarms += p_value(loss, candidates[worst]) <= 0.05
    assert alarms > 30


def test_overlapping_slices_are_one():
    preds = desk(3000, 1)
    report = find_slices(preds.take(np.arange(3000)), slices={"the same": np.array(["77" in s for s in preds.texts])})
    hits = [r for r in report.rows if "the same" in (r.name, *r.also)]
    assert len(hits) == 1 and is_it(hits[0]) and len({r.name for r in report.rows}) == len(report.rows)


def test_passes_are_listed_and_the_number_tested_is_printed():
    report = find_slices(desk(8000, 2))
    verdicts = {r.verdict for r in report.rows}
    assert {"pass", "fail"} <= verdicts and f"of {len(report.rows)} slices confirmed" in str(report)
    assert f"of {report.candidates} searched on 4000 others" in report.title
    assert all(r.gap.high <= report.tolerance for r in report.rows if r.verdict == "pass")


def test_the_halves_share_no_row_and_labels_of_the_second_do_not_steer_the_search():
    "Turn every answer of the confirming half upside down: the same slices are picked, with other verdicts."
    preds = desk(2000, 3)
    seen = np.zeros(2000, dtype=bool)
    seen[np.random.default_rng(7).permutation(2000)[:1000]] = True
    wrong = preds.answers != preds.y
    a = find_slices(preds, loss=wrong, seed=7)
    b = find_slices(preds, loss=np.where(seen, wrong, ~wrong), seed=7)
    assert [(r.name, r.also, r.searched) for r in a.rows] == [(r.name, r.also, r.searched) for r in b.rows]
    assert a.confirmed and a.confirmed[0].name not in {r.name for r in b.confirmed}


def test_hostile_names_are_inert_in_exports():
    preds = desk(400, 4)
    evil = Predictions(preds.ids, TWO, probs=preds.probs, y=preds.y,
                       groups=pd.DataFrame({'=HYPERLINK("x")': ["<script>a</script>", "| b |"] * 200}))
    report = find_slices(evil)
    assert report.rows and "<script" not in report._repr_html_() and "<script" not in report.to_markdown()
    assert "'=HYPERLINK" in report.to_csv()
