"""Loss sums of X-VLM without golden cases."""

import pytest
import torch
from vlp_core import models
from vlp_core.images import Images
from vlp_methods.xvlm.losses import pretrain_losses, retrieval_losses


def forward():
    """Model and output for three images with a text each."""
    torch.manual_seed(0)
    model = models.create(
        "xvlm",
        "pretrain",
        vision={
            "kind": "vit",
            "image_size": 32,
            "patch": 16,
            "width": 16,
            "depth": 1,
            "heads": 2,
            "local_depth": 0,
        },
        text={
            "vocabulary": 20,
            "width": 16,
            "layers": 2,
            "fusion_layer": 1,
            "heads": 2,
            "hidden": 16,
            "positions": 8,
        },
        embed_width=8,
    )
    ids, positions = torch.randint(5, 20, (3, 6)), torch.tensor([[1, 2]] * 3)
    texts = ids, torch.ones_like(ids), ids.scatter(1, positions, 4), positions, ids.gather(1, positions)
    return model, model.pretrain(Images(torch.randn(3, 3, 32, 32)), *texts)


def test_losses_of_whole_images_leave_the_box_head_without_gradient():
    model, pairs = forward()
    losses = pretrain_losses(pairs, model.temperature)
    assert list(losses) == ["itc", "itm", "mlm"]
    torch.stack(list(losses.values())).sum().backward()
    without = {key.split(".")[0] for key, p in model.named_parameters() if p.grad is None}
    assert without == {"bbox_head"}
    with pytest.raises(ValueError, match="target boxes belong to a region batch"):
        pretrain_losses(pairs, model.temperature, target_boxes_B4=torch.ones(3, 4))


def test_losses_stay_fp32_in_bf16():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, pairs = forward()
        losses = pretrain_losses(pairs, model.temperature)
        losses |= retrieval_losses(pairs, model.temperature)
    assert pairs.match_logits.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
