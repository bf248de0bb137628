"""The command line: ``tawin-nemo VERB [--recipe FILE] [key=value ...]``.

Heavy imports happen inside the verbs, so ``--help`` answers at once. The last line on stdout of a verb is one JSON
object with its result; everything for people goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tawin_nemo import __version__
from tawin_nemo.commands.verbs import EXIT_CODES, VERBS, page
from tawin_nemo.util.cuda_defaults import set_cuda_defaults
from tawin_nemo.util.errors import REFUSED, ConfigError, TawinError, UserError
from tawin_nemo.util.launch import is_launched, needs_launcher, read_launch

#: No space, over the quota, over the limit of one file's size.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: The same from safetensors and polars (which name the system's number), from NumPy, and from torch.
_FULL_IN_WORDS = re.compile(
    rf"os error ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b|\d+ requested and \d+ written|"
    "PytorchStreamWriter failed writing"
)
#: What is wrong with a path: a file or a device in place of a folder, its length, a circle of links, no permission.
BAD_PATH = (
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENXIO, errno.ENODEV,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, dispatch, translate errors to exit codes."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported; see util/launch.py
    set_cuda_defaults()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words and "_ARGCOMPLETE" not in os.environ:
        words = ["--help"]
    arguments = _parser(words).parse_intermixed_args(words)  # overrides may stand before and after options
    try:
        with _answering(arguments.verb):
            return _dispatch(arguments, words)
    except TawinError as error:
        if error.exit_code == 1:
            traceback.print_exc()
        print(f"tawin-nemo {arguments.verb}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        if arguments.verb != "keys":  # a lost peer or server is a fault
            raise
        # the reader of `tawin-nemo keys | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        return _disk_error(arguments.verb, error)
    except KeyboardInterrupt:
        print("tawin-nemo: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _disk_error(verb: str, error: Exception) -> int:
    """The exit code after a full disk (1) or a path that cannot be used (2), which are said; raises any other error."""
    if disk_is_full(error):
        traceback.print_exc()
        message = f"{error}; what was complete before is untouched: free space there, then run the same command again"
        print(f"tawin-nemo {verb}: {message}", file=sys.stderr, flush=True)
        return 1
    if isinstance(error, OSError) and error.errno in BAD_PATH and error.filename is not None:
        reason = f"{error.filename} cannot be used: {error.strerror}"
        print(f"tawin-nemo {verb}: {reason}; name another path, or change that one", file=sys.stderr, flush=True)
        return UserError.exit_code
    raise error


def disk_is_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, is a write for which there was no space; libraries say it in own words."""
    return error is not None and (
        (isinstance(error, OSError) and error.errno in DISK_FULL)
        or _FULL_IN_WORDS.search(str(error)) is not None
        or disk_is_full(error.__cause__)
    )


def _answering(verb: str) -> contextlib.AbstractContextManager[None]:
    """A run that continues later answers SIGTERM and SIGUSR1 from its first moment."""
    if verb not in ("train", "retrain", "recommend"):
        return contextlib.nullcontext()
    from tawin_nemo.run import signals

    return signals.leaving()


_FLAG: dict[str, Any] = {"action": "store_true"}
#: Options of single verbs: name, the verbs, meaning, argparse's settings.
OPTIONS: tuple[tuple[str, tuple[str, ...], str, dict[str, Any]], ...] = (
    ("--dry-run", ("train", "study", "recommend"), "say what would be done, then stop", _FLAG),
    ("--quick", ("doctor",), "no all-reduce, no disk speed, fewer imports", _FLAG),
    ("--schema", ("keys",), "print the JSON Schema of recipes", _FLAG),
    ("--gpus", ("plan",), "GPUs in all (default: what the recipe asks for)", {"metavar": "N"}),
    ("--gpu", ("plan",), "h800 (default), h100, h200, a100, a100-40", {"metavar": "NAME"}),
)


