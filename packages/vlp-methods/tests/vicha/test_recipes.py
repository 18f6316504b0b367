"""What the shipped recipes of ViCHA say, against the official configs (specification 2.7, 4, 4.1, 4.2)."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vlp_core import models
from vlp_core.recipe import RecipeError, dump
from vlp_methods.builders.model import derived_arguments, make
from vlp_methods.engine.entry import load, shipped
from vlp_methods.engine.optimizers import learning_rate, make_optimizer
from vlp_methods.sections.models import Start
from vlp_methods.vicha.pretrain import model_arguments
from vlp_methods.vicha.rules import parameter_rules

EPOCH = 100
"""Steps of an epoch where the user has to say how long it is."""


def official(name: str) -> Any:
    given = ["data.root=/data", "data.tokenizer.files=[vocab.txt]"]
    if name.startswith("pretrain"):
        given += [
            "model.weights.vision=deit.pth",
            "model.weights.text=bert.bin",
            f"teacher.ramp_steps={EPOCH}",
        ]
    else:
        given.append("model.weights.model=x")
    if name.startswith(("pretrain", "vqa", "nlvr_domain")):
        given += [f"schedule.steps_per_epoch={EPOCH}", f"steps={EPOCH * RECIPES[name]['epochs']}"]
    return load(f"vicha/{name}", given).settings


RECIPES: dict[str, dict[str, Any]] = {
    "pretrain_1m": {
        "size": 256,
        "batch": 32 * 4,
        "epochs": 11,
        "lr": (1e-4, 1e-5),
        "warm": (1e-5, 20),
        "scale": 0.2,
        "share": 0.3,
    },
    "pretrain_4m": {
        "size": 256,
        "batch": 32 * 4,
        "epochs": 30,
        "lr": (1e-4, 1e-5),
        "warm": (1e-5, 20),
        "scale": 0.2,
        "share": 0.3,
    },
    "retrieval_coco": {"size": 380, "batch": 16 * 4, "epochs": 5, "lr": (1e-5, 1e-6), "rows": 566_747},
    "retrieval_flickr": {"size": 380, "batch": 16 * 4, "epochs": 10, "lr": (1e-5, 1e-6), "rows": 145_000},
    "vqa": {"size": 380, "batch": 16 * 2, "epochs": 8, "lr": (2e-5, 1e-6), "warm": (1e-5, 4)},
    "vqa_4m": {"size": 384, "batch": 8 * 2, "epochs": 8, "lr": (2e-5, 1e-6), "warm": (1e-5, 4)},
    "entailment": {"size": 380, "batch": 16 * 2, "epochs": 5, "lr": (2e-5, 1e-6), "rows": 529_527},
    "nlvr_domain": {"size": 256, "batch": 32 * 2, "epochs": 1, "lr": (2e-5, 1e-5), "scale": 0.2},
    "nlvr": {"size": 380, "batch": 8 * 2, "epochs": 10, "lr": (2e-5, 1e-6), "rows": 86_373},
    "nlvr_4m": {"size": 384, "batch": 8 * 2, "epochs": 10, "lr": (2e-5, 1e-6), "rows": 86_373},
    "grounding": {"size": 380, "batch": 16 * 2, "epochs": 5, "lr": (1e-5, 1e-6), "rows": 120_191},
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_holds_every_official_number(name):
    wanted = {"warm": (1e-5, 1), "scale": 0.5, "share": None, **RECIPES[name]}
    recipe = official(name)
    data, schedule, options = recipe.data, recipe.schedule, recipe.optimizer
    epoch = wanted["rows"] // wanted["batch"] if "rows" in wanted else EPOCH
    assert schedule.steps_per_epoch == epoch
    assert recipe.steps == epoch * wanted["epochs"]
    assert (recipe.model.vision.image_size, data.train.batch) == (wanted["size"], wanted["batch"])
    assert (options.lr, schedule.min_lr) == wanted["lr"]
    assert (schedule.warmup_lr, schedule.warmup_steps) == (wanted["warm"][0], 100 * wanted["warm"][1])
    assert (options.variant, options.weight_decay, options.betas, options.eps) == (
        "torch",
        0.02,
        (0.9, 0.999),
        1e-8,
    )
    assert (recipe.seed, recipe.precision, recipe.clip_norm, recipe.accumulate) == (42, "fp32", None, 1)
    view = data.view
    assert (view.flip, view.careful_flip, view.augment) == (0.5, "off", True)
    assert (
        (view.crop, view.min_scale) == ("none", view.min_scale)
        if name == "grounding"
        else ("random", wanted["scale"])
    )
    whole = 512 if name in ("nlvr", "nlvr_4m") else None  # rows of the position table: nothing is cut
    assert (data.text.max_words, data.text.max_tokens, data.text.separator, data.text.pad) == (
        30,
        whole or 25,
        False,
        "longest",
    )
    assert (data.concepts.max_tokens, data.concepts.separator, data.concepts.pad, data.concepts.share) == (
        whole or 55,
        False,
        "longest",
        wanted["share"],
    )


def test_vision_text_and_concepts_are_those_of_the_paper():
    for name in RECIPES:
        model = official(name).model
        vision, text, concepts = model.vision, model.text, model.concepts
        assert (vision.kind, vision.patch, vision.width, vision.depth, vision.heads, vision.mlp_ratio) == (
            "vit",
            16,
            768,
            12,
            12,
            4.0,
        )
        assert (text.kind, text.layers, text.fusion_layer, text.width, text.heads, text.hidden) == (
            "bert",
            12,
            6,
            768,
            12,
            3072,
        )
        assert (text.dropout, text.attention_dropout, text.norm_eps) == (0.1, 0.1, 1e-12)
        assert (concepts.layers, concepts.place, concepts.visible_padding) == (2, "first", True)


def test_pretraining_has_the_switches_of_the_official_config():
    recipe = official("pretrain_1m")
    model, masking = recipe.model, recipe.data.masking
    assert (model.embed_width, model.temperature) == (256, 0.07)
    hierarchy, masked = model.hierarchy, model.masked_image
    assert (hierarchy.levels, hierarchy.weights, hierarchy.weight, hierarchy.targets) == (
        5,
        (1.0,) * 5,
        0.1,
        "own",
    )
    assert (masked.by, masked.ratio, masked.width, masked.depth, masked.heads, masked.weight) == (
        "decoder",
        0.75,
        768,
        2,
        16,
        1.0,
    )
    assert (masking.kind, masking.probability) == ("independent", 0.15)
    small, large = dump(recipe), dump(official("pretrain_4m"))
    for other in (small, large):
        other.pop("about"), other.pop("steps"), other["data"]["train"]["source"].pop("files")
    assert small == large


TEACHERS = {
    "pretrain_1m": True,
    "retrieval_coco": True,
    "retrieval_flickr": True,
    "grounding": True,
    "entailment": False,
    "nlvr": True,
}
"""Whether alpha rises over the first epoch (`warm_up`)."""


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_is_the_official_one(name):
    recipe = official(name)
    teacher = recipe.teacher
    assert (teacher.momentum, teacher.alpha) == (0.995, 0.4)
    assert teacher.ramp_steps == (recipe.schedule.steps_per_epoch if TEACHERS[name] else 0)
    if hasattr(teacher, "queue"):
        assert teacher.queue == 65536


def test_teacher_of_questions_is_off_and_that_of_nlvr_is_the_corrected_one():
    assert official("vqa").teacher is None
    assert official("nlvr").teacher.kind == "loaded"


def test_rest_of_the_official_numbers():
    assert official("retrieval_coco").retrieval.rerank == 256
    assert official("retrieval_flickr").retrieval.rerank == 128
    for name in ("vqa", "vqa_4m"):
        assert (official(name).answers.candidates, official(name).answers.max_words) == (128, 50)
    assert (official("grounding").heat.mode, official("grounding").heat.layer) == ("itm", 8)


def test_rate_follows_the_official_schedule():
    """Stairs of 100 steps, cut off at the end of the first epoch, then one value per epoch."""
    recipe = load(
        "vicha/pretrain_1m",
        [
            "data.root=/data",
            "data.tokenizer.files=[v]",
            "model.weights={vision: x, text: x}",
            "teacher.ramp_steps=1",
            "schedule.steps_per_epoch=2500",
            "steps=27500",
        ],
    ).settings
    rate = learning_rate(recipe)
    wanted = {
        0: 1e-5,
        100: 1e-5,
        101: 1.45e-5,
        1901: 9.55e-5,
        2001: 1e-4,
        2499: 1e-4,
        2500: 9.817718381265239e-05,
        4999: 9.817718381265239e-05,
        27499: 1.182281618734762e-05,
    }
    assert {step: 1e-4 * rate(step) for step in wanted} == pytest.approx(wanted, rel=1e-9)


def test_model_of_pretraining_has_the_published_size():
    recipe = official("pretrain_1m")
    with torch.device("meta"):
        model = models.create(
            "vicha", "pretrain", **model_arguments(recipe.model, SimpleNamespace(vocabulary=30522, pad_id=0))
        )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert round(trained / 1e6, 1) == 265.9


STAGES = {"grounding": "retrieval"}
SIZES = {"retrieval": 248.1, "vqa": 328.9, "entailment": 248.3, "nlvr": 297.9}
"""Million trained parameters at 380 pixels (specification 1)."""


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("pretrain")])
def test_model_and_optimizer_of_a_task_can_be_built(name):
    """At full size, without memory."""
    recipe = official(name)
    stage = STAGES.get(name, re.sub(r"_(coco|flickr|4m)$", "", name))
    model = replace(recipe.model, weights=Start(model=""))
    with torch.device("meta"):
        words = SimpleNamespace(vocabulary=30522, pad_id=0)
        started = make("vicha", stage, derived_arguments("vicha", stage, model, words))
        groups = make_optimizer(started.model, recipe.optimizer, parameter_rules()).param_groups
    assert {group["lr"] for group in groups} == {recipe.optimizer.lr}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.02}
    if stage in SIZES and recipe.model.vision.image_size == 380:
        trained = sum(parameter.numel() for parameter in started.model.parameters())
        assert round(trained / 1e6, 1) == SIZES[stage]
    assert started.model.vision.tokens == 1 + (recipe.model.vision.image_size // 16) ** 2


def test_every_official_recipe_is_checked_here():
    shapes = {name for name in shipped() if name.startswith("vicha/shapes")}
    assert {name for name in shipped() if name.startswith("vicha/")} == {
        f"vicha/{name}" for name in RECIPES
    } | shapes


@pytest.mark.parametrize(
    ("recipe", "option", "message"),
    [
        ("retrieval_coco", "teacher.queue=8", r"teacher\.queue=8 must hold a batch"),
        ("retrieval_coco", "data.concepts=null", r"model\.concepts is given and data\.concepts is null"),
        ("entailment", "teacher.alpha=0", r"teacher=null trains without one"),
        ("grounding", "heat.layer=5", r"heat\.layer=5 must be a fusion layer, 6\.\.11"),
        ("grounding", "heat={mode: itc, layer: 12}", r"heat\.layer=12 must be a block of the ViT, 0\.\.11"),
        ("nlvr", "optimizer.lr_scale=2", r"no part of ViCHA learns faster"),
        ("nlvr", "schedule.warmup_steps=50", r"warmup_steps=50 must be a multiple of 100"),
    ],
)
def test_what_cannot_work_is_refused(recipe, option, message):
    given = ["data.root=/data", "data.tokenizer.files=[v]", "model.weights.model=x", option]
    with pytest.raises(RecipeError, match=message):
        load(f"vicha/{recipe}", given)
