"""Lets tests import the helper modules of this folder (`from hf_lm import ...`) under every import mode of pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
