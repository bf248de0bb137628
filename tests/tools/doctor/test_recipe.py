import json
from dataclasses import replace
from pathlib import Path

import pytest

from tawin_nemo.config.backbones import BACKBONES, with_vocab
from tawin_nemo.config.layout import Layout
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.tools.doctor import recipe as recipe_here
from tawin_nemo.tools.doctor.check import Check, Status
from tawin_nemo.tools.doctor.probe import Found, Gpu, Library, TorchFacts
from tawin_nemo.tools.plan.memory import least_machine_bytes, least_rank_bytes, parameters, stage_parameters

GIB = 2**30
QWEN = BACKBONES["qwen2.5-0.5b"]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, list(overrides))


def gpus(count: int, capability=(9, 0), *, cuda: str = "12.9", engine: Library | None = None) -> Found:
    devices = tuple(Gpu("GPU", 80 * GIB, capability) for _ in range(count))
    libraries = {"transformer_engine.pytorch": engine} if engine else {}
    return Found(libraries, TorchFacts(cuda, "2.27", count > 0, "", (), devices))


# -- data -----------------------------------------------------------------------------------------------------------
def data(root: Path, dataset: str = "auto", *more: str) -> Check:
    return recipe_here.data(recipe(f"data.root={root}", f"data.dataset={dataset}", *more))


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).write_text("x")
    return root


def test_generated_data_is_always_there():
    assert recipe_here.data(recipe("data.dataset=synthetic")).status == Status.OK


def test_data_that_is_not_named_or_not_there(tmp_path):
    assert "data.root is empty" in recipe_here.data(recipe()).value
    assert "is not a folder" in data(tmp_path / "nowhere").value
    assert "nothing known in" in data(tmp_path).remedy


def test_the_kind_of_data_is_found_and_compared(tmp_path):
    touch(tmp_path, "Toys.json", "meta_Toys.json")
    assert (data(tmp_path).status, data(tmp_path, "amazon").status) == (Status.OK, Status.OK)
    seen = data(tmp_path, "inter")
    assert (seen.status, seen.remedy) == (Status.FAILS, "set data.dataset=amazon")


def test_raw_files_of_other_names(tmp_path):
    named = ("prepare.reviews=a.json", "prepare.metadata=b.json")
    assert data(tmp_path, "amazon", *named).status == Status.FAILS
    assert data(touch(tmp_path, "a.json", "b.json"), "amazon", *named).status == Status.OK


