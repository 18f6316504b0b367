"""Losses of text that is written: next tokens, weighted answers, self-critical sequences."""

from typing import Literal

import torch
from torch import Tensor

from vlp_core.losses.masked_language import IGNORED


def language_loss(
    logits_RTV: Tensor,
    labels_RT: Tensor,
    *,
    smoothing: float = 0.0,
    reduction: Literal["mean", "row"] = "mean",
) -> Tensor:
    """Cross entropy of the next token, in fp32: the logits at place t against the label at place t + 1.

    Args:
        logits_RTV: Logits of a causal model.
        labels_RT: The ids of the same text, -100 where the token is not to be predicted (prompt, padding);
            place 0 never counts.
        smoothing: Mass taken from the gold token. As in the reference the gold token keeps 1 - smoothing and
            every other token of the vocabulary gets smoothing / V, so that the masses sum to 1 - smoothing /
            V.
        reduction: "mean": over all labels of the batch, 0 when there is none; "row": the sum over each text,
            [R].

    Raises:
        ValueError: Shapes that do not belong together, an unknown reduction, or a smoothing outside 0..1.

    Source: X-VLM `models/xbert.py` BertLMHeadModel (label_smoothing), section 4.4 and 4.7 of its recipes.
    """
    if logits_RTV.shape[:2] != labels_RT.shape:
        raise ValueError(
            f"labels {list(labels_RT.shape)} do not belong to logits {list(logits_RTV.shape)}: give the "
            "labels of the same tokens, the loss shifts them by one place itself"
        )
    if reduction not in ("mean", "row"):
        raise ValueError(f"reduction={reduction!r} is not known; choose mean or row")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must lie in 0..1")
    with torch.autocast(logits_RTV.device.type, enabled=False):
        logits, labels = logits_RTV[:, :-1].float(), labels_RT[:, 1:]
        counts = labels != IGNORED
        whole = logits.logsumexp(-1)
        loss = whole - logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        if smoothing:
            vocabulary = logits.shape[-1]
            others = smoothing / vocabulary
            loss = (1 - smoothing - others) * loss + others * (vocabulary * whole - logits.sum(-1))
        loss = loss * counts
        return loss.sum(1) if reduction == "row" else loss.sum() / counts.sum().clamp(min=1)


def answer_loss(per_answer_A: Tensor, weights_A: Tensor, questions: int) -> Tensor:
    """Sum over answers of weight * loss, divided by the number of questions of the batch.

    `per_answer` is `language_loss(..., reduction="row")`; the weights of one question's answers sum to 1
    where all annotators count.
    Source: ALBEF, arXiv 2107.07651, and X-VLM `models/model_vqa.py`.
    """
    return (weights_A * per_answer_A).sum() / questions


def self_critical_loss(log_probability_R: Tensor, reward_R: Tensor, baseline_R: Tensor) -> Tensor:
    """-mean(log-probability * (reward - baseline)); no gradient through rewards.

    `log_probability` is the mean over a text's drawn tokens (`Sampled.mean_log_probability`). The baseline is
    the reward of the greedy text, or that of the other samples (`mean_of_others`). Source: arXiv 1612.00563;
    X-VLM `scst.py`.
    """
    if not log_probability_R.shape == reward_R.shape == baseline_R.shape:
        raise ValueError(
            f"log_probability {list(log_probability_R.shape)}, reward {list(reward_R.shape)} and baseline "
            f"{list(baseline_R.shape)} need one number per sampled text each"
        )
    return -(log_probability_R * (reward_R - baseline_R).detach()).mean()


def mean_of_others(reward_R: Tensor, samples: int) -> Tensor:
    """For each sampled text the mean reward of the other samples of its image, [R]; samples of an image stand
    together."""
    if samples < 2 or len(reward_R) % samples:
        raise ValueError(
            f"{len(reward_R)} rewards with samples={samples}: every image needs that many samples, at least 2"
        )
    rewards = reward_R.view(-1, samples)
    return ((rewards.sum(1, keepdim=True) - rewards) / (samples - 1)).flatten()
