"""Every command and every piece of code that the README and the docs show is run here or, where it says so,
by .ci/run.

A block of shell or Python carries, in an HTML comment on the line before it, how it is tested:

    test: quick            run now, those of one section in order, in an empty folder with the files that they
                           take for granted
    test: short            as quick, with `steps=2` added to the command
    test: smoke            run by `nox -s smoke`: trains for minutes, in a fresh clone of the tree
    test: install          run by `nox -s wheels`: installs into a fresh environment, in a fresh clone
    test: ci               each line is a line of .ci/run, which runs it
    test: no, WHY          cannot be run here
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
]
KINDS = ("quick", "short", "smoke", "install", "ci", "no")
FENCE = re.compile(
    r"(?:^<!-- test: (?P<kind>\w+)(?:, (?P<why>[^>]+?))? -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.M | re.S,
)


class Block(NamedTuple):
    page: str
    section: str
    line: int
    language: str
    kind: str | None
    why: str | None
    code: str


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        if "_build" in page.parts or "api" in page.relative_to(ROOT).parts:
            continue
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match["language"] in {"sh", "bash", "console", "shell", "python", "py"}:
                line = text.count("\n", 0, match.start("code"))
                name = str(page.relative_to(ROOT))
                section = re.findall(r"^#+ (.+)$", text[: match.start()], re.M)[-1]
                found.append(
                    Block(name, section, line, match["language"], match["kind"], match["why"], match["code"])
                )
    return found


BLOCKS = blocks()


def of_kind(kind: str):
    chosen = [
        pytest.param(block, id=f"{kind}-{block.page}:{block.line}") for block in BLOCKS if block.kind == kind
    ]
    return pytest.mark.parametrize("block", chosen)


def test_every_block_says_how_it_is_tested():
    bad = [f"{b.page}:{b.line}" for b in BLOCKS if b.kind not in KINDS or (b.kind == "no") != bool(b.why)]
    assert not bad, (
        f"{bad}: put <!-- test: {'|'.join(KINDS[:-1])} --> or <!-- test: no, WHY --> on the line before the "
        "block"
    )
    assert all(block.language in {"sh", "bash", "python"} for block in BLOCKS), "use ```sh and ```python"


def test_first_and_second_command_are_in_the_readme():
    commands = [block.code for block in BLOCKS if block.page == "README.md"]
    assert any("uv run vlp-train xvlm/shapes\n" in code for code in commands)
    assert any("nox -t tests\n" in code for code in commands)


def test_python_example_of_the_readme_is_short():
    (example, *_) = [block for block in BLOCKS if block.page == "README.md" and block.language == "python"]
    lines = [line for line in example.code.splitlines() if line.strip()]
    assert len(lines) < 10


@of_kind("ci")
def test_command_is_run_by_ci(block):
    script = [line.strip().removeprefix("step ") for line in (ROOT / ".ci/run").read_text().splitlines()]
    for line in block.code.splitlines():
        assert line in script, f"{block.page}:{block.line}: .ci/run does not run `{line}`"


def shell() -> dict[str, str]:
    """The environment of a user's shell: without the session of nox, whose environment uv would use."""
    inside = (
        "VIRTUAL_ENV",
        "UV_PROJECT_ENVIRONMENT",
        "UV_PYTHON",
        "PYTHONPATH",
        "PYTEST_ADDOPTS",
        "NOX_CURRENT_SESSION",
    )
    return {name: value for name, value in os.environ.items() if name not in inside}


