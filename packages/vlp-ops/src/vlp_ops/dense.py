"""Linear layers on CPUs where the library behind `torch.nn.functional.linear` leaves a part of the processor
idle.

PyTorch gives float32 products to MKL, which takes AVX2 code on AMD processors, also on those with AVX-512;
oneDNN, which is in every build of PyTorch for x86, has AVX-512 code for all. `linear` uses it where it was
measured to be faster, forward and backward, in the same precision: decision 0009 of the repository has the
numbers, `python -m vlp_ops.bench --op linear` makes them again.

N rows   K inputs   M outputs
"""

import os
import platform
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

# oneDNN compiles code for every new shape (0.5 ms measured), which smaller products than this do not earn
# back if they come once.
LEAST_FLOP = 1 << 28
# AMD's numbers of processor families: which products oneDNN makes faster there. Zen 5 has 512 bits wide units
# and takes half the time. Zen 4 has 256 bits and takes 3 to 17 % less, but up to a fifth more when the rows
# of the left operand do not lie in memory one after the other (gradients of weights).
ALL, ROWS = "all", "left operand in rows"
# Zen 4 takes all products all the same: so did the versions before, and a run that one of them began goes on
# with the same bits. Its rows-only rule waits for a version that may change bits.
GAINS = {26: ALL, 25: ALL}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: Literal["torch", "onednn"] | None = None,
) -> Tensor:
    """x W^T + b as `torch.nn.functional.linear`: x (..., K), weight (M, K), bias (M,) -> (..., M).

    Large float32 products go to oneDNN on the processors where that is faster, everything else to PyTorch;
    `linear_backend` says which. The two differ in rounding only. Which of them is taken follows from the
    shape, the layout and the family of the processor, never from a measurement in the process: a resumed run
    repeats its bits.
    backend: "torch" or "onednn" by name; the environment variable VLP_OPS_LINEAR does the same for a process.
    Raises what `torch.nn.functional.linear` raises, and ValueError for an unknown backend or one that cannot
    serve the call.
    """
    if linear_backend(x, weight, bias, backend=backend) == "onednn":
        return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def linear_backend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: Literal["torch", "onednn"] | None = None,
) -> str:
    """What `linear` takes for the same arguments: "onednn" or "torch".

    oneDNN needs float32 tensors on the CPU without autocast and without whatever wants to see PyTorch's own
    operators: `torch.compile`, `torch.func`, forward-mode differentiation, a dispatch mode (flop counting,
    fake tensors, selective checkpointing). By itself it is taken on AMD processors with AVX-512 of the
    families in `GAINS`, for products of 2^28 operations, unless `torch.backends.mkldnn.enabled` is False.
    Raises ValueError as `linear` does.
    """
    if backend not in (None, "torch", "onednn"):
        raise ValueError(f"linear: backend must be 'torch', 'onednn' or None, got {backend!r}")
    fits = x.ndim >= 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if backend == "onednn":
        if not (fits and _is_served(*tensors)):
            raise ValueError(
                "linear: oneDNN cannot serve this call: it needs plain float32 tensors on the CPU whose "
                "shapes fit, and neither autocast nor torch.compile, torch.func, forward-mode "
                "differentiation or a dispatch mode"
            )
        return "onednn"
    if backend == "torch" or not fits or x.ndim < 2:
        return "torch"
    return "onednn" if _is_faster(2 * x.numel() * weight.shape[0], *tensors) else "torch"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) @ b (K, M), without gradient, by what `linear` would take."""
    if _is_faster(2 * a.numel() * b.shape[1], a, b):
        return _by_onednn(a, b.t())
    return torch.mm(a, b)


class _FoundAsLinear(type):
    """Makes a class equal to `torch.nn.Linear` as a key: `torch.ao.quantization` looks a layer up by its
    exact type, in a dict and in a list, and would pass over a class of its own without a word."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is nn.Linear

    def __hash__(cls) -> int:
        return hash(nn.Linear)


class Linear(nn.Linear, metaclass=_FoundAsLinear):
    """`torch.nn.Linear` by `linear`: same parameters, same initial values, same result.

    Tools that look for `torch.nn.Linear`, by isinstance or by the exact type as a key, find it, too.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _is_served(*tensors: Tensor) -> bool:
    """Whether oneDNN can compute with these, and nobody wants to see PyTorch's own operators."""
    return (
        not torch.compiler.is_compiling()
        and all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.dtype == torch.float32
            for tensor in tensors
        )
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _is_faster(flop: int, left: Tensor, *others: Tensor) -> bool:
    if torch.compiler.is_compiling() or flop < LEAST_FLOP:
        return False
    gains = _gains()
    return gains is not None and (gains == ALL or left.stride(-1) == 1) and _is_served(left, *others)


@cache
def _gains() -> str | None:
    """Which products go to oneDNN in this process: a value of GAINS, or None."""
    wanted = os.environ.get("VLP_OPS_LINEAR", "")
    if wanted not in ("", "torch", "onednn"):
        raise ValueError(f"VLP_OPS_LINEAR must be torch or onednn, or not be set, got {wanted!r}")
    if wanted:
        return ALL if wanted == "onednn" else None
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    maker, family = _processor()
    return GAINS.get(family) if maker == "AuthenticAMD" else None


def _processor() -> tuple[str, int]:
    """The maker and the family that the processor names; ("", 0) where it cannot be asked."""
    try:
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        # Windows: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD".
        words = platform.processor().replace(",", "").split()
        named = dict(pairwise(words))
        return words[-1] if words else "", int(named.get("Family", 0))
    told = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())
    }
    return told.get("vendor_id", ""), int(told.get("cpu family", 0))


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (N, K) times b (M, K) transposed, plus bias; both may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # Differentiable in turn, so second derivatives are right.
        return (
            linear(grad, weight.t()) if needs_x else None,
            linear(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )
