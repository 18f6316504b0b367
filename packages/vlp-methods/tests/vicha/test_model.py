"""ViCHA's pre-training and retrieval: parity with the reference, and what its cases do not show."""

import copy

import pytest
import torch
from vlp_core import models
from vlp_core.images import Concepts, Images
from vlp_core.losses import Negatives, momentum_targets, negative_weights
from vlp_core.models.fusion.official import Contents
from vlp_core.models.vicha import checkpoints as vicha
from vlp_core.models.vicha.model import NOT_TAUGHT
from vlp_core.momentum import FeatureQueue, follow, teacher_of
from vlp_core.weights import loading
from vlp_methods.vicha.losses import (
    hidden_loss,
    momentum_contrastive_loss,
    pretrain_losses,
    retrieval_losses,
)

TIED = (
    "text_encoder.cls.predictions.decoder.weight",
    "text_encoder.cls.predictions.decoder.bias",
)
"""Second names in the reference, whose gradients it states twice."""


def stage(case) -> str:
    found = vicha.FILES.stage(vicha.split(case.tensors("weights")).model)
    assert found in ("pretrain", "retrieval")
    return found


def arguments(case) -> dict:
    """Arguments of `create` for a case; which parts it has is told by its weights."""
    config, bert = case.config, case.config["bert"]
    parts = {name.split(".")[0] for name in case.tensor_names("weights")}
    text = {
        "vocabulary": bert["vocab_size"],
        "width": bert["hidden_size"],
        "layers": bert["num_hidden_layers"],
        "heads": bert["num_attention_heads"],
        "hidden": bert["intermediate_size"],
        "positions": bert["max_position_embeddings"],
        "fusion_layer": bert["fusion_layer"],
    }
    vision = {
        "kind": "vit",
        "image_size": config["image_res"],
        "patch": config["patch_size"],
        "width": config["vision_width"],
        "depth": config["vit_depth"],
        "heads": config["vit_heads"],
        "local_depth": 0,
    }
    found = {
        "vision": vision,
        "text": text,
        "embed_width": config["embed_dim"],
        "heads": ["contrast", "match"],
    }
    if "text_encoder.cls.predictions.bias" in case.tensor_names("weights"):
        found["heads"].append("masked_language")
    if "kw_proj" in parts:
        found["concepts"] = {"layers": config["num_hidden_layers_kw"]}
    if "vision_proj_hidden" in parts:
        found["heads"].append("hidden")
        found["levels"] = config["num_hidden_align"]
    if "mask_token" in parts:
        found["masked_image"] = {
            "by": "both" if "mae_proj_uni" in parts else "decoder" if "decoder_blocks" in parts else "fusion",
            "width": config["decoder_embed_dim"],
            "depth": config["decoder_depth"],
            "heads": config["decoder_num_heads"],
            "ratio": config["mask_ratio"],
        }
    return found


def golden_parts(case):
    """Model, teacher and queue of a case, in evaluation mode as the reference ran them; the teacher has
    followed once, as its forward begins."""
    model = models.create("vicha", stage(case), **arguments(case))
    state = vicha.split(case.tensors("weights"))
    loading.load(model, state.model, vicha.vicha_adapter(model))
    teacher = teacher_of(model, without=NOT_TAUGHT)
    loading.load(teacher, state.teacher, vicha.vicha_adapter(teacher))
    queue = FeatureQueue(case.config["queue_size"], case.config["embed_dim"], identities="ids" in state.queue)
    queue.load_state_dict(state.queue)
    follow(teacher, model, case.config["momentum"])
    return model.eval(), teacher.eval(), queue


def images_of(case, inputs) -> Images:
    """The images of a case, with their concepts where its model sees them."""
    sees = "kw_proj.weight" in case.tensor_names("weights")
    return Images(inputs["image"], concepts=Concepts(inputs["kw_ids"], inputs["kw_mask"]) if sees else None)


def source_gradients(model) -> dict[str, float]:
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    source = vicha.vicha_adapter(model).to_source(ours, gradients=True)
    return {name: gradient.norm().item() for name, gradient in source.items()}


