"""Every branch of building: what is found, what is said when it is not, and what the wheel is called."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from vlp_ops import build

PACKAGE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_switches(monkeypatch):
    for name in ("VLP_OPS_NATIVE", "VLP_OPS_CUDA", "FORCE_CUDA", "VLP_OPS_CUDA_ARCH", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


def fake_torch(
    folder: Path, version: str = "2.13.0", cuda: str | None = "13.0", *, headers: bool = True
) -> build.Torch:
    root = folder / "torch"
    header = root / "include" / "torch" / "csrc" / "stable" / "library.h"
    if headers:
        header.parent.mkdir(parents=True)
        header.write_text("")
    root.mkdir(exist_ok=True)
    told = "None" if cuda is None else repr(cuda)
    (root / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {told}\n")
    return build.Torch(root=root, version=version, cuda=cuda)


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def fake_toolkit(folder: Path, version: str = "13.0") -> Path:
    program(folder / "bin", "nvcc", f"echo 'Cuda compilation tools, release {version}, V{version}.88'")
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").write_text("")
    return folder


def test_finds_this_torch():
    import torch

    found = build.find_torch()
    assert found.version == torch.__version__ and found.cuda == torch.version.cuda


def test_torch_that_cannot_serve(tmp_path):
    with pytest.raises(build.BuildError, match="no torch was found"):
        build.find_torch([str(tmp_path)])
    fake_torch(tmp_path, headers=False)
    with pytest.raises(build.BuildError, match=r"torch 2\.13\.0 in .* has no C\+\+ headers"):
        build.find_torch([str(tmp_path)])
    fake_torch(tmp_path, "2.10.1", headers=True)
    with pytest.raises(build.BuildError, match=r"torch 2\.10\.1 is older than 2\.11"):
        build.find_torch([str(tmp_path)])


def test_cpu_build_of_torch(tmp_path):
    found = build.find_torch([str(fake_torch(tmp_path, "2.13.0+cpu", None).root.parent)])
    assert found.cuda is None


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        build.BuildError, match=r"no working C\+\+ compiler: g\+\+ is not there; .*clang\+\+ is not there"
    ):
        build.find_compiler()
    program(tmp_path, "broken", "echo cannot >&2; exit 3")
    monkeypatch.setenv("CXX", "broken")
    with pytest.raises(build.BuildError, match="broken does not work: broken failed"):
        build.find_compiler()


def test_other_systems_stay_pure(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(build.BuildError, match="kernels are built on Linux only, not on darwin"):
        build.find_compiler()


def test_toolkit(monkeypatch, tmp_path):
    torch = fake_torch(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    assert build.find_toolkit(torch).version == "13.0"
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "older", "12.8")))
    with pytest.raises(
        build.BuildError, match=r"the CUDA toolkit is 12\.8 but torch 2\.13\.0 is built for CUDA 13\.0"
    ):
        build.find_toolkit(torch)


def test_toolkit_behind_a_wrapper(monkeypatch, tmp_path):
    """nvcc on the path may be a script elsewhere; it tells where the toolkit is."""
    top = fake_toolkit(tmp_path / "real")
    wrapper = program(tmp_path / "bin", "nvcc", f"echo '#$ TOP={top}' >&2")
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    assert build.find_toolkit(None).nvcc == top / "bin" / "nvcc"


def test_no_toolkit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("this machine has a toolkit at the usual place")
    with pytest.raises(
        build.BuildError, match=r"no CUDA toolkit found \(nvcc and cuda_runtime\.h\); set CUDA_HOME"
    ):
        build.find_toolkit(None)


def test_architectures():
    assert build.gencode("8.0;12.0+PTX") == (
        [
            "-gencode",
            "arch=compute_80,code=sm_80",
            "-gencode",
            "arch=compute_120,code=sm_120",
            "-gencode",
            "arch=compute_120,code=compute_120",
        ],
        ["sm_80", "sm_120", "compute_120"],
    )
    assert build.gencode("9.0a")[1] == ["sm_90a"]
    with pytest.raises(build.BuildError, match="'sm_80' is not an architecture; write for example"):
        build.gencode("sm_80")


# ---- what setup.py does ----------------------------------------------------------------------------------------------------------


def install(monkeypatch, tmp_path, *, torch=None, **switches):
    """Messages of an install in which compiling itself is replaced; names of the libraries it would have made."""
    made = []
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    if torch is not None:
        monkeypatch.setattr(build, "find_torch", lambda: torch)
    monkeypatch.setattr(build, "build_cpu", lambda *arguments: made.append("cpu") or {})
    monkeypatch.setattr(build, "build_cuda", lambda *arguments: made.append("cuda") or {"arch": ["sm_80"]})
    return build.build_for_install(tmp_path), made


def test_install_pure(monkeypatch, tmp_path):
    messages, made = install(monkeypatch, tmp_path, VLP_OPS_NATIVE="0")
    assert made == [] and messages == ["vlp-ops: pure Python, because VLP_OPS_NATIVE=0."]


def test_install_without_toolkit(monkeypatch, tmp_path):
    def missing(torch):
        raise build.BuildError("no CUDA toolkit found (nvcc and cuda_runtime.h); set CUDA_HOME")

    monkeypatch.setattr(build, "find_toolkit", missing)
    messages, made = install(monkeypatch, tmp_path, torch=fake_torch(tmp_path / "env"))
    assert made == ["cpu"]
    assert messages == [
        "vlp-ops: building CPU kernels only: no CUDA toolkit found (nvcc and cuda_runtime.h); set CUDA_HOME."
    ]


def test_install_with_cpu_torch(monkeypatch, tmp_path):
    messages, made = install(monkeypatch, tmp_path, torch=fake_torch(tmp_path / "env", "2.13.0+cpu", None))
    assert made == ["cpu"]
    assert messages == ["vlp-ops: building CPU kernels only: torch 2.13.0+cpu is built without CUDA."]


def test_install_with_cuda_switched_off(monkeypatch, tmp_path):
    messages, made = install(monkeypatch, tmp_path, torch=fake_torch(tmp_path / "env"), VLP_OPS_CUDA="0")
    assert made == ["cpu"] and messages == ["vlp-ops: building CPU kernels only: VLP_OPS_CUDA=0."]


def test_install_with_everything(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "some.cu").write_text("")
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    messages, made = install(monkeypatch, tmp_path, torch=fake_torch(tmp_path / "env"))
    assert made == ["cpu", "cuda"]
    assert messages == ["vlp-ops: CUDA kernels built with nvcc 13.0 for sm_80."]
    assert build.read_record(tmp_path) == {"cpu": {}, "cuda": {"arch": ["sm_80"]}}


@pytest.mark.parametrize("name", ["VLP_OPS_CUDA", "FORCE_CUDA"])
def test_forced_cuda_that_cannot_be(monkeypatch, tmp_path, name):
    torch = fake_torch(tmp_path / "env", "2.13.0+cpu", None)
    with pytest.raises(
        build.BuildError, match=r"CUDA kernels cannot be built: torch 2\.13\.0\+cpu is built without CUDA"
    ):
        install(monkeypatch, tmp_path, torch=torch, **{name: "1"})


def test_install_without_torch_or_compiler(monkeypatch, tmp_path):
    def missing():
        raise build.BuildError("no torch was found")

    monkeypatch.setattr(build, "find_torch", missing)
    messages, made = install(monkeypatch, tmp_path)
    assert made == []
    assert messages == [
        "vlp-ops: installing without compiled kernels: no torch was found; python -m vlp_ops.build compiles them later."
    ]
    with pytest.raises(build.BuildError, match="no torch was found"):
        install(monkeypatch, tmp_path, VLP_OPS_NATIVE="1")


def test_a_failed_compilation_leaves_a_pure_install(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_torch", lambda: fake_torch(tmp_path / "env", "2.13.0+cpu", None))
    messages = build.build_for_install(tmp_path / "target")
    assert "kernels were not compiled" in messages[0] and "vlp-ops works without them" in messages[0]
    assert not list(tmp_path.glob("target/*.so"))
    monkeypatch.setenv("VLP_OPS_NATIVE", "1")
    shutil.rmtree(tmp_path / "env")
    with pytest.raises(build.BuildError, match="failed"):
        build.build_for_install(tmp_path / "target")


def test_wrong_switches(monkeypatch, tmp_path):
    monkeypatch.setenv("VLP_OPS_NATIVE", "yes")
    with pytest.raises(build.BuildError, match="VLP_OPS_NATIVE must be 0 or 1, got 'yes'"):
        build.build_for_install(tmp_path)
    monkeypatch.setenv("VLP_OPS_NATIVE", "0")
    monkeypatch.setenv("VLP_OPS_CUDA", "1")
    with pytest.raises(build.BuildError, match="contradict each other"):
        build.build_for_install(tmp_path)


def wheel(tmp_path, **switches) -> tuple[Path, str]:
    """Builds a wheel from a copy of the package, with the tools of this environment and nothing downloaded."""
    source = tmp_path / "source"
    shutil.copytree(
        PACKAGE,
        source,
        ignore=shutil.ignore_patterns("*.so", "_build.json", "*.egg-info", "build", "tests", "__pycache__"),
    )
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=source,
        env=os.environ | switches,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("*.whl")
    return found, done.stderr


def test_pure_wheel(tmp_path):
    file, messages = wheel(tmp_path, VLP_OPS_NATIVE="0")
    assert file.name.endswith("-py3-none-any.whl")
    assert "vlp-ops: pure Python, because VLP_OPS_NATIVE=0." in messages
    names = zipfile.ZipFile(file).namelist()
    # The sources travel, so that python -m vlp_ops.build can compile later.
    assert "vlp_ops/csrc/cpu/deformable.cpp" in names and "vlp_ops/csrc/cpu/common.h" in names
    assert not any(name.endswith(".so") for name in names)


@pytest.mark.slow
def test_native_wheel(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    file, messages = wheel(tmp_path, VLP_OPS_CUDA="0")
    assert "-py3-none-linux_" in file.name, messages
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(file).extractall(unpacked)
    code = "import vlp_ops; info = vlp_ops.backend_info(); print(vlp_ops.__file__, info['cpu']['native'], info['built'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert str(unpacked) in done.stdout and " True " in done.stdout, done.stdout + done.stderr
