"""The plan of the house: who may import whom, and how large a file or a function may be.

Read from the syntax trees, so that imports inside functions count and nothing has to be installed or run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PRODUCT = ("tawin_nemo", "data_prep")  # data_prep is linked into the package as tawin_nemo.data_prep

#: Layer of every module and package directly below tawin_nemo. Imports go down, or stay inside one package.
LAYERS = {
    **dict.fromkeys(("types", "util", "config", "maths"), 0),
    **dict.fromkeys(("catalog", "api"), 1),
    "data": 2,
    "data_prep": 3,
    **dict.fromkeys(("rollout", "models", "semantic_ids"), 4),
    "eval": 5,
    "run": 6,
    **dict.fromkeys(("placement", "baselines"), 7),
    "train": 8,
    **dict.fromkeys(("cli", "facade", "__main__", "commands", "serve", "tools"), 9),
}
#: The one exception: api hands out the names of facade when they are asked for, and imports nothing else.
HANDED_OUT = ("tawin_nemo.api", "tawin_nemo.facade")
#: Packages of one layer that may import each other; everywhere else packages of a layer stand side by side.
OPEN_LAYERS = (0, 9)
#: What maths may import: torch (and what helps to call it), math and the shared names; no I/O, no distributed.
MATHS_MAY_IMPORT = (
    *("__future__", "math", "typing", "collections", "dataclasses", "enum", "torch"),
    *("tawin_nemo.maths", "tawin_nemo.types", "tawin_nemo.util.torch_modes"),
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60


@dataclass(frozen=True)
class Import:
    """One import statement: ``importer`` (dotted module) imports ``target``; lazy = inside a function."""

    importer: str
    target: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    parts = parts if parts[0] != "data_prep" else ("tawin_nemo", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_below(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def imports_of(tree: ast.Module, importer: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import in a syntax tree, relative ones resolved; ``from a import b`` counts as ``a.b``."""
    lazy_nodes = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = importer.split(".") if is_package else importer.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            targets = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for target in targets:
            yield Import(importer, target, getattr(node, "lineno", 0), id(node) in lazy_nodes)


def imports_in_text(source: str, importer: str) -> list[Import]:
    return list(imports_of(ast.parse(source), importer))


# -- the rules: each yields what is wrong with one import -----------------------------------------------------------
def layer_of(module: str) -> int | None:
    parts = module.split(".")
    return LAYERS.get(parts[1]) if len(parts) > 1 else None


def upward(item: Import) -> bool:
    """An import of a higher layer, or of another package of the same layer (above L0)."""
    if not (is_below(item.importer, "tawin_nemo") and is_below(item.target, "tawin_nemo")):
        return False
    if item.importer == HANDED_OUT[0] and is_below(item.target, HANDED_OUT[1]):
        return False
    own, other = layer_of(item.importer), layer_of(item.target)
    if own is None or other is None:  # the package itself, which holds no code
        return other is not None
    same_package = item.importer.split(".")[1] == item.target.split(".")[1]
    return other > own or (other == own and other not in OPEN_LAYERS and not same_package)


def misplaced_megatron(item: Import) -> bool:
    allowed = ("tawin_nemo.models.megatron", "tawin_nemo.train", "tawin_nemo.placement")
    return is_below(item.target, "megatron") and not is_below(item.importer, *allowed)


def eager_nemo(item: Import) -> bool:
    return is_below(item.target, "nemo") and not item.lazy


def impure_maths(item: Import) -> bool:
    if not is_below(item.importer, "tawin_nemo.maths"):
        return False
    return not is_below(item.target, *MATHS_MAY_IMPORT) or is_below(item.target, "torch.distributed")


def foreign_data_prep(item: Import) -> bool:
    """Only the verbs prepare data, through run.datasets; titles are cleaned by one rule wherever they are read."""
    verbs = ("tawin_nemo.cli", "tawin_nemo.commands", "tawin_nemo.tools")
    allowed = ("tawin_nemo.data_prep", "tawin_nemo.run.datasets", *verbs)
    is_titles = is_below(item.target, "tawin_nemo.data_prep.titles")
    return is_below(item.target, "tawin_nemo.data_prep") and not (is_below(item.importer, *allowed) or is_titles)


