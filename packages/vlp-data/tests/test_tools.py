"""`vlp-data inspect` and what it is made of."""

import json
import re
from collections import Counter

import pytest
from vlp_data.cli import main
from vlp_data.errors import DataError
from vlp_data.examples import ImageTextExamples
from vlp_data.loader import Loader
from vlp_data.options import ImageTextLines, Squash, TextOptions
from vlp_data.sources.given import detect, source_options
from vlp_data.tools import inspect, plan


def test_formats_are_told_by_content(tmp_path, region_line):
    coco = {"images": [], "annotations": []}
    contents = {
        "xvlm_images": '{"caption": "a", "image_rpath": "a.jpg"}\n{"caption": "b", "binary": "x"}\n',
        "xvlm_regions": region_line() + "\n" + region_line(1),
        "task_json": json.dumps([{"image": "a.jpg", "caption": "a"}], indent=1),
        "coco_captions": json.dumps(coco),
        "coco_instances": json.dumps({**coco, "categories": []}, indent=1),
        "karpathy": json.dumps({"images": [], "dataset": "coco"}),
    }
    for format, content in contents.items():
        (tmp_path / "file").write_text(content)
        assert detect((str(tmp_path),)) == format
    for content, message in (("hello", "neither JSON nor lines"), ('{"a": 1}', "none of the formats")):
        (tmp_path / "file").write_text(content)
        with pytest.raises(DataError, match=message):
            detect((str(tmp_path),))


def test_real_files_are_told_and_opened(shared_data):
    images = shared_data / "coco-mini"
    for path, root, rows in (
        ("formats/xvlm_jsonl/images_rpath", images, None),
        ("formats/xvlm_jsonl/regions_binary", images, None),
        ("formats/albef_json/coco_test.json", images, None),
        ("coco-mini/annotations/captions.json", images / "images", 3),
        ("coco-mini/annotations/instances.json", images / "images", 3),
        ("coco-mini/annotations/dataset_karpathy_style.json", images, 3),
    ):
        source = source_options((str(shared_data / path),), root=str(root)).open()
        report = inspect(source, rows=rows)
        assert report.usable == report.rows == (rows or len(source)) and not report.counts


def test_inspect_command_reports_what_cannot_be_used(image_lines, capsys):
    arguments = ["inspect", str(image_lines / "lines"), "--root", str(image_lines)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "rows looked at: 24, usable: 24" in out and "texts: 48 caption" in out and "up to  128 px" in out
    (image_lines / "images" / "03.jpg").unlink()
    (image_lines / "lines" / "part-1").write_text('\n{"caption": " ", "image_rpath": "images/08.jpg"}\n')
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "rows looked at: 18, usable: 16" in out
    assert f"missing file: 1 ({image_lines / 'images' / '03.jpg'})" in out
    assert f"empty line: 1 ({image_lines / 'lines' / 'part-1'}:1)" in out
    assert "empty text: 1" in out
    assert main([*arguments, "--rows", "2", "--no-images"]) == 0
    assert "rows looked at: 2" in capsys.readouterr().out


def test_boxes_outside_are_counted_one_by_one(tmp_path, region_line):
    elems = [{"caption": "a", "bb": box} for box in ([0, 0, 60, 40], [50, 0, 11, 5], [0, 0, 5, 0])]
    (tmp_path / "a").write_text(region_line(elems=elems) + "\n" + region_line() + "\n")
    report = inspect(source_options((str(tmp_path),)).open())
    assert (report.usable, report.regions, report.counts["box outside the image"]) == (2, 6, 2)


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    for arguments, message in (
        ([str(tmp_path / "gone")], "gone not found"),
        ([str(tmp_path / "a.json"), str(tmp_path / "a.json")], "coco_instances takes one file, got 2"),
        (
            [str(tmp_path / "a.json"), "--format", "karpathy", "--split", "all"],
            "split of format karpathy: 'all' is not one of train, restval",
        ),
        ([str(tmp_path / "a.json")], "no image with regions"),
    ):
        assert main(["inspect", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("order", ["shuffled", "files"])
def test_the_plan_says_what_the_loader_reads(image_lines, tokenizer, world, order):
    source = ImageTextLines(files=(str(image_lines / "lines"),), root=str(image_lines), order=order).open()
    parts = plan(source, global_batch=2 * world, world=world, workers=2, seed=3, epoch=1)
    assert [(p.rank, p.worker) for p in parts] == [(r, w) for r in range(world) for w in range(2)]
    assert sum(part.samples for part in parts) == 24
    assert all(sum(part.files.values()) == part.samples for part in parts)
    examples = ImageTextExamples(
        source=source, tokenizer=tokenizer, image=Squash(size=32), text=TextOptions(max_tokens=8)
    )
    for rank in range(world):
        with Loader(examples, global_batch=2 * world, seed=3, rank=rank, world=world) as loader:
            keys = [key for _ in range(24 // world) for key in next(loader).keys][24 // world :]
        files = Counter(key.rsplit(":", 1)[0] for key in keys)
        assert files == sum((Counter(p.files) for p in parts if p.rank == rank), Counter())


def test_the_plan_from_the_command_line(image_lines, capsys):
    arguments = ["plan", str(image_lines / "lines"), "--batch", "5", "--order", "files", "--workers", "2"]
    assert main([*arguments, "--epoch", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"rank 0 worker 0: 1\d lines \(part-\d: \d, part-\d: \d, part-\d: \d\)", lines[0])
    assert lines[-1] == "together: 24 of 24 lines, none twice"
    assert main([*arguments, "--ranks", "2"]) == 2
    assert "5 must be a positive multiple of the 2 ranks" in capsys.readouterr().err