def test_a_prepared_folder_lacks_a_file_of_its_manifest(tmp_path):
    manifest = {"format": "tawin_nemo.prepared.v1", "files": {"items.parquet": "0"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    seen = data(tmp_path, "prepared")
    assert seen.status == Status.FAILS
    assert "items.parquet" in seen.value
    assert data(touch(tmp_path, "items.parquet"), "prepared").status == Status.OK


def test_codes_of_semantic_ids(tmp_path):
    def look() -> Check:
        return recipe_here.catalog_index(
            recipe("catalog.kind=sid", "catalog.index=codes.json", f"data.root={tmp_path}")
        )

    assert recipe_here.catalog_index(recipe()).status == Status.ABSENT
    nightly = recipe("catalog.kind=sid", f"retrain.root={tmp_path}")
    assert recipe_here.catalog_index(nightly).status == Status.ABSENT
    assert look().status == Status.FAILS
    (tmp_path / "codes.json").write_text("[]")
    assert look().status == Status.FAILS
    (tmp_path / "codes.json").write_text('{"0": ["<a_1>"], "1": ["<a_2>"]}')
    assert look().value.endswith("2 items")


def test_paths_that_a_recipe_names(tmp_path):
    assert recipe_here.other_files(recipe()).status == Status.ABSENT
    assert recipe_here.other_files(recipe(f"start={tmp_path}")).status == Status.OK
    assert "start=" in recipe_here.other_files(recipe(f"start={tmp_path}/no")).value


# -- layout and devices ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tp", "pp", "remedy"),
    [
        (2, 4, ""),
        (4, 7, ""),
        (8, 1, "use one of 1, 2, 4"),  # 28 heads, 4 key-value heads
        (1, 8, ""),  # 28 layers as 2 + 6 x 4 + 2
        (1, 16, "use one of 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 26, 27, 28"),
    ],
)
def test_the_layout_divides_the_model(tp, pp, remedy):
    seen = recipe_here.layout(
        recipe(
            "model.backbone=qwen2.5-7b", f"model.tensor_model_parallel_size={tp}", f"trainer.devices={tp * pp}",
            f"model.pipeline_model_parallel_size={pp}",
        )
    )  # fmt: skip
    assert (seen.status, seen.remedy) == (Status.FAILS if remedy else Status.OK, remedy)


def test_the_layout_of_rollouts_divides_the_model_too():
    where = ("model.backbone=qwen2.5-7b", "model.pipeline_model_parallel_size=4", "trainer.devices=8")
    seen = recipe_here.layout(recipe(*where, "rollout.pipeline_model_parallel_size=1"))
    assert (seen.status, seen.value) == (
        Status.OK, "8 processes = TP 1 x PP 4 x DP 2; rollouts TP 1 x PP 1 x DP 8"
    )  # fmt: skip
    seen = recipe_here.layout(recipe(*where, "rollout.tensor_model_parallel_size=8"
                                     , "rollout.pipeline_model_parallel_size=1"))  # fmt: skip
    assert seen.value == "rollout.tensor_model_parallel_size=8 does not divide the 28 attention heads"
    assert seen.remedy == "use one of 1, 2, 4"


def test_ranks_that_only_search_are_counted_apart():
    apart = recipe(
        "model.backbone=qwen2.5-0.5b", "model.tensor_model_parallel_size=2", "trainer.devices=8",
        "rollout.placement=separate", "rollout.devices=4", "rollout.tensor_model_parallel_size=1",
    )  # fmt: skip
    seen = recipe_here.layout(apart)
    assert seen.value == "4 processes train = TP 2 x PP 1 x DP 2; 4 processes only search = TP 1 x PP 1 x DP 4"
    # float32: weights and gradients of half the model, its Adam state shared by two; or all weights and nothing else
    whole, half = parameters(QWEN), stage_parameters(QWEN, Layout(2), 0)
    assert least_rank_bytes(QWEN, apart) == half * (8 + 8 / 2)
    assert least_machine_bytes(QWEN, apart) == 4 * half * (8 + 8 / 2) + 4 * whole * 4
    together = recipe("model.backbone=qwen2.5-0.5b", "model.tensor_model_parallel_size=2", "trainer.devices=8")
    assert least_machine_bytes(QWEN, together) == 8 * half * (8 + 8 / 4)
    assert least_machine_bytes(QWEN, replace(together, trainer=replace(together.trainer, num_nodes=2))) == (
        8 * half * (8 + 8 / 8)
    )


def test_the_job_has_the_devices_that_the_recipe_wants(monkeypatch):
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "RANK"):
        monkeypatch.delenv(name, raising=False)
    eight = recipe("trainer.devices=8")
    assert recipe_here.devices(eight, gpus(8)).status == Status.OK
    assert recipe_here.devices(eight, Found()).status == Status.OK  # gloo
    assert recipe_here.devices(eight, gpus(4)).remedy == "set trainer.devices=4, or ask for more GPUs"
    assert recipe_here.devices(recipe(), gpus(4)).status == Status.WARNING
    assert recipe_here.devices(recipe("trainer.num_nodes=4"), Found()).status == Status.WARNING
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert recipe_here.devices(recipe("trainer.num_nodes=4"), Found()).remedy == "set trainer.num_nodes=2"


ENGINE = Library("2.10.0")


@pytest.mark.parametrize(
    ("wanted", "found", "status"),
    [
        ("fp32", Found(), Status.OK),
        ("bf16", gpus(1, (8, 0)), Status.OK),
        ("bf16", gpus(1, (7, 0)), Status.WARNING),
        ("fp8-tensorwise", Found(), Status.FAILS),
        ("fp8-tensorwise", gpus(1, (8, 0), engine=ENGINE), Status.FAILS),
        ("fp8-tensorwise", gpus(1), Status.FAILS),
        ("fp8-tensorwise", gpus(1, engine=Library("2.10.0", "ImportError: x")), Status.FAILS),
        ("fp8-tensorwise", gpus(1, engine=ENGINE, cuda="12.4"), Status.WARNING),  # as long as it was never tried
        ("fp8-blockwise", gpus(1, engine=ENGINE, cuda="12.4"), Status.FAILS),
        ("fp8-blockwise", gpus(1, engine=ENGINE, cuda="13.0"), Status.WARNING),
    ],
)
def test_precision_that_the_hardware_has(wanted, found, status, monkeypatch):
    monkeypatch.setattr(recipe_here, "VERIFIED", frozenset())
    assert recipe_here.precision(recipe(f"model.precision={wanted}"), found).status == status


