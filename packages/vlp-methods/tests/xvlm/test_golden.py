"""Every task of X-VLM on the golden cases: the recipe's own task, made by its builder and started from the
official weights of the case as a run would be."""

import json
import math

import pytest
import torch
from vlp_core.models.xvlm import checkpoints as official
from vlp_core.recipe import inline
from vlp_core.text.generation import Sampled
from vlp_data.batch import (
    BoxBatch,
    CaptionBatch,
    CaptionReferencesBatch,
    ImageTextBatch,
    NlvrBatch,
    RegionBatch,
    RetrievalBatch,
    VqaBatch,
)
from vlp_eval.metrics.captioning import DocumentFrequency
from vlp_methods.engine.options import OptimizerOptions, ScheduleOptions, Training
from vlp_methods.engine.ranks import Ranks
from vlp_methods.engine.step import Updater

IGNORED = -100
KINDS = {"bert": "wordpiece", "roberta": "roberta"}
"""Tokenizer of a text encoder."""
UNMEASURED = ("data.val=null", "data.test=null", "evaluate={every: null, best: null}")


@pytest.fixture
def words(vocabulary):
    """`words(case)`: overrides that make a recipe of this package build the model of a case."""

    def of(case, *, weights: bool = True) -> tuple[str, ...]:
        config = case.config
        vision = official.vision_arguments(
            config["vision"], config["vision_config"], image_size=config["image_res"]
        )
        vision.pop("activation", None)  # CLIP's has one only
        if vision["kind"] == "swin":
            vision["drop_path"] = 0.0
        text = official.text_arguments(config["text_config"])
        size = text.pop("vocabulary")
        del text["pad_id"]
        files = vocabulary(text["kind"], size)
        found = [
            f"model.vision={inline(vision)}",
            f"model.text={inline(text)}",
            f"data.tokenizer={inline({'kind': KINDS[text['kind']], 'files': files})}",
            f"data.view.size={config['image_res']}",
            f"data.root={case.path}",
            "data.world=null",
        ]
        if "embed_dim" in config:
            found.append(f"model.embed_width={config['embed_dim']}")
        if weights:
            found.append(f"model.weights.model={case.path / 'weights.safetensors'}")
        return tuple(found)

    return of


def pretraining_batch(values: dict) -> ImageTextBatch | RegionBatch:
    common = {
        "keys": (),
        "image": values["image"],
        "text_ids": values["text_ids"],
        "attention_mask": values["text_atts"],
        "masked_ids": values["text_ids_masked"],
        "masked_positions": values["masked_pos"],
        "masked_labels": values["masked_ids"],
    }
    if "idx_to_group_img" not in values:
        return ImageTextBatch(**common)
    return RegionBatch(
        **common,
        image_index=values["idx_to_group_img"],
        image_attention_mask=values["image_atts"],
        target_boxes=values["target_bbox"],
        is_image=values["is_image"],
    )


def texts(values: dict) -> dict:
    return {
        "keys": (),
        "image": values["image"],
        "text_ids": values["text_ids"],
        "attention_mask": values["text_atts"],
    }


def negatives(values: dict) -> list[torch.Tensor]:
    """The draws of matching: an image for each text, then a text for each image."""
    return [values["neg_image_idx"][:, None], values["neg_text_idx"][:, None]]


@pytest.fixture
def check(assert_equal, assert_gradients):
    """`check(case, task, batch, names)`: losses (`names`: ours to those of the case), their sum and
    gradients."""

    def run(case, task, batch, names: dict[str, str]) -> None:
        expected = case.tensors("outputs")
        losses = task(batch)
        assert losses.keys() == names.keys()
        total = torch.stack(list(losses.values())).sum()
        assert_equal({names[key]: loss for key, loss in losses.items()}, expected)
        assert_equal({"loss_total": total}, expected)
        total.backward()
        assert_gradients(task.model, official.xvlm_adapter(task.model), case.json("grads"))

    return run


