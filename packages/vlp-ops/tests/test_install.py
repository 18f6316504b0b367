"""Installs from the sources into clean environments: every branch of the build, and one wheel on three
versions of torch.

`nox -s install` runs it. The environments hold torch and what the tests need, and nothing of vlp; uv makes
them, with a download of some GB the first time. Each test installs as a user does and takes vlp-ops out
again.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from vlp_ops import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("uv")), reason="needs g++ and uv"),
]

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parents[1]
USUAL = Path("/usr/local/cuda")
SWITCHES = ("VLP_OPS_", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX", "CUDA_HOME", "VIRTUAL_ENV", "PYTHONPATH")
# One architecture: the time goes into compiling, and test_cuda_sources.py has the others.
ONE = {"VLP_OPS_CUDA_ARCH": "9.0"}
AUDIT = Path(sysconfig.get_path("scripts"), "torch-abi-audit")
NO_TOOLKIT = "no CUDA toolkit found (nvcc and cuda_runtime.h); set CUDA_HOME"
# Golden cases and opcheck of every operator, and the compiled kernels against PyTorch.
MODULES = ("contrastive", "deformable", "masked_attention", "memory", "native", "tokens")
QUICK = "case or opcheck or memclip or memory_layer or visft or test_native and not whole_suite"


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command gave, and its processor time: machines that run tests are shared."""

    code: int
    output: str
    seconds: float

    @property
    def messages(self) -> list[str]:
        """What setup.py said: pip indents it under -v and not where it failed."""
        return [line.strip() for line in self.output.splitlines() if line.strip().startswith("vlp-ops: ")]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A Python environment in a folder; `torch` is its version."""

    folder: Path
    torch: str

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def packages(self) -> Path:
        (found,) = self.folder.glob("lib/python3.*/site-packages")
        return found

    @property
    def libraries(self) -> set[str]:
        return {file.name for file in self.packages.glob("vlp_ops/_C_*.so")}

    def run(
        self, *arguments: str, before: Sequence[str] = (), cwd: Path | None = None, **variables: str
    ) -> Done:
        """Runs its Python as a shell does where it is not activated, without a switch of the caller; `before`
        is put in front."""
        began = processor_time()
        done = subprocess.run(
            [*before, self.python, *arguments],
            cwd=cwd or self.folder,
            env=shell() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        result = Done(code=done.returncode, output=done.stdout, seconds=processor_time() - began)
        print(*result.messages, f"{' '.join(arguments[:3])}: {result.seconds:.1f} s", sep="\n")
        return result

    def pip(self, *arguments: str, before: Sequence[str] = (), **variables: str) -> Done:
        return self.run("-m", "pip", *arguments, before=before, **variables)

    def install(self, source: Path, *options: str, before: Sequence[str] = (), **variables: str) -> Done:
        """`pip install` of a folder or wheel with the torch of the environment in sight; -v, or pip hides
        what setup.py says."""
        options = ("-v", "--no-build-isolation", "--no-deps", *options)
        return self.pip("install", *options, str(source), before=before, **variables)

    def info(self, *, warnings: str = "error") -> dict:
        done = self.run(
            "-W", warnings, "-c", "import json, vlp_ops; print(json.dumps(vlp_ops.backend_info()))"
        )
        assert done.code == 0, done.output
        return json.loads(done.output)


MADE: list[Environment] = []


def processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shell() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(SWITCHES)}


def uv(*arguments: str, check: bool = True) -> bool:
    """Whether uv did it; where it must, its failure is an error."""
    # Away from the checkout, whose pins uv would hold every environment to.
    command = ["uv", "--directory", ROOT.anchor, *arguments]
    done = subprocess.run(command, env=shell(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{' '.join(command)}:\n{done.stderr}"
    return done.returncode == 0


def environment(folder: Path, *torch: str) -> Environment:
    """A new environment with a torch (arguments of uv) and the tools that the tests of this package take."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    tools = [f"{name}=={pins[name]}" for name in ("pytest", "pytest-timeout", "safetensors", "numpy")]
    uv("venv", "--quiet", "--seed", "--python", sys.executable, str(folder))
    python = str(folder / "bin" / "python")
    uv("pip", "install", "--quiet", "--python", python, *torch, "setuptools>=77", *tools)
    version = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    MADE.append(Environment(folder=folder, torch=version.stdout.strip()))
    return MADE[-1]


@pytest.fixture(scope="session")
def newest(tmp_path_factory) -> Environment:
    """The torch of constraints.txt, which is built for CUDA on Linux."""
    return environment(tmp_path_factory.mktemp("newest"), "-c", str(ROOT / "constraints.txt"), "torch")


