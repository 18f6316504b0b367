"""Starting a task from official files and from export folders, and what a checkpoint serves for."""

import pytest
import torch
from torch import nn
from vlp_core import models
from vlp_core.models import model_name, stage_of, task_arguments
from vlp_core.models.xvlm import checkpoints as xvlm
from vlp_core.weights import CheckpointError

VISION = {
    "kind": "swin",
    "image_size": 96,
    "window": 3,
    "width": 4,
    "depths": [1, 2, 1, 1],
    "heads": [1, 1, 1, 1],
}
TEXT = {
    "kind": "bert",
    "vocabulary": 20,
    "width": 64,
    "layers": 4,
    "heads": 1,
    "hidden": 16,
    "positions": 12,
    "fusion_layer": 2,
}
PRETRAINED = {"vision": VISION, "text": TEXT, "embed_width": 6}
TASKS = ("retrieval", "boxes", "nlvr", "nlvr_domain", "vqa", "captioning")


def make(stage: str = "pretrain", seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return models.create(model_name(stage), **task_arguments({**PRETRAINED, **changes}, stage))


def export(folder, model: nn.Module, **changes) -> str:
    stage = stage_of(model)
    models.save(
        folder,
        model,
        name=model_name(stage),
        arguments=task_arguments({**PRETRAINED, **changes}, stage),
        settings={"image_size": 96, "text": {"kind": "bert", "files": []}},
    )
    return str(folder)


@pytest.mark.parametrize("stage", TASKS)
@pytest.mark.parametrize("size", [(96, 3), (160, 5)])
def test_an_export_folder_and_an_official_file_start_a_task_alike(stage, size, tmp_path):
    pretrained = make()
    folder = export(tmp_path / "export", pretrained)
    xvlm.write(tmp_path / "official.th", pretrained)
    vision = {**VISION, "image_size": size[0], "window": size[1]}
    mine, theirs = make(stage, 1, vision=vision), make(stage, 1, vision=vision)
    before = {key: x.clone() for key, x in mine.state_dict().items()}
    from_folder = models.start_from(mine, folder)
    from_file = models.start_from(theirs, tmp_path / "official.th")
    for report in ("loaded", "missing", "resized"):
        assert set(getattr(from_folder, report)) == set(getattr(from_file, report))
    assert bool(from_folder.resized) == (size[1] != 3)
    after = mine.state_dict()
    for key, x in theirs.state_dict().items():
        assert torch.equal(x, after[key]), key
    for key in from_folder.missing:
        assert torch.equal(before[key], after[key]), key
    changed = {key for key, x in after.items() if not torch.equal(before[key], x)}
    assert {
        key for key in after if key.startswith("text.layers") and key.endswith("weight") and "norm" not in key
    } <= changed
    fresh = {key.split(".")[0] for key in from_folder.missing}
    assert fresh == {"nlvr": {"cls_head"}, "nlvr_domain": {"ta_head"}, "vqa": {"decoder"}}.get(stage, set())


@pytest.mark.parametrize("official", [False, True])
def test_a_domain_stage_goes_on_to_fine_tuning(official, tmp_path):
    for domain, stage in (
        ("nlvr_domain", "nlvr"),
        ("boxes", "boxes"),
        ("captioning", "captioning"),
        ("pretrain", "pretrain"),
    ):
        first, second = make(domain), make(stage, 1)
        path = tmp_path / f"{domain}.th" if official else tmp_path / domain
        xvlm.write(path, first) if official else export(path, first)
        result = models.start_from(second, path)
        assert {key.split(".")[0] for key in result.missing} == ({"cls_head"} if stage == "nlvr" else set())
        unused = {key.split(".")[0] for key in result.unexpected}
        assert unused == ({"vision_proj", "ta_head"} if stage == "nlvr" else set())
        state = second.state_dict()
        assert all(torch.equal(x, state[key]) for key, x in first.state_dict().items() if key in state)


def test_the_report_names_what_is_left_over(tmp_path):
    pretrained = make()
    result = models.start_from(make("captioning"), export(tmp_path / "export", pretrained))
    assert {key.split(".")[0] for key in result.unexpected} == {
        "vision_proj",
        "text_proj",
        "temperature",
        "itm_head",
        "bbox_head",
    }


@pytest.mark.parametrize("official", [False, True])
def test_stages_that_do_not_follow_are_refused(official, tmp_path):
    path = tmp_path / ("retrieval.th" if official else "retrieval")
    xvlm.write(path, make("retrieval")) if official else export(path, make("retrieval"))
    with pytest.raises(
        CheckpointError, match=r"retrieval checkpoint; a vqa model starts from pretrain or vqa"
    ):
        models.start_from(make("vqa"), path)
    with pytest.raises(CheckpointError, match=r"retrieval checkpoint; a pretrain model starts from pretrain"):
        models.start_from(make(), path)


def test_encoders_of_another_build_are_refused(tmp_path):
    folder = export(tmp_path / "export", make())
    roberta = make("retrieval", text={**TEXT, "kind": "roberta"})
    with pytest.raises(
        CheckpointError, match="was trained with bert, the text encoder of this model is roberta"
    ):
        models.start_from(roberta, folder)
    with pytest.raises(CheckpointError, match=r"does not fit this Xvlm: \d+ unexpected: text\.layers"):
        models.start_from(make("retrieval", text={**TEXT, "layers": 3}), folder)
    with pytest.raises(CheckpointError, match=r"\d+ missing: text\.layers"):
        models.start_from(make("retrieval", text={**TEXT, "layers": 5}), folder)
    with pytest.raises(CheckpointError, match=r"text\.word_embedding\.weight does not fit"):
        models.start_from(make("retrieval", text={**TEXT, "vocabulary": 21}), folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json not found; an export folder holds"):
        models.start_from(make("retrieval"), tmp_path)


@pytest.mark.parametrize("stage", ["pretrain", *TASKS])
def test_a_checkpoint_tells_what_it_holds(stage, tmp_path):
    model = make(stage)
    folder = models.describe(export(tmp_path / "export", model))
    assert (folder.stage, folder.name) == (stage, model_name(stage))
    assert folder.arguments == task_arguments(PRETRAINED, stage)
    assert folder.settings["image_size"] == 96
    torch.save(
        {"model": xvlm.xvlm_adapter(model).to_source(model.state_dict()), "config": {"image_res": 96}},
        tmp_path / "a.th",
    )
    file = models.describe(tmp_path / "a.th")
    assert file.stage == stage
    assert file.settings == folder.settings
    again = models.create(file.name, **file.arguments)
    assert {key: x.shape for key, x in again.state_dict().items()} == {
        key: x.shape for key, x in model.state_dict().items()
    }


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("task", ["vqa", "nlvr", "captioning"])
def test_a_pretraining_checkpoint_is_refused_where_a_task_model_is_needed(official, task, tmp_path):
    path = tmp_path / ("pretrain.th" if official else "pretrain")
    xvlm.write(path, make()) if official else export(path, make())
    message = (
        rf"{path} is a pretrain checkpoint, in which what {task} needs was never trained; "
        rf"train it first, `vlp-train xvlm/{task} model\.weights\.model={path}`"
    )
    with pytest.raises(CheckpointError, match=message):
        models.load(path, task=task)


def test_tasks_take_the_checkpoints_that_serve_them(tmp_path):
    served = {
        "pretrain": {"retrieval", "weak_grounding", "boxes"},
        "retrieval": {"retrieval", "weak_grounding"},
        "boxes": {"boxes"},
        "nlvr": {"nlvr"},
        "nlvr_domain": set(),
        "vqa": {"vqa"},
        "captioning": {"captioning"},
    }
    for stage, tasks in served.items():
        folder = export(tmp_path / stage, make(stage))
        for task in ("retrieval", "weak_grounding", "boxes", "nlvr", "vqa", "captioning"):
            if task in tasks:
                assert stage_of(models.load(folder, task=task).model) == stage
            else:
                with pytest.raises(CheckpointError, match=f"is a {stage} checkpoint"):
                    models.load(folder, task=task)
    with pytest.raises(CheckpointError, match=r"vlp-train xvlm/nlvr model\.weights\.model="):
        models.load(tmp_path / "nlvr_domain", task="nlvr")
    with pytest.raises(CheckpointError, match="give a retrieval or pretrain checkpoint"):
        models.load(tmp_path / "vqa", task="retrieval")
    with pytest.raises(ValueError, match="task 'chess' is not known; choose among retrieval"):
        models.load(tmp_path / "vqa", task="chess")


@pytest.mark.parametrize("suffix", ["th", "safetensors"])
def test_an_official_file_is_written_and_read_back(suffix, tmp_path):
    for stage in ("pretrain", *TASKS):
        model, other = make(stage), make(stage, 1)
        path = tmp_path / f"{stage}.{suffix}"
        xvlm.write(path, model)
        xvlm.load(other, path)
        assert all(torch.equal(x, other.state_dict()[key]) for key, x in model.state_dict().items())


def test_foreign_modules_have_no_stage():
    with pytest.raises(TypeError, match="no stage of training is known for Linear"):
        stage_of(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="stage 'finetune' is not known; choose among pretrain"):
        task_arguments(PRETRAINED, "finetune")
