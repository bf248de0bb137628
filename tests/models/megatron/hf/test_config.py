"""config.json -> Backbone -> config.json, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tawin_nemo.config.backbones import BACKBONES, Backbone, RopeScaling
from tawin_nemo.models.megatron.hf.config import backbone_from_hf, hf_config
from tawin_nemo.util.errors import ConfigError

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 40,
    "rope_theta": 1e6,
    "use_sliding_window": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_key_is_read(tmp_path: Path) -> None:
    config = {
        **QWEN,
        "tie_word_embeddings": True,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "initializer_range": 0.01,
    }
    assert backbone_from_hf(write(tmp_path, config)) == Backbone(
        "qwen2",
        32,
        2,
        4,
        2,
        48,
        40,
        head_dim=16,
        tied=True,
        rope_theta=1e6,
        norm_eps=1e-5,
        max_position=64,
        init_std=0.01,
    )


FAMILIES = [Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig]
NOT_NEEDED = ("rope_theta", "use_sliding_window", "num_key_value_heads")


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(tmp_path: Path, family: type) -> None:
    config = family(vocab_size=9)
    sparse = {key: getattr(config, key) for key in QWEN if key not in NOT_NEEDED}
    shape = backbone_from_hf(write(tmp_path, sparse))
    assert shape.rope_theta == config.rope_theta
    assert shape.norm_eps == config.rms_norm_eps
    assert shape.max_position == config.max_position_embeddings
    assert shape.init_std == config.initializer_range
    assert shape.tied == config.tie_word_embeddings
    assert shape.kv_heads == config.num_key_value_heads
    assert shape.kv_channels == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert shape.window == (config.sliding_window if family is MistralConfig else 0)


def test_both_spellings_of_the_rope_settings(tmp_path: Path) -> None:
    llama = {**QWEN, "model_type": "llama"}
    old = backbone_from_hf(write(tmp_path, {**llama, "rope_theta": 5e5, "rope_scaling": LLAMA3}))
    del llama["rope_theta"]
    new = backbone_from_hf(write(tmp_path, {**llama, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}))
    assert old == new
    assert (old.rope_theta, old.rope_scaling) == (5e5, RopeScaling(32.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b", "llama-3.2-1b", "qwen3-0.6b", "mistral-7b"])
def test_export_is_read_back_and_understood_by_transformers(tmp_path: Path, name: str) -> None:
    shape = BACKBONES[name]
    back = backbone_from_hf(write(tmp_path, hf_config(shape, dtype="bfloat16", eos_token_id=7)))
    assert back == dataclasses.replace(shape, head_dim=shape.kv_channels)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.eos_token_id, config.rope_theta) == (shape.family, 7, shape.rope_theta)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt2"),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("quantization_config", {"bits": 4}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ],
)
def test_other_arithmetic_is_refused_by_key_and_value(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        backbone_from_hf(write(tmp_path, {**QWEN, key: value}))
    seen = value["rope_type"] if key == "rope_scaling" else value[-1] if isinstance(value, list) else value
    assert repr(seen) in str(error.value)
    assert "; " in str(error.value)  # the remedy


def test_missing_file_missing_key_and_broken_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        backbone_from_hf(tmp_path)
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        backbone_from_hf(write(tmp_path, {key: value for key, value in QWEN.items() if key != "hidden_size"}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        backbone_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
        ("final_logit_softcapping", 30.0),
        ("residual_multiplier", 0.22),
        ("num_experts", 8),
    ],
)
def test_an_unknown_key_that_changes_the_arithmetic_is_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        backbone_from_hf(write(tmp_path, {**QWEN, key: value}))


def test_notes_of_other_tools_and_absent_features_are_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes = {"unsloth_version": "2025.1", "logit_scale": None, "num_experts": 0}
    assert backbone_from_hf(write(tmp_path, {**QWEN, **notes})) == backbone_from_hf(write(tmp_path, QWEN))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_writes_is_known(tmp_path: Path, family: type) -> None:
    config = {**family().to_dict(), **QWEN, "model_type": family.model_type}
    assert backbone_from_hf(write(tmp_path, config)).hidden == 32


@pytest.mark.parametrize(("window", "positions"), [(None, 256), (512, 256), (100, 100)])
def test_a_window_of_mistral_limits_the_positions_and_is_exported(
    tmp_path: Path, window: int | None, positions: int
) -> None:
    config = {**QWEN, "model_type": "mistral", "max_position_embeddings": 256, "sliding_window": window}
    shape = backbone_from_hf(write(tmp_path, config))
    assert (shape.positions, shape.max_position) == (positions, 256)
    assert hf_config(shape)["sliding_window"] == window
