"""The loop of the classic recommenders: ranks and tables, early stopping, resume, refusals, recipes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from tawin_nemo.baselines import train
from tawin_nemo.baselines.evaluate import evaluate_baseline, target_rank
from tawin_nemo.baselines.load import load_baseline
from tawin_nemo.baselines.protocol import SequentialRecommender, left_padded
from tawin_nemo.baselines.train import run_baseline
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import (
    BaselineConfig,
    CatalogConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    Recipe,
    TrainerConfig,
)
from tawin_nemo.data.samples import Samples
from tawin_nemo.data_prep.pipeline import sliding_windows
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError, DataError, Preempted, TawinError
from tests.baselines.patterns import ITEMS, MODELS, PATHS, WINDOW, histories, successors
from tests.train.runs import run

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "baselines").glob("*.yaml"))


def samples_of(rows: int, *, seed: int) -> Samples:
    history = histories(rows, seed=seed)
    return Samples(history, successors(history), np.arange(rows) // 2, history)


@pytest.fixture
def world(tmp_path):
    runtime.initialize(ModelConfig(), seed=0)
    titles = [str(item) for item in range(ITEMS)]
    return SimpleNamespace(
        recipe=Recipe(
            seed=3,
            data=DataConfig(max_history=WINDOW),
            catalog=CatalogConfig(kind="sid", index="codes.json"),
            trainer=TrainerConfig(save_interval=3),
            eval=EvalConfig(beams=8, ks=[1, 5]),
        ),
        run_dir=tmp_path / "run",
        deadline=None,
        catalog=Catalog(titles, titles, "sid", PATHS, TokenTrie.from_paths(PATHS)),
        dataset=SimpleNamespace(
            items=SimpleNamespace(external_ids=titles), user_ids=lambda user_N: [f"u{user}" for user in user_N]
        ),
        samples={"train": samples_of(300, seed=1), "valid": samples_of(40, seed=2), "test": samples_of(41, seed=3)},
    )


def with_baseline(world: SimpleNamespace, **options) -> SimpleNamespace:
    settings = {"hidden": 16, "batch_size": 50, "epochs": 12, "patience": 3, "lr": 1e-2, "dropout": 0.1, **options}
    return SimpleNamespace(**{**vars(world), "recipe": replace(world.recipe, baseline=BaselineConfig(**settings))})


# -- ranks and tables ----------------------------------------------------------------------------------------------
def test_rank_is_the_place_in_a_stable_sort():
    draw = torch.Generator().manual_seed(4)
    scores_BI = torch.randint(0, 4, (200, 9), generator=draw).float()
    scores_BI[torch.rand(200, 9, generator=draw) < 0.2] = float("-inf")
    target_B = torch.randint(0, 9, (200,), generator=draw)
    rank_B = target_rank(scores_BI, target_B)
    for scores_I, target, rank in zip(scores_BI, target_B.tolist(), rank_B.tolist(), strict=True):
        order = sorted(range(9), key=lambda item: (-scores_I[item], item))
        assert rank == (-1 if scores_I[target] == float("-inf") else order.index(target))


class Fixed(SequentialRecommender):
    """Gives every history the same scores; items 1 and 3 cannot be told apart."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__(len(scores))
        self.representative_I = torch.tensor([0, 1, 2, 1])
        self.fixed_I = torch.tensor(scores)

    def scores(self, history_BL, width=None):
        return self.fixed_I.expand(len(history_BL), -1).clone()

    def loss(self, history_BL, target_B, negatives_BN=None):
        raise NotImplementedError


def four_items() -> tuple[Catalog, Samples]:
    """A catalog in which items 1 and 3 share their path, and four rows."""
    paths = TokenRows.from_lists([[2, 1], [3, 4, 1], [3, 5, 1], [3, 4, 1]])
    titles = ["a", "b", "c", "d"]
    history = TokenRows.from_lists([[0], [1, 2], [0], [3]])
    samples = Samples(history, np.array([3, 0, 2, 1]), np.array([7, 7, 8, 9]), history)
    return Catalog(titles, titles, "sid", paths, TokenTrie.from_paths(paths)), samples


