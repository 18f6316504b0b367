"""What the shipped recipes of X-VLM say."""

import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vlp_core import models
from vlp_core.optim import parameter_groups
from vlp_core.recipe import RecipeError, dump
from vlp_methods.builders.model import derived_arguments, make
from vlp_methods.engine.entry import load, shipped
from vlp_methods.engine.optimizers import make_optimizer
from vlp_methods.sections.models import Start
from vlp_methods.xvlm.rules import fine_tuning_rules, parameter_rules
from vlp_methods.xvlm.schema.pretrain import Pretrain

GIVEN = {
    "model.weights.vision": "swin.pth",
    "model.weights.text": "bert.bin",
    "data.root": "/data",
}


def settings(name: str) -> Pretrain:
    files = "[vocab.json,merges.txt]" if name.endswith("_roberta") else "[vocab.txt]"
    given = {**GIVEN, "data.tokenizer.files": files}
    return load(f"xvlm/{name}", [f"{key}={value}" for key, value in given.items()]).settings


def test_base_recipe_holds_every_official_number():
    recipe = settings("pretrain_4m_base")
    vision, text = recipe.model.vision, recipe.model.text
    assert (vision.image_size, vision.window, vision.width, vision.depths, vision.heads) == (
        224,
        7,
        128,
        (2, 2, 18, 2),
        (4, 8, 16, 32),
    )
    assert vision.drop_path == 0.1
    assert (text.layers, text.fusion_layer, text.width, text.heads, text.hidden) == (12, 6, 768, 12, 3072)
    assert (text.dropout, text.attention_dropout, text.norm_eps) == (0.1, 0.1, 1e-12)
    assert (recipe.model.embed_width, recipe.model.temperature) == (256, 0.07)
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.betas, optimizer.eps, optimizer.lr_scale) == (
        1e-4,
        0.01,
        (0.9, 0.98),
        1e-8,
        2.0,
    )
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps) == ("linear", 2500)
    assert (recipe.steps, recipe.clip_norm, recipe.seed) == (41 * 4995, 1.0, 42)
    data, regions = recipe.data, recipe.data.regions
    assert data.images.batch == 8 * 128
    assert (regions.texts, regions.images, regions.share) == (8 * 128, 8 * 48, 0.5)
    assert (regions.options.max_regions, regions.options.min_visible, regions.options.careful_flip) == (
        5,
        0.5,
        "off",
    )
    assert (data.text.max_words, data.text.max_tokens, data.text.separator) == (40, 40, False)
    masking = data.masking
    assert (masking.probability, masking.max_masks, masking.skipgram_probability, masking.skipgram_size) == (
        0.25,
        8,
        0.2,
        3,
    )
    assert masking.whole_words
    assert (data.view.min_scale, data.view.flip, data.view.augment) == (0.2, 0.5, True)


def test_16m_recipe_differs_from_4m_as_the_official_configs_do():
    small, large = dump(settings("pretrain_4m_base")), dump(settings("pretrain_16m_base"))
    assert large["steps"] == 38 * 5280
    assert large["data"]["images"]["batch"] == 24 * 128
    assert (large["data"]["text"]["max_words"], large["data"]["masking"]["max_masks"]) == (30, 6)
    assert large["model"] == small["model"]
    assert large["optimizer"] == small["optimizer"]


