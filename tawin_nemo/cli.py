"""The command line: ``tawin-nemo VERB [--recipe FILE] [key=value ...]``.

Heavy imports happen inside the verbs, so ``--help`` answers at once. The last line on stdout of a verb is one JSON
object with its result; everything for people goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tawin_nemo.util.cuda_defaults import set_cuda_defaults
from tawin_nemo.util.errors import REFUSED, ConfigError, TawinError
from tawin_nemo.util.launch import is_launched, read_launch

EXAMPLES = """\
examples:
  tawin-nemo prepare  --recipe recipes/quickstart.yaml
  tawin-nemo tokenize --recipe recipes/quickstart.yaml semantic_ids.method=constrained
  tawin-nemo train    --recipe recipes/quickstart.yaml rl.tawin.target_k=5 seed=1
  tawin-nemo train    --recipe recipes/industrial_sid_cpu.yaml data.root=DIR --dry-run
  tawin-nemo evaluate --recipe recipes/quickstart.yaml checkpoint=runs/quickstart/rl eval.beams=100
  tawin-nemo generate --recipe recipes/quickstart.yaml checkpoint=runs/quickstart/rl 'generate.history=[3,17]'
  tawin-nemo convert  --recipe recipes/quickstart.yaml checkpoint=runs/quickstart/rl convert.output=export
  tawin-nemo retrain  --recipe recipes/quickstart.yaml retrain.root=production retrain.date=2018-06-30
  tawin-nemo study    --recipe recipes/studies/smoke.yaml --dry-run
  tawin-nemo serve    --recipe recipes/quickstart.yaml checkpoint=runs/quickstart/rl serve.port=8000
  tawin-nemo doctor   --recipe recipes/quickstart.yaml
  tawin-nemo plan     --recipe recipes/tawin_qwen7b.yaml --gpus 32 --gpu h800
  tawin-nemo keys rl.tawin        every recipe key below rl.tawin with its meaning, limits and default

