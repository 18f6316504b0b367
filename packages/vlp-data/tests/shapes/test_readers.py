"""The files of the world through the readers that real data goes through."""

from pathlib import Path

import numpy as np
import pytest
from vlp_data import shapes
from vlp_data.images import decode
from vlp_data.options import CocoCaptions, CocoInstances, ImageTextLines, Karpathy, RegionLines, TaskJson

SEED, SIZE, TRAIN = 6, 48, 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        shapes.write(
            tmp_path_factory.mktemp("shapes") / "data", images=16, seed=SEED, size=SIZE, val=2, test=2
        )
    )


@pytest.fixture(scope="module")
def scenes() -> list[tuple[shapes.Scene, shapes.Annotations]]:
    return [
        (scene, shapes.annotate(scene)) for scene in (shapes.draw(SEED, k, size=SIZE) for k in range(TRAIN))
    ]


@pytest.mark.parametrize(
    "options",
    [
        lambda root: ImageTextLines(files=(f"{root}/xvlm/images_train",), root=root),
        lambda root: CocoCaptions(annotations=f"{root}/coco/captions_train.json", images=root),
        lambda root: Karpathy(annotations=f"{root}/dataset_karpathy.json", images=root, split="train"),
    ],
    ids=["xvlm", "coco", "karpathy"],
)
def test_caption_readers_give_scenes_with_five_captions(options, root: str, scenes) -> None:
    source = options(root).open()
    assert len(source) == TRAIN
    for number, (scene, texts) in enumerate(scenes):
        sample = source[number]
        assert [text.text for text in sample.texts if text.role == "caption"] == list(texts.captions)
        image = decode(Path(sample.images[0].path).read_bytes())
        assert np.array_equal(np.asarray(image), scene.image)


def test_retrieval_lists_are_read(root: str, scenes) -> None:
    train = TaskJson(files=(f"{root}/shapes_train.json",), root=root).open()
    texts = [t.text for number in range(len(train)) for t in train[number].texts if t.role == "caption"]
    assert texts == [caption for _, annotations in scenes for caption in annotations.captions]
    test = TaskJson(files=(f"{root}/shapes_test.json",), root=root).open()
    assert len(test) == 2
    assert [text.text for text in test[1].texts if text.role == "caption"] == list(
        shapes.annotate(shapes.draw(SEED, 15, size=SIZE)).captions
    )
    assert Path(test[1].images[0].path).is_file()


def test_region_lines_give_boxes_of_objects_and_phrases(root: str, scenes) -> None:
    source = RegionLines(files=(f"{root}/xvlm/regions_train",), root=root).open()
    assert len(source) == TRAIN
    for number, (scene, texts) in enumerate(scenes):
        sample = source[number]
        boxes = [region.box for region in sample.regions]
        assert boxes == [*scene.boxes, *(phrase.box for phrase in texts.phrases)]
        words = [[sample.texts[k].text for k in region.texts] for region in sample.regions]
        assert words == [[thing.kind] for thing in scene.things] + [[phrase.text] for phrase in texts.phrases]
        attributes = [region.attributes for region in sample.regions[: len(scene.things)]]
        assert all(thing.color in words for thing, words in zip(scene.things, attributes, strict=True))


def test_coco_instances_give_masks_and_kinds(root: str, scenes) -> None:
    annotations, captions = f"{root}/coco/instances_train.json", f"{root}/coco/captions_train.json"
    source = CocoInstances(annotations=annotations, captions=captions, images=root).open()
    assert len(source) == TRAIN
    for number, (scene, _) in enumerate(scenes):
        regions = source[number].regions
        assert [region.box for region in regions] == [tuple(map(float, box)) for box in scene.boxes]
        assert [shapes.KINDS[region.category - 1] for region in regions] == [
            thing.kind for thing in scene.things
        ]
        assert [region.area for region in regions] == scene.masks.sum(axis=(1, 2)).tolist()
        assert all(region.mask["size"] == [SIZE, SIZE] for region in regions)