def test_base_model_has_the_published_size_and_groups():
    recipe = settings("pretrain_4m_base")
    text = {**dump(recipe.model.text), "vocabulary": 30522, "pad_id": 0}
    with torch.device("meta"):
        model = models.create(
            "xvlm", "pretrain", vision=dump(recipe.model.vision), text=text, embed_width=256, temperature=0.07
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == 215_637_241
    groups = parameter_groups(
        model, lr=1e-4, weight_decay=0.01, rules=parameter_rules(model, fresh_lr_scale=2.0)
    )
    rates = Counter({(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups})
    assert set(rates) == {(1e-4, 0.01), (1e-4, 0.0), (2e-4, 0.01), (2e-4, 0.0)}


@pytest.mark.parametrize("vision", ["swin", "clip", "deit"])
@pytest.mark.parametrize("text", ["bert", "roberta"])
def test_every_pair_of_encoders_has_a_pretraining_recipe(vision, text):
    """All else is as in the base recipe."""
    name = "pretrain_4m_base" + {"swin": ""}.get(vision, f"_{vision}") + {"bert": ""}.get(text, f"_{text}")
    base, recipe = settings("pretrain_4m_base"), settings(name)
    assert recipe.model.vision.kind == {"deit": "vit"}.get(vision, vision)
    wordpiece = {"bert": "wordpiece"}.get(text, text)
    assert (recipe.model.text.kind, recipe.data.tokenizer.kind) == (text, wordpiece)
    if vision != "swin":
        vit = recipe.model.vision
        assert (vit.image_size, vit.patch, vit.width, vit.depth, vit.heads, vit.local_depth) == (
            224,
            16,
            768,
            12,
            12,
            4,
        )
    if text == "roberta":
        assert (recipe.model.text.positions, recipe.model.text.token_types, recipe.model.text.norm_eps) == (
            514,
            1,
            1e-5,
        )
    found, expected = dump(recipe), dump(base)
    for other in (found, expected):
        (
            other["model"].pop("vision"),
            other["model"].pop("text"),
            other["data"].pop("tokenizer"),
            other.pop("about"),
        )
    assert found == expected


TASKS: dict[str, dict[str, object]] = {
    "retrieval_coco": {"steps": 10 * 3543, "lr": 3e-5, "batch": 8 * 20, "rerank": 256},
    "retrieval_flickr": {"steps": 10 * 907, "lr": 3e-5, "batch": 8 * 20, "rerank": 128},
    "vqa": {
        "steps": 100,
        "lr": 5e-5,
        "batch": 8 * 24,
        "lr_scale": 2.0,
        "careful_flip": "substring",
        "candidates": 128,
    },
    "vqa_480": {
        "size": 480,
        "window": 15,
        "steps": 100,
        "lr": 5e-5,
        "batch": 8 * 24,
        "lr_scale": 2.0,
        "careful_flip": "substring",
        "candidates": 128,
    },
    "nlvr_domain": {"domain": True, "steps": 2 * 4995, "lr": 3e-5, "batch": 8 * 128, "lr_scale": 2.0},
    "nlvr": {"steps": 10 * 1080, "lr": 3e-5, "batch": 8 * 10},
    "refcoco_weak": {"steps": 5 * 752, "lr": 2e-5, "batch": 8 * 20, "crop": "none", "layer": 9},
    "refcoco_boxes_domain": {
        "domain": True,
        "steps": 2 * 1660,
        "lr": 3e-5,
        "texts": 8 * 24,
        "images": 8 * 9,
    },
    "refcoco_boxes": {"steps": 10 * 752, "lr": 3e-5, "batch": 8 * 20},
    "captioning_domain": {"domain": True, "steps": 2 * 4995, "lr": 3e-5, "batch": 8 * 128},
    "captioning": {"steps": 5 * 2214, "lr": 1e-5, "batch": 8 * 32, "words": 40, "smoothing": 0.1},
    "captioning_scst": {"steps": 44275, "lr": 1e-5, "batch": 8 * 8, "words": 40, "every": 500},
}
"""Values of the official configs (specification 4.3 to 4.7); what is the same for all fine-tuning, or all
domain stages, is left out."""

FINE_TUNING = {"size": 384, "window": 12, "precision": "fp32", "clip": None, "words": 30, "min_scale": 0.5}
DOMAIN = {"size": 224, "window": 7, "precision": "bf16", "clip": 1.0, "words": 40, "min_scale": 0.2}


def official(name: str) -> Any:
    given = ["model.weights.model=x", "data.root=/data", "data.tokenizer.files=[vocab.txt]"]
    return load(f"xvlm/{name}", [*given, *(["steps=100"] if name.startswith("vqa") else [])]).settings


@pytest.mark.parametrize("name", TASKS)
def test_task_recipe_holds_every_official_number(name):
    wanted = {**(DOMAIN if TASKS[name].get("domain") else FINE_TUNING), "lr_scale": 1.0, "crop": "random",
              "careful_flip": "off", **TASKS[name]}  # fmt: skip
    recipe = official(name)
    vision, text, view, train = recipe.model.vision, recipe.model.text, recipe.data.view, recipe.data.train
    found = {
        "steps": recipe.steps,
        "lr": recipe.optimizer.lr,
        "lr_scale": recipe.optimizer.lr_scale,
        "size": vision.image_size,
        "window": vision.window,
        "precision": recipe.precision,
        "clip": recipe.clip_norm,
        "words": recipe.data.text.max_words,
        "min_scale": view.min_scale,
        "crop": view.crop,
        "careful_flip": view.careful_flip,
    }
    others = {
        "batch": lambda: train.batch,
        "texts": lambda: train.texts,
        "images": lambda: train.images,
        "rerank": lambda: recipe.retrieval.rerank,
        "candidates": lambda: recipe.answers.candidates,
        "layer": lambda: recipe.heat.layer,
        "smoothing": lambda: recipe.smoothing,
        "every": lambda: recipe.evaluate.every,
    }
    found |= {key: others[key]() for key in wanted if key in others}
    if name in (
        "refcoco_weak",
        "refcoco_boxes",
        "refcoco_boxes_domain",
    ):  # whole images, or crops around boxes
        wanted.pop("min_scale"), found.pop("min_scale")
    wanted.pop("domain", None)
    assert found == wanted
    optimizer = recipe.optimizer
    assert (optimizer.weight_decay, optimizer.betas, optimizer.eps) == (0.01, (0.9, 0.98), 1e-8)
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps) == ("linear", 0.1)
    assert (recipe.seed, recipe.accumulate, view.flip, view.augment) == (42, 1, 0.5, True)
    assert (recipe.data.text.max_tokens, recipe.data.text.separator) == (40, "captioning" in name)
    assert (vision.width, vision.depths, vision.heads, vision.drop_path) == (
        128,
        (2, 2, 18, 2),
        (4, 8, 16, 32),
        0.1,
    )
    assert (text.layers, text.fusion_layer, text.width, text.dropout, text.attention_dropout) == (
        12,
        6,
        768,
        0.1,
        0.1,
    )


STAGES = {"refcoco_weak": "retrieval", "refcoco_boxes": "boxes", "refcoco_boxes_domain": "boxes"}


@pytest.mark.parametrize("name", TASKS)
def test_model_and_optimizer_of_a_task_can_be_built(name):
    """At full size, without memory: sizes fit, and the learning-rate factor has parts to hold for."""
    recipe = official(name)
    stage = STAGES.get(name, re.sub(r"_(coco|flickr|480|scst)$|(?<=captioning)_domain$", "", name))
    model = replace(recipe.model, weights=Start(model=""))
    with torch.device("meta"):
        words = SimpleNamespace(vocabulary=30522, pad_id=0)
        started = make("xvlm", stage, derived_arguments("xvlm", stage, model, words))
        groups = make_optimizer(
            started.model, recipe.optimizer, fine_tuning_rules(recipe, started.model)
        ).param_groups
    scaled = [n for group in groups if group["lr_scale"] != 1 for n in group["names"]]
    fresh = {"vqa": "decoder.layers.", "nlvr_domain": "ta_head."}.get(stage)
    assert bool(scaled) == (fresh is not None)
    assert all(n.startswith(fresh) for n in scaled)
    image = torch.empty(1, 3, recipe.data.view.size, recipe.data.view.size, device="meta")
    assert started.model.vision(image).shape == (1, 1 + (recipe.data.view.size // 32) ** 2, 1024)


def test_rest_of_the_official_numbers():
    caption, scst = official("captioning"), official("captioning_scst")
    for recipe in (caption, scst):
        test = recipe.captions
        assert (test.beams, test.max_tokens, test.min_tokens, test.length_penalty) == (3, 20, 5, 1.0)
        assert recipe.data.prompt == "a picture of "
    reward = scst.reward
    assert (reward.samples, reward.references, reward.baseline, reward.temperature, reward.max_tokens) == (
        5,
        5,
        "greedy",
        1.0,
        20,
    )
    assert scst.data.train.source.group_captions
    assert official("vqa").answers.max_words == 50
    assert official("refcoco_boxes_domain").data.train.options.max_regions == 5


@pytest.mark.parametrize("name", TASKS)
def test_test_data_never_selects(name):
    recipe = official(name)
    assert recipe.evaluate.best is None or recipe.evaluate.best.startswith("val/")
    assert recipe.evaluate.best is not None or "domain" in name or name.startswith("vqa")


TWINS = ["retrieval", "vqa", "nlvr_domain", "nlvr", "refcoco_weak", "refcoco_boxes_domain", "refcoco_boxes",
         "captioning_domain", "captioning", "captioning_scst"]  # fmt: skip


def test_every_recipe_is_checked_here():
    pretraining = {"shapes"} | {name for name in shipped() if name.startswith("xvlm/pretrain_")}
    known = {f"xvlm/{name}" for name in ("shapes", *TASKS, *(f"shapes_{twin}" for twin in TWINS))}
    assert {name for name in shipped() if name.startswith("xvlm/")} == known | (pretraining - {"shapes"})


def test_base_recipe_names_everything_it_needs_at_once():
    with pytest.raises(RecipeError) as caught:
        load("xvlm/pretrain_4m_base", ["model.vision.windo=7"])
    text = str(caught.value)
    assert "did you mean model.vision.window" in text
    for key in ("model.weights.vision", "model.weights.text", "data.root", "data.tokenizer.files.0"):
        assert f"{key}: required" in text


def test_tokenizer_and_text_encoder_must_be_of_one_kind():
    with pytest.raises(
        RecipeError, match=r"model\.text\.kind=roberta does not fit data\.tokenizer\.kind=wordpiece"
    ):
        load("xvlm/shapes", ["model.text.kind=roberta"])


def test_images_must_have_the_size_that_the_encoder_takes():
    with pytest.raises(RecipeError, match=r"data\.view\.size=48 must equal model\.vision\.image_size=128"):
        load("xvlm/shapes", ["model.vision.image_size=128"])
