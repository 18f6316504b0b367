"""Checks shared by the public functions; each names the operator and the argument and says what it got."""

import torch
from torch import Tensor

from vlp_ops._library import in_memory

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{op}: unsupported dtype {tensor.dtype} for {name}; use float32, float64, float16 or bfloat16"
        )


def check_integer(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{op}: unsupported dtype {tensor.dtype} for {name}; use int64 or int32")


def check_device(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {first_name} is on {first.device} but {name} is on {tensor.device}")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(tensor.shape)}")


def check_dim(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """letters: the axes as the documentation writes them, "N, S, M, D"."""
    if tensor.dim() != letters.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape ({letters}), got {tuple(tensor.shape)}")


def check_range(op: str, name: str, values: Tensor, length: int, what: str) -> None:
    """Reads the tensor on the host: call it only where `validates` says so."""
    values = in_memory(values)
    if values.numel() == 0:
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < 0 or high >= length:
        worst = low if low < 0 else high
        raise ValueError(f"{op}: {name} {worst} is out of range for {what}")


def half_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
