"""Laws of dealing: disjoint, complete, stable, whole groups, near duplicates on one side, calibration and test alike."""
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom, ks_2samp

from fine_tune_llm.core.errors import DataError
from fine_tune_llm.data.dealing import split_data
from fine_tune_llm.data.duplicates import families, fold
from fine_tune_llm.data.ledger import ledger, load_ledger, save_ledger
from fine_tune_llm.data.splits import SPLITS, row_id

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
some = settings(max_examples=40, deadline=None)


def sentence(rng: random.Random, n: int = 60, letters: str = ALPHABET) -> str: return "".join(rng.choices(letters, k=n))


@st.composite
def tables(draw):
    "Sentences with copies, louder copies, slips of one letter, and groups that some rows lack."
    rng = random.Random(draw(st.integers(0, 2**32)))
    texts = [sentence(rng) for _ in range(draw(st.integers(1, 40)))]
    for t in rng.choices(texts, k=draw(st.integers(0, 15))):
        at = rng.randrange(len(t))
        texts.append(rng.choice([t, t.upper() + "!", t[:at] + rng.choice(ALPHABET) + t[at + 1:]]))
    rng.shuffle(texts)
    groups = [rng.choice(["ann", "bob", "eve", "dan", None, None, None]) for _ in texts] if draw(st.booleans()) else None
    return texts, groups


def alike(a: str, b: str) -> float:
    "The likeness by sets of strings: an implementation of its own."
    A, B = ({t[i:i + 5] for i in range(max(1, len(t) - 4))} for t in (a, b))
    return len(A & B) / len(A | B)


@some
@given(tables(), st.integers(0, 99))
def test_every_row_has_one_place_and_no_tie_is_cut(table, seed):
    texts, groups = table
    deal = split_data(texts, groups=groups, seed=seed)
    assert len(deal.place) == len(texts) == len(set(deal.ids)) and set(deal.place) <= set(SPLITS)
    folded = [fold(t) for t in texts]
    for i, j in zip(*np.triu_indices(len(texts), 1)):
        if deal.place[i] != deal.place[j]:
            assert alike(folded[i], folded[j]) < 0.8
            assert groups is None or groups[i] is None or groups[i] != groups[j]


@some
@given(tables(), st.integers(0, 99), st.integers(0, 2**32))
def test_strange_newcomers_move_nobody_in_any_order(table, seed, more):
    texts, groups = table
    rng = random.Random(more)
    new = [sentence(rng, letters="αβγδεζηθικλμνξοπρστυφχψω") for _ in range(20)]
    before = dict(zip(map(row_id, texts), split_data(texts, groups=groups, seed=seed).place))
    order = rng.sample(range(len(texts) + 20), len(texts) + 20)
    texts, groups = [*texts, *new], [*groups, *["zoe"] * 20] if groups else None
    after = split_data([texts[i] for i in order], groups=[groups[i] for i in order] if groups else None, seed=seed)
    for i, place in zip(order, after.place): assert before.get(row_id(texts[i]), place) == place


@some
@given(tables(), tables(), st.booleans())
def test_a_ledger_holds_every_row_whatever_arrives(old, new, stratify):
    texts, groups = old[0], None
    known = ledger(split_data(texts, near=None))  # copies stand together, near duplicates may not
    rows = [*texts, *new[0], *[t[:30] + s[30:] for t, s in zip(texts, new[0])]]
    deal = split_data(rows, labels=[len(t) % 2 for t in rows], groups=groups, seed=7, ledger=known, stratify=stratify)
    for t, place in zip(rows, deal.place): assert known.get(row_id(t), place) == place
    assert {*deal.place} <= {*SPLITS, ""}
    for u in set(deal.unit):  # a newcomer stands with its unit, or is set aside where the unit is torn
        places = {p for p in deal.place[deal.unit == u] if p}
        torn = len({known[row_id(t)] for t, v in zip(rows, deal.unit) if v == u and row_id(t) in known}) > 1
        assert torn or len(places) == 1 and "" not in deal.place[deal.unit == u]


@some
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 99))
def test_strata_have_their_shares_to_within_a_row(counts, seed):
    labels = [k for k, n in enumerate(counts) for _ in range(n)]
    deal = split_data([f"row {i}" for i in range(len(labels))], labels, near=None, stratify=True, seed=seed)
    for k, n in enumerate(counts):
        for split, share in zip(SPLITS, (.6, .1, .15, .15)):
            assert abs(sum(p == split for p, y in zip(deal.place, labels) if y == k) - share * n) <= 1 + 1e-9


