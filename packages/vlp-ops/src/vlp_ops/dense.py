"""Linear layers on CPUs where the library behind `torch.nn.functional.linear` leaves half of the processor
idle.

PyTorch gives float32 products to MKL, which takes AVX2 code on AMD processors, also on those with AVX-512;
oneDNN, which is in every build of PyTorch for x86, has AVX-512 code for all. `linear` uses it there, forward
and backward, in the same precision. Measured on an EPYC with AVX-512: `python -m vlp_ops.bench --op linear`.

N rows   K inputs   M outputs
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# oneDNN compiles code for every new shape (0.5 ms measured), which smaller products than this do not earn
# back if they come once. The choice depends on the shape alone, never on what was seen before: a resumed run
# has to take the same one.
LEAST_FLOP = 1 << 28


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b as `torch.nn.functional.linear`: x (..., K), weight (M, K), bias (M,) -> (..., M).

    Large float32 products on AMD processors with AVX-512 go to oneDNN, everything else to PyTorch;
    `linear_backend` says which. The two differ in rounding only. Raises what `torch.nn.functional.linear`
    raises.
    """
    if linear_backend(x, weight, bias) == "onednn":
        return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def linear_backend(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    """What `linear` takes for the same arguments: "onednn" or "torch".

    oneDNN needs an AMD processor with AVX-512, float32 tensors on it without autocast, and a product of 2^28
    operations; it is left alone where `torch.compile` or `torch.func` looks on, and where
    `torch.backends.mkldnn.enabled` is False.
    """
    if torch.compiler.is_compiling() or x.ndim < 2 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return "torch"
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return "onednn" if _is_faster(2 * x.numel() * weight.shape[0], *tensors) else "torch"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) @ b (K, M), without gradient, by what `linear` would take."""
    if _is_faster(2 * a.numel() * b.shape[1], a, b):
        return _by_onednn(a, b.t())
    return torch.mm(a, b)


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`: same parameters, same initial values, same result."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _is_faster(flop: int, *tensors: Tensor) -> bool:
    return (
        flop >= LEAST_FLOP
        and all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.dtype == torch.float32
            for tensor in tensors
        )
        and _processor_gains()
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


@cache
def _processor_gains() -> bool:
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _maker() == "AuthenticAMD"
    )


def _maker() -> str:
    """The name that the processor gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (N, K) times b (M, K) transposed, plus bias; both may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _by_onednn(grad, weight.t()) if needs_x else None,
            _by_onednn(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )
