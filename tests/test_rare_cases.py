"""What few callers meet: a shift sample beside a second file, the same line number in two files, no rows at all, an event after the last, a word where a list is meant."""
import json
import threading
from xml.etree import ElementTree

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fine_tune_llm.core.alerts import check_alerts, low_coverage
from fine_tune_llm.core.errors import ConfigurationError, DataError, RunError
from fine_tune_llm.core.events import follow_events, summarize_runs
from fine_tune_llm.core.labels import Labels, load_labels
from fine_tune_llm.core.runs import Run, status
from fine_tune_llm.data.loading import load_data
from fine_tune_llm.data.report import check_data
from fine_tune_llm.data.splits import Split, row_id
from fine_tune_llm.data.steps import recipe
from fine_tune_llm.data.transforms import transform
from fine_tune_llm.data.truth import data_truth

DAYS = [{"text": f"message {i} of day {i}", "label": "ab"[i % 2], "day": i} for i in range(200)]
LATE = [{"text": f"another {i}", "label": "ab"[i % 2], "day": 500 + i} for i in range(20)]


def test_a_second_file_for_test_leaves_the_shift_sample():
    "Shares are of the first file: with test given, its share is 0 and the last fifth of the days is the shift sample."
    data = load_data(DAYS, time="day", sizes=(.5, .1, .1, .1, .2), test=LATE)
    assert data.test.texts == [r["text"] for r in LATE] and data.shift is not None
    latest = {r["text"] for r in DAYS[-len(data.shift):]}
    assert set(data.shift.texts) == latest and abs(len(latest) - 200 * .2 / .9) < 2
    with pytest.raises(ConfigurationError, match="a fifth share"): load_data(DAYS, sizes=(.5, .1, .1, .1, .2), test=LATE)


def test_the_shift_sample_is_saved_and_kept_out_of_train(tmp_path):
    rows = [{"text": f"{part} {i}", "label": "ab"[i % 2], "part": part} for part in ("train", "validation", "calibration", "test", "shift") for i in range(6)]
    rows += [{"text": "where is <b>it</b>", "label": "a", "part": "train"}, {"text": "Where is it", "label": "a", "part": "shift"}]
    data = load_data(rows, split="part")
    done = transform(data, recipe("strip_html"))
    assert done.counts == {"kept": 6, "shift": 1} and len(done.data.train) == 6
    done.save(tmp_path / "made")
    saved = [json.loads(line) for line in (tmp_path / "made" / "rows.jsonl").read_text().splitlines()]
    assert [r["split"] for r in saved].count("shift") == 7 and len(saved) == sum(map(len, done.data.parts))
    again = load_data(tmp_path / "made" / "rows.jsonl", split="split")
    assert again.shift is not None and sorted(again.shift.texts) == sorted(data.shift.texts)


