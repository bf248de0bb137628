from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import MANIFEST, load_dataset
from tawin_nemo.data_prep import synthetic
from tawin_nemo.data_prep.prepare import detect, main, prepare
from tawin_nemo.data_prep.raw import UNITS
from tawin_nemo.run.datasets import prepared_root
from tawin_nemo.util.errors import ConfigError, DataError

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
        "users.parquet",
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
    assert "--prepare.k_core 0 is out of range; it must be between 1 and 1000000000" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--prepare.max_title_words" in capsys.readouterr().out


def test_the_review_file_or_a_key_chooses_the_published_window_never_the_runs_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    synthetic.write_raw(tmp_path, 60, 120, 8.0, seed=1)
    reviews, items = tmp_path / "Toys_and_Games.json.gz", tmp_path / "meta_Toys_and_Games.json.gz"
    (tmp_path / synthetic.REVIEWS_FILE).rename(reviews)
    (tmp_path / synthetic.METADATA_FILE).rename(items)

    def window(name: str, **keys: str) -> str:
        options = PrepareConfig(**keys)
        out = prepare("auto", tmp_path, tmp_path / "out", prepare=options, data=DataConfig(), seed=0, name=name)
        steps = [step["name"] for step in load_dataset(out).manifest["steps"]]
        return next((step for step in steps if step.startswith("time window")), "")

    assert window("tawin_qwen7b") == "time window 2016-10..2018-11"
    assert "2016-10..2018-11: the published one of Toys_and_Games" in caplog.text
    assert window("synthetic_vs_industrial_and_scientific") == "time window 2016-10..2018-11"
    assert window("tawin_qwen7b", end="2018-01") == "time window 2016-10..2018-01"
    assert window("tawin_qwen7b", preset="industrial_and_scientific") == "time window 1996-10..2018-11"
    assert window("tawin_qwen7b", preset="none") == "time window the beginning..the end"


@pytest.mark.parametrize(("unit", "ticks"), UNITS.items())
def test_times_in_any_unit_give_the_same_data(tmp_path: Path, unit: str, ticks: int) -> None:
    seconds, scaled = (_log(tmp_path / name, factor) for name, factor in (("seconds", 1), (unit, ticks)))
    assert seconds.read_bytes() == scaled.read_bytes()


def test_mixed_units_and_impossible_years_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"times of mixed units: \d+ in seconds .* \d+ in milliseconds"):
        _log(tmp_path / "mixed", 1, lambda at, time: time * 1000 if at % 2 else time)
    with pytest.raises(DataError, match="not between 1990 and 2100"):
        _log(tmp_path / "years", 1, lambda at, time: at)


def test_a_few_impossible_years_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _log(tmp_path / "few", 1, lambda at, time: 0 if at == 7 else time)
    assert "1 of " in caplog.text
    assert "have a time that is not between 1990 and 2100 in any unit (such as 0)" in caplog.text


def _log(folder: Path, factor: int, change: Callable[[int, int], int] = lambda at, time: time) -> Path:
    """Train samples of one raw log whose times are multiplied by ``factor`` and passed through ``change``."""
    synthetic.write_raw(folder, 60, 120, 8.0, seed=1)
    path = folder / synthetic.REVIEWS_FILE
    lines = []
    for at, line in enumerate(gzip.decompress(path.read_bytes()).splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            review = json.loads(line)
            review["unixReviewTime"] = change(at, int(review["unixReviewTime"]) * factor)
            lines.append(json.dumps(review))
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    out = prepare("amazon", folder, folder / "out", prepare=PrepareConfig(), data=DataConfig(), seed=0, name="one")
    return out / "train.parquet"


def test_the_data_of_a_trained_run_are_not_prepared_again_with_other_parameters(tmp_path: Path) -> None:
    words = ["data.dataset=synthetic", "prepare.synthetic_items=60", "prepare.synthetic_users=120"]
    words.append(f"run_dir={tmp_path / 'run'}")
    root = prepared_root(load_recipe(None, words))
    before = content(root)
    other = load_recipe(None, [*words, "seed=2"])
    prepared_root(other)
    assert content(root) != before  # nothing was trained on them yet
    prepared_root(load_recipe(None, words))
    (tmp_path / "run" / "sft" / "checkpoints" / "step_3").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"step_3 was trained on, .* \(seed: 42 -> 2\)"):
        prepared_root(other)
    assert content(root) == before
    (root / "train.parquet").unlink()
    assert content(prepared_root(load_recipe(None, words))) == before


def test_a_folder_called_prepared_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a prepared data set"):
        prepared_root(load_recipe(None, ["data.dataset=prepared", f"data.root={tmp_path}"]))
