"""Verb ``study``: arms x seeds of one recipe, then paired tests, tables and plots. ``HELP`` is its ``--help``."""

HELP = """\
tawin-nemo study --recipe STUDY.yaml [key=value ...] [--dry-run]

A study trains arms (ways of training) x seeds, one process and one core per run, and compares them:

  study: first_look                  # run files: recipes/results/first_look, run directories: runs/studies/first_look
  recipe: ../industrial_sid_cpu.yaml # relative to this file; all arms share it
  set: {rl.beta: 0}                  # recipe keys of all arms
  seeds: [1, 2, 3]
  splits: [valid]                    # choices are made on valid; [valid, test] for final arms
  arms:
    sft: {rl.enabled: false, sft.rows: earlier}
    more: {after: sft, rl.enabled: false, sft.rows: fresh}   # starts from the same seed's sft
    tawin: {after: sft, sft.enabled: false, rl.init: base, grid: {rl.tawin.anchor: [0, 2, 4]}}
  compare: [[tawin, more], ["tawin*anchor=2*", sft]]         # a grid's name means all its arms, * any text
  sweeps: [{arm: tawin, x: rl.tawin.anchor, beside: [more]}] # table and plot; all keys: tools/study/config.py

The same command continues a study that was stopped: runs with a run file are skipped, others resume from their last
checkpoint. A failed run stops only the runs that start from it. Useful on the command line:
  set.data.root=DIR   seeds=[1]   workers=1   commit=true (git commit each run file)
  launcher=slurm sbatch=[--gpus-per-node=8,--time=240] (one Slurm job per run; a stopped study finds its jobs again)
  report=true (run nothing, rebuild README.md and plots from the run files)   --dry-run (plan and minutes)
  export=DIR (the tables as CSV and LaTeX, with either)
Exit codes: 0 all runs are done, 1 a run failed, 2 a mistake in the study file, 130 interrupted.
"""
