"""ViCHA's tasks beyond retrieval: parity of questions, entailment and NLVR2 with their teachers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vlp_core import models
from vlp_core.images import Concepts, Images
from vlp_core.losses import answer_loss, distilled_cross_entropy, distilled_language_loss
from vlp_core.models.fusion.nlvr import assign, assignment_weights, released_pool
from vlp_core.models.vicha import checkpoints as vicha
from vlp_core.momentum import follow, teacher_of
from vlp_core.weights import loading

PAD = 0


def encoders(case) -> dict:
    """Arguments of `create` that all tasks of a case have in common."""
    config, bert = case.config, case.config["bert"]
    return {
        "vision": {
            "kind": "vit",
            "image_size": config["image_res"],
            "patch": config["patch_size"],
            "width": config["vision_width"],
            "depth": config["vit_depth"],
            "heads": config["vit_heads"],
            "local_depth": 0,
        },
        "text": {
            "vocabulary": bert["vocab_size"],
            "width": bert["hidden_size"],
            "layers": bert["num_hidden_layers"],
            "heads": bert["num_attention_heads"],
            "hidden": bert["intermediate_size"],
            "positions": bert["max_position_embeddings"],
            "fusion_layer": bert["fusion_layer"],
        },
        "concepts": {"layers": config["num_hidden_layers_kw"]},
    }


def open_case(case, stage: str, arguments: dict) -> tuple[nn.Module, nn.Module | None]:
    """Model and teacher of a case, in evaluation mode, the teacher moved as in the forward of the
    reference."""
    contents = vicha.split(case.tensors("weights"))
    model = models.create("vicha", stage, **arguments).eval()
    vicha.FILES.load(model, contents.model, stage=stage)
    if not contents.teacher:
        return model, None
    teacher = teacher_of(model)
    loading.load(teacher, contents.teacher, vicha.vicha_adapter(teacher))
    follow(teacher, model, case.config["momentum"])
    return model, teacher


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in found.items():
        torch.testing.assert_close(
            value.detach(), expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def assert_gradient_norms(model: nn.Module, expected: dict[str, float | None]) -> None:
    """Norms under the reference's names; a second name of a tensor must state the norm of the first."""
    adapter = vicha.vicha_adapter(model)
    ours = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    norms = {key: x.norm().item() for key, x in adapter.to_source(ours, gradients=True).items()}
    named = adapter.to_source(model.state_dict())
    for key in list(norms):
        norms |= {second: norms[key] for second, x in named.items() if x is named[key]}
    reference = {key: norm for key, norm in expected.items() if norm is not None}
    assert norms.keys() == reference.keys()
    assert norms == pytest.approx(reference, rel=1e-3, abs=1e-6)


