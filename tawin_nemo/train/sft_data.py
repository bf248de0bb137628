"""Training data of SFT: the next item of every history and the alignment tasks, mixed by weight.

Axes: N questions (prompts with an answer), R some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tawin_nemo.catalog.item_names import named, shorten
from tawin_nemo.config.schema import SftConfig
from tawin_nemo.data.batches import BatchStream, MixedStream
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.lazy_rows import JoinedRows, TokenSource
from tawin_nemo.data.prompt_encoder import PromptEncoder
from tawin_nemo.data.prompt_index import measured
from tawin_nemo.data.samples import Samples
from tawin_nemo.data.tasks import (
    CODES,
    DESCRIPTION,
    INTENTION,
    TITLE,
    Task,
    TaskEncoder,
    TaskRows,
    active_tasks,
    held_out_items,
    items_as_split,
    truncate_words,
)
from tawin_nemo.data.trees import tree_batches
from tawin_nemo.run.world import World, read_json
from tawin_nemo.types import TokenBatch, TokenRows
from tawin_nemo.util.errors import CatalogError, ConfigError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: Rows of valid used to test a task about histories.
TESTED_ROWS = 512


@dataclass(frozen=True)
class TaskSet:
    """A task with its training rows and its test rows (of held-out items, or of histories of valid)."""

    train: TaskRows
    held_out: TaskRows

    @property
    def task(self) -> Task:
        """The task of the rows."""
        return self.train.task


@dataclass(frozen=True)
class Curriculum:
    """LLaRA's change from prompts of texts alone to prompts with item tokens (``sft.curriculum``).

    ``steps``: when it is over. ``first_text``: index of the question that is row 0 of train without item tokens; those
    of the ``rows`` rows follow each other.
    """

    steps: int
    rows: int
    first_text: int
    seed: int

    def chosen(self, picked: np.ndarray, step: int) -> np.ndarray:
        """``picked`` questions of a step, where rows of train have no item tokens with probability 1 - step / steps;
        a pure function of seed and step."""
        late = np.random.default_rng([self.seed, step]).random(len(picked)) < step / self.steps
        return np.where(late | (picked >= self.rows), picked, picked + self.first_text)


@dataclass(frozen=True)
class SftData:
    """N questions with their answers: the rows of train, then those of the tasks, then with a curriculum the rows of
    train without item tokens; without tasks and curriculum nothing is copied, and no array grows with the rows."""

    prompts: TokenSource
    answers: TokenRows  # the paths of the catalog's items first
    answer_N: np.ndarray  # which of the answers each prompt has
    num_items: int
    row_of: np.ndarray  # number of the stream -> index of a question
    stream: BatchStream
    tasks: tuple[TaskSet, ...]
    curriculum: Curriculum | None = None

    def picked(self, step: int) -> np.ndarray:
        """Indices of the questions of a step."""
        picked = self.row_of[self.stream.batch(step)]
        return picked if self.curriculum is None else self.curriculum.chosen(picked, step)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each of the questions ``rows`` with its answer."""
        return self.prompts.lengths_of(rows) + self.answers.lengths_of(self.answer_N[rows])

    def batches(self, world: World, rows: np.ndarray) -> list[TokenBatch]:
        """The questions ``rows`` and their answers as token batches under the token budget of ``sft``."""
        answer_R = self.answer_N[rows]
        return answer_batches(
            world, self.prompts.take(rows), self.answers.take(answer_R), answer_R < self.num_items, world.recipe.sft
        )


