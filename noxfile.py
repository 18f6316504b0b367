#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2025.5"]
# ///
"""Every check of the workspace: `nox -l` lists the sessions, `nox -t tests` passes the tests of all packages.

Each `tests-*` session installs one package with its declared dependencies and nothing else, so an undeclared
import fails there. Works with `pip install "nox[uv]"` and, with uv alone, as `uv run noxfile.py -s lint`.
"""

import os
import re
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
# Package -> sibling packages it needs, in the order of the layers (the lint session checks it against the
# pyproject files).
PACKAGES = {
    "vlp-ops": (),
    "vlp-core": ("vlp-ops",),
    "vlp-data": (),
    "vlp-eval": ("vlp-ops", "vlp-core", "vlp-data"),
    "vlp-methods": ("vlp-ops", "vlp-core", "vlp-data", "vlp-eval"),
}
# Their tests start many processes and wait for them; for the others a second worker costs more (it imports
# torch again) than it brings.
TWO_WORKERS = ("vlp-core", "vlp-methods")

# Its tests make environments and install into them, which the `install` session runs.
INSTALLS = "packages/vlp-ops/tests/test_install.py"

nox.needs_version = ">=2025.5"
# Not "uv|virtualenv": falling back to virtualenv would silently make one 6 GB environment per session.
nox.options.default_venv_backend = "uv"
nox.options.tags = ["tests", "lint"]


def use_cache_on_the_same_disk() -> None:
    """Keep uv's download cache on the disk of this checkout, where an environment is hard links (16 MB) and
    not copies (6 GB)."""
    if "UV_CACHE_DIR" in os.environ:
        return
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    while not default.exists():
        default = default.parent
    if default.stat().st_dev != ROOT.stat().st_dev:
        os.environ["UV_CACHE_DIR"] = str(ROOT / ".uv-cache")


use_cache_on_the_same_disk()


def clean(session: nox.Session) -> None:
    """Take out settings of the caller's shell that would slow the session down or reach into it."""
    # Set in many containers; without bytecode each start of Python compiles torch again (4.8 s instead of 2.1
    # s).
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    session.env["PYTHONPATH"] = ""


def install(session: nox.Session, *packages: str, groups: tuple[str, ...] = ()) -> None:
    """Install packages of this checkout (editable, siblings named) and dependency groups, all held to
    constraints.txt."""
    clean(session)
    needed = [
        name for name in PACKAGES if name in packages or any(name in PACKAGES[chosen] for chosen in packages)
    ]
    editable = [part for name in needed for part in ("-e", f"./packages/{name}")]
    wanted = [part for group in groups for part in ("--group", group)]
    session.install("-c", str(CONSTRAINTS), *editable, *wanted)
    refuse_unpinned(session)


def refuse_unpinned(session: nox.Session) -> None:
    """Stop when something was installed that constraints.txt does not hold to one version."""
    pinned = {normal(line.partition("==")[0]) for line in CONSTRAINTS.read_text().splitlines()}
    frozen = session.run("uv", "pip", "freeze", "--exclude-editable", silent=True, external=True) or ""
    names = [line.partition("==")[0] for line in frozen.splitlines() if "==" in line]
    missing = sorted(name for name in names if normal(name) not in pinned and name not in PACKAGES)
    if missing:
        session.error(f"not pinned in constraints.txt: {', '.join(missing)}; `nox -s pins` writes them")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_session(package: str):
    short = package.removeprefix("vlp-")

    @nox.session(name=f"tests-{short}", tags=["tests"])
    def tests(session: nox.Session) -> None:
        install(session, package, groups=(f"packages/{package}/pyproject.toml:test",))
        workers = ("-n", "2", "--dist", "loadfile") if package in TWO_WORKERS else ()
        session.run("pytest", *workers, f"packages/{package}", *session.posargs)

    tests.__doc__ = f"Tests of {package}, alone with its declared dependencies."
    return tests


for _package in PACKAGES:
    globals()[f"tests_{_package.removeprefix('vlp-')}"] = test_session(_package)


@nox.session(name="tests-readme", tags=["tests"])
def tests_readme(session: nox.Session) -> None:
    """The commands and code of the README and the docs that take seconds; the long ones run in `smoke` and
    `wheels`."""
    install(session, *PACKAGES, groups=("test",))
    session.run("pytest", "tests/test_commands.py", *session.posargs)


@nox.session(tags=["lint"])
def lint(session: nox.Session) -> None:
    """ruff, import directions, spelling, and the rules of the project in tests/test_rules.py."""
    clean(session)
    session.install("-c", str(CONSTRAINTS), "--group", "lint")
    refuse_unpinned(session)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run(
        "lint-imports", env={"PYTHONPATH": os.pathsep.join(f"packages/{name}/src" for name in PACKAGES)}
    )
    session.run("codespell")
    session.run("pytest", "-q", "tests/test_rules.py", "tests/test_house.py", *session.posargs)


@nox.session(tags=["lint"])
def types(session: nox.Session) -> None:
    """pyrefly on the sources of all packages."""
    install(session, *PACKAGES, groups=("types",))
    session.run("pyrefly", "check", *session.posargs)


