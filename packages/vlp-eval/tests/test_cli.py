"""`vlp-eval` as a user meets it: a checkpoint, a data set, and every way to get a key wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from vlp_core import models
from vlp_data import shapes
from vlp_eval.cli import main
from vlp_eval.report import Scores


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return shapes.ensure(folder / "world", images=40, seed=0, size=48)


@pytest.fixture(scope="session")
def export(tmp_path_factory, world):
    """A tiny X-VLM with random weights, exported."""
    torch.manual_seed(0)
    vocabulary = world / "vocab.txt"
    arguments = {
        "vision": {
            "kind": "swin",
            "image_size": 64,
            "window": 2,
            "width": 8,
            "depths": [1, 1, 2, 1],
            "heads": [1, 2, 4, 8],
        },
        "text": {
            "kind": "bert",
            "vocabulary": len(vocabulary.read_text().splitlines()),
            "width": 32,
            "layers": 4,
            "heads": 4,
            "hidden": 64,
            "positions": 40,
            "fusion_layer": 2,
        },
        "embed_width": 16,
    }
    folder = tmp_path_factory.mktemp("run") / "export"
    reading = {
        "tokenizer": {"kind": "wordpiece", "files": ["vocab.txt"]},
        "max_tokens": 24,
        "max_words": 20,
    }
    models.save(
        folder,
        models.create("xvlm", "retrieval", **arguments),
        family="xvlm",
        stage="retrieval",
        arguments=arguments,
        view={"kind": "squash", "size": 64},
        reading=reading,
        text_files=[vocabulary],
    )
    return folder


def karpathy(world, split="val"):
    return [
        "data.format=karpathy",
        f"data.annotations={world}/dataset_karpathy.json",
        f"data.images={world}",
        f"data.split={split}",
    ]


def test_retrieval_writes_json_and_image_and_prints_the_table(world, export, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert (
        main(
            ["retrieval", str(export), *karpathy(world), "rerank=3", f"out={out}", "figures=2", "device=cpu"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    scores = Scores.read((out / "retrieval.json").read_text())
    assert printed.startswith(scores.table())
    assert scores.counts["images"] == 4
    assert list(scores.results) == ["dual", "reranked"]
    assert scores.settings["options"]["rerank"] == 3
    assert scores.settings["max_tokens"] == 24  # the checkpoint's
    assert all(
        "," not in text["text"] and text["text"] == text["text"].lower() for text in scores.samples["texts"]
    )
    with Image.open(out / "retrieval.png") as image:
        assert image.width > 1000
        assert len(image.getcolors(1 << 24)) > 100


def test_formats_of_the_same_images_give_the_same_ranks(world, export, tmp_path):
    sources = {
        "karpathy": karpathy(world),
        "coco": [
            "data.format=coco_captions",
            f"data.annotations={world}/coco/captions_val.json",
            f"data.images={world}",
        ],
        "task": ["data.format=task_json", f"data.files=[{world}/shapes_val.json]", f"data.root={world}"],
    }
    ranks = {}
    for name, data in sources.items():
        assert (
            main(["retrieval", str(export), *data, f"out={tmp_path / name}", "figures=0", "device=cpu"]) == 0
        )
        samples = json.loads((tmp_path / name / "retrieval.json").read_text())["samples"]
        ranks[name] = [[one["rank"] for one in samples[kind]] for kind in ("images", "texts")]
        assert not (tmp_path / name / "retrieval.png").exists()
    assert ranks["karpathy"] == ranks["coco"] == ranks["task"]


def test_options_change_the_gallery(world, export, tmp_path):
    settings = [
        "limit=3",
        "first_captions=2",
        "clean=none",
        "fold_size=1",
        "figures=0",
        f"out={tmp_path}",
        "device=cpu",
    ]
    assert main(["retrieval", str(export), *karpathy(world), *settings]) == 0
    scores = Scores.read((tmp_path / "retrieval.json").read_text())
    assert (scores.counts["images"], scores.counts["texts"]) == (3, 6)
    assert scores.results["dual, folds of 1"]["r_mean"] == 100
    assert any(text["text"] != text["text"].lower() for text in scores.samples["texts"])


def test_ranks_of_torchrun_share_the_work(world, export, tmp_path):
    command = [
        "retrieval",
        str(export),
        *karpathy(world, "train"),
        "limit=7",
        "rerank=2",
        "figures=0",
        "device=cpu",
    ]
    assert main([*command, f"out={tmp_path / 'one'}"]) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vlp_eval.cli"]
    done = subprocess.run(
        [sys.executable, *launch, *command, f"out={tmp_path / 'two'}"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "retrieval.json").read_text()) for name in ("one", "two"))
    assert one["samples"] == two["samples"]
    assert one["results"] == two["results"]
    assert done.stdout.count("retrieval: 7 images") == 1


def test_all_mistakes_are_said_at_once_with_the_nearest_key(capsys, export, world):
    words = [*karpathy(world), "rerrank=3", "ties=best", "image_batch=many"]
    assert main(["retrieval", str(export), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlp-eval retrieval: ")
    for part in ("did you mean rerank?", "ties: expected one of pessimistic, index", "image_batch"):
        assert part in said
    assert "retrieval.yaml" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["retreival"], "unknown benchmark 'retreival'; did you mean retrieval?"),
        (
            ["retrieval", "nowhere", "data.format=coco_captions", "data.annotations=a", "data.images=b"],
            "nowhere not found",
        ),
        (["retrieval", "EXPORT"], "data.format: required (one of "),
        (
            ["retrieval", "EXPORT", "GOOD", "clean=none", "max_words=3"],
            "max_words=3 has no effect with clean=none",
        ),
        (["retrieval", "EXPORT", "GOOD", "rerank=-1"], "rerank=-1 must not be negative"),
        (["retrieval", "EXPORT", "GOOD", "device=gpu"], "device=gpu"),
        (
            ["retrieval", "EXPORT", "GOOD", "tokenizer=[a,b]", "device=cpu"],
            "a wordpiece tokenizer takes vocab.txt, got 2 files",
        ),
        (
            ["retrieval", "EXPORT", "GOOD", "fold_size=3", "device=cpu"],
            "4 images cannot be cut into folds of 3",
        ),
        (["retrieval", "EXPORT", "--recipe", "missing.yaml"], "missing.yaml not found"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(words, message, export, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = []
    for word in words:
        filled += karpathy(world) if word == "GOOD" else [str(export) if word == "EXPORT" else word]
    assert main(filled) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_recipe_file_is_where_options_start(export, world, tmp_path, capsys):
    lines = [word.removeprefix("data.").replace("=", ": ", 1) for word in karpathy(world)]
    (tmp_path / "mine.yaml").write_text(
        "\n".join(["data:", *(f"  {line}" for line in lines), "rerank: 2", "figures: 0"])
    )
    words = [
        "retrieval",
        str(export),
        "--recipe",
        str(tmp_path / "mine.yaml"),
        f"out={tmp_path}",
        "device=cpu",
    ]
    assert main(words) == 0
    assert json.loads((tmp_path / "retrieval.json").read_text())["settings"]["rerank"] == 2
    (tmp_path / "mine.yaml").write_text("rerank: two")
    assert main(words) == 2
    assert f"{tmp_path}/mine.yaml:" in capsys.readouterr().err


def test_vocabulary_of_another_model_is_refused(world, tmp_path, export, capsys):
    (tmp_path / "vocab.txt").write_text((world / "vocab.txt").read_text() + "zebra\n")
    words = [*karpathy(world), f"tokenizer=[{tmp_path}/vocab.txt]", f"out={tmp_path}", "device=cpu"]
    assert main(["retrieval", str(export), *words]) == 2
    assert "was trained with" in capsys.readouterr().err


def test_ls_and_show_need_no_torch_and_name_every_key():
    program = (
        "import sys; from vlp_eval.cli import main; a = main(['ls']); b = main(['show', 'retrieval']);"
        "c = main(['retrieval', 'x', 'rerrank=1']); sys.exit(a or b or c != 2 or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for key in ("rerank", "data.annotations", "data.files", "ties", "precision"):
        assert f"  {key} = " in done.stdout
    assert "did you mean rerank?" in done.stderr
