"""Starting a task from official files and from export folders, and what a checkpoint serves for."""

import pytest
import torch
from torch import nn
from vlp_core import models
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
    return models.create("xvlm", stage, **models.derive("xvlm", stage, {**PRETRAINED, **changes}))


def start(model: nn.Module, stage: str, path):
    return models.start_from(model, path, family="xvlm", stage=stage)


def export(folder, model: nn.Module, stage: str = "pretrain") -> str:
    models.save(
        folder,
        model,
        family="xvlm",
        stage=stage,
        arguments=models.derive("xvlm", stage, PRETRAINED),
        view={"kind": "squash", "size": 96},
        reading={"tokenizer": {"kind": "wordpiece", "files": []}, "vocabulary": 20},
    )
    return str(folder)


@pytest.mark.parametrize("stage", TASKS)
@pytest.mark.parametrize("size", [(96, 3), (160, 5)])
def test_an_export_folder_and_an_official_file_start_a_task_alike(stage, size, tmp_path):
    pretrained = make()
    folder = export(tmp_path / "export", pretrained)
    xvlm.FILES.write(tmp_path / "official.th", pretrained)
    vision = {**VISION, "image_size": size[0], "window": size[1]}
    mine, theirs = make(stage, 1, vision=vision), make(stage, 1, vision=vision)
    before = {key: x.clone() for key, x in mine.state_dict().items()}
    from_folder = start(mine, stage, folder)
    from_file = start(theirs, stage, tmp_path / "official.th")
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
        xvlm.FILES.write(path, first) if official else export(path, first, domain)
        result = start(second, stage, path)
        assert {key.split(".")[0] for key in result.missing} == ({"cls_head"} if stage == "nlvr" else set())
        unused = {key.split(".")[0] for key in result.unexpected}
        assert unused == ({"vision_proj", "ta_head"} if stage == "nlvr" else set())
        state = second.state_dict()
        assert all(torch.equal(x, state[key]) for key, x in first.state_dict().items() if key in state)


def test_the_report_names_what_is_left_over(tmp_path):
    pretrained = make()
    result = start(make("captioning"), "captioning", export(tmp_path / "export", pretrained))
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
    model = make("retrieval")
    xvlm.FILES.write(path, model) if official else export(path, model, "retrieval")
    with pytest.raises(
        CheckpointError, match=r"retrieval checkpoint; a vqa model starts from pretrain or vqa"
    ):
        start(make("vqa"), "vqa", path)
    with pytest.raises(CheckpointError, match=r"retrieval checkpoint; a pretrain model starts from pretrain"):
        start(make(), "pretrain", path)


