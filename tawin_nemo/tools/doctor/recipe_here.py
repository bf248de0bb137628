"""Can this machine run this recipe? Data, layout, precision, memory, disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tawin_nemo.catalog.semantic_ids import find_codes
from tawin_nemo.config.backbones import Backbone, backbone, stage_layers
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.model.fused import find_apex
from tawin_nemo.models.megatron.model.precision import VERIFIED, Machine, lack
from tawin_nemo.tools.doctor.check import Check, absent, check, fails, gib, ok, warning
from tawin_nemo.tools.doctor.place import existing
from tawin_nemo.tools.doctor.probe import Found

AMPERE = (8, 0)
_CPU_FLAGS = ("amx_bf16", "avx512_bf16")


def shape_of(recipe: Recipe) -> Backbone:
    """The model's shape as far as the recipe tells (the vocabulary may still grow). Raises ConfigError."""
    init = recipe.model.init
    return backbone(recipe.model.backbone) if init == "random" else backbone_from_hf(init)


def parameters(shape: Backbone) -> int:
    """Parameters; an embedding whose size the tokenizer decides counts nothing."""
    return shape.body_parameters + shape.vocab * shape.hidden * (1 if shape.tied else 2)


def uses_language_model(recipe: Recipe) -> bool:
    return recipe.baseline.model == "off"


@check("data")
def data(recipe: Recipe) -> Check:
    from tawin_nemo.data.interactions import MANIFEST, read_manifest
    from tawin_nemo.data_prep.prepare import detect

    wanted, root = recipe.data.dataset, Path(recipe.data.root)
    if wanted == "synthetic":
        return ok("generated")
    if not recipe.data.root:
        return fails(f"data.dataset={wanted} but data.root is empty", "set data.root=DIR, or data.dataset=synthetic")
    if not root.is_dir():
        return fails(f"data.root={root} is not a folder", "name the folder that holds the data")
    named = [root / name for name in (recipe.prepare.reviews, recipe.prepare.metadata) if name]
    if wanted in ("amazon", "yelp") and len(named) == 2:
        found, files = wanted, named
    else:
        found = detect(root)
        files = [path for path in sorted(root.iterdir()) if path.is_file()]
    if found == "prepared" and wanted in ("auto", "prepared"):
        files = [root / MANIFEST, *(root / name for name in read_manifest(root)["files"])]
    for path in files:
        with path.open("rb") as file:  # an OSError names the file
            file.read(1)
    markers = {"prepared": MANIFEST, "inter": "*.train.inter"}
    if wanted not in ("auto", found) and not any(root.glob(markers.get(wanted, MANIFEST))):
        return fails(f"{root} holds {found}, the recipe says data.dataset={wanted}", f"set data.dataset={found}")
    return ok(f"{root}: {found}, {len(files)} files")


@check("catalog.index")
def catalog_index(recipe: Recipe) -> Check:
    if recipe.catalog.kind != "sid":
        return absent("items are titles")
    path = find_codes(Path(recipe.data.root), recipe.catalog.index)
    codes = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(codes, dict) or not codes:
        return fails(f"{path} is not a JSON object", "it must be {item: [codes]}, as RQ-VAE tools write it")
    return ok(f"{path}: {len(codes)} items")


@check("other files")
def other_files(recipe: Recipe) -> Check:
    """start, checkpoint, rl.reward_source."""
    named = {"start": recipe.start, "checkpoint": recipe.checkpoint, "rl.reward_source": recipe.rl.reward_source}
    given = {key: Path(value) for key, value in named.items() if value}
    for key, path in given.items():
        if not path.exists():
            return fails(f"{key}={path} is not there", f"set {key} to an existing path, or leave it empty")
    return ok(", ".join(f"{key}={path}" for key, path in given.items())) if given else absent("none named")