@pytest.mark.golden(
    "xvlm", lambda case: {"text_ids_masked", "image", "neg_image_idx"} <= case.tensor_names("inputs")
)
def test_pretraining(case, words, build, draws, check):
    inputs = case.tensors("inputs")
    job = build("xvlm/shapes", *words(case), "data.test=null")
    draws(multinomial=negatives(inputs))
    names = ("itc", "itm", "mlm") + (("bbox", "giou") if "idx_to_group_img" in inputs else ())
    check(case, job.task, pretraining_batch(inputs), {name: f"loss_{name}" for name in names})
    assert list(job.unused) == ["images"]
    assert list(map(id, job.unused["images"])) == list(map(id, job.task.model.bbox_head.parameters()))


@pytest.mark.golden("xvlm", lambda case: "loss_itc_without_idx" in case.tensor_names("outputs"))
@pytest.mark.parametrize("recipe", ["shapes_retrieval", "shapes_refcoco_weak"])
def test_retrieval_and_grounding_without_boxes(case, recipe, words, build, draws, check):
    inputs = case.tensors("inputs")
    job = build(f"xvlm/{recipe}", *words(case), *UNMEASURED)
    draws(multinomial=negatives(inputs))
    batch = RetrievalBatch(**texts(inputs), image_ids=inputs["idx"])
    check(case, job.task, batch, {"itc": "loss_itc", "itm": "loss_itm"})


@pytest.mark.golden("xvlm", lambda case: {"question_ids", "answer_ids"} <= case.tensor_names("inputs"))
def test_questions(case, words, build, check):
    inputs = case.tensors("inputs")
    job = build(
        "xvlm/shapes_vqa", *words(case), *UNMEASURED, "data.candidates=''", "answers={mode: generate}"
    )
    counts = inputs["answers_per_question"]
    batch = VqaBatch(
        keys=(),
        image=inputs["image"],
        question_ids=inputs["question_ids"],
        question_mask=inputs["question_atts"],
        answer_ids=inputs["answer_ids"],
        answer_mask=inputs["answer_atts"],
        answer_weights=inputs["answer_weights"],
        question_index=torch.arange(len(counts)).repeat_interleave(counts),
    )
    check(case, job.task, batch, {"answers": "loss_total"})


@pytest.mark.golden("xvlm", lambda case: {"image0", "image1", "targets"} <= case.tensor_names("inputs"))
def test_nlvr(case, words, build, check):
    inputs = case.tensors("inputs")
    inputs["image"] = torch.cat([inputs["image0"], inputs["image1"]])
    job = build("xvlm/shapes_nlvr", *words(case), *UNMEASURED)
    check(case, job.task, NlvrBatch(**texts(inputs), labels=inputs["targets"]), {"labels": "loss_total"})


@pytest.mark.golden("xvlm", lambda case: {"u_pair", "u_order"} <= case.tensor_names("inputs"))
def test_nlvr_domain(case, words, build, draws, check):
    inputs, expected = case.tensors("inputs"), case.tensors("outputs")
    job = build("xvlm/shapes_nlvr_domain", *words(case))
    draws(multinomial=[expected["picked"]], rand=[torch.stack([inputs["u_pair"], inputs["u_order"]])])
    batch = RetrievalBatch(**texts(inputs), image_ids=torch.arange(len(inputs["image"])))
    check(case, job.task, batch, {"assignment": "loss_total"})


def of_boxes(case) -> bool:
    return {"target_bbox", "image"} <= case.tensor_names("inputs") and "bbox" in case.config.get("model", "")


