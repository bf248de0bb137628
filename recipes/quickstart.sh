#!/usr/bin/env bash
# The whole system in one page: from raw reviews to a TAWin-trained recommender, on a laptop, without a download.
# Makes .venv and installs on the first call; every later call continues or reuses runs/quickstart.
# Arguments are recipe overrides:  bash recipes/quickstart.sh seed=1 name=quickstart-seed1
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/install.sh

echo "quickstart: prepare a generated review log (seconds), check recipe and data (seconds), then train: SFT about 4 min,
SFT continued 1 min, TAWin RL 1 min, evaluations 1 min on 2 CPU cores. Stop it at any time; the same command continues." >&2

# 1. Raw reviews. The default generates a catalog and a review log in the raw Amazon format (dirty rows included);
#    data.dataset=amazon data.root=DIR prepare.reviews=X.json.gz prepare.metadata=Y.json.gz reads real ones.
#    Time window -> titles cleaned -> 5-core -> sliding windows -> 8:1:1 by time -> Parquet with a manifest.
tawin-nemo prepare --recipe recipes/quickstart.yaml "$@"

# 2. Check recipe, data and shapes before anything long starts.
tawin-nemo train --recipe recipes/quickstart.yaml "$@" --dry-run

# 3. SFT on the earlier 80 % of train, then TAWin reinforcement learning on the last 20 %, and beside it SFT continued
#    on those same rows; each is evaluated on valid and test. Killed? The same command continues.
#    The last line is one JSON object; runs/quickstart/report.html has the curves and the intervals.
tawin-nemo train --recipe recipes/quickstart.yaml "$@"