@some
@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(0, 99))
def test_time_runs_one_way(times, seed):
    deal = split_data([f"row {i}" for i in range(len(times))], times=times, near=None, seed=seed, sizes=(.4, .2, .1, .1, .2))
    spans = [[t for t, p in zip(times, deal.place) if p in names] for names in (("train",), ("validation",), ("calibration", "test"), ("shift",))]
    spans = [s for s in spans if s]
    assert all(max(a) < min(b) for a, b in zip(spans, spans[1:])) and sum(map(len, spans)) == len(times)


def test_time_sees_the_latest_copy_of_a_family():
    "A text of the first day that comes again on the last one must not train."
    rng = random.Random(0)
    texts = [sentence(rng) for _ in range(100)]
    texts[99] = texts[0].upper()
    deal = split_data(texts, times=list(range(100)))
    assert deal.place[0] == deal.place[99] and deal.place[0] in ("calibration", "test") and deal.place[1] == "train"


@pytest.mark.parametrize("stratify", [False, True])
def test_calibration_and_test_are_alike(stratify):
    "Given who is in either, each row is as likely in one as in the other: lengths and classes agree, whatever the file's order."
    rng = random.Random(1)
    texts = sorted(("x" * rng.randrange(1, 200) + sentence(rng, 8) for _ in range(6000)), key=len)  # sorted by length: a trap for cuts by position
    labels = [int(len(t) > 100) for t in texts]
    place = split_data(texts, labels, near=None, stratify=stratify).place
    cal, test = ([len(t) for t, p in zip(texts, place) if p == s] for s in ("calibration", "test"))
    assert abs(len(cal) - 900) < 130 and ks_2samp(cal, test).pvalue > 1e-3
    long = sum(n > 100 for n in cal)
    law = hypergeom(len(cal) + len(test), long + sum(n > 100 for n in test), len(cal))
    assert law.cdf(long) > 1e-4 and law.sf(long - 1) > 1e-4


@pytest.mark.parametrize("tie", ["copies", "groups", "strata"])
def test_each_row_has_its_share_of_each_split(tie):
    "In 2,000 like situations, the row with copies, in a group, or in a small class of uneven units gets each split by its share (five sigma)."
    rng = random.Random(2)
    texts = [t for _ in range(2000) for a, b, c in [[sentence(rng) for _ in range(3)]] for t in (a, a + "!", a.upper(), b, c)]
    what = {"groups": [g for r in range(2000) for g in (None, None, None, r, r)]} if tie == "groups" else {}
    if tie == "strata": what = {"labels": [r for r in range(2000) for _ in range(5)], "stratify": True}
    place = split_data(texts, **what).place.reshape(2000, 5)
    for row in (0, 3):
        for split, share in zip(SPLITS, (.6, .1, .15, .15)):
            assert abs((place[:, row] == split).mean() - share) < 5 * (share * (1 - share) / 2000) ** .5


def test_given_places():
    texts = ["one fine day", "ONE fine day", "another", "third", "fourth"]
    deal = split_data(texts, given=["train", "calibration", "shift", "", "held-out"])
    assert list(deal.place[:3]) == ["", "calibration", "shift"] and deal.place[4] in SPLITS[1:]
    grown = split_data(texts, given=["", "test", "test", "", ""])  # a published test does not grow by a copy, train does
    assert grown.place[0] == "" and grown.count("test") >= 2 and split_data(texts, given=["", "train", "", "", ""]).place[0] == "train"
    with pytest.raises(DataError, match="1 of 2 groups stand in more than one given split .e.g. group 'ann'"):
        split_data(texts, groups=["ann", "bob", "ann", None, None], given=["train", "test", "test", "", ""])
    follow = split_data(texts, groups=["ann", "bob", "cat", "ann", None], given=["test", "", "", "", ""])
    assert follow.place[3] == "test" == follow.place[1]  # by its group, and by its words


def test_families_do_not_depend_on_order_or_on_others():
    rng = random.Random(3)
    texts = [sentence(rng) for _ in range(300)]
    texts += [t[:20] + "z" + t[21:] for t in texts[:100]]
    order = rng.sample(range(400), 400)
    plain, mixed = families(texts), families([texts[i] for i in order] + [sentence(rng) for _ in range(400)])
    assert (plain[:100] == plain[300:]).all() and len(set(plain)) == 300
    assert len(set(zip(plain[order], mixed[:400]))) == 300


def test_ledger_goes_through_a_file(tmp_path):
    deal = split_data([f"text number {i}" for i in range(50)], near=None)
    save_ledger(deal, tmp_path)
    assert load_ledger(tmp_path) == {row_id(f"text number {i}"): p for i, p in enumerate(deal.place)}
    assert "text number" not in (tmp_path / "splits.json").read_text()
