"""Recipes: inheritance, overrides, strict errors that name key, value and remedy."""

import dataclasses
from itertools import cycle
from pathlib import Path

import pytest

from tawin_nemo.config.load import differences, leaf_fields, load_recipe, to_yaml, value_of
from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.errors import ConfigError

#: Study files are no recipes; tests/study loads them.
RECIPES = sorted(
    path for path in (Path(__file__).parents[2] / "recipes").rglob("*.yaml") if path.parent.name != "studies"
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_base_then_recipe_then_overrides(tmp_path):
    write(tmp_path / "base.yaml", "seed: 1\nrl: {lr: 1e-3, beta: 0.5, tawin: {k: 2}}\n")
    recipe = write(tmp_path / "child.yaml", "base: base.yaml\nrl: {lr: 1e-4}\n")
    loaded = load_recipe(recipe, ["rl.tawin.k=3", "eval.ks=[1,2]"])
    assert (loaded.seed, loaded.rl.lr, loaded.rl.beta, loaded.rl.tawin.k, loaded.eval.ks) == (1, 1e-4, 0.5, 3.0, [1, 2])


def test_a_second_level_of_base_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "seed: 1\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="one level"):
        load_recipe(write(tmp_path / "c.yaml", "base: b.yaml\n"))


def test_interpolation_and_bare_off(tmp_path):
    text = "name: x\nrun_dir: out/${name}\nrl: {beta: 0, ensure_target: off}\nreference: {mode: off}\n"
    loaded = load_recipe(write(tmp_path / "r.yaml", text))
    assert (loaded.run_dir, loaded.reference.mode, loaded.rl.ensure_target) == ("out/x", "off", "off")


SERVED = "rollout.placement=server rollout.servers=[a]"
APART = "trainer.devices=4 rollout.placement=separate"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_cluster_recipes_write_checkpoints_in_the_background(path):
    """Training on several GPUs waits for no disk, and half an hour is the most that a lost node costs."""
    trainer = load_recipe(path).trainer
    if trainer.devices * trainer.num_nodes > 1:
        assert trainer.async_save
        assert trainer.save_interval >= 1000
        assert 0 < trainer.save_minutes <= 30


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rl.lrr=1", ["rl.lrr=1", "did you mean rl.lr?"]),
        ("lr=1", ["lr=1", "sft.lr or preference.lr or rl.lr"]),
        ("rl=3", ["rl is a section"]),
        ("rl.lr=abc", ["rl.lr", "abc", "peak learning rate"]),
        ("rl.kl=k4", ["rl.kl=k4", "k3"]),
        ("rl.beta=-1", ["rl.beta=-1", "must be in 0.0..1000000.0"]),
        ("model.backbone=qwen2.5-0.6b", ["model.backbone=qwen2.5-0.6b", "did you mean qwen2.5-0.5b"]),
        ("trainer.devices=3 model.tensor_model_parallel_size=2", ["trainer.devices=3", "multiple of 2"]),
        ("model.sequence_parallel=true", ["sequence_parallel", "tensor_model_parallel_size > 1"]),
        ("catalog.kind=sid", ["catalog.index"]),
        ("reference.mode=off", ["rl.beta", "reference.mode=copy"]),
        ("sft.enabled=false", ["rl.init=base"]),
        (
            "trainer.overlap_grad_reduce=true trainer.overlap_param_gather=true trainer.distributed_optimizer=false",
            ["trainer.overlap_param_gather=true", "set trainer.distributed_optimizer=true"],
        ),
        (
            "trainer.overlap_param_gather=true",
            ["trainer.overlap_param_gather=true", "trainer.overlap_grad_reduce=false", "set both to true"],
        ),
        ("rollout.width=4", ["rollout.width=4", "rl.group_size=16"]),
        ("eval.beams=5", ["eval.beams=5", "eval.ks"]),
        ("rl.max_refill_batches=2", ["rl.max_refill_batches=2", "rl.algorithm=dapo"]),
        ("rl.algorithm=dapo rl.max_refill_batches=2 rl.ensure_target=replace_last", ["rl.ensure_target=replace_last"]),
        ("rl.inserted_weight=0.1", ["rl.inserted_weight=0.1", "rl.ensure_target=replace_last"]),
        ("rl.inserted_correction=ratio", ["rl.inserted_correction=ratio", "rl.ensure_target=replace_last"]),
        (
            "rl.inserted_correction=ratio rl.ensure_target=replace_last rl.policy_space=vocab",
            ["rl.policy_space=trie"],
        ),
        ("rl.algorithm=dapo rl.length_norm=branching", ["rl.length_norm=branching", "use full"]),
        ("rl.importance_cap=2 rl.policy_space=vocab", ["rl.importance_cap=2", "rl.policy_space=trie"]),
        ("rl.beta=0 reference.refresh=ema", ["reference.refresh=ema", "rl.beta=0"]),
        ("eval.candidates=1", ["eval.candidates=1", "2 or more"]),
        (
            "eval.candidates=20 rollout.placement=separate rollout.devices=1 trainer.devices=2",
            ["eval.candidates=20", "rollout.placement=colocated"],
        ),
        ("rl.init=preference", ["rl.init=preference", "preference.enabled=true"]),
        ("preference.enabled=true preference.beta=0", ["preference.beta=0"]),
        ("preference.enabled=true reference.mode=off rl.beta=0", ["preference.algorithm=sdpo", "reference.mode=copy"]),
        ("preference.enabled=true sft.enabled=false rl.init=base", ["preference.init=sft", "preference.init=base"]),
        ("preference.enabled=true preference.epochs=0", ["preference.max_steps=0", "preference.epochs=0"]),
        ("preference.enabled=true preference.algorithm=napo", ["preference.rho=0.7", "preference.aux"]),
        ("preference.enabled=true preference.algorithm=napo preference.rho=0", ["preference.margin=dynamic"]),
        (
            "preference.enabled=true preference.algorithm=napo preference.aux=x preference.share_group=129",
            ["preference.share_group=129", "preference.global_batch_size=128"],
        ),
        ("preference.enabled=true preference.aux=x", ["preference.aux=x", "leave it empty"]),
        (
            "preference.enabled=true preference.negatives=candidates preference.num_negatives=20",
            ["preference.num_negatives=20", "19 or less"],
        ),
        (
            "preference.enabled=true preference.search_every=5",
            ["preference.search_every=5", "preference.negatives=random"],
        ),
        (
            "preference.enabled=true preference.length_norm=branching preference.policy_space=vocab",
            ["preference.length_norm=branching", "use full"],
        ),
        ("rl.reward=collaborative", ["rl.reward_source", "RUN_DIR/sasrec"]),
        ("rl.reward_source=x", ["rl.reward_source=x", "rl.reward=rule"]),
        ("sft.rows=fresh", ["sft.rows=fresh", "rl.enabled=false"]),
        ("eval.splits=[train]", ["eval.splits=['train']", "valid, test"]),
        ("rl.negatives=dynamic rollout.score_space=vocab", ["rl.negatives=dynamic", "rollout.score_space=trie"]),
        ("rollout.devices=1", ["rollout.devices=1", "rollout.placement=colocated", "rollout.placement=separate"]),
        (f"rollout.cuda_graphs=on {SERVED}", ["rollout.placement=server", "rollout.cuda_graphs=off"]),
        ("rollout.cuda_graphs=on rollout.score_space=vocab", ["rollout.score_space=vocab", "rollout.cuda_graphs=off"]),
        (
            "rollout.cuda_graphs=on trainer.devices=2 model.pipeline_model_parallel_size=2",
            ["2 pipeline stages", "rollout.cuda_graphs=off"],
        ),
        ("rollout.cuda_graphs=on model.precision=fp8-delayed", ["fp8-delayed", "rollout.cuda_graphs=off"]),
        (
            "rollout.cuda_graphs=on model.precision=bf16 rollout.precision=fp8-blockwise",
            ["rollout.precision=fp8-blockwise", "rollout.cuda_graphs=off"],
        ),
        (
            "model.precision=bf16 rollout.precision=fp8-delayed",
            ["rollout.precision=fp8-delayed", "model.precision=bf16", "fp8-tensorwise"],
        ),
        (
            "model.precision=fp8-delayed rollout.precision=fp8-delayed model.num_layers_at_end_in_bf16=1",
            ["model.precision=fp8-delayed", "model.num_layers_at_end_in_bf16=1", "fp8-blockwise"],
        ),
        (
            f"{SERVED} rollout.precision=bf16",
            ["model.precision=fp32", "rollout.precision=bf16", "set eval.precision=bf16"],
        ),
        ("rollout.ahead=1", ["rollout.ahead=1", "rollout.placement=separate"]),
        (f"{APART}", ["rollout.placement=separate", "rollout.devices=0 of 4 processes", "between 1 and"]),
        (f"{APART} rollout.devices=4", ["rollout.devices=4 of 4 processes", "at least one must train"]),
        (
            f"{APART} rollout.devices=1 model.tensor_model_parallel_size=2",
            ["rollout.devices=1", "tensor_model_parallel_size=2", "multiple of 2"],
        ),
        (
            f"{APART} rollout.devices=1 model.tensor_model_parallel_size=2 rollout.tensor_model_parallel_size=1",
            ["4 processes, less rollout.devices=1", "model.tensor_model_parallel_size=2", "multiple of 2 more than"],
        ),
        (
            f"{APART} rollout.devices=1 rollout.ahead=1 rl.policy_space=vocab",
            ["rollout.ahead=1", "rl.policy_space=trie"],
        ),
        (
            f"{APART} rollout.devices=1 rollout.ahead=1 rl.ensure_target=replace_last",
            ["rollout.ahead=1", "rl.ensure_target=off"],
        ),
        (
            f"{APART} rollout.devices=1 rollout.ahead=1 rl.algorithm=dapo rl.max_refill_batches=1",
            ["rl.max_refill_batches=1", "rollout.ahead=0"],
        ),
        (f"{APART} rollout.devices=1 baseline.model=sasrec", ["baseline.model=sasrec", "rollout.placement=colocated"]),
        ("rollout.placement=server", ["rollout.placement=server needs rollout.servers", "address.json"]),
        ("rollout.servers=[a]", ["rollout.servers=['a']", "rollout.placement=server"]),
        (f"{SERVED[:-1]},a]", ["rollout.servers=['a', 'a'] names a server twice"]),
        (f"{SERVED} rollout.ahead=1", ["rollout.ahead=1", "rollout.placement=separate"]),
        (f"{SERVED} rollout.tensor_model_parallel_size=1", ["tensor_model_parallel_size=1", "set both to 0"]),
        (f"{SERVED} baseline.model=sasrec", ["baseline.model=sasrec", "rollout.servers=[]"]),
        (f"{SERVED} eval.precision=bf16", ["eval.precision=bf16", "model.precision=fp32", "eval.precision=model"]),
        (
            f"{SERVED} catalog.kind=sid catalog.index=x data.tokenizer=bpe align.title_to_sid=1",
            ["align.title_to_sid=1", "start=RUN_DIR/sft"],
        ),
        (
            "trainer.devices=4 rollout.tensor_model_parallel_size=3",
            ["tensor_model_parallel_size=3", "4 processes", "rollout.pipeline_model_parallel_size"],
        ),
        ("trainer.monitor=recall@7", ["trainer.monitor=recall@7", "a K of eval.ks=[1, 3, 5, 10]"]),
        ("seed", ["no '='"]),
        ("rl.lr=[1", ["override not understood"]),
    ],
)
def test_errors_name_key_value_and_remedy(override, parts):
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, override.split(" "))
    for part in parts:
        assert part in str(caught.value)


