"""CLIPs of both libraries, tiny and made by the tests; their vectors of texts and images."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from vlp_data.concepts import select
from vlp_data.concepts.embed import EmbedImages, EmbedTexts, ImageFiles, encode_images
from vlp_data.concepts.encoders import Clip, Encoder
from vlp_data.concepts.tables import vectors_of
from vlp_data.errors import DataError

TEXTS = ["a dog", "it", "dog " * 200]


@pytest.fixture(scope="session")
def hugging_face_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a CLIP as transformers saves it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("hugging_face")
    letters = [chr(n) for n in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": len(words) - 2,
        "eos_token_id": len(words) - 1,
        "pad_token_id": len(words) - 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a CLIP as open_clip saves it."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return str(folder)


@pytest.fixture(params=["hugging_face_clip", "open_clip_folder"])
def clip(request: pytest.FixtureRequest) -> Clip:
    return Clip(name=request.getfixturevalue(request.param), device="cpu")


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Names of images below tmp_path: three good ones, one broken, one missing."""
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return ["0.png", "broken.png", "1.png", "gone.png", "2.png"]


def test_texts_have_vectors_whatever_their_batch(clip: Clip) -> None:
    compute = EmbedTexts(clip=clip, batch=2, stored="float32").start()
    found = vectors_of(compute(pa.table({"key": TEXTS})), "x")
    assert found.keys.to_pylist() == TEXTS
    assert found.values.shape == (3, 8)
    single = np.concatenate([clip.load().texts([text]) for text in TEXTS])
    np.testing.assert_allclose(found.values, single, atol=1e-5)
    assert np.abs(found.values[0] - found.values[1]).max() > 1e-3


def test_images_have_vectors_and_unreadable_ones_say_why(
    clip: Clip, tmp_path: Path, images: list[str]
) -> None:
    work = EmbedImages(clip=clip, images=ImageFiles(root=str(tmp_path), batch=2, threads=2), stored="float32")
    found = vectors_of(work.start()(pa.table({"key": images})), "x")
    assert found.keys.to_pylist() == ["0.png", "1.png", "2.png"]
    assert "not an image" in found.problems["broken.png"]
    assert "missing file" in found.problems["gone.png"]
    encoder = clip.load()
    views = [encoder.prepare(Image.open(tmp_path / name)) for name in ("0.png", "1.png", "2.png")]
    np.testing.assert_allclose(found.values, encoder.images(views), atol=1e-5)


def test_one_pass_chooses_what_saved_vectors_choose(clip: Clip, tmp_path: Path, images: list[str]) -> None:
    from vlp_data.concepts.tables import encoded, write_bytes

    words = pa.table({"key": ["dog", "cat", "a bird", "grass"]})
    write_bytes(
        str(tmp_path / "words.parquet"), encoded(EmbedTexts(clip=clip, stored="float32").start()(words))
    )
    options = {"concepts": str(tmp_path / "words.parquet"), "k": 2}
    where, items = ImageFiles(root=str(tmp_path), batch=2), pa.table({"key": images})
    saved = EmbedImages(clip=clip, images=where, stored="float32").start()(items)
    two_steps = select.ChooseSaved(**options, device="cpu").start()(saved)
    one_pass = select.ChooseInOnePass(**options, clip=clip, images=where).start()(items)
    assert one_pass.drop_columns("scores").to_pylist() == two_steps.drop_columns("scores").to_pylist()
    assert [row["problem"] is None for row in one_pass.to_pylist()] == [True] * 3 + [False] * 2


def test_names_without_extension_get_the_suffix(tmp_path: Path, images: list[str]) -> None:
    encoder = Encoder(
        lambda _: torch.ones(2), lambda views: torch.stack(list(views)).numpy(), lambda _: np.zeros(0)
    )
    found, problems = encode_images(encoder, ["0", "1.png"], ImageFiles(root=str(tmp_path), suffix=".png"))
    assert problems == [None, None]
    assert found.tolist() == [[1, 1], [1, 1]]


def test_storage_that_fails_stops_the_shard(tmp_path: Path, images: list[str], monkeypatch) -> None:
    def fail(path: str, most: int) -> bytes:
        raise PermissionError(f"{path} is locked")

    encoder = Encoder(lambda _: torch.ones(2), lambda views: np.ones((len(views), 2)), lambda _: np.zeros(0))
    monkeypatch.setattr("vlp_data.files.read_regular", fail)
    with pytest.raises(OSError, match=r"unreadable file: .*is locked"):
        encode_images(encoder, ["0.png"], ImageFiles(root=str(tmp_path)))


def test_folder_that_fits_no_image_is_an_error(tmp_path: Path) -> None:
    encoder = Encoder(
        prepare=lambda _: torch.zeros(1), images=lambda _: np.zeros((1, 2)), texts=lambda _: np.zeros(0)
    )
    with pytest.raises(DataError, match="none of the 2 images can be read, the first is missing file"):
        encode_images(encoder, ["a", "b"], ImageFiles(root=str(tmp_path)))


def test_library_is_told_by_the_name(tmp_path: Path, hugging_face_clip: str, open_clip_folder: str) -> None:
    assert Clip(name=hugging_face_clip).kind() == "transformers"
    assert Clip(name=open_clip_folder).kind() == "open_clip"
    assert Clip(name="openai/clip-vit-base-patch16").kind() == "transformers"
    assert Clip(name="ViT-B-16", weights="openai").kind() == "open_clip"
    with pytest.raises(DataError, match=r"neither open_clip_config\.json nor config\.json"):
        Clip(name=str(tmp_path)).kind()
    with pytest.raises(DataError, match="brings its own"):
        Clip(name=hugging_face_clip, weights="openai").load()
    with pytest.raises(DataError, match="open_clip cannot load ViT-B-16"):
        Clip(name="ViT-B-16").load()


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("x/y", "transformers", "transformers"), ("V", "open_clip", "open-clip")]
)
def test_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError, match=rf"pip install 'vlp-data\[{extra}\]'"):
        Clip(name=name, device="cpu").load()
