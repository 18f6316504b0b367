"""X-VLM pre-training: ITC, ITM and MLM on pictures with captions and on regions with phrases, box regression on regions.

Source: arXiv 2111.08276 section 3; `Pretrain.py` and `configs/Pretrain_XVLM_base_4m.yaml` of the official code.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vlp_core import distributed, models, schedule, weights
from vlp_core.models.xvlm import Xvlm
from vlp_core.models.xvlm_losses import pretrain_losses
from vlp_core.models.xvlm_rules import parameter_rules
from vlp_core.optim import AdamW, keep_connected, leave_out, parameter_groups
from vlp_core.recipe import dump
from vlp_core.weights import bert, xvlm
from vlp_data import shapes
from vlp_data.batch import ImageTextBatch, RegionBatch
from vlp_data.examples import ImageTextExamples, RegionExamples
from vlp_data.files import join
from vlp_data.loader import Loader
from vlp_data.roots import rooted
from vlp_data.text import Tokenizer, pre_caption
from vlp_data.transforms import eval_view
from vlp_eval.figures import retrieval_figure
from vlp_eval.gallery import Gallery
from vlp_eval.retrieval import evaluate_retrieval

from vlp_methods.engine.job import Job, Mixing
from vlp_methods.xvlm.schema import Data, Model, Pretrain

log = logging.getLogger(__name__)

REPORTED = ("tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "r_mean")
"""Numbers of the retrieval test that the run reports; retrieval.json holds all."""


class PretrainTask(nn.Module):
    """The objective: named losses of a batch of pictures or of regions, all with weight 1.

    The box head has no part in a batch of pictures: `unused_boxes` tells the optimizer to pass over it.
    """

    def __init__(self, model: Xvlm, *, gather_gradient: distributed.GatherGradient = "local") -> None:
        super().__init__()
        self.model = model
        self.gather_gradient: distributed.GatherGradient = gather_gradient
        self.unused_boxes = False
        """Whether the last batch had no boxes."""

    def forward(self, batch: ImageTextBatch | RegionBatch) -> dict[str, Tensor]:
        regions = batch if isinstance(batch, RegionBatch) else None
        pairs = self.model.pretrain(
            batch.image,
            batch.text_ids,
            batch.attention_mask,
            batch.masked_ids,
            batch.masked_positions,
            image_index_B=regions.image_index if regions else None,
            image_attention_mask_BL=regions.image_attention_mask if regions else None,
        )
        losses = pretrain_losses(
            pairs,
            self.model.temperature,
            masked_labels_BP=batch.masked_labels,
            target_boxes_B4=regions.target_boxes if regions else None,
            is_image_B=regions.is_image if regions else None,
            gather_gradient=self.gather_gradient,
        )
        self.unused_boxes = regions is None
        if self.unused_boxes:
            losses["itm"] = keep_connected(losses["itm"], self.model.bbox_head.parameters())
        return losses


def build(recipe: Pretrain) -> Job:
    """Model, data, optimizer and test of a recipe."""
    data = prepare(recipe.data)
    tokenizer = open_tokenizer(data)
    arguments = model_arguments(recipe.model, tokenizer)
    model = models.create("xvlm", **arguments)
    initialise(model, recipe.model)
    optimizer = AdamW(
        parameter_groups(
            model,
            lr=recipe.optimizer.lr,
            weight_decay=recipe.optimizer.weight_decay,
            rules=parameter_rules(model, fresh_lr_scale=recipe.optimizer.lr_scale),
        ),
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
    )
    task = PretrainTask(model, gather_gradient=recipe.gather_gradient)
    leave_out(optimizer, model.bbox_head.parameters(), absent=lambda: task.unused_boxes)
    return Job(
        task=task,
        streams=partial(open_streams, recipe, data, tokenizer, model.vision.patch_size),
        mixing=mixing(data),
        optimizer=optimizer,
        learning_rate=schedule.named(
            recipe.schedule.kind, warmup=recipe.schedule.warmup_steps, total_steps=recipe.steps
        ),
        evaluate=partial(test_retrieval, recipe, data, tokenizer) if data.test else None,
        export=partial(export, model, arguments, recipe, data),
    )


def prepare(data: Data) -> Data:
    """The same data with every path in full; draws the shapes world where it is asked for and not there yet."""
    root = data.root
    if data.world is not None:
        world = data.world
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlp"
        root = root or str(cache / f"shapes-{world.images}-{world.size}px-{world.seed}")
        shapes.ensure(root, **dump(world), workers=os.cpu_count() or 1)
    regions = data.regions
    return replace(
        data,
        root=root,
        tokenizer=replace(data.tokenizer, files=tuple(join(root, file) for file in data.tokenizer.files)),
        images=replace(data.images, source=rooted(data.images.source, root)),
        regions=regions and replace(regions, source=rooted(regions.source, root)),
        test=data.test and rooted(data.test, root),
    )


def open_tokenizer(data: Data) -> Tokenizer:
    """The tokenizer of the recipe."""
    open_ = Tokenizer.wordpiece if data.tokenizer.kind == "bert" else Tokenizer.roberta
    return open_(*data.tokenizer.files)


def model_arguments(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of `vlp_core.models.create`."""
    text = {**dump(model.text), "vocabulary": tokenizer.vocabulary, "pad_id": tokenizer.pad_id}
    return {
        "vision": dump(model.vision),
        "text": text,
        "embed_width": model.embed_width,
        "temperature": model.temperature,
    }