@check("layout")
def layout(recipe: Recipe) -> Check:
    """Sizes of the model that tensor and pipeline parallelism must divide, in training and in rollouts."""
    m, training, apart = recipe.model, recipe.training_processes, recipe.rollout.devices
    tp, pp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    found = f"{training} processes{' train' if apart else ''} = TP {tp} x PP {pp} x DP {training // (tp * pp)}"
    sections = {"model": (tp, pp)}
    if apart or recipe.rollout_layout != (tp, pp):
        sections["rollout"] = tp, pp = recipe.rollout_layout
        where = f"{apart} processes only search =" if apart else "rollouts"
        found += f"; {where} TP {tp} x PP {pp} x DP {(apart or training) // (tp * pp)}"
    for section, sizes in sections.items():
        wrong = _undivided(shape_of(recipe), section, *sizes)
        if wrong is not None:
            return wrong
    return ok(found)


def _undivided(shape: Backbone, section: str, tp: int, pp: int) -> Check | None:
    """What a section's sizes do not divide; None = they fit."""
    divided = {"attention heads": shape.heads, "key-value heads": shape.kv_heads, "FFN width": shape.ffn}
    for what, size in divided.items():
        if size % tp:
            fitting = [n for n in range(1, shape.kv_heads + 1) if not any(s % n for s in divided.values())]
            return fails(
                f"{section}.tensor_model_parallel_size={tp} does not divide the {size} {what}",
                f"use one of {', '.join(map(str, fitting))}",
            )
    if not stage_layers(shape.layers, pp):
        fitting = [n for n in range(1, shape.layers + 1) if stage_layers(shape.layers, n)]
        return fails(
            f"{section}.pipeline_model_parallel_size={pp}: {shape.layers} layers cannot be spread over so many stages",
            f"use one of {', '.join(map(str, fitting))}",
        )
    return None


@check("devices")
def devices(recipe: Recipe, found: Found) -> Check:
    nodes, wanted, gpus = recipe.trainer.num_nodes, recipe.trainer.devices, len(found.torch.gpus)
    allotted = os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("SLURM_NNODES", ""))
    if allotted.isdigit() and int(allotted) != nodes:
        return fails(f"trainer.num_nodes={nodes}, the job has {allotted}", f"set trainer.num_nodes={allotted}")
    if gpus and wanted > gpus:
        return fails(
            f"trainer.devices={wanted}, but there are {gpus} GPUs", f"set trainer.devices={gpus}, or ask for more GPUs"
        )
    where = f"{gpus} GPUs" if gpus else "CPU with gloo"
    if nodes > 1 and not allotted and "RANK" not in os.environ:
        return warning(
            f"{nodes} nodes x {wanted} processes", "start it on every node: srun (slurm/README.md) or torchrun --nnodes"
        )
    if gpus > wanted:
        return warning(f"{wanted} of {gpus} GPUs", f"the others stay idle: set trainer.devices={gpus} to use all")
    return ok(f"{wanted} per node, on {where}")


@check("model.precision")
def precision(recipe: Recipe, found: Found) -> Check:
    wanted, gpus = recipe.model.precision, found.torch.gpus
    if wanted == "fp32":
        return ok("fp32")
    lowest = min((gpu.capability for gpu in gpus), default=None)
    if wanted == "bf16":
        if lowest is None:
            flags = _cpu_flags()
            if flags:
                return ok(f"bf16, CPU with {', '.join(flags)}")
            return warning("bf16, but the CPU has no bf16 instructions", "model.precision=fp32 is faster here")
        if lowest < AMPERE:
            return warning(f"bf16 on {gpus[0].name}", "GPUs before Ampere emulate it: use model.precision=fp32")
        return ok("bf16")
    engine = found.library("transformer_engine.pytorch")
    name = min(gpus, key=lambda gpu: gpu.capability).name if gpus else ""
    apex = find_apex()
    foreign = apex.folder if apex.foreign else ""
    lacking = lack(wanted, Machine(lowest, name, found.torch.cuda, engine.version, engine.error, foreign))
    if lacking is not None:
        return fails(lacking.reason, f"model.precision: {lacking.remedy}")
    if wanted not in VERIFIED:
        return warning(f"{wanted}, Transformer Engine {engine.version}", "not verified on hardware: watch its losses")
    return ok(f"{wanted}, Transformer Engine {engine.version}")


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    present = set(text.split())
    return [flag for flag in _CPU_FLAGS if flag in present]


