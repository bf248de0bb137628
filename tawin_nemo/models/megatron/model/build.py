"""From a backbone's shape to this rank's stage of a megatron-core ``GPTModel``, with layout-independent weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tawin_nemo.config.backbones import Backbone, stage_layers
from tawin_nemo.config.layout import Layout, check_shape, padded_vocab
from tawin_nemo.config.lora import check_lora
from tawin_nemo.config.schema import AS_MODEL, ModelConfig, Recipe
from tawin_nemo.models.megatron.model import precision, weight_init
from tawin_nemo.models.megatron.model.adapters import Adapters, add_adapters
from tawin_nemo.models.megatron.model.attention import PositionedRotary
from tawin_nemo.models.megatron.model.compiler import use_fused_functions
from tawin_nemo.models.megatron.model.embedding import RowEmbedding
from tawin_nemo.models.megatron.model.item_tokens import ItemTokens
from tawin_nemo.models.megatron.model.layer_spec import RMSNorm, layer_spec
from tawin_nemo.models.megatron.parallel.groups import collective_device, rollout_groups, training_groups
from tawin_nemo.util.errors import ConfigError

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class HiddenGPT(GPTModel):
    """``GPTModel`` whose forward ends with the final norm: it returns hidden states [S, B, D] on every stage.

    The head (``head.py``) then runs only on the rows whose log-probs are wanted. Under sequence parallelism each TP
    rank returns its part of S.
    """

    real_vocab: int  # vocabulary rows that count; the rest is padding up to a multiple of the TP size
    adapters: Adapters | None = None  # of ``model.lora``, once ``add_adapters`` has been called
    num_item_tokens: int = 0  # items that prompts may hold, on every stage
    item_tokens: ItemTokens | None  # of the first stage, once ``add_item_tokens`` has been called

    def _postprocess(self, hidden_states: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        return hidden_states


def _check(shape: Backbone, cfg: ModelConfig, section: str = "model") -> None:
    tp, pp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    if shape.vocab < 1:
        raise ConfigError(
            f"model.backbone={cfg.backbone}: the vocabulary size is not set; call backbones.with_vocab first"
        )
    check_shape(shape, Layout(tp, pp), name=cfg.backbone, section=section)
    check_lora(shape, cfg.lora)
    precision.check_model_supported(shape, cfg, section=section)


def model_config(shape: Backbone, cfg: ModelConfig, *, section: str = "model") -> TransformerConfig:
    """megatron's configuration of this backbone under this layout. Raises ConfigError for impossible combinations,
    naming the keys of the recipe's ``section``."""
    _check(shape, cfg, section)
    on_gpu = torch.cuda.is_available()
    dtype = parameter_dtype(cfg)
    tp, pp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    spread, uneven = stage_layers(shape.layers, pp), shape.layers % pp > 0
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=shape.ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,  # megatron then sums these norms' gradients over TP ranks, which hold other heads
        hidden_dropout=cfg.dropout,
        attention_dropout=cfg.dropout,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_in_first_pipeline_stage=spread[0] if uneven else None,
        num_layers_in_last_pipeline_stage=spread[-1] if uneven else None,
        sequence_parallel=cfg.sequence_parallel and tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Initial weights are written by init_weights; megatron only marks which tensors are sharded.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        init_method_std=shape.init_std,
        # Losses divide by global counts themselves: gradients are summed over data-parallel ranks, never averaged.
        calculate_per_token_loss=True,
        variable_seq_lengths=pp > 1,
        moe_token_dispatcher_type="alltoall",  # no experts here; megatron rejects its default with variable lengths
        batch_p2p_comm=on_gpu,
        deallocate_pipeline_outputs=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=use_fused_functions(),
        bias_activation_fusion=use_fused_functions(),
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **precision.config_fields(cfg),
        **_RECOMPUTE[cfg.recompute],
    )


def parameter_dtype(cfg: ModelConfig) -> torch.dtype:
    """The number format of a model's parameters: bf16 also under FP8, which quantises them in its passes."""
    return torch.float32 if cfg.precision == "fp32" else torch.bfloat16


def rollout_dtype(recipe: Recipe) -> torch.dtype | None:
    """The number format to which weights are converted for rollouts; None where they have that of training."""
    dtypes = [parameter_dtype(precision.in_precision(recipe.model, p)) for p in (AS_MODEL, recipe.rollout_precision)]
    return None if dtypes[0] == dtypes[1] else dtypes[1]


def _leave(weight: Tensor) -> None:
    """megatron's initialiser that does nothing: weights come from ``init_weights`` or from a checkpoint."""


