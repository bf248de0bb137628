"""What one process of each machine does for the others: four ranks on two machines, played by threads."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.interactions import SPLITS, load_dataset
from tawin_nemo.data.prompt_encoder import PromptEncoder
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run import node
from tawin_nemo.util.errors import CatalogError, TawinError

HOSTS = ["a", "a", "b", "b"]


class Special(CatalogError):
    """An error of a class that other ranks do not know by name."""


class Ranks:
    """Ranks with a barrier; ``runtime`` asks each thread who it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._me, self._values = threading.local(), [None] * len(HOSTS)
        self._barrier = threading.Barrier(len(HOSTS), timeout=30)
        monkeypatch.setattr(runtime, "world_rank", lambda: self._me.rank)
        monkeypatch.setattr(runtime, "world_size", lambda: len(HOSTS))
        monkeypatch.setattr(runtime, "gather_objects", self._gather)
        monkeypatch.setattr(runtime, "broadcast_object", lambda value: self._gather(value)[0])
        monkeypatch.setattr(node, "node_name", lambda: HOSTS[self._me.rank])

    def _gather(self, value: Any) -> list[Any]:
        self._values[self._me.rank] = value
        self._barrier.wait()
        values = [*self._values]
        self._barrier.wait()
        return values

    def run(self, compute: Callable[[], Any]) -> list[Any]:
        """What ``compute`` returns or raises on each rank."""
        results: list[Any] = [None] * len(HOSTS)

        def of(rank: int) -> None:
            self._me.rank = rank
            try:
                results[rank] = compute()
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=of, args=(rank,)) for rank in range(len(HOSTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def test_the_first_rank_of_each_machine_computes(ranks: Ranks) -> None:
    assert ranks.run(lambda: node.on_each_node(runtime.world_rank)) == [0, 0, 2, 2]


def test_an_error_of_one_machine_is_raised_on_all(ranks: Ranks) -> None:
    def fail() -> None:
        if runtime.world_rank() == 2:
            raise Special("set x=1")

    first, second, third, fourth = ranks.run(lambda: node.on_each_node(fail))
    assert type(third) is Special
    assert {type(error) for error in (first, second, fourth)} == {CatalogError}
    assert {str(error) for error in (first, second, third, fourth)} == {"set x=1"}
    assert isinstance(first, TawinError)


def test_one_process_of_a_machine_hashes_and_rank_0_converts(
    ranks: Ranks, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(small_dataset, tmp_path / "data", ignore=shutil.ignore_patterns("arrays")))
    opened: list[int] = []
    open_arrays = node.open_arrays
    monkeypatch.setattr(node, "open_arrays", lambda of: opened.append(runtime.world_rank()) or open_arrays(of))
    datasets, expected = ranks.run(lambda: node.open_dataset(root)), load_dataset(root)
    assert sorted(opened) == [0, 2]
    for dataset in datasets:
        for name in SPLITS:
            assert getattr(dataset, name).target_N.tolist() == getattr(expected, name).target_N.tolist()
            assert getattr(dataset, name).history.flat.tolist() == getattr(expected, name).history.flat.tolist()


def test_temporary_arrays_are_gone_when_all_have_opened_them(
    ranks: Ranks, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(small_dataset, tmp_path / "data", ignore=shutil.ignore_patterns("arrays")))
    (root / "arrays").write_text("a file in the way")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    datasets = ranks.run(lambda: node.open_dataset(root))
    assert [*(tmp_path / "scratch").iterdir()] == []
    assert {dataset.train.history.flat.tolist()[-1] for dataset in datasets} == {
        load_dataset(root).train.history.flat.tolist()[-1]
    }


def test_prompts_are_measured_once_a_machine(
    ranks: Ranks, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, data = load_dataset(small_dataset), DataConfig(bpe_vocab_size=320)
    titles = dataset.items.titles
    tokenizer = build_tokenizer(data, CatalogConfig(kind="title"), ModelConfig(), titles, None)
    splits = {name: getattr(dataset, name).slice(0, 20) for name in SPLITS}
    measured: list[int] = []
    index_prompts = node.index_prompts
    monkeypatch.setattr(
        node, "index_prompts", lambda *given: measured.append(runtime.world_rank()) or index_prompts(*given)
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def of_rank() -> Any:
        return node.open_samples(splits, PromptEncoder(titles, tokenizer, Template()), data)

    found = ranks.run(of_rank)
    assert sorted(measured) == [0, 0, 0, 2, 2, 2]
    assert [*tmp_path.iterdir()] == []
    for samples in found:
        assert samples["valid"].prompts.in_memory().flat.tolist() == found[0]["valid"].prompts.in_memory().flat.tolist()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    for samples in ranks.run(of_rank):  # without room for files every process has the numbers in its own memory
        assert samples["valid"].prompts.in_memory().flat.tolist() == found[0]["valid"].prompts.in_memory().flat.tolist()
