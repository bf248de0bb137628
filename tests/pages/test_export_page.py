"""The programs of the page on exported models: the model card's own, and those for other engines with stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tawin_nemo.catalog.export_files import write_catalog
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.tawin_trie import TrieLogitsProcessor
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.run.export_card import _CARD
from tawin_nemo.types import TokenRows
from tests.pages.reader import ROOT, blocks

PAGE = ROOT / "recipes" / "guides" / "export.md"
TRANSFORMERS, VLLM, SGLANG, FLASHREC = [block.text for block in blocks(PAGE) if block.language == "python"]
CODES = [["<a_4>", "<b_0>", "<c_11>"], ["<a_4>", "<b_2>", "<c_1>"], ["<a_4>", "<b_2>", "<c_1>"]]
PATHS = [[2, 3, 4, 9], [2, 5, 6, 9], [2, 5, 6, 9]]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    rows = TokenRows.from_lists(PATHS)
    names = ["B0", "B1", "B2"]
    (tmp_path / "export").mkdir()
    write_catalog(tmp_path / "export", Catalog(names, names, "sid", rows, TokenTrie.from_paths(rows)), CODES)
    return tmp_path / "export"


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **names: object) -> None:
    """Make ``module`` importable with these names."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    for name, value in names.items():
        setattr(sys.modules[module], name, value)
    monkeypatch.setitem(sys.modules, "tawin_trie", sys.modules["tawin_nemo.catalog.tawin_trie"])


def program(text: str, name: str) -> type:
    found: dict[str, type] = {}
    exec(compile(text, str(PAGE), "exec"), found)
    return found[name]


def test_the_program_for_transformers_is_the_one_of_the_model_card() -> None:
    """That one is run, see tests/commands/test_export.py."""
    card = _CARD[_CARD.index("```python\n") + 10 :]
    card = card[: card.index("```")].replace("{written}", 'item["title"]').replace("{{", "{").replace("}}", "}")
    assert card.replace("THIS_FOLDER", "export") == TRANSFORMERS


def test_vllm_gets_a_processor_for_each_request(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM hands (tokens so far, logits) to a callable of two parameters, and takes what it returns."""

    class Adapter:
        def __init__(self, vllm_config: object, device: object, is_pin_memory: bool) -> None:
            self.started = True

    stand_in(monkeypatch, "vllm.v1.sample.logits_processor", AdapterLogitsProcessor=Adapter)
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(export)))
    made = program(VLLM, "InCatalog")(config, torch.device("cpu"), False)
    assert made.is_argmax_invariant() is False
    request = made.new_req_logits_processor(None)
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(1))
    assert request([2], logits_V).isfinite().nonzero().flatten().tolist() == [3, 5]
    torch.testing.assert_close(request([2], logits_V).exp().sum(), torch.tensor(1.0))


def test_sglang_gets_a_batch_changed(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "sglang.srt.sampling.custom_logit_processor", CustomLogitProcessor=object)
    made = program(SGLANG, "InCatalogOfRequest")()
    written = ([], [2], [2, 5, 6])
    params = [{"folder": str(export), "__req__": SimpleNamespace(output_ids=tokens)} for tokens in written]
    logits_RV = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    expected = [
        TrieLogitsProcessor.load(export)(tokens, row.clone()) for tokens, row in zip(written, logits_RV, strict=True)
    ]
    torch.testing.assert_close(made(logits_RV, params), torch.stack(expected))


def test_flashrec_gets_the_numbers_of_the_codes(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(export.parent)
    exec(compile(FLASHREC, str(PAGE), "exec"), {})
    assert json.loads((export.parent / "sid2vid.json").read_text()) == {"4,0,11": 1, "4,2,1": 1}
