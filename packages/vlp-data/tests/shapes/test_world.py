import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from vlp_data import shapes
from vlp_data.shapes import world
from vlp_data.shapes.sheet import sheet

IMAGES, SEED, SIZE = 30, 4, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write(
        tmp_path_factory.mktemp("shapes") / "data", images=IMAGES, seed=SEED, size=SIZE, val=5, test=4
    )


# pycocotools 2.0.11 itself uses what NumPy 2 deprecates when it decodes.
reads_masks = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def read(path: Path):
    return json.loads(path.read_text())


def read_lines(*paths: Path) -> list[dict]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict]:
    return read_lines(folder / "annotations.jsonl")


def test_splits_are_disjoint_and_as_asked(records: list[dict]) -> None:
    assert [record["index"] for record in records] == list(range(IMAGES))
    assert [record["split"] for record in records] == ["train"] * 21 + ["val"] * 5 + ["test"] * 4


def test_images_hold_the_drawn_pixels(folder: Path, records: list[dict]) -> None:
    assert len(list((folder / "images").iterdir())) == IMAGES
    for record in records:
        with Image.open(folder / record["image"]) as image:
            assert np.array_equal(np.asarray(image), shapes.draw(SEED, record["index"], size=SIZE).image)


@reads_masks
def test_records_hold_every_annotation_of_the_scene(records: list[dict]) -> None:
    for record in records[::7]:
        scene = shapes.draw(SEED, record["index"], size=SIZE)
        texts = shapes.annotate(scene)
        assert record["captions"] == list(texts.captions)
        assert record["long_caption"] == texts.long_caption
        assert [e["text"] for e in record["expressions"]] == [e.text for e in texts.expressions]
        assert [tuple(q["answers"]) for q in record["questions"]] == [q.answers for q in texts.questions]
        assert {h["label"] for h in record["entailment"]} == {"entailment", "neutral", "contradiction"}
        masks = [coco_mask.decode(thing["segmentation"]).astype(bool) for thing in record["objects"]]
        assert np.array_equal(masks, scene.masks)


def test_pairs_stay_inside_their_split(records: list[dict]) -> None:
    split_of = {record["image"]: record["split"] for record in records}
    for record in records:
        assert len(record["pairs"]) == 2
        for pair in record["pairs"]:
            assert record["image"] in pair["images"]
            assert {split_of[image] for image in pair["images"]} == {record["split"]}
            assert len(set(pair["images"])) == 2
            assert pair["label"] in ("True", "False")


@reads_masks
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_coco_instances_are_read_by_pycocotools(
    folder: Path, records: list[dict], split: str, capsys
) -> None:
    from pycocotools.coco import COCO

    coco = COCO(folder / "coco" / f"instances_{split}.json")
    chosen = [record for record in records if record["split"] == split]
    assert coco.getImgIds() == [record["image_id"] for record in chosen]
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(shapes.KINDS)
    for record in chosen:
        (image,) = coco.loadImgs(record["image_id"])
        assert (folder / image["file_name"]).is_file()
        assert (image["width"], image["height"]) == (SIZE, SIZE)
        found = coco.loadAnns(coco.getAnnIds(record["image_id"]))
        scene = shapes.draw(SEED, record["index"], size=SIZE)
        assert [coco.cats[a["category_id"]]["name"] for a in found] == [thing.kind for thing in scene.things]
        for annotation, mask in zip(found, scene.masks, strict=True):
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum() == coco_mask.area(annotation["segmentation"])
            assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
            assert annotation["iscrowd"] == 0
    assert len({annotation["id"] for annotation in coco.dataset["annotations"]}) == len(
        coco.dataset["annotations"]
    )
    assert "index created" in capsys.readouterr().out


