"""The panels without a browser: what each control sends and shows, that nothing is left behind, that no text acts, and that no meaning rests on colour."""
import re
from html.parser import HTMLParser
from itertools import combinations
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from ipywidgets import (
    HTML,
    BoundedFloatText,
    Button,
    Checkbox,
    Dropdown,
    FloatSlider,
    FloatText,
    IntText,
    Text,
    Textarea,
)
from ipywidgets.widgets import widget as widgets

from fine_tune_llm.audit.report import audit
from fine_tune_llm.core.errors import ConfigurationError
from fine_tune_llm.core.figures import CHIP, CSS, POINT
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.core.runs import Run
from fine_tune_llm.data.report import check_data
from fine_tune_llm.panels.audit_panel import AuditPanel
from fine_tune_llm.panels.calibration_panel import CalibrationPanel
from fine_tune_llm.panels.compare_runs import STYLES, compare_runs
from fine_tune_llm.panels.conformal_panel import ConformalPanel
from fine_tune_llm.panels.curves import Mark
from fine_tune_llm.panels.data_panel import DataPanel, class_bars
from fine_tune_llm.panels.figure_panel import held
from fine_tune_llm.panels.number_slider import NumberSlider
from fine_tune_llm.panels.risk_panel import RiskPanel, cost_table
from fine_tune_llm.panels.start_panel import StartPanel
from fine_tune_llm.panels.training import LINE, TrainingPanel, neighbours
from fine_tune_llm.uncertainty.calibration import TemperatureScaling
from fine_tune_llm.uncertainty.predictions import Predictions

EVIL = '"><script>hack()</script><img src=x onerror=hack()><b>'
LABELS = Labels((f"bill{EVIL}", "card", "loan"))


def predictions(n: int, split: str, seed: int) -> Predictions:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, 3))
    y = (logits + rng.gumbel(size=(n, 3))).argmax(axis=1)  # the stated probabilities are too sure by a factor
    return Predictions([f"{split}{i}" for i in range(n)], LABELS, logits=1.6 * logits, y=y, split=split, texts=[f"letter {i} {EVIL}" for i in range(n)],
                       groups=pd.DataFrame({"channel": np.where(np.arange(n) % 3 == 0, EVIL, "web")}))


@pytest.fixture(scope="module")
def world(): return SimpleNamespace(validation=predictions(200, "validation", 0), calibration=predictions(300, "calibration", 1), test=predictions(400, "test", 2))


def trained(folder, n: int = 40, name: str = EVIL) -> Run:
    "A run that has said something of each kind."
    run = Run.create(folder)
    run.log("run_started", total_steps=100, epochs=2, rows=800, device="cpu" + name, dtype="float32")
    for s in range(1, n + 1):
        run.log("step", step=s, epoch=s / 50, loss=0.4 + 1 / s, learning_rate=1e-4, rows_per_second=50.0, eta_s=1.0)
        if s % 10 == 0: run.log("evaluated", step=s, nll=0.4 + 1 / s, accuracy=0.9, ece=0.05, ece_low=0.03, ece_high=0.06, ece_null=0.02)
    run.log("warning", message=f"rows were cut {name}")
    return run


OPEN = {
    "data": lambda w, tmp: DataPanel(check_data([dict(text=f"{EVIL} refund order {i}", label=("Refund", "refund ", f"Card{EVIL}")[i % 3]) for i in range(30)], text="text", label="label")),
    "calibration": lambda w, tmp: CalibrationPanel(w.validation, w.test, candidates=[TemperatureScaling()]),
    "conformal": lambda w, tmp: ConformalPanel(w.calibration, w.test, answer=lambda text: [0.6, 0.3, 0.1], group="channel"),
    "risk": lambda w, tmp: RiskPanel(w.calibration, w.test, abstain_cost=0.3, max_risk=0.3),
    "audit": lambda w, tmp: AuditPanel(audit(w.test, groups=["channel"], metrics=["error rate"]), w.test),
    "training": lambda w, tmp: TrainingPanel(trained(tmp / "run")),
    "runs": lambda w, tmp: compare_runs({EVIL: trained(tmp / "a"), "b": trained(tmp / "b", 20)}),
}