def least_training_bytes(recipe: Recipe, count: int) -> float:
    """Bytes that one process that trains cannot do without: weights, float32 gradients, its share of the Adam state.

    float32: 4 + 4 + 8 bytes per parameter; bf16 and FP8: 2 + 4, and 12 with the float32 copy of the weights. The last
    term is shared over data-parallel ranks by the distributed optimizer. Activations, caches, the reference and the
    vocabulary of a catalog come on top (`tawin-nemo plan` has them).
    """
    m, t = recipe.model, recipe.trainer
    ranks = m.tensor_model_parallel_size * m.pipeline_model_parallel_size
    replicas = max(1, recipe.training_processes // ranks) if t.distributed_optimizer else 1
    kept, shared = (8, 8) if m.precision == "fp32" else (6, 12)
    return count / ranks * (kept + shared / replicas)


def least_machine_bytes(recipe: Recipe, count: int) -> float:
    """The same of all processes of one machine together, on average; ranks that only search hold weights alone."""
    tp, pp = recipe.rollout_layout
    searching = count / (tp * pp) * (4 if recipe.model.precision == "fp32" else 2)
    job = recipe.training_processes * least_training_bytes(recipe, count) + recipe.rollout.devices * searching
    return job / recipe.trainer.num_nodes


@check("memory for the model")
def model_memory(recipe: Recipe, found: Found, host_bytes: int) -> Check:
    """A lower bound against the smallest GPU, or against this machine's memory for all its processes together."""
    count, gpus = parameters(shape_of(recipe)), found.torch.gpus
    least = least_training_bytes(recipe, count) if gpus else least_machine_bytes(recipe, count)
    there = min((gpu.memory_bytes for gpu in gpus), default=host_bytes)
    value = f"{count / 1e6:.1f} M parameters: at least {gib(least)} of {gib(there)} per {'GPU' if gpus else 'machine'}"
    remedy = "more devices, a larger model.tensor_model_parallel_size, or a smaller model: see tawin-nemo plan"
    if least > there:
        return fails(value, remedy)
    if least > 0.7 * there:
        return warning(f"{value}, without activations", remedy)
    return ok(value)


def checkpoint_bytes(recipe: Recipe, count: int) -> int:
    """One training checkpoint: weights, float32 weights of the optimizer, two moments (float32)."""
    return count * (16 if recipe.model.precision == "fp32" else 14)


@check("disk for checkpoints")
def checkpoint_disk(recipe: Recipe, run_dir: Path) -> Check:
    """Every stage keeps ``keep_last`` checkpoints and the best one; one more exists while it is written."""
    free_bytes = shutil.disk_usage(existing(run_dir)).free
    one = checkpoint_bytes(recipe, parameters(shape_of(recipe)))
    compare, learns = recipe.compare, recipe.rl.enabled
    stages = (
        recipe.sft.enabled + learns + (recipe.sft.enabled and (compare.sft_all + (learns and compare.sft_continued)))
    )
    stages += recipe.preference.enabled
    kept = stages * (recipe.trainer.keep_last + recipe.trainer.keep_best)
    value = (
        f"{gib(one)} each, up to {kept} kept: {gib(one * (kept + 1))}; {gib(free_bytes)} free at {existing(run_dir)}"
    )
    if free_bytes < 2 * one:
        return fails(value, "set run_dir= to a larger disk")
    if free_bytes < one * (kept + 1):
        return warning(value, "set run_dir= to a larger disk, or lower trainer.keep_last")
    return ok(value)
