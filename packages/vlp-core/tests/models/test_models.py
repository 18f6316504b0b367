import json

import pytest
import torch
from torch import nn
from vlp_core import models
from vlp_core.images import Images
from vlp_core.losses import Negatives, masked_language_loss
from vlp_core.models.xvlm.model import Xvlm
from vlp_core.weights import CheckpointError

VISION = {
    "kind": "swin",
    "image_size": 32,
    "window": 2,
    "width": 4,
    "depths": [1, 2],
    "heads": [1, 2],
}
VIT = {"image_size": 32, "patch": 16, "width": 8, "depth": 2, "heads": 2, "local_depth": 1}
TEXT = {
    "kind": "bert",
    "vocabulary": 20,
    "width": 16,
    "layers": 4,
    "heads": 2,
    "hidden": 24,
    "positions": 12,
    "fusion_layer": 2,
}
ARGUMENTS = {"vision": VISION, "text": TEXT, "embed_width": 6}


def make(**changes) -> nn.Module:
    torch.manual_seed(0)
    return models.create("xvlm", "pretrain", **{**ARGUMENTS, **changes}).eval()


def batch(texts: int, images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 20, (texts, 7), generator=generator)
    return {
        "image": torch.randn(images, 3, 32, 32, generator=generator),
        "ids": ids,
        "mask": torch.ones_like(ids),
        "masked": torch.randint(3, 20, (texts, 7), generator=generator),
        "positions": torch.randint(1, 7, (texts, 2), generator=generator),
        "labels": torch.randint(0, 20, (texts, 2), generator=generator),
    }


def pretrain(model, x: dict, **options):
    return model.pretrain(
        Images(x["image"]), *(x[key] for key in ("ids", "mask", "masked", "positions", "labels")), **options
    )


@pytest.mark.parametrize(
    "vision",
    [
        VISION,
        {"kind": "clip", "hidden": 8, **VIT},
        {"kind": "vit", **VIT},
    ],
)
def test_export_folder_gives_the_same_model(vision, tmp_path):
    model = make(vision=vision)
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("[PAD]\n")
    view = {"kind": "squash", "size": 32}
    reading = {"tokenizer": {"kind": "wordpiece", "files": [str(vocabulary)]}, "max_tokens": 7}
    folder = tmp_path / "export"
    models.save(
        folder,
        model,
        family="xvlm",
        stage="pretrain",
        arguments={**ARGUMENTS, "vision": vision},
        view=view,
        reading=reading,
        settings={"prompt": "a "},
        text_files=[vocabulary],
    )
    loaded = models.load(folder)
    assert isinstance(loaded.model, Xvlm)
    assert not loaded.model.training
    assert (loaded.family, loaded.stage) == ("xvlm", "pretrain")
    assert loaded.view == view
    assert loaded.settings == {"prompt": "a "}
    tokenizer = {"kind": "wordpiece", "files": [str(folder / "words.txt")]}
    assert loaded.reading == {"tokenizer": tokenizer, "max_tokens": 7}
    assert json.loads((folder / "config.json").read_text())["reading"]["tokenizer"]["files"] == ["words.txt"]
    assert models.describe(folder) == models.Description(*loaded[1:])
    assert (folder / "words.txt").read_text() == "[PAD]\n"
    state = model.state_dict()
    assert state.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(x, state[key]) for key, x in loaded.model.state_dict().items())


def test_what_an_export_could_not_be_read_with_is_refused(tmp_path):
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="settings cannot hold reading, view; give it as an argument"):
        models.save(
            tmp_path,
            model,
            family="xvlm",
            stage="vqa",
            arguments={},
            settings={"view": {}, "reading": {}, "prompt": ""},
        )
    reading = {"tokenizer": {"kind": "roberta", "files": ["a/vocab.json", "a/merges.txt"]}}
    with pytest.raises(ValueError, match=r"the tokenizer needs merges\.txt; give the path among text_files"):
        models.save(
            tmp_path,
            model,
            family="xvlm",
            stage="vqa",
            arguments={},
            reading=reading,
            text_files=["b/vocab.json"],
        )
    assert not list(tmp_path.iterdir())


