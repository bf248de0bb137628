"""The command-line verbs that work on a run, one file each."""
