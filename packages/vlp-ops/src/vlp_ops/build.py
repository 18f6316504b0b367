"""Compiles the kernels: `python -m vlp_ops.build` for an installed vlp_ops, in place; setup.py for a wheel.

The kernels use the stable ABI of LibTorch, so a plain compiler call with torch's headers is all there is to
it: no torch is imported, none is downloaded, and the result serves every torch from 2.11 on (for CUDA: of the
same CUDA major version).

    python -m vlp_ops.build                 # the CPU library, and the CUDA one with nvcc and a CUDA torch
    python -m vlp_ops.build --cpu           # only the CPU library
    python -m vlp_ops.build --check-cuda    # installs nothing: every .cu for sm_80, sm_90 and sm_100; fails
                                            # on register spills and warnings

Environment: CXX, CUDA_HOME (when set, no other toolkit is looked for), MAX_JOBS; VLP_OPS_CUDA_ARCH or
TORCH_CUDA_ARCH_LIST ("8.0;9.0;12.0+PTX", default: the GPUs of this machine, or a list from sm_80 to sm_120
where there is none); for setup.py also VLP_OPS_NATIVE (0: pure Python, 1: native or fail) and VLP_OPS_CUDA or
FORCE_CUDA (0: CPU kernels only, 1: CUDA or fail).
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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vlp_ops._built import PACKAGE, digest, read_record

T = TypeVar("T")
OLDEST_TORCH = (2, 11)
# Both the library interface that is used and the oldest torch that can load the result.
TARGET = "0x020a000000000000"
ARCHITECTURES = "8.0;8.6;9.0;10.0;12.0+PTX"
CHECKED_ARCHITECTURES = "8.0;9.0;10.0"
LAUNCHERS = ("ccache", "sccache", "distcc")

COMMON = ("-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION={TARGET}")
# Not -ffast-math: with it the linker adds a start-up object that flushes denormals to zero in the whole
# process, and NaN must be recognised.
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
    """The torch in `folders` (default: sys.path, and the environment a build runs for even where its packages
    are hidden from it)."""
    if folders is None:
        # pip hides the packages of an environment from a build inside it, but the interpreter still knows
        # where they are.
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
    name = Path(str(command[0])).name
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
            env=os.environ | {"LC_ALL": "C"},
        )
    except OSError as error:
        raise BuildError(f"{name} cannot be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{name} did not end within {timeout:g} s") from error
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise BuildError(f"{name} failed ({done.returncode}):\n{tail}")
    return done.stdout


def each(compile_one: Callable[[Path], T], sources: Sequence[Path]) -> list[T]:
    """What `compile_one` gives for each source, several at a time: MAX_JOBS, or one for each processor."""
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not jobs.isdecimal() or int(jobs) == 0:
        raise BuildError(f"MAX_JOBS must be a whole number above 0, got {jobs!r}")
    with ThreadPoolExecutor(int(jobs)) as pool:
        return list(pool.map(compile_one, sources))


def find_compiler() -> list[str]:
    """A C++ compiler that works, from CXX or the usual names."""
    if sys.platform != "linux":
        raise BuildError(f"kernels are built on Linux only, not on {sys.platform}")
    chosen = os.environ.get("CXX", "").strip()
    names = [chosen] if chosen else ["g++", "c++", "clang++"]
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
    """CUDA toolkit from CUDA_HOME and nowhere else, or else of the nvcc on the path, or in the usual folder;
    of torch's major version."""
    chosen = os.environ.get("CUDA_HOME")
    places = [Path(chosen)] if chosen else [Path("/usr/local/cuda")]
    on_path = shutil.which("nvcc")
    if on_path and not chosen:
        # The one on the path may be a wrapper: nvcc itself says where its toolkit is.
        try:
            top = re.search(
                r"^#\$ TOP=(.+)$", run([on_path, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE
            )
        except BuildError:
            top = None
        told = [Path(top.group(1).strip()).resolve()] if top else []
        places = [*told, Path(on_path).resolve().parent.parent, *places]
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
    if chosen:
        raise BuildError(f"no CUDA toolkit found (nvcc and cuda_runtime.h) in CUDA_HOME={chosen}")
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


def build_cpu(torch: Torch, compiler: Sequence[str], target: Path) -> dict[str, Any]:
    """Compiles the CPU library into the folder `target`; returns what to record about it."""
    sources, include = PACKAGE / "csrc", torch.root / "include"
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> Path:
            made = Path(folder, source.stem + ".o")
            names = f"-fmacro-prefix-map={sources}=csrc"
            run([*compiler, *CPU, names, "-isystem", include, "-c", source, "-o", made])
            return made

        objects = each(compile_one, sorted((sources / "cpu").glob("*.cpp")))
        library = Path(folder, "_C_cpu.so")
        link = ["-shared", "-s", "-Wl,--as-needed", "-L", torch.root / "lib", "-ltorch_cpu", "-lc10"]
        run([*compiler, *objects, *link, "-o", library])
        install(library, target)
    version = run([*compiler, "--version"]).splitlines()[0]
    return {"torch": torch.version, "compiler": version, "sources": digest("cpu")}


def visible_architectures() -> str:
    """The GPUs of this machine as a list for `gencode`; "" where there are none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        told = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], timeout=60)
    except BuildError:
        # The program is there, a GPU or its driver is not.
        return ""
    found: list[str] = re.findall(r"^\d+\.\d$", told, re.MULTILINE)
    found = sorted(set(found), key=lambda capability: float(capability))
    # PTX of the newest, so that a later GPU can run it.
    return ";".join(found) + "+PTX" if found else ""


def chosen_architectures() -> str:
    chosen = os.environ.get("VLP_OPS_CUDA_ARCH") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    return chosen or visible_architectures() or ARCHITECTURES


def gencode(architectures: str) -> tuple[list[str], list[str]]:
    """nvcc options and plain names ("sm_80", "compute_120") of a list like "8.0;12.0+PTX"."""
    options, names = [], []
    for item in re.split(r"[;,\s]+", architectures.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if found is None:
            raise BuildError(
                f"VLP_OPS_CUDA_ARCH or TORCH_CUDA_ARCH_LIST: {item!r} is not an architecture; "
                "write for example 8.0;9.0;12.0+PTX"
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
    """Object files of all .cu in `folder`, and one line for each warning and kernel that faults registers."""
    options, _ = gencode(architectures)
    sources = PACKAGE / "csrc"
    include = ["-isystem", torch.root / "include", "-I", toolkit.include]
    # nvcc takes one program as host compiler, not one that starts another.
    program, *flags = compiler[1:] if Path(compiler[0]).name in LAUNCHERS and len(compiler) > 1 else compiler
    host = ["-ccbin", program]
    for flag in (*flags, f"-fmacro-prefix-map={sources}=csrc"):
        host += ["-Xcompiler", flag]

    def compile_one(source: Path) -> tuple[Path, list[str]]:
        made, faults, kernel = folder / f"{source.stem}.cuda.o", [], "?"
        log = run([toolkit.nvcc, *CUDA, *options, *host, *include, "-c", source, "-o", made])
        for line in log.splitlines():
            if re.search(r"\bwarning\b", line):
                faults.append(line.strip())
            named = re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line)
            if named:
                kernel = f"{source.name}: {named.group(1)} for {named.group(2)}"
            spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
            if spilled and spilled.groups() != ("0", "0"):
                faults.append(f"{kernel}: {line.strip()}")
        return made, faults

    results = each(compile_one, sorted((sources / "cuda").glob("*.cu")))
    return [made for made, _ in results], [line for _, faults in results for line in faults]


def cuda_runtime(torch: Torch, toolkit: Toolkit) -> list[str | Path]:
    """Link options for the CUDA runtime: the toolkit's, or the one that came with torch (it has no name for
    the linker)."""
    major = toolkit.version.split(".")[0]
    top = toolkit.include.parent
    folders = [top / "lib64", top / "lib", *sorted((torch.root.parent / "nvidia").glob("*/lib"))]
    for folder in folders:
        if (folder / f"libcudart.so.{major}").exists():
            return ["-L", folder, f"-l:libcudart.so.{major}"]
    raise BuildError(f"libcudart.so.{major} is neither in the CUDA toolkit nor beside torch")


def build_cuda(torch: Torch, compiler: Sequence[str], toolkit: Toolkit, target: Path) -> dict[str, Any]:
    """Compiles the CUDA library into the folder `target`; returns what to record about it."""
    architectures = chosen_architectures()
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
    names = gencode(architectures)[1]
    return {"torch": torch.version, "nvcc": toolkit.version, "arch": names, "sources": digest("cuda")}


def check_cuda(torch: Torch, compiler: Sequence[str], toolkit: Toolkit) -> list[str]:
    """Compiles every .cu for the checked architectures; returns warnings and kernels that spill registers."""
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


def write_record(folder: Path, device: str, what: Mapping[str, Any] | str) -> None:
    """Records how the library of a device was built or, given a text, why there is none."""
    record = read_record(folder)
    record.pop(device, None)
    missing = {name: why for name, why in record.pop("missing", {}).items() if name != device}
    if isinstance(what, str):
        missing[device] = what
    else:
        record[device] = dict(what)
    if missing:
        record["missing"] = missing
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f"._build.json.{os.getpid()}"
        beside.write_text(json.dumps(record, indent=1) + "\n")
        beside.replace(folder / "_build.json")
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error}") from error


def switch(name: str, *aliases: str) -> bool | None:
    """An environment switch: True for 1, False for 0, None when it is not set. BuildError for anything
    else."""
    for key in (name, *aliases):
        value = os.environ.get(key, "")
        if value not in ("", "0", "1"):
            raise BuildError(f"{key} must be 0 or 1, got {value!r}")
        if value:
            return value == "1"
    return None


def build_for_install(target: Path) -> list[str]:
    """What setup.py does: builds what can be built into `target`, records why the rest is missing, and
    returns messages.

    Raises BuildError only for what a switch demands and for switches that cannot be read.
    """
    native, cuda = switch("VLP_OPS_NATIVE"), switch("VLP_OPS_CUDA", "FORCE_CUDA")
    if native is False and cuda:
        raise BuildError("VLP_OPS_NATIVE=0 and VLP_OPS_CUDA=1 contradict each other")
    later = "python -m vlp_ops.build compiles them later"
    if native is False:
        leave_out(target, "cpu", "VLP_OPS_NATIVE=0")
        leave_out(target, "cuda", "VLP_OPS_NATIVE=0")
        return ["vlp-ops: pure Python, because VLP_OPS_NATIVE=0."]
    try:
        torch = find_torch()
        reason = why_no_cuda(torch) if cuda is not False else "VLP_OPS_CUDA=0"
        if cuda and reason:
            raise BuildError(f"VLP_OPS_CUDA=1, but CUDA kernels cannot be built: {reason}")
        compiler = find_compiler()
    except BuildError as error:
        if native or cuda:
            raise
        # Libraries of an earlier build in place stay: an installer that hides torch comes by here each time.
        note_missing(target, "cpu", str(error))
        note_missing(target, "cuda", str(error))
        return [f"vlp-ops: installing without compiled kernels: {error}; {later}."]
    try:
        write_record(target, "cpu", build_cpu(torch, compiler, target))
    except BuildError as error:
        if native or cuda:
            raise
        leave_out(target, "cpu", str(error))
        leave_out(target, "cuda", str(error))
        return [f"vlp-ops: kernels were not compiled: {error}\nvlp-ops works without them; {later}."]
    if reason is not None:
        leave_out(target, "cuda", reason)
        return [f"vlp-ops: building CPU kernels only: {reason}."]
    try:
        toolkit = find_toolkit(torch)
        record = build_cuda(torch, compiler, toolkit, target)
    except BuildError as error:
        if native or cuda:
            raise
        leave_out(target, "cuda", str(error))
        return [f"vlp-ops: only CPU kernels were compiled, CUDA kernels were not: {error}\n{later}."]
    write_record(target, "cuda", record)
    return [cuda_message(toolkit, record)]


def leave_out(target: Path, device: str, reason: str) -> None:
    """Sees to it that there is no library for a device, and records why."""
    (target / f"_C_{device}.so").unlink(missing_ok=True)
    note_missing(target, device, reason)


def note_missing(target: Path, device: str, reason: str) -> None:
    """Records why there is no library for a device, unless there is one."""
    if not (target / f"_C_{device}.so").exists():
        write_record(target, device, reason.splitlines()[0])


def cuda_message(toolkit: Toolkit, record: Mapping[str, Any]) -> str:
    return f"vlp-ops: CUDA kernels built with nvcc {toolkit.version} for {', '.join(record['arch'])}."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vlp_ops.build", description="Compile the kernels of vlp_ops in place."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cpu", action="store_true", help="only the CPU library")
    which.add_argument(
        "--check-cuda",
        action="store_true",
        help="compile the CUDA kernels, fail on spills and warnings, install nothing",
    )
    options = parser.parse_args(arguments)
    try:
        torch = find_torch()
        reason = why_no_cuda(torch) if not options.cpu else None
        compiler = find_compiler()
        if options.check_cuda:
            # Compiling needs no CUDA build of torch, only its headers.
            toolkit = find_toolkit(torch)
            faults = check_cuda(torch, compiler, toolkit)
            print(
                "\n".join(faults)
                or f"vlp-ops: all CUDA kernels compile with nvcc {toolkit.version}, "
                "without spills or warnings."
            )
            return 1 if faults else 0
        write_record(PACKAGE, "cpu", build_cpu(torch, compiler, PACKAGE))
        print(f"vlp-ops: CPU kernels built with {compiler[0]} and torch {torch.version}.")
        if options.cpu:
            return 0
        if reason is not None:
            note_missing(PACKAGE, "cuda", reason)
            print(f"vlp-ops: building CPU kernels only: {reason}.")
            return 0
        toolkit = find_toolkit(torch)
        record = build_cuda(torch, compiler, toolkit, PACKAGE)
        write_record(PACKAGE, "cuda", record)
        print(cuda_message(toolkit, record))
    except BuildError as error:
        print(f"vlp-ops: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
