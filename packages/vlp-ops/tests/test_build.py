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
ARCHITECTURES = ("VLP_OPS_CUDA_ARCH", "TORCH_CUDA_ARCH_LIST")


@pytest.fixture(autouse=True)
def no_switches(monkeypatch):
    for name in (
        "VLP_OPS_NATIVE",
        "VLP_OPS_CUDA",
        "FORCE_CUDA",
        "CXX",
        "CUDA_HOME",
        "MAX_JOBS",
        *ARCHITECTURES,
    ):
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
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "wrong"))
    with pytest.raises(build.BuildError, match=r"no CUDA toolkit found .* in CUDA_HOME=.*wrong"):
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


def test_architectures_are_those_of_the_machine_unless_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.chosen_architectures() == build.ARCHITECTURES
    smi = program(tmp_path, "nvidia-smi", "echo 9.0; echo 8.6; echo 9.0")
    assert build.chosen_architectures() == "8.6;9.0+PTX"
    smi.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert build.chosen_architectures() == build.ARCHITECTURES
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    assert build.gencode(build.chosen_architectures())[1] == ["sm_80", "sm_90", "compute_90"]
    monkeypatch.setenv("VLP_OPS_CUDA_ARCH", "10.0")
    assert build.chosen_architectures() == "10.0"


def test_host_compiler_behind_a_launcher(monkeypatch, tmp_path):
    """nvcc is given the compiler and not the launcher, and the flags that came with it."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "some.cu").write_text("")
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    commands = []
    monkeypatch.setattr(build, "run", lambda command: commands.append(command) or "")
    toolkit = build.Toolkit(nvcc=Path("nvcc"), include=tmp_path, version="13.0")
    torch = fake_torch(tmp_path / "env")
    build.compile_cuda(torch, ["ccache", "g++-13", "-m64"], toolkit, "9.0", tmp_path)
    (command,) = commands
    assert command[command.index("-ccbin") + 1] == "g++-13"
    assert command[command.index("-m64") - 1] == "-Xcompiler"


def test_sources_are_compiled_side_by_side(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "2")
    assert build.each(lambda path: path.stem, [Path("a.cu"), Path("b.cu"), Path("c.cu")]) == ["a", "b", "c"]
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(build.BuildError, match="MAX_JOBS must be a whole number above 0, got 'all'"):
        build.each(str, [])


def test_program_that_cannot_be_started(tmp_path):
    file = program(tmp_path, "nvcc", "")
    file.write_bytes(b"\x7fELF for another processor")
    with pytest.raises(build.BuildError, match=r"nvcc cannot be started: .*Exec format error"):
        build.run([file])
    with pytest.raises(build.BuildError, match=r"sleep did not end within 0\.1 s"):
        build.run(["sleep", "5"], timeout=0.1)


# ---- what setup.py does ------------------------------------------------------------------------------------


def refuse(reason: str):
    """A function that finds nothing."""

    def find(*arguments):
        raise build.BuildError(reason)

    return find


def install(monkeypatch, tmp_path, *, torch=None, **switches):
    """Messages of an install in which compiling itself is replaced; names of the libraries it would have
    made."""
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
    assert build.read_record(tmp_path) == {"missing": dict.fromkeys(("cpu", "cuda"), "VLP_OPS_NATIVE=0")}


def test_libraries_of_an_earlier_build(monkeypatch, tmp_path):
    """An editable install: what is forbidden goes away, what merely cannot be built now stays."""
    for device in ("cpu", "cuda"):
        (tmp_path / f"_C_{device}.so").write_bytes(b"")
        build.write_record(tmp_path, device, {"torch": "2.13.0"})
    with monkeypatch.context() as patch:
        patch.setattr(build, "find_compiler", refuse("no working C++ compiler"))
        install(patch, tmp_path, torch=fake_torch(tmp_path / "env"))
    assert {file.name for file in tmp_path.glob("*.so")} == {"_C_cpu.so", "_C_cuda.so"}
    with monkeypatch.context() as patch:
        install(patch, tmp_path, torch=fake_torch(tmp_path / "other"), VLP_OPS_CUDA="0")
    assert {file.name for file in tmp_path.glob("*.so")} == {"_C_cpu.so"}
    assert build.read_record(tmp_path) == {"cpu": {}, "missing": {"cuda": "VLP_OPS_CUDA=0"}}
    monkeypatch.delenv("VLP_OPS_CUDA", raising=False)
    install(monkeypatch, tmp_path, VLP_OPS_NATIVE="0")
    assert not list(tmp_path.glob("*.so"))


def test_only_cuda_fails_to_compile(monkeypatch, tmp_path):
    torch = fake_torch(tmp_path / "env")
    monkeypatch.setattr(build, "why_no_cuda", lambda torch: None)
    monkeypatch.setattr(build, "find_torch", lambda: torch)
    monkeypatch.setattr(build, "build_cpu", lambda *arguments: {})
    monkeypatch.setattr(build, "find_toolkit", refuse("nvcc failed (1):\nerror: unsupported GNU version"))
    (message,) = build.build_for_install(tmp_path)
    assert message.startswith(
        "vlp-ops: only CPU kernels were compiled, CUDA kernels were not: nvcc failed (1):"
    )
    assert build.read_record(tmp_path) == {"cpu": {}, "missing": {"cuda": "nvcc failed (1):"}}
    monkeypatch.setenv("VLP_OPS_CUDA", "1")
    with pytest.raises(build.BuildError, match="nvcc failed"):
        build.build_for_install(tmp_path)


def test_install_without_toolkit(monkeypatch, tmp_path):
    reason = "no CUDA toolkit found (nvcc and cuda_runtime.h); set CUDA_HOME"
    monkeypatch.setattr(build, "find_toolkit", refuse(reason))
    messages, made = install(monkeypatch, tmp_path, torch=fake_torch(tmp_path / "env"))
    assert made == ["cpu"]
    assert messages == [f"vlp-ops: building CPU kernels only: {reason}."]


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
    monkeypatch.setattr(build, "find_torch", refuse("no torch was found"))
    messages, made = install(monkeypatch, tmp_path)
    assert made == []
    assert messages == [
        (
            "vlp-ops: installing without compiled kernels: no torch was found; "
            "python -m vlp_ops.build compiles them later."
        )
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
    """Builds a wheel from a copy of the package, with the tools of this environment and nothing
    downloaded."""
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
