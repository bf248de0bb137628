"""What the server of ``tests.forked`` imports: all that a training run, its evaluation and its report import."""

import tawin_nemo.cli
import tawin_nemo.models.megatron.checkpoint
import tawin_nemo.retrain.verb
import tawin_nemo.train.launcher
import tawin_nemo.train.verbs  # noqa: F401
