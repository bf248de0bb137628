"""Imports that end well, raise, crash and hang, in a real child process (no heavy library is imported here)."""

import pytest

from tawin_nemo.tools.doctor import probe as probing
from tawin_nemo.tools.doctor.probe import Found, Library, probe


@pytest.fixture
def modules(tmp_path, monkeypatch):
    texts = {
        "fine_one": "__version__ = '1.2'\nprint('libraries talk')",
        "raising_one": "raise ImportError('undefined symbol: x')",
        "needing_one": "import a_package_that_is_not_there",
        "crashing_one": "import os\nprint('about to die', flush=True)\nos.abort()",
        "hanging_one": "import time\ntime.sleep(100)",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{probing.__file__.rsplit('/', 4)[0]}")


def test_every_ending_of_an_import(modules):
    found = probe(("fine_one", "missing_one", "raising_one", "needing_one", "crashing_one", "never_reached"))
    assert found.library("fine_one").version == "1.2"
    assert found.library("fine_one").error == ""
    assert found.library("missing_one") == Library()
    assert found.library("raising_one").error == "ImportError: undefined symbol: x"
    assert "a_package_that_is_not_there" in found.library("needing_one").error
    assert "signal 6" in found.library("crashing_one").error
    assert found.library("never_reached") == Library()


def test_an_import_that_hangs_is_given_up(modules):
    found = probe(("fine_one", "hanging_one"), limit_s=8)
    assert found.library("fine_one").version == "1.2"
    assert "did not end within 8 s" in found.library("hanging_one").error


def test_facts_about_torch_survive_the_way_through_json():
    facts = (
        '{"torch_facts": {"cuda": "12.9", "nccl": "2.27.5", "cuda_available": true, "reason": "", '
        '"architectures": ["sm_90"], "gpus": [{"name": "H800", "memory_bytes": 5, "capability": [9, 0]}]}}\n{"na'
    )
    found = probing._collect(facts, "")
    assert isinstance(found, Found)
    assert found.torch.gpus == (probing.Gpu("H800", 5, (9, 0)),)
    assert found.torch.architectures == ("sm_90",)