@pytest.mark.golden("xvlm", of_boxes)
def test_boxes(case, words, build, check):
    inputs = case.tensors("inputs")
    if "idx_to_group_img" in inputs:
        job = build("xvlm/shapes_refcoco_boxes_domain", *words(case))
        unused = torch.zeros_like(inputs["text_ids"])
        batch = RegionBatch(
            **texts(inputs),
            image_index=inputs["idx_to_group_img"],
            image_attention_mask=unused,
            masked_ids=unused,
            masked_positions=unused,
            masked_labels=unused,
            target_boxes=inputs["target_bbox"],
            is_image=inputs["is_image"],
        )
    else:
        job = build("xvlm/shapes_refcoco_boxes", *words(case), *UNMEASURED)
        batch = BoxBatch(**texts(inputs), target_boxes=inputs["target_bbox"])
    check(case, job.task, batch, {"bbox": "loss_bbox", "giou": "loss_giou"})


def of_captions(case) -> bool:
    return {"targets", "logits", "loss_domain_pretrain"} <= case.tensor_names("outputs")


@pytest.mark.golden("xvlm", of_captions)
def test_captions(case, words, build, check):
    inputs, expected = case.tensors("inputs"), case.tensors("outputs")
    smoothing = f"smoothing={case.config['label_smoothing']}"
    job = build("xvlm/shapes_captioning", *words(case), *UNMEASURED, smoothing)
    check(
        case, job.task, CaptionBatch(**texts(inputs), labels=expected["targets"]), {"caption": "loss_total"}
    )


@pytest.mark.golden("xvlm", of_captions)
def test_captions_domain(case, words, build, assert_equal):
    inputs, expected = case.tensors("inputs"), case.tensors("outputs")
    job = build("xvlm/shapes_captioning_domain", *words(case))
    labels = inputs["text_ids"].masked_fill(inputs["text_atts"] == 0, IGNORED)
    losses = job.task(CaptionBatch(**texts(inputs), labels=labels))
    assert_equal({"loss_domain_pretrain": losses["caption"]}, expected)


def of_rewards(case) -> bool:
    return case.path.is_dir() and case.has(f"{case.name}.json") and "sample_logprobs" in case.json(case.name)


@pytest.mark.golden("xvlm", of_rewards)
@pytest.mark.parametrize("baseline", ["greedy", "samples"])
def test_self_critical_captions(case, baseline, build, tmp_path, monkeypatch):
    """The captions are given, drawn ones and greedy ones; the task makes texts, rewards, baseline and loss of
    them, and a gradient for what it drew."""
    record = case.json(case.name)
    captions = record["sampled"] + record["greedy"]
    prompt = "a picture of "
    listed = sorted({word for text in [prompt, *captions] for word in text.split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *listed]))
    rows = [{"image": f"{number}.png", "caption": own} for number, own in enumerate(record["references"])]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    samples = record["samples_per_image"]
    job = build(
        "xvlm/shapes_captioning_scst",
        *UNMEASURED,
        "model.weights.model=''",
        f"data.root={tmp_path}",
        "data.world=null",
        "data.train.source.files=[captions.json]",
        f"reward={{samples: {samples}, baseline: {baseline}, max_tokens: 30}}",
    )
    task = job.task
    counts = {tuple(gram.split()): count for gram, count in record["document_frequency"].items()}
    task.reward.frequency = DocumentFrequency(record["ref_len"], counts)
    log_probability = torch.tensor(record["sample_logprobs"], requires_grad=True)

    def found(texts: list[str], log_probabilities: torch.Tensor) -> Sampled:
        ids = task.tokenizer.encode([prompt + text for text in texts], separator=True).ids
        one = torch.ones(len(texts), 1, dtype=torch.bool)
        return Sampled(torch.as_tensor(ids), log_probabilities[:, None], one)

    monkeypatch.setattr(task.model, "sample", lambda *_, **__: found(record["sampled"], log_probability))
    greedy = torch.zeros(len(record["greedy"]))
    monkeypatch.setattr(task.model, "greedy", lambda *_, **__: found(record["greedy"], greedy))
    size = job.task.model.vision.image_size
    batch = CaptionReferencesBatch(
        keys=(),
        image=torch.zeros(len(rows), 3, size, size),
        references=tuple(map(tuple, record["references"])),
    )
    loss = task(batch)["scst"]
    result = record["result"]
    assert loss.item() == pytest.approx(
        result["greedy" if baseline == "greedy" else "sample"]["loss"], rel=1e-4, abs=1e-5
    )
    loss.backward()
    scores = torch.tensor(result["scores_sampled"])
    if baseline == "greedy":
        against = torch.tensor(result["scores_greedy"]).repeat_interleave(samples)
    else:
        against = (scores.view(-1, samples).sum(1).repeat_interleave(samples) - scores) / (samples - 1)
    torch.testing.assert_close(log_probability.grad, (against - scores) / len(scores), rtol=1e-4, atol=1e-5)