def test_rl_init_sft_alone_turns_sft_on(tmp_path):
    """One override over a recipe without SFT; a layer that says both keys means both."""
    bare = write(tmp_path / "bare.yaml", "sft: {enabled: false}\nrl: {init: base}\n")
    assert not load_recipe(bare).sft.enabled
    assert load_recipe(bare, ["rl.init=sft"]).sft.enabled
    assert load_recipe(write(tmp_path / "child.yaml", "base: bare.yaml\nrl: {init: sft}\n")).sft.enabled
    for overrides in (["rl.init=sft", "sft.enabled=false"], ["sft.enabled=false"]):
        with pytest.raises(ConfigError, match=r"sft\.enabled=false"):
            load_recipe(None, overrides)
    assert load_recipe(bare, ["rl.init=base"]) == load_recipe(bare)


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"rl\.tawn=.*r\.yaml.*did you mean rl\.tawin"):
        load_recipe(write(tmp_path / "r.yaml", "rl: {tawn: {k: 1}}\n"))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "quickstart.yaml", "seed: 1\n")
    with pytest.raises(ConfigError, match=r"quickstart\.yaml"):
        load_recipe(tmp_path / "quikstart.yaml")


def test_resolved_yaml_reads_back_and_differences_are_named(tmp_path):
    one = load_recipe(None, ["seed=3", "exp_manager.create_tensorboard_logger=true"])
    again = load_recipe(write(tmp_path / "r.yaml", to_yaml(one)))
    assert again == one
    two = dataclasses.replace(one, seed=4)
    assert differences(to_yaml(one), to_yaml(two)) == ["seed: 3 -> 4"]
    assert differences(to_yaml(one), to_yaml(two), ignore=["seed"]) == []