def _block_spec(config: TransformerConfig, stage: int) -> TransformerBlockSubmodules:
    layers = [layer_spec(config)] * get_num_layers_to_build(config, pp_rank=stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def build_model(
    shape: Backbone, cfg: ModelConfig, *, seed: int, rollout_tp: int = 1, to_be_loaded: bool = False
) -> HiddenGPT:
    """This rank's pipeline stage, on this rank's device, in float32 (or bf16 for bf16 and fp8 precisions).

    Initial weights are a function of ``seed`` and the shape only, whatever the layout. With ``to_be_loaded`` only those
    of the vocabulary are drawn, some of which new tokens keep; the others are undefined until a file has filled them.
    The vocabulary is padded so that TP ``rollout_tp`` can divide it as well. ``parallel.initialize`` must have run.
    Raises ConfigError when the layout does not fit the shape or the precision the machine.
    """
    config = model_config(shape, cfg)
    rows = padded_vocab(shape, cfg.tensor_model_parallel_size, rollout_tp)
    model = _empty_model(shape, config, rows, training_groups())
    init_weights(model, shape, seed=seed, vocabulary_only=to_be_loaded)
    return model


def build_rollout_model(shape: Backbone, cfg: ModelConfig, tp: int, pp: int, wanted: str = AS_MODEL) -> HiddenGPT:
    """This rank's part of a model for rollouts, under TP ``tp`` x PP ``pp``; its weights are not initialised.

    ``cfg`` describes the model in training, which was built with ``rollout_tp=tp``; with ``cfg.lora`` both have
    adapters. ``wanted``: the precision of rollouts, where it differs from that of ``cfg``. Raises
    ConfigError as ``build_model``.
    """
    config = model_config(shape, _searching(cfg, tp, pp, wanted), section="rollout")
    rows = padded_vocab(shape, cfg.tensor_model_parallel_size, tp)
    model = _empty_model(shape, config, rows, rollout_groups(tp, pp)).eval()
    if cfg.lora.rank:
        add_adapters(model, shape, cfg.lora, seed=0, base={})
    return model.requires_grad_(False)


def check_rollout_model(shape: Backbone, cfg: ModelConfig, tp: int, pp: int, wanted: str = AS_MODEL) -> None:
    """Raises what ``build_rollout_model`` would raise, on a rank that does not build the model."""
    _check(shape, _searching(cfg, tp, pp, wanted), "rollout")


def build_search_model(shape: Backbone, model: GPTModel, cfg: ModelConfig) -> HiddenGPT:
    """A model for searches in the layout and process groups of ``model``, whose weights are to be shared with it.

    ``cfg`` describes ``model``, with the precision of the searches. Raises ConfigError as ``build_model``.
    """
    layout = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    config = model_config(shape, _searching(cfg, *layout, AS_MODEL), section="rollout")
    return _empty_model(shape, config, model.vocab_size, model.pg_collection).eval().requires_grad_(False)


def _searching(cfg: ModelConfig, tp: int, pp: int, wanted: str) -> ModelConfig:
    return replace(
        precision.in_precision(cfg, wanted), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        sequence_parallel=False, dropout=0.0, recompute="none",
    )  # fmt: skip


def _empty_model(
    shape: Backbone, config: TransformerConfig, vocab_rows: int, groups: ProcessGroupCollection
) -> HiddenGPT:
    stage = groups.pp.rank()
    model = HiddenGPT(
        config,
        _block_spec(config, stage),
        vocab_size=vocab_rows,
        max_sequence_length=shape.max_position,
        pre_process=stage == 0,
        post_process=stage == groups.pp.size() - 1,
        pg_collection=groups,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
    )
    model.real_vocab = shape.vocab
    model.item_tokens = None  # no class attribute, which would hide the module
    model.rotary_pos_emb = PositionedRotary(shape)
    if model.pre_process:  # megatron names the class in its own code; only how gradients travel differs
        model.embedding.word_embeddings.__class__ = RowEmbedding
    return model


def global_name(model: GPTModel, name: str) -> str:
    """The parameter's name in the whole model: global layer numbers from 0, a tied head named like the embedding."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


@torch.no_grad()
def init_weights(model: GPTModel, shape: Backbone, *, seed: int, vocabulary_only: bool = False) -> None:
    """Draw every whole matrix from a generator seeded by (seed, global name), keeping only this rank's shard of it.

    Normal(0, init_std); the projections that write into the residual stream are divided by sqrt(2 * layers); biases
    are 0, norms 1, vocabulary padding 0.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        key, rank = global_name(model, name), model.pg_collection.tp.rank()
        if vocabulary_only and key not in _VOCABULARY:
            continue
        rows, columns = full_shape(model, parameter)
        std = shape.init_std
        if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= (2 * shape.layers) ** 0.5
        pieces = weight_init.shard_pieces(name, parameter, sharded_axis(parameter), rank, model.pg_collection.tp.size())
        whole = (shape.vocab if key in _VOCABULARY else rows, columns)
        weight_init.fill(parameter, pieces, whole, std=std, key=f"{seed}/{key}")


def sharded_axis(parameter: Tensor) -> int | None:
    """The axis along which the parameter is sharded over TP ranks; None: every rank has all of it."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def full_shape(model: GPTModel, parameter: Tensor) -> list[int]:
    """The shape of the whole parameter, of which TP ranks hold shards."""
    sizes, axis = list(parameter.shape), sharded_axis(parameter)
    if axis is not None:
        sizes[axis] *= model.pg_collection.tp.size()
    return sizes


def own_shard(full: Tensor, name: str, model: GPTModel, parameter: Tensor) -> Tensor:
    """This TP rank's shard of ``full``. The gated ``linear_fc1`` has a gate and an up half; each half is split."""
    axis = sharded_axis(parameter)
    if axis is None:
        return full
    tp, rank = model.pg_collection.tp.size(), model.pg_collection.tp.rank()
    if name.endswith(("linear_fc1.weight", "linear_fc1.lora.b")):
        return torch.cat([half.chunk(tp, dim=axis)[rank] for half in full.chunk(2, dim=axis)], dim=axis)
    return full.chunk(tp, dim=axis)[rank]


def model_summary(model: GPTModel) -> dict[str, Any]:
    """Layers and parameters of this rank's part of the model, and the rank's device, for ``layout.json``."""
    device = collective_device()
    return {
        "layers": len(model.decoder.layers),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
