"""Compiles the kernels: `python -m vlp_ops.build` for an installed vlp_ops, in place; setup.py for a wheel.

The kernels use the stable ABI of LibTorch, so a plain compiler call with torch's headers is all there is to it: no torch is imported, none is
downloaded, and the result serves every torch from 2.11 on (for CUDA: of the same CUDA major version).

    python -m vlp_ops.build                 # the CPU library, and the CUDA library where nvcc and a CUDA build of torch are there
    python -m vlp_ops.build --cpu           # only the CPU library
    python -m vlp_ops.build --check-cuda    # compile every .cu for sm_80, sm_90 and sm_100 and fail on register spills; installs nothing

Environment: CXX, CUDA_HOME; VLP_OPS_CUDA_ARCH ("8.0;9.0;12.0+PTX"); for setup.py also VLP_OPS_NATIVE (0: pure Python, 1: native or fail) and
VLP_OPS_CUDA or FORCE_CUDA (0: CPU kernels only, 1: CUDA or fail).
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
OLDEST_TORCH = (2, 11)
# Both the library interface that is used and the oldest torch that can load the result.
TARGET = "0x020a000000000000"
ARCHITECTURES = "8.0;8.6;9.0;10.0;12.0+PTX"
CHECKED_ARCHITECTURES = "8.0;9.0;10.0"

COMMON = ("-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION={TARGET}")
# Not -ffast-math: with it the linker adds a start-up object that flushes denormals to zero in the whole process, and NaN must be recognised.
CPU = (
    *COMMON,
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-freciprocal-math",
)
CUDA = (
    *COMMON,
    "-DUSE_CUDA",
    "--expt-relaxed-constexpr",
    "-Xfatbin",
    "-compress-all",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-g0",
    "-Xptxas",
    "-v",
)


class BuildError(Exception):
    """Says why something cannot be built, in words for the user."""


@dataclass(frozen=True, kw_only=True)
class Torch:
    """Headers and libraries of a torch; cuda is None for a CPU build."""

    root: Path
    version: str
    cuda: str | None


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """A CUDA toolkit: its compiler, headers and version."""

    nvcc: Path
    include: Path
    version: str


def find_torch(folders: Sequence[str] | None = None) -> Torch:
    """The torch in `folders` (default: sys.path, and the environment a build runs for even where its packages are hidden from it)."""
    if folders is None:
        # pip hides the packages of an environment from a build inside it, but the interpreter still knows where they are.
        folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in folders:
        root = Path(folder or ".") / "torch"
        if not (root / "version.py").is_file():
            continue
        text = (root / "version.py").read_text()
        version = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.MULTILINE)
        cuda = re.search(r"^cuda(?:: [^=]+)? = ['\"]([^'\"]+)", text, re.MULTILINE)
        number = re.match(r"(\d+)\.(\d+)", version.group(1)) if version else None
        if version is None or number is None:
            raise BuildError(f"the version of torch in {root} cannot be read")
        if tuple(int(part) for part in number.groups()) < OLDEST_TORCH:
            raise BuildError(f"torch {version.group(1)} is older than {'.'.join(map(str, OLDEST_TORCH))}")
        if not (root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            raise BuildError(f"torch {version.group(1)} in {root} has no C++ headers")
        return Torch(root=root, version=version.group(1), cuda=cuda.group(1) if cuda else None)
    raise BuildError("no torch was found")


def run(command: Sequence[str | Path], *, timeout: float = 3600) -> str:
    """Output of a command, both streams; BuildError with the end of it when the command fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | {"LC_ALL": "C"},
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise BuildError(f"{Path(str(command[0])).name} failed ({done.returncode}):\n{tail}")
    return done.stdout