@pytest.fixture(params=OPEN)
def panel(request, world, tmp_path, monkeypatch):
    monkeypatch.delenv("FTLLM_STRICT", raising=False)
    made = OPEN[request.param](world, tmp_path)
    made.kind = request.param
    yield made
    made.close()


def message(widget, **state): widget._handle_msg({"content": {"data": {"method": "update", "state": state, "buffer_paths": []}}, "buffers": []})
def click(button): button._handle_msg({"content": {"data": {"method": "custom", "content": {"event": "click"}}}, "buffers": []})
def shown(panel) -> list[str]: return [w.value for w in held(panel) if isinstance(w, HTML)]


# Every control

CONTROLS = BoundedFloatText, Button, Checkbox, Dropdown, FloatText, IntText, Text, Textarea

def test_every_control_has_words(panel):
    found = [w for w in held(panel) if isinstance(w, CONTROLS)]
    assert found and all(w.description.strip() for w in found)
    assert all(w.tooltip for w in found if isinstance(w, Button)) or panel.kind == "audit"  # there the word says it all
    assert len({w.description for w in found}) == len(found)
    assert [w for w in held(panel) if isinstance(w, FloatSlider)] == [w.slider for w in held(panel) if isinstance(w, NumberSlider)]  # a bare one has no name


MOVES = {  # trait -> what the browser sends, and what the trait and the title or note must then say
    ("data", "severity"): (dict(index=1), "stop"),
    ("calibration", "group"): (dict(index=2), "channel = web"),
    ("conformal", "alpha"): (dict(value=0.2), 0.2), ("conformal", "score"): (dict(index=1), "aps"), ("conformal", "guarantee"): (dict(index=1), "pac"),
    ("conformal", "group"): (dict(index=0), ""), ("conformal", "text"): (dict(value=f"where is it {EVIL}"), f"where is it {EVIL}"),
    ("risk", "abstain_cost"): (dict(value=0.1), 0.1), ("risk", "max_risk"): (dict(value=0.2), 0.2),
    ("runs", "axis"): (dict(index=2), "share"),
}

@pytest.mark.parametrize("kind, trait", MOVES)
def test_a_move_in_the_browser_is_a_trait_and_a_new_figure(kind, trait, world, tmp_path):
    panel, (state, value) = OPEN[kind](world, tmp_path), MOVES[kind, trait]
    before = shown(panel)
    control = panel.controls[trait]
    message(getattr(control, "slider", control), **state)
    assert getattr(panel, trait) == value and panel.last_error is None and not panel.alert.value
    assert shown(panel) != before
    other = next(v for v in (panel.controls[trait].options if isinstance(panel.controls[trait], Dropdown) else [0.3, "other"]) if type(v) is type(value) or isinstance(v, tuple))
    setattr(panel, trait, other[1] if isinstance(other, tuple) else other)  # and back again from a cell
    assert control.value == getattr(panel, trait)
    if isinstance(control, NumberSlider):  # typed or stepped instead of dragged
        message(control.box, **state)
        assert getattr(panel, trait) == value == control.slider.value and panel.last_error is None
    panel.close()


def test_buttons_of_data_and_risk_and_runs(world, tmp_path):
    data = OPEN["data"](world, tmp_path)
    click(data.accept)
    assert data.merges == {"refund ": "Refund"} and ">applied<" in data.plots.value
    click(data.undo)
    assert data.merges == {} and ">applied<" not in data.plots.value
    risk = OPEN["risk"](world, tmp_path)
    message(risk.true, index=1), message(risk.answer, index=2), message(risk.cost, value=7.0)
    click(risk.set)
    assert risk.costs[1, 2] == 7 and "7.00" in risk.plots.value and risk.last_error is None
    message(risk.cost, value=-7.0)
    click(risk.set)
    assert risk.costs[1, 2] == 7 and isinstance(risk.last_error, ConfigurationError) and 'role="alert"' in risk.alert.value
    runs = OPEN["runs"](world, tmp_path)
    runs.runs["b"].log("step", step=90, loss=0.2, learning_rate=1e-4)
    click(runs.again)
    assert "b: running at step 90" in runs.head.value
    for panel in (data, risk, runs): panel.close()


