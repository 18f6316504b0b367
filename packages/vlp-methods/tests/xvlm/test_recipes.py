"""What the shipped recipes of X-VLM say."""

from collections import Counter

import pytest
import torch
from vlp_core import models
from vlp_core.models.xvlm_rules import parameter_rules
from vlp_core.optim import parameter_groups
from vlp_core.recipe import RecipeError, build, dump, dumps, parse
from vlp_methods.engine.entry import load
from vlp_methods.xvlm.schema.pretrain import Pretrain

GIVEN = {
    "model.weights.vision": "swin.pth",
    "model.weights.text": "bert.bin",
    "data.root": "/data",
    "data.tokenizer.files": "[vocab.txt]",
}


def settings(name: str) -> Pretrain:
    return load(f"xvlm/{name}", [f"{key}={value}" for key, value in GIVEN.items()]).settings


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
    assert (regions.texts, regions.pictures, regions.share) == (8 * 128, 8 * 48, 0.5)
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
            "xvlm", vision=dump(recipe.model.vision), text=text, embed_width=256, temperature=0.07
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == 215_637_241
    groups = parameter_groups(
        model, lr=1e-4, weight_decay=0.01, rules=parameter_rules(model, fresh_lr_scale=2.0)
    )
    rates = Counter({(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups})
    assert set(rates) == {(1e-4, 0.01), (1e-4, 0.0), (2e-4, 0.01), (2e-4, 0.0)}


@pytest.mark.parametrize("name", ["shapes", "pretrain_4m_base", "pretrain_16m_base"])
def test_resolved_recipe_is_a_recipe(name):
    recipe = settings(name) if name != "shapes" else load("xvlm/shapes").settings
    assert build(Pretrain, parse(dumps(recipe))) == recipe


def test_base_recipe_names_everything_it_needs_at_once():
    with pytest.raises(RecipeError) as caught:
        load("xvlm/pretrain_4m_base", ["model.vision.windo=7"])
    text = str(caught.value)
    assert "did you mean model.vision.window" in text
    for key in ("model.weights.vision", "model.weights.text", "data.root", "data.tokenizer.files.0"):
        assert f"{key}: required" in text


def test_tokenizer_and_text_encoder_must_be_of_one_kind():
    with pytest.raises(
        RecipeError, match=r"model\.text\.kind=roberta does not fit data\.tokenizer\.kind=bert"
    ):
        load("xvlm/shapes", ["model.text.kind=roberta"])


def test_pictures_must_have_the_size_that_the_encoder_takes():
    with pytest.raises(RecipeError, match=r"data\.view\.size=96 must equal model\.vision\.image_size=128"):
        load("xvlm/shapes", ["model.vision.image_size=128"])
