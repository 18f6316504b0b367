import pytest
import torch
import torch.nn.functional as F
from vlp_core.explain import attention_heat, detection_scores
from vlp_core.images import Images
from vlp_core.losses import (
    answer_loss,
    language_loss,
    mean_of_others,
    self_critical_loss,
)
from vlp_core.models.fusion.nlvr import assign, assignment_weights


def stacked(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second images when they are stacked as [all first, all second]."""
    return torch.arange(batch), batch + torch.arange(batch)


@pytest.mark.golden("xvlm", lambda case: {"image0", "image1", "targets"} <= case.tensor_names("inputs"))
def test_nlvr_fine_tuning_equals_the_reference(case, golden_model, assert_equal, assert_gradient_norms):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    groups = Images(inputs["image0"]), Images(inputs["image1"])
    logits = model(groups, *stacked(len(inputs["targets"])), inputs["text_ids"], inputs["text_atts"])
    loss = F.cross_entropy(logits, inputs["targets"])
    found = {"prediction": logits, "loss_total": loss}
    assert found.keys() == expected.keys()
    assert_equal(found, expected)
    loss.backward()
    assert_gradient_norms(model, case.json("grads"))


@pytest.mark.golden("xvlm", lambda case: {"u_pair", "u_order"} <= case.tensor_names("inputs"))
def test_nlvr_domain_stage_equals_the_reference(case, golden_model, assert_equal, assert_gradient_norms):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    embeds = model.vision(inputs["image"])
    projection = model.project(embeds)
    weights = assignment_weights(projection)
    pairs = assign(expected["picked"], pair_uniform_B=inputs["u_pair"], order_uniform_B=inputs["u_order"])
    assert torch.equal(pairs.labels, expected["labels"])
    logits = model.classify(embeds, pairs.first, pairs.second, inputs["text_ids"], inputs["text_atts"])
    loss = F.cross_entropy(logits, pairs.labels)
    assert_equal({"image_feat": projection, "sampling_weights": weights, "loss_total": loss}, expected)
    loss.backward()
    assert_gradient_norms(model, case.json("grads"))


@pytest.mark.golden("xvlm", lambda case: {"question_ids", "answer_ids"} <= case.tensor_names("inputs"))
def test_vqa_training_equals_the_reference(case, golden_model, assert_equal, assert_gradient_norms):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    ids, mask = inputs["answer_ids"], inputs["answer_atts"]
    counts = inputs["answers_per_question"]
    questions = model.ask(Images(inputs["image"]), inputs["question_ids"], inputs["question_atts"])
    index = torch.arange(len(counts)).repeat_interleave(counts)
    logits = model.answer(questions, inputs["question_atts"], ids, mask, index)
    labels = ids.masked_fill(ids == case.config["pad_token_id"], -100)
    per_answer = language_loss(logits, labels, reduction="row")
    total = answer_loss(per_answer, inputs["answer_weights"], len(counts))
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
    logits = model(Images(inputs["image"]), ids, mask)
    plain = language_loss(logits, ids.masked_fill(mask == 0, -100))
    loss = language_loss(logits, expected["targets"], smoothing=case.config["label_smoothing"])
    assert_equal({"logits": logits, "loss_domain_pretrain": plain, "loss_total": loss}, expected)
    loss.backward()
    assert_gradient_norms(model, case.json("grads"))


@pytest.mark.golden("xvlm", lambda case: {"candidate_ids", "candidate_atts"} <= case.tensor_names("inputs"))
@pytest.mark.parametrize("pairs", [1, 8, 1024])
def test_vqa_ranking_equals_the_reference(case, pairs, golden_model, assert_equal):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    mask = inputs["question_atts"]
    states = model.ask(Images(inputs["image"]), inputs["question_ids"], mask)
    answers = inputs["candidate_ids"], inputs["candidate_atts"]
    ranked = model.rank_answers(states, mask, *answers, case.config["k_test"], pairs=pairs)
    assert torch.equal(ranked.indices, expected["topk_ids"])
    assert_equal({"topk_probs": ranked.scores}, expected)
    start = model.answer(
        states, mask, answers[0][:1, :1].expand(len(mask), 1), mask[:, :1], torch.arange(len(mask))
    )
    assert_equal({"first_token_prob": start[:, 0].softmax(1)[:, answers[0][:, 1]]}, expected)


@pytest.mark.golden("xvlm", lambda case: {"beam_ids", "beam2_ids"} <= case.tensor_names("outputs"))
def test_captions_equal_the_reference(case, golden_model, assert_equal):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    embeds, prompt = model.vision(inputs["image"]), expected["prompt_ids"]
    ends = {
        key: case.config["generation"][f"{name}_token_id"]
        for key, name in (("end_id", "eos"), ("pad_id", "pad"))
    }
    for name, config in (("beam_ids", "generation"), ("beam2_ids", "beam2")):
        options = case.config[config]
        found = model.generate(
            embeds,
            prompt,
            beams=options["num_beams"],
            max_tokens=options["max_length"],
            min_tokens=options["min_length"],
            **ends,
        )
        assert torch.equal(padded(found.ids, expected[name], ends["pad_id"]), expected[name])
    drawn = model.greedy(embeds, prompt, max_tokens=case.config["generation"]["max_length"], **ends)
    assert torch.equal(padded(drawn.ids, expected["greedy_ids"], ends["pad_id"]), expected["greedy_ids"])
    assert_equal({"greedy_logprob": drawn.mean_log_probability()}, expected)


def padded(ids: torch.Tensor, like: torch.Tensor, pad_id: int) -> torch.Tensor:
    return F.pad(ids, (0, like.shape[1] - ids.shape[1]), value=pad_id)


@pytest.mark.golden("xvlm", lambda case: "gradcam" in case.tensor_names("outputs"))
@pytest.mark.parametrize("inference", [False, True])
def test_heat_maps_and_detections_equal_the_reference(case, inference, golden_model, assert_equal):
    model, inputs, expected = golden_model(case), case.tensors("inputs"), case.tensors("outputs")
    with torch.inference_mode(inference):
        embeds = model.vision(inputs["image"])
        ids, mask = inputs["text_ids"].clone(), inputs["text_atts"].clone()
        heat = attention_heat(model, embeds, ids, mask, layer=case.config["block_num"])
    assert heat.words.shape[:2] == mask.shape
    scores = torch.stack(
        [
            detection_scores(mean, torch.tensor(boxes), tuple(size), alpha=case.config["alpha"])
            for mean, boxes, size in zip(
                heat.mean, case.config["dets_xywh"], case.config["image_wh"], strict=True
            )
        ]
    )
    found = {"gradcam": heat.mean, "det_scores": scores}
    assert_equal(found, expected)
    assert torch.equal(scores.argmax(1), expected["best_det"])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.golden(
    "xvlm",
    lambda case: (
        case.path.is_dir() and case.has(f"{case.name}.json") and "sample_logprobs" in case.json(case.name)
    ),
)
def test_self_critical_loss_equals_the_reference(case):
    record = case.json(case.name)
    log_probability, samples = torch.tensor(record["sample_logprobs"]), record["samples_per_image"]
    result = record["result"]
    reward = torch.tensor(result["scores_sampled"])
    baselines = {
        "greedy": torch.tensor(result["scores_greedy"]).repeat_interleave(samples),
        "sample": mean_of_others(reward, samples),
    }
    for name, baseline in baselines.items():
        assert reward.mean().item() == pytest.approx(result[name]["mean_sample_score"])
        loss = self_critical_loss(log_probability, reward, baseline)
        assert loss.item() == pytest.approx(result[name]["loss"], abs=1e-5, rel=1e-4)
