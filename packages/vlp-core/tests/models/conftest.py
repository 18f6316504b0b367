"""Models of golden cases, and comparison of gradients under the reference's names."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from vlp_core import models
from vlp_core.models.xvlm import checkpoints as xvlm

STAGES = {
    "model_pretrain.XVLM": "pretrain",
    "model_retrieval.XVLM": "retrieval",
    "model_bbox.XVLM": "boxes",
    "model_bbox_pretrain.XVLM": "boxes",
    "model_nlvr.XVLM": "nlvr",
    "model_nlvr_pretrain.XVLM": "nlvr_domain",
    "model_vqa.XVLM": "vqa",
    "model_captioning.XVLM": "captioning",
}


def arguments(config) -> dict:
    """Arguments of `create` for the config of a golden case."""
    found = {
        "vision": xvlm.vision_arguments(
            config["vision"], config["vision_config"], image_size=config["image_res"]
        ),
        "text": xvlm.text_arguments(config["text_config"]),
    }
    kind = config["model"]
    if "embed_dim" in config:
        found["embed_width"] = config["embed_dim"]
    if "text_layers_built" in config:
        found["text"]["layers"] = config["text_layers_built"]
    if kind.startswith("model_nlvr"):
        plain = config["text_config"]
        found["text"]["layers"] = 2 * plain["num_hidden_layers"] - plain["fusion_layer"]
    if "num_dec_layers" in config:
        found["decoder"] = {**found["text"], "layers": config["num_dec_layers"]}
        del found["decoder"]["fusion_layer"]
    return found


def stage(config) -> str:
    return STAGES[config["model"]]


@pytest.fixture(scope="session")
def golden_arguments() -> Callable[..., tuple[str, dict]]:
    return lambda config: (stage(config), arguments(config))


@pytest.fixture(scope="session")
def golden_model() -> Callable[..., nn.Module]:
    """The model of a case with its weights, in evaluation mode as the reference ran it."""

    def build(case) -> nn.Module:
        model = models.create("xvlm", stage(case.config), **arguments(case.config))
        xvlm.FILES.load(model, case.tensors("weights"), stage=stage(case.config))
        return model.eval()

    return build


@pytest.fixture(scope="session")
def assert_equal() -> Callable[..., None]:
    """Named tensors against expected ones of the same names, with the tolerance of features and losses."""

    def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        for key, value in found.items():
            torch.testing.assert_close(
                value.detach(), expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )

    return check


@pytest.fixture(scope="session")
def assert_gradient_norms() -> Callable[..., None]:
    """Norm of every parameter's gradient under the reference's name; null means no gradient at all."""

    def check(model: nn.Module, expected: dict[str, float | None], scale: float = 1.0) -> None:
        ours = {key: p.grad * scale for key, p in model.named_parameters() if p.grad is not None}
        source = xvlm.xvlm_adapter(model).to_source(ours, gradients=True)
        norms = {key: gradient.norm().item() for key, gradient in source.items()}
        reference = {key: norm for key, norm in expected.items() if norm is not None}
        assert norms.keys() == reference.keys()
        assert norms == pytest.approx(reference, rel=1e-3, abs=1e-6)

    return check