def test_export_folder_without_config_or_with_a_broken_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json not found; an export folder holds"):
        models.load(tmp_path)
    for text, message in (
        ("{", r"config\.json is not JSON"),
        ("[]", r"config\.json must be a JSON object, not a list"),
        ("{}", r"config\.json lacks family, stage, arguments, view, reading; it must hold family"),
        ('{"model": "xvlm"}', r"config\.json lacks arguments"),
        ('{"model": "blip", "arguments": {}}', "its model 'blip' belongs to no installed family"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            models.load(tmp_path)
    with pytest.raises(ValueError, match="arguments cannot change that"):
        models.load(tmp_path, arguments=ARGUMENTS)


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="family 'blip' is not known; choose among vicha, xvlm"):
        models.create("blip", "pretrain")
    with pytest.raises(
        ValueError,
        match="stage 'chess' is not known; the stages of vicha are pretrain, retrieval, nlvr_domain",
    ):
        models.create("vicha", "chess")
    with pytest.raises(ValueError, match="vision kind 'resnet' is not known; choose swin, clip, vit or timm"):
        make(vision={"kind": "resnet"})
    with pytest.raises(ValueError, match="unknown heads maths; choose among contrast"):
        make(heads=["match", "maths"])
    with pytest.raises(ValueError, match="image_width=5 does not fit the image encoder's width 8"):
        make(text={**TEXT, "image_width": 5})


def test_heads_that_a_task_does_not_need_are_not_there():
    names = {key.split(".")[0] for key in make(heads=["boxes"]).state_dict()}
    assert names == {"vision", "text", "bbox_head"}


@pytest.mark.parametrize("before", [0.0001, 0.07, 3.0])
def test_temperature_is_clamped_in_pretraining_only(before):
    model = make(temperature=before)
    x = batch(3, 3)
    model.pair(Images(x["image"]), x["ids"], x["mask"])
    assert model.temperature.item() == pytest.approx(before)
    pretrain(model, x)
    assert model.temperature.item() == pytest.approx(min(max(before, 0.001), 0.5))


def test_one_batch_of_rows_equals_separate_passes():
    """Positives, negatives, masked texts and box queries go through the fusion layers together; alone they
    give the same."""
    model, x = make(), batch(4, 2)
    index = torch.tensor([0, 1, 1, 0])
    mask = (torch.rand(4, model.vision.tokens, generator=torch.Generator().manual_seed(2)) < 0.5).long()
    mask[:, :2] = 1
    negatives = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1]))
    pairs = pretrain(model, x, image_index_B=index, image_attention_mask_BL=mask, negatives=negatives)

    region, full = model.vision.forward_regions(x["image"], index, mask)
    text, masked = (model.text.encode(x[key], x["mask"]) for key in ("ids", "masked"))
    fuse = model.text.fuse
    rows = [
        fuse(text, x["mask"], region, image_mask_MS=mask),
        fuse(text, x["mask"], region[negatives.image], image_mask_MS=mask[negatives.image]),
        fuse(text[negatives.text], x["mask"], region, image_mask_MS=mask),
    ]
    torch.testing.assert_close(pairs.match_logits, model.itm_head(torch.cat(rows)[:, 0]))
    torch.testing.assert_close(
        pairs.boxes, model.bbox_head(fuse(text, x["mask"], full[index])[:, 0]).sigmoid()
    )
    tokens = model.mlm_head(
        fuse(masked, x["mask"], region, image_mask_MS=mask), model.text.word_embedding.weight
    )
    expected = tokens[torch.arange(4)[:, None], x["positions"]]
    torch.testing.assert_close(pairs.token_logits, expected.flatten(0, 1))


@pytest.mark.parametrize("labels", [[[5, -100], [-100, 6], [-100, -100]], [[-100, -100]] * 3])
def test_masked_tokens_without_label_do_not_count(labels):
    model, x = make(), batch(3, 3)
    negatives = Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    every = pretrain(model, x, negatives=negatives)
    labels = torch.tensor(labels)
    some = pretrain(model, {**x, "labels": labels}, negatives=negatives)
    assert torch.equal(some.token_labels, labels[labels != -100])
    torch.testing.assert_close(some.token_logits, every.token_logits[labels.flatten() != -100])
    loss = masked_language_loss(some.token_logits, some.token_labels)
    torch.testing.assert_close(
        loss,
        masked_language_loss(every.token_logits, labels.flatten()),
    )
    loss.backward()
    assert all(p.grad is not None for p in model.mlm_head.parameters())


def test_negatives_of_equal_identity_are_avoided():
    model, x = make(), batch(6, 6)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    pairs = model.pair(Images(x["image"]), x["ids"], x["mask"], identities_B=ids)
    assert (ids[pairs.negatives.image] != ids).all()
    assert (ids[pairs.negatives.text] != ids).all()


def test_match_asks_each_pair_alone():
    model, x = make(), batch(3, 3)
    with torch.no_grad():
        image, text = model.encode_image(Images(x["image"])), model.encode_text(x["ids"], x["mask"])
        together = model.match(image, text, torch.tensor([2, 0, 2, 1]), torch.tensor([0, 1, 2, 0]))
        alone = [
            model.match(image, text, torch.tensor([i]), torch.tensor([t]))
            for i, t in ((2, 0), (0, 1), (2, 2), (1, 0))
        ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_region_arguments_belong_together():
    x = batch(3, 3)
    with pytest.raises(ValueError, match="image_index and image_attention_mask belong together"):
        pretrain(make(), x, image_index_B=torch.tensor([0, 1, 2]))
