"""The tokenizer's chat template around prompts: the very ids of transformers' ``apply_chat_template``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.chat import chat_frame, check_frame
from tawin_nemo.data.jinja_prompts import JinjaTemplate
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import PromptEncoder
from tawin_nemo.data.tasks import TASKS, TaskTemplate
from tawin_nemo.data.tokenizer import Tokenizer, build_tokenizer
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError
from tests.data.chat_tokenizers import CHATML, TRIMMING, instruct_tokenizer

TITLES = ["steel bolt", "Acme glue (2 pack)", 'hose 3/4"', " saw "]
CODES = [["<a_0>", "<b_0>"], ["<a_0>", "<b_1>"], ["<a_1>", "<b_0>"], ["<a_2>", "<b_1>"]]
HISTORIES = [[], [0], [1, 2], [3, 0, 1], [0, 3]]
INSTRUCTION = (
    "A customer bought the items listed in the input, from oldest to newest. "
    "Name the item that this customer will buy next."
)


def applied(tokenizer: Tokenizer, message: str) -> list[int]:
    """transformers' ids of one user's message that waits for an answer."""
    return tokenizer.fast.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True)


@pytest.mark.parametrize("chat_template", [CHATML, TRIMMING], ids=["chatml", "trimming"])
@pytest.mark.parametrize("kind", ["title", "sid"])
def test_prompts_have_the_ids_of_apply_chat_template(tmp_path: Path, chat_template: str, kind: str) -> None:
    instruct_tokenizer(tmp_path, chat_template)
    codes = CODES if kind == "sid" else None
    data = DataConfig(template="alpaca", chat=True, tokenizer=str(tmp_path))
    tokenizer = build_tokenizer(data, CatalogConfig(kind=kind), ModelConfig(), TITLES, codes)
    template = Template("alpaca", kind).with_chat(chat_frame(tokenizer))
    texts = TITLES if codes is None else ["".join(item) for item in codes]
    rows = PromptEncoder(texts, tokenizer, template).encode(TokenRows.from_lists(HISTORIES))
    for row, history in enumerate(HISTORIES):
        shown = "\n".join(f'"{texts[item]}"' if kind == "title" else texts[item] for item in history)
        assert rows[row].tolist() == applied(tokenizer, f"{INSTRUCTION}\n\n{shown}".strip()), history
    check_frame(tokenizer, template.chat, [template.prompt(texts[:2])])
    catalog = build_catalog(TITLES, list("wxyz"), texts, tokenizer, template, kind=kind)
    assert catalog.paths[0].tolist()[-1] == tokenizer.eos_id == tokenizer.fast.convert_tokens_to_ids("<|im_end|>")


def test_a_jinja_text_is_the_message(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(instruct_tokenizer(tmp_path, TRIMMING))
    source = "{% for item in items %}\n{{ item.text }};\n{% endfor %}\nNext?\n\n"
    template = JinjaTemplate(source=source).with_chat(chat_frame(tokenizer))
    rows = PromptEncoder(TITLES, tokenizer, template).encode(TokenRows.from_lists(HISTORIES))
    for row, history in enumerate(HISTORIES):
        message = "".join(f"{TITLES[item]};\n" for item in history) + "Next?"
        assert rows[row].tolist() == applied(tokenizer, message)


def test_tasks_and_candidates_are_messages_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(instruct_tokenizer(tmp_path))
    frame = chat_frame(tokenizer)
    task = TaskTemplate("alpaca", "sid", frame, TASKS[1])
    assert task.prompt(["<a_0>"]) == f"{frame[0]}{TASKS[1].instruction}\n\n<a_0>{frame[1]}"
    shown = Template("alpaca", "title", frame).prompt_of([0], ["x"], [1, 2], ["y", "z"])
    assert shown.startswith(frame[0])
    assert shown.endswith(f'"x"\n\n### Candidates:\n"y"\n"z"{frame[1]}')


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(instruct_tokenizer(tmp_path, None))
    with pytest.raises(ConfigError, match=r"data.chat=true, but the tokenizer has no chat template: use .* Instruct"):
        chat_frame(tokenizer)


def test_a_chat_template_that_changes_messages_is_refused(tmp_path: Path) -> None:
    upper = Tokenizer.load(instruct_tokenizer(tmp_path / "a", CHATML.replace("['content']", "['content'] | upper")))
    frame = chat_frame(upper)  # the probe is in capitals already
    with pytest.raises(ConfigError, match="changes the message 'Name it'"):
        check_frame(upper, frame, [f"{frame[0]}Name it{frame[1]}"])
    twice = Tokenizer.load(instruct_tokenizer(tmp_path / "b", CHATML + "{{ messages[0]['content'] }}"))
    with pytest.raises(ConfigError, match="2 times"):
        chat_frame(twice)


def test_the_fingerprint_covers_the_text_around(tmp_path: Path) -> None:
    plain = Template("alpaca")
    one, other = plain.with_chat(("<s>", "</s>")), plain.with_chat(("<s>", "\n"))
    assert plain.fingerprint == Template().fingerprint == ""
    assert len({plain.fingerprint, one.fingerprint, other.fingerprint}) == 3
    assert one.fingerprint == plain.with_chat(("<s>", "</s>")).fingerprint


def test_a_chat_needs_words() -> None:
    with pytest.raises(ConfigError, match=r"data.chat=true .* data.template=compact has no words"):
        load_recipe(None, ["data.chat=true"])
    assert load_recipe(None, ["data.chat=true", "data.template=alpaca"]).data.chat


def test_the_qwen_files_give_the_ids_of_apply_chat_template(qwen_tokenizer: Path, tmp_path: Path) -> None:
    """The real vocabulary, whose pre-tokenizer looks at the neighbours of line breaks."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(qwen_tokenizer / "tokenizer.json"), eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    template = Template("alpaca", "title").with_chat(chat_frame(tokenizer))
    rows = PromptEncoder(TITLES, tokenizer, template).encode(TokenRows.from_lists(HISTORIES))
    for row, history in enumerate(HISTORIES):
        shown = "\n".join(f'"{TITLES[item]}"' for item in history)
        assert np.array_equal(rows[row], applied(tokenizer, f"{INSTRUCTION}\n\n{shown}".strip()))
