"""Families that other packages bring: found, made, written, read and started from as our own."""

import ast
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import vlp_core
from vlp_core import models
from vlp_core.models.family import find
from vlp_core.weights import CheckpointError
from vlp_core.weights import load as load_weights

TOY = dedent(
    '''
    """A family of somebody else: images only, in two stages."""

    from torch import nn

    from vlp_core import weights
    from vlp_core.models.family import Family, Official, Stage
    from vlp_core.models import Description


    def create(*, width, classes=0):
        parts = {"body": nn.Linear(4, width)}
        if classes:
            parts["head"] = nn.Linear(width, classes)
        return nn.ModuleDict(parts)


    def derive(pretrained):
        return {"width": pretrained["width"], "classes": 3}


    def start(model, state, *, stage, found, name):
        fresh = () if found.stage == stage else ("head",)
        return weights.load(model, state, allow_missing=fresh, name=name)


    def recognise(state):
        return any(name.startswith("toy.") for name in state)


    def stage_of(state):
        return "classes" if "toy.head.weight" in state else "pretrain"


    def ours(state):
        return {name.removeprefix("toy."): tensor for name, tensor in state.items()}


    def describe(checkpoint, arguments):
        state = checkpoint.state
        found = {"width": len(state["toy.body.weight"])} if arguments is None else dict(arguments)
        if stage_of(state) == "classes" and arguments is None:
            found["classes"] = len(state["toy.head.weight"])
        return Description("toy", stage_of(state), found, {"kind": "squash", "size": 2}, None, {})


    def load(model, state, *, stage, name):
        return weights.load(model, ours(state), name=name)


    def start_official(model, state, *, stage, teacher, queue, name):
        fresh = () if stage_of(state) == stage else ("head",)
        return weights.load(model, ours(state), allow_missing=fresh, name=name)


    def write(path, model, *, teacher=None, queue=None):
        weights.write(path, {f"toy.{name}": tensor for name, tensor in model.state_dict().items()})


    FAMILY = Family(
        name="toy",
        about="a toy",
        layout="toy",
        stages=(
            Stage(name="pretrain", create=create, starts_from=("pretrain",)),
            Stage(
                name="classes",
                create=create,
                starts_from=("pretrain", "classes"),
                abilities=("classification",),
                derive=derive,
            ),
        ),
        start=start,
        official=Official(
            recognise=recognise,
            stage=stage_of,
            describe=describe,
            load=load,
            start=start_official,
            write=write,
        ),
    )
    WRONG = 3
    '''
)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, points: str, package: str = "toy-family") -> None:
    """An installed package: its module and its entry points, as pip leaves them."""
    info = folder / f"{package.replace('-', '_')}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[vlp.models]\n{points}\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_family.py").write_text(TOY)
    install(tmp_path, monkeypatch, "toy = toy_family:FAMILY")
    yield
    sys.modules.pop("toy_family", None)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    state = second.state_dict()
    return all(torch.equal(x, state[key]) for key, x in first.state_dict().items())


@pytest.mark.usefixtures("toy")
def test_a_family_of_another_package_is_used_like_our_own(tmp_path):
    assert list(models.families()) == ["toy", "vicha", "xvlm"]
    pretrained = models.create("toy", "pretrain", width=5)
    folder, file = tmp_path / "export", tmp_path / "toy.safetensors"
    view = {"kind": "squash", "size": 2}
    models.save(folder, pretrained, family="toy", stage="pretrain", arguments={"width": 5}, view=view)
    find("toy").official.write(file, pretrained)
    for path in (folder, file):
        found = models.describe(path)
        assert found == ("toy", "pretrain", {"width": 5}, view, None, {})
        assert same(pretrained, models.load(path).model)
        with pytest.raises(CheckpointError, match=r"never trained; train a classes model .*vlp-train ls toy"):
            models.load(path, ability="classification")
        model = models.create("toy", "classes", **models.derive("toy", "classes", found.arguments))
        report = models.start_from(model, path, family="toy", stage="classes")
        assert set(report.missing) == {"head.weight", "head.bias"}
        assert torch.equal(model["body"].weight, pretrained["body"].weight)
    trained = tmp_path / "trained"
    models.save(trained, model, family="toy", stage="classes", arguments={"width": 5, "classes": 3})
    assert same(model, models.load(trained, ability="classification").model)


