"""The processes of a run: which one am I, how do we talk.

Ranks come from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), as torchrun,
`vlp-train --nproc` and the script of `vlp-train --sbatch` set it; without it there is one rank.
"""

import os
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from vlp_methods.engine.entry import UserError
from vlp_methods.engine.launch import RENDEZVOUS
from vlp_methods.engine.stop import Board


class Ranks:
    """This rank, all ranks, this rank's device; a context in which they are connected."""

    def __init__(self, device: str) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.clean = True
        """Whether all ranks leave together; not after one has left in the middle of something."""
        cuda = torch.cuda.is_available()
        if device == "mps" and not torch.backends.mps.is_available():
            raise UserError("device=mps: torch sees no GPU of a Mac; use device=auto or device=cpu")
        if device == "mps" and self.world > 1:
            raise UserError(
                "device=mps: a Mac has one GPU and torch no communication for it; train on one rank"
            )
        if device == "cuda" and not cuda:
            raise UserError("device=cuda: torch sees no GPU; use device=auto or device=cpu")
        if device == "mps":
            self.device = torch.device("mps")
        elif device == "cpu" or not cuda:
            self.device = torch.device("cpu")
        elif local >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local} has no GPU of its own: this machine has {torch.cuda.device_count()}"
            )
        else:
            self.device = torch.device("cuda", local)

    def board(self) -> Board | None:
        """Where ranks leave notes for each other; None on one rank."""
        if self.world == 1:
            return None
        board: Board = dist.distributed_c10d._get_default_store()
        return board

    @property
    def main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                init_method=os.environ.get(RENDEZVOUS, "env://"),
                rank=self.rank,
                world_size=self.world,
                device_id=self.device if self.device.type == "cuda" else None,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if dist.is_initialized() and self.clean:
            if kind is None:
                dist.barrier()  # gloo may abort the last rank when another leaves early
            dist.destroy_process_group()
