"""Files that run code when they are unpickled, planted in every place that is read besides checkpoints of stages.

Those are in tests/models/megatron/checkpoint/test_planted.py, and those of a server in tests/serve/test_roots.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tawin_nemo.baselines.load import load_baseline
from tawin_nemo.catalog.semantic_ids import load_codes
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import RqVaeConfig, TextConfig
from tawin_nemo.data.text_vectors import TextModel, load_item_vectors
from tawin_nemo.data.tokenizer import Tokenizer, read_vocabulary
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.models.megatron.hf.files import HfWeights
from tawin_nemo.models.megatron.hf.io import load_hf
from tawin_nemo.semantic_ids import hf_encoder
from tawin_nemo.semantic_ids.coder import ItemCoder
from tawin_nemo.semantic_ids.growth import ExistingIndex
from tawin_nemo.semantic_ids.train_quantiser import Plan, train_quantiser
from tawin_nemo.serve.engine.items_file import read_items
from tawin_nemo.util.errors import TawinError
from tawin_nemo.util.files import sha256, write_json
from tests.baselines.test_load import IDS, finished_stage
from tests.planted import numpy_saved, pickled, torch_saved
from tests.semantic_ids.vectors import blobs

Plant = Callable[[Path, Path], Callable[[], Any]]


def _tokenizer(folder: Path) -> None:
    backend = Backend(models.WordLevel({"<unk>": 0, "bolt": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>").save_pretrained(folder)


def _bert(folder: Path) -> None:
    BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        folder
    )
    _tokenizer(folder)


def weights_folder(folder: Path, marker: Path) -> Callable[[], Any]:
    """Old weights beside the new ones."""
    _bert(folder)
    (folder / "pytorch_model.bin").write_bytes(torch_saved(marker))
    return lambda: HfWeights(folder)


def only_old_weights(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "pytorch_model.bin").write_bytes(torch_saved(marker))
    return lambda: load_hf(None, None, folder)  # type: ignore[arg-type]


def weights_that_are_a_pickle(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "model.safetensors").write_bytes(torch_saved(marker))
    return lambda: HfWeights(folder)


def index_of_weights_elsewhere(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    return lambda: HfWeights(folder)


def tokenizer_folder(folder: Path, marker: Path) -> Callable[[], Any]:
    _tokenizer(folder)
    (folder / "vocab.pkl").write_bytes(pickled(marker))
    return lambda: Tokenizer.load(folder)


def vocabulary_folder(folder: Path, marker: Path) -> Callable[[], Any]:
    _tokenizer(folder)
    (folder / "vocab.bin").write_bytes(pickled(marker))
    return lambda: read_vocabulary(folder)


def code_of_a_tokenizer(folder: Path, marker: Path) -> Callable[[], Any]:
    """A tokenizer class in a Python file of the folder, as transformers loads on request."""
    _tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    return lambda: Tokenizer.load(folder)


def code_of_an_encoder(folder: Path, marker: Path) -> Callable[[], Any]:
    _bert(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    return lambda: hf_encoder._Encoder(folder, TextConfig(encoder="hf"))


def encoder_folder(folder: Path, marker: Path) -> Callable[[], Any]:
    _bert(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(torch_saved(marker))
    return lambda: hf_encoder._Encoder(folder, TextConfig(encoder="hf"))


def encoder_shard(folder: Path, marker: Path) -> Callable[[], Any]:
    np.savez(folder / "shard.npz", vectors=np.zeros(1), cut=0)
    (folder / "shard.npz").write_bytes(numpy_saved(marker))
    return lambda: hf_encoder._read_shard(folder / "shard.npz")


def index_file(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "index.json").write_bytes(pickled(marker))
    return lambda: load_codes(folder / "index.json", ["a"])


def names_of_an_index(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "index.json").write_text('{"0": ["<a_1>"]}')
    (folder / "items.json").write_bytes(pickled(marker))
    return lambda: load_codes(folder / "index.json", ["a"])


def catalog_file(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "items.jsonl").write_bytes(pickled(marker))
    return lambda: read_items(folder / "items.jsonl")


def stored_trie(folder: Path, marker: Path) -> Callable[[], Any]:
    trie = TokenTrie.from_paths([[1, 2], [1, 3]])
    trie.save(folder / "trie", tokenizer="t")
    manifest = json.loads((folder / "trie" / "manifest.json").read_text())
    name = sorted(manifest["sha256"])[0]
    (folder / "trie" / f"{name}.npy").write_bytes(numpy_saved(marker))
    manifest["sha256"][name] = sha256(folder / "trie" / f"{name}.npy")
    write_json(folder / "trie" / "manifest.json", manifest)
    return lambda: TokenTrie.load(folder / "trie", tokenizer="t")


def codes_of_an_index(folder: Path, marker: Path) -> Callable[[], Any]:
    for name, content in {"codes.npy": numpy_saved(marker), "items.json": b'["a", "b"]'}.items():
        (folder / name).write_bytes(content)
    files = {name: sha256(folder / name) for name in ("codes.npy", "items.json")}
    write_json(folder / "manifest.json", {"format": "tawin_nemo.semantic_ids.v1", "request": {}, "files": files})
    return lambda: ExistingIndex.read(folder)


def codebooks(folder: Path, marker: Path) -> Callable[[], Any]:
    write_json(folder / "tokenizer.json", {"method": "rqkmeans", "shape": None})
    for path in ("codebooks.npy", "network.json"):
        (folder / path).write_bytes(numpy_saved(marker))
    return lambda: ItemCoder.load(folder)


def state_of_a_quantiser(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "state.pt").write_bytes(torch_saved(marker))
    cfg = RqVaeConfig(widths=[8], latent=3, epochs=1)
    plan = Plan(2, 4, seed=0, kmeans_iterations=2, residual=False)
    return lambda: train_quantiser(blobs(40), cfg, plan, checkpoint=folder / "state.pt")


def text_model(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "text_model.npy").write_bytes(numpy_saved(marker))
    return lambda: TextModel.load(folder)


def item_vectors(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "vectors.npy").write_bytes(numpy_saved(marker))
    return lambda: load_item_vectors(folder / "vectors.npy", 2)


def auxiliary_recommender(folder: Path, marker: Path) -> Callable[[], Any]:
    finished_stage(folder, "gru4rec", seed=1)
    step = folder / "checkpoints" / "step_4"
    (step / "weights.pt").write_bytes(torch_saved(marker))
    record = json.loads((step / "state.json").read_text())
    record["files"]["weights.pt"] = sha256(step / "weights.pt")
    write_json(step / "state.json", record)
    return lambda: load_baseline(folder, external_ids=IDS)


def per_user_parquet(folder: Path, marker: Path) -> Callable[[], Any]:
    """Arrow types once came as pickles in a Parquet file (CVE-2023-47248)."""
    field = pa.field(
        "row", pa.int64(),
        metadata={b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled(marker)},
    )  # fmt: skip
    pq.write_table(pa.table([pa.array([1])], schema=pa.schema([field])), folder / "test.per_user.parquet")
    (folder / "test.json").write_text('{"means": {}}')

    return lambda: EvalResult.read(folder, "test")


def pickle_as_parquet(folder: Path, marker: Path) -> Callable[[], Any]:
    (folder / "test.per_user.parquet").write_bytes(pickled(marker))
    (folder / "test.json").write_text('{"means": {}, "intervals": {}}')
    return lambda: EvalResult.read(folder, "test")


PLANTS: list[Plant] = [
    weights_folder, only_old_weights, weights_that_are_a_pickle, index_of_weights_elsewhere, tokenizer_folder,
    vocabulary_folder, code_of_a_tokenizer, code_of_an_encoder, encoder_folder, encoder_shard, index_file,
    names_of_an_index, catalog_file, stored_trie, codes_of_an_index, codebooks, state_of_a_quantiser, text_model,
    item_vectors, auxiliary_recommender, per_user_parquet, pickle_as_parquet,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_refused_and_does_not_run(tmp_path: Path, plant: Plant) -> None:
    folder, marker = tmp_path / "folder", tmp_path / "marker"
    folder.mkdir()
    read = plant(folder, marker)
    with pytest.raises(TawinError, match=str(folder)):
        read()
    assert not marker.exists()


def test_a_weights_folder_is_refused_before_anything_in_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bert(tmp_path)
    (tmp_path / "hook.PT").write_bytes(torch_saved(tmp_path / "marker"))
    opened: list[str] = []
    original = Path.open

    def watched(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path.name)
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "open", watched)
    with pytest.raises(TawinError, match=r"holds hook\.PT, .*move it away"):
        HfWeights(tmp_path)
    with pytest.raises(TawinError, match=r"hook\.PT"):
        Tokenizer.load(tmp_path)
    assert opened == []


def test_own_checkpoints_of_recommenders_are_read_as_before(tmp_path: Path) -> None:
    trained = finished_stage(tmp_path, "gru4rec", seed=1).model
    loaded = load_baseline(tmp_path, external_ids=IDS)
    for one, other in zip(trained.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)
