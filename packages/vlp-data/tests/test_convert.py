"""COCO and Visual Genome to region lines, without the images of test sets."""

import json

import pytest
from vlp_data.cli import main
from vlp_data.convert import held_out, write_region_lines
from vlp_data.errors import DataError
from vlp_data.options import CocoInstances, RegionLines, VisualGenome


def put(path, content):
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def coco(tmp_path):
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 60, "height": 40} for n in range(1, 7)]
    annotations = [
        {"id": 10 * n, "image_id": n, "category_id": 7, "bbox": [n + 0.7, 2.2, 10.5, 20]} for n in range(1, 7)
    ]
    annotations += [
        {"id": 91, "image_id": 1, "category_id": 8, "bbox": [50, 30, 30, 30]},
        {"id": 92, "image_id": 1, "category_id": 8, "bbox": [59.2, 30, 0.5, 5]},
    ]
    captions = [{"id": n, "image_id": n, "caption": f"Image {n}."} for n in (1, 2)]
    put(tmp_path / "captions.json", {"images": images, "annotations": captions})
    categories = [{"id": 7, "name": "dog"}, {"id": 8, "name": "traffic light"}]
    put(tmp_path / "instances.json", {"images": images, "annotations": annotations, "categories": categories})
    return tmp_path


@pytest.fixture
def genome(tmp_path):
    base = "https://cs.stanford.edu/people/rak248/"
    data = [
        {
            "image_id": 1,
            "width": 100,
            "height": 50,
            "url": f"{base}VG_100K_2/1.jpg",
            "coco_id": 42,
            "flickr_id": None,
        },
        {
            "image_id": 2,
            "width": 100,
            "height": 50,
            "url": f"{base}VG_100K/2.jpg",
            "coco_id": None,
            "flickr_id": 77,
        },
        {
            "image_id": 3,
            "width": 100,
            "height": 50,
            "url": f"{base}VG_100K/3.jpg",
            "coco_id": None,
            "flickr_id": 78,
        },
    ]
    put(tmp_path / "image_data.json", data)
    objects = [
        {"object_id": 5, "x": -3, "y": 4, "w": 20, "h": 60, "names": ["clock ", "wall clock"]},
        {"object_id": 6, "x": 120, "y": 4, "w": 20, "h": 5, "names": ["lost"]},
        {"object_id": 7, "x": 1, "y": 4, "w": 2, "h": 5, "names": [" "]},
    ]
    plain = {"object_id": 8, "x": 1, "y": 2, "w": 3, "h": 4, "names": ["tree"]}
    put(
        tmp_path / "objects.json",
        [
            {"image_id": 1, "objects": objects},
            {"image_id": 2, "objects": [plain]},
            {"image_id": 3, "objects": []},
        ],
    )
    attributed = [{**plain, "attributes": [" green", "tall"]}, {**plain, "object_id": 9}]
    put(tmp_path / "attributes.json", [{"image_id": 3, "attributes": attributed}])
    region = {
        "region_id": 4,
        "image_id": 2,
        "x": 1,
        "y": 2,
        "width": 30,
        "height": 40,
        "phrase": "a tall tree",
    }
    put(tmp_path / "region_descriptions.json", [{"id": 2, "regions": [region]}])
    return tmp_path