def sft_data(world: World, rows: np.ndarray, *, curriculum: float = 0.0) -> SftData:
    """``rows`` of train with the tasks of section ``align``; ``curriculum`` is ``sft.curriculum`` of the stage.

    Raises ConfigError for a task without rows.
    """
    train, paths = world.samples["train"], world.catalog.paths
    tasks = tuple(task_sets(world, rows))
    answers, answer_N, first = [paths], [train.target_N.astype(np.int64, copy=False)], len(paths)
    for part in (task.train for task in tasks):
        if part.task.wanted == CODES:
            answer_N.append(part.samples.target_N.astype(np.int64))
        else:
            answer_N.append(first + np.arange(len(part)))
            answers.append(part.answers)
            first += len(part)
    texts = [text_prompts(world)] if curriculum > 0 else []
    answer_N += [train.target_N.astype(np.int64, copy=False) for _ in texts]
    counts = [len(part.train) for part in tasks]
    shares = [round(getattr(world.recipe.align, part.task.name) * len(part.train)) for part in tasks]
    stream = MixedStream.of(
        [len(rows), *counts], [len(rows), *shares], world.recipe.sft.global_batch_size, world.recipe.seed
    )
    steps = curriculum * world.recipe.sft.epochs * -(-stream.n // stream.batch_size)
    first_text = len(train) + sum(counts)
    return SftData(
        prompts=JoinedRows.of([train.prompts, *(part.train.samples.prompts for part in tasks), *texts]),
        answers=TokenRows.cat(answers),
        answer_N=joined_arrays(answer_N),
        num_items=len(paths),
        row_of=joined_arrays([rows, len(train) + np.arange(sum(counts))]),
        stream=stream,
        tasks=tasks,
        curriculum=Curriculum(max(1, round(steps)), len(train), first_text, world.recipe.seed) if texts else None,
    )


def joined_arrays(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The int64 arrays one after another; the only one with entries is returned as it is."""
    filled = [part for part in parts if len(part)]
    return filled[0] if len(filled) == 1 else np.concatenate(parts)


def text_prompts(world: World) -> TokenSource:
    """The prompts of the rows of train without item tokens, with the same items in them."""
    train = world.samples["train"]
    encoder = PromptEncoder(world.item_texts, world.tokenizer, world.template)
    return measured(train.history, encoder, train.candidates if world.recipe.data.show_candidates else None)


def answer_batches(
    world: World, prompts: TokenSource, answers: TokenRows, is_item_N: np.ndarray, cfg: SftConfig
) -> list[TokenBatch]:
    """Each prompt followed by its answer, packed under the token budget.

    In trie space an answer that is no path of the catalog (a title beside codes) is scored over the vocabulary.
    """
    trie = world.catalog.trie if cfg.loss_space == "trie" else None
    groups = [np.arange(len(prompts))] if trie is None else [np.flatnonzero(is_item_N), np.flatnonzero(~is_item_N)]
    batches = []
    for rows, space in zip(groups, (trie, None), strict=False):
        if len(rows):
            parts = tree_batches(
                prompts.take(rows), answers.take(rows), np.arange(len(rows)), space, cfg.micro_batch_tokens
            )
            batches += [batch for batch, _, _ in parts]
    return batches


def item_batches(world: World, samples: Samples) -> list[TokenBatch]:
    """The histories of ``samples``, each with its next item, as token batches."""
    answers = world.catalog.paths.take(samples.target_N)
    return answer_batches(world, samples.prompts, answers, np.ones(len(samples), dtype=bool), world.recipe.sft)


def task_batches(world: World, rows: TaskRows) -> list[TokenBatch]:
    """The questions of one task as token batches."""
    is_item_N = np.full(len(rows), rows.task.wanted == CODES)
    return answer_batches(world, rows.samples.prompts, rows.answers, is_item_N, world.recipe.sft)


def task_sets(world: World, rows: np.ndarray) -> Iterator[TaskSet]:
    """The active tasks: questions about histories from ``rows`` of train, those about single items from all items
    but the held-out ones."""
    align = world.recipe.align
    tasks = active_tasks(align)
    if not tasks:
        return
    wording = wording_of(world)
    items = held_out_items(len(world.catalog), align.holdout, world.recipe.seed)
    valid = world.samples["valid"]
    tested = np.unique(np.linspace(0, len(valid) - 1, min(TESTED_ROWS, len(valid))).astype(np.int64))
    histories = _as_split(_taken(world.samples["train"], rows)), _as_split(valid.take(tested))
    for task in tasks:
        learnt, held = histories if task.of_history else map(items_as_split, items)
        task_set = TaskSet(wording.rows(task, learnt), wording.rows(task, held))
        log.info("task %s: %d rows, tested on %d", task.name, len(task_set.train), len(task_set.held_out))
        yield task_set


def wording_of(world: World) -> TaskEncoder:
    """The texts of the items in every form that the tasks use: codes, titles, descriptions, intentions."""
    align, items = world.recipe.align, world.dataset.items
    texts = {
        CODES: world.item_texts,
        TITLE: items.titles,
        DESCRIPTION: [truncate_words(text, align.max_words) for text in items.descriptions],
    }
    if align.intentions:
        path = Path(world.recipe.data.root) / align.intentions
        texts[INTENTION] = intentions(path, items.external_ids, align.max_words)
    return TaskEncoder(texts, world.tokenizer, world.template, world.recipe.data)


def intentions(path: Path, external_ids: Sequence[str], max_words: int) -> list[str]:
    """Texts by item from a JSON file {item: text}; items without one get an empty text.

    Items are external ids, or numbers as ``catalog.item_names.named`` explains them. Raises ConfigError for a missing
    or malformed file, numbers that nothing explains, items that the catalog lacks, and values that are no text.
    """
    if not path.is_file():
        raise ConfigError(f"align.intentions: there is no file {path}; write one JSON object {{external id: text}}")
    try:
        texts = dict(named(path, list(read_json(path).items()), external_ids, "intentions"))
    except CatalogError as error:
        raise ConfigError(f"align.intentions: {error}") from error
    except ValueError as error:
        raise ConfigError(f"align.intentions: {path} is not a JSON object ({error})") from error
    known = set(external_ids)
    wrong = [key for key, text in texts.items() if key not in known or not isinstance(text, str)]
    if wrong:
        raise ConfigError(
            f"align.intentions: {path} has {len(wrong)} entries that are not an item of the catalog with a text: "
            f"{shorten(wrong)}"
        )
    return [truncate_words(str(texts.get(item, "")), max_words) for item in external_ids]


def _taken(samples: Samples, rows: np.ndarray) -> Samples:
    """The samples at the ascending indices ``rows``; the same samples, not copied, where these are all."""
    return samples if len(rows) == len(samples) else samples.take(rows)


def _as_split(samples: Samples) -> Split:
    history = samples.history.in_memory()
    return Split(samples.user_N, history, samples.target_N, np.broadcast_to(np.int64(0), len(samples)))
