"""What decoding makes of the odd files that real collections hold."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageFile
from vlp_data.errors import BadSample
from vlp_data.images import decode, open_image
from vlp_data.schema import Image


def save(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture
def image():
    y, x = np.mgrid[0:24, 0:32]
    return Pillow.fromarray(np.stack([x * 8, y * 10, (x + y) * 4], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_pixels_are_those_of_opencv_too(image, mode, progressive):
    data = save(image.convert(mode), "JPEG", progressive=progressive)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    expected = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)[..., ::-1]
    np.testing.assert_array_equal(np.asarray(decode(data)), expected)


def test_cmyk_jpeg_becomes_rgb(image):
    got = decode(save(image.convert("CMYK"), "JPEG", quality=95))
    assert got.mode == "RGB"
    assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).mean() < 6


def test_exif_orientation_does_not_rotate(image):
    exif = Pillow.Exif()
    exif[0x0112] = 6
    assert decode(save(image, "JPEG", exif=exif)).size == (32, 24)


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "BMP"])
def test_other_formats(image, form):
    got = decode(save(image, form, **({"lossless": True} if form == "WEBP" else {})))
    assert got.mode == "RGB" and got.size == image.size
    if form != "GIF":
        np.testing.assert_array_equal(np.asarray(got), np.asarray(image))


def test_alpha_and_palettes_lose_their_transparency(image):
    with_alpha = image.convert("RGBA")
    with_alpha.putalpha(100)
    np.testing.assert_array_equal(np.asarray(decode(save(with_alpha, "PNG"))), np.asarray(image))
    palette = image.quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    for transparency in (3, bytes([0, 128, 255])):
        got = decode(save(palette, "PNG", transparency=transparency))
        np.testing.assert_array_equal(np.asarray(got), colours)


def test_sixteen_bits_keep_their_range():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    data = save(Pillow.fromarray(values), "PNG")
    np.testing.assert_array_equal(np.asarray(decode(data))[..., 0], values >> 8)


@pytest.mark.parametrize(
    ("data", "cause"),
    [(b"", "empty image"), (b"<html>404</html>", "not an image"), (b"\xff\xd8\xff\xe0short", "not an image")],
)
def test_what_is_no_image(data, cause):
    with pytest.raises(BadSample) as error:
        decode(data, name="x.jpg")
    assert error.value.cause == cause and error.value.file == "x.jpg"


def test_truncated_jpeg_is_refused_or_filled_with_grey(image):
    data = save(image.resize((256, 256)), "JPEG")
    half = data[: len(data) // 2]
    with pytest.raises(BadSample, match="broken image"):
        decode(half)
    filled = np.asarray(decode(half, truncated=True))
    np.testing.assert_array_equal(filled[:32], np.asarray(decode(data))[:32])
    assert (filled[-1] == 128).all()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(BadSample, match="broken image"):
        decode(half)


def test_pixel_limit(image):
    with pytest.raises(BadSample, match="image too large: x: 32 x 24 pixels, the limit is 700"):
        decode(save(image, "PNG"), name="x", max_pixels=700)


def test_decompression_bombs_are_bad_samples(image, monkeypatch):
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample, match="image too large"):
        decode(save(image, "PNG"))


def test_images_by_path_bytes_and_array(image, tmp_path):
    (tmp_path / "really_a_png.jpg").write_bytes(save(image, "PNG"))
    by_path = open_image(Image(path=str(tmp_path / "really_a_png.jpg")))
    by_bytes = open_image(Image(data=save(image, "PNG")))
    array = np.asarray(image)
    for got in (
        by_path,
        by_bytes,
        open_image(Image(array=array)),
        open_image(Image(array=array.transpose(2, 0, 1))),
    ):
        np.testing.assert_array_equal(np.asarray(got), array)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(BadSample) as error:
        open_image(Image(path=str(tmp_path / "gone.jpg")), "row 3")
    assert (error.value.cause, error.value.file) == ("missing file", str(tmp_path / "gone.jpg"))
    with pytest.raises(BadSample) as error:
        open_image(Image(data=b""), "row 3")
    assert (error.value.cause, error.value.file) == ("empty image", "row 3")
