"""How many CPU threads a process takes."""

from __future__ import annotations

import pytest

from tawin_nemo.commands import session
from tawin_nemo.config.load import load_recipe


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
