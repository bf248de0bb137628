"""Hugging Face ``config.json`` <-> `Backbone`.

Read: the keys that change the arithmetic of a Qwen2, Qwen3, Llama or Mistral decoder. A key that asks for arithmetic
this package does not have (windows in single layers, other activations, quantised weights, other RoPE scalings) is an
error, never ignored. So is a key that is not known here but whose name speaks of arithmetic
(``dual_chunk_attention_config``); other unknown keys (notes of the tool that wrote the file) are logged. A window of
the whole model (``sliding_window`` of Mistral) limits the length of sequences, within which attention is full.
Both spellings of the RoPE settings are understood: ``rope_theta`` + ``rope_scaling`` (transformers 4) and
``rope_parameters`` (transformers 5).
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tawin_nemo.config.backbones import Backbone, RopeScaling
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.log import get_logger
from tawin_nemo.util.trusted import read_text

log = get_logger(__name__)

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
SUPPORTED = "Qwen2.5 (qwen2), Qwen3 dense (qwen3), Llama (llama) and Mistral (mistral)"
#: Defaults of transformers' configuration classes where the families differ.
_MAX_POSITION = {"qwen2": 32768, "qwen3": 32768, "llama": 2048, "mistral": 131072}
_KV_HEADS = {"qwen2": 32, "qwen3": 32, "mistral": 8}
_HEAD_DIM = {"qwen3": 128}
_WINDOW = {"mistral": 4096}

#: Keys whose only supported values are these (absent is supported too), with what the user can do about another value.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_sliding_window": ((False, None), "set it to false if the model was trained with full attention"),
    "hidden_act": (("silu",), "only SwiGLU decoders can be imported"),
    "attention_bias": ((False, None), "only Llama models without attention bias can be imported"),
    "mlp_bias": ((False, None), "only models without MLP bias can be imported"),
    "partial_rotary_factor": ((1.0, 1, None), "only models that rotate every channel can be imported"),
    "quantization_config": ((None,), "export the model in bf16 or fp32 first"),
}

#: Keys that are read, or that change nothing of what a forward pass computes without dropout.
_KNOWN = frozenset(
    """
    architectures model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size vocab_size tie_word_embeddings rope_theta rope_scaling rope_parameters rms_norm_eps
    max_position_embeddings initializer_range layer_types sliding_window max_window_layers attention_dropout
    hidden_dropout resid_pdrop embd_pdrop torch_dtype dtype use_cache transformers_version pretraining_tp
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    attn_implementation _attn_implementation _attn_implementation_autoset _name_or_path name_or_path auto_map
    return_dict output_attentions output_hidden_states is_decoder is_encoder_decoder chunk_size_feed_forward
    gradient_checkpointing finetuning_task id2label label2id num_labels problem_type task_specific_params
    tokenizer_class prefix vocab_file is_llama_config rope_interleaved tie_encoder_decoder
    """.split()
)
#: Parts of names of keys that change the arithmetic, as the families of decoders spell them.
_ARITHMETIC = re.compile(
    "attention|attn|rope|rotary|norm|scal|softcap|capping|window|chunk|sparse|moe|expert|router|bias|activation|"
    "multiplier|residual|logit|qk_|mlp|lora|adapter|quant|position|alibi|parallel|embedding|mamba|state|conv|altup"
)


def _require(config: dict[str, Any], key: str, file: Path) -> Any:
    if config.get(key) is None:
        raise ConfigError(f"{file}: the key {key} is missing; use the config.json that was published with the weights")
    return config[key]


def _check_supported(config: dict[str, Any], file: Path) -> None:
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise ConfigError(f"{file}: model_type={family!r} cannot be imported; supported are {SUPPORTED}")
    for key, (allowed, remedy) in _FIXED.items():
        if key in config and config[key] not in allowed:
            raise ConfigError(f"{file}: {key}={config[key]!r} is not supported; {remedy}")
    unknown = {key: value for key, value in config.items() if key not in _KNOWN and key not in _FIXED and value}
    for key, value in unknown.items():
        if _ARITHMETIC.search(key):
            raise ConfigError(
                f"{file}: {key}={value!r} is not known here and may change what the model computes; remove it from "
                "config.json only if the weights were trained without it"
            )
    if unknown:
        log.warning("%s: keys without a meaning here are not used: %s", file, ", ".join(sorted(unknown)))
    layers = [kind for kind in config.get("layer_types") or () if kind != "full_attention"]
    if layers:
        raise ConfigError(
            f"{file}: layer_types contains {layers[0]!r}; only models with full attention can be imported"
        )


def _rope(config: dict[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    """RoPE base and Llama-3 scaling. Raises ConfigError for every other scaling."""
    modern = config.get("rope_parameters") or {}
    scaling = modern or config.get("rope_scaling") or {}
    theta = float(modern.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"{file}: rope_scaling of type {kind!r} is not supported; only default and llama3 are")
    return theta, RopeScaling(
        factor=float(_require(scaling, "factor", file)),
        low_freq_factor=float(_require(scaling, "low_freq_factor", file)),
        high_freq_factor=float(_require(scaling, "high_freq_factor", file)),
        original_max_position=int(_require(scaling, "original_max_position_embeddings", file)),
    )


def backbone_from_hf(directory: str | Path) -> Backbone:
    """The shape that ``directory/config.json`` describes.

    Absent keys take the defaults of transformers' configuration class of the family. Raises ConfigError when the
    file is missing, is not JSON, is of another ``model_type`` or asks for arithmetic that is not supported.
    """
    file = Path(directory) / "config.json"
    try:
        config = json.loads(read_text(file))
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist; model.init must be `random` or a folder with config.json and safetensors files"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); download it again") from error
    try:
        return _shape_of(config, file)
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} describes no model ({error}); download it again") from error


def _shape_of(config: dict[str, Any], file: Path) -> Backbone:
    """The shape; raises TypeError, ValueError or AttributeError for values of another kind than transformers writes."""
    _check_supported(config, file)
    family = config["model_type"]
    heads = int(_require(config, "num_attention_heads", file))
    theta, scaling = _rope(config, file)
    return Backbone(
        family=family,
        hidden=int(_require(config, "hidden_size", file)),
        layers=int(_require(config, "num_hidden_layers", file)),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads", _KV_HEADS.get(family)) or heads),
        ffn=int(_require(config, "intermediate_size", file)),
        vocab=int(_require(config, "vocab_size", file)),
        head_dim=int(config.get("head_dim") or _HEAD_DIM.get(family, 0)),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_position=int(config.get("max_position_embeddings", _MAX_POSITION[family])),
        init_std=float(config.get("initializer_range", 0.02)),
        window=int(config.get("sliding_window", _WINDOW[family]) or 0) if family in _WINDOW else 0,
    )


def hf_config(
    shape: Backbone,
    *,
    dtype: str = "float32",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of ``shape``: what `backbone_from_hf` and transformers 4 and 5 read.

    ``dtype`` is torch's name of the number format of the weights (``float32``, ``bfloat16``).
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.kv_channels,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": shape.max_position,
        "initializer_range": shape.init_std,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": dtype,
        "transformers_version": version("transformers"),
        "use_cache": True,
    }
    of_family: dict[str, dict[str, Any]] = {
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False, "attention_bias": False},
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": {"sliding_window": shape.window or None},
    }
    config |= of_family[shape.family]
    if shape.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": shape.rope_scaling.factor,
            "low_freq_factor": shape.rope_scaling.low_freq_factor,
            "high_freq_factor": shape.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": shape.rope_scaling.original_max_position,
        }
    return config
