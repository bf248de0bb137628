"""Alignment tasks: SFT on translations between codes and text, beside the prediction of the next item.

The tasks are those of MiniOneRec (arXiv 2510.24431: codes of a history -> codes, title <-> codes, codes of a history ->
title, titles of a history -> codes) and of LC-Rec (arXiv 2311.09049: description <-> codes, intention -> codes). Tasks
use the same prompt template as the next item, each with its own instruction (alpaca) or marker token (compact). Beside
a Jinja template they are written as alpaca writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tawin_nemo.config.schema import AlignConfig, DataConfig
from tawin_nemo.data.catalog_builder import answer_paths
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.prompts import Template, build_template
from tawin_nemo.data.samples import Samples, encode_split
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError

#: The ways to write an item; all but the codes are natural language.
CODES, TITLE, DESCRIPTION, INTENTION = "codes", "title", "description", "intention"


@dataclass(frozen=True)
class Task:
    """An alignment task: ``given`` and ``wanted`` are the ways to write items in the question and in the answer."""

    name: str  # the key of section ``align``
    given: str
    wanted: str
    of_history: bool  # the question shows a history and wants the item after it; else both are the same item
    instruction: str

    @property
    def marker(self) -> str:
        """The token that marks the task in the compact template."""
        return f"<|{self.name}|>"


TASKS = (
    Task("title_to_sid", TITLE, CODES, False, "Name the item that has the title in the input."),
    Task("sid_to_title", CODES, TITLE, False, "Write the title of the item in the input."),
    Task(
        "history_to_title", CODES, TITLE, True,
        "A customer bought the items listed in the input, from oldest to newest. Write the title of the item that this "
        "customer will buy next.",
    ),
    Task(
        "titles_to_sid", TITLE, CODES, True,
        "A customer bought the items whose titles are listed in the input, from oldest to newest. Name the item that "
        "this customer will buy next.",
    ),
    Task(
        "titles_to_title", TITLE, TITLE, True,
        "A customer bought the items whose titles are listed in the input, from oldest to newest. Write the title of "
        "the item that this customer will buy next.",
    ),
    Task("description_to_sid", DESCRIPTION, CODES, False, "Name the item that the input describes."),
    Task("sid_to_description", CODES, DESCRIPTION, False, "Describe the item in the input."),
    Task("intention_to_sid", INTENTION, CODES, False, "Name the item for a customer who wants what the input says."),
)  # fmt: skip


def active_tasks(align: AlignConfig) -> tuple[Task, ...]:
    """The tasks whose weight is above 0, in the table's order."""
    return tuple(task for task in TASKS if getattr(align, task.name) > 0)


@dataclass(frozen=True)
class TaskTemplate(Template):
    """``Template`` with a task's instruction or marker; ``kind`` is the way in which the question writes items."""

    task: Task = TASKS[0]

    @property
    def head(self) -> str:
        """The text in front of the question: the compact marker, or the instruction in Alpaca's template."""
        if self.name == "compact":
            return self.task.marker
        return self.before_input(self.task.instruction)


@dataclass(frozen=True)
class TaskRows:
    """N questions of a task with their answers, EOS included."""

    task: Task
    samples: Samples  # ``target_N`` is the item that the answer is about
    answers: TokenRows

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, rows: np.ndarray) -> TaskRows:
        """The questions at indices ``rows`` [M], in that order."""
        return replace(self, samples=self.samples.take(rows), answers=self.answers.take(rows))


@dataclass(frozen=True)
class TaskEncoder:
    """Tokenises tasks. ``texts[way][item]`` is an item's text, empty where it has none of that way."""

    texts: Mapping[str, Sequence[str]]
    tokenizer: Tokenizer
    template: Template  # of the run
    data: DataConfig
    _paths: dict[str, TokenRows] = field(default_factory=dict)  # those that ``paths`` has made, by way

    def rows(self, task: Task, split: Split) -> TaskRows:
        """The rows of ``split`` as questions of ``task``; those whose question or answer has no text are skipped.

        Raises ConfigError when no row is left, CatalogError for texts that cannot be tokenised unambiguously, and
        DataError for an item that does not fit into a prompt.
        """
        given, wanted = self.texts[task.given], self.texts[task.wanted]
        has_given, has_wanted = (np.array([bool(text) for text in texts], dtype=bool) for texts in (given, wanted))
        rows = np.flatnonzero(self._has_question(task, split, has_given) & has_wanted[split.target_N])
        if len(rows) == 0:
            raise ConfigError(
                f"align.{task.name} has no rows: no item of these has a {task.given} and a {task.wanted}; set "
                f"align.{task.name}=0"
            )
        questions = split if len(rows) == len(split) else Split(
            split.user_N[rows], split.history.take(rows), split.target_N[rows], split.time_N[rows]
        )  # fmt: skip
        template = TaskTemplate(self.template.wording, _kind(task.given), self.template.chat, task)
        samples = encode_split(questions, given, self.tokenizer, template, self.data)
        return TaskRows(task, samples, self.paths(task.wanted).take(samples.target_N))

    def paths(self, way: str) -> TokenRows:
        """Token paths of all items as answers in ``way``, EOS included; an item without such a text is EOS alone."""
        if way not in self._paths:
            self._paths[way] = self._tokenized(way)
        return self._paths[way]

    def _tokenized(self, way: str) -> TokenRows:
        template = build_template(self.template.wording, _kind(way)).with_chat(self.template.chat)
        texts = self.texts[way]
        known = [item for item, text in enumerate(texts) if text]
        paths = answer_paths([texts[item] for item in known], self.tokenizer, template)
        row_I = np.full(len(texts), len(known))
        row_I[known] = np.arange(len(known))
        eos = np.array([self.tokenizer.eos_id])
        both = TokenRows(np.concatenate([paths.flat, eos]), np.append(paths.offsets, len(paths.flat) + 1))
        return both.take(row_I)

    @staticmethod
    def _has_question(task: Task, split: Split, has_given: np.ndarray) -> np.ndarray:
        """bool [N]: all items of the row's question have a text."""
        if not task.of_history:
            return has_given[split.target_N]
        missing = np.concatenate([[0], np.cumsum(~has_given[split.history.flat])])
        return np.asarray(np.diff(missing[split.history.offsets]) == 0)


def _kind(way: str) -> str:
    """``Template.kind`` for a way of writing items: codes are joined, texts are separated by marks."""
    return "sid" if way == CODES else "title"


def items_as_split(items: np.ndarray) -> Split:
    """One sample per item, whose history is the item itself: the questions about single items."""
    items = np.asarray(items, dtype=np.int64)
    none = np.zeros(len(items), dtype=np.int64)
    return Split(none, TokenRows(items, np.arange(len(items) + 1)), items, none)


def held_out_items(num_items: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that tasks about single items train on, and those that they are tested on; both ascending."""
    order = np.random.default_rng([seed, 5]).permutation(num_items)
    held = round(share * num_items)
    return np.sort(order[held:]), np.sort(order[:held])


def truncate_words(text: str, most: int) -> str:
    """The first ``most`` words of ``text``, separated by single spaces.

    >>> truncate_words("a  long\\n story", 2)
    'a long'
    """
    return " ".join(text.split()[:most])