def test_buttons_of_the_training_panel(world, tmp_path):
    panel = OPEN["training"](world, tmp_path)
    panel.publisher.close()
    panel.publisher.thread.join(20)
    for button in panel.controls.buttons.values(): click(button)
    message(panel.controls.rate, value=2e-5)
    click(panel.controls.set)
    asked = [(c["command"], {k: v for k, v in c.items() if k not in ("id", "time", "command")}) for c in panel.run.commands()]
    assert asked == [("pause", {}), ("stop", {}), ("evaluate", {}), ("checkpoint", {}), ("set", {"times": 0.5}), ("set", {"times": 2}), ("set", {"learning_rate": 2e-5})]
    panel.refresh()
    assert "Set learning rate 2e-05 requested" in panel.note.value
    message(panel.controls.rate, value=-1.0)
    click(panel.controls.set)
    assert "a learning rate is above 0" in panel.alert.value and isinstance(panel.last_error, ValueError) and len(panel.run.commands()) == 7
    panel.close()


def test_what_a_control_does_not_offer_is_refused_everywhere(world, tmp_path):
    for kind, trait, wrong in (("conformal", "score", "luck"), ("conformal", "alpha", 0.9), ("risk", "max_risk", 0.7), ("calibration", "method", "prayer"), ("runs", "axis", "moon")):
        panel = OPEN[kind](world, tmp_path / kind / trait)
        before = getattr(panel, trait), shown(panel)
        with pytest.raises(Exception, match="cannot be|alpha is 0.9"): setattr(panel, trait, wrong)
        assert (getattr(panel, trait), shown(panel)) == before and panel.controls[trait].value == before[0]
        panel.close()


@pytest.mark.slow
def test_a_form_starts_a_process_of_its_own(tmp_path):
    "The whole way: boxes, a checked configuration, a process, and its panel below the form."
    words = "morning evening street garden window river letter kitchen market school bridge forest harbour tower station island meadow winter".split()
    lines = [f"{a} and {b} in the {w},{w}" for w in ("rain", "sun") for i, a in enumerate(words) for b in words[:i]]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    form = StartPanel({"data.path": str(tmp_path / "rows.csv")}, out=tmp_path / "run")
    message(form.boxes["training.epochs"], value=4), message(form.boxes["training.learning_rate"], value=3e-3), message(form.boxes["training.batch_size"], value=16)
    message(form.more, value="model: {device: cpu}\ntraining: {lora: {r: 4}}")
    click(form.button)
    assert form.last_error is None and isinstance(form.panel, TrainingPanel)
    try: assert form.run.wait(300) == "finished"
    finally: form.run.process.kill()
    form.panel.publisher.thread.join(30)
    assert "Finished" in form.panel.head.value and form.panel.last_error is None and form.run.events("run_started")[0]["epochs"] == 4
    form.close()


# What is left behind

def test_two_hundred_panels_leave_no_model(world, tmp_path):
    "Two hundred panels of all kinds are opened, moved and closed."
    report, rows = audit(world.test, groups=["channel"], metrics=["error rate"]), check_data([dict(text=f"row {i}", label="ab"[i % 2]) for i in range(20)], text="text", label="label")
    dear = OPEN["conformal"](world, tmp_path).grids  # computed once: the test is about widgets
    run, runs = trained(tmp_path / "one"), {"a": trained(tmp_path / "two"), "b": trained(tmp_path / "three")}
    class Quick(ConformalPanel):
        def kept(self): return dear["lac", "marginal", "channel"]
    make = [lambda: DataPanel(rows), lambda: OPEN["data"](world, tmp_path), lambda: Quick(world.calibration, world.test, group="channel"),
            lambda: RiskPanel(world.calibration, world.test), lambda: AuditPanel(report, world.test), lambda: TrainingPanel(run), lambda: compare_runs(runs)]
    move = {"severity": "stop", "alpha": 0.3, "max_risk": 0.3, "sort": "group", "axis": "share"}
    before = set(widgets._instances)
    for i in range(200):
        panel = make[i % len(make)]()
        for trait, value in move.items():
            if panel.has_trait(trait): setattr(panel, trait, value)
        panel.close()
        panel.close()  # twice is once
    assert set(widgets._instances) == before


