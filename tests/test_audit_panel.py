"""The audit panel without a browser: what each control sends and shows, that nothing is left behind, and that no text acts."""
import importlib
import re
import sys
from datetime import date, timedelta
from xml.etree import ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from ipywidgets import Dropdown
from ipywidgets.widgets import widget as widgets
from traitlets import TraitError

from fine_tune_llm.audit.dossier import Dossier
from fine_tune_llm.audit.groups import GroupRow
from fine_tune_llm.audit.report import audit
from fine_tune_llm.audit.slices import find_slices
from fine_tune_llm.core.errors import AuditError, DataError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.panels.audit_panel import AuditPanel
from fine_tune_llm.panels.audit_table import arranged, example_rows, examples_html, rows_in, table_html
from fine_tune_llm.panels.figure_panel import held
from fine_tune_llm.uncertainty.metrics import Estimate
from fine_tune_llm.uncertainty.predictions import Predictions

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)> \u202e"
DAY = date.today()


@pytest.fixture(scope="module")
def preds() -> Predictions:
    rng, n = np.random.default_rng(1), 800
    z = rng.normal(0, 3, (n, 2))
    bad = rng.random(n) < 0.3
    y = np.where(bad & (np.arange(n) % 2 == 0), rng.integers(0, 2, n), (z + rng.gumbel(size=z.shape)).argmax(axis=1))
    groups = pd.DataFrame({"half": np.where(np.arange(n) % 2 == 0, "even" + HOSTILE, "odd"), "ward": rng.choice(["a", "b"], n)})
    groups.loc[:4, "ward"] = None
    return Predictions([f"id{i}" for i in range(n)], Labels(("no", "yes")), logits=z, y=y, groups=groups, texts=[f"secret {i} {HOSTILE}" for i in range(n)], split="test")


@pytest.fixture(scope="module")
def report(preds): return audit(preds, groups=["half", "ward", ("half", "ward")], metrics=["FPR", "ECE"])


@pytest.fixture
def dossier(tmp_path):
    return Dossier.create(tmp_path / "case", f"Sorts letters {HOSTILE}", owner="Ada")


@pytest.fixture
def panel(report, preds, dossier):
    made = AuditPanel(report, preds, slices=find_slices(preds, words=5), dossier=dossier)
    yield made
    made.close()


def send(widget, value):
    "The message of a browser in which a control has changed."
    state = {"index": [v for _, v in widget._options_full].index(value)} if isinstance(widget, Dropdown) else {"value": value}
    widget._handle_msg({"content": {"data": {"method": "update", "state": state, "buffer_paths": []}}, "buffers": []})


def click(button):
    button._handle_msg({"content": {"data": {"method": "custom", "content": {"event": "click"}}}, "buffers": []})


# Model and view

def row(metric, group, verdict, gap, tolerance=0.05):
    e = None if gap is None else Estimate(gap, gap - 0.1, gap + 0.1, 50, "gap")
    return GroupRow(metric, "g", group, 5, 50, Estimate(0.5, 0.4, 0.6, 50), e, verdict, tolerance)


def test_orders_by_hand():
    rows = [row("A", "x", "pass", 0.01), row("A", "y", "fail", -0.2), row("A", "z", "not enough evidence", None),
            row("B", "x", "fail", 0.3, tolerance=0.1), row("B", "y", "not enough evidence", 0.02), row("B", "z", "fail", 0.25)]
    def names(found): return [r.metric + r.group for r in found]
    assert names(arranged(rows)) == ["Bz", "Ay", "Bx", "By", "Az", "Ax"]  # 5, 4, 3 tolerances; a gap before none; the pass last
    assert names(arranged(rows, "metric")) == ["Ax", "Ay", "Az", "Bx", "By", "Bz"]
    assert names(arranged(rows, "group")) == ["Ax", "Bx", "Ay", "By", "Az", "Bz"]
    assert names(arranged(rows, "metric", "fail", "B")) == ["Bx", "Bz"] and arranged(rows, verdict="pass", metric="B") == []


def test_a_table_letter_by_letter():
    html = re.sub(r'<div class="cell.*?</div>', "", table_html([row("A", "x<", "pass", 0.01)], 0.05, "group"))
    assert html == (
        '<div class="wide-table" role="region" aria-label="Groups" tabindex="0"><table class="gaps"><thead><tr><th scope="col">group</th><th scope="col" class="num">n</th>'
        '<th scope="col" class="num rate">rate</th><th class="ax"></th><th scope="col" class="said">gap, points [95&#160;%]</th><th scope="col">verdict</th></tr></thead>'
        '<tbody><tr class="top"><th colspan="6" scope="rowgroup">g <b>x&lt;</b></th></tr><tr class="line"><th scope="row"><b>A</b></th><td class="num">50</td>'
        '<td class="num rate">0.500</td><td class="ax"></td><td class="said">+1.0 <span class="iv">[\u22129.0, +11.0]</span></td><td class="mark"><span class="chip green">'
        '<svg viewBox="0 0 12 12" aria-hidden="true"><path d="M2 6.5l3 3 5-7"/></svg><span>pass</span></span></td></tr></tbody></table></div>')


