"""Fills a template of this folder: Kubernetes manifests, and nginx in front of replicas.

    python slurm/render.py kubernetes/serve image=IMAGE checkpoint=/models/shop/latest | kubectl apply -f -
    python slurm/render.py kubernetes/serve                 list the values of a template

A template (``NAME.j2``) begins with one line for each of its values, ``#: name = default   meaning``; a value without a
default has to be given. Values are YAML, so that ``[a, b]`` is a list and ``4`` a number.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).resolve().parent
_VALUE = re.compile(r"#: (?P<name>\w+)(?: = (?P<default>\S+|'[^']*'))? {2,}(?P<meaning>\S.*)")


@dataclass(frozen=True)
class Value:
    """One value of a template; ``default`` is None where it has to be given."""

    name: str
    default: str | None
    meaning: str


class UsageError(Exception):
    """What a person has to give otherwise."""


def templates() -> dict[str, Path]:
    """All templates by name: ``kubernetes/serve``."""
    files = sorted(FOLDER.glob("*/*.j2"))
    names = {str(file.relative_to(FOLDER).with_suffix("").with_suffix("")): file for file in files}
    return {name: file for name, file in names.items() if values(file)}


def values(template: Path) -> list[Value]:
    """The values that a template names in its first lines; none for a part of others."""
    found = [_VALUE.fullmatch(line) for line in template.read_text(encoding="utf-8").splitlines()]
    return [Value(match["name"], match["default"], match["meaning"]) for match in found if match]


def rendered(name: str, given: dict[str, Any]) -> str:
    """The template ``name`` with ``given`` values and the defaults of the others.

    Raises UsageError for an unknown template or value, and for one that has to be given.
    """
    if name not in templates():
        raise UsageError(f"no template {name}; there are: {', '.join(templates())}")
    known = values(templates()[name])
    unknown = given.keys() - {value.name for value in known}
    missing = [value.name for value in known if value.default is None and value.name not in given]
    if unknown or missing:
        what = f"{name} has no value {', '.join(sorted(unknown))}" if unknown else f"{name} needs {', '.join(missing)}"
        listed = "\n".join(f"  {value.name}={value.default or ''}    {value.meaning}" for value in known)
        raise UsageError(f"{what}; its values are\n{listed}")
    environment = Environment(
        loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["q"] = lambda value: yaml.safe_dump(str(value), default_style='"', width=10_000).strip()
    defaults = {value.name: yaml.safe_load(value.default) for value in known if value.default is not None}
    text = environment.get_template(str(templates()[name].relative_to(FOLDER))).render(defaults | given)
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#: "))


def main(words: Sequence[str]) -> int:
    """Print the filled template; 2 with the reason on stderr where that cannot be done."""
    try:
        if not words:
            raise UsageError(
                f"usage: python slurm/render.py TEMPLATE [name=value ...]; there are: {', '.join(templates())}"
            )
        wrong = [word for word in words[1:] if "=" not in word]
        if wrong:
            raise UsageError(f"{wrong[0]} is not name=value")
        given = {name: yaml.safe_load(text) for name, _, text in (word.partition("=") for word in words[1:])}
        print(rendered(words[0], given), end="")
    except UsageError as error:
        print(f"render.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
