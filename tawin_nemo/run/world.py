"""The read-only surroundings of a stage: data, tokenizer, catalog, samples, model shape, replicas."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.semantic_ids import load_codes
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone, backbone, with_vocab
from tawin_nemo.config.load import differences, to_yaml
from tawin_nemo.config.schema import Recipe
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.interactions import Dataset, Split
from tawin_nemo.data.prompt_encoder import PromptEncoder
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import Samples
from tawin_nemo.data.tasks import active_tasks
from tawin_nemo.data.tokenizer import Tokenizer, build_tokenizer
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.datasets import run_dir_of
from tawin_nemo.run.node import open_dataset, open_samples
from tawin_nemo.run.prompt_format import final_template, plain_template
from tawin_nemo.types import SPLITS, DataParallel, TokenRows
from tawin_nemo.util import times
from tawin_nemo.util.errors import CatalogError, ConfigError, DataError
from tawin_nemo.util.files import atomic_path, sha256, write_json
from tawin_nemo.util.hub import local_folder
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: The file in the run directory with the vectors of ``model.item_tokens``.
ITEM_VECTORS = "item_vectors.npy"
#: Keys that may change between two attempts of a run. They do not change what is computed, except for the order of
#: floating-point sums under another layout or micro-batch size.
RESUMABLE_KEYS = (
    "run_dir", "checkpoint", "profile", "exp_manager", "eval.splits", "trainer.max_time", "trainer.threads",
    "trainer.keep_last", "trainer.peak_tflops", "trainer.save_interval", "trainer.save_minutes", "trainer.async_save",
    "trainer.num_nodes", "trainer.devices", "trainer.max_skipped_steps", "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size", "model.sequence_parallel", "model.recompute",
    "rollout.tensor_model_parallel_size", "rollout.pipeline_model_parallel_size", "rollout.token_budget",
    "eval.token_budget", "sft.micro_batch_tokens", "rl.micro_batch_tokens", "preference.micro_batch_tokens",
    "trainer.offload_optimizer", "trainer.overlap_grad_reduce", "trainer.overlap_param_gather",
    "trainer.collective_timeout", "rollout.placement", "rollout.devices", "rollout.servers", "rollout.api_key_file",
    "rollout.control_token_file", "rollout.server_timeout_s", "rollout.server_tries", "rollout.server_silent_s",
    "rollout.server_wait_s", "rollout.weights_backend", "trainer.metric_sinks", "sinks.project", "sinks.mlflow_uri",
    "sinks.mlflow_model", "sinks.mlflow_upload", "sinks.pushgateway", "sinks.otlp_endpoint",
)  # fmt: skip

#: Keys that may change between two attempts because they only say how long stages are; see train/extension.py.
LENGTH_KEYS = ("sft.epochs", "preference.epochs", "preference.max_steps", "rl.epochs", "rl.max_steps")


@dataclass(frozen=True)
class World:
    """Read-only surroundings of every stage of one run."""

    recipe: Recipe
    run_dir: Path
    dataset: Dataset
    tokenizer: Tokenizer
    template: Template
    catalog: Catalog
    item_texts: list[str]
    samples: dict[str, Samples]
    shape: Backbone
    dp: DataParallel
    deadline: float | None = None
    export: Path | None = None  # the exported model that tokenizer and catalog come from, if they do

    @property
    def tokenizer_dir(self) -> Path:
        """The folder with the tokenizer's files."""
        return self.export or self.run_dir / "tokenizer"

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of what trained weights belong to."""
        prompt = self.template.fingerprint
        fingerprints = {"tokenizer": self.tokenizer.fingerprint, "catalog": self.catalog.fingerprint}
        further = {"prompt": prompt, "item_vectors": self.item_vectors_fingerprint}
        return {**fingerprints, **{name: value for name, value in further.items() if value}}

    @property
    def item_vectors_fingerprint(self) -> str:
        """SHA-256 of the vectors of ``model.item_tokens``, which the run keeps; empty without that key or that file."""
        path = self.run_dir / ITEM_VECTORS
        return sha256(path) if self.recipe.model.item_tokens and path.is_file() else ""

    def prompts_of(self, histories: Sequence[Sequence[int]]) -> TokenRows:
        """The prompts of histories of item indices, oldest first, without candidates."""
        marks = bool(self.recipe.model.item_tokens)
        encoder = PromptEncoder(self.item_texts, self.tokenizer, self.template, item_tokens=marks)
        return encoder.encode_full_prompts(TokenRows.from_lists([list(history) for history in histories]))

    @property
    def train_rows_for_sft(self) -> np.ndarray:
        """Row numbers of ``samples['train']`` (time order) that the first SFT sees."""
        if self.recipe.sft.rows == "fresh":
            return self.all_rows[self._first_fresh :]
        return self.earlier_rows if self._sft_is_earlier else self.all_rows

    @cached_property
    def all_rows(self) -> np.ndarray:
        """All row numbers of train, of which the others are views."""
        return np.arange(len(self.samples["train"]))

    @property
    def earlier_rows(self) -> np.ndarray:
        """Row numbers of train before its ``rl.fresh_share``."""
        return self.all_rows[: self._first_fresh]

    @property
    def train_rows_for_rl(self) -> np.ndarray:
        """Row numbers that RL (and the SFT continued beside it) sees."""
        return self.all_rows[self._first_fresh if self.recipe.rl.rows == "fresh" else 0 :]

    @property
    def train_rows_for_preference(self) -> np.ndarray:
        """Row numbers that preference optimisation sees."""
        return self.all_rows[self._first_fresh if self.recipe.preference.rows == "fresh" else 0 :]

    @property
    def _first_fresh(self) -> int:
        return round(len(self.samples["train"]) * (1.0 - self.recipe.rl.fresh_share))

    @property
    def _sft_is_earlier(self) -> bool:
        rows, later = self.recipe.sft.rows, (self.recipe.rl, self.recipe.preference)
        return rows == "earlier" or (rows == "auto" and any(part.enabled and part.rows == "fresh" for part in later))


def open_run_dir(recipe: Recipe, *, same_recipe: bool) -> Path:
    """Create or reopen the run directory.

    Raises ConfigError when ``same_recipe`` (training) and the directory holds a run of another recipe.
    """
    run_dir = run_dir_of(recipe)
    stored, resolved = run_dir / "recipe.yaml", to_yaml(recipe)
    if same_recipe and stored.is_file():
        changed = differences(stored.read_text(encoding="utf-8"), resolved, ignore=(*RESUMABLE_KEYS, *LENGTH_KEYS))
        if changed:
            sources = [line.removeprefix("code.").split(":")[0] for line in changed if line.startswith("code.")]
            raise ConfigError(
                f"{run_dir} holds a run of another recipe ({'; '.join(changed[:5])}); "
                + ("bring back the source of the code that it names, or " if sources else "")
                + "choose another name= or run_dir=, or remove that directory"
            )
    if runtime.world_rank() == 0 and not stored.is_file():
        with atomic_path(stored) as temporary:
            temporary.write_text(resolved, encoding="utf-8")
    runtime.barrier()
    return run_dir


def build_world(recipe: Recipe, run_dir: Path, data_root: Path, *, codes_path: Path | None = None) -> World:
    """Load the prepared dataset under ``data_root`` and derive everything from it (deterministic on every rank)."""
    dataset = open_dataset(data_root)
    check_titles(recipe, dataset)
    codes = load_codes(codes_path, dataset.items.external_ids) if codes_path else None
    plain = plain_template(recipe, run_dir, data_root)
    runtime.on_rank_0(partial(_write_tokenizer, recipe, run_dir, dataset, codes, plain))
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    texts = ["".join(item) for item in codes] if codes else list(dataset.items.titles)
    template = final_template(plain, recipe, run_dir, tokenizer, texts)
    catalog = build_catalog(
        dataset.items.titles, dataset.items.external_ids, texts, tokenizer, template, kind=recipe.catalog.kind
    )
    splits = {name: limited(getattr(dataset, name), name, recipe) for name in SPLITS}
    encoder = PromptEncoder(texts, tokenizer, template, item_tokens=bool(recipe.model.item_tokens))
    if empty := [name for name, split in splits.items() if len(split) == 0]:
        raise DataError(f"split {empty[0]} of {data_root} has no rows; prepare it with more data")
    samples = open_samples(splits, encoder, recipe.data)
    shape = _shape(recipe, tokenizer.size)
    check_lengths(samples, catalog, shape)
    if runtime.world_rank() == 0:
        if not (run_dir / "catalogue.json").is_file():  # an evaluation of fewer rows leaves the run's record alone
            write_json(run_dir / "catalogue.json", catalog_summary(catalog, samples))
        store_catalog(run_dir / "catalogue", catalog, tokenizer)
    runtime.barrier()
    return World(
        recipe, run_dir, dataset, tokenizer, template, catalog, texts, samples, shape,
        runtime.data_parallel(), deadline(recipe.trainer.max_time),
    )  # fmt: skip


def check_titles(recipe: Recipe, dataset: Dataset) -> None:
    """Raises DataError where a language model would learn titles that are only external ids."""
    aligned = [task.name for task in active_tasks(recipe.align)]
    if dataset.has_titles or recipe.baseline.model != "off" or (recipe.catalog.kind == "sid" and not aligned):
        return
    raise DataError(
        "the data have no item file, so items have no titles, and a language model would learn their ids as text; "
        "name one with prepare.metadata=FILE (item and title), or train a classic baseline (baseline.model=sasrec), "
        "or codes without text (catalog.kind=sid)"
    )


def store_catalog(folder: Path, catalog: Catalog, tokenizer: Tokenizer) -> None:
    """Store the run's trie in ``folder``, or compare it with the one that an earlier attempt stored.

    Raises CatalogError when the data or the tokenizer now give another catalog than the run was trained with.
    """
    if not folder.is_dir():
        catalog.trie.save(folder, tokenizer=tokenizer.fingerprint)
        return
    stored = TokenTrie.load(folder, tokenizer=tokenizer.fingerprint)
    paths, now = stored.arrays, catalog.trie.arrays
    same = np.array_equal(paths.pool_offsets, now.pool_offsets) and np.array_equal(paths.pool_tokens, now.pool_tokens)
    if not same:
        raise CatalogError(
            f"{folder} is the catalog that this run was trained with ({stored.num_items} items); the data now give "
            f"another one ({len(catalog)} items): restore the data, or start a new run with name= or run_dir="
        )


def _write_tokenizer(
    recipe: Recipe, run_dir: Path, dataset: Dataset, codes: list[list[str]] | None, template: Template
) -> None:
    """RUN_DIR/tokenizer, unless an earlier attempt has written it."""
    directory = run_dir / "tokenizer"
    if (directory / "tokenizer.json").is_file():
        return
    compact = recipe.data.template == "compact"
    markers = [task.marker for task in active_tasks(recipe.align)] if compact else []
    titles = dataset.items.titles
    build_tokenizer(recipe.data, recipe.catalog, recipe.model, titles, codes, markers, template).save(directory)


def limited(split: Split, name: str, recipe: Recipe) -> Split:
    """The rows of a split that ``data.train_limit`` and ``data.eval_limit`` leave."""
    limit = recipe.data.train_limit if name == "train" else recipe.data.eval_limit
    if limit == 0 or limit >= len(split.target_N):
        return split
    return split.slice(len(split) - limit, len(split)) if name == "train" else split.slice(0, limit)


def _shape(recipe: Recipe, vocab_needed: int) -> Backbone:
    init, revision = recipe.model.init, recipe.model.revision
    shape = backbone(recipe.model.backbone) if init == "random" else backbone_from_hf(local_folder(init, revision))
    return with_vocab(shape, vocab_needed)


def check_lengths(samples: dict[str, Samples], catalog: Catalog, shape: Backbone) -> None:
    """Raises ConfigError when a prompt with its answer has more tokens than the model attends to."""
    prompts = max(rows.prompts.longest for rows in samples.values())
    longest = prompts + int(catalog.paths.lengths.max())
    if longest > shape.positions:
        has = f"has {shape.max_position} positions"
        if shape.positions < shape.max_position:
            has = f"attends to its newest {shape.window} alone (sliding_window), which is not supported for longer ones"
        raise ConfigError(
            f"the longest prompt with its answer has {longest} tokens but the model {has}; {_too_long(catalog, shape)}"
        )


def _too_long(catalog: Catalog, shape: Backbone) -> str:
    """Which key helps: of the items where one alone fills much of the model's positions, else of the prompts."""
    longest, tokens = int(catalog.paths.lengths.argmax()), catalog.paths.longest
    if tokens <= shape.max_position // 4:
        return "lower data.max_prompt_tokens or data.max_history"
    title = catalog.titles[longest]
    return (
        f"item {catalog.external_ids[longest]} ({title[:60]!r}, {len(title):,} characters) alone has {tokens}: lower "
        "prepare.max_title_chars or prepare.max_title_words"
    )


def catalog_summary(catalog: Catalog, samples: dict[str, Samples]) -> dict[str, object]:
    """Sizes of catalog and samples, as ``catalogue.json`` and the report have them."""
    lengths = catalog.paths.lengths
    return {
        "items": len(catalog.titles),
        "paths": len(catalog.titles) - sum(len(group) - 1 for group in catalog.duplicates()),
        "items_on_shared_paths": sum(len(group) for group in catalog.duplicates()),
        "trie_nodes": catalog.trie.num_nodes,
        "path_tokens_mean": float(lengths.mean()),
        "path_tokens_max": int(lengths.max()),
        "rows": {name: len(rows) for name, rows in samples.items()},
        "prompt_tokens_mean": {name: rows.prompts.num_tokens / len(rows) for name, rows in samples.items()},
    }


def deadline(max_time: str) -> float | None:
    """Monotonic clock reading at which ``DD:HH:MM:SS`` from now is over; None for an empty string."""
    return None if (seconds := times.duration(max_time)) is None else time.monotonic() + seconds


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ValueError for a file without one."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