@pytest.fixture(scope="session")
def oldest(tmp_path_factory) -> Environment:
    oldest = ".".join(map(str, build.OLDEST_TORCH))
    return environment(tmp_path_factory.mktemp("oldest"), f"torch=={oldest}.*")


@pytest.fixture(scope="session")
def cpu_only(newest, tmp_path_factory) -> Environment:
    """torch 2.13 built without CUDA: from where pip is set up to look for wheels, else from where uv knows to
    find it."""
    folder = tmp_path_factory.mktemp("cpu")
    found = newest.pip("download", "--no-deps", "--dest", str(folder), "torch==2.13.0+cpu")
    torch = [str(wheel) for wheel in folder.glob("*.whl")]
    if not torch:
        torch = ["--torch-backend", "cpu", "torch==2.13.*"]
        if not uv("pip", "install", "--dry-run", "--python", newest.python, *torch, check=False):
            pytest.skip(f"no torch 2.13 built without CUDA can be had: {found.output}")
    made = environment(folder / "env", *torch)
    assert made.torch.startswith("2.13.") and made.torch.endswith("+cpu")
    return made


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """The package as git has it: nothing that was built in place."""
    folder = tmp_path_factory.mktemp("source") / PACKAGE.name
    drop = shutil.ignore_patterns("_C_*.so", "_build.json", "*.egg-info", "build", "tests", "__pycache__")
    return shutil.copytree(PACKAGE, folder, ignore=drop)


@pytest.fixture(autouse=True)
def nothing_stays(source):
    """Takes vlp-ops out again, so that each test finds clean environments and sources."""
    yield
    for used in MADE:
        if list(used.packages.glob("vlp_ops*")):
            used.pip("uninstall", "--yes", "--quiet", "vlp-ops")
        # pip leaves what was compiled later.
        shutil.rmtree(used.packages / "vlp_ops", ignore_errors=True)
        assert not list(used.packages.glob("*vlp_ops*"))
    for left in (*source.glob("src/vlp_ops/_C_*.so"), *source.glob("src/vlp_ops/_build.json")):
        left.unlink()


@pytest.fixture(scope="session")
def toolkit() -> build.Toolkit:
    try:
        return build.find_toolkit(build.find_torch())
    except build.BuildError as error:
        pytest.skip(str(error))


def without(program: str, tmp_path: Path) -> str:
    """PATH on which everything is found but `program`."""
    places = []
    for number, folder in enumerate(Path(place) for place in os.environ["PATH"].split(os.pathsep) if place):
        if not (folder / program).exists():
            places.append(str(folder))
            continue
        mirror = tmp_path / f"path{number}"
        mirror.mkdir()
        for file in folder.iterdir():
            if file.name != program:
                (mirror / file.name).symlink_to(file)
        places.append(str(mirror))
    return os.pathsep.join(places)


@pytest.fixture
def no_toolkit(tmp_path) -> tuple[list[str], dict[str, str]]:
    """What to put before a command, and variables for it, so that it finds no CUDA toolkit, not even the one
    in the usual folder."""
    variables = {"PATH": without("nvcc", tmp_path)}
    if not USUAL.exists():
        return [], variables
    hide = f'mount -t tmpfs none "{USUAL.resolve()}" && exec "$@"'
    before = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", hide, "sh"]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"{USUAL} is there, and this user may not hide it")
    return before, variables


