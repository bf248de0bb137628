"""A finished stage as a scorer; checkpoints that are damaged or of another model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tawin_nemo.baselines.build import Blueprint, items_fingerprint
from tawin_nemo.baselines.load import (
    ModelAndOptimizer,
    find_problem,
    load_baseline,
    load_checkpoint,
    load_scorer,
    save_checkpoint,
)
from tawin_nemo.config.schema import BaselineConfig
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tawin_nemo.util.files import write_json
from tests.baselines.patterns import ITEMS, MODELS, PATHS, WINDOW, model_of

IDS = [f"B{item:03d}" for item in range(ITEMS)]


def fitting_of(name: str, seed: int) -> ModelAndOptimizer:
    """A model after one step, so that the optimizer has a state."""
    model = model_of(name, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.loss(torch.tensor([[1, 2]]), torch.tensor([3])).sum().backward()
    optimizer.step()
    return ModelAndOptimizer(model.eval(), optimizer)


def finished_stage(folder: Path, name: str, seed: int) -> ModelAndOptimizer:
    fitting = fitting_of(name, seed)
    config = BaselineConfig(model=name, hidden=16, layers=2, heads=2, dropout=0.0)
    paths = PATHS if name == "tiger" else None
    write_json(folder / "model.json", Blueprint(config, ITEMS, WINDOW, paths, items_fingerprint(IDS)).to_json())
    save_checkpoint(folder / "checkpoints" / "step_4", fitting, {"progress": {"step": 4}})
    save_checkpoint(folder / "checkpoints" / "step_8", fitting_of(name, seed + 1), {"progress": {"step": 8}})
    write_json(folder / "done.json", {"step": 8, "chosen_step": 4})
    return fitting


@pytest.mark.parametrize("name", MODELS)
def test_the_chosen_checkpoint_scores_as_it_did(name, tmp_path):
    trained = finished_stage(tmp_path, name, seed=5)
    trained.model.requires_grad_(False)  # torch takes other kernels for frozen weights
    history_BL = torch.tensor([[-1, 4, 2], [7, 8, 9]])
    loaded = load_baseline(tmp_path, external_ids=IDS)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded.scores(history_BL), trained.model.scores(history_BL))


def test_the_optimizer_comes_back(tmp_path):
    saved, other = fitting_of("sasrec", 1), fitting_of("sasrec", 2)
    save_checkpoint(tmp_path / "step_1", saved, {"progress": {"step": 1}})
    assert load_checkpoint(tmp_path / "step_1", other.model, other.optimizer) == {"progress": {"step": 1}}
    ours, theirs = (fitting.optimizer.state_dict()["state"] for fitting in (saved, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key]["exp_avg"], theirs[key]["exp_avg"]) for key in ours)


def test_unfinished_stages_and_other_catalogs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a finished baseline stage"):
        load_baseline(tmp_path)
    finished_stage(tmp_path, "gru4rec", seed=1)
    with pytest.raises(ConfigError, match="ranks 12 items, but the catalog has 13"):
        load_baseline(tmp_path, external_ids=[*IDS, "more"])


def test_a_catalog_of_as_many_other_items_is_refused(tmp_path):
    """One item left and another one came: every item number behind them means another item."""
    finished_stage(tmp_path, "gru4rec", seed=1)
    load_baseline(tmp_path, external_ids=IDS)
    with pytest.raises(ConfigError, match="as many items as the catalog has, but not the same ones"):
        load_baseline(tmp_path, external_ids=[*IDS[1:], "new"])


@pytest.mark.parametrize("name", ["weights.pt", "optimizer.pt"])
def test_damage_is_found(name, tmp_path):
    finished_stage(tmp_path, "gru4rec", seed=1)
    checkpoint = tmp_path / "checkpoints" / "step_4"
    assert find_problem(checkpoint) is None
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checksum of {name}"):
        load_baseline(tmp_path)
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_baseline(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    finished_stage(tmp_path, "gru4rec", seed=1)
    record = json.loads((tmp_path / "model.json").read_text())
    record["config"]["hidden"] = 8
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="another model"):
        load_baseline(tmp_path)


def test_a_scorer_takes_ragged_histories_and_reads_the_newest_items(tmp_path):
    trained = finished_stage(tmp_path, "gru4rec", seed=5).model
    scorer = load_scorer(tmp_path, IDS)
    histories = [np.array([3]), np.array([1, 2, 3, 4, 5, 6, 7])]
    scores_BI = scorer.scores(histories)
    assert scores_BI.dtype == torch.float32
    for row, history in enumerate([[3], [3, 4, 5, 6, 7]]):
        torch.testing.assert_close(scores_BI[row], trained.scores(torch.tensor([history]))[0].detach())


def test_scorers_that_cannot_be_had_name_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"rl\.reward_source=.*not a finished baseline"):
        load_scorer(tmp_path, IDS)
    finished_stage(tmp_path, "tiger", seed=1)
    with pytest.raises(ConfigError, match=r"rl\.reward_source=.*tiger"):
        load_scorer(tmp_path, IDS)
    with pytest.raises(ConfigError, match=r"rl\.reward_source=.*has 13"):
        load_scorer(tmp_path, [*IDS, "more"])
