"""The verb keys: the recipe's keys as a table, or as JSON Schema for editors."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from typing import Any

from tawin_nemo.config.fields import leaf_fields, sections, value_of
from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.errors import ConfigError

_JSON = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def print_keys(prefixes: Sequence[str], *, schema: bool = False) -> None:
    """Print every key below ``prefixes`` (none: all) with default, limits and meaning, or the JSON Schema of recipes.

    Raises ConfigError for a prefix that no key has.
    """
    if schema:
        if prefixes:
            raise ConfigError(f"keys --schema is of whole recipes; leave out {' '.join(prefixes)}")
        print(json.dumps(recipe_schema(), indent=1))
        return
    known = dict(leaf_fields(Recipe))
    for prefix in prefixes:
        if not any(below(key, prefix) for key in known):
            near = difflib.get_close_matches(prefix, [*known, *sections(known)], n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `tawin-nemo keys` lists all"
            raise ConfigError(f"no key begins with {prefix}{hint}")
    defaults = Recipe()
    for key, item in known.items():
        if not prefixes or any(below(key, prefix) for prefix in prefixes):
            print(f"{key} = {value_of(defaults, key)!r}{limits(item.metadata)}\n    {item.metadata['help']}")
    sys.stdout.flush()  # a closed pipe is reported here, not at the interpreter's end


def below(key: str, prefix: str) -> bool:
    """Whether ``key`` begins with ``prefix``, a section (``rl``), a key, or the beginning of one (``rl.kl``)."""
    return key == prefix or key.startswith(prefix if "." in prefix else f"{prefix}.")


def limits(metadata: Any) -> str:
    """Choices or limits of a key as text, empty without any."""
    if choices := metadata.get("choices"):
        return f" [{' | '.join(choices)}{' | package.module:name' if metadata['imports'] else ''}]"
    low, high = metadata.get("low"), metadata.get("high")
    if low is None and high is None:
        return ""
    return f" [>= {low}]" if high is None else f" [<= {high}]" if low is None else f" [{low} .. {high}]"


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file: every key with its type, limits, default and meaning."""
    root: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "tawin-nemo recipe",
        "type": "object", "additionalProperties": False,
        "properties": {"base": {"type": "string", "description": "recipe below this one, relative to this file"}},
    }  # fmt: skip
    defaults = Recipe()
    for key, item in leaf_fields(Recipe):
        node, (*names, leaf) = root, key.split(".")
        for name in names:
            section = {"type": "object", "additionalProperties": False, "properties": {}}
            node = node["properties"].setdefault(name, section)
        node["properties"][leaf] = _key_schema(str(item.type), item.metadata, value_of(defaults, key))
    return root


def _key_schema(kind: str, metadata: Any, default: Any) -> dict[str, Any]:
    """A value of its type; also ``${...}``, which OmegaConf resolves, and an empty value where that clears the key."""
    described = {"description": metadata["help"], "default": default}
    if kind.startswith("dict"):
        return {"type": "object", **described}
    if kind.startswith("list"):
        inner = _JSON[kind[5:-1]]
        bounds = {"minimum": metadata["low"], "maximum": metadata["high"]} if "high" in metadata else {}
        if metadata.get("choices"):
            bounds = {"enum": list(metadata["choices"])}
            if metadata["imports"]:
                bounds = {"anyOf": [bounds, {"pattern": ":"}]}
        return {"type": sorted({"array", "string", inner, "null"}), "items": {"type": inner, **bounds}, **described}
    if kind == "str" and not metadata.get("choices"):
        return {"type": ["string", "number", "boolean", "null"], **described}  # any scalar is text here
    value: dict[str, Any] = {"type": _JSON[kind]}
    if choices := metadata.get("choices"):
        value = {"enum": [*choices, False] if "off" in choices else list(choices)}
        if metadata["imports"]:  # package.module:name, or a sum of names
            value = {"anyOf": [value, {"type": "string", "pattern": "[:+*]"}]}
    for name, limit in (("minimum", metadata.get("low")), ("maximum", metadata.get("high"))):
        if limit is not None:
            value[name] = limit
    return {"anyOf": [value, {"type": "string", "pattern": r"\$\{"}], **described}