def recipes_or_tests(item: Import) -> bool:
    return is_below(item.target, "recipes", "tests", "conftest")


RULES = (upward, misplaced_megatron, eager_nemo, impure_maths, foreign_data_prep, recipes_or_tests)


# -- the package ---------------------------------------------------------------------------------------------------
def product_files() -> list[Path]:
    return [path for folder in PRODUCT for path in sorted((REPOSITORY / folder).rglob("*.py"))]


@cache
def product_imports() -> list[Import]:
    return [
        item
        for path in product_files()
        for item in imports_of(
            ast.parse(path.read_text(encoding="utf-8")), module_name(path), is_package=path.name == "__init__.py"
        )
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_import_breaks_the_rule(rule):
    assert [str(item) for item in product_imports() if rule(item)] == []


def test_nemo_is_imported_in_one_module_only():
    importers = {item.importer for item in product_imports() if is_below(item.target, "nemo")}
    assert len(importers) <= 1, importers


def test_every_module_has_a_layer():
    names = [module_name(path).split(".") for path in product_files()]
    children = {name[1] for name in names if name[0] == "tawin_nemo" and len(name) > 1}
    assert children - LAYERS.keys() == set(), "give the new module a layer in LAYERS"


def folder_of(module: str, modules: frozenset[str]) -> str | None:
    """The folder of a module of the package, or None for what lies at its root or outside of it."""
    parts = module.split(".")
    known = next((".".join(parts[:n]) for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in modules), "")
    folder = known if is_package(known) else known.rpartition(".")[0]
    return folder if folder.startswith("tawin_nemo.") else None


def is_package(module: str) -> bool:
    return (REPOSITORY / module.replace(".", "/") / "__init__.py").is_file()


def circles(imports: list[Import], modules: frozenset[str]) -> list[str]:
    """Folders that import each other, directly or through others."""
    below: dict[str, set[str]] = {}
    for item in imports:
        own, other = folder_of(item.importer, modules), folder_of(item.target, modules)
        if own and other and own != other:
            below.setdefault(own, set()).add(other)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = below.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    return sorted(folder for folder in below if folder in reached(folder))


def test_no_folders_import_each_other_in_a_circle():
    modules = frozenset(module_name(path) for path in product_files())
    assert circles(product_imports(), modules) == []


def test_a_circle_of_folders_is_seen():
    modules = frozenset(module_name(path) for path in product_files())
    down = Import("tawin_nemo.train.rl", "tawin_nemo.eval.evaluate", 1, lazy=False)
    up = Import("tawin_nemo.eval.evaluate", "tawin_nemo.train.rl.train_rl", 1, lazy=True)
    assert circles([down], modules) == []
    assert circles([down, up], modules) == ["tawin_nemo.eval", "tawin_nemo.train"]


def test_the_package_itself_holds_no_imports():
    assert [str(item) for item in product_imports() if item.importer == "tawin_nemo"] == []


# -- sizes ---------------------------------------------------------------------------------------------------------
def test_files_and_functions_are_short_or_say_why():
    """A longer file says so in its docstring with the words "300 lines", a longer function with "60 lines"."""
    assert [
        fault for path in product_files() for fault in size_faults(path.read_text("utf-8"), module_name(path))
    ] == []


def size_faults(source: str, module: str) -> list[str]:
    """What is too long in a module and does not say why."""
    tree = ast.parse(source)
    lines = len(source.splitlines())
    reason = f"{MAX_FILE_LINES} lines" in (ast.get_docstring(tree) or "")
    too_long = [f"{module} has {lines} lines"] if lines > MAX_FILE_LINES and not reason else []
    return too_long + [f"{module}.{name}" for name in long_functions(tree)]


def long_functions(tree: ast.Module) -> list[str]:
    return [
        f"{node.name}: {length} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
        and f"{MAX_FUNCTION_LINES} lines" not in (ast.get_docstring(node) or "")
    ]


# -- the rules themselves --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "importer", "source", "broken"),
    [
        (upward, "tawin_nemo.data.batches", "from tawin_nemo.rollout import beam", True),
        (upward, "tawin_nemo.data.batches", "def f():\n    import tawin_nemo.train.rl", True),
        (upward, "tawin_nemo.rollout.beam", "from tawin_nemo.models.megatron.decode.lm import MegatronLM", True),
        (upward, "tawin_nemo.models.megatron.decode.lm", "from tawin_nemo.rollout.lm import LM", True),
        (upward, "tawin_nemo.models.megatron.decode.lm", "from ....rollout.lm import LM", True),
        (upward, "tawin_nemo.models.megatron.decode.lm", "from .head import Head", False),
        (upward, "tawin_nemo.train.rl", "from tawin_nemo.rollout.engine import RolloutEngine", False),
        (upward, "tawin_nemo.config.load", "from tawin_nemo.config.schema import Recipe", False),
        (upward, "tawin_nemo.config.schema", "from tawin_nemo import catalog", True),
        (upward, "tawin_nemo.placement.servers", "from tawin_nemo.api.client import Client", False),
        (upward, "tawin_nemo.placement.servers", "from tawin_nemo.serve.engine.engine import Engine", True),
        (upward, "tawin_nemo.api.client", "from tawin_nemo.serve.engine.jobs import Job", True),
        (upward, "tawin_nemo.api", "from tawin_nemo.facade import train", False),
        (upward, "tawin_nemo.api", "from tawin_nemo.commands.train import train", True),
        (upward, "tawin_nemo.api.client", "from tawin_nemo.facade import train", True),
        (upward, "tawin_nemo.eval.report", "importlib.import_module('tawin_nemo.cli')", True),
        (misplaced_megatron, "tawin_nemo.rollout.engine", "def f():\n    from megatron.core import mpu", True),
        (misplaced_megatron, "tawin_nemo.models.megatron.model.build", "import megatron.core", False),
        (misplaced_megatron, "tawin_nemo.baselines.sasrec", "import megatron.core", True),
        (eager_nemo, "tawin_nemo.run.logging", "from nemo.utils import exp_manager", True),
        (eager_nemo, "tawin_nemo.run.logging", "def f():\n    from nemo.utils import exp_manager", False),
        (impure_maths, "tawin_nemo.maths.tawin", "import torch.distributed as dist", True),
        (impure_maths, "tawin_nemo.maths.tawin", "from pathlib import Path", True),
        (impure_maths, "tawin_nemo.maths.tawin", "from tawin_nemo.maths.ranking import recall_at_k", False),
        (impure_maths, "tawin_nemo.maths.tawin", "from torch import Tensor", False),
        (upward, "tawin_nemo.data_prep.amazon", "from tawin_nemo.eval import report", True),
        (upward, "tawin_nemo.data_prep.amazon", "from tawin_nemo.data import interactions", False),
        (upward, "tawin_nemo.placement.ahead", "from tawin_nemo.baselines import load", True),
        (upward, "tawin_nemo.tools.retrain.verb", "from tawin_nemo.commands.session import started", False),
        (foreign_data_prep, "tawin_nemo.run.world", "import tawin_nemo.data_prep.prepare", True),
        (foreign_data_prep, "tawin_nemo.run.datasets", "import tawin_nemo.data_prep.prepare", False),
        (foreign_data_prep, "tawin_nemo.semantic_ids.encoders", "from tawin_nemo.data_prep import titles", False),
        (foreign_data_prep, "tawin_nemo.cli", "def f():\n    import tawin_nemo.data_prep.prepare", False),
        (recipes_or_tests, "tawin_nemo.cli", "from tests.conftest import industrial", True),
        (recipes_or_tests, "tawin_nemo.cli", "import testsuite", False),
    ],
)  # fmt: skip
def test_the_rule_sees_what_it_should(rule, importer: str, source: str, broken: bool):
    assert any(rule(item) for item in imports_in_text(source, importer)) is broken


def test_the_size_rule_sees_long_files_and_accepts_a_reason():
    lines = "x = 1\n" * (MAX_FILE_LINES + 1)
    assert size_faults(lines, "m") == [f"m has {MAX_FILE_LINES + 1} lines"]
    assert size_faults(f'"""Over 300 lines: one table."""\n{lines}', "m") == []


def test_the_size_rule_sees_long_functions_and_accepts_a_reason():
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions(ast.parse(f"def f():\n{body}")) == [f"f: {MAX_FUNCTION_LINES + 1} lines"]
    assert long_functions(ast.parse(f'def f():\n    """Over 60 lines: one table."""\n{body}')) == []