def test_the_precision_of_rollouts_is_looked_at_as_well():
    fp8 = recipe("model.precision=bf16", "rollout.precision=fp8-tensorwise")
    seen = recipe_here.precision(fp8, Found())
    assert (seen.status, "rollout.precision: use bf16" in seen.remedy) == (Status.FAILS, True)


def test_bf16_on_a_cpu_depends_on_its_instructions(monkeypatch):
    wanted = recipe("model.precision=bf16")
    monkeypatch.setattr(recipe_here, "_cpu_flags", lambda: ["amx_bf16"])
    assert recipe_here.precision(wanted, Found()).status == Status.OK
    monkeypatch.setattr(recipe_here, "_cpu_flags", list)
    assert recipe_here.precision(wanted, Found()).status == Status.WARNING


# -- sizes ----------------------------------------------------------------------------------------------------------
def test_parameters_are_those_of_the_published_models():
    # 0.494 B and 7.616 B: the model cards of Qwen2.5-0.5B and -7B
    assert parameters(QWEN) == 494_032_768
    assert parameters(BACKBONES["qwen2.5-7b"]) == 7_615_616_512


def test_memory_that_training_cannot_do_without():
    whole, half = parameters(QWEN), stage_parameters(QWEN, Layout(2), 0)
    assert least_rank_bytes(QWEN, recipe("trainer.devices=8")) == whole * (8 + 8 / 8)
    sharded = recipe("trainer.devices=8", "model.tensor_model_parallel_size=2", "model.precision=bf16")
    assert least_rank_bytes(QWEN, sharded) == half * (6 + 12 / 4)
    assert least_rank_bytes(QWEN, recipe("trainer.devices=8", "trainer.distributed_optimizer=false")) == whole * 16


def test_an_impossible_layout_has_no_memory():
    wrong = recipe("model.backbone=qwen2.5-7b", "model.tensor_model_parallel_size=8", "trainer.devices=8")
    assert recipe_here.model_memory(wrong, Found(), GIB).status == Status.ABSENT


def test_a_model_that_cannot_fit_is_refused():
    seven = recipe("model.backbone=qwen2.5-7b", "model.precision=bf16", "trainer.devices=1")
    assert recipe_here.model_memory(seven, gpus(1), GIB).status == Status.FAILS  # 128 of 80 GiB
    spread = recipe("model.backbone=qwen2.5-7b", "model.precision=bf16", "trainer.devices=8")
    assert recipe_here.model_memory(spread, gpus(8), GIB).status == Status.OK  # 53 of 80 GiB
    assert recipe_here.model_memory(spread, Found(), 64 * GIB).status == Status.FAILS  # all eight in one machine
    assert recipe_here.model_memory(recipe(), Found(), 64 * GIB).status == Status.OK


def test_a_checkpoint_has_the_size_that_was_measured():
    # small-1m with 782 tokens, float32, distributed optimizer: 18,656,408 bytes of tensors in step_112 of an SFT run
    count = parameters(with_vocab(BACKBONES["small-1m"], 782))
    assert recipe_here.checkpoint_bytes(recipe(), count) == pytest.approx(18_656_408, rel=0.02)


@pytest.mark.parametrize(("free", "status"), [(10, Status.FAILS), (40, Status.WARNING), (200, Status.OK)])
def test_room_for_checkpoints(free, status, tmp_path, monkeypatch):
    # 0.494 B parameters x 16 bytes = 7.4 GiB; sft, sft_continued and rl keep 2 + the best one, one is being written
    monkeypatch.setattr(recipe_here.shutil, "disk_usage", lambda path: type("", (), {"free": free * GIB}))
    seen = recipe_here.checkpoint_disk(recipe("model.backbone=qwen2.5-0.5b"), tmp_path / "runs" / "x")
    assert seen.status == status
    assert seen.value.startswith("7.4 GiB each, up to 9 kept: 73.6 GiB")