def test_captions_agree_in_all_layouts(folder: Path, records: list[dict]) -> None:
    captions = {record["image_id"]: record["captions"] for record in records}
    karpathy = read(folder / "dataset_karpathy.json")["images"]
    assert {image["cocoid"]: [s["raw"] for s in image["sentences"]] for image in karpathy} == captions
    for image in karpathy:
        assert (folder / image["filepath"] / image["filename"]).is_file()
        assert image["split"] == records[image["imgid"]]["split"]
        assert image["sentids"] == [s["sentid"] for s in image["sentences"]]
        assert all(s["tokens"] == re.findall(r"[a-z0-9]+", s["raw"].lower()) for s in image["sentences"])
    for split in ("train", "val", "test"):
        ids = [record["image_id"] for record in records if record["split"] == split]
        coco = read(folder / "coco" / f"captions_{split}.json")
        found: dict[int, list[str]] = {}
        for annotation in coco["annotations"]:
            found.setdefault(annotation["image_id"], []).append(annotation["caption"])
        assert found == {number: captions[number] for number in ids}
        assert len({annotation["id"] for annotation in coco["annotations"]}) == 5 * len(ids)
        rows = read(folder / f"shapes_{split}.json")
        if split == "train":
            assert [(row["image_id"], row["caption"]) for row in rows] == [
                (n, c) for n in ids for c in captions[n]
            ]
        else:
            assert [row["caption"] for row in rows] == [captions[number] for number in ids]
        assert {row["image"] for row in rows} == {records[number - 1]["image"] for number in ids}


def test_xvlm_lines_are_spread_over_files_and_boxes_lie_inside(folder: Path, records: list[dict]) -> None:
    for split in ("train", "val", "test"):
        chosen = [record for record in records if record["split"] == split]
        files = sorted((folder / "xvlm" / f"images_{split}").iterdir())
        assert len(files) == min(8, len(chosen))
        lines = read_lines(*files)
        assert lines == [
            {"caption": record["captions"], "image_rpath": record["image"], "kwords": record["concepts"]}
            for record in chosen
        ]
        regions = read_lines(*sorted((folder / "xvlm" / f"regions_{split}").iterdir()))
        assert [line["image_rpath"] for line in regions] == [record["image"] for record in chosen]
        for line, record in zip(regions, chosen, strict=True):
            assert line["caption"] == record["captions"]
            objects = [e for e in line["elems"] if "attributes" in e]
            assert [e["bb"] for e in objects] == [thing["bbox"] for thing in record["objects"]]
            assert [e["caption"] for e in objects] == [thing["kind"] for thing in record["objects"]]
            assert len(line["elems"]) == len(objects) + len(record["phrases"])
            for elem in line["elems"]:
                x, y, width, height = elem["bb"]
                assert min(x, y) >= 0 < min(width, height)
                assert max(x + width, y + height) <= SIZE


def test_vocabulary_holds_every_word_and_spells_the_rest(folder: Path, records: list[dict]) -> None:
    from tokenizers import BertWordPieceTokenizer

    tokens = (folder / "vocab.txt").read_text().splitlines()
    assert tokens == list(shapes.vocabulary())
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(tokens)) == len(tokens)
    tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    for index in range(250):
        texts = shapes.annotate(shapes.draw(9, index, size=32))
        lines = [
            *texts.captions,
            texts.long_caption,
            *(p.text for p in texts.phrases),
            *(e.text for e in texts.expressions),
        ]
        lines += [q.text for q in texts.questions] + [a for q in texts.questions for a in q.answers]
        lines += [h.text for h in texts.hypotheses]
        for line in lines:
            pieces = tokenizer.encode(line).tokens
            assert "[UNK]" not in pieces
            assert not any(piece.startswith("##") for piece in pieces), (line, pieces)
    sentences = [pair["sentence"] for record in records for pair in record["pairs"]]
    assert not any(
        "##" in piece or piece == "[UNK]" for s in sentences for piece in tokenizer.encode(s).tokens
    )
    for strange in ("Zebra-crossing at 07:45, isn't it?", "x" * 90, "`~!@#$%^&*()_+-=[]{}|;':\",./<>?"):
        encoded = tokenizer.encode(strange).tokens
        assert "[UNK]" not in encoded