def assert_gradients(model, expected: dict[str, float | None]) -> None:
    reference = {name: norm for name, norm in expected.items() if norm is not None and name not in TIED}
    assert source_gradients(model) == pytest.approx(reference, rel=1e-3, abs=1e-6)


def assert_sums(found, expected, *, step: float = 0.0) -> None:
    """Sum and L2 norm of each tensor, after an update whose largest step is `step`.

    Adam blows a gradient that is rounding noise up to a full step of either sign. A bias of keys moves no
    attention weight, so all its gradients are noise; elsewhere one number may be, which shows in the sum.
    """
    assert expected.keys() - found.keys() <= {*TIED}
    for name in expected.keys() & found.keys():
        noisy = 0
        if name.endswith(("attention.self.key.bias", "crossattention.self.key.bias")):
            noisy = len(found[name])
        elif name.endswith("attn.qkv.bias"):
            noisy = len(found[name]) // 3
        off = 2 * step * noisy
        total, norm = found[name].double().sum().item(), found[name].double().norm().item()
        assert total == pytest.approx(expected[name][0], rel=1e-4, abs=2e-4 + 2 * step + off), name
        assert norm == pytest.approx(expected[name][1], rel=1e-4, abs=2e-5 + off), name


@pytest.mark.golden("vicha", lambda case: {"mlm_input_ids", "loss_mlm"} <= case.tensor_names("outputs"))
def test_pretraining_and_its_gradients_equal_the_reference(case, assert_equal):
    model, teacher, queue = golden_parts(case)
    config, inputs, expected = case.config, case.tensors("inputs"), case.tensors("outputs")
    labels, images = expected["mlm_labels"], images_of(case, inputs)
    places = torch.arange(labels.shape[1]).expand_as(labels)
    texts = images, inputs["text_ids"], inputs["text_mask"], expected["mlm_input_ids"], places
    model.clamp_temperature()
    taught = teacher.teach(*texts, labels)
    negatives = Negatives(expected["neg_image_idx"], expected["neg_text_idx"])
    more = {
        "taught": taught,
        "negatives": negatives,
        "patch_noise_BL": inputs.get("mim_noise"),
    }
    pairs = model.pretrain(*texts, labels, **more)
    t = model.temperature.detach()
    keys = {
        "i2t": torch.cat([taught.text_projection, queue.text]),
        "t2i": torch.cat([taught.image_projection, queue.image]),
    }
    teacher_side = {"i2t": taught.image_projection, "t2i": taught.text_projection}
    student_side = {"i2t": pairs.image_projection, "t2i": pairs.text_projection}
    found = {
        "image_embeds": pairs.image_embeds,
        "image_embeds_m": teacher.encode_image(images).embeds,
        "image_feat": pairs.image_projection,
        "text_feat": pairs.text_projection,
        "image_feat_m": taught.image_projection,
        "text_feat_m": taught.text_projection,
        "text_embeds": model.text.encode(inputs["text_ids"], inputs["text_mask"]),
        "itm_logits": pairs.match_logits,
        **{f"sim_{way}": student_side[way] @ keys[way].t() / t for way in keys},
        **{
            f"sim_{way}_targets": momentum_targets(
                teacher_side[way], keys[way], temperature=t, alpha=config["alpha"]
            )
            for way in keys
        },
    }
    image_weights, text_weights = negative_weights(
        pairs.image_projection,
        pairs.text_projection,
        temperature=t,
        image_keys_BE=taught.image_projection,
        text_keys_BE=taught.text_projection,
        floor=0.0,
    )
    found |= {"weights_t2i": image_weights, "weights_i2t": text_weights}
    if images.concepts is not None:
        found["kw_embeds"] = model.vision.concepts(images.concepts)
    if pairs.patches is not None and pairs.patches.predicted is not None:
        found |= {
            "mim_pred": pairs.patches.predicted,
            "mim_target": pairs.patches.targets,
            "mim_mask": pairs.patches.removed,
        }
    level_losses = []
    if pairs.hidden_image is not None:
        level_losses = hidden_loss(
            pairs.hidden_image, pairs.hidden_text, pairs.hidden_image, pairs.hidden_text, model.temperature
        )
        found |= {f"loss_ita_level_{level}": loss for level, loss in enumerate(level_losses)}
    losses = pretrain_losses(
        pairs,
        taught,
        model.temperature,
        queue,
        alpha=config["alpha"],
        level_weights=config["ita_hidden_weights"],
        hidden_weight=config["ita_hidden_weight"],
        masked_image_weight=config.get("mae_lambda", 1.0),
    )
    total = torch.stack(list(losses.values())).sum()
    found |= {
        "loss_mlm": losses["mlm"],
        "loss_itm": losses["itm"],
        "loss_ita_main": losses["itc"],
        "loss_ita": losses["itc"] + losses.get("hidden", 0),
        "loss_total": total,
        "image_queue_after": queue.image.t(),
        "text_queue_after": queue.text.t(),
    }
    if "mim" in losses:
        found["loss_mim"] = losses["mim"]
    if "hidden" in losses:
        found["loss_ita_hidden_weighted_sum"] = losses["hidden"] / config["ita_hidden_weight"]
    after = vicha.join(
        Contents({}, vicha.vicha_adapter(teacher).to_source(teacher.state_dict()), queue.state_dict())
    )
    found |= {key: after[key.removeprefix("after.")] for key in expected if key.startswith("after.")}
    assert_equal(found, expected)
    # What the reference computes everywhere is computed at masked places only.
    labelled = labels != -100
    for name, logits in (("mlm_logits", pairs.token_logits), ("logits_m", taught.token_logits)):
        torch.testing.assert_close(logits, expected[name][labelled], rtol=1e-4, atol=2e-5)
    checked = {
        *found,
        "mlm_logits",
        "logits_m",
        "mlm_labels",
        "mlm_input_ids",
        "itm_labels",
        "queue_ptr_after",
    }
    checked |= {"neg_image_idx", "neg_text_idx", "mim_ids_keep", "mim_ids_restore"}
    checked |= {
        f"{side}_hidden_cls_{level}" for side in ("image", "text") for level in range(len(level_losses))
    }
    assert not expected.keys() - checked
    assert queue.pointer == expected["queue_ptr_after"]
    assert torch.equal(image_weights.argmax(1), expected["neg_image_idx"])
    assert torch.equal(text_weights.argmax(1), expected["neg_text_idx"])

    total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert_gradients(model, case.json("grads"))
    assert_sums(after, case.json("momentum_after"))
    rate = config["adamw_step"]["lr"]
    torch.optim.AdamW(decayed(model, config["adamw_step"]["weight_decay"]), lr=rate).step()
    state = vicha.vicha_adapter(model).to_source(model.state_dict())
    assert_sums(state, case.json("after_adamw_step"), step=rate)


