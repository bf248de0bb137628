from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl
import pytest

from tawin_nemo.data_prep import files, ndjson
from tawin_nemo.data_prep.files import BOM
from tawin_nemo.data_prep.ndjson import Field, Problems, read_frames
from tawin_nemo.util.errors import DataError

FIELDS = [Field("user", "id"), Field("time", "int"), Field("title", "text")]
GOOD = b'{"user": "u1", "time": 3, "title": "t", "other": [1, {"deep": 2}]}'


def read(path: Path) -> tuple[list[dict], Problems]:
    problems = Problems(path)
    return pl.concat(read_frames(path, FIELDS, problems)).to_dicts(), problems


#: A line and what it gives: a (user, time, title) or the reason against it.
LINES: list[tuple[bytes, tuple | str]] = [
    (GOOD, ("u1", 3, "t")),
    (b'{"user": "u2", "time": 4}', ("u2", 4, None)),
    (b'{"user": 77, "time": 4, "title": null}', ("77", 4, None)),
    (b'{"user": 77.0, "time": 4}', ("77", 4, None)),
    (b'{"user": "5.5", "time": 4, "title": ["a", "b"]}', ("5.5", 4, '["a", "b"]')),
    (b'{"user": "true", "time": 4}', ("true", 4, None)),
    (b"{'user': 'u3', 'time': 4, 'title': ['a', None]}", ("u3", 4, '["a", null]')),
    (b"{u'user': u'u3', 'time': 4}", ("u3", 4, None)),
    (b'{"user": "u4", "time": 4, "title": "half \\ud83d"}', ("u4", 4, "half \ufffd")),
    (b'{"user": "u4", "time": 4, "title": "other half \\uDE00 end"}', ("u4", 4, "other half \ufffd end")),
    (b'{"user": "u4", "time": 4, "title": "\\ude00\\ud83d"}', ("u4", 4, "\ufffd\ufffd")),
    (b'{"user": "u4", "time": 4, "title": "whole \\ud83d\\ude00"}', ("u4", 4, "whole \U0001f600")),
    (b'{"user": "u4", "time": 4, "title": "\\\\ud83d"}', ("u4", 4, "\\ud83d")),
    (b'{"user": "u4", "time": 4, "title": "\\\\ud83d\\ude00"}', ("u4", 4, "\\ud83d\ufffd")),
    (b'{"user": "u4", "time": 4, "title": ["\\ud83d"]}', ("u4", 4, '["\ufffd"]')),
    (b'{"user": "u4\\ud83d", "time": 4}', "field user is not Unicode text"),
    (b"{'user': open('x'), 'time': 4}", "not valid JSON"),
    (b"{broken", "not valid JSON"),
    (GOOD + GOOD, "not valid JSON"),
    (b'{"user": "u1", "time": NaN}', "not valid JSON"),
    (b'\xff\xfe{"user": "u1", "time": 3}', "not valid JSON"),
    (b"[1, 2]", "not a JSON object"),
    (b"null", "not a JSON object"),
    (b'{"time": 3}', "missing field user"),
    (b'{"user": "", "time": 3}', "missing field user"),
    (b'{"user": "u1", "time": null}', "missing field time"),
    (b'{"user": "u1"}', "missing field time"),
    (b'{"user": "u1", "time": "3"}', "wrong type of field time"),
    (b'{"user": "u1", "time": 3.5}', "wrong type of field time"),
    (b'{"user": "u1", "time": true}', "wrong type of field time"),
    (b'{"user": "u1", "time": 99999999999999999999}', "wrong type of field time"),
    (b'{"user": true, "time": 3}', "wrong type of field user"),
    (b'{"user": 5.5, "time": 3}', "wrong type of field user"),
    (b'{"user": ["u1"], "time": 3}', "wrong type of field user"),
    (b'{"user": {"a": 1}, "time": 3}', "wrong type of field user"),
]


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_every_line_alone(tmp_path: Path, line: bytes, expected: tuple | str) -> None:
    """Alone in its chunk, the fast path must come to the same verdict as the slow one."""
    path = tmp_path / "x.json"
    path.write_bytes(line + b"\n")
    rows, problems = read(path)
    if isinstance(expected, str):
        assert rows == []
        assert problems.counts == {expected: 1}
        assert problems.examples == {expected: [1]}
    else:
        assert rows == [dict(zip(("user", "time", "title", "line"), (*expected, 1), strict=True))]
        assert problems.total == 0


@pytest.mark.parametrize("chunk", [40, 200, 1 << 20])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_all_lines_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, suffix: str) -> None:
    """Line numbers and counts do not depend on chunk borders, blank lines, the last newline or compression."""
    monkeypatch.setattr(files, "CHUNK_BYTES", max(chunk, 2 * len(GOOD)))
    lines = [line for line, _ in LINES for _ in range(3)]
    lines.insert(5, b"")
    text = b"\n".join(lines)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    rows, problems = read(path)
    verdicts = [verdict for _, verdict in LINES for _ in range(3)]
    verdicts.insert(5, "blank")
    expected_lines = [number for number, verdict in enumerate(verdicts, 1) if not isinstance(verdict, str)]
    assert [row["line"] for row in rows] == expected_lines
    reasons = sorted({verdict for verdict in verdicts if isinstance(verdict, str)} - {"blank"})
    assert problems.counts == {reason: verdicts.count(reason) for reason in reasons}
    for reason in reasons:
        places = [number for number, verdict in enumerate(verdicts, 1) if verdict == reason]
        assert problems.examples[reason] == places[: ndjson.EXAMPLES]
    assert problems.lines == len(verdicts)


def test_damaged_gzip_and_giant_line_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(b"\n".join([GOOD] * 500))[:-20])
    with pytest.raises(DataError, match=r"cut\.json\.gz: gzip stream damaged"):
        read(cut)
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)
    array = tmp_path / "array.json"
    array.write_text(json.dumps([{"user": "u", "time": 1}] * 50))
    with pytest.raises(DataError, match="one object per line"):
        read(array)
    endless = tmp_path / "endless.json"
    endless.write_bytes(GOOD * 50)
    with pytest.raises(DataError, match="a line of more than 64 bytes"):
        read(endless)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "absent.json")


def test_the_first_bytes_tell_gzip_not_the_name(tmp_path: Path) -> None:
    """Plain text named .gz, gzip without it, and a byte order mark are read."""
    for name, content in (("plain.json.gz", GOOD), ("zipped.json", gzip.compress(GOOD)), ("mark.json", BOM + GOOD)):
        (tmp_path / name).write_bytes(content)
        rows, problems = read(tmp_path / name)
        assert [row["user"] for row in rows] == ["u1"]
        assert problems.total == 0


@pytest.mark.parametrize("other", [GOOD, b"{broken", b"[1, 2]"])
def test_half_a_surrogate_pair_is_read_by_one_rule(tmp_path: Path, other: bytes) -> None:
    """The fast and the slow reader give the same: the text with U+FFFD, whatever else is in the chunk."""
    path = tmp_path / "x.json"
    path.write_bytes(b'{"user": "u4", "time": 4, "title": "half \\ud83d"}\n' + other + b"\n")
    rows, _ = read(path)
    assert rows[0]["title"] == "half \ufffd"
    assert json.dumps(rows[0]).isascii()
    rows[0]["title"].encode("utf-8")