def test_a_closed_panel_leaves_its_picture(panel):
    if panel.kind == "training": return  # its picture stays when the run ends, see the notebook
    seen = []
    panel.shown = SimpleNamespace(update=lambda bundle, raw: seen.append((bundle, raw)))
    panel.close()
    assert seen == [(panel.still(), True)] and "<svg" in panel.still()["text/html"]


# What must not act, and what is told to those who do not see

class Reader(HTMLParser):
    "Collects what a browser would take for tags."
    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.handlers += [k for k, v in attrs if k.startswith("on") or k in ("src", "href", "srcdoc", "action") or "javascript:" in str(v)]

HARMLESS = {"b", "br", "desc", "details", "div", "figure", "g", "h3", "h4", "i", "li", "line", "p", "path", "rect", "span", "style", "summary", "svg", "table", "tbody", "td", "text", "th",
            "thead", "title", "tr", "u", "ul", "mark", "s", "code", "small", "ins", "del"}

def test_hostile_text_is_inert(panel):
    if panel.kind == "conformal": panel.text = EVIL
    if panel.kind == "calibration": panel.group = f"channel = {EVIL}"
    if panel.kind == "audit": panel.group, panel.texts = f"channel = {EVIL}", True
    if panel.kind == "training":
        panel.run.command("set", learning_rate=1e-4)
        panel.run.log("run_failed", error=EVIL)
        panel.publisher.close()
        panel.publisher.thread.join(20)
        panel.refresh()
    html = "".join([*shown(panel), panel.picture()])
    found = Reader(html)
    assert found.tags <= HARMLESS and not found.handlers, (found.tags - HARMLESS, found.handlers)
    assert "script" in html and "<script" not in html  # it is there to be read


def test_a_mistake_is_inert_too(world, tmp_path, monkeypatch):
    monkeypatch.delenv("FTLLM_STRICT", raising=False)
    def refuse(text): raise ValueError(f"no answer to {text}")
    panel = ConformalPanel(world.calibration, world.test, answer=refuse)
    panel.text = EVIL
    assert EVIL in str(panel.last_error) and Reader(panel.alert.value).tags == {"div", "b"}
    panel.close()


def test_every_plot_speaks(panel):
    picture = re.sub(r"<style>.*?</style>", "", panel.picture(), flags=re.S).replace("&nbsp;", " ")
    plots = [e for e in ET.fromstring(f"<r>{picture}</r>").iter("svg") if e.get("role") == "img"]
    assert plots
    for p in plots: assert p.find("title").text.strip() and re.search(r"\d", p.find("desc").text), ET.tostring(p)[:200]
    assert panel.kind == "audit" or "<details>" in picture  # the audit is a table already
    assert isinstance(panel.snapshot(), pd.DataFrame) and len(panel.snapshot())


# Small figures, letter by letter, worked out by hand

def test_bars_letter_by_letter():
    "Two classes of 4 and 1 rows on an axis of 4.4: heights of 90.91 and 22.73 %, a quarter of the width each."
    html = class_bars({"a": 4, "<b>": 1}).svg()
    marks = html[html.index("</desc>") + 7:]
    assert "<title>Rows per class</title><desc>a: 4; &lt;b&gt;: 1</desc>" in html
    assert marks == (
        '<rect class="fill bars blue" x="0.0%" y="9.09%" width="25.00%" height="90.91%"><title>4</title></rect>'
        '<rect class="fill bars blue" x="25.0%" y="77.27%" width="25.00%" height="22.73%"><title>1</title></rect>'
        '<line class="ln thin axis" x1="0.0%" y1="100.0%" x2="50.0%" y2="100.0%"/>'
        '<text class="" x="12.5%" y="9.09%" dx="0" dy="-5" text-anchor="middle">4</text><text class="" x="12.5%" y="100.0%" dx="0" dy="17" text-anchor="middle">a</text>'
        '<text class="" x="37.5%" y="77.27%" dx="0" dy="-5" text-anchor="middle">1</text><text class="" x="37.5%" y="100.0%" dx="0" dy="17" text-anchor="middle">&lt;b&gt;</text>'
        '<text class="head" x="0" y="0" dx="-4" dy="-18">Rows per class</text></svg></div>')


