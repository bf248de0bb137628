"""Variables for CUDA are set before torch is imported, only on such a machine, and never over the user's own."""

from __future__ import annotations

import pytest

from tawin_nemo import cli
from tawin_nemo.util import cuda_defaults
from tawin_nemo.util.cuda_defaults import set_cuda_defaults

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
OTHERS = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
DEFAULTS = {**ALLOCATOR, **OTHERS}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, DEFAULTS),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {**DEFAULTS, "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_ALLOC_CONF": "x", **OTHERS}),
        ({"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}, {**DEFAULTS, "TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}),
        ({"TORCHINDUCTOR_COMPILE_THREADS": "8"}, {**DEFAULTS, "TORCHINDUCTOR_COMPILE_THREADS": "8"}),
    ],
)
def test_what_the_user_set_stays(given, expected, tmp_path):
    env = dict(given)
    set_cuda_defaults(env, devices=[str(tmp_path)])
    assert env == expected
    env = dict(given)
    set_cuda_defaults(env, devices=[str(tmp_path / "absent")])
    assert env == given


def test_every_command_sets_them(monkeypatch, capsys, tmp_path):
    called = []
    monkeypatch.setattr(cli, "set_cuda_defaults", lambda: called.append(True))
    cli.main(["keys", "trainer.deterministic"])
    assert called == [True]
    assert "trainer.deterministic = False" in capsys.readouterr().out
    assert cuda_defaults.DEVICES[0] == "/dev/nvidiactl"
