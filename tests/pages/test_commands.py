"""Commands of the pages: all are checked without running them, those of ``bash`` blocks run.

A block of ``console`` shows a session (``$`` before commands, then output); its commands need data, time or a cluster,
and are parsed: verb, options, recipe and keys through the product's own readers, scripts and files by name. A block of
``bash`` is run, in this process where it is the product's, unless its first line is ``# not run in tests: REASON``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tawin_nemo.cli import _parser, main
from tawin_nemo.config.load import leaf_fields, load_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.data_prep import prepare
from tawin_nemo.tools.plan.verb import plan_recipe
from tawin_nemo.tools.retrain.upkeep import ACTIONS
from tawin_nemo.tools.simulate.simulate import Options
from tawin_nemo.tools.study.arms import read_study
from tests.pages.reader import GENERATED, NOT_RUN, PAGES, ROOT, Command, blocks, commands, name

WRITTEN = [page for page in PAGES if page not in GENERATED]
SHOWN = [(page, command) for page in WRITTEN for block in blocks(page) for command in commands(block)]
RUN = [
    (page, command)
    for page in WRITTEN
    for block in blocks(page)
    for command in commands(block)
    if block.language == "bash" and not block.text.startswith(NOT_RUN)
]
#: Programs that come with Python or the system.
SYSTEM = ("python3", "source")


def _id(item: object) -> str:
    return name(item) if isinstance(item, Path) else str(item)[:60]


def test_there_are_commands_of_both_kinds():
    assert len(SHOWN) >= 80
    assert len(RUN) >= 4
    assert {"train", "serve", "keys"} <= {(c.product_arguments or [""])[0] for _, c in SHOWN}


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=_id)
def test_is_a_command_that_exists(page: Path, command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    words, arguments = command.words, command.product_arguments
    if arguments is not None:
        _check_product(arguments, mistaken="did you mean" in page.read_text(encoding="utf-8"))
    elif words[:2] == ["python", "-m"]:
        _check_module(words[2], words[3:])
    elif words[0] == "sbatch":
        _check_batch(command)
    elif words[0] == "bash":
        assert subprocess.run(["bash", "-n", words[1]]).returncode == 0
    elif words[0] == "pytest":
        assert all(Path(word.split("::")[0]).exists() for word in words if word.startswith("tests/"))
        assert any(word.startswith("tests/") for word in words)
    elif words[:2] == ["pip", "install"]:
        assert all(Path(file).is_file() for option, file in pairwise(words) if option == "-r")
    elif words[0] == "python":
        assert words[1] == "-c" or Path(words[1]).is_file()
    elif words[0] == "curl":
        assert any(f"localhost:8000{route}" in words for route in _routes())
    elif words[0] == "eval":
        assert shutil.which(words[1].removeprefix("$(").split()[0])
    elif words[0] in ("ruff", "mypy"):
        assert shutil.which(words[0])
    else:
        assert words[0] in SYSTEM, "teach this test what the command needs"


def _check_product(arguments: list[str], *, mistaken: bool) -> None:
    """The verb takes these options, the recipe can be read, and every key in it and behind it is known."""
    known = _parser(arguments).parse_intermixed_args(arguments)
    if known.verb == "keys":
        assert any(key.startswith(tuple(known.overrides)) for key, _ in leaf_fields(Recipe))
    elif known.verb == "study":
        read_study(known.recipe, known.overrides)
    elif known.verb == "simulate":
        Options.parse(known.overrides)
    elif known.verb == "plan":
        plan_recipe(known.recipe, [f"gpus={known.gpus or 8}", *known.overrides], lambda _: None)
    elif known.verb == "retrain" and "=" not in (known.overrides or ["="])[0]:
        assert known.overrides[0] in ACTIONS
        load_recipe(known.recipe, known.overrides[1:])
    elif not (mistaken and "rl.tawn.k=3" in known.overrides):
        load_recipe(known.recipe, known.overrides)


def _check_module(module: str, arguments: list[str]) -> None:
    """The module is there, and knows every ``--option``; other words with ``=`` are recipe keys."""
    found = importlib.util.find_spec(module)
    assert found is not None
    file = Path(found.origin).with_name("__main__.py") if found.submodule_search_locations else Path(found.origin)
    text = file.read_text(encoding="utf-8") + (ROOT / "tests" / "benchmarks" / "harness.py").read_text(encoding="utf-8")
    options = {word for word in arguments if word.startswith("--")} - {f"--{key}" for key, _ in leaf_fields(Recipe)}
    assert [option for option in sorted(options) if f'"{option}"' not in text] == []
    load_recipe(None, [word for word in arguments if "=" in word])


def _routes() -> list[str]:
    """Routes of the server's data plane."""
    plane = ROOT / "tawin_nemo" / "serve" / "http" / "openapi.json"
    return list(json.loads(plane.read_text(encoding="utf-8"))["paths"])


def _check_batch(command: Command) -> None:
    """The batch script prints its srun lines; the commands in them are the product's and right."""
    script = next(index for index, word in enumerate(command.words) if word.endswith(".sh"))
    words = [word for word in command.words[script:] if word != "..."]
    environment = {**os.environ, **command.settings, "TAWIN_DRY_RUN": "1", "TAWIN_LOGS": "/nowhere/logs"}
    done = subprocess.run(["bash", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"python -m tawin_nemo (\w+ --recipe .*)", done.stdout + done.stderr)
    assert lines
    for line in lines:
        if not line.startswith("plan"):  # it reads the model's folder
            _check_product(line.split(), mistaken=False)


@pytest.mark.parametrize(("page", "command"), RUN, ids=_id)
def test_runs(page: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TMP", str(tmp_path))
    for setting, value in command.settings.items():
        monkeypatch.setenv(setting, value)
    words, arguments = [os.path.expandvars(word) for word in command.words], command.product_arguments
    if arguments is not None:
        assert main([os.path.expandvars(word) for word in arguments]) == 0
    elif words[:3] == ["python", "-m", "tawin_nemo.data_prep.prepare"]:
        assert prepare.main(words[3:]) == 0
    else:
        assert subprocess.run(words, timeout=60).returncode == 0


def test_the_misspelled_key_of_the_page_gets_the_message_of_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    page = ROOT / "recipes" / "guides" / "cli.md"
    block = next(block for block in blocks(page) if "did you mean" in block.text)
    assert main(commands(block)[0].product_arguments) == 2
    assert block.text.strip().splitlines()[-1] == capsys.readouterr().err.strip()
