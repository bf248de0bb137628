"""What pyproject.toml requires is what the product imports, and requirements.txt pins a version inside every range."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
#: Distributions whose import name is another one.
IMPORTED_AS = {
    "megatron-core": "megatron", "nemo-toolkit": "nemo", "scikit-learn": "sklearn", "pyyaml": "yaml",
    "prometheus-client": "prometheus_client", "transformer-engine": "transformer_engine",
    "asgi-correlation-id": "asgi_correlation_id", "nvidia-ml-py": "pynvml", "huggingface-hub": "huggingface_hub",
}  # fmt: skip
#: What NeMo's exp_manager imports when it runs, without requiring it.
FOR_NEMO = {"tensorboard", "einops", "pandas", "sacrebleu", "sentencepiece"}
#: Optional in code that looks for it first: NVIDIA's kernels, which are built from source.
OPTIONAL = {"apex", "transformer_engine"}


def _project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def _imported() -> set[str]:
    """Top-level names of every import statement of the product."""
    found = set()
    for path in (*(REPOSITORY / "tawin_nemo").rglob("*.py"), *(REPOSITORY / "data_prep").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"tawin_nemo"} - OPTIONAL


def test_every_import_is_required_and_every_requirement_imported():
    project = _project()
    extras = project["optional-dependencies"]
    ours = _names([*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])])
    modules = {IMPORTED_AS.get(name, name) for name in ours - FOR_NEMO} - OPTIONAL
    assert modules == _imported()


def test_the_extras():
    assert _project()["optional-dependencies"].keys() == {
        "serve", "logging", "prepare", "semantic-ids", "pretrained", "plots", "gpu", "dev",
    }  # fmt: skip


def test_the_pinned_environment_lies_inside_the_ranges():
    project = _project()
    lines = [line for name in ("requirements.txt", "requirements-gpu.txt") for line in _requirements(name)]
    pinned = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    ranges = [Requirement(line) for part in project["optional-dependencies"].values() for line in part]
    ranges += [Requirement(line) for line in project["dependencies"]]
    assert {canonicalize_name(wanted.name) for wanted in ranges} == pinned.keys()
    for wanted in ranges:
        have = pinned[canonicalize_name(wanted.name)]
        exact = re.fullmatch(r"==([\w.]+)", str(have.specifier))
        if exact:
            assert wanted.specifier.contains(exact[1]), (str(wanted), str(have))
        else:
            assert have.specifier == wanted.specifier, (str(wanted), str(have))


def _requirements(name: str) -> list[str]:
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
