"""Nothing of a file is executed, nothing is started, nothing hangs, and messages hold neither keys nor
characters that steer a terminal."""

import io
import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image as Pillow
from vlp_data import files, images
from vlp_data.cli import main
from vlp_data.concepts.embed import ImageFiles, encode_images
from vlp_data.concepts.encoders import Encoder
from vlp_data.errors import BadSample, DataError, shown
from vlp_data.images import decode, open_image
from vlp_data.options import CocoCaptions, ImageTextLines, Karpathy, Refer, TaskJson
from vlp_data.paths import image_at
from vlp_data.schema import Image

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\nshowpage\n%%EOF\n"


def png(mode="RGB", size=(6, 4)):
    stream = io.BytesIO()
    Pillow.new(mode, size).save(stream, "PNG")
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    "path",
    [
        "reference://::list.json",
        "zip://a.jpg::memory://x.zip",
        "simplecache::https://a/b.jpg",
        "filecache::memory://a.jpg",
        "https://a/b.jpg",
        "s3://bucket/a.jpg",
        "github://a:b@c/d.jpg",
        "nosuch://a",
        "REFERENCE://a",
        "://a",
        "a\0b.jpg",
        "a\ud83d.jpg",
    ],
)
def test_a_path_in_a_file_opens_no_more_than_this_machine(tmp_path, monkeypatch, path):
    opened = []
    monkeypatch.setattr(files, "_filesystem", opened.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.jsonl").write_text(json.dumps({"caption": "a", "image_rpath": path}) + "\n")
    source = ImageTextLines(files=("l.jsonl",)).open()
    with pytest.raises(BadSample, match="path cannot be used"):
        source[0]
    with pytest.raises(BadSample, match="path cannot be used"):
        open_image(Image(path=path))
    assert not opened


def test_schemes_that_a_source_lists_are_opened(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"image": "far://b/a.jpg", "caption": "a"}]))
    source = TaskJson(files=(str(tmp_path / "list.json"),), schemes=("far",)).open()
    assert (source[0].images[0].path, source[0].images[0].schemes) == ("far://b/a.jpg", ("far",))
    with pytest.raises(BadSample, match=r"far://b/a.jpg cannot be reached: Protocol not known"):
        open_image(source[0].images[0])
    assert image_at("a.jpg", root="far://b").path == "far://b/a.jpg"
    assert image_at("s3://b/a.jpg", root="s3://c").path == "s3://b/a.jpg"
    assert image_at("/x/a.jpg", prefixes={"/x": "far://b"}).path == "far://b/a.jpg"
    with pytest.raises(BadSample, match=r"far:// in data are opened only if the source allows it"):
        image_at("far://b/a.jpg")
    with pytest.raises(BadSample, match="a chain of URLs"):
        image_at("reference::x", root="far://b")
    with pytest.raises(BadSample, match="a chain of URLs"):
        image_at("reference://::x", schemes=("reference",))


