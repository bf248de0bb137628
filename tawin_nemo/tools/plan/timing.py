"""Step times from FLOPs and a stated MFU, with what a search must at least take to read the weights and what an update
must at least take to exchange gradients and weights. Collectives inside a model (TP, PP) are the MFU's business."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tawin_nemo.config.backbones import Backbone, FlopCount, stage_layers
from tawin_nemo.config.gpus import NODE, Gpu
from tawin_nemo.config.layout import Layout, rollout_layout
from tawin_nemo.config.lora import training_passes
from tawin_nemo.config.schema import LoraConfig, Recipe, TrainerConfig
from tawin_nemo.tools.plan.memory import micro_batches, stage_parameters, trained_parameters
from tawin_nemo.tools.plan.work import (
    Lengths,
    preference_pass,
    preference_step_work,
    rl_pass,
    rl_step_work,
    search_space,
    sft_pass,
    sft_step_work,
)

#: Model FLOP utilisation that is assumed where none is given. Megatron-LM's authors report 0.41 to 0.48 on H100s for
#: models of 2B parameters and more with long rows and fused kernels; rows here are a few thousand tokens and norms,
#: RoPE and attention blocks are separate kernels, so it is put lower. Not measured: set mfu= to what timings.jsonl has.
DEFAULT_MFU = 0.30
#: Kernels launched by a forward pass of a search, by a scoring pass, and by forward and backward of a training pass: in
#: each decoder layer, and besides; by one step of a search over all beams, with the log-probs that it reads. Counted on
#: a pretended CUDA device (tests/simcuda/README.md); fused functions launch a few fewer.
SEARCH_LAUNCHES, SCORE_LAUNCHES, TRAINING_LAUNCHES, SELECT_LAUNCHES = (16, 30), (24, 46), (81, 160), 29
#: Host time of one launch from Python. An assumption: 6 to 10 microseconds are usual.
LAUNCH_S = 8e-6
#: Share of a training pass without recomputation that is its backward pass.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class StepTime:
    """One optimizer step: ``flops`` over all GPUs (useful ones, none repeated), ``seconds`` by phase."""

    flops: float
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Rates:
    """What the GPUs of one replica do together."""

    shape: Backbone
    layout: Layout
    gpu: Gpu
    precision: str
    mfu: float
    recompute: str
    trainer: TrainerConfig = TrainerConfig()
    lora: LoraConfig = LoraConfig()

    def forward(self, work: FlopCount) -> float:
        """Seconds of one forward pass of the work of one replica, without the floor of its launches."""
        peak = self.gpu.peak_flops(self.precision) * self.layout.model_ranks
        return work.forward_flops(self.shape) / (self.mfu * peak)

    def launches(self, of: tuple[int, int]) -> float:
        """Seconds that the host of one stage takes to launch a pass: kernels of each layer, and besides."""
        per_layer, besides = of
        return (max(stage_layers(self.shape.layers, self.layout.pp)) * per_layer + besides) * LAUNCH_S

    def scoring(self, work: FlopCount, micro: int) -> float:
        """Seconds of ``micro`` forward passes with the log-probs of their tokens; 0 without work."""
        return max(self.forward(work), micro * self.launches(SCORE_LAUNCHES)) if work.tokens else 0.0

    def training(self, work: FlopCount, micro: int) -> float:
        """Seconds of forward and backward; full recomputation runs forward twice, and a pipeline of P stages with m
        micro-batches idles (P - 1) / m of its time (arXiv 2104.04473, Section 2.2); its largest stage sets the pace."""
        return self.training_pass(work, micro) * (micro + self.layout.pp - 1)

    def training_pass(self, work: FlopCount, micro: int) -> float:
        """Seconds that the largest stage takes for forward and backward of one of ``micro`` micro-batches."""
        passes, stages = training_passes(self.lora) + (1.0 if self.recompute == "full" else 0.0), self.layout.pp
        pace = max(stage_layers(self.shape.layers, stages)) * stages / self.shape.layers
        computing = passes * pace * self.forward(work) / micro
        return max(computing, self.launches(TRAINING_LAUNCHES))

    def search(self, work: FlopCount, levels: int) -> float:
        """Seconds of a search: its FLOPs through all stages in turn. Not less than reading the weights once for the
        prompts and once per level of the tree, nor than the host takes to launch these passes and select beams."""
        read = max(stage_parameters(self.shape, self.layout, stage) for stage in range(self.layout.pp))
        weight_bytes = read * (4 if self.precision == "fp32" else 2) * self.layout.pp
        floor = (1 + levels) * weight_bytes / (self.gpu.bandwidth_gb_s * 1e9)
        host = (1 + levels) * self.launches(SEARCH_LAUNCHES) * self.layout.pp + levels * SELECT_LAUNCHES * LAUNCH_S
        return max(self.forward(work) * self.layout.pp, floor, host)

    def exchange(self, training_pass: float = 0.0, *, gather_behind: float | None = None) -> float:
        """Seconds to sum gradients over the replicas and to hand the new weights back: a ring moves
        (DP - 1) / DP of both through every rank. At the data sheet's rate of the slowest link.
        Between nodes the rings of NCCL use the network adapters of all ranks that a replica group has in a node.

        ``training_pass``: seconds of the last micro-batch, behind whose backward pass ``trainer.overlap_grad_reduce``
        hides the sum; ``gather_behind``: seconds of computing that ``trainer.overlap_param_gather`` hides the gather
        behind (None: the forward pass of such a micro-batch). One bucket of each is never hidden.
        """
        count, link = self._exchanged(), self._link()
        weight = 4 if self.precision == "fp32" else 2
        gradient = 4 if self.trainer.grad_reduce_in_fp32 else weight
        share = (self.layout.dp - 1) / self.layout.dp / (link * 1e9)
        behind = training_pass * (1 - BACKWARD) if gather_behind is None else gather_behind
        return self._left(share * count * gradient, training_pass * BACKWARD, self.trainer.overlap_grad_reduce) + (
            self._left(share * count * weight, behind, self.trainer.overlap_param_gather)
        )

    def _left(self, seconds: float, computing: float, overlapped: bool) -> float:
        """What computing does not hide of a collective in buckets of megatron-core's size."""
        buckets = max(1.0, self._exchanged() / max(40e6, 1e6 * self.layout.dp))
        return max(seconds / buckets, seconds - computing) if overlapped else seconds

    def _exchanged(self) -> int:
        """Trained parameters of the rank that has most."""
        stages = range(self.layout.pp)
        return max(trained_parameters(self.shape, self.lora, self.layout, stage) for stage in stages)

    def _link(self) -> float:
        """GB/s of one rank's share of the slowest link between replicas."""
        if self.layout.dp * self.layout.model_ranks <= NODE:
            return self.gpu.nvlink_gb_s
        return min(self.gpu.nvlink_gb_s, self.gpu.network_gb_s * max(1, NODE // self.layout.model_ranks))


def sft_step(recipe: Recipe, lengths: Lengths, rates: Rates) -> StepTime:
    """One SFT step; the replica with most rows decides."""
    rows = recipe.sft.global_batch_size
    mine = -(-rows // rates.layout.dp)
    work = sft_pass(recipe, lengths)
    micro = micro_batches(mine, work.keys, work.tokens)
    total = sft_step_work(recipe, lengths, rates.shape.vocab, rows)
    updated = sft_step_work(recipe, lengths, rates.shape.vocab, mine)
    exchange = rates.exchange(rates.training_pass(updated, micro))
    flops = training_passes(rates.lora) * total.forward_flops(rates.shape)
    return StepTime(flops, _counted({"update": rates.training(updated, micro), "exchange": exchange}))


def preference_step(recipe: Recipe, lengths: Lengths, rates: Rates) -> StepTime:
    """One step of preference optimisation; the replica with most rows decides. Searches for rejected items
    (``preference.negatives=beam|self_play``) are not counted."""
    cfg, vocab = recipe.preference, rates.shape.vocab
    mine = -(-cfg.global_batch_size // rates.layout.dp)
    work = preference_pass(recipe, lengths)
    passes = 1.0 if cfg.uses_reference and recipe.reference.mode != "off" else 0.0
    passes += 1.0 if cfg.algorithm == "alpha_dpo" else 0.0
    forward = preference_step_work(recipe, lengths, vocab, mine)
    micro = micro_batches(mine, work.keys, work.tokens)
    seconds = {
        "reference": passes * rates.forward(forward),
        "update": rates.training(forward, micro),
        "exchange": rates.exchange(rates.training_pass(forward, micro)),
    }
    total = preference_step_work(recipe, lengths, vocab, cfg.global_batch_size).forward_flops(rates.shape)
    return StepTime((training_passes(rates.lora) + passes) * total, _counted(seconds))


def rl_step(recipe: Recipe, lengths: Lengths, rates: Rates) -> StepTime:
    """One RL step; the replica with most prompts decides. Exchanging a swapped reference, and sending weights to the
    ranks that search, are not counted. With ``rollout.ahead`` only what a rollout takes beyond the rest is a phase.
    The next rollout needs all weights at once, so that nothing hides the gather of a step's last update."""
    prompts = recipe.rl.prompts_per_step
    total = rl_step_work(recipe, lengths, rates.shape.vocab, prompts)
    mine = rl_step_work(recipe, lengths, rates.shape.vocab, -(-prompts // rates.layout.dp))
    searching = replace(rates, layout=rollout_layout(recipe, rates.layout), precision=recipe.rollout_precision)
    rolled_out = rl_step_work(recipe, lengths, rates.shape.vocab, -(-prompts // searching.layout.dp)).rollout
    work = rl_pass(recipe, lengths)
    micro = micro_batches(-(-prompts // rates.layout.dp), work.keys, work.tokens)
    forwards = total.rollout + total.reference + total.scoring
    flops = forwards.forward_flops(rates.shape)
    flops += training_passes(rates.lora) * total.updates * total.update.forward_flops(rates.shape)
    last = rates.training_pass(mine.update, micro)
    seconds = {
        "rollout": searching.search(rolled_out, lengths.run(search_space(recipe))),
        "reference": rates.scoring(mine.reference, micro),
        "scoring": rates.scoring(mine.scoring, micro),
        "update": mine.updates * rates.training(mine.update, micro),
        "exchange": (mine.updates - 1) * rates.exchange(last) + rates.exchange(last, gather_behind=0.0),
    }
    if recipe.rollout.ahead:
        rest = sum(value for phase, value in seconds.items() if phase != "rollout")
        seconds["rollout"] = max(0.0, seconds["rollout"] - rest)
    return StepTime(flops, _counted(seconds))


def _counted(seconds: dict[str, float]) -> dict[str, float]:
    return {phase: value for phase, value in seconds.items() if value}
