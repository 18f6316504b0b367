import pytest
import torch
from vlp_core.losses import (
    box_giou,
    box_iou,
    box_losses,
    cxcywh_to_xyxy,
    xyxy_to_cxcywh,
)

close = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.golden(
    "xvlm",
    lambda case: {"pred", "target", "is_image", "iou_boxes1_xywh"} <= case.tensor_names("inputs"),
)
def test_boxes_equal_the_reference(case):
    inputs, expected = case.tensors("inputs"), case.tensors("outputs")
    predicted = inputs["pred"].clone().requires_grad_()
    a, b = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(inputs["target"])
    regions = box_losses(predicted, inputs["target"], is_image_B=inputs["is_image"])
    everything = box_losses(predicted, inputs["target"])
    found = {
        "xyxy": a,
        "iou": box_iou(a, b),
        "giou": box_giou(a, b),
        "loss_bbox": regions.l1,
        "loss_giou": regions.giou,
        "loss_bbox_all": everything.l1,
        "loss_giou_all": everything.giou,
    }
    (regions.l1 + regions.giou).backward()
    found["grad_pred"] = predicted.grad
    assert found.keys() == expected.keys() - {"pixel_iou"}  # a metric: vlp_eval.metrics.grounding
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **close, msg=lambda m, n=name: f"{n}: {m}")


def some_boxes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.2 + 0.3 * torch.rand(6, 4, generator=generator)


def test_forms_of_a_box_convert_back():
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(some_boxes())), some_boxes())


def test_equal_boxes_have_no_loss():
    losses = box_losses(some_boxes(), some_boxes())
    torch.testing.assert_close(torch.stack(losses), torch.zeros(2), rtol=0, atol=1e-6)


def test_giou_of_boxes_apart_is_negative():
    left, right = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[3.0, 0.0, 4.0, 1.0]])
    torch.testing.assert_close(box_iou(left, right), torch.tensor([0.0]))
    torch.testing.assert_close(box_giou(left, right), torch.tensor([-0.5]))


def test_a_batch_of_whole_images_has_zero_loss_and_gradient():
    predicted = some_boxes().requires_grad_()
    losses = box_losses(predicted, some_boxes().flip(0), is_image_B=torch.ones(6, dtype=torch.long))
    (losses.l1 + losses.giou).backward()
    assert losses.l1 == losses.giou == 0
    assert predicted.grad.count_nonzero() == 0


def test_whole_images_do_not_count():
    predicted, target = some_boxes(), some_boxes().flip(0)
    is_image = torch.tensor([0, 1, 0, 0, 1, 1])
    kept = is_image == 0
    torch.testing.assert_close(
        box_losses(predicted, target, is_image_B=is_image), box_losses(predicted[kept], target[kept])
    )


def test_an_inverted_box_silences_the_giou_loss_as_in_the_reference():
    predicted = some_boxes()
    predicted[2, 2] = -0.1
    losses = box_losses(predicted, some_boxes().flip(0))
    assert losses.giou == 0
    assert losses.l1 > 0


def test_losses_are_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = box_losses(some_boxes().bfloat16(), some_boxes())
    assert losses.l1.dtype == losses.giou.dtype == torch.float32