def run(block: Block, folder: Path, *, path: Path, timeout: int) -> str:
    """Run a block as a user would and return what it printed."""
    environment = shell()
    environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    command = (
        [str(path / "python"), "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    )
    done = subprocess.run(
        [*command, block.code],
        cwd=folder,
        env=environment,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{block.page}:{block.line} ended with {done.returncode}:\n{block.code}"
    return done.stdout


def official_checkpoint(folder: Path) -> None:
    """What the Python example loads: an official X-VLM checkpoint (tiny here), BERT's vocabulary, an
    image."""
    import torch
    from PIL import Image
    from vlp_core import models
    from vlp_core.models.xvlm.checkpoints import xvlm_adapter

    vocabulary = ROOT / "golden" / "xvlm" / "vocab.txt"
    shutil.copy(vocabulary, folder / "vocab.txt")
    vision = {
        "kind": "swin",
        "image_size": 64,
        "window": 2,
        "width": 32,
        "depths": [1, 2, 1],
        "heads": [1, 2, 4],
    }
    words = len(vocabulary.read_text().splitlines())
    text = {
        "vocabulary": words,
        "width": 64,
        "layers": 2,
        "heads": 1,
        "hidden": 128,
        "fusion_layer": 1,
        "positions": 50,
    }
    model = models.create("xvlm", "pretrain", vision=vision, text=text, embed_width=32)
    state = xvlm_adapter(model).to_source(model.state_dict())
    torch.save({"model": state, "config": {"image_res": 64}}, folder / "4m_base_model_state_step_199999.th")
    Image.effect_noise((90, 70), 80).convert("RGB").save(folder / "dog.jpg")


def coco(folder: Path) -> None:
    """COCO as it is published, in little: drawn images under its names."""
    from vlp_data import shapes

    shapes.write(folder / "drawn", images=60, seed=0)
    root = folder / "coco"
    (root / "annotations").mkdir(parents=True)
    shutil.copy(folder / "drawn" / "vocab.txt", root)
    for split in ("train", "val"):
        (root / f"{split}2017").symlink_to(folder / "drawn" / "images")
        for kind in ("captions", "instances"):
            drawn = folder / "drawn" / "coco" / f"{kind}_{split}.json"
            content = json.loads(drawn.read_text())
            for image in content["images"]:
                image["file_name"] = Path(image["file_name"]).name
            (root / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(content))


SECTIONS = {f"{block.page}-{block.section}": [] for block in BLOCKS if block.kind == "quick"}
for _block in BLOCKS:
    if _block.kind == "quick":
        SECTIONS[f"{_block.page}-{_block.section}"].append(_block)


@pytest.mark.parametrize("section", SECTIONS)
def test_quick_blocks_run(section, tmp_path):
    if section == "README.md-Use a model in Python":
        official_checkpoint(tmp_path)
    for block in SECTIONS[section]:
        run(block, tmp_path, path=Path(sys.executable).parent, timeout=280)


@of_kind("short")
def test_training_command_runs_for_two_steps(block, tmp_path):
    coco(tmp_path)
    short = block._replace(code=f"{block.code.rstrip()} steps=2\n")
    run(short, tmp_path, path=Path(sys.executable).parent, timeout=280)
    assert list(tmp_path.glob("runs/*/export/model.safetensors"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files that git tracks or would add, as a user's fresh clone, with the shared data beside it where
    there is some."""
    folder = tmp_path_factory.mktemp("user") / "vlp"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if (ROOT / "dist").is_dir():  # what `nox -s wheels` has just built
        shutil.copytree(ROOT / "dist", folder / "dist")
    if (ROOT.parent / "shared").is_dir():
        (folder.parent / "shared").symlink_to(ROOT.parent / "shared")
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """The scripts folder of an environment that holds Python and pip alone."""
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    venv.create(folder, with_pip=True)
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@of_kind("smoke")
def test_smoke_block_runs(block, clone, fresh):
    run(block, clone, path=fresh, timeout=1400)
    (result,) = clone.glob("runs/xvlm-shapes-*/eval/step-*.json")
    recall = json.loads(result.read_text())
    # Chance is 0.5 % among 200 images.
    assert recall["dual/tr_r1"] >= 5
    assert recall["dual/ir_r1"] >= 5
    assert list(clone.glob("runs/xvlm-shapes-*/eval/*/retrieval.png"))


@pytest.fixture
def nearly_fresh(clone, tmp_path) -> Path:
    """As `fresh`, with everything but the five packages installed: the pins as hard links instead of a second
    3 GB download by pip."""
    folder = tmp_path / "environment"
    packages = sorted(
        f"./{path.parent.relative_to(clone)}" for path in clone.glob("packages/*/pyproject.toml")
    )
    environment = {**shell(), "VIRTUAL_ENV": str(folder)}
    for command in (
        ["venv", "--quiet", "--seed", "--python", sys.executable, str(folder)],
        ["pip", "install", "--quiet", "-c", "constraints.txt", *packages],
        ["pip", "uninstall", "--quiet", *(Path(package).name for package in packages)],
    ):
        subprocess.run(["uv", *command], cwd=clone, env=environment, check=True)
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@of_kind("install")
def test_install_block_runs(block, clone, nearly_fresh):
    run(block, clone, path=nearly_fresh, timeout=1400)
