from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from vlp_core import distributed


def start(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(Path(folder) / "store"), ranks), rank=rank, world_size=ranks
    )


def stop() -> None:
    dist.barrier()
    dist.destroy_process_group()


def gather_everything(rank: int, ranks: int, folder: str) -> None:
    start(rank, ranks, folder)
    found = {}
    weight = torch.arange(1.0, 1 + 2 * ranks)[:, None]
    for gradient in ("local", "sum", "none"):
        mine = (10.0 * rank + torch.arange(2.0))[:, None].requires_grad_()
        everything = distributed.gather(mine, gradient)
        # Every rank has its own loss, so that "sum" must add what other ranks send.
        loss = (everything * weight * (rank + 1)).sum()
        if gradient != "none":
            loss.backward()
        found[gradient] = (everything.detach(), mine.grad, everything.requires_grad)
    found["ids"] = distributed.gather(torch.tensor([rank, rank + 5]), "none")
    found["mean"] = distributed.mean_over_ranks(torch.tensor([float(rank), 1.0]))
    found["object"] = distributed.broadcast_object({"from": rank} if rank == 1 else None, source=1)
    found["objects"] = distributed.gather_objects({"from": rank})
    found["who"] = (distributed.rank(), distributed.world_size(), distributed.is_main())
    distributed.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    stop()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(gather_everything, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_gathered_rows_stand_in_rank_order(two_ranks):
    for found in two_ranks:
        for gradient in ("local", "sum", "none"):
            assert found[gradient][0].flatten().tolist() == [0, 1, 10, 11]
        assert found["ids"].tolist() == [0, 5, 1, 6]


def test_local_gradient_is_the_slice_of_this_rank(two_ranks):
    assert two_ranks[0]["local"][1].flatten().tolist() == [1, 2]
    assert two_ranks[1]["local"][1].flatten().tolist() == [6, 8]


def test_summed_gradient_adds_what_all_ranks_send(two_ranks):
    assert two_ranks[0]["sum"][1].flatten().tolist() == [3, 6]
    assert two_ranks[1]["sum"][1].flatten().tolist() == [9, 12]


def test_no_gradient_passes_with_none(two_ranks):
    assert not any(found["none"][2] for found in two_ranks)


def test_mean_broadcast_and_identity(two_ranks):
    for rank, found in enumerate(two_ranks):
        assert found["mean"].tolist() == [0.5, 1.0]
        assert found["object"] == {"from": 1}
        assert found["objects"] == [{"from": 0}, {"from": 1}]
        assert found["who"] == (rank, 2, rank == 0)


def test_one_process_needs_no_group():
    x = torch.ones(2, 3, requires_grad=True)
    assert distributed.gather(x, "local") is x
    assert distributed.gather(x, "sum") is x
    assert not distributed.gather(x, "none").requires_grad
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.broadcast_object("x") == "x"
    assert distributed.gather_objects("x") == ["x"]
    assert torch.equal(distributed.mean_over_ranks(x), x)
    distributed.barrier()


def test_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match="must be 'sum', 'local' or 'none'"):
        distributed.gather(torch.ones(1), "half")
