"""What every training stage needs: data and shapes, checkpoints and resume, signals, timers, logs, failures."""
