"""Weights of timm's models: names as in timm, below "body." of ours."""

import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlp_core.vision.timm import TimmVision
from vlp_core.weights.adapter import Adapter, CheckpointError, Rename
from vlp_core.weights.files import read
from vlp_core.weights.loading import LoadReport, load

HEADS = ("head", "head_dist", "fc", "classifier", "attn_pool", "head.fc", "head_drop")
"""What a file of timm may hold besides the features: classifiers and their pooling."""


def load_timm(model: TimmVision, state: Mapping[str, Tensor] | str | Path) -> LoadReport:
    """Fill the encoder from a local file of timm (or a state dict); classifiers are left out.

    Files of other layouts that timm reads for this architecture (DINOv2, OpenAI's CLIP, Microsoft's Swin) are
    read as well. A norm that timm applies after pooling ("fc_norm") is applied to all tokens, because nothing
    is pooled here. Position tables of another size are resized as timm does it.

    Raises:
        CheckpointError: As `vlp_core.weights.load`.
    """
    source = dict(read(state) if isinstance(state, str | Path) else state)
    translate = getattr(sys.modules[type(model.body).__module__], "checkpoint_filter_fn", None)
    name = str(state) if isinstance(state, str | Path) else "the state dict"
    try:
        tensors = source if translate is None else translate(dict(source), model.body)
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name} does not fit {model.called}: {error}") from error
    own = model.body.state_dict()
    for part in ("weight", "bias"):
        pooled, plain = f"fc_norm.{part}", f"norm.{part}"
        if pooled in tensors and plain in own and plain not in tensors:
            tensors[plain] = tensors.pop(pooled)
    report = load(
        model,
        tensors,
        Adapter((Rename("{name...}", "body.{name...}"),)),
        allow_unexpected=[f"body.{head}" for head in HEADS],
        name=name,
    )
    changed = (f"body.{key}" for key, x in source.items() if key in tensors and tensors[key].shape != x.shape)
    return report._replace(resized=tuple({**dict.fromkeys(report.resized), **dict.fromkeys(changed)}))
