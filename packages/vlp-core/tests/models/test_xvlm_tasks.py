import pytest
import torch
import torch.nn.functional as F
from vlp_core.losses import masked_language_loss


def stacked(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second images when they are stacked as [all first, all second]."""
    return torch.arange(batch), batch + torch.arange(batch)


@pytest.mark.golden("xvlm", lambda case: {"image0", "image1", "targets"} <= case.tensor_names("inputs"))
def test_nlvr_fine_tuning_equals_the_reference(case, golden_model, assert_equal, assert_gradient_norms):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    images = torch.cat([inputs["image0"], inputs["image1"]])
    logits = model(images, *stacked(len(inputs["targets"])), inputs["text_ids"], inputs["text_atts"])
    loss = F.cross_entropy(logits, inputs["targets"])
    found = {"prediction": logits, "loss_total": loss}
    assert found.keys() == expected.keys()
    assert_equal(found, expected)
    loss.backward()
    assert_gradient_norms(model, case.json("grads"))


@pytest.mark.golden("xvlm", lambda case: {"u_pair", "u_order"} <= case.tensor_names("inputs"))
def test_nlvr_domain_stage_equals_the_reference(case, golden_model, assert_equal, assert_gradient_norms):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    own, picked = torch.arange(len(inputs["text_ids"])), expected["picked"]
    pair, first = inputs["u_pair"] > 1 / 3, inputs["u_order"] > 0.5
    labels = torch.where(pair, torch.where(first, 0, 1), 2)
    assert torch.equal(labels, expected["labels"])
    left = torch.where(pair & first, own, picked[:, 0])
    right = torch.where(pair, torch.where(first, picked[:, 0], own), picked[:, 1])
    embeds = model.vision(inputs["image"])
    logits = model.classify(embeds, left, right, inputs["text_ids"], inputs["text_atts"])
    loss = F.cross_entropy(logits, labels)
    assert_equal(
        {"image_feat": F.normalize(model.vision_proj(embeds[:, 0]), dim=-1), "loss_total": loss}, expected
    )
    loss.backward()
    assert_gradient_norms(model, case.json("grads"))


@pytest.mark.golden("xvlm", lambda case: {"question_ids", "answer_ids"} <= case.tensor_names("inputs"))
def test_vqa_training_equals_the_reference(case, golden_model, assert_equal, assert_gradient_norms):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    ids, mask = inputs["answer_ids"], inputs["answer_atts"]
    counts = inputs["answers_per_question"]
    questions = model.ask(inputs["image"], inputs["question_ids"], inputs["question_atts"])
    index = torch.arange(len(counts)).repeat_interleave(counts)
    logits = model.answer(questions, inputs["question_atts"], ids, mask, index)
    targets = ids.masked_fill(ids == case.config["pad_token_id"], -100)[:, 1:]
    per_answer = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(1)
    total = (inputs["answer_weights"] * per_answer).sum() / len(counts)
    found = {
        "question_states": questions,
        "answer_logits": logits,
        "answer_loss": per_answer,
        "loss_total": total,
    }
    assert_equal(found, expected)
    total.backward()
    assert_gradient_norms(model, case.json("grads"))


@pytest.mark.golden(
    "xvlm",
    lambda case: {"targets", "logits", "loss_domain_pretrain"} <= case.tensor_names("outputs"),
)
def test_captioning_losses_equal_the_reference(case, golden_model, assert_equal, assert_gradient_norms):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    ids, mask = inputs["text_ids"], inputs["text_atts"]
    logits = model(inputs["image"], ids, mask)
    plain = masked_language_loss(logits[:, :-1], ids.masked_fill(mask == 0, -100)[:, 1:])
    assert_equal({"logits": logits, "loss_domain_pretrain": plain}, expected)
    # The smoothed loss of the fine-tuning recipe, as the reference weighs it: 1-s on the gold token, s/V on every other one.
    targets = expected["targets"][:, 1:]
    kept = targets != -100
    smoothing = case.config["label_smoothing"]
    target = torch.full_like(logits[:, :-1][kept], smoothing / logits.shape[-1])
    target.scatter_(1, targets[kept][:, None], 1 - smoothing)
    loss = F.cross_entropy(logits[:, :-1][kept], target)
    assert_equal({"loss_total": loss}, expected)
    loss.backward()
    assert_gradient_norms(model, case.json("grads"))