def test_a_key_younger_than_a_stored_recipe_had_its_default():
    recipe = load_recipe(None, ["seed=3"])
    stored = "".join(line for line in to_yaml(recipe).splitlines(keepends=True) if "warmup" not in line)
    assert differences(stored, to_yaml(recipe)) == []
    changed = to_yaml(load_recipe(None, ["seed=3", "sft.warmup=7"]))
    assert differences(stored, changed) == ["sft.warmup: 50 -> 7"]


def test_the_help_of_every_key_is_a_sentence():
    for key, item in leaf_fields(Recipe):
        text = item.metadata.get("help", "")
        assert len(text) > 15, key
        assert text[0].isupper(), (key, text)
        assert text.endswith("."), (key, text)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_say_only_what_differs(path):
    recipe, defaults = load_recipe(path), Recipe()
    assert recipe != defaults
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=007", "name", "007"),
        ("name=yes", "name", "yes"),
        ("name=a: b", "name", "a: b"),
        ("name='1'", "name", "1"),
        ("name=x-${seed}", "name", "x-42"),
        ("trainer.max_time=1:00:00:00", "trainer.max_time", "1:00:00:00"),
        ("prepare.start=2018-10", "prepare.start", "2018-10"),
        ("prepare.start=", "prepare.start", ""),
        ("serve.roots=", "serve.roots", []),
        ("serve.roots=a, 007", "serve.roots", ["a", "007"]),
        ("serve.roots=[a, 007]", "serve.roots", ["a", "007"]),
        ("eval.ks=5", "eval.ks", [5]),
        ("eval.ks=1,3,5", "eval.ks", [1, 3, 5]),
        ("eval.splits=test", "eval.splits", ["test"]),
        ("start=~/runs", "start", str(Path.home() / "runs")),
        ("serve.roots=~/a,/b", "serve.roots", [str(Path.home() / "a"), "/b"]),
        ("exp_manager.a=12", "exp_manager", {"a": 12}),  # another library's keys keep YAML's types
    ],
)
def test_the_type_of_the_key_decides_how_its_value_is_read(override, key, value):
    assert value_of(load_recipe(None, [override]), key) == value


