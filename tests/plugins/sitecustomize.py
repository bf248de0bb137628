"""Imported by Python at its start where this folder is on the path: arms the points that ``TAWIN_FAILPOINTS`` names."""

import os

from tests import failpoints

failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
