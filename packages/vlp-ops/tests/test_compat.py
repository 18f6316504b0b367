"""Drop-in replacements: transformers' models give the same numbers through ms_deform_attn."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vlp_ops import compat, ms_deform_attn


def resnet(transformers, *stages):
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=[f"stage{i}" for i in stages],
    )


def alive(model):
    """Offsets start at zero weight, and their gradient with them: every parameter gets some life."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def deformable_detr(transformers):
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet(transformers, 2, 3, 4),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
        num_labels=4,
    )
    return transformers.DeformableDetrForObjectDetection(config), 4


def grounding_dino(transformers):
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[2, 2, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=transformers.BertConfig(
            vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
        max_text_len=8,
    )
    return transformers.GroundingDinoForObjectDetection(config), 3


def detector(transformers, name: str, **options):
    """RT-DETR and its descendants: two decoder layers."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        num_queries=7,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_denoising=0,
        num_labels=4,
        anchor_image_size=None,
        **options,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config), 2


def mask2former(transformers):
    config = transformers.Mask2FormerConfig(
        backbone_config=resnet(transformers, 1, 2, 3, 4),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        num_queries=5,
        num_labels=4,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), 2


def oneformer(transformers):
    config = transformers.OneFormerConfig(
        backbone_config=resnet(transformers, 1, 2, 3, 4),
        is_training=False,
        num_queries=5,
        text_encoder_context_length=7,
        text_encoder_width=16,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=30,
        task_seq_len=7,
        hidden_dim=32,
        conv_dim=32,
        mask_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        num_labels=4,
    )
    return transformers.OneFormerForUniversalSegmentation(config), 2


MODELS = {
    "deformable_detr": deformable_detr,
    "grounding_dino": grounding_dino,
    "rt_detr": lambda transformers: detector(transformers, "RTDetr"),
    "rt_detr_v2": lambda transformers: detector(transformers, "RTDetrV2"),
    "d_fine": lambda transformers: detector(transformers, "DFine", decoder_n_points=[3, 6, 2]),
    "mask2former": mask2former,
    "oneformer": oneformer,
}


class Calls(TorchDispatchMode):
    """Counts calls of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.vlp_ops.ms_deform_attn.default
        return function(*args, **(kwargs or {}))


def made(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, count = MODELS[name](transformers)
    inputs = {"pixel_values": torch.randn(2, 3, 64, 96, requires_grad=True)}
    if name == "grounding_dino":
        inputs["input_ids"] = torch.tensor([[101, 7, 9, 1012, 102]] * 2)
    if name == "oneformer":
        inputs["task_inputs"] = torch.tensor([[1, 2, 3, 4, 5, 6, 7]] * 2)
    return alive(model), inputs, count


def numbers(model, inputs):
    """Two outputs and the gradient of the image; how often the operator ran forward."""
    with Calls() as calls:
        out = model(**inputs)
    keys = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
    # Grounding DINO's logits are -inf for words that are not there.
    found = [getattr(out, key).clamp(min=-50) for key in keys if hasattr(out, key)]
    assert len(found) == 2
    loss = sum(tensor.square().sum() for tensor in found)
    return [*found, torch.autograd.grad(loss, inputs["pixel_values"])[0]], calls.count


@pytest.mark.parametrize("name", MODELS)
def test_transformers_model(name):
    model, inputs, count = made(name)
    expected, calls = numbers(model, inputs)
    assert calls == 0
    assert compat.patch_transformers(model) == count
    # A second time changes nothing more.
    assert compat.patch_transformers(model) == count
    found, calls = numbers(model, inputs)
    assert calls == count
    for actual, wanted in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    error = (found[2] - expected[2]).abs().max()
    assert error <= 1e-4 * expected[2].abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_copies_are_patched_as_well(name, tmp_path):
    model, inputs, count = made(name)
    compat.patch_transformers(model)
    copies = [copy.deepcopy(model)]
    # transformers gives this one a hook that cannot be pickled, patched or not.
    if name != "grounding_dino":
        torch.save(model, tmp_path / "model.pt")
        copies += [
            pickle.loads(pickle.dumps(model)),
            torch.load(tmp_path / "model.pt", weights_only=False),
        ]
    expected, _ = numbers(model, inputs)
    for again in copies:
        found, calls = numbers(again, inputs)
        assert calls == count
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
        assert compat.patch_transformers(again) == count
        # Its own numbers, not those of the model that it was copied from.
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.mul_(1.01)
        assert not torch.equal(numbers(again, inputs)[0][0], expected[0])


def test_a_pickled_model_is_loaded_in_another_process(tmp_path):
    model, inputs, count = made("rt_detr_v2")
    compat.patch_transformers(model)
    torch.save((model, {key: value.detach() for key, value in inputs.items()}), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, inputs = torch.load(sys.argv[1], weights_only=False); "
        "torch.save(model(**inputs).logits.detach(), sys.argv[2]); "
        "print(sum('_Patched' in str(type(part).__mro__) for part in model.modules()))"
    )
    files = [str(tmp_path / "model.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True, text=True)
    assert int(done.stdout) == count
    torch.testing.assert_close(torch.load(files[1]), model(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_other_models_stay_as_they_are():
    patched, inputs, _ = made("mask2former")
    other, _, _ = made("mask2former")
    compat.patch_transformers(patched)
    assert numbers(other, inputs)[1] == 0


def test_discrete_sampling_is_another_operator():
    transformers = pytest.importorskip("transformers")
    model, _ = detector(transformers, "RTDetrV2", decoder_method="discrete")
    with pytest.raises(
        ValueError, match="RTDetrV2ForObjectDetection has no multi-scale deformable attention"
    ):
        compat.patch_transformers(model)


def test_a_model_without_deformable_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no multi-scale deformable attention: no module Multi"):
        compat.patch_transformers(torch.nn.Linear(2, 2))


def test_function_of_reference_code():
    shapes, starts = torch.tensor([[3, 4], [2, 1]]), torch.tensor([0, 12])
    value, locations = torch.randn(3, 14, 2, 8), torch.rand(3, 5, 2, 2, 4, 2)
    weights = torch.rand(3, 5, 2, 2, 4)
    out = compat.MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 2)
    torch.testing.assert_close(out, ms_deform_attn(value, shapes, locations, weights), rtol=0, atol=0)
