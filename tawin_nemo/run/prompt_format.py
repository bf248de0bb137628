"""The prompt template of a run. What the recipe's keys do not fix is kept in ``RUN_DIR/prompt.json``.

That is the text of a Jinja template, whose file may be edited later or lie on another machine, and the text that the
tokenizer's chat template puts around a message, which may contain the date. All verbs read them there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tawin_nemo.config.schema import Recipe
from tawin_nemo.data.chat import chat_frame, check_frame
from tawin_nemo.data.interactions import read_columns
from tawin_nemo.data.jinja_prompts import Columns, JinjaTemplate, read_source
from tawin_nemo.data.prompts import Template, build_template
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.files import write_json

FILE = "prompt.json"


def plain_template(recipe: Recipe, run_dir: Path, data_root: Path) -> Template:
    """The template of ``data.template``, not yet in a chat. Collective.

    Raises ConfigError for a Jinja template that cannot be used, or that was changed since the run was trained.
    """
    data, kind = recipe.data, recipe.catalog.kind
    if not data.jinja:
        return build_template(data.template, kind)
    source = runtime.on_rank_0(partial(_source, recipe, run_dir))
    template = JinjaTemplate(kind=kind, source=source, shown=data.template, columns=Columns.of(read_columns(data_root)))
    if data.show_candidates and not template.shows_candidates:
        raise ConfigError(
            f"data.show_candidates=true, but data.template={data.template} does not use candidates; write them there, "
            "or set data.show_candidates=false"
        )
    return template


def final_template(
    plain: Template, recipe: Recipe, run_dir: Path, tokenizer: Tokenizer, texts: Sequence[str]
) -> Template:
    """``plain`` inside the tokenizer's chat template, with ``data.chat``; kept in ``prompt.json``. Collective.

    ``texts`` of the items: the chat template is tried on some. Raises ConfigError for a tokenizer without a chat
    template, and for one that changes messages.
    """
    template = plain
    if recipe.data.chat:
        template = plain.with_chat(runtime.on_rank_0(partial(_chat, plain, run_dir, tokenizer, texts)))
    if template.fingerprint and runtime.world_rank() == 0:
        source = template.source if isinstance(template, JinjaTemplate) else template.name
        record = {"template": source, "chat": list(template.chat), "sha256": template.fingerprint}
        if _stored(run_dir) != record:
            write_json(run_dir / FILE, record)
    return template


def _source(recipe: Recipe, run_dir: Path) -> str:
    """The Jinja text: the run's, also where its file is gone."""
    stored, data = _stored(run_dir), recipe.data
    try:
        now = read_source(data.template)
    except ConfigError:
        if stored is None:
            raise
        return str(stored["template"])
    if stored is not None and stored["template"] != now and _is_trained(run_dir):
        raise ConfigError(
            f"data.template={data.template} was changed since {run_dir} was trained ({FILE} there has the old text): "
            "bring it back, or start a new run with name= or run_dir="
        )
    return now


def _chat(plain: Template, run_dir: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[str, str]:
    stored = _stored(run_dir)
    if stored is not None and _is_trained(run_dir) and any(stored["chat"]):
        before, behind = stored["chat"]
        return str(before), str(behind)
    frame = chat_frame(tokenizer)
    template = plain.with_chat(frame)
    tried = [list(range(number)) for number in range(min(4, len(texts) + 1))]
    check_frame(tokenizer, frame, [template.prompt_of(items, [texts[item] for item in items]) for items in tried])
    return frame


def _stored(run_dir: Path) -> dict[str, Any] | None:
    file = run_dir / FILE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _is_trained(run_dir: Path) -> bool:
    """Whether a stage of the run has a checkpoint, which a dry run has not."""
    return next(run_dir.glob("*/checkpoints/step_*"), None) is not None or any(run_dir.glob("*/done.json"))
