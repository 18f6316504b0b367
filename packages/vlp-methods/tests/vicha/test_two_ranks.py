"""ViCHA on two processes: the queue is that of all ranks, and the hierarchy finds its positives on every
rank."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from vlp_core.models.vicha.model import Pairs, Taught
from vlp_core.momentum import FeatureQueue
from vlp_methods.vicha.losses import pretrain_losses

ROWS, LEVELS, WIDTH = 3, 2, 8


def features(ranks: int) -> dict[str, torch.Tensor]:
    """Of all ranks, [..., ranks * ROWS, WIDTH], length one."""
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "image": (),
        "text": (),
        "image_m": (),
        "text_m": (),
        "hidden_image": (LEVELS,),
        "hidden_text": (LEVELS,),
    }
    return {
        name: torch.nn.functional.normalize(torch.randn(*lead, ranks * ROWS, WIDTH, generator=rng), dim=-1)
        for name, lead in shapes.items()
    }


def losses_of(rows: slice, ranks: int, targets: str) -> tuple[dict[str, float], FeatureQueue]:
    own = {name: x[..., rows, :] for name, x in features(ranks).items()}
    torch.manual_seed(1)
    queue = FeatureQueue(16, WIDTH)
    count = len(own["image"])
    pairs = Pairs(
        image_embeds=torch.zeros(count, 1, 1),
        text_embeds=torch.zeros(count, 1, 1),
        image_projection=own["image"],
        text_projection=own["text"],
        hidden_image=own["hidden_image"],
        hidden_text=own["hidden_text"],
        negatives=None,
        match_logits=torch.zeros(3 * count, 2),
        token_logits=torch.zeros(1, 5),
        token_labels=torch.full((1,), -100),
        patches=None,
    )
    taught = Taught(own["image_m"], own["text_m"], None)
    losses = pretrain_losses(pairs, taught, torch.tensor(0.1), queue, hidden_targets=targets)
    return {name: loss.item() for name, loss in losses.items()}, queue


def run(rank: int, folder: str, targets: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    losses, queue = losses_of(slice(rank * ROWS, (rank + 1) * ROWS), 2, targets)
    found = {"losses": losses, "image": queue.image.tolist(), "pointer": queue.pointer.item()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("targets", ["own", "as_released"])
def test_queue_and_hierarchy_over_two_ranks(targets, tmp_path):
    mp.spawn(run, (str(tmp_path), targets), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["image"] == second["image"]
    assert first["pointer"] == second["pointer"] == 2 * ROWS
    torch.testing.assert_close(torch.tensor(first["image"])[: 2 * ROWS], features(2)["image_m"])
    # One process with the batch of both has the mean of both losses, if every row has its positive.
    whole = losses_of(slice(None), 2, "own")[0]["hidden"]
    mean = (first["losses"]["hidden"] + second["losses"]["hidden"]) / 2
    assert (mean == pytest.approx(whole, rel=1e-5)) == (targets == "own")
