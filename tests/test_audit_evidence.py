"The dossier: whatever is altered is named, whatever is missing stays open, and no text of the trail acts."
import json
import os
import re
import shutil
from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest

from fine_tune_llm.audit.card import BANK, dossier_page, evidence_map, model_card
from fine_tune_llm.audit.dossier import Dossier, sound_events
from fine_tune_llm.audit.evidence import REQUIREMENTS, standing
from fine_tune_llm.audit.report import audit, differences
from fine_tune_llm.core.errors import AuditError, ConfigurationError, RunError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.core.runs import Run, seal
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.risk import DecisionPolicy

DAY = date(2026, 3, 1)
LABELS = Labels(("yes", "no", "unsure"))


def predictions(n, split, seed):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 4, (n, 3))
    groups = pd.DataFrame({"sent": rng.choice(["fax", "mail"], n), "ward": rng.choice(["a", "b"], n)})
    groups.loc[0, "ward"] = None
    return Predictions([f"{split}{i}" for i in range(n)], LABELS, logits=z, y=(z + rng.gumbel(size=z.shape)).argmax(axis=1),
                       groups=groups, texts=["secret"] * n, split=split, seen={"training": ["train0"]})


def filled(folder):
    "A dossier of every kind of event and artefact, signed by both."
    d = Dossier.create(folder, "Routes letters of patients", owner="Ada", harm={"groups": 7})
    calibration, test = predictions(300, "calibration", 1), predictions(400, "test", 2)
    d.audit(test, ConformalClassifier(alpha=0.2).fit(calibration), DecisionPolicy(abstain_cost=0.4, max_risk=0.4).fit(calibration),
            groups=["sent", ("sent", "ward")], tolerance=0.5, before=test, by="Ada")
    (folder / "notes.md").write_text("Two clerks labelled each letter.")
    for name in ("data", "limits", "groups"): d.add(name, "pass", "it is written down", by="Ada", files=["notes.md"])
    d.waive("robustness", "a pilot of ten users", expires="2026-05-31", by="Ada")
    d.challenge("Why was fax never compared?", by="Grace")
    d.answer("It was compared with mail.", by="Ada")
    d.sign("Ada", DAY)
    return d, d.sign("Grace", DAY)


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dossier") / "clinic"
    return folder, filled(folder)[1]


@pytest.fixture
def copy(signed, tmp_path):
    shutil.copytree(signed[0], tmp_path / "clinic")
    return tmp_path / "clinic", signed[1]


def test_untouched_is_ok(signed):
    folder, head = signed
    found = Dossier.attach(folder).verify(DAY, head)
    assert found.ok and found.head == head and found.altered == found.open == ()
    assert b"secret" not in b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_every_byte_of_the_trail_counts(signed, tmp_path):
    kept, file = (signed[0] / "events.jsonl").read_bytes(), tmp_path / "events.jsonl"
    starts = np.cumsum([0] + [len(line) + 1 for line in kept.split(b"\n")[:-1]])
    for i in range(len(kept)):
        file.write_bytes(kept[:i] + bytes([kept[i] ^ 1]) + kept[i + 1:])
        events, wrong = sound_events(file)
        line = int(np.searchsorted(starts, i, side="right"))
        assert wrong and f"line {line}" in wrong[0], (i, line, wrong)
        assert len(events) == line - 1


def test_one_byte_of_any_artefact_is_named(copy):
    folder, head = copy
    d, files = Dossier.attach(folder), sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("events.jsonl", "control.jsonl"))
    assert len(files) == 7
    rng = np.random.default_rng(0)
    for file in files:
        kept = file.read_bytes()
        for i in [0, len(kept) - 1, int(rng.integers(len(kept)))]:
            file.write_bytes(kept[:i] + bytes([kept[i] ^ 4]) + kept[i + 1:])
            altered = d.verify(DAY, head).altered
            assert any(a.startswith(f"{file.relative_to(folder)}: changed") for a in altered), (file.name, i, altered)
        file.unlink()
        assert f"{file.relative_to(folder)}: missing" in d.verify(DAY, head).altered
        file.write_bytes(kept)
    assert d.verify(DAY, head).ok


def rewritten(folder, change):
    "Forge a trail whose chain is whole: the attack that hashes alone cannot see."
    prev, out = "", []
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = change(json.loads(line))
        if event is None: continue
        event.pop("prev"), event.pop("hash")
        out.append(seal(event, prev))
        prev = json.loads(out[-1])["hash"]
    (folder / "events.jsonl").write_text("\n".join(out) + "\n")


def test_a_forged_report_contradicts_its_predictions(copy):
    from fine_tune_llm.audit.evidence import file_hash
    folder, head = copy
    report = json.loads((folder / "audit/report.json").read_text())
    finding = next(f for f in report["summary"] if f["name"] == "coverage")
    finding["estimate"]["value"] += 0.01
    (folder / "audit/report.json").write_text(json.dumps(report))

    def change(e):
        if "audit/report.json" in e.get("files", {}): e["files"]["audit/report.json"] = file_hash(folder, "audit/report.json")
        return e
    rewritten(folder, change)
    assert sound_events(folder / "events.jsonl")[1] == []  # the chain is whole
    assert any(a.startswith("audit/report.json, summary[") and "estimate.value" in a for a in Dossier.attach(folder).verify(DAY).altered)
    assert "events are missing at the end" in Dossier.attach(folder).verify(DAY, head).altered[0]  # and the head tells at once


