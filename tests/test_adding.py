"""docs/adding.md is true: the package that it shows is written, installed outside the checkout, trained and
evaluated."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
FILE = re.compile(r"^<!-- file: (\S+) -->\n(?:<!-- test: .*? -->\n)?```\w+\n(.*?)^```$", re.M | re.S)
COLOURS = {"red": (220, 20, 30), "green": (20, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 20)}


def status() -> str:
    """What of the checkout's own files has changed."""
    return subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed in `site`, and data."""
    folder = tmp_path_factory.mktemp("duet")
    for name, content in FILE.findall((ROOT / "docs/adding.md").read_text()):
        file = folder / "package" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder / "site",
            folder / "package",
        ],
        check=True,
        timeout=120,
    )
    rng = random.Random(0)
    data = folder / "data"
    data.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "square", *COLOURS]
    (data / "vocab.txt").write_text("\n".join(words) + "\n")
    for split, count in (("train", 48), ("test", 16)):
        with (data / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "caption"])
            for number in range(count):
                colour = list(COLOURS)[number % len(COLOURS)]
                shade = tuple(min(255, value + rng.randrange(20)) for value in COLOURS[colour])
                Image.new("RGB", (20, 24), shade).save(data / f"{split}{number}.png")
                table.writerow([f"{split}{number}.png", f"A {colour} square."])
    return folder


def call(place: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(place / "site"), "OMP_NUM_THREADS": "1"}
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run(
        [program, *command[1:]], cwd=place, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_sixth_method_lives_in_a_package_of_its_own(place):
    before = status()
    commands = re.findall(r"^vlp-\w+ .*$", (ROOT / "docs/adding.md").read_text(), re.M)
    listing, training, own, shared = (command.split() for command in commands)
    assert "duet/tiny" in call(place, *listing)

    said = call(place, *training)
    assert "next_caption: 16 images" in said
    config = json.loads((place / "run/export/config.json").read_text())
    assert (config["family"], config["stage"]) == ("duet", "pretrain")

    assert "next_caption" in call(place, "vlp-eval", "ls")
    call(place, *own, "out=own")
    report = json.loads((place / "own/next_caption.json").read_text())
    assert report["results"]["compared"]["accuracy"] == 100, "four colours are learned in seconds"
    last = json.loads(max(place.glob("run/eval/step-*/next_caption.json")).read_text())
    assert report["results"] == last["results"], "training and vlp-eval take one benchmark"

    call(place, *shared, "out=shared")
    numbers = json.loads((place / "shared/retrieval.json").read_text())["results"]["dual"]
    assert numbers["tr_r5"] > 90

    call(place, "vlp-train", "xvlm/shapes", "--dry-run", "steps=1", "data.world=null", "data.root=data",
         "data.tokenizer.files=[vocab.txt]", "data.regions=null", "data.test=null",
         "data.images.source={format: caption_table, file: train.csv}", "data.images.batch=8")  # fmt: skip
    assert status() == before, "no file of vlp was touched"


def test_a_started_run_goes_on_from_an_export(place):
    export = place / "run/export"
    if not export.is_dir():
        pytest.skip("the run of the test before is not there")
    call(
        place,
        "vlp-train",
        "duet/tiny",
        "data.root=data",
        "--run",
        "second",
        "steps=1",
        f"model.weights.model={export}",
    )
    assert (place / "second/export/model.safetensors").is_file()