@pytest.mark.golden("vicha", lambda case: {"answer_ids", "candidate_ids"} <= case.tensor_names("inputs"))
def test_questions_equal_the_reference(case):
    arguments = encoders(case)
    text = arguments["text"]
    arguments["decoder"] = {**text, "layers": text["layers"] - text["fusion_layer"], "fusion_layer": 0}
    model, teacher = open_case(case, "vqa", arguments)
    x, expected = case.tensors("inputs"), case.tensors("outputs")
    images = Images(x["image"], concepts=Concepts(x["kw_ids"], x["kw_mask"]))
    counts, ids = x["answers_per_question"], x["answer_ids"]
    index = torch.arange(len(counts)).repeat_interleave(counts)

    def answers(asked: nn.Module) -> tuple[Tensor, Tensor]:
        states = asked.ask(images, x["text_ids"], x["text_mask"])
        return states, asked.answer(states, x["text_mask"], ids, x["answer_mask"], index)

    states, logits = answers(model)
    with torch.no_grad():
        believed = answers(teacher)[1]
    labels = ids.masked_fill(ids == PAD, -100)
    losses = [
        distilled_language_loss(logits, labels, taught, alpha=case.config["alpha"])
        for taught in (None, believed)
    ]
    total, distilled = (answer_loss(loss, x["answer_weights"], len(counts)) for loss in losses)
    assert_equal(
        {
            "image_embeds": model.vision.encode(images).embeds,
            "question_states": states,
            "answer_logits": logits,
            "teacher_logits": believed[:, :-1],
            "per_answer_loss": losses[0],
            "loss_total": total,
            "loss_with_distillation": distilled,
        },
        expected,
    )
    total.backward()
    assert_gradient_norms(model, case.json("grads"))

    candidates = x["candidate_ids"], x["candidate_mask"]
    with torch.no_grad():
        ranked = model.rank_answers(states, x["text_mask"], *candidates, case.config["k_test"])
        start = candidates[0][:1, :1].expand(len(states), 1)
        first = model.answer(states, x["text_mask"], start, torch.ones_like(start), torch.arange(len(states)))
    assert torch.equal(ranked.indices, expected["topk_ids"])
    assert torch.equal(ranked.indices[:, 0], expected["predicted_answer"])
    assert_equal(
        {
            "topk_probs": ranked.scores,
            "first_token_probs": first[:, 0].softmax(1)[:, candidates[0][:, 1]],
        },
        expected,
    )
    # Scores are a softmax, so their logarithms equal the sums of log-probabilities up to one number for each
    # question.
    order = expected["log_probs_sum"].argsort(dim=1, descending=True)
    sums = expected["log_probs_sum"].gather(1, order).log_softmax(1)
    torch.testing.assert_close(ranked.scores.log(), sums, rtol=1e-4, atol=1e-5)


@pytest.mark.golden(
    "vicha",
    lambda case: {"image", "targets"} <= case.tensor_names("inputs"),
)
def test_entailment_equals_the_reference(case):
    model, teacher = open_case(case, "entailment", encoders(case))
    x, expected = case.tensors("inputs"), case.tensors("outputs")
    images = Images(x["image"], concepts=Concepts(x["kw_ids"], x["kw_mask"]))
    batch = images, x["text_ids"], x["text_mask"]
    prediction = model(*batch)
    with torch.no_grad():
        believed = teacher(*batch)
    loss = distilled_cross_entropy(prediction, x["targets"], believed, alpha=case.config["alpha"]).mean()
    found = {
        "image_embeds": model.vision.encode(images).embeds,
        "prediction": prediction,
        "eval_prediction": prediction,
        "prediction_m": believed,
        "loss_total": loss,
    }
    assert found.keys() == expected.keys()
    assert_equal(found, expected)
    loss.backward()
    assert_gradient_norms(model, case.json("grads"))


def nlvr_arguments(case) -> dict:
    arguments = encoders(case)
    text = arguments["text"]
    text["layers"] += text["layers"] - text["fusion_layer"]
    return arguments


@pytest.mark.golden("vicha", lambda case: {"image0", "image1", "targets"} <= case.tensor_names("inputs"))
def test_nlvr_equals_the_reference_with_both_teachers(case):
    model, teacher = open_case(case, "nlvr", nlvr_arguments(case))
    x, expected = case.tensors("inputs"), case.tensors("outputs")
    groups = [
        Images(x[f"image{side}"], concepts=Concepts(x[f"kw{side + 1}_ids"], x[f"kw{side + 1}_mask"]))
        for side in (0, 1)
    ]
    first = torch.arange(len(x["targets"]))
    pairs = first, first + len(first), x["text_ids"], x["text_mask"]
    pool, visible = model.encode(*groups)
    prediction = model.classify(pool, *pairs, visible)
    torch.testing.assert_close(model(groups, *pairs), prediction)
    with torch.no_grad():
        looked_at, seen = released_pool(model, teacher, *groups)
        as_released = teacher.classify(looked_at, *pairs, seen)
        believed = teacher(groups, *pairs)
    released, true = (
        distilled_cross_entropy(prediction, x["targets"], logits, alpha=case.config["alpha"]).mean()
        for logits in (as_released, believed)
    )
    shapes = [expected[f"image{side}_embeds"].shape[1] for side in (0, 1)]
    found = {
        "image0_embeds": pool[first, : shapes[0]],
        "image1_embeds": pool[first + len(first), : shapes[1]],
        "prediction": prediction,
        "eval_prediction": prediction,
        "prediction_m": as_released,
        "prediction_m_true_teacher": believed,
        "loss_total": released,
        "loss_true_teacher": true,
    }
    assert found.keys() == expected.keys()
    assert_equal(found, expected)
    released.backward()
    assert_gradient_norms(model, case.json("grads"))