def test_forged_evidence_contradicts_the_report(copy):
    folder, _ = copy
    mark = {}

    def change(e):
        if e.get("requirement") == "coverage": e |= {"verdict": "fail"}
        if e["event"] == "audit_recorded": mark["old"] = e["hash"]
        return e
    rewritten(folder, change)
    altered = Dossier.attach(folder).verify(DAY).altered
    assert altered and all(a.startswith("evidence on ") for a in altered) and any("coverage, verdict: fail recorded" in a for a in altered)


def test_a_lost_end_shows_only_with_the_head(copy):
    folder, head = copy
    file = folder / "events.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    d = Dossier.attach(folder)
    assert d.verify(DAY).altered == () and d.verify(DAY).open == ("no signature of the reviewer holds",)
    assert "missing at the end" in d.verify(DAY, head).altered[0]
    file.write_bytes(b"".join(lines)[:-5])
    assert d.verify(DAY).altered == (f"events.jsonl, line {len(lines)}: cut off",)
    file.write_bytes(b"")
    assert d.verify(DAY).altered == ("no dossier was opened here",) and not d.verify(DAY).ok


def test_an_expired_waiver_fails(signed):
    d = Dossier.attach(signed[0])
    last = date(2026, 5, 31)
    assert d.verify(last).ok
    late = d.verify(last + timedelta(days=1))
    assert not late.ok and late.altered == () and late.open[0].startswith("robustness: fail, the waiver of Ada expired on 2026-05-31")
    with pytest.raises(AuditError, match="1 requirements are open"): d.sign("Ada", last + timedelta(days=1))


def test_newer_evidence_ends_a_waiver_and_the_signatures(copy):
    d = Dossier.attach(copy[0])
    d.add("robustness", "fail", "capitals change every answer", by="Ada")
    assert d.verify(DAY).open == ("robustness: fail, capitals change every answer", *(f"no signature of the {r} holds" for r in ("owner", "reviewer")))


def test_a_requirement_cannot_be_dropped(copy):
    folder, head = copy
    d = Dossier.attach(folder)
    with pytest.raises(AuditError, match="opened here before"): Dossier.create(folder, "Routes nothing at all", owner="Eve")
    def change(e): return {**e, "requirements": e["requirements"][:6]} if e["event"] == "audit_opened" else e
    assert [s.requirement.harm for s in d.standings(DAY)] == [2, 3, 2, 2, 3, 7, 2, 1]
    rewritten(folder, change)
    assert d.verify(DAY, head).altered


def test_a_second_person_must_review(tmp_path):
    d = Dossier.create(tmp_path / "d", "Routes letters of patients", owner="Ada")
    (tmp_path / "d/n.md").write_text("x")
    for r in REQUIREMENTS: d.add(r.name, "pass", "it is written down", by="Ada", files=["n.md"])
    with pytest.raises(AuditError, match="challenged nothing"): d.sign("Grace", DAY)
    with pytest.raises(ConfigurationError, match="a challenge needs"): d.challenge("ok ok", by="Grace")
    d.challenge("Is this really everything?", by="Grace")
    with pytest.raises(AuditError, match="has no answer"): d.sign("Grace", DAY)
    d.answer("Yes, it is everything.", by="Ada")
    d.sign(" ADA ", DAY)
    assert d.verify(DAY).open == ("no signature of the reviewer holds",)  # Ada in capitals is still Ada
    d.sign("Grace", DAY)
    assert d.verify(DAY).ok


def test_paths_stay_inside(tmp_path):
    d = Dossier.create(tmp_path / "d", "Routes letters of patients", owner="Ada")
    (tmp_path / "secret").write_text("x")
    os.symlink(tmp_path / "secret", tmp_path / "d/link")
    for name in ("../secret", str(tmp_path / "secret"), "link"):
        with pytest.raises(RunError, match="leads out"): d.add("data", "pass", "it is written down", by="Ada", files=[name])
    with pytest.raises(AuditError, match="no file 'none'"): d.add("data", "pass", "it is written down", by="Ada", files=["none"])


def test_a_bundle_is_left_sealed(tmp_path):
    for name in ("bundle.json", "manifest.json"): (tmp_path / name).write_text("{}")
    with pytest.raises(AuditError, match="a bundle is sealed"): Dossier.create(tmp_path, "Routes letters of patients", owner="Ada")


def test_the_trail_of_a_training_run_goes_on(tmp_path):
    run = Run.create(tmp_path / "run")
    run.log("run_started", total_steps=1), run.log("run_finished")
    d = Dossier.create(tmp_path / "run", "Routes letters of patients", owner="Ada")
    assert d.run.state == "finished" and [e["event"] for e in d.run.events()] == ["run_started", "run_finished", "audit_opened"]
    assert d.verify(DAY).altered == () and len(d.verify(DAY).open) == 8 + 2


