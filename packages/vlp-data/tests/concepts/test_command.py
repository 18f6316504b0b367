"""`vlp-data concepts ...`, from raw captions to lists with kwords."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vlp_data.cli import main
from vlp_data.concepts import encoders, tables
from vlp_data.concepts.encoders import Clip, Encoder
from vlp_data.options import TaskJson

WORDS = ["red", "green", "blue"]
CAPTIONS = ["a red", "the red", "a green", "green", "blue", "a blue"]


@pytest.fixture(autouse=True)
def colour_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP that knows three colours: images and texts to how much they have of each."""
    import torch

    def prepare(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image, dtype=np.float32).mean((0, 1)))

    encoder = Encoder(
        prepare=prepare,
        images=lambda views: torch.stack(list(views)).numpy(),
        texts=lambda texts: np.array(
            [[float(w in text) + 0.01 for w in WORDS] for text in texts], np.float32
        ),
    )
    monkeypatch.setattr(encoders.Clip, "load", lambda _: encoder)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six captions of three plain images, with parses in which the colours are nouns; commands run in their
    folder."""
    for word, colour in zip(WORDS, ((250, 90, 10), (10, 250, 90), (90, 10, 250)), strict=True):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{word}.png")
    rows = [
        {"image": f"/data/me/data/{word}.png", "caption": text}
        for text in CAPTIONS
        for word in WORDS
        if word in text
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    parses = []
    for text in CAPTIONS:
        words = text.split()
        heads = [len(words) - 1] * len(words)
        pos, deps = ["DET", "NOUN"][-len(words) :], ["det", "ROOT"][-len(words) :]
        parses.append({"caption": text, "words": words, "pos": pos, "heads": heads, "deps": deps})
    (tmp_path / "parses.json").write_text(json.dumps(parses))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> int:
    return main(["concepts", *command.split()])


def prepared() -> None:
    assert run("extract words.parquet list.json --parts counts --parses parses.json --rows-per-shard 4") == 0
    assert run("embed-concepts words words.parquet --clip x --rows-per-shard 2") == 0
    assert run("embed-images images list.json --clip x --root . --rows-per-shard 2") == 0


def test_from_captions_to_lists_with_kwords(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared()
    assert tables.read_vocabulary("words.parquet") == {"red": 2, "green": 2, "blue": 2}
    assert run("choose chosen --concepts words --images images --k 2") == 0
    assert run("choose one_pass --concepts words --lists list.json --clip x --root . --k 2") == 0
    capsys.readouterr()
    for choices in ("chosen", "one_pass"):
        assert run(f"assign {choices}.json list.json --choices {choices}") == 0
        rows = json.loads(Path(f"{choices}.json").read_text())
        assert [row["kwords"] for row in rows] == [["red", "green"]] * 2 + [["green", "blue"]] * 2 + [
            ["blue", "red"]
        ] * 2
        assert [row["caption"] for row in rows] == CAPTIONS
    assert capsys.readouterr().out == "chosen.json: 6 rows\none_pass.json: 6 rows\n"
    sample = TaskJson(files=("chosen.json",)).open()[0]
    assert [text.text for text in sample.texts if text.role == "concept"] == ["red", "green"]


def test_the_same_command_finds_what_is_finished(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared()
    capsys.readouterr()
    prepared()
    assert "counts: 0 parts computed, 2 were finished before" in capsys.readouterr().out
    assert run("embed-concepts words words.parquet --clip y --rows-per-shard 2") == 2
    assert 'words holds the parts of another job (clip: "x" there, "y" now)' in capsys.readouterr().err


def test_interruption_says_how_to_go_on(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encoder = Clip(name="x").load()

    def interrupted(views):
        calls.append(len(views))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encoder.images(views)

    monkeypatch.setattr(encoders.Clip, "load", lambda _: encoder._replace(images=interrupted))
    command = "embed-images images list.json --clip x --root . --rows-per-shard 1"
    assert run(command) == 2
    assert (
        "interrupted with 1 of 3 parts finished in images; the same command goes on"
        in capsys.readouterr().err
    )
    assert run(command) == 0
    assert calls == [1, 1, 1, 1]


def test_images_that_cannot_be_read_are_listed_and_their_rows_wait_for_a_decision(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "green.png").write_bytes(b"no")
    assert run("extract words.json list.json --parts counts --parses parses.json") == 0
    assert run("embed-concepts words words.json --clip x") == 0
    assert run("embed-images images list.json --clip x --root .") == 1
    seen = capsys.readouterr()
    assert "images: 2 images, 1 that cannot be used" in seen.out
    assert "green.png" in seen.err
    assert run("choose chosen --concepts words --images images --k 1") == 1
    capsys.readouterr()
    assert run("assign out.json list.json --choices chosen") == 2
    assert "1 images of the list have no concepts" in capsys.readouterr().err
    assert run("assign out.json list.json --choices chosen --missing drop") == 0
    assert "left out: the rows of 1 images" in capsys.readouterr().out
    assert [row["kwords"] for row in json.loads(Path("out.json").read_text())] == [["red"]] * 2 + [
        ["blue"]
    ] * 2


def test_filter_by_vectors_and_again_by_the_stored_scores(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared()
    rows = json.loads(Path("list.json").read_text())
    Path("list.json").write_text(json.dumps([*rows, {**rows[0], "caption": "a green"}]))
    assert run("embed-captions captions list.json --clip x") == 0
    capsys.readouterr()
    vectors = "--images images --captions captions"
    assert run(f"filter half.json list.json --keep 0.9 --per-image {vectors} --scored scored.parquet") == 0
    assert capsys.readouterr().out == "half.json: 4 of 7 rows\n"
    kept = json.loads(Path("half.json").read_text())
    assert [row["image"][14:-4] for row in kept] == ["red", "red", "green", "blue"]
    assert "a green" not in [row["caption"] for row in kept[:2]]
    assert run("filter again.json scored.parquet --keep 0.9 --per-image") == 0
    assert json.loads(Path("again.json").read_text()) == kept
    assert run("filter few.json scored.parquet --keep 0.3 --per-image --legacy") == 0
    assert [row["image"][14:-4] for row in json.loads(Path("few.json").read_text())] == []
    assert run("filter best.json scored.parquet --keep 0.5") == 0
    assert len(json.loads(Path("best.json").read_text())) == 3


def test_convert_between_formats_and_moves_paths(data: Path) -> None:
    prepared()
    assert run("convert list list.json list.parquet --root /disk") == 0
    assert run("convert list list.parquet back.json --prefix /disk=here") == 0
    rows = json.loads(Path("list.json").read_text())
    moved = [{**row, "image": row["image"].replace("/data/me/data", "here")} for row in rows]
    assert json.loads(Path("back.json").read_text()) == moved
    assert run("convert vectors images images.json") == 0
    assert run("choose chosen --concepts words --images images.json --k 1") == 0
    assert run("convert vectors images.json images.parquet --prefix /data/me/data=here") == 0
    assert tables.read_vectors("images.parquet").keys.to_pylist() == [f"here/{word}.png" for word in WORDS]
    assert run("convert vocabulary words.parquet words.json") == 0
    assert json.loads(Path("words.json").read_text()) == WORDS


def test_build_writes_lists(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("annot.json").write_text('[["images/a.jpg", "a dog"], ["images/b.jpg", " "]]')
    assert run("build sbu annot.json sbu.parquet") == 0
    assert capsys.readouterr().out == "sbu.parquet: 1 captions\nblank captions: 1\n"
    assert tables.to_rows(tables.read_list("sbu.parquet")) == [
        {"image": "images_train/a.jpg", "caption": "a dog"}
    ]
    karpathy = {
        "images": [{"filename": "x.jpg", "split": "test", "sentences": [{"raw": "a dog"}], "imgid": 4}]
    }
    Path("dataset.json").write_text(json.dumps(karpathy))
    assert run("build flickr30k dataset.json f.json --splits test --folder flickr30k-images") == 0
    assert json.loads(Path("f.json").read_text()) == [
        {"image": "flickr30k-images/x.jpg", "caption": "a dog", "image_id": 4}
    ]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("build sbu list.json out.json --splits train", "build sbu takes no --splits"),
        ("choose out --concepts words --lists list.json", "--lists needs --clip"),
        ("choose out --concepts words --images x.json --clip x", "belong to --lists"),
        ("filter out.json list.json --keep 0.5", "no field `sim`"),
        ("filter out.json list.json --keep 0.5 --images x", "belong together"),
        ("filter out.json list.json --keep 0.5 --legacy", "--legacy changes --per-image alone"),
        ("filter out.json list.json --keep 0.5 --root x", "--root belongs to --images"),
        ("filter out.json list.json --keep 2 --per-image", "no field `sim`|fraction=2"),
        ("convert vocabulary words.json out.json --root x", "are for lists and vectors"),
        ("convert list list.json out.json --prefix x", "expected OLD=NEW"),
        ("extract out.json list.json --parts p --min-count 0", "min_count=0"),
        (
            "extract out.json list.json --parts p --model no_such_model",
            "python -m spacy download no_such_model",
        ),
        ("embed-images out gone.json --clip x", "gone.json not found"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_2(
    data: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    if "no_such_model" in command:
        pytest.importorskip("spacy", reason="spaCy is not installed")
    assert run(command) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|"))
    assert error.startswith("vlp-data concepts: ")
    assert error.count("\n") == 1