def test_every_reader_asks(tmp_path):
    evil, root = "reference://::x", str(tmp_path)
    contents = {
        "t.json": [{"image": evil, "caption": "a"}],
        "c.json": {
            "images": [{"id": 1, "file_name": evil}],
            "annotations": [{"id": 1, "image_id": 1, "caption": "a"}],
        },
        "k.json": {"images": [{"filename": evil, "split": "train", "sentences": [{"raw": "a"}]}]},
        "r.json": [{"image": evil, "text": "a", "bbox": [1, 1, 2, 2]}],
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    for options in (
        TaskJson(files=(f"{root}/t.json",), root=root),
        CocoCaptions(annotations=f"{root}/c.json", images=root),
        Karpathy(annotations=f"{root}/k.json", images=root, split="train"),
        Refer(files=(f"{root}/r.json",), root=root),
    ):
        with pytest.raises(BadSample, match="a chain of URLs is never opened from data"):
            options.open()[0]


def test_concept_jobs_ask_too(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    encoder = Encoder(lambda _: np.ones(2), lambda views: np.ones((len(views), 2)), lambda _: np.zeros(0))
    keys = ["a.png", "reference://::x", "~nosuchuser/a.png", "a" * 400 + ".png", "nosuch://a", "b\0.png"]
    _, problems = encode_images(encoder, keys, ImageFiles(root=str(tmp_path), threads=1))
    assert problems[0] is None
    assert all(problem.startswith("path cannot be used: ") for problem in problems[1:])


# ----------------------------------------------------------------------------------------------- images


def test_postscript_starts_nothing(tmp_path, monkeypatch):
    def start(*_, **__):
        raise AssertionError("a program was started")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, start)
    with pytest.raises(BadSample, match=r"not an image: dog.jpg: none of the formats JPEG"):
        decode(POSTSCRIPT, name="dog.jpg")
    with pytest.raises(BadSample, match="not an image"):
        decode(POSTSCRIPT, name="dog.jpg", truncated=True)


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICO", "PCX", "TGA", "SGI", "MSP"])
def test_only_pictures_are_opened(form):
    stream = io.BytesIO()
    Pillow.new("1" if form == "MSP" else "RGB", (16, 16)).save(stream, form)
    with pytest.raises(BadSample, match="not an image"):
        decode(stream.getvalue())


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "linked pipe", "file URL"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "linked pipe":
        os.mkfifo(tmp_path / "p")
        path.symlink_to(tmp_path / "p")
    else:
        os.mkfifo(path)
    name = {"device": "/dev/zero", "file URL": f"file://{path}"}.get(kind, str(path))
    with pytest.raises(
        BadSample, match=r"path cannot be used: .* is no file but a folder, a pipe or a device"
    ):
        open_image(Image(path=name))


def test_files_that_are_too_long_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(BadSample, match=r"bytes, the limit is 10"):
        open_image(Image(path=str(tmp_path / "a.png")))


def test_dangling_links_and_long_names_are_one_line(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(BadSample, match="missing file"):
        open_image(Image(path=str(tmp_path / "a.jpg")))
    with pytest.raises(BadSample, match=r"path cannot be used: .*File name too long"):
        open_image(Image(path=str(tmp_path / ("a" * 300))))
    with pytest.raises(BadSample, match=r"path cannot be used: .*Write the folder in full"):
        open_image(Image(path="~nosuchuser/a.jpg"))


def test_the_limit_of_pixels_comes_before_decoding(monkeypatch):
    def load(_):
        raise AssertionError("decoded")

    data = png(size=(600, 400))
    monkeypatch.setattr(Pillow.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(BadSample, match="image too large: x: 600 x 400 pixels, the limit is 1000"):
        decode(data, name="x", max_pixels=1000)


# ---------------------------------------------------------------------------------------------- numbers


def encoded(values, form, **options):
    stream = io.BytesIO()
    Pillow.fromarray(values).save(stream, form, **options)
    return stream.getvalue()


RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def test_sixteen_bits_are_the_same_in_every_format():
    pgm = b"P5\n8 8\n65535\n" + RAMP.astype(">u2").tobytes()
    for data in (encoded(RAMP, "PNG"), encoded(RAMP, "TIFF"), pgm):
        np.testing.assert_array_equal(np.asarray(decode(data))[..., 0], RAMP >> 8)


def test_tiffs_with_0_for_white_are_turned_to_0_for_black():
    data = encoded(RAMP, "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(np.asarray(decode(data))[..., 0], 255 - (RAMP >> 8))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_without_a_range_are_refused(kind):
    for data in (encoded(RAMP.astype(kind), "TIFF"),):
        with pytest.raises(BadSample, match=r"pixels without a range: a\.tif"):
            decode(data, name="a.tif")
    with pytest.raises(BadSample, match="pixels without a range"):
        open_image(Image(array=RAMP.astype(kind)))


def test_signed_tiffs_and_float_maps_are_refused():
    data = bytearray(encoded(RAMP, "TIFF", tiffinfo={339: 2}))
    with pytest.raises(BadSample, match=r"pixels without a range|not an image"):
        decode(bytes(data))
    with pytest.raises(BadSample, match="pixels without a range"):
        decode(b"Pf\n2 1\n-1.0\n" + np.array([0.0, 1.0], "<f4").tobytes())


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2, 5), np.uint8), np.zeros((4,), np.uint8), np.zeros((2, 2), "U1")]
)
def test_arrays_that_are_no_images(array):
    with pytest.raises(BadSample, match="not an image"):
        open_image(Image(array=array), "k")


# --------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://KEY:SECRET@bucket/a", "s3://***@bucket/a"),
        ("no https://me@host/a?x=1&token=abc&y=2 there", "no https://***@host/a?x=1&token=***&y=2 there"),
        (
            "https://h/a?X-Amz-Signature=ab12&X-Amz-Credential=c",
            "https://h/a?X-Amz-Signature=***&X-Amz-Credential=***",
        ),
        ("a@b.c and /x@y/z", "a@b.c and /x@y/z"),
        ("red \x1b[31m", "red \\x1b[31m"),
        ("two\nlines\ttab", "two\\nlines\\ttab"),
        ("half \ud83d", "half \\ud83d"),
        ("turned \u202eback", "turned \\u202eback"),
        ("caf\u00e9 \u72ac", "caf\u00e9 \u72ac"),
    ],
)
def test_what_messages_show(text, expected):
    assert shown(text) == expected == shown(shown(text))
    assert str(DataError(text)) == expected
    error = BadSample("cause", text, text)
    assert (error.file, error.detail, str(error)) == (expected, expected, f"cause: {expected}: {expected}")


def test_names_and_keys_in_reports(tmp_path, capsys):
    name = "\x1b]0;title\x07.jpg"
    (tmp_path / "l.json").write_text(json.dumps([{"image": name, "caption": "a\x1b[2J"}]))
    assert main(["inspect", str(tmp_path / "l.json")]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b]0;title\\x07.jpg" in out
    assert main(["inspect", "nosuch://KEY:SECRET@bucket/a.json"]) == 2
    assert "SECRET" not in capsys.readouterr().err


def test_deep_json_is_an_error_in_words(tmp_path):
    (tmp_path / "d.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"d\.json is not JSON: it is nested too deeply"):
        TaskJson(files=(str(tmp_path / "d.json"),)).open()
    (tmp_path / "l.jsonl").write_text('{"caption": ' + "[" * 200_000 + "\n")
    with pytest.raises(BadSample, match=r"broken line: .*nested too deeply"):
        ImageTextLines(files=(str(tmp_path / "l.jsonl"),)).open()[0]
