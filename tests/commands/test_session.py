"""How many CPU threads a process takes, and that all ranks run the same code."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tawin_nemo.commands import session
from tawin_nemo.config.load import load_recipe
from tawin_nemo.util.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.backbone=tiny"], 1),
        (["model.backbone=small-1m"], 8),
        (["model.backbone=qwen2.5-0.5b"], 8),
        (["model.backbone=tiny", "trainer.threads=3"], 3),
        (["model.backbone=tiny", "baseline.model=sasrec"], 8),  # its layers have a width of their own
    ],
)
def test_small_models_take_one_thread_others_their_share_of_the_cores(
    words: list[str], expected: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "available_threads", lambda: 8)
    recipe = load_recipe(None, words)
    assert session.chosen_threads(recipe) == session.chosen_threads(recipe) == expected
    assert ("CPU threads per process" in caplog.text) == (not recipe.trainer.threads)


def test_ranks_that_have_read_different_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(load_recipe(None, ["rl.reward=my:reward"]), code={"rl.reward=my:reward": "aaaa"})
    session.check_same_code(recipe)
    monkeypatch.setattr(session.runtime, "gather_objects", lambda code: [code, {"rl.reward=my:reward": "bbbb"}])
    with pytest.raises(
        ConfigError, match=r"rl\.reward=my:reward: the ranks have read different sources \(aaaa, bbbb\)"
    ):
        session.check_same_code(recipe)
    session.check_same_code(load_recipe(None, []))