# ---- what is built -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(newest, source, tmp_path_factory) -> tuple[Path, Done]:
    """A wheel made with the newest torch and with nvcc where there is one."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("-v", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder))
    done = newest.pip("wheel", *options, str(source), **ONE)
    assert done.code == 0, done.output
    (file,) = folder.glob("*.whl")
    return file, done


def test_wheel_with_toolkit_and_cuda_torch(toolkit, newest, wheel):
    file, done = wheel
    assert done.messages == [f"vlp-ops: CUDA kernels built with nvcc {toolkit.version} for sm_90."]
    assert re.search(r"-py3-none-linux_\w+\.whl$", file.name)
    assert newest.install(file).code == 0
    info = newest.info()
    assert info["cpu"] == info["cuda"] == {"native": True, "reason": None}
    assert info["built"]["cpu"]["torch"] == info["built"]["cuda"]["torch"] == newest.torch
    assert info["built"]["cuda"]["arch"] == ["sm_90"]


def test_no_toolkit(newest, source, no_toolkit):
    before, variables = no_toolkit
    done = newest.install(source, before=before, **variables)
    assert done.code == 0, done.output
    assert done.messages == [f"vlp-ops: building CPU kernels only: {NO_TOOLKIT}."]
    assert newest.libraries == {"_C_cpu.so"}
    info = newest.info()
    assert info["cpu"]["native"]
    assert info["cuda"]["reason"] == (
        f"no _C_cuda.so was built ({NO_TOOLKIT}); python -m vlp_ops.build compiles it"
    )


def test_torch_without_cuda_and_a_plain_pip_install(cpu_only, source):
    """As a user types it: pip hides the environment from the build, which must find its torch and download
    none."""
    done = cpu_only.pip("install", "-v", str(source))
    assert done.code == 0, done.output
    assert done.messages == [
        f"vlp-ops: building CPU kernels only: torch {cpu_only.torch} is built without CUDA."
    ]
    assert not re.search(r"(Collecting|Downloading|Installing collected packages:.*) torch\b", done.output)
    assert cpu_only.libraries == {"_C_cpu.so"}
    info = cpu_only.info()
    assert info["cpu"]["native"] and info["torch_cuda"] is None
    assert info["built"]["cpu"]["torch"] == cpu_only.torch
    assert info["cuda"]["reason"] == f"torch {cpu_only.torch} is built without CUDA"


def test_cuda_switched_off_and_an_editable_install(newest, source):
    inside = source / "src" / "vlp_ops"
    (inside / "_C_cuda.so").write_bytes(b"of an earlier build")
    done = newest.install(source, "--editable", VLP_OPS_CUDA="0")
    assert done.code == 0, done.output
    assert done.messages == ["vlp-ops: building CPU kernels only: VLP_OPS_CUDA=0."]
    assert [file.name for file in inside.glob("_C_*.so")] == ["_C_cpu.so"]
    info = newest.info()
    assert info["cpu"]["native"] and "(VLP_OPS_CUDA=0)" in info["cuda"]["reason"]

    assert newest.install(source, "--editable", VLP_OPS_NATIVE="0").code == 0
    assert not list(inside.glob("_C_*.so"))
    assert "(VLP_OPS_NATIVE=0)" in newest.info()["cpu"]["reason"]


def test_pure_python_and_compiled_later(oldest, source, no_toolkit):
    """With the oldest torch, so that its headers are tried as well."""
    done = oldest.install(source, VLP_OPS_NATIVE="0")
    assert done.code == 0, done.output
    assert done.messages == ["vlp-ops: pure Python, because VLP_OPS_NATIVE=0."]
    assert "-py3-none-any.whl" in done.output and not oldest.libraries
    assert not oldest.info()["cpu"]["native"]

    before, variables = no_toolkit
    done = oldest.run("-W", "error", "-m", "vlp_ops.build", before=before, **variables)
    assert done.code == 0, done.output
    assert done.messages == [
        f"vlp-ops: CPU kernels built with g++ and torch {oldest.torch}.",
        f"vlp-ops: building CPU kernels only: {NO_TOOLKIT}.",
    ]
    info = oldest.info()
    assert info["cpu"]["native"] and info["built"]["cpu"]["torch"] == oldest.torch
    assert NO_TOOLKIT in info["cuda"]["reason"]

    # As after an upgrade, which leaves the library that was compiled in place.
    with (oldest.packages / "vlp_ops" / "csrc" / "cpu" / "common.h").open("a") as header:
        header.write("// changed\n")
    stale = "_C_cpu.so was built from other sources; python -m vlp_ops.build compiles it again"
    assert oldest.info(warnings="ignore")["cpu"] == {"native": False, "reason": stale}
    assert f"UserWarning: vlp_ops: {stale}" in oldest.run("-c", "import vlp_ops").output


def test_no_compiler(newest, source, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = newest.install(source, PATH=str(empty))
    assert done.code == 0, done.output
    missing = "no working C++ compiler: g++ is not there; c++ is not there; clang++ is not there"
    assert done.messages == [
        (
            f"vlp-ops: installing without compiled kernels: {missing}; "
            "python -m vlp_ops.build compiles them later."
        )
    ]
    assert "-py3-none-any.whl" in done.output and not newest.libraries
    info = newest.info()
    assert info["cpu"]["reason"] == f"no _C_cpu.so was built ({missing}); python -m vlp_ops.build compiles it"


def test_compiler_that_does_not_work(newest, source, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'ld: cannot find -lstdc++' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = newest.install(source, CXX=str(broken))
    assert done.code == 0, done.output
    assert done.messages == [
        (
            f"vlp-ops: installing without compiled kernels: no working C++ compiler: {broken} does not work: "
            "broken failed (1):"
        )
    ]
    assert "cannot find -lstdc++; python -m vlp_ops.build compiles them later." in done.output
    assert not newest.libraries


def test_uv_hides_torch_from_the_build(newest, source):
    uv("pip", "install", "--quiet", "--no-cache", "--no-deps", "--python", newest.python, str(source))
    assert not newest.libraries
    assert "(no torch was found)" in newest.info()["cpu"]["reason"]


# ---- what is refused ---------------------------------------------------------------------------------------


def refused(done: Done, message: str, where: Environment) -> None:
    assert done.code != 0
    assert done.messages == [message], done.output
    assert done.seconds < 10
    assert not list(where.packages.glob("vlp_ops*"))


@pytest.mark.parametrize("name", ["VLP_OPS_CUDA", "FORCE_CUDA"])
def test_forced_cuda_with_a_torch_without_cuda(cpu_only, source, name):
    reason = f"torch {cpu_only.torch} is built without CUDA"
    done = cpu_only.install(source, **{name: "1"})
    refused(done, f"vlp-ops: VLP_OPS_CUDA=1, but CUDA kernels cannot be built: {reason}", cpu_only)


def test_forced_cuda_without_toolkit(newest, source, no_toolkit):
    before, variables = no_toolkit
    done = newest.install(source, before=before, **variables, VLP_OPS_CUDA="1")
    refused(done, f"vlp-ops: VLP_OPS_CUDA=1, but CUDA kernels cannot be built: {NO_TOOLKIT}", newest)


def test_forced_cuda_with_a_toolkit_of_another_major_version(newest, source, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").write_text("")
    built_for = build.find_torch([str(newest.packages)]).cuda
    done = newest.install(source, CUDA_HOME=str(tmp_path), VLP_OPS_CUDA="1")
    reason = f"the CUDA toolkit is 12.8 but torch {newest.torch} is built for CUDA {built_for}"
    refused(done, f"vlp-ops: VLP_OPS_CUDA=1, but CUDA kernels cannot be built: {reason}", newest)


def test_forced_cuda_with_a_wrong_cuda_home(newest, source, tmp_path):
    done = newest.install(source, CUDA_HOME=str(tmp_path), VLP_OPS_CUDA="1")
    reason = f"no CUDA toolkit found (nvcc and cuda_runtime.h) in CUDA_HOME={tmp_path}"
    refused(done, f"vlp-ops: VLP_OPS_CUDA=1, but CUDA kernels cannot be built: {reason}", newest)


@pytest.mark.parametrize("name", ["VLP_OPS_NATIVE", "VLP_OPS_CUDA"])
def test_forced_kernels_without_compiler(toolkit, newest, source, tmp_path, name):
    absent = tmp_path / "absent"
    done = newest.install(source, CXX=str(absent), **{name: "1"})
    refused(done, f"vlp-ops: no working C++ compiler: {absent} is not there", newest)


# ---- one wheel for all -------------------------------------------------------------------------------------


def test_wheel_uses_the_stable_interface_alone(wheel, tmp_path):
    file, _ = wheel
    shutil.unpack_archive(file, tmp_path, "zip")
    libraries = sorted(tmp_path.glob("vlp_ops/_C_*.so"))
    assert libraries
    done = subprocess.run(
        [AUDIT, "--check", "torch", *map(str, libraries)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("STABLE  ]") == len(libraries) and "Min torch:   2.10.0" in done.stdout
    for library in libraries:
        elf = subprocess.run(
            ["readelf", "--dynamic", "--symbols", "--wide", str(library)],
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        # libtorch and the CUDA runtime are in the process already; a path would fix them to one environment.
        assert "RPATH" not in elf and "RUNPATH" not in elf
        # No symbol of Python: one wheel for every Python 3.
        assert not re.search(r"UND _?Py[A-Z]", elf)


@pytest.mark.parametrize("which", ["oldest", "cpu_only", "newest"])
def test_one_wheel_on_every_torch(which, wheel, request):
    """The operators on their golden cases and opcheck, with the compiled kernels."""
    where, (file, built) = request.getfixturevalue(which), wheel
    assert where.install(file).code == 0
    info = where.info()
    assert info["cpu"]["native"]
    if info["torch_cuda"] is not None and "CUDA kernels built" in built.output:
        assert info["cuda"]["native"]
    golden = request.config.getoption("--golden")
    options = ["-q", "-p", "no:cacheprovider", "-k", QUICK, *(["--golden", str(golden)] if golden else [])]
    modules = [str(PACKAGE / "tests" / f"test_{name}.py") for name in MODULES]
    done = where.run("-m", "pytest", *options, *modules, cwd=ROOT)
    assert done.code == 0, done.output[-5000:]
    assert re.search(r"\b\d+ passed", done.output)
    print(f"torch {where.torch}: {done.output.splitlines()[-1]}")
