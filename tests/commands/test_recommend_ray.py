"""Parts of recommend in actors of Ray Data: the bytes of one process; a clear error without the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tawin_nemo.commands.recommend_ray import check_ray
from tawin_nemo.config.load import load_recipe
from tawin_nemo.util.errors import ConfigError
from tests.commands.test_recommend import files, histories, words  # noqa: F401
from tests.train.runs import called, run


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"recommend\.ray_actors needs Ray Data.*tawin-nemo\[ray\]"):
        check_ray()


def test_an_actor_is_one_process():
    with pytest.raises(ConfigError, match=r"recommend\.ray_actors=2: an actor is one process.*= 2; set both to 1"):
        load_recipe(None, ["recommend.ray_actors=2", "trainer.devices=2"])


@pytest.mark.full
def test_actors_go_on_where_one_process_stopped(finished_run: Path, histories: Path, tmp_path: Path):  # noqa: F811
    pytest.importorskip("ray", reason="the extra ray is not installed")
    more = f"recommend.histories={histories}", "recommend.part_rows=16"
    assert run(*words(finished_run, tmp_path / "whole", *more), verb="recommend")["parts"] == 5
    first = words(finished_run, tmp_path / "ray", *more)
    assert called(*first, "trainer.max_time=00:00:00:00", verb="recommend").returncode == 75
    ended = run(*first, "recommend.ray_actors=2", verb="recommend")
    assert (ended["parts_made"], ended["complete"]) == (4, True)
    assert files(tmp_path / "ray") == files(tmp_path / "whole")
