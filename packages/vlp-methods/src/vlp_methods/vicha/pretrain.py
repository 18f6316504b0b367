"""ViCHA pre-training: ITC with momentum teacher and queue, its hierarchy, ITM, MLM and MIM on images with
captions and concepts.

Source: arXiv 2208.13628 section 3; `Pretrain.py` and `configs/Pretrain.yaml` of the official code.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vlp_core.losses.masked_language import IGNORED
from vlp_core.losses.matching import Negatives
from vlp_core.models.fusion.model import PairStates
from vlp_core.models.vicha.model import NOT_TAUGHT, Taught, Vicha
from vlp_core.momentum import FeatureQueue
from vlp_core.recipe import dump
from vlp_data.batch import ImageTextBatch
from vlp_data.examples import ImageTextExamples
from vlp_data.text import Tokenizer

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.data import images_of
from vlp_methods.builders.model import encoder_arguments, load_encoders
from vlp_methods.builders.teacher import Momentum, TaughtTask
from vlp_methods.engine.gradients import added, pieces, shares
from vlp_methods.engine.job import Job
from vlp_methods.sections.teacher import QueueTeacher
from vlp_methods.vicha.losses import ORDER, Levels, feature_losses, fusion_losses
from vlp_methods.vicha.rules import parameter_rules
from vlp_methods.vicha.schema.pretrain import Hierarchy, MaskedImage, Model, Pretrain


class PretrainTask(TaughtTask):
    """The objective: named losses of a batch of images with a text each, beside a teacher and a queue that
    live here.

    Args:
        model: Model.
        teacher: Options of teacher and queue.
        hierarchy: Weights of the losses of lower levels; None: the model has none.
        masked_image: Weight of the loss of removed patches; None: the model removes none.
    """

    momentum: Momentum
    queue: FeatureQueue

    def __init__(
        self,
        model: Vicha,
        teacher: QueueTeacher,
        *,
        hierarchy: Hierarchy | None = None,
        masked_image: MaskedImage | None = None,
    ) -> None:
        momentum = Momentum(model, teacher, without=NOT_TAUGHT)
        super().__init__(model, momentum, FeatureQueue(teacher.queue, model.vision_proj.out_features))
        self.hierarchy = Hierarchy() if hierarchy is None else hierarchy
        self.masked_image = MaskedImage() if masked_image is None else masked_image

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        taught = self.teach(batch)
        losses = added(self.objective(self.encode(batch), (batch,), (taught,)))
        return {name: losses[name] for name in ORDER if name in losses}

    def teach(self, batch: ImageTextBatch) -> Taught:
        """What the teacher makes of a batch or a part of it."""
        return self.momentum.teacher.teach(
            images_of(batch),
            batch.text_ids,
            batch.attention_mask,
            batch.masked_ids,
            batch.masked_positions,
            batch.masked_labels,
        )

    def encode(self, batch: ImageTextBatch) -> PairStates:
        """What both encoders make of a batch or a part of it."""
        return self.model.encode_pretraining(
            images_of(batch), batch.text_ids, batch.attention_mask, batch.masked_ids
        )

    def objective(
        self, states: PairStates, parts: Sequence[ImageTextBatch], taught: Sequence[Taught] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """`itc` and `hidden` of the whole batch, then what the fusion encoder says about each part, and its
        removed patches; negatives are drawn from the whole batch. `taught` None asks the teacher."""
        taught = [self.teach(part) for part in parts] if taught is None else taught
        believed = joined(taught)
        self.model.clamp_temperature()
        levels = None
        if states.image_levels is not None and states.text_levels is not None:
            levels = Levels(states.image_levels.transpose(0, 1), states.text_levels.transpose(0, 1))
        negatives = self.model.draw_negatives(states.image_projection, states.text_projection, believed)
        yield feature_losses(
            states,
            believed,
            self.model.temperature,
            self.queue,
            levels,
            alpha=self.momentum.alpha,
            level_weights=self.hierarchy.weights,
            hidden_weight=self.hierarchy.weight,
            hidden_targets=self.hierarchy.targets,
        )
        counted = shares([(part.masked_labels != IGNORED).sum() for part in parts])
        for piece in pieces(len(part.text_ids) for part in parts):
            number = piece.number
            own, against = states.among(piece.rows, negatives)
            losses = self.fusion_losses(own, against, parts[number], taught[number])
            del own
            share = {"itm": piece.share, "mlm": counted[number], "mim": piece.share}
            yield {name: loss * share[name] for name, loss in losses.items()}

    def fusion_losses(
        self, states: PairStates, negatives: Negatives, batch: ImageTextBatch, taught: Taught
    ) -> dict[str, Tensor]:
        """`fusion_losses` of a batch, or of a part of it with its negatives behind it."""
        predicted = self.model.predict(
            states, negatives, images_of(batch), batch.masked_positions, batch.masked_labels
        )
        return fusion_losses(
            predicted,
            taught,
            alpha=self.momentum.alpha,
            masked_image_weight=self.masked_image.weight,
        )


def joined(taught: Sequence[Taught]) -> Taught:
    """The teacher's features of all parts of a batch, without its tokens."""
    if len(taught) == 1:
        return taught[0]
    return Taught(
        torch.cat([each.image_projection for each in taught]),
        torch.cat([each.text_projection for each in taught]),
        None,
    )


def build(recipe: Pretrain) -> Job:
    """Model, teacher, data, optimizer and test of a recipe."""
    options = recipe.model
    made = assemble(recipe, "vicha", "pretrain", partial(model_arguments, options))
    # The teacher begins as a copy of the model, so it is made after published weights are read.
    load_encoders(made.model, options.weights)
    return made.job(
        PretrainTask(
            made.model, recipe.teacher, hierarchy=options.hierarchy, masked_image=options.masked_image
        ),
        made.stream(partial(ImageTextExamples, masking=made.data.masking)),
        parameter_rules(),
        evaluations=evaluation.pretraining(made, "retrieval", recipe.retrieval),
    )


def model_arguments(options: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of `vlp_core.models.create("vicha", ...)`."""
    heads = ["contrast", "match", "masked_language"]
    arguments: dict[str, Any] = {
        **encoder_arguments(options, tokenizer),
        "embed_width": options.embed_width,
        "temperature": options.temperature,
        "heads": heads,
    }
    if options.hierarchy is not None:
        heads.append("hidden")
        arguments["levels"] = options.hierarchy.levels
    if options.masked_image is not None:
        arguments["masked_image"] = dump(options.masked_image)
        del arguments["masked_image"]["weight"]
    return arguments
