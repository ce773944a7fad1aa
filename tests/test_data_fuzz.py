"""Files that chance made: only a DataError leaves, and no row is lost or counted twice."""
import csv
import gzip
import io
import json

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fine_tune_llm.core.errors import DataError
from fine_tune_llm.data.delimited import csv_parts
from fine_tune_llm.data.files import read_rows
from fine_tune_llm.data.jsonlines import line_parts

NAMES = ("x.csv", "x.tsv", "x.json", "x.jsonl", "x.txt", "x.parquet", "x.arrow", "x.csv.gz", "x.jsonl.zst", "x.zip", "x", "x.bin")
MAGIC = (b"", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[", b'"', b"a,b\n")
WORDS = st.text(st.sampled_from('ab é,;"\n\r\t|{}[]:\\\0\u2028' + "\U0001f600"), max_size=8)


@st.composite
def tables(draw):
    "A sound CSV, TSV or JSON Lines file as bytes, and its rows."
    n, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rows = [[draw(WORDS) or "x" for _ in range(width)] for _ in range(n)]
    if draw(st.booleans()):
        out = io.StringIO()
        csv.writer(out, draw(st.sampled_from(["excel", "excel-tab", "unix"]))).writerows([[f"c{i}" for i in range(width)], *rows])
        return out.getvalue().encode()
    return "".join(json.dumps({f"c{i}": v for i, v in enumerate(r)}, ensure_ascii=draw(st.booleans())) + "\n" for r in rows).encode()


@st.composite
def mutated(draw):
    "A sound file with up to four changes of a byte or a slice."
    raw = draw(tables())
    for _ in range(draw(st.integers(0, 4))):
        i, j = sorted((draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw)))))
        raw = raw[:i] + draw(st.sampled_from([b"", b'"', b"\n", b"\r", b",", b"\0", b"\xfc", b"{", b"}", b"]", b"1e999", b"\\ud800", raw[i:j] * 2])) + raw[draw(st.sampled_from([i, min(i + 1, len(raw)), j])):]
    return gzip.compress(raw)[:draw(st.sampled_from([None, None, -1, 12]))] if draw(st.integers(0, 7)) == 0 else raw


FILES = st.one_of(st.builds(lambda m, b: m + b, st.sampled_from(MAGIC), st.binary(max_size=200)), mutated(), mutated())


def only_data_errors(folder, raw, name):
    "Read under both policies: a DataError of one line, or rows that add up."
    path = folder / name
    path.write_bytes(raw)
    try: strict = read_rows(path)
    except DataError as e:
        strict = None
        assert "\n" not in str(e) and name in str(e)
    try: rows = read_rows(path, on_bad_row="quarantine")
    except DataError:
        assert strict is None
        return
    assert rows.read == len(rows) + len(rows.quarantine) and len(rows.places) == len(rows) > 0
    places = sorted([*rows.places.tolist(), *(b.place for b in rows.quarantine)])
    assert len(set(places)) == len(places) and places[0] >= 1  # no row twice
    if rows.unit == "row": assert places == list(range(1, len(places) + 1))  # none lost
    if strict is None: assert rows.quarantine
    else: assert not rows.quarantine and strict.table.equals(rows.table)
    if name in ("x.csv", "x.jsonl") and not raw.startswith(tuple(m for m in MAGIC if m and m[0] > 127 or m[:1] in (b"\x1f", b"P", b"A", b"("))): counted(raw, rows)


def counted(raw, rows):
    "Rows counted here without our parsers: lines that are not blank; in CSV without a quote, all but the header."
    if rows.unit == "line": assert rows.read == sum(1 for line in raw.splitlines() if line.strip(b" \t\r\n"))
    elif b'"' not in raw and raw.strip()[:1] not in (b"[", b"{"): assert rows.read == sum(1 for line in raw.splitlines() if line) - 1


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(raw=FILES, name=st.sampled_from(NAMES))
def test_only_data_errors(tmp_path_factory, raw, name):
    only_data_errors(tmp_path_factory.getbasetemp(), raw, name)


@pytest.mark.slow
@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=FILES, name=st.sampled_from(NAMES))
def test_only_data_errors_long(tmp_path_factory, raw, name):
    only_data_errors(tmp_path_factory.getbasetemp(), raw, name)


def outcome(parts):
    "Rows, places and bad rows of a parse, as plain values."
    parts = list(parts)
    rows = [list(r.items()) for p in parts for r in (p.table.to_pylist() if len(p.table) else [])]
    return [[(k, v) for k, v in r if v is not None] for r in rows], [n for p in parts for n in p.places.tolist()], [(b.place, b.line, b.reason) for p in parts for b in p.bad]


def attempt(parse, pieces):
    try: return outcome(parse(pieces, "x"))
    except DataError as e: return str(e)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(raw=mutated(), size=st.integers(1, 60))
def test_pieces_change_nothing(raw, size):
    "A file read in pieces of any size gives what it gives in one."
    pieces = [raw[i:i + size] for i in range(0, len(raw), size)]
    def commas(p, name): return csv_parts(p, name, ",")
    for parse in (commas, line_parts):
        whole, cut = attempt(parse, [raw]), attempt(parse, pieces)
        if not isinstance(whole, str) and parse is line_parts: whole, cut = [(len(r), p, b) for r, p, b in (whole, cut)]  # types may be learned later
        assert whole == cut


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(raw=mutated())
def test_fast_and_careful_parsers_agree(raw):
    "The fast CSV parser serves blocks over 2,000 bytes; rows that are padded to that length must read as those that are not."
    padding = b"".join(b"pad %d,x,y\n" % i for i in range(300))
    block = b"c0,c1,c2\n" + padding + raw
    whole, cut = attempt(lambda p, n: csv_parts(p, n, ","), [block]), attempt(lambda p, n: csv_parts(p, n, ","), [block[i:i + 1500] for i in range(0, len(block), 1500)])
    assert whole == cut


def test_sound_files_come_back_whole(tmp_path):
    "What the csv and json modules write is read back value by value, in blocks small and large."
    values = [f'row {i}, "q"\nnext; line\r\nend' if i % 3 else f"plain {i}" for i in range(3000)]
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as f: csv.writer(f).writerows([["text", "n"], *([v, str(i)] for i, v in enumerate(values))])
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": v, "n": i}) + "\n" for i, v in enumerate(values)))
    (tmp_path / "x.jsonl.zst").write_bytes(pa.compress((tmp_path / "x.jsonl").read_bytes(), codec="zstd", asbytes=True))
    (tmp_path / "x.json").write_text(json.dumps([{"text": v, "n": i} for i, v in enumerate(values)], indent=1))
    for name in ("x.csv", "x.jsonl", "x.jsonl.zst", "x.json"):
        frame = read_rows(tmp_path / name).frame
        assert frame["text"].tolist() == values and frame["n"].tolist() == ([str(i) for i in range(3000)] if name == "x.csv" else list(range(3000)))
