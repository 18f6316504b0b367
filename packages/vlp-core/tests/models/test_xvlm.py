"""X-VLM's model and the pure losses of its boxes against the reference; the losses and steps of its tasks are
tested in vlp-methods, by the tasks that train."""

import pytest
import torch
from vlp_core.images import Images
from vlp_core.losses import Negatives, box_losses, negative_weights


def is_pretraining(case) -> bool:
    return {"text_ids_masked", "image", "neg_image_idx"} <= case.tensor_names("inputs")


def run_pretraining(model, inputs: dict, labels: torch.Tensor | None = None):
    """Output of the model; `labels` other than those of the case."""
    regions = "idx_to_group_img" in inputs
    return model.pretrain(
        Images(inputs["image"]),
        inputs["text_ids"],
        inputs["text_atts"],
        inputs["text_ids_masked"],
        inputs["masked_pos"],
        inputs["masked_ids"] if labels is None else labels,
        image_index_B=inputs["idx_to_group_img"] if regions else None,
        image_attention_mask_BL=inputs["image_atts"] if regions else None,
        negatives=Negatives(inputs["neg_image_idx"], inputs["neg_text_idx"]),
    )


def hardest_negatives(model, image, text, identities=None) -> Negatives:
    weights = negative_weights(image, text, temperature=model.temperature.detach(), ids_B=identities)
    return Negatives(*(part.argmax(1) for part in weights))


def assert_equal_at_real_tokens(found_BTW, expected_BTW, attention_mask_BT) -> None:
    """The models skip padding, which `Bert.encode` computes by default."""
    real = attention_mask_BT.bool()
    torch.testing.assert_close(found_BTW[real], expected_BTW[real], rtol=1e-4, atol=1e-5)


@pytest.mark.golden("xvlm", is_pretraining)
def test_pretraining_equals_the_reference(case, golden_model, assert_equal):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    pairs = run_pretraining(model, inputs)
    # Logits where the case has no label are not computed: ask for them by labels of some kind.
    with torch.no_grad():
        everywhere = run_pretraining(model, inputs, labels=inputs["masked_ids"].clamp(min=0))
    found = {
        "image_embeds": pairs.image_embeds,
        "text_embeds": model.text.encode(inputs["text_ids"], inputs["text_atts"]),
        "image_feat": pairs.image_projection,
        "text_feat": pairs.text_projection,
        "temp_after_clamp": model.temperature,
        "itc_logits": pairs.image_projection @ pairs.text_projection.t() / model.temperature,
        "itm_logits": pairs.match_logits,
        "mlm_logits": everywhere.token_logits.view(*inputs["masked_ids"].shape, -1),
    }
    if pairs.boxes is not None:
        found["bbox_pred"] = pairs.boxes
        found["image_embeds_fullatts"] = pairs.full_embeds[inputs["idx_to_group_img"]]
        target, images = inputs["target_bbox"], inputs["is_image"]
        counted, everything = (
            box_losses(pairs.boxes, target, is_image_B=images),
            box_losses(pairs.boxes, target),
        )
        found |= {"loss_bbox": counted.l1, "loss_giou": counted.giou}
        found["loss_bbox_without_image_mask"] = everything.l1
        found["loss_giou_without_image_mask"] = everything.giou
    assert expected.keys() - found.keys() == {"loss_itc", "loss_itm", "loss_mlm", "loss_total"}
    assert_equal(found, expected)
    assert_equal_at_real_tokens(pairs.text_embeds, expected["text_embeds"], inputs["text_atts"])
    labelled = pairs.token_labels != -100
    torch.testing.assert_close(
        pairs.token_logits[labelled],
        expected["mlm_logits"][inputs["masked_ids"] != -100],
        rtol=1e-4,
        atol=1e-5,
    )
    # The fixture's negatives are the most probable ones: the weights must agree on them.
    images, texts = negative_weights(
        pairs.image_projection, pairs.text_projection, temperature=model.temperature.detach()
    )
    assert torch.equal(images.argmax(1), inputs["neg_image_idx"])
    assert torch.equal(texts.argmax(1), inputs["neg_text_idx"])


