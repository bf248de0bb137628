"""One rule for what stands in front of a prompt: in training, and in the tokenizer that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import PromptEncoder
from tawin_nemo.data.special_tokens import bos_ids, encode_prompts, special_tokens, write_prompt_rule
from tawin_nemo.data.tokenizer import Tokenizer, build_tokenizer
from tawin_nemo.types import TokenRows

TITLES = ["Steel ruler 30 cm", 'M8 x 1.25" bolt', "café №5", "Hex key set"]
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_level(**special: str) -> Backend:
    """A byte-level vocabulary without merges, with special tokens behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(sorted(set(special.values())))
    return backend


def with_template(single: str) -> Backend:
    backend = byte_level(bos="<s>", eos="</s>")
    tokens = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=tokens)
    return backend


def llama3(folder: Path) -> None:
    """The begin-of-text token comes from a post-processor, as in Llama 3."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=with_template("<s> $A:0"), **names)
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def llama2(folder: Path) -> None:
    """The class itself adds it, told by ``add_bos_token``."""
    LlamaTokenizerFast(tokenizer_object=byte_level(b="<s>", e="</s>", u="<unk>")).save_pretrained(folder)


def both_ends(folder: Path) -> None:
    """A tokenizer that ends texts as well: such an end in a prompt would stop the model."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=with_template("<s> $A:0 </s>"), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)


def only_end(folder: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=with_template("$A:0 </s>"), eos_token="</s>").save_pretrained(folder)


def qwen(folder: Path) -> None:
    """A begin token has a name, but nothing is put in front of texts."""
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(b="<s>", e="</s>"), bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def own(folder: Path) -> None:
    data = DataConfig(tokenizer="bpe", bpe_vocab_size=300)
    build_tokenizer(data, CatalogConfig(), ModelConfig(), TITLES, None).save(folder)


#: Maker of a folder, and the tokens in front of its prompts.
KINDS = {"llama3": (llama3, ["<s>"]), "llama2": (llama2, ["<s>"]), "both_ends": (both_ends, ["<s>"]),
         "only_end": (only_end, []), "qwen": (qwen, []), "own": (own, [])}  # fmt: skip


@pytest.fixture(params=KINDS, ids=str)
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Path, list[str]]:
    """The tokenizer of a run (template markers added), its exported files, and what stands in front of prompts."""
    make, front = KINDS[request.param]
    make(tmp_path / "base")
    data = DataConfig(tokenizer=str(tmp_path / "base"))
    build_tokenizer(data, CatalogConfig(), ModelConfig(), TITLES, None).save(tmp_path / "run")
    run = Tokenizer.load(tmp_path / "run")
    run.save(tmp_path / "export")
    write_prompt_rule(run, tmp_path / "export")
    return run, tmp_path / "export", front


def test_training_and_the_exported_tokenizer_write_the_same_ids(exported: tuple[Tokenizer, Path, list[str]]) -> None:
    tokenizer, folder, front = exported
    histories = [[0], [1, 2], [], [3, 0, 1, 2]]
    for name in ("compact", "alpaca"):
        template = Template(name)
        trained = PromptEncoder(TITLES, tokenizer, template).encode(TokenRows.from_lists(histories))
        texts = [template.prompt([TITLES[item] for item in history]) for history in histories]
        theirs = AutoTokenizer.from_pretrained(folder)
        for row, text in enumerate(texts):
            expected = trained[row].tolist()
            assert theirs(text)["input_ids"] == expected
            assert encode_prompts(tokenizer, [text])[0].tolist() == expected
            assert theirs.convert_ids_to_tokens(expected[: len(front)]) == front
            assert expected[len(front) :] == tokenizer.encode_batch([text])[0].tolist()
        batch = theirs(texts, padding=True, return_tensors="np")
        assert list(batch) == ["input_ids", "attention_mask"]  # what a decoder's generate takes
        for row, mask in enumerate(batch["attention_mask"]):
            assert batch["input_ids"][row][mask == 1].tolist() == trained[row].tolist()
            assert mask[-1] == 1  # padded on the left


def test_the_export_is_read_again_with_the_same_rule(exported: tuple[Tokenizer, Path, list[str]]) -> None:
    tokenizer, folder, _ = exported
    again = Tokenizer.load(folder)
    assert bos_ids(again) == bos_ids(tokenizer)
    assert (again.eos_id, again.pad_id, again.size) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.size)


def test_config_and_ids_name_begin_end_and_padding(exported: tuple[Tokenizer, Path, list[str]]) -> None:
    tokenizer, folder, front = exported
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"]) == (bool(front), False)
    tokens = special_tokens(tokenizer, folder)
    assert (tokens.eos, tokens.pad) == (tokenizer.eos_id, tokenizer.pad_id)
    named = config.get("bos_token")
    assert tokens.bos == (tokenizer.backend.token_to_id("<s>") if named else None)


def test_a_chat_template_stays(tmp_path: Path) -> None:
    llama3(tmp_path / "base")
    Tokenizer.load(tmp_path / "base").save(tmp_path / "run")
    write_prompt_rule(Tokenizer.load(tmp_path / "run"), tmp_path / "run")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert theirs.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


def test_a_prompt_that_spells_its_begin_token_has_it_once(tmp_path: Path) -> None:
    llama3(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    rows = encode_prompts(tokenizer, ["ab", "<s>ab", "", "b"])
    front, letters = bos_ids(tokenizer), tokenizer.encode_batch(["ab", "b"])
    expected = [[*front, *letters[0]], [*front, *letters[0]], front, [*front, *letters[1]]]
    assert [rows[row].tolist() for row in range(4)] == [np.array(row).tolist() for row in expected]
