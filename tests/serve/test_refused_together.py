"""Two ranks: what one of them cannot load, neither has afterwards; the server goes on with what it had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import ServeConfig
from tawin_nemo.rollout.lm import LM
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.jobs import Limits
from tawin_nemo.serve.engine.ranks import Leader, RanksLost
from tawin_nemo.serve.engine.replica import Replica
from tawin_nemo.serve.engine.telemetry import Metrics
from tawin_nemo.serve.engine.weight_sources import FromDisk
from tawin_nemo.util.errors import CatalogError, CheckpointError, TawinError
from tests.rollout.sequence_lm import TableLM
from tests.serve.scene import first_catalog, tokenizer
from tests.serve.two_ranks import following


@dataclass
class Pair:
    engine: Engine
    replicas: tuple[Replica, Replica]
    follower_ended: Callable[[], BaseException | None]

    def versions(self) -> list[list[int]]:
        return [sorted(replica.models) for replica in self.replicas]

    def catalogs(self) -> list[list[int]]:
        return [sorted(replica.tries) for replica in self.replicas]


def loads(broken_on: dict[str, Exception]) -> Callable[[str], LM]:
    def load(path: str) -> LM:
        if path in broken_on:
            raise broken_on[path]
        return TableLM(tokenizer().size, seed=len(path), impossible=False)

    return load


def checks(broken_on: dict[str, Exception]) -> Callable[[str], None]:
    """Sees what is wrong with a path beforehand where its name ends with "seen"."""

    def check(path: str) -> None:
        if path.endswith("seen") and path in broken_on:
            raise broken_on[path]

    return check


@contextmanager
def two_ranks(zero: dict[str, Exception], one: dict[str, Exception]) -> Iterator[Pair]:
    """An engine over two ranks; each maps the paths that it cannot load to its error."""
    replicas = (Replica(loads(zero), check=checks(zero)), Replica(loads(one), check=checks(one)))
    catalog = first_catalog()
    catalog.warm()
    for replica in replicas:
        replica.models[1] = replica.load("")
        replica.tries[1] = TokenTrie.from_paths(catalog.trie_paths)
    with following(replicas[1]) as (ranks, follower_ended):
        engine = Engine(
            Leader(replicas[0], ranks), catalog, limits=Limits.of(ServeConfig()), metrics=Metrics(), weights=1
        )
        engine.start()
        try:
            yield Pair(engine, replicas, follower_ended)
        finally:
            engine.stop()


UNUSABLE = CheckpointError("the weights are not finite")
ODD = TypeError("list indices must be integers or slices, not str")


@pytest.mark.parametrize(
    ("zero", "one"),
    [
        ({"bad": UNUSABLE}, {"bad": UNUSABLE}),
        ({"bad": UNUSABLE}, {}),
        ({}, {"bad": UNUSABLE}),
        ({"bad": ODD}, {"bad": ODD}),
        ({}, {"bad": ODD}),
        ({"bad": ODD}, {}),
    ],
    ids=["both", "rank 0", "rank 1", "both, of another kind", "rank 1, of another kind", "rank 0, of another kind"],
)
@pytest.mark.parametrize("path", ["bad", "bad, as can be seen"])
def test_weights_that_one_rank_cannot_load_change_nothing(
    zero: dict[str, Exception], one: dict[str, Exception], path: str
) -> None:
    zero, one = (dict.fromkeys([path] * len(broken), *broken.values()) for broken in (zero, one))
    with two_ranks(zero, one) as pair:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"not finite|list indices must be integers"):
                pair.engine.update_weights(FromDisk(path))
            assert pair.versions() == [[1], [1]]
            assert pair.engine.weights == 1
            pair.engine.probe().result(20)  # both ranks still answer
        assert pair.engine.update_weights(FromDisk("good")) == 2
        pair.engine.probe().result(20)
        assert pair.versions()[0][-1] == pair.versions()[1][-1] == 2
        assert not pair.engine.failed.done()
        assert pair.follower_ended() is None


def test_a_catalog_that_one_rank_cannot_build_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_ranks({}, {}) as pair:
        changed = pair.engine.catalog.changed([], [pair.engine.catalog.external_ids[3]], 2)

        def fails(*_: object, **__: object) -> TokenTrie:
            raise ValueError("this rank has no memory left")

        with monkeypatch.context() as patch:
            patch.setattr(TokenTrie, "from_paths", fails)
            with pytest.raises(CatalogError, match="no memory left"):
                pair.engine.activate(changed)
        assert pair.catalogs() == [[1], [1]]
        assert pair.engine.catalog.version == 1
        pair.engine.activate(changed)
        pair.engine.probe().result(20)
        assert pair.engine.catalog.version == 2
        assert pair.follower_ended() is None


def test_a_function_that_fails_between_two_calls_of_the_model_ends_nothing() -> None:
    with two_ranks({}, {}) as pair:
        with pytest.raises(ZeroDivisionError):
            pair.engine.call(lambda: 1 // 0).result(20)
        pair.engine.probe().result(20)


def test_a_rank_that_is_gone_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_ranks({}, {}) as pair:
        pair.engine.leader.ranks.wire.meet.abort()  # type: ignore[attr-defined]
        with pytest.raises(RanksLost):
            pair.engine.probe().result(20)
        assert isinstance(pair.engine.failed.exception(20), RanksLost)


def test_errors_of_weights_are_mistakes_that_are_answered(tmp_path: Path) -> None:
    """An update ends with a TawinError, which the control plane answers with 4xx."""
    with two_ranks({str(tmp_path): ODD}, {}) as pair, pytest.raises(TawinError):
        pair.engine.update_weights(FromDisk(str(tmp_path)))
