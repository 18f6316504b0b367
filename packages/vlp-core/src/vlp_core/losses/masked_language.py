"""Cross entropy over masked tokens."""

import torch.nn.functional as F
from torch import Tensor

from vlp_core.precision import wide

IGNORED = -100


def masked_language_loss(logits_BPV: Tensor, labels_BP: Tensor) -> Tensor:
    """Mean cross entropy, in fp32, over all labels of the batch that are not -100; 0 when there is none."""
    logits, labels = wide(logits_BPV.flatten(0, -2)), labels_BP.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)
