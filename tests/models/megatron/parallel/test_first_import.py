"""The first import of megatron-core: what it leaves out, and that nothing else is changed by it."""

from __future__ import annotations

import subprocess
import sys

from tawin_nemo.models.megatron.parallel.first_import import compiled_when_called
from tests.train.runs import importable

FRESH = """
import importlib.util, sys, torch
compiler = torch.compile
import tawin_nemo.train.pipeline
import megatron.core
from megatron.core.fusions.fused_bias_swiglu import swiglu
print("torch._dynamo" in sys.modules, "wandb" in sys.modules, torch.compile is compiler)
print(megatron.core.__spec__.loader is megatron.core.__loader__, type(megatron.core.__loader__).__name__)
print(importlib.util.find_spec("wandb") is not None, callable(swiglu))
"""


def test_a_start_imports_neither_compilers_nor_loggers():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH], capture_output=True, text=True, timeout=300, env=importable()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["False False True", "True SourceFileLoader", "True True"]


def test_a_function_is_compiled_once_at_its_first_call_with_its_options():
    calls = []

    def compiler(function, **options):
        calls.append(options)
        return lambda number: 2 * function(number)

    lazy = compiled_when_called(compiler)

    @lazy
    def plain(number):
        """Says something."""
        return number + 1

    @lazy(dynamic=True)
    def with_options(number):
        return number - 1

    assert calls == []
    assert (plain(3), plain(4), with_options(3)) == (8, 10, 4)
    assert calls == [{}, {"dynamic": True}]
    assert (plain.__name__, plain.__doc__) == ("plain", "Says something.")
