"""A small data set on disk, made by the tests themselves."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vlp_data.text import Tokenizer

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "dog",
    "cat",
    "##s",
    "on",
    "the",
    "left",
    "bright",
    "grass",
    "red",
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(WORDS))
    return Tokenizer.wordpiece(file)


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(seed, size=(w, h), form="JPEG") -> bytes of an image of noise."""

    def make(seed: int = 0, size: tuple[int, int] = (60, 40), form: str = "JPEG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, form)
        return stream.getvalue()

    return make


@pytest.fixture
def image_lines(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """Folder with 24 images and `lines/part-{0,1,2}` of X-VLM image-text lines whose paths are relative to
    the folder."""
    (tmp_path / "images").mkdir()
    (tmp_path / "lines").mkdir()
    for number in range(24):
        (tmp_path / "images" / f"{number:02d}.jpg").write_bytes(encoded(number))
    for part in range(3):
        lines = [
            json.dumps(
                {"caption": ["a dog", f"a cat on the grass {n}"], "image_rpath": f"images/{n:02d}.jpg"}
            )
            for n in range(8 * part, 8 * part + 8)
        ]
        (tmp_path / "lines" / f"part-{part}").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def region_line(encoded: Callable[..., bytes]) -> Callable[..., str]:
    """region_line(seed, **changes) -> one X-VLM region line of an image of 60 x 40."""

    def make(seed: int = 0, **changes: object) -> str:
        line = {
            "elems": [
                {"caption": "a dog", "bb": [5, 5, 20, 20]},
                {"caption": ["the cat", "a cat"], "bb": [30, 10, 20, 25], "attributes": ["red", "bright"]},
                {"caption": "grass", "bb": [0, 30, 60, 10], "attributes": "bright"},
            ],
            "caption": "a dog on the grass",
            "binary": base64.b64encode(encoded(seed)).decode(),
        }
        return json.dumps({key: value for key, value in {**line, **changes}.items() if value is not None})

    return make
