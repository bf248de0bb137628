"""`tawin-nemo doctor [--recipe FILE] [--quick]`: run the checks, print the table, say whether it can run."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.model.precision import FP8, named_precisions
from tawin_nemo.tools.doctor import gpus, machine, software
from tawin_nemo.tools.doctor import recipe as of_recipe
from tawin_nemo.tools.doctor.all_reduce import all_reduce
from tawin_nemo.tools.doctor.check import Check, Status, check, lines, ok, summary
from tawin_nemo.tools.doctor.probe import Found, probe
from tawin_nemo.util.errors import UserError
from tawin_nemo.util.launch import read_launch

FAILED = UserError.exit_code


def run_doctor(
    recipe_path: str | None,
    overrides: Sequence[str],
    *,
    launched: bool = False,
    quick: bool = False,
) -> tuple[dict[str, Any], int]:
    """(result for the last line on stdout, exit code): 0, or 2 when something fails; the table goes to stderr.

    ``launched``: this is one process of several, started by srun or torchrun. The first one on each machine runs all
    checks, the others only take part in the all-reduce; rank 0 prints the table, the others only their failures.
    ``quick`` leaves out the all-reduce, the disk's speed and the imports besides torch's.
    """
    recipe, checks = None, []
    if recipe_path or overrides:
        recipe, check_of_recipe = read_recipe(recipe_path, overrides)
        checks.append(check_of_recipe)
    local_rank = read_launch().local_rank if launched else 0
    found = probe(("torch",)) if quick or launched else probe()
    together = []
    if launched and not quick:  # first of all: later the others would wait for the first process's checks
        together.append(all_reduce(found, recipe.trainer.devices if recipe else 8, launched=True))
        found = probe() if local_rank == 0 else found
    if local_rank == 0:
        checks = [*machine_checks(recipe, found, quick=quick), *checks]
        checks += recipe_checks(recipe, found) if recipe else []
    if not (quick or launched):
        together.append(all_reduce(found, recipe.trainer.devices if recipe else 8, launched=False))
    checks += together
    failed = [item for item in checks if item.status == Status.FAILS]
    _print(checks, failed, asked=recipe_path or " ".join(overrides))
    result = {
        "can_run": not failed,
        "recipe": recipe_path or "",
        "host": socket.gethostname(),
        "failed": [item.name for item in failed],
        "warnings": [item.name for item in checks if item.status == Status.WARNING],
        "checks": [asdict(item) for item in checks],
    }
    return result, FAILED if failed else 0


def read_recipe(path: str | None, overrides: Sequence[str]) -> tuple[Recipe | None, Check]:
    """The recipe, if it can be loaded at all, and what there is to say about it."""
    loaded: list[Recipe] = []

    @check("recipe")
    def load() -> Check:
        from tawin_nemo.config.load import load_recipe

        loaded.append(load_recipe(path, overrides))
        return ok(f"{path or 'defaults'}{''.join(f' {item}' for item in overrides)}")

    found = load()
    return (loaded[0] if loaded else None), found


def machine_checks(recipe: Recipe | None, found: Found, *, quick: bool) -> Iterator[Check]:
    """Everything that can be said without a recipe; with one, its needs decide what is a failure."""
    report, limits = gpus.read_report(), machine.read_limits()
    nodes, processes, tensor_parallel, fp8, experiments = 1, 1, 1, False, False
    if recipe:
        nodes, processes = recipe.trainer.num_nodes, recipe.trainer.devices
        tensor_parallel = recipe.model.tensor_model_parallel_size
        fp8, experiments = not FP8.keys().isdisjoint(named_precisions(recipe).values()), bool(recipe.exp_manager)
    run_dir = run_dir_of(recipe)
    yield software.python()
    yield software.system()
    yield gpus.driver(report)
    yield software.library(found, "torch")
    yield software.cuda(found, report.driver)
    yield software.nccl(found)
    yield gpus.devices(found, report)
    yield gpus.health(report)
    yield gpus.topology(report, tensor_parallel)
    adapters = gpus.infiniband(nodes if found.torch.gpus else 1)
    yield adapters
    if not quick:
        yield software.library(found, "megatron.core")
        yield software.transformer_engine(found, needed=fp8)
        yield software.library(found, "transformers")
    yield software.apex()
    yield software.compiler(found)
    yield software.nemo(needed=experiments)
    yield software.packages()
    yield machine.cpus(limits, processes)
    yield machine.memory(limits)
    yield machine.shared_memory()
    yield machine.open_files()
    yield machine.locked_memory(rdma=adapters.status == Status.OK)
    yield machine.run_folder(run_dir, measure=not quick)
    yield machine.clock(run_dir)
    yield machine.host_name(nodes)
    yield machine.ports()


def recipe_checks(recipe: Recipe, found: Found) -> Iterator[Check]:
    """Whether this recipe can run here."""
    run_dir = run_dir_of(recipe)
    yield of_recipe.data(recipe)
    yield of_recipe.catalog_index(recipe)
    yield of_recipe.other_files(recipe)
    yield of_recipe.devices(recipe, found)
    if not of_recipe.uses_language_model(recipe):
        return
    yield of_recipe.pretrained(recipe)
    yield of_recipe.tokenizer(recipe)
    yield of_recipe.layout(recipe)
    yield of_recipe.precision(recipe, found)
    yield of_recipe.model_memory(recipe, found, machine.usable_memory(machine.read_limits()))
    yield of_recipe.checkpoint_disk(recipe, run_dir)


def run_dir_of(recipe: Recipe | None) -> Path:
    """Where the run would write; without a recipe the folder of all runs."""
    return Path(recipe.run_dir or f"runs/{recipe.name}") if recipe else Path("runs")


def _print(checks: Sequence[Check], failed: Sequence[Check], *, asked: str) -> None:
    if read_launch().rank == 0:
        print("\n".join([*lines(checks), summary(checks)]), file=sys.stderr, flush=True)
    for item in failed if read_launch().rank else failed[:1]:
        what = f"{asked} cannot run here" if asked else "nothing can be trained here"
        text = f"tawin-nemo doctor: {socket.gethostname()}: {what}: {item.name}: {item.value}; {item.remedy}"
        print(text, file=sys.stderr, flush=True)