def lines_of(folder):
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def test_coco_becomes_region_lines(coco, capsys):
    held = put(coco / "test.json", [{"image": "val2014/COCO_val2014_000000000005.jpg", "caption": ["a"]}])
    karpathy = [
        {"filename": "COCO_val2014_000000000003.jpg", "split": "val"},
        {"filename": "COCO_val2014_000000000004.jpg", "split": "restval"},
    ]
    kept = put(coco / "karpathy.json", {"images": karpathy})
    out = coco / "out"
    arguments = [
        "convert",
        "coco",
        str(coco / "instances.json"),
        str(out),
        "--files",
        "2",
        "--images",
        "train2014",
    ]
    assert main([*arguments, "--captions", str(coco / "captions.json"), "--exclude", held, kept]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{out}: 5 boxes of 4 images in 2 files"
    assert "boxes of less than a pixel: 1" in printed
    assert "images held out (coco): 2" in printed
    lines = lines_of(out)
    assert [line["image_rpath"] for line in lines] == [f"train2014/{n:012d}.jpg" for n in (1, 2, 4, 6)]
    assert [line.get("caption") for line in lines] == [["Image 1."], ["Image 2."], None, None]
    assert lines[0]["elems"] == [
        {"caption": "dog", "bb": [1, 2, 11, 20]},
        {"caption": "traffic light", "bb": [50, 30, 10, 10]},
    ]
    again = coco / "again"
    main(
        [
            *arguments[:3],
            str(again),
            *arguments[4:],
            "--captions",
            str(coco / "captions.json"),
            "--exclude",
            held,
            kept,
        ]
    )
    assert [p.read_bytes() for p in sorted(out.iterdir())] == [
        p.read_bytes() for p in sorted(again.iterdir())
    ]
    source = RegionLines(files=(str(out),), root="/images").open()
    assert source[0].images[0].path == "/images/train2014/000000000001.jpg"
    assert source[0].regions[1].box == (50, 30, 60, 40)


def test_visual_genome_rows(genome):
    paths = {
        "image_data": str(genome / "image_data.json"),
        "images": "/vg",
        "image_name": "{folder}/{id}.jpg",
    }
    source = VisualGenome(annotations=str(genome / "objects.json"), **paths).open()
    assert len(source) == 2
    sample = source[0]
    assert sample.images[0].path == "/vg/VG_100K_2/1.jpg" and sample.images[0].size == (100, 50)
    assert [(t.text, t.role, t.listed) for t in sample.texts] == [
        ("clock", "region", True),
        ("wall clock", "region", True),
    ]
    assert [(r.box, r.texts, r.attributes) for r in sample.regions] == [((0, 4, 17, 50), (0, 1), "")]
    assert source.describe()["notes"] == {
        "boxes cut to the image": 1,
        "boxes with nothing in the image": 1,
        "boxes without a name": 1,
        "images without a box": 1,
    }
    attributed = VisualGenome(annotations=str(genome / "attributes.json"), **paths).open()[0]
    assert [r.attributes for r in attributed.regions] == [("green", "tall"), ""]
    described = VisualGenome(annotations=str(genome / "region_descriptions.json"), **paths).open()[0]
    assert described.texts[0].text == "a tall tree" and described.regions[0].box == (1, 2, 31, 42)


def test_lines_state_the_size_that_their_boxes_belong_to(coco):
    assert main(["convert", "coco", str(coco / "instances.json"), str(coco / "out"), "--files", "1"]) == 0
    source = RegionLines(files=(str(coco / "out"),)).open()
    stated = CocoInstances(annotations=str(coco / "instances.json"), images="").open()
    sizes = {stated[n].images[0].id: stated[n].images[0].size for n in range(len(stated))}
    assert len(source) and all(
        source[n].images[0].size == sizes[int(source[n].images[0].id)] for n in range(len(source))
    )


def test_paths_that_cannot_be_used_are_left_out_and_counted(coco, capsys):
    content = json.loads((coco / "instances.json").read_text())
    content["images"][0]["file_name"] = "reference://::x"
    put(coco / "instances.json", content)
    assert main(["convert", "coco", str(coco / "instances.json"), str(coco / "out"), "--files", "1"]) == 0
    assert "images left out: path cannot be used: 1" in capsys.readouterr().out.splitlines()


def test_visual_genome_becomes_region_lines_without_held_out_images(genome, capsys):
    coco = put(genome / "coco.json", [{"image": "COCO_val2014_000000000042.jpg"}])
    flickr = put(genome / "flickr.json", [{"image": "flickr30k-images/77.jpg"}])
    common = ["--image-data", str(genome / "image_data.json"), "--files", "1"]
    out = genome / "out"
    arguments = ["convert", "vg", str(genome / "attributes.json"), str(out), *common]
    assert main([*arguments, "--exclude", coco, "--exclude-flickr", flickr]) == 0
    assert lines_of(out) == [
        {
            "elems": [
                {"caption": "tree", "attributes": ["green", "tall"], "bb": [1, 2, 3, 4]},
                {"caption": "tree", "bb": [1, 2, 3, 4]},
            ],
            "image_rpath": "image/3.jpg",
            "width": 100,
            "height": 50,
        }
    ]
    capsys.readouterr()
    arguments = ["convert", "vg", str(genome / "objects.json"), str(genome / "none"), *common]
    assert main([*arguments, "--exclude", coco, "--exclude-flickr", flickr]) == 2
    assert "0 lines cannot fill 1 files" in capsys.readouterr().err
    assert not (genome / "none").exists()


def test_numbers_of_held_out_images(tmp_path):
    pairs = put(tmp_path / "nlvr.json", [{"images": ["dev/dev-850-0-img7.png", "x/000009.jpg"]}])
    whole = put(tmp_path / "val.json", {"images": [{"id": 3, "file_name": "000000000005.jpg"}]})
    assert held_out([pairs, whole]) == {7, 9, 5}
    assert held_out([]) == set()
    with pytest.raises(DataError, match=r"a\.json: entry 0: the image 'cat\.jpg' has no number"):
        held_out([put(tmp_path / "a.json", [{"image": "cat.jpg"}])])
    with pytest.raises(DataError, match="neither a list of entries nor an annotation file"):
        held_out([put(tmp_path / "b.json", {"rows": []})])


def test_conversions_refuse_what_they_cannot_do(coco, genome):
    source = CocoInstances(annotations=str(coco / "instances.json"), images="").open()
    (coco / "full").mkdir()
    (coco / "full" / "a").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_region_lines(source, str(coco / "full"))
    with pytest.raises(ValueError, match="shards=0 must be positive"):
        write_region_lines(source, str(coco / "new"), shards=0)
    with pytest.raises(DataError, match="6 lines cannot fill 7 files"):
        write_region_lines(source, str(coco / "new"), shards=7)
    assert not (coco / "new").exists()
    strange = put(genome / "strange.json", [{"image_id": 1, "words": []}])
    with pytest.raises(DataError, match="none of the fields objects, attributes, regions"):
        VisualGenome(annotations=strange, image_data=str(genome / "image_data.json")).open()
    lost = put(genome / "lost.json", [{"image_id": 9, "objects": []}])
    with pytest.raises(DataError, match=r"image 9 is not in .*image_data\.json"):
        VisualGenome(annotations=lost, image_data=str(genome / "image_data.json")).open()


def test_refs_from_the_command_line(tmp_path, capsys):
    import pickle

    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([{"ref_id": 1}], protocol=2))
    assert main(["convert", "refer", str(tmp_path / "refs(unc).p"), str(tmp_path / "refs.json")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'refs.json'}: 1 references\n"
    assert json.loads((tmp_path / "refs.json").read_text()) == [{"ref_id": 1}]


def test_real_coco_becomes_region_lines(shared_data, tmp_path):
    folder = shared_data / "coco-mini"
    source = CocoInstances(annotations=str(folder / "annotations" / "instances.json"), images="images").open()
    done = write_region_lines(source, str(tmp_path / "out"), shards=3)
    lines = RegionLines(files=(str(tmp_path / "out"),), root=str(folder)).open()
    assert len(lines) == len(source) == done.images
    for number in range(len(source)):
        sample, line = source[number], lines[number]
        assert line.images[0].path == str(folder / sample.images[0].path)
        assert len(line.regions) == len(sample.regions)
        for region, given in zip(line.regions, sample.regions, strict=True):
            assert all(0 <= a - b < 2 for a, b in zip(given.box, region.box, strict=True))