@pytest.mark.golden("vicha", lambda case: {"rand_pair", "rand_order"} <= case.tensor_names("inputs"))
def test_nlvr_domain_stage_equals_the_reference(case):
    arguments = nlvr_arguments(case) | {"embed_width": case.config["embed_dim"]}
    model, _ = open_case(case, "nlvr_domain", arguments)
    x, expected = case.tensors("inputs"), case.tensors("outputs")
    pool, visible = model.encode(Images(x["image"], concepts=Concepts(x["kw_ids"], x["kw_mask"])))
    weights = assignment_weights(model.project(pool))
    # The golden numbers take the arg-max (of two: the two largest in order) in place of the draw.
    pairs = assign(weights.topk(2).indices, pair_uniform_B=x["rand_pair"], order_uniform_B=x["rand_order"])
    assert torch.equal(pairs.labels, expected["labels"])
    assert torch.equal(pairs.first, expected["first_image_idx"])
    assert torch.equal(pairs.second, expected["second_image_idx"])
    logits = model.classify(pool, pairs.first, pairs.second, x["text_ids"], x["text_mask"], visible)
    loss = F.cross_entropy(logits, pairs.labels)
    assert_equal({"image_embeds": pool, "weights": weights, "pred": logits, "loss_total": loss}, expected)
    loss.backward()
    assert_gradient_norms(model, case.json("grads"))


# What the cases do not show
# -----------------------------------------------------------------------------------------------------

VISION = {"kind": "vit", "image_size": 32, "patch": 16, "width": 8, "depth": 1, "heads": 2, "local_depth": 0}
TEXT = {
    "vocabulary": 30,
    "width": 16,
    "layers": 4,
    "heads": 2,
    "hidden": 24,
    "positions": 16,
    "fusion_layer": 2,
}


