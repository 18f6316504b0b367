"""A toy method, installed for the tests the way any plug-in is: a folder on the path with an entry point; and
a tiny shapes world for real ones."""

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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes; the folder holds every layout."""
    from vlp_data import shapes

    return shapes.ensure(
        tmp_path_factory.mktemp("worlds") / "shapes", images=40, seed=3, size=64, val=4, test=6
    )


@pytest.fixture(scope="session")
def place(world: Path) -> tuple[str, ...]:
    """Words that make a recipe read `world`."""
    return (
        f"data.root={world}",
        "data.world={images: 40, seed: 3, size: 64, val: 4, test: 6, difficulty: full}",
    )


RUN = ("save.every=100", "report.every=1", "workers=0")
MODEL = {
    "xvlm": (
        (
            "model.vision={kind: swin, image_size: 64, window: 2, width: 8, depths: [1, 1, 1, 1], "
            "heads: [1, 1, 2, 2], drop_path: 0.1}"
        ),
        (
            "model.text={width: 32, layers: 2, fusion_layer: 1, heads: 2, hidden: 32, positions: 64, "
            "dropout: 0.1}"
        ),
        "data.view.size=64",
    ),
    "vicha": (
        "model.vision={kind: vit, image_size: 64, patch: 32, width: 16, depth: 3, heads: 2, local_depth: 0}",
        (
            "model.text={width: 16, layers: 4, fusion_layer: 2, heads: 2, hidden: 32, positions: 64, "
            "dropout: 0.1}"
        ),
        "data.view.size=64",
    ),
}
PRETRAIN = {
    "xvlm": (
        "model.embed_width=16",
        "data.images.batch=8",
        "data.regions.texts=8",
        "data.regions.images=4",
        "retrieval.rerank=3",
        "retrieval.figures=1",
    ),
    "vicha": (
        "model.embed_width=16",
        "model.masked_image={ratio: 0.5, width: 16, depth: 1, heads: 2}",
        "data.train.batch=8",
        "teacher.queue=32",
        "retrieval.rerank=3",
        "retrieval.figures=1",
    ),
}


@pytest.fixture
def tiny_of(place: tuple[str, ...]):
    """`tiny_of(method)`: the words of `METHOD/shapes`, small enough for a second a step."""
    return lambda method: (f"{method}/shapes", *MODEL[method], *RUN, *PRETRAIN[method], *place)


@pytest.fixture(scope="session")
def pretrained_of(place: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory):
    """`pretrained_of(method)`: export folder of a step of `tiny_of(method)`."""
    from vlp_methods.cli import main

    folders: dict[str, Path] = {}

    def export(method: str) -> Path:
        if method not in folders:
            run = tmp_path_factory.mktemp(f"pretrained-{method}") / "run"
            words = (f"{method}/shapes", *MODEL[method], *RUN, *PRETRAIN[method], *place)
            assert main([*words, "data.test=null", "steps=1", "--run", str(run)]) == 0
            folders[method] = run / "export"
        return folders[method]

    return export


@pytest.fixture
def task(place: tuple[str, ...], pretrained_of):
    """`task(recipe)`: the words of a fine-tuning recipe made as small as `tiny_of(method)`, starting from
    `pretrained_of(method)`."""

    def words(recipe: str, *more: str, start: Path | None = None) -> tuple[str, ...]:
        method = recipe.partition("/")[0]
        weights = f"model.weights.model={start or pretrained_of(method)}"
        return (recipe, *MODEL[method], *RUN, *place, weights, *more)

    return words


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`vlp-train` in this process, in a folder of the test's own; returns the exit code."""
    from vlp_methods.cli import main

    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> int:
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as exit:
            return int(exit.code or 0)

    return run


@pytest.fixture
def losses():
    """Everything a run reported, to the last bit."""

    def read(run: Path) -> list[tuple]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [
            (line["step"], sorted((name, float(value).hex()) for name, value in line["losses"].items()))
            for line in lines
            if "losses" in line
        ]

    return read


# ------------------------------------------------------------------------------------------- golden cases


@pytest.fixture
def vocabulary(tmp_path: Path):
    """`vocabulary(kind, size)`: files of a tokenizer with so many entries, for recipes whose model has so
    many; ids of special tokens are BERT's or RoBERTa's order."""

    def write(kind: str, size: int) -> list[str]:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        if kind == "roberta":
            special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokens = special + [f"word{number}" for number in range(size - len(special))]
        if kind != "roberta":
            (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
            return [str(tmp_path / "vocab.txt")]
        (tmp_path / "vocab.json").write_text(
            json.dumps({token: number for number, token in enumerate(tokens)})
        )
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        return [str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")]

    return write


@pytest.fixture
def build():
    """`build(recipe, *overrides)`: what `vlp-train` would train, in evaluation mode as the references ran."""
    import torch
    from vlp_methods.engine import entry

    def make(name: str, *overrides: str):
        recipe = entry.load(name, overrides)
        torch.manual_seed(recipe.settings.seed)
        job = entry.attribute(recipe.entry.build)(recipe.settings)
        job.task.eval()
        return job

    return make


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch):
    """`draws(multinomial=[...], rand=[...])`: the next random draws of torch are these, in order."""
    import torch

    def feed(**given: list) -> None:
        for name, values in given.items():
            waiting = iter(values)

            def draw(*_, _waiting=waiting, **__):
                return next(_waiting)

            monkeypatch.setattr(torch, name, draw)

    return feed


@pytest.fixture
def assert_equal():
    """Named tensors against expected ones of the same names, with the tolerance of losses."""
    import torch

    def check(found: dict, expected: dict) -> None:
        for key, value in found.items():
            torch.testing.assert_close(
                value.detach(), expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )

    return check


@pytest.fixture
def assert_gradients():
    """Norm of every gradient under the reference's name. null means none; a part that must have one for
    several ranks, and that the optimizer passes over, has one of zero."""

    def check(model, adapter, expected: dict[str, float | None], *, seconds: tuple[str, ...] = ()) -> None:
        ours = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found = {key: x.norm().item() for key, x in adapter.to_source(ours, gradients=True).items()}
        reference = {key: norm for key, norm in expected.items() if norm is not None and key not in seconds}
        assert all(norm == 0 for key, norm in found.items() if key not in reference)
        assert {key: found[key] for key in reference if key in found} == pytest.approx(
            reference, rel=1e-3, abs=1e-6
        )

    return check
