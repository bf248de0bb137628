"""The command line as a user meets it: help at once, exit codes, errors that help, JSON on the last line."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jsonschema_rs
import pytest
from omegaconf import OmegaConf

import tawin_nemo
from tawin_nemo.cli import main
from tawin_nemo.commands.completion import words
from tawin_nemo.commands.keys import recipe_schema
from tawin_nemo.commands.verbs import VERBS
from tawin_nemo.config.fields import leaf_fields, sections
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]


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
    for word in ("prepare", "train", "evaluate", "generate", "convert", "plan", "--help", "Exit codes"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("train", "--gpus", "8"), ["--gpus and --gpu belong to plan", "trainer.devices"]),
        (("train", "rl.lrr=1"), ["rl.lrr=1", "did you mean rl.lr?"]),
        (("train", "--recipe", "recipes/quikstart.yaml"), ["recipe file not found", "quickstart.yaml"]),
        (("evaluate", "checkpoint=nowhere"), ["checkpoint=nowhere is neither a finished stage"]),
        (("train", "trainer.num_nodes=2"), ["was started alone", "torchrun --nnodes=2", "trainer.num_nodes=1"]),
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


def test_an_unknown_verb_names_the_nearest_and_all():
    done = cli("trian")
    assert done.returncode == 2
    assert "did you mean train?" in done.stderr
    assert "evaluate" in done.stderr


def test_alone_it_says_what_there_is(capsys):
    assert ends(main, []) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name}" in shown for name in VERBS)


def test_version(capsys):
    assert ends(main, ["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tawin-nemo {tawin_nemo.__version__}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_of_its_own(verb, capsys):
    assert ends(main, [verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"tawin-nemo {verb} " in shown
    assert len(shown.splitlines()) < 90
    others = [name for name in VERBS if name != verb and f"tawin-nemo {name} --" in shown]
    assert not others, "a page has examples of its own verb"


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.sections])
def test_the_named_sections_exist(verb):
    known = sections(key for key, _ in leaf_fields(Recipe))
    assert set(VERBS[verb].sections) - {""} <= known


def test_the_examples_name_recipes_and_keys_that_exist():
    read = []
    for verb in VERBS.values():
        for example in verb.examples:
            name, *words = example.split(" > ")[0].split()
            if name not in ("prepare", "tokenize", "train", "evaluate", "generate", "convert", "retrain", "serve"):
                continue
            recipe = words[words.index("--recipe") + 1] if "--recipe" in words else None
            overrides = [word for word in words if "=" in word]
            read.append(load_recipe(recipe and ROOT / recipe, overrides))
    assert len(read) > 8


def ends(call, words):
    """The exit code of the command line, which argparse gives as SystemExit for --help and --version."""
    try:
        return call(words)
    except SystemExit as end:
        return end.code


def test_keys_prints_meaning_limits_and_choices(capsys):
    assert main(["keys", "rl.kl", "rl.clip_low", "eval.beams"]) == 0
    shown = capsys.readouterr().out
    assert "rl.kl = 'k3' [k3 | k1 | k2]" in shown
    assert "eval.beams = 50 [1 .. 4096]" in shown
    assert main(["keys", "rl.tawn"]) == 2
    assert "did you mean rl.tawin" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_fault():
    command = f"{sys.executable} -m tawin_nemo keys | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_pipe_that_breaks_elsewhere_is_a_fault(monkeypatch):
    """A lost peer or server must not end a verb without a word."""

    def lost(*_):
        raise BrokenPipeError("the server is gone")

    monkeypatch.setattr("tawin_nemo.cli._dispatch", lost)
    with pytest.raises(BrokenPipeError):
        main(["evaluate"])


def test_the_schema_of_recipes_accepts_every_recipe_and_refuses_mistakes():
    schema = recipe_schema()
    check = jsonschema_rs.Draft202012Validator(schema)
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        check.validate(OmegaConf.to_container(OmegaConf.load(path)))
    for wrong in ({"rl": {"lrr": 1}}, {"rl": {"kl": "k4"}}, {"eval": {"beams": 0}}, {"sft": 3}):
        assert list(check.iter_errors(wrong)), wrong


def test_tab_completion_knows_keys_and_choices():
    assert "rl.tawin.target_k=" in list(words("rl.tawin."))
    assert list(words("rl.kl=")) == ["rl.kl=k3", "rl.kl=k1", "rl.kl=k2"]
    assert list(words("sft.enabled=")) == ["sft.enabled=true", "sft.enabled=false"]
    line = "tawin-nemo ev"
    env = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "|"}
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m tawin_nemo 8>&1 9>/dev/null >/dev/null 2>&1"],
        env={**env, "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/fd/8"}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.strip() == "evaluate"
