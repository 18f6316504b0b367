"""Golden cases: numbers of the reference implementations, found by what a folder holds, never by its name.

    pytest -m parity --golden DIR -k xvlm packages

A parity test is written once and runs on every case of its kind:

    @pytest.mark.golden("xvlm", lambda case: case.config.get("model") == "model_retrieval.XVLM" and ...)
    def test_retrieval_loss(case): ...

`case` is a `GoldenCase`. The test id holds the system and the case (`xvlm-retrieval_loss`). A folder that has
no case of the kind gives one visible skip.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

# One thread per test process: tiny tensors lose time to thread hand-over, and xdist brings its own processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    import hypothesis
except ImportError:  # declared by the packages whose tests use it
    pass
else:
    # The same examples in every run, and no limit on wall time: machines that run tests are shared.
    hypothesis.settings.register_profile("vlp", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("vlp")

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class GoldenCase:
    """One case: a folder (or a single JSON file) of `--golden DIR/<system>`."""

    system: str
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem if self.path.is_file() else self.path.name

    @property
    def id(self) -> str:
        return f"{self.system}-{self.name}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` of the case; empty when there is none."""
        return self.json("config") if self.has("config.json") else {}

    def has(self, *files: str) -> bool:
        return all((self.path / file).is_file() for file in files)

    def json(self, stem: str) -> Any:
        return json.loads((self.path / f"{stem}.json").read_text())

    def tensors(self, stem: str) -> "dict[str, Any]":
        """All tensors of `<stem>.safetensors`."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{stem}.safetensors")

    def tensor_names(self, stem: str) -> set[str]:
        """Names in `<stem>.safetensors`, read from its header alone; empty when the file is missing."""
        file = self.path / f"{stem}.safetensors"
        if not file.is_file():
            return set()
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return set(header) - {"__metadata__"}


def golden_folder(config: pytest.Config) -> Path:
    """`--golden DIR`, else `../shared/golden`, else the small subset of the repository."""
    chosen = config.getoption("--golden")
    if chosen:
        folder = Path(chosen)
        if not folder.is_dir():
            raise pytest.UsageError(f"--golden {chosen}: no such folder")
        return folder
    shared = ROOT.parent / "shared" / "golden"
    return shared if shared.is_dir() else ROOT / "golden"


def golden_cases(config: pytest.Config, system: str) -> list[GoldenCase]:
    folder = golden_folder(config) / system
    if not folder.is_dir():
        return []
    paths = [
        path for path in folder.rglob("*") if (path.is_dir() and any(p.is_file() for p in path.iterdir()))
    ]
    paths += [path for path in folder.glob("*.json") if path.is_file()]
    return [GoldenCase(system, path) for path in sorted(paths)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", metavar="DIR", help="folder of golden cases (default: ../shared/golden, else ./golden)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    system: str = marker.args[0]
    select: Callable[[GoldenCase], bool] = marker.args[1]
    cases = [case for case in golden_cases(metafunc.config, system) if select(case)]
    parameters = [pytest.param(case, id=case.id) for case in cases]
    if not parameters:
        reason = f"{golden_folder(metafunc.config)}/{system} holds no case of this kind"
        parameters = [pytest.param(None, id=f"{system}-none", marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize("case", parameters)


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("golden"):
        item.add_marker(pytest.mark.parity)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The small real data beside the checkout; tests that need it are skipped where it is not there."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data beside this checkout (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def golden(pytestconfig: pytest.Config) -> Path:
    """The folder of golden cases in use."""
    return golden_folder(pytestconfig)
