"""Options of a source from files and words."""

import json
from pathlib import Path

import pytest
from vlp_data.cli import main
from vlp_data.errors import DataError
from vlp_data.options import CocoCaptions, ImageTextLines, Karpathy, Refer, TaskJson, VisualGenome
from vlp_data.sources import FORMATS, Format
from vlp_data.sources.given import detect, source_options


def test_files_root_and_split_go_to_the_fields_of_their_types():
    def made(format, *paths, **given):
        return source_options(paths, format=format, root="r", given=given)

    assert made("xvlm_images", "a", "b") == ImageTextLines(files=("a", "b"), root="r")
    assert made("coco_captions", "a") == CocoCaptions(annotations="a", images="r")
    assert made("karpathy", "a") == Karpathy(annotations="a", images="r", split="train")
    assert made("karpathy", "a", split="val") == Karpathy(annotations="a", images="r", split="val")
    assert made("visual_genome", "o", image_data="d") == VisualGenome(
        annotations="o", image_data="d", images="r"
    )
    with pytest.raises(DataError, match="root r has no effect: format coco_captions has no folder left"):
        made("coco_captions", "a", images="other")


def test_values_are_text_or_json():
    given = {"refs": "r.p", "instances": "i", "splits": "val,testA"}
    assert source_options(("a",), format="refer", given=given).splits == ("val", "testA")
    given = {"group_captions": "true", "dataset_roots": '{"vg": "x"}', "prefixes": "{}"}
    options = source_options(("a",), format="task_json", given=given)
    assert options == TaskJson(files=("a",), group_captions=True, dataset_roots={"vg": "x"})
    given = {"buffer": "7", "order": "files", "caption_keys": '["a,b", "c"]', "index": "5"}
    options = source_options(("a",), format="xvlm_images", given=given)
    assert isinstance(options, ImageTextLines)
    assert (options.buffer, options.order, options.index) == (7, "files", "5")
    assert source_options(("a",), format="refer") == Refer(files=("a",))


@pytest.mark.parametrize(
    ("format", "given", "message"),
    [
        ("coco", {}, "format 'coco' is not known; known: xvlm_images, "),
        ("visual_genome", {}, r"needs image_data, a path; give --option image_data=\.\.\."),
        ("task_json", {"rooot": "x"}, "has no option 'rooot'; it has files, root"),
        (
            "task_json",
            {"group_captions": "yes"},
            "group_captions of format task_json: 'yes' is not true or false",
        ),
        ("task_json", {"dataset_roots": "x"}, "'x' is not a JSON object"),
        ("xvlm_images", {"buffer": "1.5"}, "'1.5' is not int"),
        ("xvlm_images", {"order": "random"}, "'random' is not one of shuffled, files"),
        ("coco_captions", {"annotations": "a"}, "annotations of format coco_captions is given twice"),
    ],
)
def test_mistakes_name_format_and_field(format, given, message):
    with pytest.raises(DataError, match=message):
        source_options(("a",), format=format, given=given)


def test_a_file_that_several_formats_claim_needs_a_word(tmp_path, monkeypatch):
    other = Format(
        name="other",
        options="vlp_data.sources.coco:CocoCaptions",
        holds=("captions",),
        detect="vlp_data.sources.coco:is_captions",
    )
    known = {row.name: row for row in (*FORMATS, other)}
    monkeypatch.setattr("vlp_data.sources.given.formats", lambda: known)
    (tmp_path / "a.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(
        DataError, match=r"may be of the formats coco_captions, other; say which one \(--format\)"
    ):
        detect((str(tmp_path / "a.json"),))


def test_inspect_reads_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "objects.json": [{"image_id": 1, "objects": [{"x": 0, "y": 0, "w": 5, "h": 5, "names": ["a"]}]}],
        "data.json": [{"image_id": 1, "width": 9, "height": 9}],
        "vlue.json": [
            {"image": "a.jpg", "text": "it", "ref_id": 1, "bbox": [0, 0, 3, 3], "height": 9, "width": 9}
        ],
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    words = ["--format", "visual_genome", "--option", f"image_data={tmp_path}/data.json", "--no-images"]
    assert main(["inspect", str(tmp_path / "objects.json"), *words]) == 0
    assert "boxes: 1" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "vlue.json"), "--format", "refer", "--no-images"]) == 0
    assert "texts: 1 expression" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "vlue.json"), "--option", "splits"]) == 2
    assert capsys.readouterr().err == "vlp-data inspect: --option splits: expected KEY=VALUE\n"