def find_compiler() -> list[str]:
    """A C++ compiler that works, from CXX or the usual names."""
    if sys.platform != "linux":
        raise BuildError(f"kernels are built on Linux only, not on {sys.platform}")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    tried = []
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]) is None:
            tried.append(f"{name} is not there")
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(
                "#include <vector>\nint main() { return static_cast<int>(std::vector<int>(1).size()) - 1; }\n"
            )
            try:
                run([*command, "-std=c++20", source, "-o", Path(folder, "probe")], timeout=60)
            except BuildError as error:
                tried.append(f"{name} does not work: {error}")
            else:
                return command
    raise BuildError("no working C++ compiler: " + "; ".join(tried))


def find_toolkit(torch: Torch | None) -> Toolkit:
    """CUDA toolkit from CUDA_HOME, the nvcc on the path, or the usual folder; its major version must be torch's."""
    places: list[Path] = []
    if os.environ.get("CUDA_HOME"):
        places.append(Path(os.environ["CUDA_HOME"]))
    on_path = shutil.which("nvcc")
    if on_path:
        # The one on the path may be a wrapper: nvcc itself says where its toolkit is.
        told = subprocess.run(
            [on_path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        top = re.search(r"^#\$ TOP=(.+)$", told.stderr, re.MULTILINE)
        if top:
            places.append(Path(top.group(1).strip()).resolve())
        places.append(Path(on_path).resolve().parent.parent)
    places.append(Path("/usr/local/cuda"))
    for place in places:
        nvcc = place / "bin" / "nvcc"
        includes = [place / "include", *place.glob("targets/*/include")]
        include = next((folder for folder in includes if (folder / "cuda_runtime.h").is_file()), None)
        if nvcc.is_file() and include is not None:
            release = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"], timeout=60))
            version = release.group(1) if release else "unknown"
            if (
                torch is not None
                and torch.cuda is not None
                and version.split(".")[0] != torch.cuda.split(".")[0]
            ):
                raise BuildError(
                    f"the CUDA toolkit is {version} but torch {torch.version} is built for CUDA {torch.cuda}"
                )
            return Toolkit(nvcc=nvcc, include=include, version=version)
    raise BuildError("no CUDA toolkit found (nvcc and cuda_runtime.h); set CUDA_HOME")


def why_no_cuda(torch: Torch) -> str | None:
    """Why CUDA kernels cannot be built; None when they can."""
    if torch.cuda is None:
        return f"torch {torch.version} is built without CUDA"
    try:
        find_toolkit(torch)
    except BuildError as error:
        return str(error)
    return None if any((PACKAGE / "csrc" / "cuda").glob("*.cu")) else "this version has no CUDA kernels"


def build_cpu(
    torch: Torch, compiler: Sequence[str], target: Path, *, sources: Path = PACKAGE / "csrc"
) -> dict[str, Any]:
    """Compiles the CPU library into the folder `target`; returns what to record about it."""
    include = torch.root / "include"
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in sorted((sources / "cpu").glob("*.cpp")):
            objects.append(Path(folder, source.stem + ".o"))
            names = f"-fmacro-prefix-map={sources}=csrc"
            run([*compiler, *CPU, names, "-isystem", include, "-c", source, "-o", objects[-1]])
        library = Path(folder, "_C_cpu.so")
        link = ["-shared", "-s", "-Wl,--as-needed", "-L", torch.root / "lib", "-ltorch_cpu", "-lc10"]
        run([*compiler, *objects, *link, "-o", library])
        install(library, target)
    version = run([*compiler, "--version"]).splitlines()[0]
    return {"torch": torch.version, "compiler": version}


def gencode(architectures: str) -> tuple[list[str], list[str]]:
    """nvcc options and plain names ("sm_80", "compute_120") of a list like "8.0;12.0+PTX"."""
    options, names = [], []
    for item in architectures.replace(",", ";").split(";"):
        found = re.fullmatch(r"\s*(\d+)\.(\d)([af]?)(\+PTX)?\s*", item)
        if found is None:
            raise BuildError(
                f"VLP_OPS_CUDA_ARCH: {item!r} is not an architecture; write for example 8.0;9.0;12.0+PTX"
            )
        number = "".join(found.groups()[:3])
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        names.append(f"sm_{number}")
        if found.group(4):
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
            names.append(f"compute_{number}")
    return options, names


def compile_cuda(
    torch: Torch, compiler: Sequence[str], toolkit: Toolkit, architectures: str, folder: Path
) -> tuple[list[Path], list[str]]:
    """Object files of all .cu in `folder`, and one line per kernel that spills registers."""
    options, _ = gencode(architectures)
    sources = PACKAGE / "csrc"
    objects, spills = [], []
    for source in sorted((sources / "cuda").glob("*.cu")):
        objects.append(folder / f"{source.stem}.cuda.o")
        prefix = f"-fmacro-prefix-map={sources}=csrc"
        include = ["-isystem", torch.root / "include", "-I", toolkit.include]
        host = ["-ccbin", compiler[0], "-Xcompiler", prefix]
        log = run([toolkit.nvcc, *CUDA, *options, *host, *include, "-c", source, "-o", objects[-1]])
        kernel = "?"
        for line in log.splitlines():
            named = re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line)
            if named:
                kernel = f"{source.name}: {named.group(1)} for {named.group(2)}"
            spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
            if spilled and spilled.groups() != ("0", "0"):
                spills.append(f"{kernel}: {line.strip()}")
    return objects, spills


def cuda_runtime(torch: Torch, toolkit: Toolkit) -> list[str | Path]:
    """Link options for the CUDA runtime: the toolkit's, or the one that came with torch (it has no name for the linker)."""
    major = toolkit.version.split(".")[0]
    top = toolkit.include.parent
    folders = [top / "lib64", top / "lib", *sorted((torch.root.parent / "nvidia").glob("*/lib"))]
    for folder in folders:
        if (folder / f"libcudart.so.{major}").exists():
            return ["-L", folder, f"-l:libcudart.so.{major}"]
    raise BuildError(f"libcudart.so.{major} is neither in the CUDA toolkit nor beside torch")


def build_cuda(torch: Torch, compiler: Sequence[str], toolkit: Toolkit, target: Path) -> dict[str, Any]:
    """Compiles the CUDA library into the folder `target`; returns what to record about it."""
    architectures = os.environ.get("VLP_OPS_CUDA_ARCH") or ARCHITECTURES
    runtime = cuda_runtime(torch, toolkit)
    with tempfile.TemporaryDirectory() as folder:
        objects, _ = compile_cuda(torch, compiler, toolkit, architectures, Path(folder))
        library = Path(folder, "_C_cuda.so")
        link = [
            "-shared",
            "-s",
            "-Wl,--as-needed",
            "-L",
            torch.root / "lib",
            "-ltorch_cuda",
            "-ltorch_cpu",
            "-lc10",
        ]
        run([*compiler, *objects, *link, *runtime, "-o", library])
        install(library, target)
    return {"torch": torch.version, "nvcc": toolkit.version, "arch": gencode(architectures)[1]}


def check_cuda(torch: Torch, compiler: Sequence[str], toolkit: Toolkit) -> list[str]:
    """Compiles every .cu for the checked architectures; returns the kernels that spill registers."""
    with tempfile.TemporaryDirectory() as folder:
        architectures = os.environ.get("VLP_OPS_CUDA_ARCH") or CHECKED_ARCHITECTURES
        return compile_cuda(torch, compiler, toolkit, architectures, Path(folder))[1]


def install(library: Path, target: Path) -> None:
    """Puts a library in place in one step: a process that has the old one loaded keeps it."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        beside = target / f".{library.name}.{os.getpid()}"
        shutil.copyfile(library, beside)
        beside.replace(target / library.name)
    except OSError as error:
        raise BuildError(f"{target} cannot be written: {error}") from error


def read_record(folder: Path = PACKAGE) -> dict[str, Any]:
    """What was recorded about the libraries in a folder: {} when nothing was built."""
    file = folder / "_build.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    beside = folder / f"._build.json.{os.getpid()}"
    beside.write_text(json.dumps(read_record(folder) | dict(record), indent=1) + "\n")
    beside.replace(folder / "_build.json")


def switch(name: str, *aliases: str) -> bool | None:
    """An environment switch: True for 1, False for 0, None when it is not set. BuildError for anything else."""
    for key in (name, *aliases):
        value = os.environ.get(key, "")
        if value not in ("", "0", "1"):
            raise BuildError(f"{key} must be 0 or 1, got {value!r}")
        if value:
            return value == "1"
    return None


def build_for_install(target: Path) -> list[str]:
    """What setup.py does: builds what can be built into `target` and returns messages; BuildError only for what was forced by a switch."""
    native, cuda = switch("VLP_OPS_NATIVE"), switch("VLP_OPS_CUDA", "FORCE_CUDA")
    if native is False:
        if cuda:
            raise BuildError("VLP_OPS_NATIVE=0 and VLP_OPS_CUDA=1 contradict each other")
        return ["vlp-ops: pure Python, because VLP_OPS_NATIVE=0."]
    forced = bool(native or cuda)
    later = "python -m vlp_ops.build compiles them later"
    try:
        torch = find_torch()
        reason = why_no_cuda(torch) if cuda is not False else "VLP_OPS_CUDA=0"
        if cuda and reason:
            raise BuildError(f"VLP_OPS_CUDA=1, but CUDA kernels cannot be built: {reason}")
        compiler = find_compiler()
    except BuildError as error:
        if forced:
            raise
        return [f"vlp-ops: installing without compiled kernels: {error}; {later}."]
    messages = []
    try:
        write_record(target, {"cpu": build_cpu(torch, compiler, target)})
        if reason is None:
            toolkit = find_toolkit(torch)
            record = build_cuda(torch, compiler, toolkit, target)
            write_record(target, {"cuda": record})
            messages.append(
                f"vlp-ops: CUDA kernels built with nvcc {toolkit.version} for {', '.join(record['arch'])}."
            )
        else:
            messages.append(f"vlp-ops: building CPU kernels only: {reason}.")
    except BuildError as error:
        if forced:
            raise
        messages.append(f"vlp-ops: kernels were not compiled: {error}\nvlp-ops works without them; {later}.")
    return messages


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vlp_ops.build", description="Compile the kernels of vlp_ops in place."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cpu", action="store_true", help="only the CPU library")
    which.add_argument(
        "--check-cuda", action="store_true", help="compile the CUDA kernels, fail on spills, install nothing"
    )
    options = parser.parse_args(arguments)
    try:
        torch = find_torch()
        reason = why_no_cuda(torch) if not options.cpu else None
        compiler = find_compiler()
        if options.check_cuda:
            # Compiling needs no CUDA build of torch, only its headers.
            toolkit = find_toolkit(torch)
            spills = check_cuda(torch, compiler, toolkit)
            print(
                "\n".join(spills)
                or f"vlp-ops: all CUDA kernels compile with nvcc {toolkit.version}, without spills."
            )
            return 1 if spills else 0
        write_record(PACKAGE, {"cpu": build_cpu(torch, compiler, PACKAGE)})
        print(f"vlp-ops: CPU kernels built with {compiler[0]} and torch {torch.version}.")
        if options.cpu:
            return 0
        if reason is not None:
            print(f"vlp-ops: building CPU kernels only: {reason}.")
            return 0
        toolkit = find_toolkit(torch)
        record = build_cuda(torch, compiler, toolkit, PACKAGE)
        write_record(PACKAGE, {"cuda": record})
        print(f"vlp-ops: CUDA kernels built with nvcc {toolkit.version} for {', '.join(record['arch'])}.")
    except BuildError as error:
        print(f"vlp-ops: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