def test_encoders_of_another_build_are_refused(tmp_path):
    folder = export(tmp_path / "export", make())
    roberta = make("retrieval", text={**TEXT, "kind": "roberta"})
    with pytest.raises(
        CheckpointError, match="was trained with bert, the text encoder of this model is roberta"
    ):
        start(roberta, "retrieval", folder)
    with pytest.raises(CheckpointError, match=r"does not fit this Xvlm: \d+ unexpected: text\.layers"):
        start(make("retrieval", text={**TEXT, "layers": 3}), "retrieval", folder)
    with pytest.raises(CheckpointError, match=r"\d+ missing: text\.layers"):
        start(make("retrieval", text={**TEXT, "layers": 5}), "retrieval", folder)
    with pytest.raises(CheckpointError, match=r"text\.word_embedding\.weight does not fit"):
        start(make("retrieval", text={**TEXT, "vocabulary": 21}), "retrieval", folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json not found; an export folder holds"):
        start(make("retrieval"), "retrieval", tmp_path)


@pytest.mark.parametrize("stage", ["pretrain", *TASKS])
def test_a_checkpoint_tells_what_it_holds(stage, tmp_path):
    model = make(stage)
    folder = models.describe(export(tmp_path / "export", model, stage))
    assert (folder.family, folder.stage) == ("xvlm", stage)
    assert folder.arguments == models.derive("xvlm", stage, PRETRAINED)
    assert folder.view == {"kind": "squash", "size": 96}
    torch.save(
        {"model": xvlm.xvlm_adapter(model).to_source(model.state_dict()), "config": {"image_res": 96}},
        tmp_path / "a.th",
    )
    file = models.describe(tmp_path / "a.th")
    assert file._replace(arguments=folder.arguments) == folder
    again = models.create(file.family, file.stage, **file.arguments)
    assert {key: x.shape for key, x in again.state_dict().items()} == {
        key: x.shape for key, x in model.state_dict().items()
    }


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("ability", ["vqa", "nlvr", "captioning"])
def test_a_pretraining_checkpoint_is_refused_where_a_task_model_is_needed(official, ability, tmp_path):
    path = tmp_path / ("pretrain.th" if official else "pretrain")
    xvlm.FILES.write(path, make()) if official else export(path, make())
    message = (
        rf"{path} is a pretrain checkpoint, in which what {ability} needs was never trained; "
        rf"train a {ability} model from it \(`vlp-train ls xvlm` lists recipes\)"
    )
    with pytest.raises(CheckpointError, match=message):
        models.load(path, ability=ability)


def test_abilities_are_those_of_the_stage(tmp_path):
    served = {
        "pretrain": {"retrieval", "weak_grounding", "boxes"},
        "retrieval": {"retrieval", "weak_grounding"},
        "boxes": {"boxes"},
        "nlvr": {"nlvr"},
        "nlvr_domain": set(),
        "vqa": {"vqa"},
        "captioning": {"captioning"},
    }
    for stage, abilities in served.items():
        folder = export(tmp_path / stage, make(stage), stage)
        for ability in ("retrieval", "weak_grounding", "boxes", "nlvr", "vqa", "captioning"):
            if ability in abilities:
                assert models.load(folder, ability=ability).stage == stage
            else:
                with pytest.raises(CheckpointError, match=f"is a {stage} checkpoint"):
                    models.load(folder, ability=ability)
    with pytest.raises(CheckpointError, match=r"train a nlvr model from it"):
        models.load(tmp_path / "nlvr_domain", ability="nlvr")
    with pytest.raises(CheckpointError, match="give a pretrain or retrieval checkpoint"):
        models.load(tmp_path / "vqa", ability="retrieval")
    message = (
        "checkpoint of xvlm, which cannot be evaluated on 'chess'; it can be on retrieval, weak_grounding, "
    )
    with pytest.raises(CheckpointError, match=message):
        models.load(tmp_path / "vqa", ability="chess")


@pytest.mark.parametrize("suffix", ["th", "safetensors"])
def test_an_official_file_is_written_and_read_back(suffix, tmp_path):
    for stage in ("pretrain", *TASKS):
        model, other = make(stage), make(stage, 1)
        path = tmp_path / f"{stage}.{suffix}"
        xvlm.FILES.write(path, model)
        xvlm.FILES.load(other, path, stage=stage)
        assert all(torch.equal(x, other.state_dict()[key]) for key, x in model.state_dict().items())


def test_names_that_are_not_known_are_refused(tmp_path):
    message = "stage 'finetune' is not known; the stages of xvlm are pretrain, retrieval, boxes, nlvr_domain"
    for action in (
        lambda: models.derive("xvlm", "finetune", PRETRAINED),
        lambda: models.start_from(nn.Linear(1, 1), tmp_path, family="xvlm", stage="finetune"),
        lambda: models.save(tmp_path, nn.Linear(1, 1), family="xvlm", stage="finetune", arguments={}),
    ):
        with pytest.raises(ValueError, match=message):
            action()
    with pytest.raises(ValueError, match="family 'blip' is not known; choose among vicha, xvlm"):
        models.derive("blip", "pretrain", PRETRAINED)
    with pytest.raises(TypeError, match="X-VLM has no layout for EntailmentModel"):
        xvlm.FILES.write(tmp_path / "a.th", make("entailment"))