Running the same train command again continues a stopped run. Exit codes: 0 done, 2 a mistake you can mend (the
message says how), 75 out of trainer.max_time, or stopped by SIGTERM or SIGUSR1 after a save (run it again), 1 a fault
(with its traceback), 3 retrain's gate refused the model: what is published stays.
"""

VERBS = {
    "prepare": "raw reviews -> 5-core, chronological samples in Parquet, with manifest and statistics",
    "tokenize": "item texts -> semantic IDs: vectors, codes, index.json for catalog.index, report and picture",
    "train": "SFT, then TAWin reinforcement learning, evaluation and report.html (resumes by itself)",
    "evaluate": "Recall@K and NDCG@K of a checkpoint on valid and test",
    "generate": "recommendations for some histories, as catalog items",
    "convert": "a checkpoint -> Hugging Face directory (import: model.init=DIR)",
    "retrain": "a night: prepare, train from the published model, export, gate on valid, publish (retrain.root=DIR)",
    "serve": "recommendations over HTTP: a data plane for users, a control plane for weights and catalog",
    "study": "arms x seeds of one recipe, one process per run, then paired tests, tables and plots (study --help)",
    "plan": "memory per GPU, step time and the best TP/PP/DP of a recipe on a cluster, without one (plan --help)",
    "simulate": "which WPAUC window goes with Recall@K: Figure 3 as PNG and JSON (trials= seed= output=, no recipe)",
    "doctor": "checks this machine and, with a recipe, whether that recipe can run here (--quick: the fast checks)",
    "keys": "list recipe keys",
}

#: No space, over the quota, over the limit of one file's size.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, dispatch, translate errors to exit codes."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported; see run/threads.py
    set_cuda_defaults()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser(words).parse_intermixed_args(words)  # overrides may stand before and after options
    try:
        with _answering(arguments.verb):
            return _dispatch(arguments, words)
    except TawinError as error:
        if error.exit_code == 1:
            traceback.print_exc()
        print(f"tawin-nemo {arguments.verb}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        traceback.print_exc()
        message = f"{error}; what was complete before is untouched: free space there, then run the same command again"
        print(f"tawin-nemo {arguments.verb}: {message}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("tawin-nemo: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _answering(verb: str) -> contextlib.AbstractContextManager[None]:
    """A training run answers SIGTERM and SIGUSR1 from its first moment."""
    if verb not in ("train", "retrain"):
        return contextlib.nullcontext()
    from tawin_nemo.run import signals

    return signals.leaving()


def _parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:9} {text}" for name, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="tawin-nemo",
        description=f"Train and use LLM recommenders with TAWin.\n\nverbs:\n{listing}",
        epilog=_epilog(words),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the verbs above")
    parser.add_argument("--recipe", metavar="FILE", help="YAML recipe; without one all keys have their defaults")
    parser.add_argument("--dry-run", action="store_true", help="train, study: say what would be done, then stop")
    parser.add_argument("--quick", action="store_true", help="doctor: no all-reduce, no disk speed, fewer imports")
    parser.add_argument("--gpus", metavar="N", help="plan: GPUs in all (default: what the recipe asks for)")
    parser.add_argument("--gpu", metavar="NAME", help="plan: h800 (default), h100, h200, a100, a100-40")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, e.g. rl.lr=1e-5")
    return parser


def _epilog(words: Sequence[str]) -> str:
    """The help of one verb where it has its own, else examples of all."""
    if "study" in words:
        from tawin_nemo.tools.study.help import HELP as STUDY_HELP

        return STUDY_HELP
    if "plan" in words and {"-h", "--help"} & set(words):
        from tawin_nemo.tools.plan.verb import HELP as PLAN_HELP

        return PLAN_HELP
    return EXAMPLES


def _dispatch(arguments: argparse.Namespace, argv: list[str]) -> int:
    if arguments.verb != "plan" and (arguments.gpus or arguments.gpu):
        raise ConfigError(f"--gpus and --gpu belong to plan; {arguments.verb} takes trainer.num_nodes, trainer.devices")
    if arguments.quick and arguments.verb != "doctor":
        raise ConfigError(f"--quick belongs to doctor; {arguments.verb} does not know it: leave it out")
    if arguments.verb == "keys":
        print_keys(arguments.overrides[0] if arguments.overrides else "")
        return 0
    if arguments.verb == "simulate":
        return simulate(arguments)
    if arguments.verb == "study":
        return study(arguments)
    if arguments.verb == "doctor":
        return doctor(arguments)
    if arguments.verb == "plan":
        return plan(arguments)
    from tawin_nemo.config.load import load_recipe
    from tawin_nemo.run.datasets import prepared_root

    recipe = load_recipe(arguments.recipe or recipe_of_checkpoint(arguments.overrides), arguments.overrides)
    if arguments.verb == "prepare":
        result: dict[str, Any] = {"prepared": str(prepared_root(recipe))}
    elif arguments.verb == "tokenize":
        from tawin_nemo.commands.tokenize import tokenize

        result = tokenize(recipe, prepared_root(recipe))
    else:
        if recipe.trainer.devices > 1 and not is_launched():
            from tawin_nemo.run.launcher import launch

            return launch(recipe.trainer.devices, argv, results=[REFUSED] if arguments.verb == "retrain" else [])
        from tawin_nemo.commands.session import run
        from tawin_nemo.run.launcher import end_with_launcher

        end_with_launcher()
        if arguments.verb == "retrain":
            return retrain(recipe)
        verb: Callable[..., dict[str, Any]] = getattr(
            import_module(f"tawin_nemo.commands.{arguments.verb}"), arguments.verb
        )
        options = {"dry_run": arguments.dry_run} if arguments.verb == "train" else {}
        result = run(recipe, verb, **options)
    if read_launch().rank == 0:
        print(json.dumps(result), flush=True)
    return 0


def simulate(arguments: argparse.Namespace) -> int:
    """The one verb without data, model or recipe."""
    from tawin_nemo.tools.simulate.simulate import run

    if arguments.recipe:
        raise ConfigError(f"--recipe {arguments.recipe}: simulate takes no recipe, only trials=, seed= and output=")
    print(json.dumps(run(arguments.overrides)), flush=True)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """What a recipe needs on a cluster; no torch, no GPU."""
    from tawin_nemo.tools.plan.table import plan_facts, plan_table
    from tawin_nemo.tools.plan.verb import plan_recipe

    def read_shape(folder: Path) -> Any:
        from tawin_nemo.models.megatron.hf.config import backbone_from_hf

        return backbone_from_hf(folder)

    named = [f"{name}={value}" for name in ("gpus", "gpu") if (value := getattr(arguments, name)) is not None]
    result = plan_recipe(arguments.recipe, [*named, *arguments.overrides], read_shape)
    print(plan_table(result), file=sys.stderr, flush=True)
    print(json.dumps(plan_facts(result)), flush=True)
    return 0


def retrain(recipe: Any) -> int:
    """A nightly run; exit code 3 when the gate rejected its model."""
    from tawin_nemo.tools.retrain.verb import run_retrain

    result, code = run_retrain(recipe)
    if read_launch().rank == 0:
        print(json.dumps(result), flush=True)
    return code


def study(arguments: argparse.Namespace) -> int:
    """Many runs of `train`; exit code 1 when one of them failed."""
    from tawin_nemo.tools.study.verb import run_study

    result, code = run_study(arguments.recipe, arguments.overrides, dry_run=arguments.dry_run)
    print(json.dumps(result), flush=True)
    return code


def doctor(arguments: argparse.Namespace) -> int:
    """Checks of this machine; exit code 2 when one fails."""
    from tawin_nemo.tools.doctor.verb import run_doctor

    result, code = run_doctor(arguments.recipe, arguments.overrides, launched=is_launched(), quick=arguments.quick)
    if read_launch().rank == 0:
        print(json.dumps(result), flush=True)
    return code


def recipe_of_checkpoint(overrides: Sequence[str]) -> Path | None:
    """Without --recipe, ``checkpoint=RUN_DIR/...`` means the recipe that RUN_DIR was made with."""
    named = [Path(item.removeprefix("checkpoint=")) for item in overrides if item.startswith("checkpoint=")]
    folders = [folder for path in named for folder in (path, *path.parents)]
    return next((folder / "recipe.yaml" for folder in folders if (folder / "recipe.yaml").is_file()), None)


def print_keys(prefix: str) -> None:
    """Every recipe key that starts with ``prefix``: default, limits, meaning."""
    from tawin_nemo.config.load import leaf_fields, value_of
    from tawin_nemo.config.schema import Recipe

    defaults = Recipe()
    for key, item in leaf_fields(Recipe):
        if key.startswith(prefix):
            choices = item.metadata.get("choices")
            limits = f" [{' | '.join(choices)}]" if choices else ""
            print(f"{key} = {value_of(defaults, key)!r}{limits}\n    {item.metadata['help']}")
