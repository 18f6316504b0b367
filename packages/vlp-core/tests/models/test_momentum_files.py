"""Teacher and queue in export folders, and tasks of two methods started from them."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vlp_core import models
from vlp_core.models.vicha import checkpoints as vicha
from vlp_core.models.vicha.model import NOT_TAUGHT
from vlp_core.momentum import FeatureQueue, teacher_of
from vlp_core.weights import CheckpointError

PRETRAINED = {
    "vision": {
        "kind": "vit",
        "image_size": 32,
        "patch": 8,
        "width": 64,
        "depth": 3,
        "heads": 1,
        "local_depth": 0,
    },
    "text": {
        "kind": "bert",
        "vocabulary": 20,
        "width": 64,
        "layers": 4,
        "heads": 1,
        "hidden": 16,
        "positions": 12,
        "fusion_layer": 2,
    },
    "concepts": {"layers": 1},
    "embed_width": 6,
    "heads": ["contrast", "match", "masked_language", "hidden"],
    "levels": 2,
    "masked_image": {"width": 32, "depth": 1, "heads": 16},
}
TASKS = ("retrieval", "nlvr", "nlvr_domain", "entailment", "vqa", "captioning")


def make(stage: str = "pretrain", seed: int = 0, **changes):
    """Model, teacher and queue; every tensor has values of its own."""
    torch.manual_seed(seed)
    model = models.create("vicha", stage, **models.derive("vicha", stage, {**PRETRAINED, **changes}))
    teacher = teacher_of(model, without=NOT_TAUGHT)
    for part in (model, teacher):
        for parameter in part.parameters():
            nn.init.normal_(parameter)
    return model, teacher, FeatureQueue(8, 6, identities=stage == "retrieval")


def export(
    folder,
    model: nn.Module,
    teacher: nn.Module | None = None,
    queue: FeatureQueue | None = None,
    stage: str = "pretrain",
) -> str:
    given = {"teacher": teacher, "queue": queue}
    models.save(
        folder,
        model,
        family="vicha",
        stage=stage,
        arguments=models.derive("vicha", stage, PRETRAINED),
        settings={"concepts": {"max_tokens": 7}},
        momentum={part: module for part, module in given.items() if module is not None},
    )
    return str(folder)


def start(model: nn.Module, stage: str, path, **beside):
    return models.start_from(model, path, family="vicha", stage=stage, **beside)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    state = second.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in first.state_dict().items())


@pytest.mark.parametrize("stage", ["retrieval", "nlvr_domain", "entailment", "vqa"])
@pytest.mark.parametrize("size", [32, 48])
def test_an_export_folder_and_an_official_file_start_a_task_alike(stage, size, tmp_path):
    pretrained = make()
    pretrained[2].pointer.fill_(5)
    folder = export(tmp_path / "export", *pretrained)
    vicha.FILES.write(tmp_path / "official.pth", pretrained[0], teacher=pretrained[1], queue=pretrained[2])
    vision = {**PRETRAINED["vision"], "image_size": size}
    mine, theirs = make(stage, 1, vision=vision), make(stage, 1, vision=vision)
    reports = [
        start(model, stage, path, teacher=teacher, queue=queue if stage == "retrieval" else None)
        for path, (model, teacher, queue) in ((folder, mine), (tmp_path / "official.pth", theirs))
    ]
    for field in ("loaded", "missing", "resized"):
        assert set(getattr(reports[0], field)) == set(getattr(reports[1], field)), field
    assert bool(reports[0].resized) == (size != 32)
    for first, second in zip(mine, theirs, strict=True):
        if stage == "retrieval" or not isinstance(first, FeatureQueue):
            assert_same(first, second)
    if stage == "retrieval":
        assert mine[2].pointer == 5
    else:
        assert {"queue.image", "queue.pointer", "queue.text"} <= set(reports[0].unexpected)
        assert {"image_queue", "queue_ptr", "text_queue"} <= set(reports[1].unexpected)


def test_teacher_and_queue_that_nobody_asks_for_are_reported_as_unused(tmp_path):
    pretrained = make()
    result = start(make("retrieval", 1)[0], "retrieval", export(tmp_path / "a", *pretrained))
    beside = {f"teacher.{key}" for key in pretrained[1].state_dict()}
    beside |= {f"queue.{key}" for key in pretrained[2].state_dict()}
    assert beside == {key for key in result.unexpected if key.startswith(("teacher.", "queue."))}


def test_without_a_teacher_in_the_folder_it_is_copied_and_the_queue_stays(tmp_path):
    pretrained = make()[0]
    model, teacher, queue = make("retrieval", 1)
    before = queue.image.clone()
    start(model, "retrieval", export(tmp_path / "a", pretrained), teacher=teacher, queue=queue)
    assert_same(teacher, model)
    assert torch.equal(queue.image, before)
    assert not (tmp_path / "a" / "momentum.safetensors").exists()


def test_an_export_without_momentum_takes_away_that_of_an_earlier_one(tmp_path):
    model, teacher, queue = make()
    export(tmp_path, model, teacher, queue)
    assert (tmp_path / "momentum.safetensors").exists()
    export(tmp_path, model)
    assert not (tmp_path / "momentum.safetensors").exists()


def test_the_model_is_read_without_what_stands_beside_it(tmp_path):
    model, teacher, queue = make("retrieval")
    loaded = models.load(export(tmp_path, model, teacher, queue, "retrieval"), ability="retrieval")
    assert_same(model, loaded.model)
    assert loaded.settings["concepts"] == {"max_tokens": 7}


def test_foreign_parts_are_refused(tmp_path):
    model, teacher, _ = make("entailment")
    with pytest.raises(ValueError, match="momentum holds optimizer; it takes teacher and queue"):
        models.save(
            tmp_path,
            model,
            family="vicha",
            stage="entailment",
            arguments={},
            momentum={"optimizer": teacher},
        )
    folder = export(tmp_path, model, stage="entailment")
    save_file({"pupil.weight": torch.ones(1)}, tmp_path / "momentum.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds pupil\.weight .*only teacher and queue can stand there"
    ):
        start(model, "entailment", folder)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("ability", ["vqa", "nlvr", "entailment"])
def test_a_pretraining_checkpoint_is_refused_where_a_task_model_is_needed(official, ability, tmp_path):
    path = tmp_path / ("pretrain.pth" if official else "pretrain")
    model = make()[0]
    vicha.FILES.write(path, model) if official else export(path, model)
    message = (
        rf"{path} is a pretrain checkpoint, in which what {ability} needs was never trained; "
        rf"train a {ability} model from it \(`vlp-train ls vicha` lists recipes\)"
    )
    with pytest.raises(CheckpointError, match=message):
        models.load(path, ability=ability)
    with pytest.raises(CheckpointError, match="checkpoint of vicha, which cannot be evaluated on 'boxes'"):
        models.load(path, ability="boxes")


@pytest.mark.parametrize("stage", ["pretrain", *TASKS])
def test_a_folder_tells_family_and_stage(stage, tmp_path):
    found = models.describe(export(tmp_path, make(stage)[0], stage=stage))
    assert (found.family, found.stage) == ("vicha", stage)
    assert found.arguments == models.derive("vicha", stage, PRETRAINED)
    assert (found.view, found.reading) == (None, None)
    models.create(found.family, found.stage, **found.arguments)


def test_vicha_has_no_box_stage():
    with pytest.raises(
        ValueError, match=r"stage 'boxes' is not known; the stages of vicha are pretrain, retrieval, nlvr"
    ):
        models.derive("vicha", "boxes", PRETRAINED)


def test_foreign_files_are_named(tmp_path):
    save_file({"encoder.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    message = (
        r"a\.safetensors is no official checkpoint of an installed family \(vicha, xvlm\); "
        r"it holds encoder\.weight"
    )
    for action in (models.load, models.describe, lambda path: start(make("vqa")[0], "vqa", path)):
        with pytest.raises(CheckpointError, match=message):
            action(tmp_path / "a.safetensors")


def test_a_file_of_xvlm_gives_a_teacher_its_copy(tmp_path):
    from vlp_core.models.xvlm import checkpoints as xvlm

    shape = {"vision": PRETRAINED["vision"], "text": PRETRAINED["text"]}
    torch.manual_seed(0)
    arguments = models.derive("xvlm", "captioning", shape)
    first, second = (models.create("xvlm", "captioning", **arguments) for _ in range(2))
    xvlm.FILES.write(tmp_path / "a.pth", first)
    teacher = teacher_of(second)
    models.start_from(second, tmp_path / "a.pth", family="xvlm", stage="captioning", teacher=teacher)
    assert_same(teacher, first)