def test_verify_names_what_changed(tmp_path: Path) -> None:
    root = shapes.write(tmp_path / "data", images=4, size=32)
    assert shapes.verify(root) == []
    image = root / "images" / "000000000002.png"
    image.write_bytes(image.read_bytes()[:-1])
    (root / "vocab.txt").unlink()
    assert shapes.verify(root) == [
        "images/000000000002.png: changed since it was written",
        "vocab.txt: missing",
    ]
    with pytest.raises(ValueError, match=r"manifest\.json not found"):
        shapes.verify(tmp_path)


def test_result_does_not_depend_on_workers(folder: Path, tmp_path: Path) -> None:
    other = shapes.write(tmp_path / "data", images=IMAGES, seed=SEED, size=SIZE, val=5, test=4, workers=2)
    assert (other / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_content_hash_is_that_of_pixels_and_records(folder: Path, records: list[dict]) -> None:
    digest = hashlib.sha256()
    for record in records:
        digest.update(hashlib.sha256(shapes.draw(SEED, record["index"], size=SIZE).image.tobytes()).digest())
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode())
    assert read(folder / "manifest.json")["content"] == digest.hexdigest()


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    shapes.ensure(tmp_path / "link", images=3, size=32)
    assert shapes.verify(tmp_path / "real") == []
    assert (tmp_path / "link").is_symlink()


def test_urls_are_refused() -> None:
    with pytest.raises(ValueError, match="memory://shapes is a URL"):
        shapes.ensure("memory://shapes", images=3)


