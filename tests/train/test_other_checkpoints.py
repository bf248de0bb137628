"""Checkpoints of other projects come in with their own tokenizers: OneRec (Qwen3) and MiniOneRec (Qwen2.5)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.catalog_builder import answer_paths
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.train.start import new_tokens
from tests.data.chat_tokenizers import instruct_tokenizer
from tests.train.runs import called, command, environment, run
from tests.util.fake_hub import fake_hub

pytestmark = pytest.mark.slow
CODES = 8  # per level
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def minionerec_words() -> list[str]:
    """<a_12><b_3><c_9>, as its ``extend_vocab`` adds them: plain added tokens, sorted."""
    return sorted(f"<{level}_{code}>" for level in "abc" for code in range(CODES))


def onerec_words() -> list[str]:
    """<|sid_begin|><s_a_12><s_b_3><s_c_9><|sid_end|>."""
    return ["<|sid_begin|>", "<|sid_end|>", *(f"<s_{level}_{code}>" for level in "abc" for code in range(CODES))]


LAYOUTS = {
    "minionerec": (minionerec_words(), lambda a, b, c: [f"<a_{a}>", f"<b_{b}>", f"<c_{c}>"], 0),
    "onerec": (
        onerec_words(),
        lambda a, b, c: ["<|sid_begin|>", f"<s_a_{a}>", f"<s_b_{b}>", f"<s_c_{c}>", "<|sid_end|>"],
        256,  # rows of padding behind the last token, as Qwen's own checkpoints have
    ),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(
    request: pytest.FixtureRequest, qwen_tokenizer: Path, small_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """The folder as the project's own code saves it, an index.json of its form, and the codes by item."""
    words, item_codes, padding = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(qwen_tokenizer / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    assert fast.add_tokens(words) == len(words)
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    vocab = len(fast) + padding
    if request.param == "onerec":
        Qwen3ForCausalLM(Qwen3Config(**SIZES, vocab_size=vocab, head_dim=16)).save_pretrained(folder)
    else:
        Qwen2ForCausalLM(Qwen2Config(**SIZES, vocab_size=vocab)).save_pretrained(folder)
    ids = pl.read_parquet(small_dataset / "items.parquet")["external_id"].to_list()
    codes = [item_codes(n % CODES, n // CODES % CODES, n // CODES**2 % CODES) for n in range(len(ids))]
    index = folder / "shop.index.json"
    index.write_text(json.dumps(dict(zip(ids, codes, strict=True))))
    return SimpleNamespace(folder=folder, index=index, codes=codes, words=words, vocab=vocab, name=request.param)


def words_of(checkpoint: SimpleNamespace, data: Path, run_dir: Path) -> list[str]:
    return [
        f"model.init={checkpoint.folder}", f"data.root={data}", "data.dataset=prepared", "catalog.kind=sid",
        f"catalog.index={checkpoint.index}", "data.template=alpaca", "data.max_history=4", "data.eval_limit=8",
        "data.train_limit=16", "eval.beams=4", "eval.ks=[1,3]", "trainer.threads=1", f"run_dir={run_dir}",
    ]  # fmt: skip


def test_codes_of_the_tokenizer_are_found_and_not_added_again(checkpoint: SimpleNamespace) -> None:
    data, model = DataConfig(template="alpaca"), ModelConfig(init=str(checkpoint.folder))
    titles = [f"item {n}" for n in range(len(checkpoint.codes))]
    tokenizer = build_tokenizer(data, CatalogConfig(kind="sid"), model, titles, checkpoint.codes)
    theirs = AutoTokenizer.from_pretrained(checkpoint.folder)
    assert tokenizer.backend.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    assert tokenizer.size == len(theirs) <= checkpoint.vocab
    texts = ["".join(codes) for codes in checkpoint.codes]
    paths = answer_paths(texts, tokenizer, Template("alpaca", "sid"))
    for item, codes in enumerate(checkpoint.codes):
        assert paths[item].tolist() == [*theirs.convert_tokens_to_ids(codes), theirs.eos_token_id]
    world = SimpleNamespace(tokenizer=tokenizer, recipe=SimpleNamespace(model=model, data=data))
    assert len(new_tokens(world).ids) == 0  # type: ignore[arg-type]


def test_the_checkpoint_is_evaluated_as_it_is(checkpoint: SimpleNamespace, small_dataset: Path, tmp_path: Path) -> None:
    result = run(*words_of(checkpoint, small_dataset, tmp_path / "run"), verb="evaluate")
    assert (result["test"]["rows"], result["test"]["invalid_rate"]) == (8, 0.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(checkpoint.folder).get_vocab()


def test_it_is_trained_further_and_every_row_of_the_file_is_kept(
    checkpoint: SimpleNamespace, small_dataset: Path, tmp_path: Path
) -> None:
    """Two RL steps from the checkpoint itself; the export has the vocabulary rows of the file."""
    from tawin_nemo.models.megatron.hf.config import backbone_from_hf

    words = ["sft.enabled=false", "rl.init=base", "rl.max_steps=2", "rl.prompts_per_step=4", "rl.group_size=4"]
    words += ["reference.mode=copy", "compare.sft_continued=false"]
    result = run(*words_of(checkpoint, small_dataset, tmp_path / "run"), *words)
    assert result["invalid_rate"] == 0.0
    run(f"checkpoint={tmp_path / 'run' / 'rl'}", f"convert.output={tmp_path / 'out'}", verb="convert")
    assert backbone_from_hf(tmp_path / "out").vocab == checkpoint.vocab
    assert backbone_from_hf(tmp_path / "out").family == ("qwen3" if checkpoint.name == "onerec" else "qwen2")


def test_doctor_reads_the_folder(checkpoint: SimpleNamespace, small_dataset: Path, tmp_path: Path) -> None:
    words = words_of(checkpoint, small_dataset, tmp_path / "run")[1:]  # without model.init
    result = run(*words, f"checkpoint={checkpoint.folder}", verb="doctor")
    used = [len(np.unique([codes[-3 if checkpoint.name == "minionerec" else -4] for codes in checkpoint.codes]))]
    assert result["codes"][0] == {"used": used[0], "of": CODES}
    assert len(result["codes"]) == 3
    assert result["invalid_greedy"] > 0.9  # random weights
    assert result["invalid_rate"] == 0.0


def test_an_unknown_family_ends_before_anything_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    for more in ([], ["--dry-run"], ["trainer.threads=1"]):
        words = ["data.dataset=synthetic", f"model.init={tmp_path / 'gemma'}", f"run_dir={tmp_path / 'run'}", *more]
        done = called(*words)
        assert done.returncode == 2, done.stderr
        assert "model_type='gemma3_text' cannot be imported" in done.stderr
        assert "Qwen2.5 (qwen2), Qwen3 dense (qwen3), Llama (llama) and Mistral (mistral)" in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_hub_name_without_a_hub_ends_before_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = called("data.dataset=synthetic", "model.init=Acme/none-such", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert "model.init=Acme/none-such is no folder here" in done.stderr
    assert "set model.init=DIR" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_hub_model_is_used_like_a_folder_also_offline(small_dataset: Path, tmp_path: Path) -> None:
    """A hub on this machine; the second run has the cache alone, and the figures of the folder."""
    folder = instruct_tokenizer(tmp_path / "hub" / "Acme" / "tiny-lm")
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES, vocab_size=400, head_dim=8)).save_pretrained(folder)
    words = [
        f"data.root={small_dataset}", "data.dataset=prepared", "data.template=alpaca", "data.chat=true",
        "data.max_history=2", "data.train_limit=16", "data.eval_limit=8", "data.max_prompt_tokens=500", "eval.beams=4",
        "eval.ks=[1,3]", "trainer.threads=1",
    ]  # fmt: skip
    expected = run(*words, f"model.init={folder}", f"run_dir={tmp_path / 'folder'}", verb="evaluate")
    kept = {name: value for name, value in environment().items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    requests: list[int] = []
    with fake_hub(tmp_path / "hub") as (endpoint, asked):
        for number, offline in enumerate(("0", "1")):
            done = subprocess.run(
                command(*words, "model.init=Acme/tiny-lm", f"run_dir={tmp_path / str(number)}", verb="evaluate"),
                env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": offline},
                cwd=tmp_path, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout.splitlines()[-1])["test"] == expected["test"]
            requests.append(len(asked))
    assert requests[0] == requests[1] > 0
