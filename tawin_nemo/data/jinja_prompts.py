"""Prompts by a Jinja template of one's own, which may show further columns of the items table (brand, category, price).

The template sees ``items``, the history from oldest to newest, and ``candidates`` (empty without data.show_candidates).
Each of them has ``text`` (the title or the joined codes, exactly as an answer is written), ``title``, ``external_id``
and the other columns of items.parquet. A column without a value is empty text, and a new customer has no items. The
template runs in Jinja's sandbox, without files and without chance, and white space is trimmed around blocks as in chat
templates. For example:

    {% for item in items %}
    {{ item.text }} ({{ item.brand }}, {{ item.category }})
    {% endfor %}
    The next item is:
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tawin_nemo.config.schema import JINJA_FILES
from tawin_nemo.data.prompts import Template
from tawin_nemo.util.errors import ConfigError, DataError

ITEMS, CANDIDATES = "items", "candidates"
TEXT, TITLE, EXTERNAL_ID = "text", "title", "external_id"


def read_source(template: str) -> str:
    """The Jinja text that ``data.template`` is, or that its file holds. Raises ConfigError for a missing file."""
    if not template.endswith(JINJA_FILES):
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template={template} cannot be read ({error}); name a text file in UTF-8") from None


@dataclass(frozen=True)
class Columns:
    """The items' further columns: names, and a row of values for each item index."""

    names: tuple[str, ...] = ()
    rows: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]]) -> Columns:
        """From lists of one length; None becomes empty text."""
        values = [["" if value is None else value for value in column] for column in columns.values()]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
        return cls(tuple(columns), rows)

    def record(self, item: int | None, text: str) -> SimpleNamespace:
        """What a template sees of an item; columns of an item that is not in the table are empty."""
        row = self.rows[item] if item is not None and item < len(self.rows) else dict.fromkeys(self.names, "")
        return SimpleNamespace(**{TITLE: text, EXTERNAL_ID: "", **row, TEXT: text})