def test_write_refuses_a_folder_with_content(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        shapes.write(tmp_path, images=3)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 2}, "each split needs at least one scene"),
        ({"images": 10, "val": 0}, "val=0"),
        ({"images": 10, "val": 5, "test": 5}, "train=0"),
        ({"images": 10, "size": 8}, "size=8"),
        ({"images": 10, "seed": -3}, "seed=-3"),
        ({"images": 10, "workers": 0}, "workers=0"),
    ],
)
def test_impossible_arguments_are_named_and_leave_nothing(
    tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    for function in (shapes.write, shapes.ensure):
        with pytest.raises(ValueError, match=message):
            function(tmp_path / "data", **arguments)
    assert not (tmp_path / "data").exists()


def test_ensure_writes_once_and_refuses_other_parameters(tmp_path: Path) -> None:
    root = shapes.ensure(tmp_path / "data", images=5, seed=1, size=32)
    before = (root / "manifest.json").stat().st_mtime_ns
    assert shapes.ensure(tmp_path / "data", images=5, seed=1, size=32) == root
    assert (root / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="seed is 1, wanted 2"):
        shapes.ensure(root, images=5, seed=2, size=32)
    with pytest.raises(ValueError, match="splits is"):
        shapes.ensure(root, images=6, seed=1, size=32)
    with pytest.raises(ValueError, match="difficulty is full, wanted easy"):
        shapes.ensure(root, images=5, seed=1, size=32, difficulty="easy")
    (root / "images" / "000000000003.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its files, first images/000000000003\.png"):
        shapes.ensure(root, images=5, seed=1, size=32)


def test_a_folder_without_a_difficulty_is_a_full_world(tmp_path: Path) -> None:
    root = shapes.ensure(tmp_path / "data", images=3, size=32)
    manifest = read(root / "manifest.json")
    del manifest["parameters"]["difficulty"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert shapes.ensure(root, images=3, size=32) == root
    with pytest.raises(ValueError, match="difficulty is full, wanted easy"):
        shapes.ensure(root, images=3, size=32, difficulty="easy")


def test_ensure_refuses_what_is_not_its_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a shapes folder"):
        shapes.ensure(tmp_path, images=5)
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match="not the manifest of a shapes folder"):
        shapes.ensure(tmp_path, images=5)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        shapes.ensure(tmp_path, images=5)


def test_a_folder_of_an_older_version_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shapes.ensure(tmp_path / "data", images=3, size=32)
    (root / "vocab.txt").write_text("old")
    monkeypatch.setattr(world, "VERSION", world.VERSION + 1)
    with pytest.raises(ValueError, match="splits is"):  # another world is never replaced
        shapes.ensure(root, images=4, size=32)
    assert shapes.ensure(root, images=3, size=32) == root
    assert read(root / "manifest.json")["parameters"]["version"] == world.VERSION
    assert shapes.verify(root) == []


def test_what_is_not_ours_is_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shapes.ensure(tmp_path / "data", images=3, size=32)
    (root / "images" / "notes.txt").write_text("mine")
    before = sorted(path.stat().st_ino for path in root.rglob("*"))
    monkeypatch.setattr(world, "VERSION", world.VERSION + 1)
    with pytest.raises(
        ValueError, match=r"1 files of somebody else, first images/notes\.txt; move them away"
    ):
        shapes.ensure(root, images=3, size=32)
    assert sorted(path.stat().st_ino for path in root.rglob("*")) == before


def test_ensure_refuses_a_newer_format_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shapes.ensure(tmp_path / "data", images=3, size=32)
    monkeypatch.setattr(world, "VERSION", world.VERSION - 1)
    with pytest.raises(ValueError, match=f"version is {world.VERSION + 1}, wanted {world.VERSION}"):
        shapes.ensure(root, images=3, size=32)


def ensure_and_tell(path: Path, start, results) -> None:
    start.wait()
    shapes.ensure(path, images=20, size=32)
    results.put((path / "manifest.json").stat().st_ino)


def test_processes_that_ensure_at_once_get_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    ranks = [
        context.Process(target=ensure_and_tell, args=(tmp_path / "data", start, results)) for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    start.set()
    nodes = {results.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert len(nodes) == 1
    assert shapes.verify(tmp_path / "data") == []
    assert not list(tmp_path.glob(".data.writing-*"))


def test_a_killed_writer_leaves_no_folder_and_blocks_nobody(tmp_path: Path) -> None:
    code = "import sys; from vlp_data import shapes; shapes.ensure(sys.argv[1], images=4000, size=32)"
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data")])
    end = time.monotonic() + 30
    while not list(tmp_path.glob(".data.writing-*/images/*")) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert not (tmp_path / "data").exists()
    assert list(tmp_path.glob(".data.writing-*"))
    shapes.ensure(tmp_path / "data", images=3, size=32)
    assert shapes.verify(tmp_path / "data") == []
    assert not list(tmp_path.glob(".data.writing-*"))


def test_a_failed_write_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(done: int, total: int) -> None:
        if done == 2:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        shapes.write(tmp_path / "data", images=3, size=32, progress=fail)
    assert not (tmp_path / "data").exists()
    assert not list(tmp_path.glob(".data.writing-*"))


def test_progress_counts_every_scene(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    shapes.write(
        tmp_path / "data", images=4, size=32, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_sheet_shows_the_images(folder: Path, tmp_path: Path) -> None:
    plain, boxed = tmp_path / "plain.png", tmp_path / "boxed.png"
    assert sheet(folder, plain, first=3) == 3
    assert sheet(folder, boxed, first=9, split="test", boxes=True) == 4
    with Image.open(plain) as page:
        # The first cell is the first image, six times as large.
        shown = np.asarray(page)[12 : 12 + 288, 12 : 12 + 288]
    assert np.array_equal(shown[::6, ::6], shapes.draw(SEED, 0, size=SIZE).image)
    with pytest.raises(ValueError, match="no scene to show"):
        sheet(folder, plain, first=0)
    with pytest.raises(ValueError, match=r"annotations\.jsonl not found"):
        sheet(tmp_path, plain)