def make(stage: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(
        "vicha", stage, **{"vision": VISION, "text": TEXT, "concepts": {"layers": 1}, **arguments}
    ).eval()
    for parameter in model.parameters():  # initial values of 0.02 would hide mistakes
        nn.init.normal_(parameter, std=0.4)
    return model


def words(count: int, length: int, *, padded: int = 0) -> Concepts:
    ids = torch.randint(4, 30, (count, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    ids, mask = F.pad(ids, (0, padded)), F.pad(mask, (0, padded))
    return Concepts(ids, mask)


def pixels(number: int) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pair(concepts: list[Concepts]) -> list[Images]:
    """Two groups of two images with these concepts."""
    halves = pixels(4).split(2)
    return [Images(half, concepts=group) for half, group in zip(halves, concepts, strict=True)]


def texts(number: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, 30, (number, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return ids, mask


@pytest.mark.parametrize("lengths", [(3, 3), (3, 5), (5, 2)])
@pytest.mark.parametrize("visible_padding", [True, False])
def test_groups_of_concepts_do_not_see_how_far_others_are_padded(lengths, visible_padding):
    model = make("nlvr", head="relu", concepts={"layers": 1, "visible_padding": visible_padding})
    groups = pair([words(2, length, padded=1) for length in lengths])
    pool, visible = model.encode(*groups)
    for number, group in enumerate(groups):
        rows = slice(2 * number, 2 * number + 2)
        alone = model.vision.encode(group).embeds
        torch.testing.assert_close(pool[rows, : alone.shape[1]], alone)
        if visible is None:
            assert visible_padding
            assert lengths[0] == lengths[1]
            continue
        seen = alone.shape[1] - (0 if visible_padding else 1)
        assert visible[rows, :seen].all()
        assert not visible[rows, seen:].any()


def test_filling_of_a_pool_changes_no_class():
    model, (ids, mask) = make("nlvr", head="relu"), texts(2)
    index = torch.tensor([0, 1]), torch.tensor([2, 3])
    groups = pair([words(2, 3), words(2, 5)])
    pool, visible = model.encode(*groups)
    logits = model.classify(pool, *index, ids, mask, visible)
    torch.testing.assert_close(model(groups, *index, ids, mask), logits)
    spoiled = torch.where(visible[..., None], pool, 7.0)
    torch.testing.assert_close(model.classify(spoiled, *index, ids, mask, visible), logits)
    assert not torch.allclose(model.classify(spoiled, *index, ids, mask), logits)


def test_groups_without_what_the_encoder_reads_are_refused():
    model = make("nlvr", head="relu")
    with pytest.raises(ValueError, match="no images were given"):
        model.encode()
    with pytest.raises(ValueError, match="this model sees visual concepts beside the image; give `concepts`"):
        model.encode(Images(pixels(2)), Images(pixels(2), concepts=words(2, 3)))
    with pytest.raises(ValueError, match="sees no visual concepts; leave `concepts` out"):
        make("nlvr", concepts=None).encode(*pair([words(2, 3), words(2, 4)]))


@pytest.mark.parametrize("name", ["nlvr", "entailment"])
def test_classifiers_are_chosen_by_name(name):
    shapes = {
        "mlp": ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"],
        "relu": ["0.weight", "0.bias", "2.weight", "2.bias"],
    }
    for head, names in shapes.items():
        assert list(make(name, head=head).cls_head.state_dict()) == names
    with pytest.raises(ValueError, match="head='linear' is not known; choose mlp or relu"):
        make(name, head="linear")


def test_entailment_of_hidden_padding_does_not_depend_on_it():
    model = make("entailment", concepts={"layers": 1, "visible_padding": False}, classes=4)
    short, long = (Images(pixels(2), concepts=words(2, 3, padded=padded)) for padded in (0, 2))
    ids, mask = texts(2)
    logits = model(short, ids, mask)
    assert logits.shape == (2, 4)
    torch.testing.assert_close(model(long, ids, mask), logits)
    visible = make("entailment", classes=4)
    assert not torch.allclose(visible(short, ids, mask), visible(long, ids, mask))


def test_captions_look_at_concepts_and_not_at_hidden_padding():
    model = make("captioning", concepts={"layers": 1, "visible_padding": False})
    short, long = (Images(pixels(2), concepts=words(2, 3, padded=padded)) for padded in (0, 2))
    ids, mask = texts(2)
    logits = model(short, ids, mask)
    torch.testing.assert_close(model(long, ids, mask), logits)
    assert not torch.allclose(model(Images(pixels(2), concepts=words(2, 4)), ids, mask), logits)
    prompt = torch.tensor([[2], [2]])
    found = []
    for images in (short, long):
        embeds, visible = model.vision.encode(images)
        written = model.generate(embeds, prompt, end_id=3, max_tokens=6, image_mask_BL=visible)
        drawn = model.greedy(embeds, prompt, end_id=3, max_tokens=6, image_mask_BL=visible)
        sampled = model.sample(
            embeds,
            prompt,
            end_id=3,
            max_tokens=6,
            image_mask_BL=visible,
            generator=torch.Generator().manual_seed(0),
        )
        found.append((written.ids, drawn.ids, drawn.mean_log_probability(), sampled.mean_log_probability()))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(second, first)
