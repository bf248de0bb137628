"""What the server of ``tests.forked`` imports: all that a run imports, from preparing data to its report.

torch._dynamo comes before the CPU shim, which patches what it looks at.
"""
# ruff: noqa: F401

import datasets
import pandas as pd
import torch._dynamo
import transformers.tokenization_utils_fast

import tawin_nemo.cli
import tawin_nemo.commands.session
import tawin_nemo.data_prep.prepare
import tawin_nemo.models.megatron.checkpoint.checkpoint
import tawin_nemo.run.launcher
import tawin_nemo.tools.retrain.verb