def test_examples_by_hand():
    p = np.array([0.9, 0.6, 0.8, 0.3, 0.45, 0.2])
    preds = Predictions(list("abcdef"), Labels(("no", "yes")), probs=np.stack([1 - p, p], axis=1), y=[0, 0, 1, 0, 0, 1],
                        groups=pd.DataFrame({"g": list("xxxxxy")}), texts=None)
    assert list(example_rows(preds, "g", "x").id) == ["a", "b", "e", "d", "c"]  # wrong at 0.9 and 0.6; right at 0.55, 0.7, 0.8
    assert list(example_rows(preds, "g", "x", most=2).id) == ["a", "b"] and len(example_rows(preds, "g", "z")) == 0
    assert "no text was given" in examples_html(example_rows(preds, "g", "y"), "g = y", 1, show=True) and "No row of" in examples_html(example_rows(preds, "g", "z"), "g = z", 0)


def test_every_line_finds_its_rows(report, preds):
    "The rows behind each line are as many as the audit counted, also of crossed groups and of those without a value."
    for r in report.rows:
        if r.metric == "accuracy": assert rows_in(preds, r.column, r.group).sum() == r.n
    assert {"(missing)"} <= {r.group for r in report.rows}


def test_other_rows_are_refused(report, preds):
    with pytest.raises(DataError, match="not the rows of the report"): AuditPanel(report, preds.take(np.arange(len(preds)) > 0))


# Every control

def test_choices_redraw_what_they_name(panel, report):
    before = panel.table.value
    send(panel.choices.sort, "metric")
    assert panel.sort == "metric" and panel.table.value != before and list(panel.snapshot().metric) == [r.metric for r in report.rows]
    send(panel.choices.verdict, "not enough evidence")
    assert set(panel.snapshot().verdict) == {"not enough evidence"} and panel.verdict == "not enough evidence"
    send(panel.choices.metric, "FPR")
    assert set(panel.snapshot().metric) == {"FPR"} and f"{len(panel.snapshot())} of {len(report.rows)} lines" in panel.status.value
    send(panel.choices.group, "ward = a")
    assert "ward = a: 8 of" in panel.examples.value and "hidden" in panel.examples.value and "secret" not in panel.examples.value
    send(panel.choices.texts, True)
    assert panel.texts and panel.examples.value.count("secret") == 8
    send(panel.choices.group, "")
    assert panel.examples.value == "" and panel.last_error is None and panel.alert.value == ""


def test_traits_are_the_controls(panel):
    for name, value in dict(sort="group", verdict="fail", metric="ECE", group="ward = b", texts=True).items():
        setattr(panel, name, value)
        assert getattr(panel.choices, name).value == value
    for name in ("sort", "verdict", "metric", "group"):
        with pytest.raises(TraitError): setattr(panel, name, "no such thing")
        assert getattr(panel, name) != "no such thing" == getattr(panel.choices, name).value or getattr(panel, name) == getattr(panel.choices, name).value


def test_every_control_has_a_label(panel):
    for w in held(panel):
        if "ft-field" in getattr(w, "_dom_classes", ()): assert w.description.strip()


def test_a_review_by_clicks(panel, dossier):
    review = panel.review
    def write(**values):
        for name, value in values.items(): send(getattr(review, name), value)
    until = (DAY + timedelta(days=30)).isoformat()
    for name in [r["name"] for r in dossier.events[0]["requirements"]]:
        write(name="Ada", words=f"a pilot of ten users {HOSTILE}", requirement=name, expires=until)
        click(review.buttons["Waive"])
        assert panel.last_error is None and review.words.value == ""
    assert f"until {until}" in panel.trail.value and "a pilot of ten users" in panel.trail.value
    click(review.buttons["Sign"])
    assert "owner: Ada" in panel.trail.value and dossier.events[-1]["hash"] in panel.status.value
    write(name="Grace", words="Who labelled all these rows?")
    click(review.buttons["Challenge"])
    assert "no answer yet" in panel.trail.value
    click(review.buttons["Sign"])
    assert isinstance(panel.last_error, AuditError) and 'role="alert"' in panel.alert.value
    write(name="Ada", words="Two clerks did it.")
    click(review.buttons["Answer"])
    write(name="Grace")
    click(review.buttons["Sign"])
    assert panel.alert.value == "" and dossier.verify().ok and "reviewer: Grace" in panel.trail.value
    assert "<script" not in panel.trail.value + panel.status.value + panel.picture() and "<img" not in panel.trail.value