def test_the_table_of_a_model_with_shared_places():
    catalog, samples = four_items()
    model = Fixed([0.0, 2.0, float("-inf"), 2.0])
    popularity_I = np.array([1, 1, 8, 8])
    cfg = EvalConfig(beams=4, ks=[1, 2])
    result = evaluate_baseline(model, samples, catalog, cfg, label="test", popularity_I=popularity_I)
    table = result.per_user
    assert table["rank"].to_list() == [0, 1, -1, 0]
    assert table["sharing"].to_list() == [2, 1, 1, 2]
    assert table["candidates"].to_list() == [2, 2, 2, 2]
    assert table["recall@1"].to_list() == [0.5, 0.0, 0.0, 0.5]
    assert table["recall@2"].to_list() == [0.5, 1.0, 0.0, 0.5]
    assert table["ndcg@2"].to_list() == pytest.approx([0.5, 1 / np.log2(3), 0.0, 0.5])
    assert result.means["recall@1"] == pytest.approx(0.25)
    assert (result.collisions, result.coverage, result.rows) == (2, pytest.approx(2 / 3), 4)
    assert result.beyond["coverage@1"] == pytest.approx(2 / 4)
    # the list is the shared path, log-popularity (ln(9) + ln(2)) / 2, over histories of ln(2), that, ln(2) and ln(9)
    assert result.beyond["popularity_bias@1"] == pytest.approx((np.log(9) - np.log(2)) / 2 / 4)
    optimistic = EvalConfig(beams=4, ks=[1, 2], collision="optimistic")
    assert evaluate_baseline(model, samples, catalog, optimistic, label="test").means["recall@1"] == pytest.approx(0.5)


def test_scores_that_are_not_numbers_are_an_error():
    catalog, samples = four_items()
    with pytest.raises(TawinError, match="scores are not numbers"):
        evaluate_baseline(Fixed([0.0, float("nan"), 1.0, 1.0]), samples, catalog, EvalConfig(ks=[1]), label="test")


def test_no_rows_are_an_error():
    catalog, samples = four_items()
    with pytest.raises(DataError, match="no rows"):
        evaluate_baseline(Fixed([0.0] * 4), samples.take(np.arange(0)), catalog, EvalConfig(ks=[1]), label="test")


# -- the loop -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "loss"),
    [
        *((name, "softmax") for name in MODELS),
        ("sasrec", "bce"),
        ("caser", "bce"),
        pytest.param("tiger", "trie", marks=pytest.mark.full),
    ],
)
def test_each_learns_and_leaves_the_files_of_a_stage(world, model, loss):
    options = {"dropout": 0.0, "epochs": 30, "patience": 10} if model == "tiger" else {}
    world = with_baseline(world, model=model, loss=loss, negatives=4 if loss == "bce" else 1, **options)
    result = run_baseline(world)
    assert result.means["recall@1"] > 0.8
    folder = world.run_dir / model
    for split, rows in (("valid", 40), ("test", 41)):
        assert EvalResult.read(folder / "eval", split).rows == rows
    assert EvalResult.read(folder / "eval", "test").means == result.means
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checks = {line["step"]: line["valid/ndcg@5"] for line in lines if "valid/ndcg@5" in line}
    done = json.loads((folder / "done.json").read_text())
    assert checks[done["chosen_step"]] == max(checks.values())
    assert list(checks) == [6 * (epoch + 1) for epoch in range(len(checks))]
    scorer = load_baseline(folder, external_ids=world.catalog.external_ids)
    scores_BI = scorer.scores(left_padded(world.samples["test"].history))
    hits = (scores_BI.argmax(dim=1).numpy() == world.samples["test"].target_N).mean()
    assert hits == pytest.approx(result.means["recall@1"])