def test_files_are_read_as_overrides_are(tmp_path):
    text = (
        "name: 007\nprepare: {start: 2018-10-01, end: }\ntrainer: {max_time: 1:00:00:00}\n"
        "serve: {roots: [1, yes]}\nrl: {lr: 1e-3}\nrun_dir: ~\n"
    )
    loaded = load_recipe(write(tmp_path / "r.yaml", text))
    assert (loaded.name, loaded.prepare.start, loaded.prepare.end) == ("007", "2018-10-01", "")
    assert (loaded.trainer.max_time, loaded.serve.roots, loaded.rl.lr) == ("1:00:00:00", ["1", "yes"], 1e-3)
    assert loaded.run_dir == ""
    assert load_recipe(write(tmp_path / "again.yaml", to_yaml(loaded))) == loaded


def test_every_number_is_finite_and_every_time_is_one():
    floats = [key for key, item in leaf_fields(Recipe) if item.type == "float"]
    assert len(floats) > 50
    for key, value in zip(floats, cycle(("nan", "inf", "-inf", ".nan")), strict=False):  # all of them: test_limits.py
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            load_recipe(None, [f"{key}={value}"])
    for key in ("trainer.max_time", "prepare.start", "prepare.end", "retrain.date"):
        with pytest.raises(ConfigError, match=f"{key}=noon"):
            load_recipe(None, [f"{key}=noon"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sft.enabled=7", "sft.enabled=7 is no truth value; write true or false"),
        ("compare.sft_all=-236444789", "no truth value"),
        ("name=a\x1b[31m", r"name='a\\x1b\[31m' has blanks at an end, or a control character"),
        ("run_dir=runs/x ", "write 'runs/x'"),
        ("serve.host=\ufeff127.0.0.1", "write '127.0.0.1'"),
        ("eval.splits=test,va\x00lid", "control character"),
        ("preference.aux=" + 5000 * "a", "has 5000 characters"),
        (".rl.lr=1", r"'\.rl\.lr=1': \.rl\.lr has a dot too many"),
        ("rl..lr=1", "a dot too many"),
        ("rl.inner_updates=???", "stands for a value that is missing"),
        ("rl.lr=" + 400 * "9", "has 400 digits"),
        ("rl.init=${rl.nothing}", "rl.init"),
    ],
)
def test_what_no_person_means_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, [word])


def test_zero_and_one_are_truth_values_and_a_reference_is_read_behind_the_layers() -> None:
    assert load_recipe(None, ["compare.sft_all=1", "sft.enabled=0", "rl.init=base"]).compare.sft_all is True
    assert load_recipe(None, ["rl.init=sft", "name=${rl.init}"]).name == "sft"
