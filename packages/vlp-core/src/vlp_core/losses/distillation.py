"""Learning from a momentum teacher: targets that are partly what the teacher believes.

Source: ALBEF, arXiv 2107.07651 section 3.3; ViCHA `models/model_*.py`.

Shape letters: R rows, C classes, B queries, M keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_core.losses.masked_language import IGNORED
from vlp_core.precision import wide


def distilled_cross_entropy(
    logits_RC: Tensor, labels_R: Tensor, teacher_logits_RC: Tensor | None, *, alpha: Tensor | float
) -> Tensor:
    """(1 - alpha) * cross entropy with the labels + alpha * cross entropy with the teacher's probabilities,
    in fp32, [R].

    Rows with the label -100 give 0. `teacher_logits` None or `alpha` 0 leaves the teacher out. No gradient
    reaches the teacher.
    """
    logits = wide(logits_RC)
    counts = labels_R != IGNORED
    hard = F.cross_entropy(logits, labels_R, ignore_index=IGNORED, reduction="none")
    if teacher_logits_RC is None:
        return hard
    believed = wide(teacher_logits_RC.detach()).softmax(-1)
    soft = -(believed * logits.log_softmax(-1)).sum(-1) * counts
    return (1 - alpha) * hard + alpha * soft


def distilled_language_loss(
    logits_RTV: Tensor, labels_RT: Tensor, teacher_logits_RTV: Tensor | None, *, alpha: Tensor | float
) -> Tensor:
    """`distilled_cross_entropy` of the next token, summed over each text, [R]; the teacher wrote at the same
    places.

    Labels as in `vlp_core.losses.language_loss`: the ids of the text, -100 where nothing is to be predicted;
    place 0 never counts. With `teacher_logits` None or `alpha` 0 this is `language_loss(...,
    reduction="row")`, which is what the released VQA fine-tuning of ALBEF and ViCHA optimises, for its alpha
    never reaches the decoder (ALBEF issue 90).

    Raises:
        ValueError: Shapes that do not belong together.
    """
    shapes = {"labels": labels_RT.shape}
    if teacher_logits_RTV is not None:
        shapes["teacher_logits"] = teacher_logits_RTV.shape[:2]
    for name, shape in shapes.items():
        if shape != logits_RTV.shape[:2]:
            raise ValueError(
                f"{name} of {list(shape)} places do not belong to logits of {list(logits_RTV.shape[:2])}"
            )
    with torch.autocast(logits_RTV.device.type, enabled=False):
        each = distilled_cross_entropy(
            logits_RTV[:, :-1].flatten(0, 1),
            labels_RT[:, 1:].flatten(),
            None if teacher_logits_RTV is None else teacher_logits_RTV[:, :-1].flatten(0, 1),
            alpha=alpha,
        )
    return each.view(len(labels_RT), -1).sum(1)


def momentum_targets(
    teacher_BE: Tensor,
    teacher_keys_ME: Tensor,
    *,
    temperature: Tensor | float,
    alpha: Tensor | float,
    matches_BM: Tensor | None = None,
) -> Tensor:
    """Targets of a contrastive loss, [B, M], fp32, without gradient: alpha * softmax(teacher similarities /
    temperature) + (1 - alpha) * what matches.

    Args:
        teacher_BE: Teacher's features of the queries.
        teacher_keys_ME: Teacher's features of the keys, those of the batch first.
        temperature: Divisor of the similarities.
        alpha: Weight of the teacher; 0 for matches alone.
        matches_BM: What matches (bool), spread evenly over each row's matches; None: key b alone matches
            query b.
    """
    with torch.no_grad(), torch.autocast(teacher_BE.device.type, enabled=False):
        if matches_BM is None:
            matches_BM = torch.eye(
                len(teacher_BE), len(teacher_keys_ME), dtype=torch.bool, device=teacher_BE.device
            )
        teacher, keys = wide(teacher_BE), wide(teacher_keys_ME)
        share = matches_BM.to(teacher.dtype)
        share = share / share.sum(1, keepdim=True)
        believed = (teacher @ keys.t() / temperature).softmax(1)
        return torch.lerp(share, believed, torch.as_tensor(alpha, dtype=share.dtype, device=share.device))
