from functools import partial

import pytest
import torch
from vlp_core.images import Images
from vlp_core.losses import Negatives, box_losses, negative_weights
from vlp_core.models.xvlm import checkpoints as xvlm
from vlp_core.models.xvlm.losses import pretrain_losses, retrieval_losses
from vlp_core.models.xvlm.rules import parameter_rules
from vlp_core.optim import AdamW, parameter_groups
from vlp_core.schedule import linear


def is_pretraining(case) -> bool:
    return {"text_ids_masked", "image", "neg_image_idx"} <= case.tensor_names("inputs")


def run_pretraining(model, inputs: dict, hardest: bool = False, labels: torch.Tensor | None = None):
    """Output of the model and losses; `labels` other than those of the case."""
    """Forward and losses; `hardest` replaces the draw of negatives by the most probable ones, as the fixtures
    were made."""
    regions = "idx_to_group_img" in inputs
    if hardest:
        model.draw_negatives = partial(hardest_negatives, model)
    pairs = model.pretrain(
        Images(inputs["image"]),
        inputs["text_ids"],
        inputs["text_atts"],
        inputs["text_ids_masked"],
        inputs["masked_pos"],
        inputs["masked_ids"] if labels is None else labels,
        image_index_B=inputs["idx_to_group_img"] if regions else None,
        image_attention_mask_BL=inputs["image_atts"] if regions else None,
        negatives=Negatives(inputs["neg_image_idx"], inputs["neg_text_idx"])
        if "neg_image_idx" in inputs
        else None,
    )
    losses = pretrain_losses(
        pairs,
        model.temperature,
        target_boxes_B4=inputs["target_bbox"] if regions else None,
        is_image_B=inputs["is_image"] if regions else None,
    )
    return pairs, losses


def hardest_negatives(model, image, text, identities=None) -> Negatives:
    weights = negative_weights(image, text, temperature=model.temperature.detach(), ids_B=identities)
    return Negatives(*(part.argmax(1) for part in weights))


def assert_equal_at_real_tokens(found_BTW, expected_BTW, attention_mask_BT) -> None:
    """The models skip padding, which `Bert.encode` computes by default."""
    real = attention_mask_BT.bool()
    torch.testing.assert_close(found_BTW[real], expected_BTW[real], rtol=1e-4, atol=1e-5)


@pytest.mark.golden("xvlm", is_pretraining)
def test_pretraining_and_its_gradients_equal_the_reference(
    case, golden_model, assert_equal, assert_gradient_norms
):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    pairs, losses = run_pretraining(model, inputs)
    # Logits where the case has no label are not computed: ask for them by labels of some kind.
    with torch.no_grad():
        everywhere, _ = run_pretraining(model, inputs, labels=inputs["masked_ids"].clamp(min=0))
    found = {
        "image_embeds": pairs.image_embeds,
        "text_embeds": model.text.encode(inputs["text_ids"], inputs["text_atts"]),
        "image_feat": pairs.image_projection,
        "text_feat": pairs.text_projection,
        "temp_after_clamp": model.temperature,
        "itc_logits": pairs.image_projection @ pairs.text_projection.t() / model.temperature,
        "itm_logits": pairs.match_logits,
        "mlm_logits": everywhere.token_logits.view(*inputs["masked_ids"].shape, -1),
        "loss_total": torch.stack(list(losses.values())).sum(),
        **{f"loss_{name}": value for name, value in losses.items()},
    }
    if pairs.boxes is not None:
        found["bbox_pred"] = pairs.boxes
        found["image_embeds_fullatts"] = pairs.full_embeds[inputs["idx_to_group_img"]]
        everything = pretrain_losses(
            pairs,
            model.temperature,
            target_boxes_B4=inputs["target_bbox"],
        )
        found["loss_bbox_without_image_mask"] = everything["bbox"]
        found["loss_giou_without_image_mask"] = everything["giou"]
    assert found.keys() == expected.keys()
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

    found["loss_total"].backward()
    assert_gradient_norms(model, case.json("grads"))


@pytest.mark.golden("xvlm", lambda case: "region_batch_at_iteration" in case.config)
def test_training_steps_equal_the_reference(case, golden_model, assert_equal):
    config, inputs, expected = case.config, case.tensors("inputs"), case.tensors("outputs")
    model = golden_model(case)
    plan, clip = config["schedular"], config["clip_grad_norm"]
    optimizer = AdamW(
        parameter_groups(
            model,
            lr=config["optimizer"]["lr"],
            weight_decay=config["optimizer"]["weight_decay"],
            rules=parameter_rules(model, fresh_lr_scale=config["optimizer"]["lr_mult"]),
        ),
        betas=config["betas"],
        eps=config["eps"],
    )
    norms, rates = [], []
    for iteration, regions in enumerate(config["region_batch_at_iteration"]):
        factor = linear(iteration, warmup=plan["num_warmup_steps"], total_steps=plan["num_training_steps"])
        for group in optimizer.param_groups:
            group["lr"] = config["optimizer"]["lr"] * group["lr_scale"] * factor
        for stream in ("region", "image") if regions else ("image",):
            start = f"it{iteration}_{stream}_"
            batch = {key.removeprefix(start): x for key, x in inputs.items() if key.startswith(start)}
            optimizer.zero_grad()
            _, losses = run_pretraining(model, batch, hardest=True)
            values = torch.stack(list(losses.values()))
            values.sum().backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            assert_equal({f"{start}losses": values}, expected)
    assert_equal({"grad_norm_before_clip": torch.stack(norms).double()}, expected)
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected["group_lr_at_step"])

    final = xvlm.xvlm_adapter(model).to_source(model.state_dict())
    assert_equal(
        {key: final[key.removeprefix("final.")] for key in expected if key.startswith("final.")}, expected
    )
    norms = {key: final[key].norm().item() for key in case.json("final_param_norms")}
    assert norms == pytest.approx(case.json("final_param_norms"), rel=1e-4, abs=1e-5)


def is_retrieval_training(case) -> bool:
    return "loss_itc_without_idx" in case.tensor_names("outputs")


@pytest.mark.golden("xvlm", is_retrieval_training)
def test_retrieval_losses_and_gradients_equal_the_reference(
    case, golden_model, assert_equal, assert_gradient_norms
):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    pairs = model.pair(
        Images(inputs["image"]),
        inputs["text_ids"],
        inputs["text_atts"],
        identities_B=inputs["idx"],
        negatives=Negatives(inputs["neg_image_idx"], inputs["neg_text_idx"]),
    )
    losses = retrieval_losses(pairs, model.temperature, identities_B=inputs["idx"])
    found = {
        "image_embeds": pairs.image_embeds,
        "text_embeds": model.text.encode(inputs["text_ids"], inputs["text_atts"]),
        "image_feat": pairs.image_projection,
        "text_feat": pairs.text_projection,
        "itm_logits": pairs.match_logits,
        "loss_itc": losses["itc"],
        "loss_itc_without_idx": retrieval_losses(pairs, model.temperature)["itc"],
        "loss_itm": losses["itm"],
        "loss_total": losses["itc"] + losses["itm"],
    }
    assert found.keys() == expected.keys()
    assert_equal(found, expected)
    assert_equal_at_real_tokens(pairs.text_embeds, expected["text_embeds"], inputs["text_atts"])
    drawn = hardest_negatives(model, pairs.image_projection, pairs.text_projection, inputs["idx"])
    assert torch.equal(drawn.image, inputs["neg_image_idx"])
    assert torch.equal(drawn.text, inputs["neg_text_idx"])
    found["loss_total"].backward()
    assert_gradient_norms(model, case.json("grads"))


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