def words(*known):
    "One token a word."
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "</s>", *known])}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def test_the_same_line_of_two_files(tmp_path):
    "Line 2 is bad in both: two rows in quarantine, and no row is shown in place of another."
    for name in "ab":
        rows = [{"prompt": "ask ", "completion": f"{name}1"}, {"prompt": "ask ", "completion": ""}, {"prompt": "ask ", "completion": f"{name}3"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    truth = data_truth(tmp_path, words("ask", "a1", "a3", "b1", "b3"), "completion", on_bad_row="quarantine")
    assert truth.summary["rows"] == 6 and truth.summary["kept"] == 4 and truth.summary["quarantined"] == 2
    assert sorted(truth.quarantine) == ["a.jsonl line 2", "b.jsonl line 2"]
    assert [truth.row(3, file).tokens[1] for file in ("a.jsonl", "b.jsonl")] == ["a3", "b3"]
    assert "a.jsonl line 3" in truth.row(3).title and "b.jsonl line 3" in truth.row(3).notes[-1] and not truth.row(3, "b.jsonl").notes
    with pytest.raises(DataError, match="could not be rendered: 'completion' is missing"): truth.row(2, "b.jsonl")
    with pytest.raises(DataError, match=r"no line 9"): truth.row(9)
    with pytest.raises(DataError, match=r"no line 3"): truth.row(3, "c.jsonl")
    assert truth._repr_html_().count("<figure>") >= 2


def test_a_report_of_no_rows_is_a_page():
    report = check_data(Split("train", [], np.array([]), np.array([], int), Labels(("a", "b"))))
    assert report.stops and "There are no rows." in report._repr_html_() and "There are no rows." in repr(report)
    ElementTree.fromstring(f"<x>{report._repr_html_()}</x>")


def test_a_failed_run_says_why_whatever_came_after():
    start = {"event": "run_started", "time": 0.0}
    failed = [start, {"event": "run_failed", "time": 1.0, "error": "out of memory"}, {"event": "warning", "time": 2.0}]
    assert status(failed).error == "out of memory" and status([*failed, start]).error == ""


def test_a_listener_ahead_of_its_run_waits(tmp_path):
    run = Run.create(tmp_path / "run")
    run.log("run_started")
    looked = threading.Event()
    def later():
        looked.wait(10)
        run.log("step", step=1)
        run.log("run_finished", step=1)
    thread = threading.Thread(target=later)
    thread.start()
    def ended():  # asked before each look: the second time, one look found less than was left out
        if asked: looked.set()
        asked.append(1)
        return False
    asked: list[int] = []
    assert [e["event"] for e in follow_events(run, start=2, pause=0.001, ended=ended)] == ["run_finished"]
    thread.join()


@pytest.mark.parametrize("text, told", [
    ("names: refund", "no list of names"), ("names:", "no list of names"), ("names: {a: 1}", "no list of names"), ("names: [a, [b]]", "no list of names"),
    ("names: [a, b]\nharm: [a]", "harm: "), ("names: [a, b]\nharm: {a: high}", "harm: "), ("names: [a, b]\nharm: {a: -1}", "0 or more"),
    ("names: [a, b]\nharm: {a: .nan}", "harm: "), ("names: [a, b]\nharm: {a: nan}", "0 or more"), ("names: [a, b]\nharm: {c: 2}", "no label 'c'"),
    ("names: [a, b]\ncritical: 5", "critical: "), ("names: [a, b]\ncritical: [{class: a, answer: b, cost: inf}]", "0 or more"),
    ("names: [a, b]\ncritical: [{class: [a], answer: b, cost: 1}]", "critical: "), ("names: [a, b]\ndescription: [x]", "description: "),
    (b"\xff\xfe\x00", "cannot read labels"), ("names: [a, a]", "distinct"), ("[" * 5000, "cannot read labels"), ("names: !!python/object:os.system [a]", "two distinct")])
def test_a_labels_file_that_is_wrong_says_where(tmp_path, text, told):
    (tmp_path / "labels.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError) as e: load_labels(tmp_path / "labels.yaml")
    assert told in str(e.value) and "labels.yaml" in str(e.value)


def test_names_of_classes_are_taken_as_they_are_written(tmp_path):
    "YAML reads no as a truth value, 010 as eight and 1e3 as a number; as names of classes they are none of these."
    (tmp_path / "labels.yaml").write_text("names: [yes, no, 010, 1e3, null]\nharm: {no: 2, 010: 3}\ncritical: ~\n", encoding="utf-8-sig")
    labels = load_labels(tmp_path / "labels.yaml")
    assert labels.names == ("yes", "no", "010", "1e3", "null") and labels.harm == (("no", 2.0), ("010", 3.0)) and labels.critical == ()


@pytest.mark.parametrize("line", ["5", "null", "[]", "{}", '{"time": 1}'])
def test_a_line_that_is_no_event_names_its_line(tmp_path, line):
    for name in ("events.jsonl", "control.jsonl"):
        run = Run.create(tmp_path / name)
        with open(run.path / name, "a") as f: f.write(line + "\n")
        with pytest.raises(RunError, match=f"{name}, line 1"): run.status  # noqa: B018


def test_alerts_pass_over_what_is_no_number(tmp_path):
    run = Run.create(tmp_path / "run")
    run.log("run_started")
    run.log("evaluated", coverage=.5, promised=.9, n=100)
    for values in ({"coverage": float("nan"), "promised": .9, "n": 100}, {"coverage": .5, "promised": None, "n": 100}): run.log("evaluated", **values)
    assert [a.rule for a in check_alerts(run, [low_coverage])] == ["low_coverage"]


def test_one_run_is_a_table_of_one_row(tmp_path):
    run = Run.create(tmp_path / "only")
    assert summarize_runs(run)["run"].tolist() == ["only"] == summarize_runs([run])["run"].tolist()


@pytest.mark.parametrize("step", [("nfc",), 3, ("mask_pii", ["email"]), {"nfc": {}}, (), None, ("nfc", {}, 1), (3, {})])
def test_what_is_no_step_is_refused(step):
    with pytest.raises(ConfigurationError, match="is no step"): recipe("nfc", step)


@pytest.mark.parametrize("name", ["drop_words", "swap_letters"])
@pytest.mark.parametrize("share", [7, -1, float("nan"), "much"])
def test_a_share_is_from_0_to_1(name, share):
    with pytest.raises(ConfigurationError, match="does not take"): recipe((name, {"share": share}))


def test_a_name_where_a_list_of_names_is_meant():
    rows = [{"text": f"message {i}", "label": "ab"[i % 2]} for i in range(60)]
    with pytest.raises(ConfigurationError, match=r"groups must be a list of columns.*groups=\['label'\]"): load_data(rows, groups="label")
    with pytest.raises(ConfigurationError, match="labels must be a list of names"): load_data(rows, labels="ab")
    with pytest.raises(ConfigurationError, match="examples=-1"): check_data(rows, examples=-1)


def test_a_ledger_with_an_unknown_split():
    rows = [{"text": f"message {i}", "label": "ab"[i % 2]} for i in range(60)]
    with pytest.raises(DataError, match="'nowhere' is no split"): load_data(rows, ledger={row_id(rows[3]["text"]): "nowhere"})


@pytest.mark.parametrize("weight", ["high", None, -1, float("nan"), float("inf")])
def test_a_weight_is_a_number(weight):
    with pytest.raises(ConfigurationError, match="the weight of a is"): Labels(("a", "b"), harm=(("a", weight),))
    assert Labels(("a", "b"), harm=(("a", np.float32(2)), ("b", np.int64(0)))).harm[1] == ("b", 0)