def test_costs_letter_by_letter():
    assert cost_table(np.array([[0, 1], [2.5, 0]]), ["a", "<b>"]) == (
        '<div class="cell"><p style="color:var(--ink);margin-top:0"><b>What an answer costs</b></p><table><tr><th>true \\ answer</th><th>a</th><th>&lt;b&gt;</th></tr>'
        "<tr><th>a</th><td>0.00</td><td>1.00</td></tr><tr><th>&lt;b&gt;</th><td>2.50</td><td>0.00</td></tr></table></div>")


def test_letters_that_would_overlap_are_joined():
    marks = [Mark(letter, "applied", "", "", step) for letter, step in (("A", 0), ("B", 3), ("C", 7), ("D", 12), ("E", 90))]
    assert ["".join(m.letter for m in near) for near in neighbours(marks, 100)] == ["ABC", "D", "E"]  # 4 % for each letter that stands there: 3 < 4, 7 < 8, 12 = 12


# Colour is never the only difference

def palettes() -> list[dict[str, str]]:  # light, dark: role -> colour
    parts = [m.group(0) for m in re.finditer(r"\{ ?\s*--ink[^}]*", CSS)][:2]
    return [dict(re.findall(r"--(\w+):(?:var\([^,]+,)?(#[0-9a-f]{3,6})", part)) for part in parts]

def linear(colour: str) -> np.ndarray:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    v = np.array([int(digits[i:i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
SIGHTS = {  # what is left of linear RGB
    "usual": np.eye(3),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),  # Machado, Oliveira and Fernandes 2009
    "grey": np.tile(LUMINANCE, (3, 1)),
}
def contrast(a: str, b: str, sight: str = "usual") -> float:
    "The ratio of WCAG 2, as seen by somebody."
    low, high = sorted(float(LUMINANCE @ (SIGHTS[sight] @ linear(c)).clip(0, 1)) for c in (a, b))
    return (high + 0.05) / (low + 0.05)

def test_contrast_by_its_definition():
    assert contrast("#000", "#fff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)

@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("sight", SIGHTS)
def test_text_is_readable_for_all(theme, sight):
    palette = palettes()[theme]
    for role in ("ink", "dim", "blue", "verm", "green", "purple"): assert contrast(palette[role], palette["bg"], sight) >= 4.5, role
    for role in ("ink", "dim"): assert contrast(palette[role], palette["null"], sight) >= 4.5, role

def test_verdicts_and_commands_differ_without_colour():
    "Each pair of words has its own symbol or its own outline, each verdict its own kind of point, each command its own kind of line."
    def kind(words: str) -> tuple[str, ...]: return tuple(w for w in words.split() if w not in ("green", "verm", "blue", "dim", "purple", "thin", "ink"))
    for group in (("pass", "fail", "not enough evidence"), ("applied", "refused", "requested")):
        for a, b in combinations(group, 2): assert CHIP[a][0] != CHIP[b][0] and kind(CHIP[a][1]) != kind(CHIP[b][1]), (a, b)
    assert len({kind(v) for v in POINT.values()}) == len(POINT) and len({kind(v) for v in LINE.values()}) == len(LINE)

def test_bad_news_is_a_square_in_every_panel(panel):
    for mark in re.findall(r'<rect class="fill pt ([^"]*)"[^>]* rx="([\d.]+)"', "".join([*shown(panel), panel.picture()])):
        classes, rounding = mark[0].split(), float(mark[1])
        assert (rounding == 0) == ("verm" in classes), mark

def test_lines_of_runs_differ_without_colour():
    "Up to six runs are told apart by dashes or by lightness, and twelve by dashes and colour; each has its name at its end besides."
    assert len(set(STYLES)) == 12
    def dash(style: str) -> str: return " ".join(style.split()[1:])
    for palette in palettes():
        for a, b in combinations(STYLES[:6], 2):
            assert dash(a) != dash(b) or contrast(palette[a.split()[0]], palette[b.split()[0]], "grey") > 1.5, (a, b)
