"""A toy method, installed for the tests the way any plug-in is: a folder on the path with an entry point."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).parent / "toy"


class Toy:
    """`vlp-train` on the toy method, in this process or in one of its own."""

    def __init__(self, path: list[str]) -> None:
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "vlp_methods.cli", *map(str, arguments)]

    def train(self, *arguments: str | Path) -> int:
        """In this process; returns the exit code."""
        from vlp_methods.cli import main

        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as exit:
            return int(exit.code or 0)

    def call(self, *arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """In a process of its own."""
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """In a process of its own that the test ends."""
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @staticmethod
    def reports(run: Path) -> list[dict]:
        """Complete lines of metrics.jsonl."""
        file = run / "metrics.jsonl"
        text = file.read_text() if file.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @classmethod
    def losses(cls, run: Path) -> list[tuple]:
        """Everything a run reported that must be repeatable: step, and all numbers to the last bit."""
        return [
            (
                line["step"],
                sorted(
                    (name, float(value).hex())
                    for name, value in line.get("losses", line.get("evaluation")).items()
                ),
                line.get("lr"),
                line.get("samples"),
            )
            for line in cls.reports(run)
        ]


@pytest.fixture(scope="session")
def _plugin(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    installed = tmp_path_factory.mktemp("plugin")
    info = installed / "toy_method-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-method\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[vlp.methods]\ntoy = toy_method\n")
    return [str(TOY), str(installed)]


@pytest.fixture
def toy(_plugin: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Toy:
    """The toy method; the working folder is the test's own."""
    for folder in _plugin:
        monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return Toy(_plugin)