@pytest.mark.golden("xvlm", lambda case: "region_batch_at_iteration" in case.config)
def test_engine_takes_the_steps_of_the_reference(case, words, build, monkeypatch, assert_equal):
    """Task, optimizer, clipping, schedule and mixing of a recipe, step by step as the official loop."""
    config, inputs, expected = case.config, case.tensors("inputs"), case.tensors("outputs")
    plan, peak, regions_at = config["schedular"], config["optimizer"], config["region_batch_at_iteration"]
    job = build(
        "xvlm/shapes",
        *words(case),
        "data.test=null",
        f"steps={plan['num_training_steps']}",
        f"schedule={{kind: {plan['sched']}, warmup_steps: {plan['num_warmup_steps']}}}",
        f"optimizer={{lr: {peak['lr']}, weight_decay: {peak['weight_decay']}, betas: {config['betas']}, "
        f"eps: {config['eps']}, lr_scale: {peak['lr_mult']}}}",
    )
    # The negatives of the reference are the most probable ones.
    monkeypatch.setattr(torch, "multinomial", lambda weights, count, **_: weights.topk(count).indices)

    def batches(stream: str):
        for iteration in range(len(regions_at)):
            start = f"it{iteration}_{stream}_"
            if found := {k.removeprefix(start): v for k, v in inputs.items() if k.startswith(start)}:
                yield pretraining_batch(found)

    recipe = Training(
        method="xvlm",
        task="pretrain",
        about="",
        steps=plan["num_training_steps"],
        clip_norm=config["clip_grad_norm"],
        optimizer=OptimizerOptions(lr=peak["lr"]),
        schedule=ScheduleOptions(kind=plan["sched"], warmup_steps=plan["num_warmup_steps"]),
    )
    updater = Updater(job, recipe, Ranks("cpu"))
    job.task.train()
    feeds = {"regions": batches("region"), "images": batches("image")}
    norms, rates = [], []
    for step, with_regions in enumerate(regions_at):
        updater.set_rates(step)
        for stream in ("regions", "images") if with_regions else ("images",):
            numbers = updater(stream, feeds[stream], step)
            *terms, total, norm = numbers.values.values()
            kind = "region" if stream == "regions" else "image"
            assert_equal({f"it{step}_{kind}_losses": torch.stack(terms).float()}, expected)
            torch.testing.assert_close(total.float(), torch.stack(terms).sum().float())
            norms.append(norm.double())
            rates.append(sorted({group["lr"] for group in job.optimizer.param_groups}))
    torch.testing.assert_close(torch.stack(norms), expected["grad_norm_before_clip"], rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(rates, expected["group_lr_at_step"].tolist(), strict=True):
        assert ours == pytest.approx(sorted(set(theirs)))
    model = job.task.model
    final = official.xvlm_adapter(model).to_source(model.state_dict())
    assert_equal(
        {key: final[key.removeprefix("final.")] for key in expected if key.startswith("final.")}, expected
    )
    norms = {key: final[key].norm().item() for key in case.json("final_param_norms")}
    assert norms == pytest.approx(case.json("final_param_norms"), rel=1e-4, abs=1e-5)
    assert all(math.isfinite(norm) for norm in norms.values())
