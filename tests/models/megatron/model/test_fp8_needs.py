"""What FP8 is refused for, on made-up machines, and what is said as long as it has never run on a real one."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tawin_nemo.config.backbones import BACKBONES, Backbone
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import ModelConfig, Recipe
from tawin_nemo.models.megatron.model import precision
from tawin_nemo.models.megatron.model.build import build_rollout_model
from tawin_nemo.util.errors import ConfigError
from tests.gpu.records import verified_precisions
from tests.models.megatron.model.test_precision import FP8, HOPPER, SHAPE


# -- what is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "machine", "reason", "remedy"),
    [
        ("fp8-tensorwise", precision.Machine(), "needs a CUDA device", "bf16 or fp32"),
        ("fp8-tensorwise", replace(HOPPER, capability=(8, 9), gpu="L40S"), r"9\.0 .* L40S has 8\.9", "use bf16"),
        ("fp8-delayed", replace(HOPPER, engine=""), "Transformer Engine, which is not installed", "install_gpu"),
        ("fp8-delayed", replace(HOPPER, engine_error="ImportError: libcudnn"), "failed: ImportError: libcudnn", "bf16"),
        ("fp8-blockwise", replace(HOPPER, engine="2.8.0"), r">=2\.9,<2\.12 .* 2\.8\.0 is installed", "install_gpu"),
        ("fp8-blockwise", replace(HOPPER, engine="2.13"), r"2\.13 is installed", "install_gpu"),
        (
            "fp8-delayed",
            replace(HOPPER, foreign_apex="/x/apex"),
            "in /x/apex is an unrelated web",
            "pip uninstall apex",
        ),
        ("fp8-blockwise", replace(HOPPER, cuda="12.8"), r"CUDA 12\.9 or newer; torch has 12\.8", "fp8-tensorwise"),
    ],
)
def test_fp8_is_refused_with_what_is_lacking(name, machine, reason, remedy) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.precision={name} .*{remedy}") as caught:
        precision.check_model_supported(SHAPE, ModelConfig(precision=name), machine)
    assert caught.match(reason)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_accepted_where_nothing_lacks(name: str) -> None:
    precision.check_model_supported(BACKBONES["qwen2.5-7b"], ModelConfig(precision=name), HOPPER)
    precision.check_model_supported(SHAPE, ModelConfig(precision=name), replace(HOPPER, capability=(10, 0), gpu="B200"))
    assert precision.unsupported_reason("fp8-tensorwise", replace(HOPPER, cuda="12.4")) is None
    assert precision.unsupported_reason("bf16", precision.Machine()) is None


@pytest.mark.parametrize(
    ("shape", "cfg", "message"),
    [
        (replace(SHAPE, ffn=100), ModelConfig(precision="fp8-tensorwise"), "multiples of 16; the FFN width .* is 100"),
        (
            SHAPE, ModelConfig(precision="fp8-tensorwise", tensor_model_parallel_size=2, num_layers_at_end_in_bf16=4),
            "num_layers_at_end_in_bf16=4 is more than the 3 layers",
        ),
        (
            SHAPE, ModelConfig(precision="fp8-blockwise", tensor_model_parallel_size=2, sequence_parallel=True),
            "gathers blocks of 128, and the hidden width .* is 64",
        ),
    ],
)  # fmt: skip
def test_shapes_that_fp8_cannot_cut_are_refused(shape: Backbone, cfg: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        precision.check_model_supported(shape, cfg, HOPPER)


@pytest.mark.parametrize("name", [name for name, shape in BACKBONES.items() if shape.vocab])
def test_published_shapes_can_be_cut(name: str) -> None:
    """Under every TP size that its heads allow; a width that FP8 cannot cut is refused in the same place."""
    shape = BACKBONES[name]
    sizes = [size for size in (1, 2, 4, 8) if shape.kv_heads % size == 0]
    assert sizes[:2] == [1, 2]
    for tp in sizes:
        cfg = ModelConfig(name, precision="fp8-blockwise", tensor_model_parallel_size=tp, sequence_parallel=tp > 1)
        precision.check_model_supported(shape, cfg, HOPPER)
        with pytest.raises(ConfigError, match="FFN width"):
            precision.check_model_supported(replace(shape, ffn=shape.ffn + 8 * tp), cfg, HOPPER)


def test_a_model_of_rollouts_is_refused_by_its_own_keys() -> None:
    """Also where it could be trained: rollouts may have another layout."""
    cfg = ModelConfig(precision="fp8-tensorwise", tensor_model_parallel_size=4)
    with pytest.raises(ConfigError, match=r"rollout\.precision=fp8-tens.* under rollout\.tensor_model_parallel_size=4"):
        precision.check_model_supported(replace(SHAPE, ffn=96), cfg, HOPPER, section="rollout")
    with pytest.raises(ConfigError, match=r"^rollout\.precision=fp8-tensorwise needs a CUDA device"):
        build_rollout_model(SHAPE, ModelConfig(), 1, 1, "fp8-tensorwise")


def test_supported_versions_are_those_that_megatron_names() -> None:
    required = [Requirement(line) for line in metadata.requires("megatron-core") or []]
    theirs = next(item.specifier for item in required if item.name == "transformer-engine")
    ours = SpecifierSet(precision.TRANSFORMER_ENGINE)
    for version in ("2.8", "2.9", "2.10.0", "2.11", "2.11.1", "2.12", "3.0"):
        assert ours.contains(version) == theirs.contains(version), version


def test_combinations_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="fp8-delayed scales over the whole model"):
        load_recipe(None, ["model.precision=fp8-delayed", "model.num_layers_at_start_in_bf16=1"])
    with pytest.raises(ConfigError, match=r"reference\.precision=bf16 but reference\.mode=swap"):
        load_recipe(None, ["reference.precision=bf16", "reference.mode=swap"])


def test_each_part_of_a_run_has_its_precision() -> None:
    cfg = ModelConfig(precision="fp8-blockwise")
    assert precision.in_precision(cfg, "model") is cfg
    assert precision.in_precision(cfg, "bf16").precision == "bf16"
    recipe = load_recipe(None, ["model.precision=bf16", "reference.precision=fp32", "eval.precision=fp8-tensorwise"])
    assert precision.named_precisions(recipe) == {
        "model.precision": "bf16", "reference.precision": "fp32", "eval.precision": "fp8-tensorwise",
    }  # fmt: skip
    searching = load_recipe(None, ["model.precision=fp8-blockwise", "rollout.precision=bf16"])
    assert precision.named_precisions(searching) == {
        "model.precision": "fp8-blockwise", "rollout.precision": "bf16",
    }  # fmt: skip
    assert precision.named_precisions(Recipe()) == {"model.precision": "fp32"}


@pytest.mark.parametrize("key", ["model.precision", "rollout.precision", "eval.precision", "reference.precision"])
def test_a_recipe_is_refused_before_anything_is_built(key: str) -> None:
    recipe = load_recipe(None, [f"{key}=fp8-tensorwise"])
    with pytest.raises(ConfigError, match=rf"^{key}=fp8-tensorwise needs a CUDA device"):
        precision.check_supported(recipe, precision.Machine())
    precision.check_supported(recipe, HOPPER)


def test_a_machine_without_cuda_is_seen_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    precision.this_machine.cache_clear()
    assert precision.this_machine().capability is None
    precision.this_machine.cache_clear()


# -- what has run on hardware --------------------------------------------------------------------------------------
def record(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")


def test_only_passed_runs_on_hardware_count(tmp_path: Path) -> None:
    parts = '"parts": {"train_fp8-blockwise": {"status": "%s"}, "train_bf16": {"status": "passed"}}'
    record(tmp_path, "gpu_a.json", '{"dry_run": true, %s}' % (parts % "passed"))
    record(tmp_path, "gpu_b.json", '{"dry_run": false, %s}' % (parts % "failed"))
    record(tmp_path, "gpu_c.json", "[1, 2")
    record(tmp_path, "gpu_d.json", "[1, 2]")
    record(tmp_path, "gpu_e.json", '{"dry_run": false, "parts": []}')
    assert verified_precisions(tmp_path) == set()
    record(tmp_path, "gpu_f.json", '{"dry_run": false, %s}' % (parts % "passed"))
    assert verified_precisions(tmp_path) == {"fp8-blockwise"}


def test_what_the_package_calls_verified_is_what_committed_runs_show() -> None:
    assert verified_precisions() == precision.VERIFIED


def test_fp8_is_called_unverified_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(None, ["model.precision=fp8-blockwise", "eval.precision=bf16"])
    delayed = load_recipe(None, ["model.precision=fp8-delayed"])
    said = "model.precision=fp8-blockwise: not verified on hardware (no run of tests/gpu with it is in recipes/results)"
    monkeypatch.setattr(precision, "VERIFIED", frozenset())
    assert precision.unverified(recipe) == [said]
    monkeypatch.setattr(precision, "VERIFIED", frozenset({"fp8-blockwise"}))
    assert precision.unverified(recipe) == []
    assert len(precision.unverified(delayed)) == 1
    assert precision.unverified(Recipe()) == []


def test_the_verbs_say_so_and_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    from tawin_nemo.commands import session

    said: list[str] = []
    monkeypatch.setattr(session.log, "warning", said.append)
    monkeypatch.setattr(precision, "this_machine", lambda: HOPPER)
    recipe = load_recipe(None, ["model.precision=fp8-delayed"])
    monkeypatch.setattr(precision, "VERIFIED", frozenset())
    session.check_precision(recipe, runs=True)
    assert len(said) == 1
    assert "not verified on hardware" in said[0]
    monkeypatch.setattr(precision, "this_machine", precision.Machine)
    with pytest.raises(ConfigError):
        session.check_precision(recipe, runs=True)
    session.check_precision(recipe, runs=False)  # a dry run may be made on a machine without a GPU
    session.check_precision(load_recipe(None, ["model.precision=fp8-delayed", "baseline.model=sasrec"]), runs=True)