@nox.session
def parity(session: nox.Session) -> None:
    """Equality with the reference implementations: `nox -s parity -- --golden DIR -k xvlm`."""
    groups = [f"packages/{name}/pyproject.toml:test" for name in ("vlp-core", "vlp-data")]
    install(session, *PACKAGES, groups=("test", *groups))
    session.run("pytest", "-m", "parity", "packages", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests of the packages that take minutes: kernels compiled and put into wheels, jobs on Ray."""
    groups = ["test", *(f"packages/{name}/pyproject.toml:test" for name in PACKAGES)]
    install(session, *PACKAGES, groups=(*groups, "packages/vlp-data/pyproject.toml:slow"))
    session.run("pytest", "-m", "slow", "packages", f"--ignore={INSTALLS}", *session.posargs)


@nox.session(name="install")
def install_vlp_ops(session: nox.Session) -> None:
    """vlp-ops installed into clean environments: every branch of its build, and one wheel on the oldest, a
    CPU-only and the newest torch."""
    install(session, "vlp-ops", groups=("test", "packages/vlp-ops/pyproject.toml:test"))
    # On the disk of the checkout: environments with torch are hard links there.
    folder = Path(session.create_tmp()) / "environments"
    session.run("pytest", "-m", "slow", INSTALLS, f"--basetemp={folder}", *session.posargs)


@nox.session
def smoke(session: nox.Session) -> None:
    """The README's first command as a new user types it, then every task of X-VLM and ViCHA and every variant
    of ViCHA for a few steps (minutes)."""
    install(session, *PACKAGES, groups=("test",))
    session.run("pytest", "-m", "slow", "tests/test_commands.py", "-k", "smoke", "-s", *session.posargs)
    for name, script, *options in (
        ("chain-xvlm", "chain", "--method", "xvlm"),
        ("chain-vicha", "chain", "--method", "vicha"),
        ("ablation", "ablation"),
    ):
        runs = Path(session.create_tmp()) / name
        shutil.rmtree(runs, ignore_errors=True)
        session.run("python", f"benchmarks/{script}.py", *options, "--short", "--runs", str(runs))


@nox.session
def chain(session: nox.Session) -> None:
    """Every task of X-VLM, or of ViCHA (`--method vicha`), on drawn images at full length: `nox -s chain --
    --runs DIR` (under an hour).

    Prints the tables of docs/xvlm-shapes.md and docs/vicha-shapes.md.
    """
    install(session, *PACKAGES)
    session.run("python", "benchmarks/chain.py", *session.posargs)


@nox.session
def ablation(session: nox.Session) -> None:
    """Small ViCHA on drawn images, full and without each of its additions, with the table of
    docs/vicha-shapes.md: `nox -s ablation -- --runs DIR`."""
    install(session, *PACKAGES)
    session.run("python", "benchmarks/ablation.py", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build all wheels into dist/, install them into an empty environment, import and use what they hold."""
    clean(session)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("uv", "build", "--all-packages", "--wheel", "--out-dir", "dist", external=True)
    built = sorted(path.name for path in (ROOT / "dist").glob("*.whl"))
    if len(built) != len(PACKAGES):
        session.error(f"{len(PACKAGES)} packages, but dist/ holds {built}")
    session.install("-c", str(CONSTRAINTS), "--group", "test", *(f"dist/{wheel}" for wheel in built))
    # Away from the checkout, so that nothing but the wheels can be imported.
    with session.chdir(session.create_tmp()):
        session.run("python", "-I", str(ROOT / "tests" / "check_wheels.py"), str(ROOT))
    session.run("pytest", "-m", "slow", "tests/test_commands.py", "-k", "install", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, warnings as errors, into docs/_build/html."""
    install(session, *PACKAGES, groups=("docs",))
    session.run(
        "sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html", *session.posargs
    )


@nox.session
def bench(session: nox.Session) -> None:
    """Speed as ratios within one run: pre-training steps and re-ranking against plain formulations, our image
    encoders against timm's, the loader, the choice of concepts, start-up times.

    `nox -s bench -- ops` is the benchmark of vlp-ops on the CPU, with its floors; options after it are its
    own.
    """
    groups = ("test", "packages/vlp-core/pyproject.toml:test", "packages/vlp-ops/pyproject.toml:bench")
    install(session, *PACKAGES, groups=groups)
    compile_kernels(session, "cpu")
    if session.posargs[:1] == ["ops"]:
        session.run("python", "-m", "vlp_ops.bench", "--device", "cpu", *session.posargs[1:])
        return
    for script in session.posargs or (
        "pretrain_step",
        "vicha_step",
        "accumulation",
        "rerank",
        "backbones",
        "loader",
        "concepts",
        "startup",
    ):
        session.run("python", f"benchmarks/{script}.py")


@nox.session
def compare(session: nox.Session) -> None:
    """Training steps of this checkout against those of another commit, in one run: `nox -s compare --
    COMMIT`."""
    if len(session.posargs) != 1:
        session.error("give one commit: nox -s compare -- COMMIT")
    folder = Path(session.create_tmp()).resolve()
    tree, environment = folder / "tree", folder / "environment"
    session.run("git", "worktree", "prune", external=True)
    if tree.is_dir():
        session.run("git", "worktree", "remove", "--force", str(tree), external=True)
    session.run("git", "worktree", "add", "--detach", str(tree), *session.posargs, external=True)
    install(session, *PACKAGES)
    session.run("uv", "venv", "--clear", str(environment), external=True)
    packages = [part for name in PACKAGES for part in ("-e", str(tree / "packages" / name))]
    pins = ("-c", str(tree / "constraints.txt"))
    session.run(
        "uv",
        "pip",
        "install",
        *pins,
        *packages,
        external=True,
        env={"VIRTUAL_ENV": str(environment)},
    )
    session.run("python", "benchmarks/commits.py", str(environment / "bin" / "python"))


@nox.session
def gpu(session: nox.Session) -> None:
    """On a CUDA device: tests marked `gpu`, the kernels under compute-sanitizer, then the benchmark of
    vlp-ops; skipped where there is none."""
    groups = [
        f"packages/{name}/pyproject.toml:{group}"
        for name, group in (("vlp-core", "test"), ("vlp-ops", "bench"))
    ]
    install(session, *PACKAGES, groups=("test", *groups))
    probe = "import torch; print(torch.cuda.is_available())"
    if str(session.run("python", "-c", probe, silent=True)).strip() != "True":
        session.skip("torch finds no CUDA device on this machine")
    compile_kernels(session, "cuda")
    session.run("pytest", "-m", "gpu", "packages")
    sanitize(session)
    session.run("python", "-m", "vlp_ops.bench", *session.posargs)


def compile_kernels(session: nox.Session, device: str) -> None:
    """Compile the kernels of vlp-ops in place: uv builds it where no torch is in sight, and so without
    them."""
    session.run("python", "-m", "vlp_ops.build", *(["--cpu"] if device == "cpu" else []))
    native = f"import vlp_ops; print(vlp_ops.backend_info()['{device}'])"
    if "'native': True" not in str(session.run("python", "-c", native, silent=True)):
        session.error(
            f"the {device} kernels were not built or do not load: python -m vlp_ops.build says why; "
            "without them PyTorch would be measured"
        )


def sanitize(session: nox.Session) -> None:
    """The small cases of the kernels with every memory access and shared-memory hazard watched."""
    if shutil.which("compute-sanitizer") is None:
        session.warn("compute-sanitizer (a part of the CUDA toolkit) is not on the path: it was not run")
        return
    folder = "packages/vlp-ops/tests"
    for tool, tests in (
        (
            "memcheck",
            (f"{folder}/test_kernels.py", f"{folder}/test_deformable.py", f"{folder}/test_memory.py"),
        ),
        ("racecheck", (f"{folder}/test_kernels.py",)),
    ):
        session.run(
            "compute-sanitizer",
            f"--tool={tool}",
            "--error-exitcode=1",
            *(
                "python",
                "-m",
                "pytest",
                "-m",
                "gpu",
                "-k",
                "not compile and not gradcheck and not runs",
                *tests,
            ),
            # Otherwise torch's allocator hides accesses past the end of a tensor.
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            external=True,
        )


@nox.session
def pins(session: nox.Session) -> None:
    """Write constraints.txt and its copy in pyproject.toml: adds what is missing; `nox -s pins -- --upgrade`
    renews all."""
    clean(session)
    project = ROOT / "pyproject.toml"
    before, old = project.read_text(), CONSTRAINTS.read_text()
    try:
        if "--upgrade" in session.posargs:
            CONSTRAINTS.write_text("")
            project.write_text(with_pins(before, []))
        projects = [f"packages/{name}/pyproject.toml" for name in PACKAGES]
        groups = ["test", "lint", "types", "docs", *(f"{project}:test" for project in projects)]
        groups += ["packages/vlp-ops/pyproject.toml:bench", "packages/vlp-data/pyproject.toml:slow"]
        compile_pins = [
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-header",
            "--no-annotate",
            "--all-extras",
            "--python-version",
            "3.11",
        ]
        wanted = [part for group in groups for part in ("--group", group)]
        text = session.run(
            *compile_pins, "-c", str(CONSTRAINTS), *projects, *wanted, silent=True, external=True
        )
        pinned = sorted(line for line in str(text).splitlines() if re.fullmatch(r"[\w.-]+==[\w.+!-]+", line))
        CONSTRAINTS.write_text("".join(f"{line}\n" for line in pinned))
        project.write_text(with_pins(before, pinned))
    except BaseException:
        CONSTRAINTS.write_text(old)
        project.write_text(before)
        raise


def with_pins(project: str, pinned: list[str]) -> str:
    """The text of pyproject.toml with `constraint-dependencies` replaced."""
    head, found, rest = project.partition("constraint-dependencies = [\n")
    _, closed, tail = rest.partition("]\n")
    if not (found and closed):
        raise ValueError("pyproject.toml has no `constraint-dependencies = [` list, one entry a line")
    return head + found + "".join(f'    "{line}",\n' for line in pinned) + closed + tail


if __name__ == "__main__":
    nox.main()