def test_training_stops_after_patience_epochs_without_progress(world, monkeypatch):
    values = iter([0.1, 0.3, 0.3, 0.2, 0.25, 0.9, 0.9])
    monkeypatch.setattr(train, "valid_metrics", lambda *_: {"ndcg@5": next(values)})
    run_baseline(with_baseline(world, model="gru4rec"))
    done = json.loads((world.run_dir / "gru4rec" / "done.json").read_text())
    assert done == {"step": 30, "chosen_step": 12}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("gru4rec", {"loss": "softmax"}),
        ("sasrec", {"loss": "bce"}),
        ("sasrec", {"loss": "softmax", "training": "sequences"}),
        ("hstu", {"loss": "sampled_softmax", "negatives": 3, "temperature": 0.1, "training": "sequences"}),
        (
            "esasrec",
            {"loss": "sampled_softmax", "negatives": 3, "negatives_from": "popularity", "logq_correction": True},
        ),
        ("tiger", {"loss": "softmax"}),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(world, monkeypatch, tmp_path, model, options):
    world = with_baseline(world, model=model, epochs=2, **options)
    whole = run_baseline(SimpleNamespace(**{**vars(world), "run_dir": tmp_path / "whole"}))
    fit = train.train_step
    for stops in (2, 3, 4):  # counted from where the attempt before left off: steps 2, 3 (saved), 4 .. of 12
        left = iter(range(stops))

        def dying(*arguments, left=left, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return fit(*arguments, **options)

        monkeypatch.setattr(train, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run_baseline(world)
    monkeypatch.setattr(train, "train_step", fit)
    resumed = run_baseline(world)
    assert resumed.per_user.equals(whole.per_user)
    ours, theirs = (folder / model for folder in (world.run_dir, tmp_path / "whole"))
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    assert load_baseline(ours).state_dict().keys() == load_baseline(theirs).state_dict().keys()
    weights = zip(load_baseline(ours).parameters(), load_baseline(theirs).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_damaged_newest_checkpoint_is_passed_over(world, monkeypatch):
    world = with_baseline(world, model="gru4rec", epochs=2)
    expected = run_baseline(SimpleNamespace(**{**vars(world), "run_dir": world.run_dir / "whole"}))
    run_baseline(with_baseline(world, model="gru4rec", epochs=1))
    folder = world.run_dir / "gru4rec"
    (folder / "done.json").unlink()
    (folder / "checkpoints" / "step_6" / "weights.pt").write_bytes(b"")
    for file in (folder / "eval").iterdir():
        file.unlink()
    assert run_baseline(world).per_user.equals(expected.per_user)


def test_a_finished_stage_is_only_read(world, monkeypatch):
    world = with_baseline(world, model="gru4rec", epochs=1)
    first = run_baseline(world)
    monkeypatch.setattr(train, "build_recommender", None)
    assert run_baseline(world).per_user.equals(first.per_user)


def test_another_seed_gives_another_model(world, tmp_path):
    world = with_baseline(world, model="gru4rec", epochs=1)
    other = replace(world.recipe, seed=4)
    first = run_baseline(world)
    second = run_baseline(SimpleNamespace(**{**vars(world), "recipe": other, "run_dir": tmp_path / "other"}))
    assert not first.per_user["rank"].equals(second.per_user["rank"])


def test_out_of_time_saves_and_continues(world):
    world = with_baseline(world, model="gru4rec", epochs=1)
    with pytest.raises(Preempted):
        run_baseline(SimpleNamespace(**{**vars(world), "deadline": 0.0}))
    assert [path.name for path in (world.run_dir / "gru4rec" / "checkpoints").iterdir()] == ["step_1"]
    assert run_baseline(world).rows == 41


def test_a_split_that_is_not_wanted_is_not_evaluated(world):
    world = with_baseline(world, model="gru4rec", epochs=1)
    world.recipe = replace(world.recipe, eval=replace(world.recipe.eval, splits=["valid"]))
    assert run_baseline(world).rows == 40
    assert sorted(path.name for path in (world.run_dir / "gru4rec" / "eval").glob("*.json")) == ["valid.json"]


def test_a_diverging_loss_names_the_remedy(world):
    with pytest.raises(TawinError, match=r"lower baseline\.lr"):
        run_baseline(with_baseline(world, model="gru4rec", lr=1e30, dropout=0.0))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": "tiger"}, "title", "catalog.kind=sid"),
        ({"model": "tiger", "loss": "bce"}, "sid", "baseline.loss=bce"),
        ({"model": "sasrec", "loss": "trie"}, "sid", "baseline.loss=trie"),
        ({"model": "sasrec", "heads": 3}, "sid", "baseline.heads=3"),
        ({"model": "gru4rec", "training": "sequences"}, "sid", "baseline.training=sequences"),
    ],
)
def test_impossible_combinations_are_refused_before_anything_is_written(world, options, kind, message):
    world = with_baseline(world, **options)
    world.recipe = replace(world.recipe, catalog=replace(world.recipe.catalog, kind=kind))
    with pytest.raises(ConfigError, match=message):
        run_baseline(world)
    assert not world.run_dir.exists()


def test_earlier_rows_are_all_that_a_reward_model_sees(world, monkeypatch):
    seen = set()
    fit = train.train_step

    def watched(world, fitting, samples, **options):
        seen.update(samples.row_N.tolist())
        return fit(world, fitting, samples, **options)

    monkeypatch.setattr(train, "train_step", watched)
    small = with_baseline(world, model="gru4rec", rows="earlier", epochs=2)
    small.earlier_rows = np.arange(240)
    run_baseline(small)
    assert seen == set(range(240))


@pytest.mark.parametrize(
    "options",
    [{"model": "sasrec"}, {"model": "hstu", "training": "sequences", "loss": "sampled_softmax", "negatives": 5}],
)
def test_micro_batches_do_not_change_the_step(world, monkeypatch, options):
    small = with_baseline(world, dropout=0.0, **options)
    small.samples["train"] = chained_samples()
    facts = []
    for items in (1, 7, 10_000):
        monkeypatch.setattr(train, "ITEMS_PER_PASS", items)
        monkeypatch.setattr(train, "SAMPLED_ITEMS_PER_PASS", items)
        runtime.seed_step(1, 0)
        model = train.build_recommender(train.blueprint_of(small))
        fitting = train.ModelAndOptimizer(model, torch.optim.Adam(model.parameters()))
        rows, sampler = train.training_rows(small).take(np.arange(20)), train.negative_sampler(small)
        facts.append(train.train_step(small, fitting, rows, lr=1e-3, sampler=sampler))
    for other in facts[1:]:
        assert other == pytest.approx(facts[0], rel=1e-5)


# -- whole sequences ------------------------------------------------------------------------------------------------
def chained_samples(users: int = 60) -> Samples:
    """Windows of users who buy each item's successor, 2 to 9 items each."""
    draw = np.random.default_rng(8)
    length_U = draw.integers(2, 10, size=users)
    user_N = np.repeat(np.arange(users), length_U)
    place_N = np.arange(len(user_N)) - np.repeat(np.cumsum(length_U) - length_U, length_U)
    item_N = (draw.integers(0, ITEMS, size=users)[user_N] + place_N) % ITEMS
    rows = sliding_windows(user_N, item_N, place_N * users + user_N, WINDOW)
    return Samples(rows.history, rows.target_N, rows.user_N, rows.history)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("sasrec", {"loss": "bce", "negatives": 4}),
        ("hstu", {"loss": "sampled_softmax", "negatives": 6}),
        ("esasrec", {}),
    ],
)
def test_sequences_teach_what_their_windows_do(world, monkeypatch, model, options):
    """An epoch has one row per sequence, and the next items of fresh histories are found."""
    samples = {**world.samples, "train": chained_samples()}
    options = {"batch_size": 20, "epochs": 40, "patience": 8, "training": "sequences", **options}
    world = SimpleNamespace(**{**vars(with_baseline(world, model=model, **options)), "samples": samples})
    sequences = train.training_rows(world)
    assert sequences.num_targets == len(samples["train"])
    assert len(sequences) < len(samples["train"]) / 2
    assert run_baseline(world).means["recall@1"] > 0.8
    first = json.loads((world.run_dir / model / "metrics.jsonl").read_text().splitlines()[0])
    assert first["epoch"] == pytest.approx(1 / -(-len(sequences) // 20))
    assert load_baseline(world.run_dir / model).max_history == WINDOW


def test_earlier_rows_are_all_that_sequences_learn(world):
    world.samples["train"] = chained_samples()
    small = with_baseline(world, model="sasrec", training="sequences", rows="earlier")
    small.earlier_rows = np.arange(100)
    targets = train.training_rows(small).targets.flat
    assert sorted(targets[targets >= 0]) == sorted(world.samples["train"].target_N[:100])


# -- the command line -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_run_on_a_slice_of_the_real_data(path, industrial, tmp_path):
    summary = run(
        "--recipe", str(path), f"data.root={industrial}", f"run_dir={tmp_path}", "data.train_limit=300",
        "data.eval_limit=20", "baseline.epochs=1", "baseline.hidden=16", "trainer.threads=1",
    )  # fmt: skip
    name = load_recipe(path, [f"data.root={industrial}"]).baseline.model
    assert name == path.stem
    assert summary["final_stage"] == name
    assert 0.0 <= summary[name]["recall@10"] <= 1.0
    table = pl.read_parquet(tmp_path / name / "eval" / "test.per_user.parquet")
    assert len(table) == 20
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_every_model_has_its_recipe():
    assert [path.stem for path in RECIPES] == sorted(MODELS)
