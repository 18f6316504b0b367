"""Drop-in replacements: transformers' models give the same numbers through ms_deform_attn."""

import pytest
import torch
from vlp_ops import compat


def test_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            out_features=["stage2", "stage3", "stage4"],
        ),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
        num_labels=4,
        disable_custom_kernels=True,
    )
    torch.manual_seed(0)
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    # Offsets start at zero weight: give every parameter some life.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    image = torch.randn(2, 3, 64, 96)
    expected = model(image)
    gradient = torch.autograd.grad(
        expected.logits.sum() + expected.pred_boxes.sum(), model.model.level_embed
    )[0]
    assert compat.patch_transformers(model) == 4
    out = model(image)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-5)
    again = torch.autograd.grad(out.logits.sum() + out.pred_boxes.sum(), model.model.level_embed)[0]
    torch.testing.assert_close(again, gradient, rtol=1e-3, atol=1e-4)


def test_a_model_without_deformable_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no MultiScaleDeformableAttention module"):
        compat.patch_transformers(torch.nn.Linear(2, 2))
