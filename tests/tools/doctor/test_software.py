import importlib
from pathlib import Path

import pytest

from tawin_nemo.tools.doctor import software
from tawin_nemo.tools.doctor.check import Status
from tawin_nemo.tools.doctor.probe import Found, Gpu, Library, TorchFacts

H800 = Gpu("NVIDIA H800", 80 * 2**30, (9, 0))


def cuda_torch(cuda: str = "12.9", *, available: bool = True, architectures=("sm_80", "sm_90")) -> Found:
    gpus = (H800,) if available else ()
    facts = TorchFacts(cuda, "2.27.5", available, "" if available else "no device", architectures, gpus)
    return Found({"torch": Library("2.13.0")}, facts)


@pytest.mark.parametrize(
    ("found", "driver", "status", "part"),
    [
        (Found(), "", Status.ABSENT, "CPU build"),
        (Found(), "550.54.15", Status.WARNING, "there is an NVIDIA driver (550.54.15)"),
        (cuda_torch(), "525.60.13", Status.OK, "12.9"),
        (cuda_torch("13.0"), "570.10", Status.FAILS, "torch has CUDA 13.0, the driver is 570.10"),
        (cuda_torch("13.0"), "580.65.06", Status.OK, "13.0"),
        (cuda_torch(available=False), "550.54.15", Status.FAILS, "sees no GPU: no device"),
        (cuda_torch(available=False), "", Status.ABSENT, "sees no GPU"),
        (cuda_torch(architectures=("sm_70", "sm_80")), "550.54", Status.FAILS, "no kernels for NVIDIA H800"),
    ],
)
def test_cuda_build_against_the_driver(found, driver, status, part):
    seen = software.cuda(found, driver)
    assert seen.status == status
    assert part in seen.value


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 9), ("sm_80", "sm_86"), True),  # the same major version, a later minor one
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("sm_80", "compute_80"), True),  # compiled when loaded
        ((10, 3), ("sm_90", "sm_100"), True),
        ((10, 3), ("sm_90", "sm_100a"), False),
        ((7, 0), ("sm_75",), False),
        ((7, 0), (), True),  # unknown
    ],
)
def test_kernels_for_a_capability(capability, architectures, runs):
    assert software._has_kernels(capability, architectures) is runs


@pytest.mark.parametrize(
    ("library", "needed", "status"),
    [
        (Library(), False, Status.WARNING),
        (Library(), True, Status.FAILS),
        (Library("2.10.0"), True, Status.OK),
        (Library("2.12.0"), False, Status.WARNING),
        (Library("2.12.0"), True, Status.FAILS),
        (Library("2.10.0", "ImportError: undefined symbol"), False, Status.WARNING),
        (Library("2.10.0", "ImportError: undefined symbol"), True, Status.FAILS),
    ],
)
def test_transformer_engine_matters_where_fp8_is_asked_for(library, needed, status):
    found = Found({"transformer_engine.pytorch": library}, TorchFacts(gpus=(H800,)))
    assert software.transformer_engine(found, needed=needed).status == status


def test_without_gpu_nobody_misses_transformer_engine():
    assert software.transformer_engine(Found()).status == Status.ABSENT


def apex_in(folder: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('nothing here may be imported')\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def test_the_indexs_apex_is_recognised_as_another_project(tmp_path, monkeypatch):
    # the layout of apex 0.9.10.dev0, a toolkit for the Pyramid web framework
    apex_in(tmp_path, ["apex/__init__.py", "apex/i18n.py", "apex/lib/libapex.py", "apex/views.py"], monkeypatch)
    seen = software.apex()
    assert seen.status == Status.WARNING
    assert "not NVIDIA's" in seen.value
    assert "pip uninstall apex" in seen.remedy


def test_nvidias_apex_with_and_without_its_extensions(tmp_path, monkeypatch):
    python = ["apex/__init__.py", "apex/optimizers/__init__.py", "apex/multi_tensor_apply/__init__.py"]
    apex_in(tmp_path, python, monkeypatch)
    assert software.apex().value == "NVIDIA's, built without: fused optimizer, fused weight gradients"
    apex_in(tmp_path, ["amp_C.py", "fused_weight_gradient_mlp_cuda.py"], monkeypatch)
    assert software.apex().value == "NVIDIA's, with fused optimizer and fused weight gradients"


@pytest.mark.parametrize(
    ("library", "status", "part"),
    [
        (Library("2.13.0", "", 1.5), Status.OK, "2.13.0, imported in 1.5 s"),
        (Library(), Status.FAILS, "not installed"),
        (Library("2.13.0", "its import ended the process with signal 11"), Status.FAILS, "signal 11"),
    ],
)
def test_a_library_that_everything_needs(library, status, part):
    seen = software.library(Found({"torch": library}), "torch")
    assert seen.status == status
    assert part in seen.value


def test_versions_against_the_requirements(monkeypatch):
    wanted = ["torch==2.13.0", "numpy>=1.26,<3", 'colorama; sys_platform == "win32"', "lacking>=1"]
    have = {"torch": "2.13.0+cpu", "numpy": "1.25"}
    monkeypatch.setattr(software.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(software, "installed_version", lambda name: have.get(name, ""))
    seen = software.packages()
    assert seen.status == Status.WARNING
    assert seen.value == "numpy 1.25 (wanted <3,>=1.26); lacking missing (wanted >=1)"


def test_nemo_is_needed_by_exp_manager_keys_only(monkeypatch):
    monkeypatch.setattr(software, "installed_version", lambda name: "")
    assert software.nemo().status == Status.ABSENT
    assert software.nemo(needed=True).status == Status.FAILS


def test_what_torch_compile_lacks_is_named_on_gpu_machines_alone(monkeypatch):
    missing = ["a C compiler (gcc)", "Python.h in /usr/include"]
    monkeypatch.setattr(software, "missing_for_compile", lambda: missing)
    seen = software.compiler(cuda_torch())
    assert (seen.status, seen.value) == (Status.WARNING, f"{' and '.join(missing)} missing: no fused functions")
    assert seen.remedy
    assert software.compiler(Found()).status == Status.ABSENT
    missing.clear()
    assert software.compiler(cuda_torch()).status == Status.OK
