"""Every contrastive task of ours in parts: losses and gradients are those of the step in one, in float64, on
one rank and on two."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from vlp_core.models.vicha.model import Vicha
from vlp_data.batch import RegionBatch
from vlp_methods.engine import entry
from vlp_methods.engine.gradients import InOne, InParts
from vlp_methods.engine.ranks import Ranks
from vlp_methods.engine.wrap import wrap

HOW = {
    "device": torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu", enabled=False),
    "scale": lambda loss: loss,
}
NAMES = {
    "xvlm": {"images": {"itc", "itm", "mlm"}, "regions": {"itc", "itm", "mlm", "bbox", "giou"}},
    "vicha": {"train": {"itc", "itm", "mlm", "hidden", "mim"}},
}


def draw_patches_by_content() -> None:
    """Which patches are removed follows from the image, not from the order of drawing."""
    plain = Vicha._predict_patches

    def removed(self, image, text, mask, noise):
        return plain(self, image, text, mask, image.flatten(1)[:, : self.vision.tokens - 1].float().clone())

    Vicha._predict_patches = removed


def gradients(task, batch, ranks, parts):
    """Losses and gradients of a step without dropout, for the same draws."""
    how = InOne(wrap(task, ranks), **HOW) if parts == 1 else InParts(wrap(task, ranks), parts, **HOW)
    state = {name: value.clone() for name, value in task.state_dict().items()}
    task.zero_grad(set_to_none=True)
    unused = [
        p for name, p in task.named_parameters() if "bbox_head" in name and not hasattr(batch, "is_image")
    ]
    torch.manual_seed(7 + ranks.rank)
    losses = how(batch, count=1, last=True, unused=unused, seed=3)
    for parameter in unused:
        parameter.grad = None  # as the engine does
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    after = {name: value.clone() for name, value in task.named_buffers()}
    task.load_state_dict(state)
    return losses, found, after


def compare(task, batch, ranks, parts):
    """Returns the losses."""
    losses, one, buffers = gradients(task, batch, ranks, 1)
    again, other, after = gradients(task, batch, ranks, parts)
    assert one.keys() == other.keys() and losses.keys() == again.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(again[name], loss, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for name, gradient in one.items():
        scale = max(1e-3, gradient.abs().max().item())
        assert (other[name] - gradient).abs().max().item() <= 1e-6 * scale, name
    temperature = next(name for name in one if name.endswith("temperature"))
    assert one[temperature].abs() > 1e-4
    for name, value in buffers.items():  # queues
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-9)
    return losses


def ready(words):
    """The task of a recipe in float64 and evaluation mode, and the first batch of every stream."""
    recipe = entry.load(words[0], words[1:])
    torch.manual_seed(recipe.settings.seed)
    job = entry.attribute(recipe.entry.build)(recipe.settings)
    job.task.double().eval()
    job.task.model.temperature.data.fill_(0.3)  # so that no similarity decides alone
    if hasattr(job.task, "before_forward"):
        job.task.before_forward(40)
    return job.task, {
        name: in_order(next(iter(stream)).map(lambda x: x.double() if x.is_floating_point() else x))
        for name, stream in job.streams().items()
    }


def in_order(batch):
    """Regions in the order in which they are divided, so that both ways draw the same negatives."""
    return batch.by_image() if isinstance(batch, RegionBatch) else batch


@pytest.fixture
def by_content(monkeypatch):
    monkeypatch.setattr(Vicha, "_predict_patches", Vicha._predict_patches)  # put back afterwards
    draw_patches_by_content()


@pytest.mark.parametrize("method", ["xvlm", "vicha"])
def test_pretraining(tiny_of, by_content, method):
    task, batches = ready(tiny_of(method))
    assert batches.keys() == NAMES[method].keys()
    for name, batch in batches.items():
        for parts in (2, 3):
            assert compare(task, batch, Ranks("cpu"), parts).keys() == NAMES[method][name]


def pretrained(method, words, folder: Path) -> Path:
    """An export with initial values to start from."""
    recipe = entry.load(words[0], words[1:])
    job = entry.attribute(recipe.entry.build)(recipe.settings)
    job.export(folder)
    return folder


@pytest.mark.parametrize("method", ["xvlm", "vicha"])
def test_retrieval(tiny_of, task, tmp_path, method):
    start = tmp_path / "export"
    start.mkdir()
    pretrained(method, tiny_of(method), start)
    small = (
        "model.embed_width=16",
        "data.train.batch=8",
        *(("teacher.queue=32",) if method == "vicha" else ()),
    )
    made, batches = ready(task(f"{method}/shapes_retrieval", *small, start=start))
    (batch,) = batches.values()
    # Two captions of one image are positives of each other, whichever part they are in.
    ids = batch.image_ids.clone()
    ids[7] = ids[0]
    batch = dataclasses.replace(batch, image_ids=ids)
    assert compare(made, batch, Ranks("cpu"), 3).keys() == {"itc", "itm"}


def on_two_ranks(rank: int, folder: str, words) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    draw_patches_by_content()
    ranks = Ranks("cpu")
    for each in words:
        task, batches = ready(each)
        for batch in batches.values():
            compare(task, batch, ranks, 2)
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_with_ddp_and_gather(tiny_of, tmp_path):
    words = (
        (*tiny_of("xvlm"), "gather_gradient=local"),
        (*tiny_of("xvlm"), "gather_gradient=sum", "data.regions=null"),
        tiny_of("vicha"),
    )
    mp.spawn(on_two_ranks, args=(str(tmp_path), words), nprocs=2)
