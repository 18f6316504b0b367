"""Decoding. Pillow decides what an image is, whatever the name of the file says, among the formats of
`FORMATS`: others start programs (EPS: Ghostscript), follow links or are no pictures.

EXIF orientation is read by nobody: an image is what is stored, and boxes refer to the stored pixels. An
annotation that was made on the turned image states a turned size, and its sample is refused
(`vlp_data.boxes`). 16 bits keep their high byte; integers of 32 bits, signed numbers and fractions have no
range that tells black from white, and are refused. Source: data specification 4.
"""

import errno
import functools
import io
import threading
from collections.abc import Sequence

import numpy as np
from PIL import Image as Pillow
from PIL import ImageFile

from vlp_data import files
from vlp_data.errors import BadSample, DataError
from vlp_data.schema import Image

MAX_PIXELS = 128_000_000
MAX_BYTES = 2**31
"""Longest file that is read as an image."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow calls the formats of pictures; PPM covers PBM and PGM."""

_tolerant = threading.Lock()
_ORIENTATION, _PHOTOMETRIC, _BITS = 0x0112, 262, 258


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow was built with."""
    Pillow.init()
    return tuple(name for name in FORMATS if name in Pillow.OPEN)


def decode(
    data: bytes, *, name: str = "", truncated: bool = False, max_pixels: int = MAX_PIXELS
) -> Pillow.Image:
    """Encoded image to RGB.

    `name` is what messages call it. `truncated`: a file that ends early is filled with grey instead of
    refused. Raises BadSample: "empty image", "not an image", "broken image", "image too large" (judged before
    a pixel is decoded), "pixels without a range".
    """
    if not data:
        raise BadSample("empty image", name, "no bytes")
    try:
        image = Pillow.open(io.BytesIO(data), formats=_formats())
    except Pillow.DecompressionBombError as error:
        raise BadSample("image too large", name, str(error)) from error
    except Pillow.UnidentifiedImageError as error:
        # Pillow's message names the stream by its address, which differs from run to run.
        raise BadSample("not an image", name, f"none of the formats {', '.join(FORMATS)}") from error
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
    return _to_rgb(image, name)


def _load_truncated(data: bytes, name: str) -> Pillow.Image:
    # Pillow has a process-wide switch only; it is on for this one image.
    with _tolerant:
        ImageFile.LOAD_TRUNCATED_IMAGES = True  # pyrefly: ignore[bad-assignment]  Pillow declares no type, so it counts as constant
        try:
            image = Pillow.open(io.BytesIO(data), formats=_formats())
            image.load()
        except Exception as error:
            raise BadSample("broken image", name, f"{type(error).__name__}: {error}"[:300]) from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
    return image


def _to_rgb(image: Pillow.Image, name: str) -> Pillow.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        kind = "integers of 32 bits or with a sign" if image.mode == "I" else "fractions"
        raise BadSample("pixels without a range", name, f"{kind}; write the image with 8 or 16 bits")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # same colours as the direct way, which warns
    try:
        return image.convert("RGB")
    except ValueError as error:  # LAB and other rare ones
        raise BadSample("not an image", name, f"mode {image.mode}: {error}") from error


def _from_16_bits(image: Pillow.Image) -> Pillow.Image:
    """The high byte; a plain conversion would clip instead. TIFF may use fewer bits, and 0 for white."""
    tags = getattr(image, "tag_v2", None) or {}
    bits = (*tags.get(_BITS, (16,)),)[0]
    values = np.asarray(image).astype(np.int32) >> (bits - 8)
    if tags.get(_PHOTOMETRIC) == 0:
        values = 255 - values
    return Pillow.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def is_turned(image: Pillow.Image) -> bool:
    """Whether EXIF says that the stored pixels are to be shown turned or mirrored, which no reader here
    does."""
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # as for headers
        return False


def name_of(image: Image, key: str) -> str:
    """What to call an image in a message: its path, or the key of its sample."""
    return image.path or key


def open_image(
    image: Image, key: str = "", *, truncated: bool = False, max_pixels: int = MAX_PIXELS
) -> Pillow.Image:
    """Pixels of an image of the schema, RGB.

    Raises BadSample as `decode` does, and "missing file", "unreadable file" (the storage failed; it may be
    back later), "path cannot be used" (a URL that its source does not allow, no path at all, no file).
    """
    name = name_of(image, key)
    if image.array is not None:
        return _of_array(image.array, name)
    if image.data is not None:
        return decode(image.data, name=name, truncated=truncated, max_pixels=max_pixels)
    if image.path is None:
        raise BadSample("no image", name, "neither bytes, path nor array")
    return decode(
        _read(image.path, image.schemes, name), name=name, truncated=truncated, max_pixels=max_pixels
    )


def _of_array(array: np.ndarray, name: str) -> Pillow.Image:
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3):
        raise BadSample("not an image", name, f"array of {array.ndim} axes")
    try:
        image = Pillow.fromarray(np.ascontiguousarray(array))
    except (TypeError, ValueError) as error:
        raise BadSample("not an image", name, f"array {array.shape} of {array.dtype}: {error}") from error
    return _to_rgb(image, name)


def _read(path: str, schemes: Sequence[str], name: str) -> bytes:
    try:
        files.require_permitted(path, schemes)
        return files.read_regular(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise BadSample("missing file", name, "not found") from error
    except OSError as error:
        never = error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EINVAL)
        cause = "path cannot be used" if never else "unreadable file"
        raise BadSample(cause, name, f"{type(error).__name__}: {error}"[:300]) from error
    except (DataError, ValueError) as error:
        raise BadSample("path cannot be used", name, str(error)[:300]) from error
