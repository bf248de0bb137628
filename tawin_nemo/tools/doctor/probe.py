"""Imports the heavy libraries in a process of its own and says how each import went.

A library built for another CUDA or torch may end the process instead of raising, and an import from a network disk may
take minutes: neither may take the doctor down. ``python -m tawin_nemo.tools.doctor.probe NAME ...`` is the other side;
it writes one JSON line before and one after each import.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

#: Import name -> name of the distribution, in the order of the imports.
LIBRARIES = {
    "torch": "torch",
    "megatron.core": "megatron-core",
    "transformers": "transformers",
    "transformer_engine.pytorch": "transformer-engine",
}
#: Seconds for all imports together; a cold network disk needs minutes.
LIMIT_S = 300.0


@dataclass(frozen=True)
class Library:
    """``version`` is empty when the library is not installed; ``error`` when its import went well or was not tried."""

    version: str = ""
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Gpu:
    """One device that torch sees."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class TorchFacts:
    """What torch says about itself; ``cuda`` and ``nccl`` are empty in builds without them."""

    cuda: str = ""
    nccl: str = ""
    cuda_available: bool = False
    reason: str = ""  # why CUDA is not available, as torch words it
    architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Found:
    """All that the probe brought home."""

    libraries: dict[str, Library] = field(default_factory=dict)
    torch: TorchFacts = TorchFacts()

    def library(self, name: str) -> Library:
        return self.libraries.get(name, Library())


def installed_version(distribution: str) -> str:
    """The version that the package index knows the library by; empty when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def probe(names: tuple[str, ...] = tuple(LIBRARIES), *, limit_s: float = LIMIT_S) -> Found:
    """Import ``names`` in a child process. A crash or a hang is an error of the library that was being imported."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tawin_nemo.tools.doctor.probe", *names], stdout=out, stderr=err
        )
        try:
            ending = f"ended the process with {_meaning(child.wait(limit_s))}"
        except subprocess.TimeoutExpired:
            ending = f"did not end within {limit_s:.0f} s"
        finally:
            child.kill()
            child.wait()
        out.seek(0)
        err.seek(0)
        last_words = err.read().decode(errors="replace").strip().splitlines()[-1:]
        return _collect(out.read().decode(errors="replace"), ": ".join([ending, *last_words]))


def _meaning(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _collect(text: str, ending: str) -> Found:
    libraries: dict[str, Library] = {}
    facts = TorchFacts()
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off by the end of the process
            continue
        if "torch_facts" in record:
            given = record["torch_facts"]
            gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in given.pop("gpus"))
            facts = TorchFacts(**{**given, "architectures": tuple(given["architectures"])}, gpus=gpus)
            continue
        name = record.pop("name")
        library = Library(**record) if "version" in record else Library(_version(name), f"its import {ending}")
        libraries[name] = library
    return Found(libraries, facts)


def _version(name: str) -> str:
    return installed_version(LIBRARIES.get(name, name.split(".")[0]))


# -- the child ---------------------------------------------------------------------------------------------------
def _import(name: str) -> Library:
    version, start = _version(name), time.monotonic()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = not version and error.name is not None and name.split(".")[0] == error.name.split(".")[0]
        return Library(version, "" if absent else f"{type(error).__name__}: {error}")
    except Exception as error:
        return Library(version, f"{type(error).__name__}: {error}".splitlines()[0])
    return Library(version or str(getattr(module, "__version__", "?")), "", round(time.monotonic() - start, 2))


def _torch_facts() -> TorchFacts:
    import torch

    reason, gpus = "", []
    available = torch.cuda.is_available()
    if torch.version.cuda and not available:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
    for index in range(torch.cuda.device_count() if available else 0):
        device = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(device.name, device.total_memory, (device.major, device.minor)))
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else ""
    return TorchFacts(torch.version.cuda or "", nccl, available, reason, tuple(torch.cuda.get_arch_list()), tuple(gpus))


def main(names: list[str]) -> None:
    """The child's side: JSON lines on the real stdout; what libraries print at import goes to stderr."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(record: dict[str, Any]) -> None:
        lines.write(json.dumps(record) + "\n")
        lines.flush()

    for name in names:
        write({"name": name})
        library = _import(name)
        write({"name": name, **asdict(library)})
        if name == "torch" and library.version and not library.error:
            write({"torch_facts": asdict(_torch_facts())})


if __name__ == "__main__":
    main(sys.argv[1:])
