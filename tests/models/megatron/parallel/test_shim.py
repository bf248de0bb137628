"""The CPU shim changes exactly the symbols it lists; checked in a fresh process, since it stays once installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tawin_nemo.models.megatron.parallel import shim

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")

SWEEP = """
import sys, types, warnings
warnings.simplefilter("ignore")
import torch
import megatron.core.models.gpt, megatron.core.optimizer, megatron.core.pipeline_parallel, megatron.core.distributed
from tawin_nemo.models.megatron.decode import lm
from tawin_nemo.models.megatron.optim import trainable
from tawin_nemo.models.megatron.parallel import shim

def symbols():
    owners = {"torch.Tensor": torch.Tensor, "torch.nn.Module": torch.nn.Module}
    for name, module in list(sys.modules.items()):
        if name == "torch" or name.startswith(("torch.cuda", "torch.random", "torch.distributed", "megatron.")):
            owners[name] = module
            owners |= {
                f"{name}.{key}": value for key, value in vars(module).items()
                if isinstance(value, type) and value.__module__ == name
            }
    return {f"{owner}.{key}": value for owner, holder in owners.items() for key, value in list(vars(holder).items())}

before = symbols()
shim.install()
first = symbols()
shim.install()
second = symbols()
changed = {name for name in before.keys() | first.keys() if before.get(name) is not first.get(name)}
again = {name for name in first.keys() | second.keys() if first.get(name) is not second.get(name)}
assert not again, again
listed = set(shim.PATCHED)
for name in listed:
    owner, attribute = shim.locate(name)
    assert getattr(owner, attribute) is not before.get(name), f"{name} is listed but unchanged"
assert changed == listed, changed ^ listed
assert torch.zeros(1, device="cuda").to("cuda").device.type == "cpu"
assert torch.zeros(1).cuda().type() == "torch.cuda.FloatTensor"
assert torch.zeros(1, device="meta").device.type == "meta" and torch.zeros(1).long().type() == "torch.LongTensor"
torch.cuda.manual_seed(3); a = torch.rand(2); torch.manual_seed(3); assert torch.equal(a, torch.rand(2))
"""


def test_exactly_the_listed_symbols_change() -> None:
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def test_refuses_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be installed where CUDA is available"):
        shim.install()
