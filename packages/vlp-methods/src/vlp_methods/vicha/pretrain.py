"""ViCHA pre-training: ITC with momentum teacher and queue, its hierarchy, ITM, MLM and MIM on images with
captions and concepts.

Source: arXiv 2208.13628 section 3; `Pretrain.py` and `configs/Pretrain.yaml` of the official code.
"""

from typing import Any

from torch import Tensor, nn
from vlp_core import models
from vlp_core.models.vicha.losses import pretrain_losses
from vlp_core.models.vicha.model import NOT_TAUGHT, Vicha
from vlp_core.models.vicha.rules import parameter_rules
from vlp_core.momentum import FeatureQueue
from vlp_core.recipe import dump
from vlp_data.batch import ImageTextBatch
from vlp_data.examples import ImageTextExamples
from vlp_data.text import Tokenizer

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.assembly import adamw, encoder_arguments, exporter, learning_rate
from vlp_methods.parts.data import ALWAYS, concepts_of, examples_of, open_tokenizer, settle, train_stream
from vlp_methods.parts.momentum import Momentum
from vlp_methods.parts.start import initialise
from vlp_methods.parts.teacher import QueueTeacher
from vlp_methods.vicha.finetune import load
from vlp_methods.vicha.schema.pretrain import Hierarchy, MaskedImage, Model, Pretrain


class PretrainTask(nn.Module):
    """The objective: named losses of a batch of images with a text each, beside a teacher and a queue that
    live here."""

    def __init__(
        self,
        model: Vicha,
        teacher: QueueTeacher,
        *,
        hierarchy: Hierarchy | None = None,
        masked_image: MaskedImage | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.momentum = Momentum(model, teacher, without=NOT_TAUGHT)
        self.queue = FeatureQueue(teacher.queue, model.vision_proj.out_features)
        self.weights: dict[str, Any] = {}
        if hierarchy is not None:
            self.weights |= {
                "level_weights": hierarchy.weights,
                "hidden_weight": hierarchy.weight,
                "hidden_targets": hierarchy.targets,
            }
        if masked_image is not None:
            self.weights["masked_image_weight"] = masked_image.weight

    def before_forward(self, step: int) -> None:
        self.momentum.before_forward(self.model, step)

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        inputs = (
            batch.image,
            batch.text_ids,
            batch.attention_mask,
            batch.masked_ids,
            batch.masked_positions,
            batch.masked_labels,
        )
        concepts = concepts_of(batch)
        taught = self.momentum.teacher.teach(*inputs, concepts=concepts)
        pairs = self.model.pretrain(*inputs, taught=taught, concepts=concepts)
        return pretrain_losses(
            pairs, taught, self.model.temperature, self.queue, alpha=self.momentum.alpha, **self.weights
        )


def build(recipe: Pretrain) -> Job:
    """Model, teacher, data, optimizer and test of a recipe."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    arguments = model_arguments(recipe.model, tokenizer)
    model = models.create("vicha", **arguments)
    start = recipe.model.weights
    initialise(model, start)
    # The teacher begins as a copy of the model, so it is made after published weights are read; a run's
    # export holds its teacher.
    task = PretrainTask(
        model, recipe.teacher, hierarchy=recipe.model.hierarchy, masked_image=recipe.model.masked_image
    )
    load(model, start.model, task.momentum, task.queue)
    examples = examples_of(ImageTextExamples, data, tokenizer, masking=data.masking)
    return Job(
        task=task,
        streams=train_stream(recipe, data, examples, data.train.batch),
        mixing=ALWAYS,
        optimizer=adamw(model, recipe.optimizer, parameter_rules()),
        learning_rate=learning_rate(recipe),
        evaluate=evaluation.retrieval_test(recipe, data, tokenizer, recipe.retrieval),
        export=exporter(
            model,
            name="vicha",
            arguments=arguments,
            data=data,
            momentum={"teacher": task.momentum.teacher, "queue": task.queue},
        ),
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
