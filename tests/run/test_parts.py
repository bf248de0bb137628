"""Parts of an output: whole or not there, and never of two jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tawin_nemo.run.parts import Parts, divided
from tawin_nemo.util.errors import ConfigError


def parts(folder: Path) -> Parts:
    return Parts(folder, rows=7, part_rows=3, key="recommend.output")


def write(made: Parts, part: int) -> None:
    begin, end = made.bounds(part)
    made.write(part, pa.table({"row": list(range(begin, end))}), digest=f"rows {part}", more={"empty": 0})


def test_all_parts_make_a_manifest(tmp_path: Path):
    made = parts(tmp_path / "out")
    made.start({"recommend.n": 3})
    for part in range(3):
        assert made.complete() is None
        assert made.record(part) is None
        write(made, part)
        record = made.record(part)
        assert record is not None
        assert record["input"] == f"rows {part}"
    assert [record["rows"] for record in made.complete() or []] == [3, 3, 1]
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert [entry["file"] for entry in manifest["parts"]] == [f"part-{part:06d}.parquet" for part in range(3)]
    assert pq.read_table(tmp_path / "out")["row"].to_pylist() == list(range(7))


def test_a_damaged_part_is_made_again(tmp_path: Path):
    made = parts(tmp_path)
    for part in range(3):
        write(made, part)
    made.file(1).write_bytes(made.file(1).read_bytes()[:-1])
    made.file(2).unlink()
    (tmp_path / "_parts" / "part-000000.json").write_text("{")
    assert [made.record(part) for part in range(3)] == [None, None, None]


def test_a_part_that_was_not_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tawin_nemo.run.parts.sha256", full)
    with pytest.raises(OSError, match="No space left"):
        write(parts(tmp_path), 0)
    assert list(tmp_path.iterdir()) == []


def test_another_job_is_refused_with_the_keys_that_differ(tmp_path: Path):
    made = parts(tmp_path)
    made.start({"recommend.n": 3, "checkpoint": "a" * 64})
    made.start({"recommend.n": 3, "checkpoint": "a" * 64})
    with pytest.raises(ConfigError) as error:
        made.start({"recommend.n": 4, "checkpoint": "b" * 64})
    assert "checkpoint: aaaaaaaaaaaa.. -> bbbbbbbbbbbb..; recommend.n: 3 -> 4" in str(error.value)
    assert f"recommend.output={tmp_path} holds results of another job" in str(error.value)
    (tmp_path / "_job.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        made.check_job({})


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (10, 3), (2, 5), (100, 7)])
def test_shares_hold_every_part_once(tmp_path: Path, rows: int, count: int):
    made = Parts(tmp_path, rows=rows, part_rows=1, key="recommend.output")
    shares = [made.share(index, count) for index in range(count)]
    assert [part for share in shares for part in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    again = [divided(range(rows), index, count) for index in range(count)]
    assert again == [list(share) for share in shares]
