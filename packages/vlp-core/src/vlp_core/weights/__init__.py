"""Checkpoints in and out: one explicit, two-way adapter per source, strict loading, safe reading."""

from vlp_core.weights.adapter import (
    Adapter,
    Buffer,
    CheckpointError,
    Drop,
    Fuse,
    Rename,
    Rule,
    Tied,
    Translation,
)
from vlp_core.weights.files import Checkpoint, read, read_checkpoint, write
from vlp_core.weights.loading import HasPositionTables, LoadReport, load
from vlp_core.weights.vision import load_vision, vision_adapter

__all__ = [
    "Adapter",
    "Buffer",
    "Checkpoint",
    "CheckpointError",
    "Drop",
    "Fuse",
    "HasPositionTables",
    "LoadReport",
    "Rename",
    "Rule",
    "Tied",
    "Translation",
    "load",
    "load_vision",
    "read",
    "read_checkpoint",
    "vision_adapter",
    "write",
]
