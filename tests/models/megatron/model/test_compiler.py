"""What torch.compile needs, on made-up machines, and that a model does without it where something is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.model import compiler
from tawin_nemo.models.megatron.model.build import model_config
from tawin_nemo.models.megatron.parallel import runtime

SHAPE = Backbone("qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, max_position=256)


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment with Triton, Python.h in ``tmp_path`` and gcc in ``tmp_path/bin``."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return {"PATH": str(tmp_path / "bin")}


def test_a_complete_machine_lacks_nothing(complete, tmp_path):
    assert compiler.missing_for_compile(complete, tmp_path) == []
    assert compiler.missing_for_compile({**complete, "CC": "gcc"}, tmp_path) == []


def test_each_missing_part_is_named(complete, tmp_path, monkeypatch):
    assert compiler.missing_for_compile({"PATH": "/nowhere"}, tmp_path) == ["a C compiler (gcc or clang)"]
    assert compiler.missing_for_compile({**complete, "CC": "icc"}, tmp_path) == ["the C compiler CC=icc"]
    assert compiler.missing_for_compile(complete, tmp_path / "bin") == [f"Python.h in {tmp_path / 'bin'}"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton" in compiler.missing_for_compile(complete, tmp_path)[0]


@pytest.mark.parametrize("missing", [[], ["a C compiler (gcc or clang)"]])
def test_fused_functions_are_used_only_where_they_can_be_compiled(missing, monkeypatch):
    runtime.initialize(ModelConfig(), seed=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiler, "missing_for_compile", lambda: missing)
    said: list[str] = []
    monkeypatch.setattr(compiler._log, "warning", lambda text, *values: said.append(text % values))
    compiler.use_fused_functions.cache_clear()
    try:
        config = model_config(SHAPE, ModelConfig())
        model_config(SHAPE, ModelConfig())
    finally:
        compiler.use_fused_functions.cache_clear()
    assert (config.bias_activation_fusion, config.bias_dropout_fusion) == (not missing, not missing)
    assert len(said) == len(missing)  # once, for two models
    assert all(
        line.startswith("no torch.compile, fused functions are off: a C compiler (gcc or clang)") for line in said
    )
