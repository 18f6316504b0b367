"""The words chosen for each image: from the objects alone, mostly true, never perfect, the same everywhere;
and in every list."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from vlp_data import shapes
from vlp_data.options import ImageTextLines, RegionLines, TaskJson
from vlp_data.shapes import concepts
from vlp_data.text import Tokenizer

IMAGES = 150
DEV = {"train": "train", "val": "dev", "test": "test"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("concepts") / "data"
    return shapes.write(root, images=IMAGES, seed=3, size=48, val=30, test=30)


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines()]


def shown(record: dict) -> set[str]:
    """All words that are true of a scene."""
    words = {f"{record['background']['kind']} background"}
    for thing in record["objects"]:
        words |= {thing["kind"], f"{thing['color']} {thing['kind']}", f"{thing['texture']} {thing['kind']}"}
    return {word for word in words if not word.startswith("plain ") or word == "plain background"}


def test_an_image_has_fifteen_words_of_the_vocabulary(records: list[dict]) -> None:
    words = concepts.vocabulary()
    assert len(set(words)) == len(words)
    for record in records:
        assert len(record["concepts"]) == len(set(record["concepts"])) == concepts.CHOSEN == 15
        assert set(record["concepts"]) <= set(words)
        assert shown(record) <= set(words)


def test_the_ranking_is_good_and_imperfect(records: list[dict]) -> None:
    true = Counter()
    found, wanted = 0, 0
    for record in records:
        true.update(place for place, word in enumerate(record["concepts"]) if word in shown(record))
        found += len(shown(record) & set(record["concepts"]))
        wanted += len(shown(record))
    first, last = (sum(true[place] for place in places) for places in (range(3), range(12, 15)))
    assert 0.85 < first / (3 * len(records)) < 1.0
    assert 0.0 < last / (3 * len(records)) < 0.25
    assert 0.75 < found / wanted < 0.9


def test_what_fits_better_is_chosen_more_often(records: list[dict]) -> None:
    there, taken = Counter(), Counter()
    for record in records:
        kinds = {thing["kind"] for thing in record["objects"]}
        looks = {thing[name] for thing in record["objects"] for name in ("color", "texture")}
        for word in concepts.vocabulary():
            first, _, kind = word.rpartition(" ")
            fit = "shown" if word in shown(record) else (kind in kinds) + (first in looks)
            there[fit] += 1
            taken[fit] += word in record["concepts"]
    rates = [taken[fit] / there[fit] for fit in (0, 1, 2, "shown")]
    assert rates[0] > 0
    assert all(2 * low < high for low, high in itertools.pairwise(rates)), rates


def test_the_words_follow_from_the_objects_and_the_key_alone(records: list[dict]) -> None:
    record = records[7]
    things = [
        {name: thing[name] for name in ("kind", "color", "texture", "area")} for thing in record["objects"]
    ]
    arguments = {"background": record["background"]["kind"], "pixels": 48 * 48}
    again = concepts.chosen(things, seed=3, index=7, **arguments)
    assert again == record["concepts"]
    assert concepts.chosen(things, seed=3, index=8, **arguments) != again
    assert concepts.chosen(things[:1], seed=3, index=7, **arguments) != again


def test_a_pinned_choice() -> None:
    thing = {"kind": "star", "color": "red", "texture": "dotted", "area": 100}
    words = concepts.chosen([thing], "noisy", seed=0, index=0, pixels=1000)
    assert words == [
        "dotted star",
        "star",
        "noisy background",
        "red star",
        "red flower",
        "black star",
        "speckled star",
        "gray star",
        "red moon",
        "orange star",
        "green moon",
        "dotted flower",
        "dotted circle",
        "white star",
        "red circle",
    ]


def test_every_list_has_the_words_of_its_images(folder: Path, records: list[dict]) -> None:
    expected = {record["image"]: record["concepts"] for record in records}
    for split, dev in DEV.items():
        names = (f"shapes_{split}", f"captions_{split}", f"vqa_{split}", f"ve_{dev}", f"refcoco_{split}")
        for name in (*names, "vg_qa"):
            rows = json.loads((folder / f"{name}.json").read_text())
            assert rows and all(row["kwords"] == expected[row["image"]] for row in rows), name
        pairs = json.loads((folder / f"nlvr_{dev}.json").read_text())
        assert pairs
        for row in pairs:
            assert [row["kwords1"], row["kwords2"]] == [expected[image] for image in row["images"]]


@pytest.mark.parametrize(
    "options",
    [
        lambda root: TaskJson(files=(f"{root}/shapes_train.json",), root=root),
        lambda root: TaskJson(files=(f"{root}/captions_train.json",), root=root, group_captions=True),
        lambda root: ImageTextLines(files=(f"{root}/xvlm/images_train",), root=root),
        lambda root: RegionLines(files=(f"{root}/xvlm/regions_train",), root=root),
    ],
    ids=["list", "grouped", "lines", "regions"],
)
def test_readers_of_pre_training_give_the_words(options, folder: Path, records: list[dict]) -> None:
    expected = {record["image"]: record["concepts"] for record in records}
    source = options(str(folder)).open()
    for number in range(len(source)):
        sample = source[number]
        image = str(Path(sample.images[0].path).relative_to(folder))
        assert [text.text for text in sample.texts if text.role == "concept"] == expected[image]


def test_the_tokenizer_knows_every_word(folder: Path) -> None:
    tokenizer = Tokenizer.wordpiece(folder / "vocab.txt")
    for word in concepts.vocabulary():
        assert tokenizer.tokens(word) == word.split()
