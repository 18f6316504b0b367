"""Decoding. Pillow decides what an image is, whatever the name of the file says.

No rotation by EXIF: boxes refer to the stored pixels. Source: data specification 4.
"""

import io
import threading

import numpy as np
from PIL import Image as Pillow
from PIL import ImageFile

from vlp_data import files
from vlp_data.errors import BadSample
from vlp_data.schema import Image

MAX_PIXELS = 128_000_000

_tolerant = threading.Lock()


def decode(
    data: bytes, *, name: str = "", truncated: bool = False, max_pixels: int = MAX_PIXELS
) -> Pillow.Image:
    """Encoded image to RGB.

    `name` is what messages call it. `truncated`: a file that ends early is filled with grey instead of
    refused. Raises BadSample: "empty image", "not an image", "broken image", "image too large".
    """
    if not data:
        raise BadSample("empty image", name, "no bytes")
    try:
        image = Pillow.open(io.BytesIO(data))
    except Pillow.DecompressionBombError as error:
        raise BadSample("image too large", name, str(error)) from error
    except Pillow.UnidentifiedImageError as error:
        # Pillow's message names the stream by its address, which differs from run to run.
        raise BadSample("not an image", name, "no known format") from error
    except Exception as error:  # Pillow's format plugins raise nearly anything on damaged headers
        raise BadSample("not an image", name, f"{type(error).__name__}: {error}"[:300]) from error
    if image.width * image.height > max_pixels:
        raise BadSample(
            "image too large", name, f"{image.width} x {image.height} pixels, the limit is {max_pixels}"
        )
    try:
        image.load()
    except Exception as error:
        if not (truncated and isinstance(error, OSError)):
            raise BadSample("broken image", name, f"{type(error).__name__}: {error}"[:300]) from error
        image = _load_truncated(data, name)
    return _to_rgb(image)


def _load_truncated(data: bytes, name: str) -> Pillow.Image:
    # Pillow has a process-wide switch only; it is on for this one image.
    with _tolerant:
        ImageFile.LOAD_TRUNCATED_IMAGES = True  # pyrefly: ignore[bad-assignment]  Pillow declares no type, so it counts as constant
        try:
            image = Pillow.open(io.BytesIO(data))
            image.load()
        except Exception as error:
            raise BadSample("broken image", name, f"{type(error).__name__}: {error}"[:300]) from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
    return image


def _to_rgb(image: Pillow.Image) -> Pillow.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # 16 bits: keep the high byte; a plain conversion would clip instead
        return Pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # same colours as the direct way, which warns
    return image.convert("RGB")


def name_of(image: Image, key: str) -> str:
    """What to call an image in a message: its path, or the key of its sample."""
    return image.path or key


def open_image(
    image: Image, key: str = "", *, truncated: bool = False, max_pixels: int = MAX_PIXELS
) -> Pillow.Image:
    """Pixels of an image of the schema, RGB.

    Raises BadSample as `decode` does, and "missing file" or "unreadable file".
    """
    if image.array is not None:
        array = image.array
        if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
            array = array.transpose(1, 2, 0)
        return _to_rgb(Pillow.fromarray(np.ascontiguousarray(array)))
    name = name_of(image, key)
    if image.data is not None:
        return decode(image.data, name=name, truncated=truncated, max_pixels=max_pixels)
    if image.path is None:
        raise BadSample("no image", name, "neither bytes, path nor array")
    try:
        data = files.read(image.path)
    except FileNotFoundError as error:
        raise BadSample("missing file", name, "not found") from error
    except OSError as error:
        raise BadSample("unreadable file", name, f"{type(error).__name__}: {error}"[:300]) from error
    return decode(data, name=name, truncated=truncated, max_pixels=max_pixels)