def test_standing_without_events_is_never_a_pass():
    assert {standing(r, [], DAY).verdict for r in REQUIREMENTS} == {"not enough evidence"}


@pytest.mark.parametrize("a, b", [(1.0, 1.0 + 1e-6), (0, None), ("a", "b"), ([1], []), ({"a": 1}, {"b": 1}), ({}, [])])
def test_differences_sees(a, b): assert differences(a, b) and differences(b, a) and not differences(a, a)


HOSTILE = ["<script>alert(1)</script>", "=cmd|' /C calc'!A0", "[x](javascript:alert(1))", "| a | b |", "\u202egnp.exe", "\n# heading\n- item", "`code` **bold** ![i](http://x)"]


def test_hostile_text_is_inert(tmp_path):
    d = Dossier.create(tmp_path, "a purpose of it " + " ".join(HOSTILE), owner="Ada " + HOSTILE[0])
    (tmp_path / "n.md").write_text("x")
    for text in HOSTILE:
        d.add("data", "pass", "it is said " + text, by="Ada " + text, files=["n.md"], **{text: text})
        d.waive("limits", "we wait for it " + text, expires="2026-12-31", by="Ada " + text)
        d.challenge("why is it so " + text, by="Grace " + text)
    card, page = model_card(d, DAY), d._repr_html_()
    for out in (card, page): assert "<script" not in out and "\u202e" not in out
    lines = card.splitlines()
    assert "](" not in card and sum(line.startswith("# ") for line in lines) == 1 and "**bold**" not in card and "`code`" not in card
    assert {line.count("|") - line.count("\\|") for line in lines[lines.index("## Requirements") + 2:][:10]} == {6}
    assert json.loads(json.dumps(d.to_dict(DAY)))["events"][0]["owner"] == "Ada " + HOSTILE[0]  # JSON keeps it as it is


def test_the_numbers_of_the_card_are_those_of_the_report(signed):
    report, card = json.loads((signed[0] / "audit/report.json").read_text()), model_card(Dossier.attach(signed[0]), DAY)
    for name in ("ECE", "coverage", "selective risk"):
        e = next(f["estimate"] for f in report["summary"] if f["name"] == name)
        assert f"| {name} | {e['value']:.3f} | {e['low']:.3f} | {e['high']:.3f} | {e['n']} |" in card
    assert signed[1] in card and "claims no compliance" in card


def test_the_map_is_missing_what_is_not_there(tmp_path, signed):
    empty = evidence_map(Dossier.create(tmp_path, "Routes letters of patients", owner="Ada"), DAY)
    assert set(empty["state"][empty["shown by"] != "trail"]) == {"missing"}
    full = evidence_map(Dossier.attach(signed[0]), DAY)
    assert set(full["framework"]) == {"EU AI Act, Annex IV", "NIST AI RMF 1.0", BANK}
    assert set(full["state"][full["shown by"] == "nothing here"]) == {"missing"} and (full["state"] == "linked").sum() >= 10


def test_a_report_verifies_itself(tmp_path):
    from dataclasses import replace
    report = audit(predictions(400, "test", 2), groups=["sent"], tolerance=0.3)
    report.save(tmp_path / "r.json")
    assert report.verify() == report.verify(tmp_path / "r.json") == ()
    wrong = replace(report, rows=(replace(report.rows[0], verdict="fail"), *report.rows[1:]))
    assert report.rows[0].verdict == "pass" and wrong.verify() == ("accuracy of sent = fax: fail does not follow from its gap",)
    assert any(d.startswith("rows[0].verdict: pass recorded, fail recomputed") for d in wrong.verify(tmp_path / "r.json"))
    first = report.summary[0]
    moved = replace(report, summary=(replace(first, estimate=replace(first.estimate, value=0.0)), *report.summary[1:]))
    assert "does not hold its estimate" in moved.verify()[0]


def test_the_page_of_a_dossier_is_offline_inert_and_bounded(signed, tmp_path):
    "A long trail and a long text do not make a large page; no text acts; whatever is altered stands on it."
    folder, head = signed
    page = dossier_page(Dossier.attach(folder), DAY)
    assert "complete" in page and head[:12] in page and "reviewer: Grace" in page and "a pilot of ten users" in page
    assert not re.search(r"<script|src=|href=|url\(|@import", page)
    d = Dossier.create(tmp_path / "long", "Decides about loans " + "<script>alert(1)</script>" * 3000, owner="<img src=x onerror=alert(1)>")
    for i in range(300): d.waive("robustness", f"wait {i} <b onclick=x> " + "word " * 300, expires="2026-05-31", by="Ada \u202e")
    page = dossier_page(d, DAY)
    assert len(page.encode()) < 1_000_000 and "200 of 301" in page and "wait 299" in page and "wait 99 " not in page
    assert "<script" not in page and "<img" not in page and "<b onclick" not in page and "\u202e" not in page
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/notes.md").write_text("Nobody labelled them.")
    assert "notes.md: changed" in dossier_page(Dossier.attach(tmp_path / "copy"), DAY) and "trust nothing below" in dossier_page(Dossier.attach(tmp_path / "copy"), DAY)