@dataclass(frozen=True)
class JinjaTemplate(Template):
    """``source``: the Jinja text. ``shown``: data.template, for messages.

    Raises ConfigError for text that is no Jinja, that names something unknown, or that shows no history.
    """

    name: str = "jinja"
    source: str = ""
    shown: str = field(default="", compare=False)
    columns: Columns = field(default_factory=Columns, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ("title", "sid"):
            raise ConfigError(f"catalog.kind={self.kind} is not known; use title or sid")
        _check_names(self.source, self.shown or self.source, self.known_columns)
        for texts in ([], ["an item"]):
            self.prompt_of(range(len(texts)), texts)
            self.prompt(texts)

    @property
    def known_columns(self) -> tuple[str, ...]:
        """The names that an item has."""
        return tuple(dict.fromkeys((TEXT, TITLE, EXTERNAL_ID, *self.columns.names)))

    @cached_property
    def _compiled(self) -> Any:
        return _environment().from_string(self.source)

    @property
    def wording(self) -> str:
        """Alignment tasks are written in the style of alpaca."""
        return "alpaca"

    def _fixed_text(self) -> list[str]:
        return [self.source, *super()._fixed_text()]

    @property
    def joins(self) -> bool:
        """False: every prompt is rendered as a whole."""
        return False

    @property
    def head(self) -> str:
        """Empty: all text is in ``tail``."""
        return ""

    @property
    def separator(self) -> str:
        """Empty."""
        return ""

    @property
    def tail(self) -> str:
        """The prompt of an empty history."""
        return self.prompt([])

    @property
    def shows_candidates(self) -> bool:
        """Whether the template writes the candidates."""
        return CANDIDATES in meta.find_undeclared_variables(_environment().parse(self.source))

    def prompt(self, history_texts: Sequence[str]) -> str:
        """The prompt for items whose columns are not known. Raises DataError where the template fails."""
        return self._rendered([self.columns.record(None, text) for text in history_texts], [])

    def prompt_of(
        self,
        items: Sequence[int],
        texts: Sequence[str],
        candidates: Sequence[int] = (),
        candidate_texts: Sequence[str] = (),
    ) -> str:
        """The prompt for item indices with these texts, oldest first. Raises DataError where the template fails."""
        listed = [
            [self.columns.record(item, text) for item, text in zip(numbers, written, strict=True)]
            for numbers, written in ((items, texts), (candidates, candidate_texts))
        ]
        return self._rendered(*listed)

    def prompt_with_candidates(self, history_texts: Sequence[str], candidate_texts: Sequence[str]) -> str:
        """The prompt for items and candidates whose columns are not known."""
        listed = [[self.columns.record(None, text) for text in texts] for texts in (history_texts, candidate_texts)]
        return self._rendered(*listed)

    def _rendered(self, items: list[SimpleNamespace], candidates: list[SimpleNamespace]) -> str:
        try:
            text = str(self._compiled.render({ITEMS: items, CANDIDATES: candidates}))
        except Exception as error:  # whatever a filter or a method raises for a value
            raise DataError(
                f"data.template={self.shown or self.source!r} fails for the history "
                f"{[item.title for item in items]}: {type(error).__name__}: {error}; a history may be empty, and so "
                "may the columns of an item"
            ) from error
        return f"{self.chat[0]}{text.strip()}{self.chat[1]}" if self.in_chat else text

    def answer(self, item_text: str) -> str:
        """The text itself."""
        return item_text


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    del environment.filters["random"], environment.globals["lipsum"]  # every rank and every run writes the same prompt
    return environment


def _check_names(source: str, shown: str, columns: Sequence[str]) -> None:
    """Raises ConfigError for Jinja that cannot be parsed, unknown variables or columns, or a history that is unused."""
    environment = _environment()
    try:
        tree = environment.parse(source)
        environment.compile(tree)
    except TemplateError as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""  # type: ignore[attr-defined]
        raise ConfigError(f"data.template={shown}{line} is no Jinja template: {error}") from None
    free = meta.find_undeclared_variables(environment.parse(source))
    unknown = sorted(free - {ITEMS, CANDIDATES})
    if unknown:
        raise ConfigError(
            f"data.template={shown} uses {', '.join(unknown)}, which is not known; a template has {ITEMS} and "
            f"{CANDIDATES}, each of which has {', '.join(columns)}"
        )
    if ITEMS not in free:
        raise ConfigError(f"data.template={shown} does not use {ITEMS}: the prompt would not show the history")
    absent = sorted({name for name in _used_columns(environment.parse(source)) if name not in columns})
    if absent:
        raise ConfigError(
            f"data.template={shown} uses the column {', '.join(absent)} of an item, which the items table does not "
            f"have; it has {', '.join(columns)}"
        )


def _used_columns(tree: nodes.Template) -> Iterator[str]:
    """Columns that are read of an item: of a loop's variable over the items, or of ``items[...]`` itself."""
    loops = [loop for loop in tree.find_all(nodes.For) if _is_listed(loop.iter)]
    names = {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}
    reads: list[nodes.Getattr | nodes.Getitem] = [*tree.find_all(nodes.Getattr), *tree.find_all(nodes.Getitem)]
    for node in reads:
        of_loop = isinstance(node.node, nodes.Name) and node.node.name in names
        of_list = isinstance(node.node, nodes.Getitem) and _is_listed(node.node.node)
        if not of_loop and not of_list:
            continue
        if isinstance(node, nodes.Getattr):
            yield node.attr
        elif isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            yield node.arg.value


def _is_listed(node: nodes.Node) -> bool:
    """Whether an expression is the items or candidates, or made of them (``items[-3:]``, ``items | reverse``)."""
    whole = [node, *node.find_all(nodes.Name)]
    return any(isinstance(part, nodes.Name) and part.name in (ITEMS, CANDIDATES) for part in whole)
