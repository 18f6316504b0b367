"""A tiny X-VLM on a tiny shapes world."""

import json
from pathlib import Path

import pytest
from vlp_data import shapes

MODEL = (
    "model.vision={kind: swin, image_size: 64, window: 2, width: 8, depths: [1, 1, 1, 1], heads: [1, 1, 2, 2], drop_path: 0.1}",
    "model.text={width: 32, layers: 2, fusion_layer: 1, heads: 2, hidden: 32, positions: 64, dropout: 0.1}",
    "data.view.size=64",
)
RUN = ("save.every=100", "report.every=1", "workers=0")
PRETRAIN = (
    *MODEL,
    *RUN,
    "model.embed_width=16",
    "data.images.batch=8",
    "data.regions.texts=8",
    "data.regions.pictures=4",
    "retrieval.rerank=3",
    "retrieval.figures=1",
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes; the folder holds every layout."""
    return shapes.ensure(
        tmp_path_factory.mktemp("worlds") / "shapes", images=40, seed=3, size=64, val=4, test=6
    )


def _place(world: Path) -> tuple[str, str]:
    return (
        f"data.root={world}",
        "data.world={images: 40, seed: 3, size: 64, val: 4, test: 6, difficulty: full}",
    )


@pytest.fixture
def tiny(world: Path) -> tuple[str, ...]:
    """`xvlm/shapes`, small enough for a second a step."""
    return "xvlm/shapes", *PRETRAIN, *_place(world)


@pytest.fixture(scope="session")
def pretrained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export folder of a run of `tiny`."""
    from vlp_methods.cli import main

    run = tmp_path_factory.mktemp("pretrained") / "run"
    assert (
        main(["xvlm/shapes", *PRETRAIN, *_place(world), "data.test=null", "steps=1", "--run", str(run)]) == 0
    )
    return run / "export"


@pytest.fixture
def task(world: Path, pretrained: Path):
    """`task(recipe)`: the words of a fine-tuning recipe made as small as `tiny`, starting from `pretrained`."""

    def words(recipe: str, *more: str, start: Path = pretrained) -> tuple[str, ...]:
        return (recipe, *MODEL, *RUN, *_place(world), f"model.weights.model={start}", *more)

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