def is_retrieval_training(case) -> bool:
    return "loss_itc_without_idx" in case.tensor_names("outputs")


@pytest.mark.golden("xvlm", is_retrieval_training)
def test_retrieval_equals_the_reference(case, golden_model, assert_equal):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    pairs = model.pair(
        Images(inputs["image"]),
        inputs["text_ids"],
        inputs["text_atts"],
        identities_B=inputs["idx"],
        negatives=Negatives(inputs["neg_image_idx"], inputs["neg_text_idx"]),
    )
    found = {
        "image_embeds": pairs.image_embeds,
        "text_embeds": model.text.encode(inputs["text_ids"], inputs["text_atts"]),
        "image_feat": pairs.image_projection,
        "text_feat": pairs.text_projection,
        "itm_logits": pairs.match_logits,
    }
    losses = {"loss_itc", "loss_itc_without_idx", "loss_itm", "loss_total"}
    assert expected.keys() - found.keys() == losses
    assert_equal(found, expected)
    assert_equal_at_real_tokens(pairs.text_embeds, expected["text_embeds"], inputs["text_atts"])
    drawn = hardest_negatives(model, pairs.image_projection, pairs.text_projection, inputs["idx"])
    assert torch.equal(drawn.image, inputs["neg_image_idx"])
    assert torch.equal(drawn.text, inputs["neg_text_idx"])


@pytest.mark.golden("xvlm", lambda case: {"score_i2t", "score_t2i"} <= case.tensor_names("outputs"))
def test_match_scores_equal_the_reference(case, golden_model, assert_equal):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    with torch.no_grad():
        image = model.encode_image(Images(inputs["image"]))
        text = model.encode_text(inputs["text_ids"], inputs["text_atts"])
        sims = image.projection @ text.projection.t()
        found = {"sims_i2t": sims}
        for key, similarity in (("score_i2t", sims), ("score_t2i", sims.t())):
            candidates = similarity.topk(case.config["k_test"], dim=1).indices.flatten()
            queries = torch.arange(len(similarity)).repeat_interleave(case.config["k_test"])
            pair = (queries, candidates) if key == "score_i2t" else (candidates, queries)
            found[key] = torch.full_like(similarity, -100.0)
            found[key][queries, candidates] = model.match(image, text, *pair)
    assert_equal(found, expected)


@pytest.mark.golden(
    "xvlm",
    lambda case: (
        {"bbox_pred", "pred_xywh_pixels"} <= case.tensor_names("outputs")
        or (
            "target_bbox" in case.tensor_names("inputs")
            and case.config.get("model") == "model_bbox_pretrain.XVLM"
        )
    ),
)
def test_box_regression_and_its_gradients_equal_the_reference(
    case, golden_model, assert_equal, assert_gradient_norms
):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    ids, mask, image_rows = inputs["text_ids"], inputs["text_atts"], inputs.get("idx_to_group_img")
    boxes = model.regress(Images(inputs["image"]), ids, mask, image_rows)
    rows = torch.arange(len(ids))
    located = model.locate(
        model.encode_image(Images(inputs["image"])),
        model.encode_text(ids, mask),
        rows if image_rows is None else image_rows,
        rows,
    )
    torch.testing.assert_close(boxes, located)
    losses = box_losses(boxes, inputs["target_bbox"], is_image_B=inputs.get("is_image"))
    found = {"loss_bbox": losses.l1, "loss_giou": losses.giou, "loss_total": losses.l1 + losses.giou}
    if "bbox_pred" in expected:
        found["bbox_pred"] = boxes
    assert_equal(found, expected)
    found["loss_total"].backward()
    assert_gradient_norms(model, case.json("grads"))
