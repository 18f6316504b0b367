"""X-VLM pre-training through `vlp-train`: data, objective, engine, retrieval test and export together."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from vlp_core import models


def test_run_ends_with_retrieval_image_and_a_model_that_loads(train, tiny, tmp_path):
    run = tmp_path / "run"
    assert train(*tiny, "steps=3", "--run", run) == 0
    scores = json.loads((run / "eval" / "step-00000003.json").read_text())
    assert {"dual/tr_r1", "dual/ir_r1", "reranked/tr_r1", "reranked/ir_r1"} <= set(scores)
    assert (run / "eval" / "step-00000003" / "retrieval.png").stat().st_size > 1000
    loaded = models.load(run / "export")
    assert (loaded.family, loaded.stage) == ("xvlm", "pretrain")
    assert loaded.view["size"] == 64
    weights = load_file(run / "checkpoints" / "step-00000003" / "model.safetensors")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"]), name


def test_every_loss_of_both_streams_is_reported(train, tiny, tmp_path):
    run = tmp_path / "run"
    assert train(*tiny, "steps=2", "data.regions.share=1.0", "--run", run) == 0
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    wanted = {f"images/{name}" for name in ("itc", "itm", "mlm")} | {
        f"regions/{name}" for name in ("itc", "itm", "mlm", "bbox", "giou")
    }
    assert wanted <= set(line["losses"])


def test_without_regions_the_box_head_keeps_its_values(train, tiny, tmp_path):
    for steps in (1, 3):
        assert (
            train(
                *tiny,
                f"steps={steps}",
                "data.regions=null",
                "schedule.warmup_steps=0",
                "--run",
                tmp_path / f"run{steps}",
            )
            == 0
        )
    first, last = (load_file(tmp_path / f"run{steps}" / "export" / "model.safetensors") for steps in (1, 3))
    assert torch.equal(first["bbox_head.0.weight"], last["bbox_head.0.weight"])
    assert not torch.equal(first["itm_head.0.weight"], last["itm_head.0.weight"])


def test_killed_and_resumed_equals_uninterrupted(train, tiny, tmp_path, losses):
    options = (*tiny, "steps=8", "save.every=2", "model.vision.drop_path=0.2", "workers=1")
    assert train(*options, "--run", tmp_path / "whole") == 0
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "vlp_methods.cli", *options, "--run", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-00000004").is_dir():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train(*options, "--run", run) == 0
    assert losses(run) == losses(tmp_path / "whole")
    first, second = (
        load_file(folder / "export" / "model.safetensors") for folder in (run, tmp_path / "whole")
    )
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_two_ranks_train_and_agree_on_the_streams(train, tiny, tmp_path, losses):
    """With the same global batch the contrastive loss of the first step is that of one rank; local negatives
    and draws differ."""
    options = (
        *tiny,
        "steps=4",
        "model.vision.drop_path=0.0",
        "model.text.dropout=0.0",
        "model.text.attention_dropout=0.0",
    )
    assert train(*options, "--run", tmp_path / "one") == 0
    assert train(*options, "--nproc", 2, "--run", tmp_path / "two") == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [(step, [name for name, _ in values]) for step, values in one] == [
        (step, [name for name, _ in values]) for step, values in two
    ]
    first = [float.fromhex(dict(values)["images/itc"]) for _, values in (one[0], two[0])]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_bf16_trains(train, tiny, tmp_path, losses):
    assert train(*tiny, "steps=2", "precision=bf16", "--run", tmp_path / "bf16") == 0
    assert train(*tiny, "steps=2", "--run", tmp_path / "fp32") == 0
    half, full = (dict(losses(tmp_path / name)[0][1]) for name in ("bf16", "fp32"))
    for name in ("images/itc", "images/mlm"):
        assert float.fromhex(half[name]) == pytest.approx(float.fromhex(full[name]), rel=0.02)
        assert half[name] != full[name]


def test_training_starts_from_an_export_folder(train, tiny, tmp_path):
    assert train(*tiny, "steps=1", "--run", tmp_path / "first") == 0
    again = (
        *tiny,
        "steps=1",
        "schedule.warmup_steps=10",
        f"model.weights.model={tmp_path / 'first' / 'export'}",
    )
    assert train(*again, "seed=7", "--run", tmp_path / "second") == 0
    # The first step of a warm-up has rate 0, so the second run ends with the weights it started from.
    first, second = (
        load_file(tmp_path / name / "export" / "model.safetensors") for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first if name != "temperature")


ENCODERS = {
    "clip": "{kind: clip, image_size: 64, patch: 32, width: 16, depth: 2, heads: 2, hidden: 32, local_depth: "
    "1}",
    "vit": "{kind: vit, image_size: 64, patch: 32, width: 16, depth: 2, heads: 2, local_depth: 1}",
}
ROBERTA = (
    "model.text={kind: roberta, width: 32, layers: 2, fusion_layer: 1, heads: 2, hidden: 32, "
    "positions: 66, token_types: 1, norm_eps: 1e-5}"
)


@pytest.mark.parametrize("vision", ENCODERS)
@pytest.mark.parametrize("text", ["bert", "roberta"])
def test_every_encoder_trains_on_both_streams(train, tiny, tmp_path, vision, text):
    options = [*tiny, "steps=2", "data.regions.share=1.0", f"model.vision={ENCODERS[vision]}"]
    if text == "roberta":
        byte = {33 + k: chr(33 + k) for k in range(94)}
        tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *byte.values(), "\u0120"]
        (tmp_path / "vocab.json").write_text(
            json.dumps({token: number for number, token in enumerate(tokens)})
        )
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        files = f"[{tmp_path / 'vocab.json'}, {tmp_path / 'merges.txt'}]"
        options += [ROBERTA, f"data.tokenizer={{kind: roberta, files: {files}}}"]
    run = tmp_path / "run"
    assert train(*options, "--run", run) == 0
    assert set(json.loads((run / "eval/step-00000002.json").read_text())) >= {"reranked/tr_r1"}
    assert models.load(run / "export").model.text.kind == text


COCO = (
    "data.world=null",
    "data.images.source={{format: coco_captions, annotations: annotations/captions.json, images: images}}",
    "data.regions.source={{format: coco_instances, annotations: annotations/instances.json, images: images}}",
    "data.test={{format: coco_captions, annotations: annotations/captions.json, images: images}}",
    "data.tokenizer.files=[{vocabulary}]",
)


def test_real_images_train_by_data_keys_only(train, tiny, tmp_path, shared_data):
    vocabulary = shared_data / "bert-base-uncased" / "vocab.txt"
    data = [key.format(vocabulary=vocabulary) for key in COCO]
    options = [option for option in tiny if not option.startswith("data.world")]
    assert (
        train(*options, *data, f"data.root={shared_data / 'coco-mini'}", "steps=3", "--run", tmp_path / "run")
        == 0
    )
    result = json.loads((tmp_path / "run" / "eval" / "step-00000003" / "retrieval.json").read_text())
    assert result["counts"]["images"] == 47
    assert result["counts"]["texts"] == 235


def test_missing_image_folder_is_said_with_its_name(train, tiny, capsys, tmp_path):
    assert train(*tiny, "steps=1", "data.images.source.files=[nowhere]", "--run", tmp_path / "run") == 2
    assert "nowhere" in capsys.readouterr().err
