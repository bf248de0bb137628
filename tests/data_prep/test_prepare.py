from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import MANIFEST, load_dataset
from tawin_nemo.data_prep import synthetic
from tawin_nemo.data_prep.prepare import detect, main, prepare
from tawin_nemo.util.errors import DataError

SMALL = PrepareConfig(synthetic_items=60, synthetic_users=120, synthetic_reviews_per_user=8.0)


def run(out: Path, *, options: PrepareConfig = SMALL, max_history: int = 10, seed: int = 1) -> Path:
    return prepare("synthetic", Path(), out, prepare=options, data=DataConfig(max_history=max_history), seed=seed)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = content(run(tmp_path / "one")), content(run(tmp_path / "two"))
    assert one == two
    assert set(one) == {
        "manifest.json",
        "items.parquet",
        "train.parquet",
        "valid.parquet",
        "test.parquet",
        "statistics.md",
    }
    assert str(tmp_path).encode() not in one[MANIFEST]


def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Hash seeds and thread counts differ between processes; the result must not."""
    run(tmp_path / "here")
    flags = ["--prepare.synthetic_items=60", "--prepare.synthetic_users=120", "--seed=1"]
    command = [
        sys.executable,
        "-m",
        "tawin_nemo.data_prep.prepare",
        "--source=synthetic",
        f"--out={tmp_path / 'there'}",
        *flags,
    ]
    environment = os.environ | {"PYTHONHASHSEED": "7", "POLARS_MAX_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_a_finished_folder_is_reused_until_something_changes(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    synthetic.write_raw(raw, 60, 120, 8.0, seed=1)

    def born(max_history: int = 10) -> int:
        prepare("auto", raw, out, prepare=PrepareConfig(), data=DataConfig(max_history=max_history), seed=0)
        return (out / MANIFEST).stat().st_ino

    assert (first := born()) == born()
    assert (second := born(max_history=5)) != first
    synthetic.write_raw(raw, 60, 120, 8.0, seed=2)
    assert (third := born(max_history=5)) != second
    (out / "train.parquet").write_bytes(b"damaged")
    assert born(max_history=5) != third
    assert len(load_dataset(out).train) > 100


def test_a_failing_run_keeps_the_older_folder(tmp_path: Path) -> None:
    before = content(run(tmp_path / "out"))
    with pytest.raises(DataError, match="50-core"):
        run(tmp_path / "out", options=PrepareConfig(synthetic_items=60, synthetic_users=120, k_core=50))
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_detect(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json.*NAME\.train\.inter.*meta_NAME\.json.*business"):
        detect(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        detect(tmp_path / "absent")
    synthetic.write_raw(tmp_path, 60, 120, 8.0, seed=1)
    assert detect(tmp_path) == "amazon"
    assert detect(run(tmp_path / "out")) == "prepared"
    (tmp_path / "Other.json").write_text("{}")
    with pytest.raises(DataError, match=r"prepare\.reviews.*candidates: Other\.json, Synthetic\.json\.gz"):
        prepare("auto", tmp_path, tmp_path / "out", prepare=PrepareConfig(), data=DataConfig(), seed=0)
    missing = PrepareConfig(reviews="No.json")
    with pytest.raises(DataError, match=r"prepare\.reviews='No\.json'"):
        prepare("amazon", tmp_path, tmp_path / "out", prepare=missing, data=DataConfig(), seed=0)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "error: nothing known in" in capsys.readouterr().err
    out = tmp_path / "out"
    flags = ["--prepare.synthetic_items=60", "--prepare.synthetic_users=120", "--data.max_history=4"]
    assert main(["--source=synthetic", f"--out={out}", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert load_dataset(out).train.history.lengths.max() == 4
    assert main(["--source=synthetic", f"--out={out}", "--prepare.k_core=0"]) == 2
    assert "--prepare.k_core 0 is out of range; it must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--prepare.max_title_words" in capsys.readouterr().out


def test_raw_files_choose_the_published_window_when_the_name_does_not(tmp_path: Path) -> None:
    """A recipe is called tawin_qwen7b, its data Toys_and_Games; a name that says another data set wins."""
    synthetic.write_raw(tmp_path, 60, 120, 8.0, seed=1)
    reviews, items = tmp_path / "Toys_and_Games.json.gz", tmp_path / "meta_Toys_and_Games.json.gz"
    (tmp_path / synthetic.REVIEWS_FILE).rename(reviews)
    (tmp_path / synthetic.METADATA_FILE).rename(items)

    def window(name: str, end: str = "") -> str:
        options = PrepareConfig(end=end)
        out = prepare("auto", tmp_path, tmp_path / "out", prepare=options, data=DataConfig(), seed=0, name=name)
        steps = [step["name"] for step in load_dataset(out).manifest["steps"]]
        return next(step for step in steps if step.startswith("time window"))

    assert window("tawin_qwen7b") == "time window 2016-10..2018-11"
    assert window("my_industrial_and_scientific") == "time window 1996-10..2018-11"
    assert window("tawin_qwen7b", end="2018-01") == "time window 2016-10..2018-01"
