"""The command line as a user meets it: help at once, exit codes, errors that help, JSON on the last line."""

import subprocess
import sys
import time

import pytest


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tawin_nemo", *arguments], capture_output=True, text=True, timeout=120)


def test_help_imports_no_torch_and_teaches():
    probe = (
        "import sys; from tawin_nemo.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'megatron', 'transformers', 'nemo'} & set(sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10  # the import check above is the real one; this only catches a hang
    for word in ("prepare", "train", "evaluate", "generate", "convert", "plan", "examples:", "Exit codes"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("train", "--gpus", "8"), ["--gpus and --gpu belong to plan", "trainer.devices"]),
        (("train", "rl.lrr=1"), ["rl.lrr=1", "did you mean rl.lr?"]),
        (("train", "--recipe", "recipes/quikstart.yaml"), ["recipe file not found", "quickstart.yaml"]),
        (("evaluate", "checkpoint=nowhere"), ["checkpoint=nowhere is neither a finished stage"]),
        (("prepare", "data.dataset=prepared", "data.root=nowhere"), ["data.root=nowhere"]),
    ],
)
def test_user_mistakes_exit_with_2_and_one_clear_line(arguments, parts):
    done = cli(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.mark.distributed
def test_a_user_mistake_in_several_processes_exits_with_2_too(tmp_path):
    done = cli(
        "train", f"run_dir={tmp_path}", "data.dataset=synthetic", "trainer.devices=2", "model.precision=fp8-blockwise",
        "prepare.synthetic_items=150", "prepare.synthetic_users=500", "model.backbone=nano",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "model.precision=fp8-blockwise needs a CUDA device" in done.stderr


def test_unknown_verb_lists_the_verbs():
    done = cli("trian")
    assert done.returncode == 2
    assert "train" in done.stderr


def test_keys_prints_meaning_and_choices():
    done = cli("keys", "rl.kl")
    assert done.returncode == 0
    assert "rl.kl = 'k3' [k3 | k1 | k2]" in done.stdout
