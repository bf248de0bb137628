"""What stands in front of a prompt: one rule for training, evaluation, serving and the exported tokenizer.

A prompt begins with the special tokens that its tokenizer puts in front of any text, and nothing stands behind it. So
models that were pretrained with a begin-of-text token (Llama, Mistral) keep it; Qwen, SmolLM2 and the tokenizers that
this package trains have none. An answer has no such token: it follows a prompt, and ends in the end-of-text token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, processors
from tokenizers import Tokenizer as Backend

from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import TokenRows
from tawin_nemo.util.files import write_json

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
#: Any text that every tokenizer with special tokens can write.
_TEXT = "a"


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids that config.json and generation_config.json name; None where the tokenizer has no such token."""

    bos: int | None
    eos: int
    pad: int


def bos_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens in front of every prompt, most often none or one."""
    return _around(tokenizer.backend)[0]


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> TokenRows:
    """Tokenise N prompts: ``bos_ids``, then the text; a text that spells them itself (a chat template) has them once.

    Raises DataError for text that the vocabulary cannot express.
    """
    rows, front = tokenizer.encode_batch(texts), bos_ids(tokenizer)
    if not front:
        return rows
    lacking = np.array([rows[row][: len(front)].tolist() != front for row in range(len(rows))], dtype=np.int64)
    flat = np.insert(rows.flat, np.repeat(rows.offsets[:-1], len(front) * lacking), np.tile(front, lacking.sum()))
    return TokenRows(flat, rows.offsets + np.concatenate([[0], np.cumsum(len(front) * lacking)]))


def special_tokens(tokenizer: Tokenizer, folder: Path) -> SpecialTokens:
    """The special tokens of the tokenizer whose files lie in ``folder``."""
    front = bos_ids(tokenizer)
    named = _text(_config(folder).get("bos_token"))
    bos = front[0] if front else tokenizer.backend.token_to_id(named) if named else None
    return SpecialTokens(bos, tokenizer.eos_id, tokenizer.pad_id)


def write_prompt_rule(tokenizer: Tokenizer, folder: Path) -> None:
    """Change the files of ``tokenizer`` in ``folder`` so that transformers writes prompts as training did.

    ``tokenizer(prompt)`` gives the ids of ``encode_prompts``, as the inputs that decoders take, and pads on the left,
    as ``generate`` needs it. The chat template and everything else stay.
    """
    front, behind = _around(tokenizer.backend)
    if behind:
        backend = Backend.from_file(str(folder / TOKENIZER))
        names = {token: backend.id_to_token(token) for token in front}
        text = "".join(f"{names[token]}:0 " for token in front)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{text}$A:0",
            pair=f"{text}$A:0 $B:1",
            special_tokens=[(name, token) for token, name in names.items()],
        )
        backend.save(str(folder / TOKENIZER), pretty=True)
    config = _config(folder)
    config["eos_token"] = config.get("eos_token") or tokenizer.eos_token
    config["pad_token"] = config.get("pad_token") or config["eos_token"]
    write_json(folder / CONFIG, config | {
        "model_input_names": ["input_ids", "attention_mask"], "padding_side": "left",
        "add_bos_token": bool(front), "add_eos_token": False,
    })  # fmt: skip


def _around(backend: Backend) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts in front of a text, and those that it puts behind it."""
    if backend.num_special_tokens_to_add(False) == 0:
        return [], []
    whole: Encoding = backend.encode(_TEXT)
    text = [place for place, special in enumerate(whole.special_tokens_mask) if not special]
    return whole.ids[: text[0]], whole.ids[text[-1] + 1 :]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _text(token: Any) -> str | None:
    """The text of a token in a tokenizer config: a string, or an object with its ``content``."""
    return token.get("content") if isinstance(token, dict) else token
