"""X-VLM on NLVR2: is a sentence true of two pictures?

Two stages: domain pre-training on pictures with captions, where a caption stands beside two pictures of the batch and the model tells which
of them it describes, if any; then fine-tuning on NLVR2 itself.

Source: arXiv 2111.08276 section 4.2; `NLVR_pretrain.py`, `NLVR.py` and `configs/NLVR*.yaml` of the official code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vlp_core.models import NlvrModel
from vlp_data.batch import NlvrBatch, RetrievalBatch
from vlp_data.examples import NlvrExamples, RetrievalExamples

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.data import open_tokenizer, settle, train_stream
from vlp_methods.xvlm.finetune import job, start
from vlp_methods.xvlm.schema.nlvr import Nlvr, NlvrDomain


class AssignmentTask(nn.Module):
    """The objective of the domain stage: cross entropy over three classes, text fits the first picture, the second, none."""

    def __init__(self, model: NlvrModel) -> None:
        super().__init__()
        # It finds similar pictures and is not trained (no gradient reaches it in the reference either).
        model.vision_proj.requires_grad_(False)
        self.model = model

    def forward(self, batch: RetrievalBatch) -> dict[str, Tensor]:
        embeds = self.model.vision(batch.image)
        pairs = self.model.assignment_pairs(embeds)
        logits = self.model.classify(embeds, pairs.first, pairs.second, batch.text_ids, batch.attention_mask)
        return {"assignment": F.cross_entropy(logits.float(), pairs.labels)}


class NlvrTask(nn.Module):
    """The objective of fine-tuning: cross entropy over two classes, 1 = true."""

    def __init__(self, model: NlvrModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: NlvrBatch) -> dict[str, Tensor]:
        first = torch.arange(len(batch.labels), device=batch.labels.device)
        logits = self.model(batch.image, first, first + len(first), batch.text_ids, batch.attention_mask)
        return {"labels": F.cross_entropy(logits.float(), batch.labels)}


def build_domain(recipe: NlvrDomain) -> Job:
    """Model, data and optimizer of domain pre-training."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("nlvr_domain", recipe.model, tokenizer)

    def examples() -> RetrievalExamples:
        return RetrievalExamples(
            source=data.train.source.open(), tokenizer=tokenizer, image=data.view, text=data.text
        )

    return job(
        recipe,
        data,
        started,
        AssignmentTask(started.model),
        train_stream(recipe, data, examples, data.train.batch),
    )


def build(recipe: Nlvr) -> Job:
    """Model, data, optimizer and evaluations of fine-tuning."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("nlvr", recipe.model, tokenizer)

    def examples() -> NlvrExamples:
        return NlvrExamples(
            source=data.train.source.open(), tokenizer=tokenizer, image=data.view, text=data.text
        )

    measure = evaluation.sentence_labels(recipe, data, tokenizer, recipe.labels)
    return job(
        recipe,
        data,
        started,
        NlvrTask(started.model),
        train_stream(recipe, data, examples, data.train.batch),
        measure=measure,
        val=data.val,
        test=data.test,
    )
