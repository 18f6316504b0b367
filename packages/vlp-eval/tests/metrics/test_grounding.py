"""Overlap of boxes and accuracy per split, against the evaluation of X-VLM."""

import numpy as np
import pytest
import torch
from vlp_core.explain import detection_scores
from vlp_eval.metrics import grounding


def has_references(case):
    return case.has("dets.json", "references.json", "predictions.safetensors")


def references(case):
    """Rows, boxes and splits of the expressions by number: several are about the same reference."""
    known = {one["ref_id"]: one for one in case.json("references")}
    ids = case.tensors("predictions")["ref_ids"].tolist()
    rows = [known[one] for one in ids]
    truth = {number: row["bbox_xywh"] for number, row in enumerate(rows)}
    return rows, truth, {number: row["split"] for number, row in enumerate(rows)}


@pytest.mark.golden("metrics", has_references)
def test_predicted_boxes_are_judged_as_by_x_vlm(case):
    rows, truth, splits = references(case)
    tensors, expected = case.tensors("predictions"), case.json("expected")
    sizes = [(row["width"], row["height"]) for row in rows]
    boxes = grounding.pixel_boxes(tensors["pred_cxcywh_normalised"].numpy(), sizes)
    for rule, key in (
        ("continuous", "iou_per_prediction_continuous"),
        ("inclusive", "iou_per_prediction_reference"),
    ):
        found = grounding.iou(boxes, list(truth.values()), rule=rule)
        np.testing.assert_allclose(found, expected[key], rtol=1e-4, atol=1e-5)
        accuracy = grounding.accuracy(dict(enumerate(boxes)), truth, splits, rule=rule)
        assert {f"{split}_d": one.accuracy / 100 for split, one in accuracy.items()} == pytest.approx(
            expected["bbox_accuracy"], abs=1e-9
        )


@pytest.mark.golden("metrics", has_references)
def test_detections_are_chosen_and_judged_as_by_x_vlm(case):
    rows, truth, splits = references(case)
    tensors, expected, detections = case.tensors("predictions"), case.json("expected"), case.json("dets")
    for alpha, want in expected["weakly_supervised_accuracy_by_alpha"].items():
        chosen = {}
        for one, (row, heat) in enumerate(zip(rows, tensors["attention_maps"], strict=True)):
            boxes = torch.tensor(detections[str(row["image_id"])])[:, :4]
            scores = detection_scores(heat, boxes, size=(row["width"], row["height"]), alpha=float(alpha))
            best = grounding.best_detection(scores.numpy())
            chosen[one] = boxes[best].tolist()
        found = grounding.accuracy(chosen, truth, splits)
        assert {f"{split}_d": one.accuracy / 100 for split, one in found.items()} == pytest.approx(
            want, abs=1e-9
        )


@pytest.mark.golden("metrics", lambda case: has_references(case) and "iou_table" in case.json("expected"))
def test_overlaps_equal_the_table(case):
    for row in case.json("expected")["iou_table"]:
        for rule, key in (("continuous", "continuous_iou"), ("inclusive", "reference_iou")):
            found = grounding.iou([row["box1_xywh"]], [row["box2_xywh"]], rule=rule)
            assert found[0] == pytest.approx(row[key], abs=1e-9), (rule, row)


@pytest.mark.golden("xvlm", lambda case: "pixel_iou" in case.tensor_names("outputs"))
def test_inclusive_rule_equals_x_vlm(case):
    inputs = case.tensors("inputs")
    found = grounding.iou(
        inputs["iou_boxes1_xywh"].numpy(), inputs["iou_boxes2_xywh"].numpy(), rule="inclusive"
    )
    np.testing.assert_allclose(found, case.tensors("outputs")["pixel_iou"].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.golden("xvlm", lambda case: {"pred_xywh_pixels", "iou"} <= case.tensor_names("outputs"))
def test_boxes_in_pixels_and_their_overlap_equal_x_vlm(case):
    outputs, config = case.tensors("outputs"), case.config
    boxes = grounding.pixel_boxes(outputs["bbox_pred"].numpy(), config["image_wh"])
    np.testing.assert_allclose(boxes, outputs["pred_xywh_pixels"].numpy(), rtol=1e-4, atol=1e-4)
    found = grounding.iou(boxes, config["ref_boxes_xywh"])
    np.testing.assert_allclose(found, outputs["iou"].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.golden("xvlm", lambda case: {"det_scores", "best_det"} <= case.tensor_names("outputs"))
def test_best_detection_equals_x_vlm(case):
    outputs = case.tensors("outputs")
    found = [grounding.best_detection(scores.numpy()) for scores in outputs["det_scores"]]
    assert found == outputs["best_det"].tolist()


def test_best_detection_may_have_a_score_below_zero_and_the_first_of_equal_ones_wins():
    assert grounding.best_detection([-3.0, -1.0, -1.0]) == 1
    assert grounding.best_detection([]) is None
    with pytest.raises(ValueError, match="NaN"):
        grounding.best_detection([1.0, np.nan])


@pytest.mark.golden(
    "vicha",
    lambda case: (
        {"gradcam_itm", "chosen_box", "iou", "heatmap_ref0_full_size"} <= case.tensor_names("outputs")
    ),
)
def test_detections_are_chosen_and_judged_as_by_vicha(case):
    outputs, given = case.tensors("outputs"), case.config["grounding_eval"]
    references = case.tensors("inputs")["ref_id"].tolist()
    chosen, truth, splits, overlaps = {}, {}, {}, []
    for row, number in enumerate(references):
        reference = given["Refs"][str(number)]
        image = str(reference["image_id"])
        size = (given["Imgs"][image]["width"], given["Imgs"][image]["height"])
        boxes = torch.tensor(given["dets"][image])[:, :4]
        best = grounding.best_detection(detection_scores(outputs["gradcam_itm"][row], boxes, size).numpy())
        chosen[row], splits[row] = boxes[best].tolist(), reference["split"]
        truth[row] = given["refToAnn"][str(number)]["bbox"]
        overlaps.append(grounding.iou([chosen[row]], [truth[row]], rule="inclusive")[0])
    np.testing.assert_allclose(list(chosen.values()), outputs["chosen_box"].numpy(), rtol=1e-6)
    np.testing.assert_allclose(overlaps, outputs["iou"].numpy(), rtol=1e-4, atol=1e-5)
    found = grounding.accuracy(chosen, truth, splits)
    assert {f"{split}_d": one.accuracy / 100 for split, one in found.items()} == case.config[
        "grounding_accuracy"
    ]


def test_overlap_of_one_half_is_right_and_no_detection_is_wrong():
    truth = {"half": (0, 0, 10, 10), "none": (0, 0, 10, 10), "less": (0, 0, 10, 10)}
    found = grounding.accuracy({"half": (0, 0, 10, 5), "none": None, "less": (0, 0, 10, 4.9)}, truth)
    assert found["all"].correct == 1 and found["all"].total == 3


def test_bad_boxes_are_refused():
    with pytest.raises(ValueError, match="rows of"):
        grounding.iou([1, 2, 3, 4], [[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="w and h not negative"):
        grounding.iou([[0, 0, -1, 2]], [[0, 0, 1, 2]])
    with pytest.raises(ValueError, match="row by row"):
        grounding.iou([[0, 0, 1, 2]], [[0, 0, 1, 2]] * 2)
    with pytest.raises(ValueError, match="not among"):
        grounding.accuracy({"a": None}, {"b": (0, 0, 1, 1)})