def decayed(model, weight_decay: float) -> list[dict]:
    """The reference's groups: vectors and biases do not decay. In the source, class and mask tokens are no
    vectors."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        vector = parameter.ndim == 1 and not name.endswith(("class_token", "mask_token"))
        groups[not vector].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


@pytest.mark.golden("vicha", lambda case: {"idx_queue_after", "loss_ita"} <= case.tensor_names("outputs"))
def test_retrieval_and_its_gradients_equal_the_reference(case, assert_equal):
    model, teacher, queue = golden_parts(case)
    config, inputs, expected = case.config, case.tensors("inputs"), case.tensors("outputs")
    images, identities = images_of(case, inputs), inputs["idx"].flatten()
    batch = images, inputs["text_ids"], inputs["text_mask"]
    taught = teacher.teach(*batch)
    pairs = model.pair(
        *batch,
        taught=taught,
        negatives=Negatives(expected["neg_image_idx"], expected["neg_text_idx"]),
    )
    t = model.temperature.detach()
    image_weights, text_weights = negative_weights(
        pairs.image_projection,
        pairs.text_projection,
        temperature=t,
        ids_B=identities,
        image_keys_BE=taught.image_projection,
        text_keys_BE=taught.text_projection,
        floor=0.0,
    )
    matches = identities[:, None] == torch.cat([identities, queue.ids])[None, :]
    keys = torch.cat([taught.text_projection, queue.text]), torch.cat([taught.image_projection, queue.image])
    found = {
        "image_embeds": pairs.image_embeds,
        "kw_embeds": model.vision.concepts(images.concepts),
        "text_embeds": model.text.encode(inputs["text_ids"], inputs["text_mask"]),
        "image_feat": pairs.image_projection,
        "image_feat_m": taught.image_projection,
        "text_feat": pairs.text_projection,
        "text_feat_m": taught.text_projection,
        "itm_logits": pairs.match_logits,
        "weights_t2i": image_weights,
        "weights_i2t": text_weights,
        "sim_targets": matches.float() / matches.sum(1, keepdim=True),
        "sim_i2t": pairs.image_projection @ keys[0].t() / t,
        "sim_t2i": pairs.text_projection @ keys[1].t() / t,
        "sim_i2t_targets": momentum_targets(
            taught.image_projection, keys[0], temperature=t, alpha=config["alpha"], matches_BM=matches
        ),
        "sim_t2i_targets": momentum_targets(
            taught.text_projection, keys[1], temperature=t, alpha=config["alpha"], matches_BM=matches
        ),
    }
    losses = retrieval_losses(
        pairs, taught, model.temperature, queue, identities_B=identities, alpha=config["alpha"]
    )
    total = losses["itc"] + losses["itm"]
    after = vicha.join(Contents({}, {}, queue.state_dict()))
    found |= {"loss_ita": losses["itc"], "loss_itm": losses["itm"], "loss_total": total}
    found |= {
        f"{name}_after": after[name] for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr")
    }
    assert_equal(found, expected)
    assert not expected.keys() - found.keys() - {"neg_image_idx", "neg_text_idx"}
    assert torch.equal(image_weights.argmax(1), expected["neg_image_idx"])
    assert torch.equal(text_weights.argmax(1), expected["neg_text_idx"])
    total.backward()
    assert_gradients(model, case.json("grads"))


@pytest.mark.golden("vicha", lambda case: "reference_loss_rank1" in case.tensor_names("outputs"))
def test_hierarchy_of_two_ranks_equals_the_reference(case):
    """Both forms of the targets, on the projected features that every rank would gather."""
    inputs, expected, weights = case.tensors("inputs"), case.tensors("outputs"), case.tensors("weights")
    config, gradients = case.config, case.json("grads")
    levels, ranks = range(config["levels"]), range(len(expected) // 2)
    for form, targets in (("reference", "as_released"), ("corrected", "own")):
        for rank in ranks:
            parameters = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}

            def features(side: str, of: int, parameters=parameters) -> torch.Tensor:
                name = {"image": "vision", "text": "text"}[side]
                return torch.stack(
                    [
                        torch.nn.functional.normalize(
                            torch.nn.functional.linear(
                                inputs[f"{side}_hidden_cls_rank{of}_{level}"],
                                parameters[f"{name}_proj_hidden.{level}.weight"],
                                parameters[f"{name}_proj_hidden.{level}.bias"],
                            ),
                            dim=-1,
                        )
                        for level in levels
                    ]
                )

            everyone = [
                torch.cat([features(side, of) for of in ranks], dim=1).detach() for side in ("image", "text")
            ]
            loss = hidden_loss(
                features("image", rank),
                features("text", rank),
                *everyone,
                parameters["temp"],
                first=rank * config["batch_per_rank"],
                targets=targets,
            )
            total = (torch.tensor(config["weights"], dtype=loss.dtype) * loss).sum()
            torch.testing.assert_close(total, expected[f"{form}_loss_rank{rank}"], rtol=1e-4, atol=1e-5)
            total.backward()
            wanted = {
                name.split(".", 1)[1]: norm
                for name, norm in gradients.items()
                if name.startswith(f"{form}_rank{rank}.")
            }
            found = {name: parameters[name].grad.norm().item() for name in wanted}
            assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)


@pytest.mark.golden("vicha", lambda case: {"score_i2t", "sims_i2t"} <= case.tensor_names("outputs"))
def test_scores_of_retrieval_equal_the_reference(case, assert_equal):
    inputs, expected, config = case.tensors("inputs"), case.tensors("outputs"), case.config
    model = models.create("vicha", stage(case), **arguments(case))
    loading.load(model, case.tensors("weights"), vicha.vicha_adapter(model))
    model.eval()
    image = model.encode_image(images_of(case, inputs))
    text = model.encode_text(inputs["text_ids"], inputs["text_mask"])
    similarity = image.projection @ text.projection.t()
    scores = {}
    for name, table in (("score_i2t", similarity), ("score_t2i", similarity.t())):
        rows, columns = table.topk(config["k_test"], dim=1).indices.shape
        chosen = table.topk(config["k_test"], dim=1).indices.flatten()
        queries = torch.arange(rows).repeat_interleave(columns)
        pair = (queries, chosen) if name == "score_i2t" else (chosen, queries)
        scores[name] = torch.full_like(table, -100.0)
        scores[name][queries, chosen] = model.match(image, text, *pair)
    found = {
        "image_embeds": image.projection,
        "text_embeds": text.projection,
        "sims_i2t": similarity,
        **scores,
    }
    assert_equal(found, expected)
    assert found.keys() == expected.keys()


# ---- without golden cases
# ------------------------------------------------------------------------------------------------------------


def tiny(**changes):
    torch.manual_seed(0)
    found = {
        "vision": {
            "kind": "vit",
            "image_size": 32,
            "patch": 8,
            "width": 16,
            "depth": 3,
            "heads": 2,
            "local_depth": 1,
        },
        "text": {
            "vocabulary": 40,
            "width": 16,
            "layers": 4,
            "heads": 2,
            "hidden": 32,
            "positions": 20,
            "fusion_layer": 2,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "embed_width": 8,
        "concepts": {"layers": 1},
        "levels": 2,
        "masked_image": {"width": 16, "depth": 1, "heads": 2},
    }
    return models.create("vicha", "pretrain", **{**found, **changes})


def batch(rows: int = 4, *, length: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(length) < torch.tensor([[5], [7], [3], [6]]).repeat(rows // 4, 1)).long()
    ids = torch.randint(5, 40, (rows, length)) * mask
    places = torch.tensor([[1, 2], [3, 0], [1, 0], [0, 0]]).repeat(rows // 4, 1)
    labels = ids.gather(1, places).masked_fill(places == 0, -100)
    return {
        "image": torch.randn(rows, 3, 32, 32),
        "ids": ids,
        "mask": mask,
        "masked": ids.scatter(1, places, 4).index_fill(1, torch.tensor([0]), 2),
        "places": places,
        "labels": labels,
    }


def words(rows: int = 4) -> Concepts:
    torch.manual_seed(2)
    return Concepts(
        torch.randint(5, 40, (rows, 6)), (torch.arange(6) < torch.tensor([[6], [4], [2], [5]])).long()
    )


def step(model, data, concepts: Concepts | None, **more):
    teacher = teacher_of(model, without=NOT_TAUGHT)
    queue = FeatureQueue(16, 8)
    pixels, *texts = data.values()
    images = Images(pixels, concepts=concepts)
    taught = teacher.teach(images, *texts)
    pairs = model.pretrain(images, *texts, taught=taught, **more)
    return pairs, pretrain_losses(pairs, taught, model.temperature, queue), queue


@pytest.mark.parametrize("by", ["decoder", "fusion", "both"])
def test_every_way_of_masking_images_trains_what_it_has(by):
    model = tiny(masked_image={"width": 16, "depth": 1, "heads": 2, "by": by})
    pairs, losses, _ = step(model, batch(), concepts=words())
    losses["mim"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = {name.split(".")[1] for name in moved if name.startswith("masked_image.")}
    assert ("project" in parts) == (by != "fusion") and ("project_fused" in parts) == (by != "decoder")
    assert "vision.encoder.patch.weight" in moved
    assert not any(name.startswith("vision.concepts") for name in moved)
    assert (pairs.patches.predicted is None) == (by == "fusion")


def test_a_batch_without_a_masked_token_loses_nothing():
    model, data = tiny(), batch()
    data["labels"] = torch.full_like(data["labels"], -100)
    _, losses, _ = step(model, data, concepts=words())
    assert losses["mlm"].item() == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_every_parameter_of_pretraining_gets_a_gradient():
    """DDP waits for one."""
    for changes in (
        {},
        {"concepts": None},
        {"heads": ["contrast", "match", "masked_language"], "masked_image": None},
    ):
        model = tiny(**changes)
        concepts = None if "concepts" in changes else words()
        _, losses, _ = step(model, batch(), concepts=concepts)
        torch.stack(list(losses.values())).sum().backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_hidden_padding_of_concepts_has_no_effect():
    """With visible_padding=False longer padding changes nothing; with the reference's way it does."""
    pixels, short = batch()["image"], words()
    long = Concepts(*(torch.nn.functional.pad(part, (0, 3)) for part in short))
    for visible in (True, False):
        model = tiny(concepts={"layers": 1, "visible_padding": visible}).eval()
        text = model.encode_text(batch()["ids"], batch()["mask"])
        rows = torch.arange(4)
        first, second = (
            model.match(model.encode_image(Images(pixels, concepts=concepts)), text, rows, rows)
            for concepts in (short, long)
        )
        assert torch.allclose(first, second, atol=1e-6) != visible