@pytest.mark.usefixtures("toy")
def test_a_family_starts_from_its_own_layout_only(tmp_path):
    pretrained = models.create("toy", "pretrain", width=5)
    models.save(tmp_path / "a", pretrained, family="toy", stage="pretrain", arguments={"width": 5})
    message = r"checkpoint of toy, whose layout is 'toy'; a model of xvlm starts from .* layout 'fusion'"
    with pytest.raises(CheckpointError, match=message):
        models.start_from(pretrained, tmp_path / "a", family="xvlm", stage="vqa")
    models.save(tmp_path / "b", pretrained, family="toy", stage="classes", arguments={"width": 5})
    with pytest.raises(CheckpointError, match="a pretrain model starts from pretrain"):
        models.start_from(pretrained, tmp_path / "b", family="toy", stage="pretrain")


def test_an_export_of_a_family_that_is_not_installed_names_the_installed_ones(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "toy_family.py").write_text(TOY)
    with monkeypatch.context() as installed:
        install(tmp_path / "site", installed, "toy = toy_family:FAMILY")
        model = models.create("toy", "pretrain", width=5)
        models.save(tmp_path / "a", model, family="toy", stage="pretrain", arguments={"width": 5})
    sys.modules.pop("toy_family")
    with pytest.raises(ValueError, match="family 'toy' is not known; choose among vicha, xvlm"):
        models.load(tmp_path / "a")


def test_entry_points_that_name_no_family_are_refused(tmp_path, monkeypatch):
    (tmp_path / "toy_family.py").write_text(TOY)
    points = "other = toy_family:FAMILY\nwrong = toy_family:WRONG"
    install(tmp_path, monkeypatch, points)
    with pytest.raises(
        ValueError, match=r"other = toy_family:FAMILY must name its Family, not the family 'toy'"
    ):
        find("other")
    with pytest.raises(ValueError, match=r"wrong = toy_family:WRONG must name its Family, not a int"):
        find("wrong")
    sys.modules.pop("toy_family")


def test_two_packages_with_one_name_are_refused(tmp_path, monkeypatch):
    for number in (1, 2):
        install(tmp_path / str(number), monkeypatch, f"toy = toy{number}:FAMILY", f"toy{number}")
    with pytest.raises(ValueError, match=r"family 'toy' is brought by toy2:FAMILY and by toy1:FAMILY"):
        models.create("toy", "pretrain")


def test_rows_are_loaded_when_asked_for():
    code = (
        "import sys, vlp_core.models as models; models.families();"
        "print(*[name for name in sys.modules if name.startswith('vlp_core.models.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {name.split(".")[2] for name in done.stdout.split()}
    assert names == {"companions", "export", "family"}


def test_a_model_starts_from_another_family_of_its_layout(tmp_path):
    """X-VLM's answers from a pre-training of ViCHA without concepts: heads of that are left behind."""
    vision = {"kind": "vit", "image_size": 32, "patch": 16, "width": 8, "depth": 3, "heads": 2}
    text = {"vocabulary": 9, "width": 8, "layers": 4, "heads": 2, "hidden": 8, "positions": 9}
    pretrained = {
        "vision": {**vision, "local_depth": 0},
        "text": {**text, "fusion_layer": 2},
        "embed_width": 6,
        "levels": 2,
        "masked_image": {"width": 16, "depth": 1, "heads": 2},
    }
    model = models.create("vicha", "pretrain", **pretrained)
    models.save(tmp_path, model, family="vicha", stage="pretrain", arguments=pretrained)
    arguments = models.derive("xvlm", "vqa", pretrained)
    mine = models.create("xvlm", "vqa", **arguments)
    report = models.start_from(mine, tmp_path, family="xvlm", stage="vqa")
    assert report.missing == ()
    assert {name.split(".")[0] for name in report.unexpected} >= {
        "masked_image",
        "vision_proj_hidden",
        "itm_head",
    }
    load_weights(mine.vision, model.vision.state_dict())
    assert torch.equal(mine.text.layers[3].expand.weight, model.text.layers[3].expand.weight)


def imported(file: Path) -> set[str]:
    """Modules that a file names in its import statements."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_a_family_stands_in_its_folder_alone():
    """Neither shared code nor another family imports from it."""
    package = Path(vlp_core.__file__).parent
    folders = [row.parent for row in package.glob("models/*/family.py")]
    assert {folder.name for folder in folders} == set(models.families())
    for folder in folders:
        inside = f"vlp_core.models.{folder.name}"
        strangers = [
            file
            for file in package.rglob("*.py")
            if folder not in file.parents and any(name.startswith(inside) for name in imported(file))
        ]
        assert strangers == []


def test_every_family_says_what_it_is():
    for name in models.families():
        row = find(name)
        assert len(row.about) > 10
        stages = [stage.name for stage in row.stages]
        assert len(set(stages)) == len(stages)
        for stage in row.stages:
            assert stage.name in stage.starts_from
            with pytest.raises(TypeError):
                stage.create(unheard_of=1)
