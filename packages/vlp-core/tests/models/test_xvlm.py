import pytest
import torch
from vlp_core.losses import Negatives, negative_weights
from vlp_core.models.xvlm_losses import pretrain_losses


def is_pretraining(case) -> bool:
    return {"text_ids_masked", "image", "neg_image_idx"} <= case.tensor_names("inputs")


def run_pretraining(model, inputs: dict):
    regions = "idx_to_group_img" in inputs
    pairs = model(
        inputs["image"],
        inputs["text_ids"],
        inputs["text_atts"],
        masked_ids_BT=inputs["text_ids_masked"],
        masked_positions_BP=inputs["masked_pos"],
        image_index_B=inputs["idx_to_group_img"] if regions else None,
        image_attention_mask_BL=inputs["image_atts"] if regions else None,
        negatives=Negatives(inputs["neg_image_idx"], inputs["neg_text_idx"])
        if "neg_image_idx" in inputs
        else None,
    )
    losses = pretrain_losses(
        pairs,
        model.temperature,
        masked_labels_BP=inputs["masked_ids"],
        target_boxes_B4=inputs["target_bbox"] if regions else None,
        is_image_B=inputs["is_image"] if regions else None,
    )
    return pairs, losses


@pytest.mark.golden("xvlm", is_pretraining)
def test_pretraining_and_its_gradients_equal_the_reference(
    case, golden_model, assert_equal, assert_gradient_norms
):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    pairs, losses = run_pretraining(model, inputs)
    found = {
        "image_embeds": pairs.image_embeds,
        "text_embeds": pairs.text_embeds,
        "image_feat": pairs.image_projection,
        "text_feat": pairs.text_projection,
        "temp_after_clamp": model.temperature,
        "itc_logits": pairs.image_projection @ pairs.text_projection.t() / model.temperature,
        "itm_logits": pairs.match_logits,
        "mlm_logits": pairs.token_logits,
        "loss_total": torch.stack(list(losses.values())).sum(),
        **{f"loss_{name}": value for name, value in losses.items()},
    }
    if pairs.boxes is not None:
        found["bbox_pred"] = pairs.boxes
        found["image_embeds_fullatts"] = pairs.full_embeds[inputs["idx_to_group_img"]]
        everything = pretrain_losses(
            pairs,
            model.temperature,
            masked_labels_BP=inputs["masked_ids"],
            target_boxes_B4=inputs["target_bbox"],
        )
        found["loss_bbox_without_image_mask"] = everything["bbox"]
        found["loss_giou_without_image_mask"] = everything["giou"]
    assert found.keys() == expected.keys()
    assert_equal(found, expected)
    # The fixture's negatives are the most probable ones: the weights must agree on them.
    images, texts = negative_weights(
        pairs.image_projection, pairs.text_projection, temperature=model.temperature.detach()
    )
    assert torch.equal(images.argmax(1), inputs["neg_image_idx"])
    assert torch.equal(texts.argmax(1), inputs["neg_text_idx"])

    found["loss_total"].backward()
    assert_gradient_norms(model, case.json("grads"))
