"""Can this machine run this recipe? Data, pretrained weights, layout, precision, memory, disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tawin_nemo.catalog.semantic_ids import find_codes
from tawin_nemo.config.backbones import Backbone, backbone
from tawin_nemo.config.layout import Layout, Problem, rollout_layout, shape_problems, training_layout
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.model.fused import find_apex
from tawin_nemo.models.megatron.model.precision import FP8, VERIFIED, Machine, named_precisions, unsupported_reason
from tawin_nemo.tools.doctor.check import Check, absent, check, fails, gib, ok, warning
from tawin_nemo.tools.doctor.machine import existing
from tawin_nemo.tools.doctor.probe import Found
from tawin_nemo.tools.plan.memory import least_machine_bytes, least_rank_bytes, parameters
from tawin_nemo.util.errors import CheckpointError
from tawin_nemo.util.hub import is_hub_name, local_folder
from tawin_nemo.util.imports import is_import_path

AMPERE = (8, 0)
_CPU_FLAGS = ("amx_bf16", "avx512_bf16")


def shape_of(recipe: Recipe) -> Backbone:
    """The model's shape as far as the recipe tells (the vocabulary may still grow). Raises ConfigError."""
    init, revision = recipe.model.init, recipe.model.revision
    return backbone(recipe.model.backbone) if init == "random" else backbone_from_hf(local_folder(init, revision))


def uses_language_model(recipe: Recipe) -> bool:
    return recipe.baseline.model == "off"


@check("data")
def data(recipe: Recipe) -> Check:
    from tawin_nemo.data.interactions import MANIFEST, read_manifest
    from tawin_nemo.data_prep.sources import detect, source_files

    wanted, root = recipe.data.dataset, Path(recipe.data.root)
    if wanted == "synthetic":
        return ok("generated")
    if not recipe.data.root:
        return fails(f"data.dataset={wanted} but data.root is empty", "set data.root=DIR, or data.dataset=synthetic")
    if not root.is_dir():
        return fails(f"data.root={root} is not a folder", "name the folder that holds the data")
    named = [root / name for name in (recipe.prepare.reviews, recipe.prepare.metadata) if name]
    if is_import_path(wanted):
        found, files = wanted, [path for path in sorted(root.iterdir()) if path.is_file()]
    elif wanted in ("amazon", "yelp") and len(named) == 2:
        found, files = wanted, named
    elif wanted in ("table", "split_csv", "parquet"):
        found, files = wanted, source_files(wanted, root, recipe.prepare)
    else:
        found = detect(root, recipe.prepare)
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
    if not recipe.catalog.index:  # only retrain may leave it empty
        return absent("retrain makes the codes")
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


@check("model.init")
def pretrained(recipe: Recipe) -> Check:
    """Every file of the pretrained weights is there, whole, and holds the tensors that config.json and index promise.
    Headers are read, weights are not."""
    if recipe.model.init == "random":
        return absent("random initial weights")
    folder = local_folder(recipe.model.init, recipe.model.revision)
    if not folder.is_dir() and is_hub_name(recipe.model.init):
        return warning(f"{folder} is not here yet", "train downloads it, if the Hugging Face hub is reachable")
    if not folder.is_dir():
        return fails(f"{folder} is not a folder", "set model.init to the folder with config.json, or to random")
    from tawin_nemo.models.megatron.hf.files import HfWeights

    shape = backbone_from_hf(folder)
    try:
        weights = HfWeights(folder)
        weights.check_files()
        weights.check_names(shape)
    except CheckpointError as error:
        reason, _, remedy = str(error).rpartition("; ")
        return fails(reason, remedy)
    files = set(weights.files.values())
    size = sum((folder / name).stat().st_size for name in files)
    return ok(f"{folder}: {shape.family}, {shape.layers} layers of {shape.hidden}, {len(files)} files, {gib(size)}")


