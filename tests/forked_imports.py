"""What the server of ``tests.forked`` imports: all that a training run, its evaluation and its report import."""

import tawin_nemo.cli
import tawin_nemo.commands.session
import tawin_nemo.models.megatron.checkpoint.checkpoint
import tawin_nemo.run.launcher
import tawin_nemo.tools.retrain.verb  # noqa: F401
