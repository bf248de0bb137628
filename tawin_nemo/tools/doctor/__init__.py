"""`tawin-nemo doctor`: can this machine run, and can it run this recipe? Small checks, one table, one JSON object."""
