"""Official X-VLM layouts: names and shapes at full size, conversion from pre-training to
the tasks."""

import json

import pytest
import torch
from safetensors.torch import save_file
from vlp_core import models
from vlp_core.models.xvlm import checkpoints as xvlm
from vlp_core.weights import Checkpoint, CheckpointError


def meta_model(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model that a state of official names belongs to, without memory; numbers of heads do not show in
    shapes."""
    arguments = xvlm.infer_arguments(Checkpoint(state, {}), head_width=1)
    with torch.device("meta"):
        return models.create("xvlm", xvlm.FILES.stage(state), **arguments)


def is_key_list(case) -> bool:
    return case.path.is_file() and case.path.stem == "official_keys"


@pytest.mark.golden("xvlm", is_key_list)
def test_names_and_shapes_equal_the_released_layouts_at_full_size(case):
    for name, shapes in json.loads(case.path.read_text()).items():
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        model = meta_model(state)
        found = {
            key: list(x.shape) for key, x in xvlm.xvlm_adapter(model).to_source(model.state_dict()).items()
        }
        assert found == shapes, name
        ours = xvlm.xvlm_adapter(model).to_ours(state)
        assert {key: x.shape for key, x in ours.items()} == {
            key: x.shape for key, x in model.state_dict().items()
        }, name


@pytest.mark.golden("xvlm", lambda case: case.has("key_map.json"))
def test_conversion_to_every_task_takes_each_tensor_from_where_the_reference_does(case):
    config, weights, resized = case.config, case.tensors("weights"), case.tensors("outputs")
    vision = xvlm.vision_arguments(
        config["vision"], config["vision_config"], image_size=config["vision_config"]["image_res"]
    )
    embed_width = len(weights["vision_proj.weight"])
    pretrained = {
        "vision": vision,
        "text": xvlm.text_arguments(config["text_config"]),
        "embed_width": embed_width,
    }
    larger = {
        **vision,
        "image_size": config["target_image_res"],
        "window": config["target_window_size"],
    }
    for name, expected in case.json("key_map").items():
        loaded = {
            key: source if isinstance(source, str) else source["src"]
            for key, source in expected["loaded"].items()
        }
        changed = {key for key, source in expected["loaded"].items() if not isinstance(source, str)}
        wanted = xvlm.FILES.stage(dict.fromkeys([*loaded, *expected["newly_initialised"]], torch.empty(0)))
        start = xvlm.FILES.stage(
            dict.fromkeys([*loaded.values(), *expected["unused_in_checkpoint"]], torch.empty(0))
        )
        source = weights
        if start != "pretrain":  # a domain stage: any checkpoint of its layout will do
            earlier = models.create("xvlm", start, **models.derive("xvlm", start, pretrained))
            xvlm.FILES.start(earlier, weights, stage=start)
            source = xvlm.FILES.to_source(earlier)

        arguments = models.derive("xvlm", wanted, pretrained) | {"vision": larger if changed else vision}
        model = models.create("xvlm", wanted, **arguments)
        adapter = xvlm.xvlm_adapter(model)
        before = {key: x.clone() for key, x in adapter.to_source(model.state_dict()).items()}
        result = xvlm.FILES.start(model, source, stage=wanted)
        after = adapter.to_source(model.state_dict())

        missing = {key: model.state_dict()[key] for key in result.missing}
        assert set(adapter.to_source(missing, gradients=True)) == set(expected["newly_initialised"]), name
        assert set(result.unexpected) == set(expected["unused_in_checkpoint"]), name
        assert after.keys() == loaded.keys() | {
            *expected["newly_initialised"],
            *expected["rebuilt_buffers"],
        }, name
        for key, origin in loaded.items():
            if key in changed:
                torch.testing.assert_close(after[key], resized[key], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(after[key], source[origin]), (name, key)
        for key in expected["newly_initialised"]:
            assert torch.equal(after[key], before[key]), (name, key)


TINY = {
    "vision": {
        "kind": "swin",
        "image_size": 64,
        "window": 2,
        "width": 8,
        "depths": [1, 2, 1, 1],
        "heads": [1, 1, 1, 1],
    },
    "text": {
        "kind": "bert",
        "vocabulary": 20,
        "width": 64,
        "layers": 4,
        "heads": 1,
        "hidden": 16,
        "positions": 12,
        "fusion_layer": 2,
    },
    "embed_width": 6,
}
STAGES = ("pretrain", "retrieval", "boxes", "nlvr", "nlvr_domain", "vqa", "captioning")


def tiny(stage: str = "pretrain", **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.create("xvlm", stage, **models.derive("xvlm", stage, {**TINY, **changes}))


def official(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return xvlm.FILES.to_source(model)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_round_trip_through_the_official_layout_is_the_identity(stage, kind):
    model = tiny(stage, text={**TINY["text"], "kind": kind})
    other = tiny(stage, text={**TINY["text"], "kind": kind})
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    state = official(model)
    assert xvlm.FILES.stage(state) == stage
    xvlm.FILES.load(other, state, stage=stage)
    assert all(torch.equal(x, other.state_dict()[key]) for key, x in model.state_dict().items())
    assert all(torch.equal(x, state[key]) for key, x in official(other).items())


@pytest.mark.parametrize("stage", STAGES)
def test_official_files_open_without_being_told_what_they_are(stage, tmp_path):
    model = tiny(stage).eval()
    torch.save({"model": official(model), "config": {"image_res": 64}}, tmp_path / "best.th")
    loaded = models.load(tmp_path / "best.th")
    assert (loaded.family, loaded.stage) == ("xvlm", stage)
    assert loaded.view == {"kind": "squash", "size": 64}
    assert loaded.reading == {"tokenizer": {"kind": "wordpiece", "files": []}, "vocabulary": 20}
    assert loaded.settings == {}
    assert not loaded.model.training
    assert all(torch.equal(x, loaded.model.state_dict()[key]) for key, x in model.state_dict().items())


def test_image_size_is_read_from_swins_masks_or_asked_for():
    state = official(tiny())
    masks = [key for key in state if key.endswith("attn_mask")]
    with_mask = {**state, "vision_encoder.layers.0.blocks.1.attn_mask": torch.empty(64, 4, 4)}
    assert xvlm.infer_arguments(Checkpoint(with_mask, {}))["vision"]["image_size"] == 64
    plain = {key: x for key, x in state.items() if key not in masks}
    with pytest.raises(CheckpointError, match=r"the image size is unknown; give `arguments`"):
        xvlm.infer_arguments(Checkpoint(plain, {}))


def test_widths_without_a_known_number_of_heads_are_asked_for():
    state = official(tiny(text={**TINY["text"], "width": 48}))
    with pytest.raises(CheckpointError, match=r"48 wide, no multiple of 64.*give `arguments`"):
        xvlm.infer_arguments(Checkpoint(state, {"config": {"image_res": 64}}))


def test_a_pretraining_file_is_refused_where_a_fine_tuned_one_is_expected(tmp_path):
    save_file(
        {key: x.clone().contiguous() for key, x in official(tiny()).items()}, tmp_path / "a.safetensors"
    )
    for stage in ("retrieval", "vqa"):
        message = (
            rf"a\.safetensors is a pretrain checkpoint of X-VLM where a {stage} one is expected; .*start_from"
        )
        with pytest.raises(CheckpointError, match=message):
            xvlm.FILES.load(tiny(stage), tmp_path / "a.safetensors", stage=stage)


def test_a_file_of_an_unrelated_task_is_refused():
    state = official(tiny("vqa"))
    with pytest.raises(CheckpointError, match="nothing can be converted"):
        xvlm.FILES.load(tiny("retrieval"), state, stage="retrieval")
    with pytest.raises(
        CheckpointError, match="is a vqa checkpoint; a nlvr model starts from pretrain or nlvr_domain"
    ):
        xvlm.FILES.start(tiny("nlvr"), state, stage="nlvr")


def test_foreign_files_are_refused():
    with pytest.raises(CheckpointError, match="no checkpoint of X-VLM; it holds encoder"):
        xvlm.FILES.load(tiny(), {"encoder.weight": torch.ones(1)}, stage="pretrain")


def test_conversion_names_what_is_missing_or_unknown():
    state = official(tiny())
    short = {key: x for key, x in state.items() if not key.startswith("itm_head.")}
    with pytest.raises(CheckpointError, match="6 missing: itm_head"):
        xvlm.FILES.start(tiny("retrieval"), short, stage="retrieval")
    with pytest.raises(CheckpointError, match="1 unknown tensors: extra"):
        xvlm.FILES.start(tiny("retrieval"), {**state, "extra": torch.ones(1)}, stage="retrieval")


def test_conversion_needs_the_same_kind_of_text_encoder():
    model = tiny("retrieval", text={**TINY["text"], "kind": "roberta"})
    with pytest.raises(CheckpointError, match="was not pre-trained with roberta"):
        xvlm.FILES.start(model, official(tiny()), stage="retrieval")


def test_vqa_decoder_copies_keys_and_values_when_widths_agree():
    pretrained = tiny()
    assert pretrained.vision.width == pretrained.text.width
    model = tiny("vqa")
    result = xvlm.FILES.start(model, official(pretrained), stage="vqa")
    assert result.missing == ()
    torch.testing.assert_close(
        model.decoder.layers[1].cross.key_value.weight, pretrained.text.layers[3].cross.key_value.weight
    )