def test_concepts_belong_to_models_that_see_them():
    with pytest.raises(ValueError, match="sees visual concepts beside the image"):
        tiny().encode_image(Images(batch()["image"]))
    with pytest.raises(ValueError, match="VisionTransformer sees no visual concepts"):
        tiny(concepts=None).encode_image(Images(batch()["image"], concepts=words()))
    with pytest.raises(ValueError, match="4 images came with concepts of 3"):
        Images(batch()["image"], concepts=Concepts(*(part[:3] for part in words())))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 3}, "levels=3 of the hierarchy need more image blocks"),
        ({"heads": ["contrast", "boxes"]}, "unknown heads boxes"),
        ({"masked_image": {"by": "neither"}}, "by='neither' is not known"),
        ({"masked_image": {"by": "both", "width": 8, "heads": 2}}, "must be the image encoder's 16"),
        ({"concepts": {"layers": 1, "place": "middle"}}, "place='middle' is not known"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_swin_takes_concepts_behind_its_output_only():
    swin = {"kind": "swin", "image_size": 32, "window": 4, "width": 8, "depths": [1, 1], "heads": [1, 2]}
    plain = {"heads": ["contrast", "match", "masked_language"], "masked_image": None, "vision": swin}
    with pytest.raises(ValueError, match="SwinTransformer has no place for them"):
        tiny(**plain)
    model = tiny(**plain, concepts={"layers": 1, "place": "last"})
    features = model.encode_image(Images(batch()["image"], concepts=words()))
    assert features.embeds.shape == (4, model.vision.tokens + 6, 16)
    _, losses, _ = step(model, batch(), concepts=words())
    losses["itm"].backward()
    assert model.vision.concepts.project.weight.grad.abs().sum() > 0


def test_identities_spread_the_targets_over_batch_and_queue():
    model, data = tiny(), batch()
    teacher = teacher_of(model, without=NOT_TAUGHT)
    queue = FeatureQueue(6, 8, identities=True)
    given = Images(data["image"], concepts=words()), data["ids"], data["mask"]
    taught = teacher.teach(*given)
    identities = torch.tensor([7, 7, 8, 9])
    pairs = model.pair(*given, taught=taught, identities_B=identities)
    assert (identities[pairs.negatives.image] != identities).all()
    with pytest.raises(ValueError, match="identities go with a queue"):
        FeatureQueue(6, 8).put(taught.image_projection, taught.text_projection, identities)
    with pytest.raises(ValueError, match="identities need a queue that keeps them"):
        momentum_contrastive_loss(
            pairs, taught, model.temperature, FeatureQueue(6, 8), alpha=0.4, identities_B=identities
        )
    retrieval_losses(pairs, taught, model.temperature, queue, identities_B=identities)
    assert queue.ids.tolist() == [7, 7, 8, 9, -100, -100]


def test_models_can_be_copied_and_made_on_the_meta_device():
    with torch.device("meta"):
        empty = tiny()
    assert copy.deepcopy(empty).state_dict().keys() == tiny().state_dict().keys()