class Parser(argparse.ArgumentParser):
    """An argument parser that names the verb that was meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.dest == "verb" and value not in VERBS:
            near = difflib.get_close_matches(str(value), VERBS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise argparse.ArgumentError(action, f"{value!r} is no verb{hint} Verbs: {', '.join(VERBS)}")
        super()._check_value(action, value)


def _parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    named = next((word for word in words if word in VERBS), None)
    listing = "\n".join(f"  {name:9} {verb.summary}" for name, verb in VERBS.items())
    overview = (
        f"Train and use LLM recommenders with TAWin.\n\nverbs (tawin-nemo VERB --help says more):\n{listing}\n\n"
        "Running the same train command again continues a stopped run.\n" + EXIT_CODES
    )
    parser = Parser(
        prog="tawin-nemo",
        usage=f"tawin-nemo {named or 'VERB'} [--recipe FILE] [options] [key=value ...]",
        description=_page(named) if named else overview,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the verbs above")
    parser.add_argument("--version", action="version", version=f"tawin-nemo {__version__}")
    recipe = parser.add_argument(
        "--recipe", metavar="FILE", help="YAML recipe; without one all keys have their defaults"
    )
    for option, verbs, help_text, settings in OPTIONS:
        shown = named is None or named in verbs
        help_text = f"{', '.join(verbs)}: {help_text}" if shown else argparse.SUPPRESS
        parser.add_argument(option, help=help_text, **settings)
    keys = parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, e.g. rl.lr=1e-5")
    if "_ARGCOMPLETE" in os.environ:
        from tawin_nemo.commands.completion import complete

        complete(parser, recipe, keys)
    return parser


def _page(verb: str) -> str:
    """The help of one verb; study and plan have longer ones of their own."""
    if verb == "study":
        from tawin_nemo.tools.study import HELP as STUDY_HELP

        return STUDY_HELP
    if verb == "plan":
        from tawin_nemo.tools.plan.verb import HELP as PLAN_HELP

        return PLAN_HELP
    return page(verb)


def _dispatch(arguments: argparse.Namespace, argv: list[str]) -> int:
    if arguments.verb != "plan" and (arguments.gpus or arguments.gpu):
        raise ConfigError(f"--gpus and --gpu belong to plan; {arguments.verb} takes trainer.num_nodes, trainer.devices")
    if arguments.quick and arguments.verb != "doctor":
        raise ConfigError(f"--quick belongs to doctor; {arguments.verb} does not know it: leave it out")
    if arguments.schema and arguments.verb != "keys":
        raise ConfigError(f"--schema belongs to keys; {arguments.verb} does not know it: leave it out")
    if arguments.verb == "keys":
        from tawin_nemo.commands.keys import print_keys

        print_keys(arguments.overrides, schema=arguments.schema)
        return 0
    if arguments.verb in (alone := {"simulate": simulate, "study": study, "plan": plan, "doctor": doctor}):
        return alone[arguments.verb](arguments, argv)
    if arguments.verb == "retrain" and "=" not in (arguments.overrides or ["="])[0]:
        from tawin_nemo.tools.retrain.upkeep import run_upkeep

        print(json.dumps(run_upkeep(arguments.recipe, arguments.overrides)), flush=True)
        return 0
    from tawin_nemo.config.load import load_recipe
    from tawin_nemo.config.seams import imported

    recipe = load_recipe(arguments.recipe or recipe_of_checkpoint(arguments.overrides), arguments.overrides)
    recipe = imported(recipe, trains=arguments.verb in ("train", "retrain"))
    if arguments.verb in ("prepare", "tokenize", "score"):
        from tawin_nemo.commands.prepare import in_one_process

        result: dict[str, Any] = in_one_process(recipe, arguments.verb)
    else:
        if needs_launcher(recipe.trainer.devices):
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
        options = {"dry_run": arguments.dry_run} if arguments.verb in ("train", "recommend") else {}
        result = run(recipe, verb, **options)
    if read_launch().rank == 0:
        print(json.dumps(result), flush=True)
    return 0


def simulate(arguments: argparse.Namespace, _: list[str]) -> int:
    """The one verb without data, model or recipe."""
    from tawin_nemo.tools.simulate.simulate import run

    if arguments.recipe:
        raise ConfigError(f"--recipe {arguments.recipe}: simulate takes no recipe, only trials=, seed= and output=")
    print(json.dumps(run(arguments.overrides)), flush=True)
    return 0


def plan(arguments: argparse.Namespace, _: list[str]) -> int:
    """What a recipe needs on a cluster; no torch, no GPU."""
    from tawin_nemo.tools.plan.verb import plan_facts, plan_recipe, plan_table

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


def study(arguments: argparse.Namespace, _: list[str]) -> int:
    """Many runs of `train`; exit code 1 when one of them failed."""
    from tawin_nemo.tools.study.verb import run_study

    result, code = run_study(arguments.recipe, arguments.overrides, dry_run=arguments.dry_run)
    print(json.dumps(result), flush=True)
    return code


def doctor(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Checks of this machine, or with checkpoint=DIR of a trained model; exit code 2 when one fails."""
    from tawin_nemo.tools.doctor.verb import run_doctor

    if any(word.startswith("checkpoint=") and word != "checkpoint=" for word in arguments.overrides):
        return doctor_of_model(arguments, argv)
    result, code = run_doctor(arguments.recipe, arguments.overrides, launched=is_launched(), quick=arguments.quick)
    if read_launch().rank == 0:
        print(json.dumps(result), flush=True)
    return code


def doctor_of_model(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Checks of a trained model: a stage of a run, or a Hugging Face directory with data."""
    from tawin_nemo.config.load import load_recipe
    from tawin_nemo.run.launcher import end_with_launcher, launch
    from tawin_nemo.tools.doctor.model import run_doctor_of_model

    if arguments.quick:
        raise ConfigError("--quick belongs to the checks of the machine; with checkpoint=DIR leave it out")
    recipe = load_recipe(arguments.recipe or recipe_of_checkpoint(arguments.overrides), arguments.overrides)
    if needs_launcher(recipe.trainer.devices):
        return launch(recipe.trainer.devices, argv)
    end_with_launcher()
    result, code = run_doctor_of_model(recipe)
    if read_launch().rank == 0:
        print(json.dumps(result), flush=True)
    return code


def recipe_of_checkpoint(overrides: Sequence[str]) -> Path | None:
    """Without --recipe, ``checkpoint=RUN_DIR/...`` and ``serve.follow=ROOT`` mean the recipe of that model."""
    named = [Path(item.removeprefix("checkpoint=")) for item in overrides if item.startswith("checkpoint=")]
    named += [Path(item.partition("=")[2]) / "latest" for item in overrides if item.startswith("serve.follow=")]
    folders = [folder for path in named for folder in (path, *path.parents)]
    return next((folder / "recipe.yaml" for folder in folders if (folder / "recipe.yaml").is_file()), None)