@pytest.mark.parametrize("button, words, told", [("Waive", "", "a reason needs at least 3 words"), ("Challenge", "", "a challenge needs"),
                                                 ("Answer", "It is so.", "no challenge is open"), ("Sign", "", "requirements are open")])
def test_mistakes_are_shown_and_kept(panel, dossier, button, words, told):
    events = len(dossier.events)
    send(panel.review.name, "Ada"), send(panel.review.words, words), send(panel.review.expires, "2099-01-01")
    click(panel.review.buttons[button])
    assert told in str(panel.last_error) and 'role="alert"' in panel.alert.value and told in panel.alert.value
    assert len(dossier.events) == events and panel.review.words.value == words  # nothing was written, nothing is lost
    panel.sort = "metric"
    assert panel.alert.value == "" and panel.last_error is not None


def test_an_expired_waiver_fails_in_the_panel(report, dossier):
    dossier.waive("robustness", "a pilot of ten users", expires=DAY, by="Ada")
    for today, told in ((DAY, False), (DAY + timedelta(days=1), True)):
        panel = AuditPanel(report, dossier=dossier, today=today)
        assert ("<b>expired</b>" in panel.trail.value) is told and ("the waiver of Ada expired" in panel.trail.value) is told
        panel.close()


def test_an_altered_file_shows(report, dossier):
    (dossier.run.path / "notes.md").write_text("Two clerks.")
    dossier.add("data", "pass", "two clerks labelled it", by="Ada", files=["notes.md"])
    (dossier.run.path / "notes.md").write_text("Nobody.")
    panel = AuditPanel(report, dossier=dossier)
    assert "notes.md: changed" in panel.trail.value and "1 altered" in panel.trail.value
    panel.close()


def test_export(panel, tmp_path):
    for name in ("a.html", "a.json", "a.md"):
        send(panel.file, str(tmp_path / name))
        click(panel.export)
        assert (tmp_path / name).stat().st_size > 500 and panel.alert.value == "" and "secret" not in (tmp_path / name).read_text()
    before = (tmp_path / "a.md").read_text()
    click(panel.export)
    assert "such a file already" in panel.alert.value and (tmp_path / "a.md").read_text() == before
    send(panel.file, str(tmp_path / "a.pdf"))
    click(panel.export)
    assert ".html or .json" in panel.alert.value and not (tmp_path / "a.pdf").exists()


# What is left behind, and what must not act

def test_closing_frees_every_widget(report, preds, dossier):
    open_before = len(widgets._instances)
    for _ in range(10):
        panel = AuditPanel(report, preds, dossier=dossier)
        panel.sort, panel.group = "group", "ward = a"
        panel.close()
    assert len(widgets._instances) == open_before


def test_the_picture_is_static_inert_and_keeps_no_text(panel):
    panel.group, panel.texts = f"half = even{HOSTILE}", True
    page = panel.picture()
    body = page[page.index('<div class="ft-audit">'):]
    assert not re.search(r"secret \d", page) and not re.search(r"<script|<img|onclick=|href=|src=|\u202e", re.sub(r"&lt;.*?&gt;", "", page))
    assert "<script" not in panel.examples.value and "<img" not in panel.examples.value and "\u202e" not in panel.examples.value
    ET.fromstring(re.sub(r"<style>.*?</style>", "", body, flags=re.S).replace("&nbsp;", " "))
    bundle = panel._repr_mimebundle_()
    assert bundle["text/html"] == page and len(page) < 1_000_000


def test_report_panel_goes_through_the_entry_point(report, tmp_path, monkeypatch):
    "`report.panel()` opens whatever an installed package offers under the name audit; the audit floor imports no panel."
    folder = tmp_path / "audit_panel_for_test-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: audit-panel-for-test\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[fine_tune_llm.panels]\naudit = fine_tune_llm.panels.audit_panel:AuditPanel\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    panel = report.panel()
    assert isinstance(panel, AuditPanel) and panel.report is report
    panel.close()
    import fine_tune_llm.audit.report as module
    monkeypatch.setattr(module, "entry_points", lambda **_: [])
    with pytest.raises(AuditError, match="no panel is registered"): report.panel()