@check("tokenizer")
def tokenizer(recipe: Recipe) -> Check:
    kind, init = recipe.data.tokenizer, recipe.model.init
    if kind in ("bpe", "codes") and init != "random":
        return fails(f"data.tokenizer={kind} beside model.init={init}", "pretrained weights need data.tokenizer=auto")
    if kind == "auto" and init == "random":
        return absent("made from the catalog")
    if kind in ("bpe", "codes"):
        return absent(f"data.tokenizer={kind} is made from the catalog")
    folder = local_folder(init, recipe.model.revision) if kind == "auto" else Path(kind).expanduser()
    file = folder / "tokenizer.json"
    if kind == "auto" and is_hub_name(init) and not folder.is_dir():
        return absent(f"downloaded with model.init={init}")
    if not file.is_file():
        return fails(f"no {file}", "copy the model's tokenizer there, or set data.tokenizer to a folder that has one")
    from tokenizers import Tokenizer

    try:
        size = Tokenizer.from_file(str(file)).get_vocab_size()
    except Exception as error:  # the library raises bare Exception
        return fails(f"{file} cannot be read ({error})", "download it again")
    return ok(f"{file}: {size} tokens")


@check("layout")
def layout(recipe: Recipe) -> Check:
    """Sizes of the model that tensor and pipeline parallelism must divide, in training and in rollouts."""
    training, only_search = training_layout(recipe), recipe.rollout.devices
    searching = rollout_layout(recipe, training)
    value = f"{recipe.training_processes} processes{' train' if only_search else ''} = {_sizes(training)}"
    if searching is not training:
        value += f"; {f'{only_search} processes only search =' if only_search else 'rollouts'} {_sizes(searching)}"
    for problem in _layout_problems(recipe):
        return fails(str(problem), f"use one of {', '.join(map(str, problem.possible))}")
    return ok(value)


def _sizes(layout: Layout) -> str:
    return f"TP {layout.tp} x PP {layout.pp} x DP {layout.dp}"


def _layout_problems(recipe: Recipe) -> list[Problem]:
    """Why the recipe's model cannot be divided as the recipe says, in training or in rollouts; empty = it can."""
    shape, training = shape_of(recipe), training_layout(recipe)
    searching = rollout_layout(recipe, training)
    rollouts = [] if searching is training else shape_problems(shape, searching, "rollout")
    return [*shape_problems(shape, training), *rollouts]


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
    """Of the precisions of the recipe's parts, an FP8 one is looked at first: it needs most."""
    parts = sorted(named_precisions(recipe).items(), key=lambda part: part[1] not in FP8)
    (key, wanted), gpus = parts[0], found.torch.gpus
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
    machine = Machine(lowest, name, found.torch.cuda, engine.version, engine.error, foreign)
    unsupported = unsupported_reason(wanted, machine)
    if unsupported is not None:
        return fails(unsupported.reason, f"{key}: {unsupported.remedy}")
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


@check("memory for the model")
def model_memory(recipe: Recipe, found: Found, host_bytes: int) -> Check:
    """Weights, gradients and optimizer of the planner's estimate, against the smallest GPU, or against this machine's
    memory for all its processes together. Activations and caches come on top (`tawin-nemo plan` has them)."""
    if _layout_problems(recipe):
        return absent("needs a layout that is possible")
    shape, gpus = shape_of(recipe), found.torch.gpus
    least = (least_rank_bytes if gpus else least_machine_bytes)(shape, recipe)
    there = min((gpu.memory_bytes for gpu in gpus), default=host_bytes)
    value = (
        f"{parameters(shape) / 1e6:.1f} M parameters: at least {gib(least)} of {gib(there)} per "
        f"{'GPU' if gpus else 'machine'}"
    )
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
    kept = stages * (recipe.trainer.keep_last + recipe.trainer.keep_best) + compare.zero_shot
    value = (
        f"{gib(one)} each, up to {kept} kept: {gib(one * (kept + 1))}; {gib(free_bytes)} free at {existing(run_dir)}"
    )
    if free_bytes < 2 * one:
        return fails(value, "set run_dir= to a larger disk")
    if free_bytes < one * (kept + 1):
        return warning(value, "set run_dir= to a larger disk, or lower trainer.keep_last")
    return ok(value)