def initialise(model: Xvlm, options: Model) -> None:
    """Load the checkpoints that the recipe starts from."""
    start = options.weights
    if start.vision:
        weights.load_vision(model.vision, start.vision)
    if start.text:
        bert.load_published(model, start.text)
    if start.model:
        file = Path(start.model)
        if file.is_dir():
            weights.load(model, file / "model.safetensors")
        else:
            xvlm.load(model, file)


def mixing(data: Data) -> Mixing:
    """Regions in a share of the steps, then always pictures (`iter_perc`, specification 4.2)."""
    regions = () if data.regions is None else (("regions", data.regions.share),)
    return Mixing((*regions, ("images", 1.0)))


def open_streams(
    recipe: Pretrain, data: Data, tokenizer: Tokenizer, patch_size: int
) -> Mapping[str, Loader[Any]]:
    """This rank's share of every stream."""
    rank, world = distributed.rank(), distributed.world_size()
    make = partial(
        Loader,
        seed=recipe.seed,
        rank=rank,
        world=world,
        workers=recipe.workers,
        max_bad_fraction=data.max_bad_fraction,
        pin_memory=torch.cuda.is_available() and recipe.device != "cpu",
    )
    common = {
        "tokenizer": tokenizer,
        "image": data.view,
        "text": data.text,
        "masking": data.masking,
    }
    streams = {
        "images": make(
            ImageTextExamples(source=data.images.source.open(), **common), global_batch=data.images.batch
        )
    }
    if (regions := data.regions) is not None:
        if regions.texts % world or regions.pictures % world:
            raise ValueError(
                f"data.regions.texts={regions.texts} and data.regions.pictures={regions.pictures} must be multiples of the {world} ranks"
            )
        examples = RegionExamples(
            source=regions.source.open(),
            batch_texts=regions.texts // world,
            patch_size=patch_size,
            regions=regions.options,
            **common,
        )
        streams["regions"] = make(examples, global_batch=regions.pictures)
    return streams


def test_retrieval(
    recipe: Pretrain, data: Data, tokenizer: Tokenizer, task: nn.Module, step: int, folder: Path
) -> Mapping[str, float]:
    """Both directions of retrieval on `data.test`; writes retrieval.json and retrieval.png into `folder`."""
    assert data.test is not None, "`build` asks for this test only where there is one"
    gallery = Gallery.from_source(data.test.open()).map_texts(
        partial(pre_caption, max_words=data.text.max_words)
    )
    scores = evaluate_retrieval(
        task.model,
        gallery,
        tokenizer,
        view=partial(eval_view, size=data.view.size),
        max_tokens=data.text.max_tokens,
        separator=data.text.separator,
        rerank=recipe.retrieval.rerank,
        image_batch=recipe.retrieval.image_batch,
        pair_batch=recipe.retrieval.pair_batch,
        workers=recipe.workers,
    )
    if distributed.is_main():
        (folder / "retrieval.json").write_text(scores.json())
        log.info("%s", scores.table())
        if recipe.retrieval.figures:
            picture = folder / "retrieval.png"
            retrieval_figure(scores, gallery, queries=recipe.retrieval.figures).save(picture)
            log.info("what was retrieved: %s", picture)
    return {
        f"{stage}/{name}": value
        for stage, numbers in scores.stages.items()
        for name, value in numbers.items()
        if name in REPORTED
    }


def export(model: Xvlm, arguments: Mapping[str, Any], recipe: Pretrain, data: Data, folder: Path) -> None:
    """An export folder: weights, how to build the model, vocabulary."""
    text = {
        "kind": recipe.model.text.kind,
        "files": [Path(file).name for file in data.tokenizer.files],
        "max_tokens": data.text.max_tokens,
        "max_words": data.text.max_words,
        "separator": data.text.separator,
    }
    settings = {"image_size": recipe.model.vision.image_size, "text": text}
    models.save(
        folder, model, name="xvlm", arguments=arguments, settings=settings, text_files=data.tokenizer.files
    )
