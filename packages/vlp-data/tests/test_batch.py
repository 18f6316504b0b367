"""Batches move as a whole."""

import torch
from vlp_data.batch import RegionBatch


def test_to_moves_every_tensor_and_keeps_the_rest():
    tensor = torch.zeros(2)
    names = [name for name in RegionBatch.__dataclass_fields__ if name not in ("keys", "padded_pairs")]
    batch = RegionBatch(keys=("a", "b"), padded_pairs=3, **dict.fromkeys(names, tensor))
    moved = batch.to("meta")
    assert {getattr(moved, name).device.type for name in names} == {"meta"}
    assert (moved.keys, moved.padded_pairs) == (("a", "b"), 3)
    assert batch.image.device.type == "cpu"
