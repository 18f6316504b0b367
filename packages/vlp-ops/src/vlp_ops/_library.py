"""Schemas of `torch.ops.vlp_ops.*`, loading of the compiled kernels, and what is known about both.

Every operator has a PyTorch implementation under CompositeExplicitAutograd. The compiled libraries only add
kernels for the CPU and CUDA keys, which take precedence; without them the same operators work on every
device.
"""

import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vlp_ops._built import PACKAGE, digest, read_record

LIBRARY = torch.library.Library("vlp_ops", "DEF")

# deterministic: asks for a gradient of `value` that does not depend on the order of threads; the forward pass
# ignores it. Outputs that a mask leaves out are empty tensors: a schema has no optional return.
_DEFINITIONS = """
    ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights,
        bool softmax=False, bool deterministic=False) -> Tensor

    ms_deform_attn.tensor(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor
        sampling_locations, Tensor attention_weights, bool softmax=False, bool deterministic=False) -> Tensor

    ms_deform_attn_backward(Tensor grad, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,
        Tensor attention_weights, bool softmax, bool deterministic, bool[3] mask) -> (Tensor, Tensor, Tensor)

    ms_deform_attn_backward.tensor(Tensor grad, Tensor value, Tensor spatial_shapes, Tensor level_start_index,
        Tensor sampling_locations, Tensor attention_weights, bool softmax, bool deterministic, bool[3] mask)
        -> (Tensor, Tensor, Tensor)

    product_key_topk(Tensor scores1, Tensor scores2, int k) -> (Tensor, Tensor)

    product_key_topk_backward(Tensor grad, Tensor indices, SymInt n1, SymInt n2) -> (Tensor, Tensor)

    embedding_bag(Tensor indices, Tensor weight, Tensor per_sample_weights) -> Tensor

    embedding_bag_backward(Tensor grad, Tensor indices, Tensor weight, Tensor per_sample_weights, bool[2]
        mask) -> (Tensor, Tensor)

    contrastive_loss(Tensor a, Tensor b, Tensor scale, Tensor? labels, Tensor? ids_a, Tensor? ids_b, Tensor?
        soft, bool columns, SymInt tile, bool keep) -> (Tensor loss_row, Tensor loss_col, Tensor row_stats,
        Tensor col_stats, Tensor products)

    contrastive_loss_backward(Tensor grad_row, Tensor grad_col, Tensor a, Tensor b, Tensor scale, Tensor?
        labels, Tensor? ids_a, Tensor? ids_b, Tensor? soft, Tensor row_stats, Tensor col_stats, Tensor
        products, bool columns, SymInt tile, bool[3] mask) -> (Tensor, Tensor, Tensor)

    sigmoid_loss(Tensor a, Tensor b, Tensor scale, Tensor bias, SymInt offset, bool negative_only, bool
        with_grad, SymInt tile) -> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor grad_scale, Tensor
        grad_bias)

    sigmoid_loss_backward(Tensor grad, Tensor a, Tensor b, Tensor scale, Tensor bias, Tensor grad_a, Tensor
        grad_b, Tensor grad_scale, Tensor grad_bias, bool[4] mask) -> (Tensor, Tensor, Tensor, Tensor)

    contrastive_tile(Tensor(a!) products, Tensor scale, Tensor? labels, Tensor? ids_a, Tensor? ids_b, Tensor?
        soft, bool columns) -> (Tensor, Tensor)

    contrastive_tile_gradient(Tensor(a!) products, Tensor scale, Tensor? labels, Tensor? ids_a, Tensor? ids_b,
        Tensor? soft, Tensor grad_row, Tensor row, Tensor lse_row, Tensor? grad_col, Tensor? col, Tensor?
        lse_col, Tensor(b!) out) -> ()

    sigmoid_tile(Tensor(a!) products, Tensor scale, Tensor bias, SymInt diagonal, bool paired, Tensor(b!)?
        out) -> Tensor

    take_tokens(Tensor x, Tensor ids) -> Tensor

    take_tokens_backward(Tensor grad, Tensor ids, SymInt length) -> Tensor

    restore_tokens(Tensor kept, Tensor ids_restore, Tensor mask_token) -> Tensor

    restore_tokens_backward(Tensor grad, Tensor ids_restore, SymInt kept) -> (Tensor, Tensor)
"""
SCHEMAS = [" ".join(paragraph.split()) for paragraph in _DEFINITIONS.strip().split("\n\n")]
for _schema in SCHEMAS:
    LIBRARY.define(_schema)

# Why a compiled library is not in use; a missing key means that it is loaded.
_reasons: dict[str, str] = {}


def _load(device: str) -> None:
    file, record = PACKAGE / f"_C_{device}.so", read_record()
    if os.environ.get("VLP_OPS_DISABLE_NATIVE", "0") not in ("", "0"):
        _reasons[device] = "VLP_OPS_DISABLE_NATIVE is set"
    elif device == "cuda" and torch.version.cuda is None:
        _reasons[device] = f"torch {torch.__version__} is built without CUDA"
    elif not file.is_file():
        why = record.get("missing", {}).get(device)
        told = f" ({why})" if why else ""
        _reasons[device] = f"no {file.name} was built{told}; python -m vlp_ops.build compiles it"
    elif record.get(device, {}).get("sources") != digest(device):
        _set_aside(
            device, f"{file.name} was built from other sources; python -m vlp_ops.build compiles it again"
        )
    else:
        try:
            torch.ops.load_library(file)
        except OSError as error:
            _set_aside(device, f"{file.name} does not load: {error}")


def _set_aside(device: str, reason: str) -> None:
    _reasons[device] = reason
    warnings.warn(f"vlp_ops: {reason}; using the PyTorch implementation", stacklevel=3)


for _device in ("cpu", "cuda"):
    _load(_device)


def backend_info() -> dict[str, Any]:
    """Which kernels serve the operators in this process.

    Returns a dict: `cpu` and `cuda`, each {"native": bool, "reason": why not, or None}; `torch` and
    `torch_cuda` (versions; None for a CPU build of torch); `built` (what was recorded at the installation:
    torch, compiler, GPU architectures; under `missing` why a library was not built).
    """
    info: dict[str, Any] = {
        device: {"native": device not in _reasons, "reason": _reasons.get(device)}
        for device in ("cpu", "cuda")
    }
    return info | {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "built": read_record()}


def is_native(device: str) -> bool:
    return device not in _reasons


@cache
def _warn_no_cuda() -> None:
    warnings.warn(
        f"vlp_ops was built without CUDA kernels ({_reasons['cuda']}); using the PyTorch implementation",
        stacklevel=4,
    )


def note_backend(tensor: Tensor) -> None:
    """Says once per process that CUDA tensors are served by the PyTorch implementation."""
    if tensor.is_cuda and "cuda" in _reasons and not torch.compiler.is_compiling():
        _warn_no_cuda()


def validates(tensor: Tensor) -> bool:
    """Whether values (not only shapes) are checked: always on the CPU, elsewhere only with VLP_OPS_VALIDATE=1
    (it waits for the device)."""
    if torch.compiler.is_compiling() or is_fake(in_memory(tensor)):
        return False
    return tensor.device.type == "cpu" or os.environ.get("VLP_OPS_VALIDATE", "0") not in ("", "0")


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor below the wrappers of `torch.func`, whose values can be read; axes of `vmap` come first."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        axis = functorch.maybe_get_bdim(tensor)
        tensor = functorch.get_unwrapped(tensor)
        if axis >= 0:
            tensor = tensor.movedim(axis, 0)
    return tensor


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has a shape and a device but no values."""
    # Who made such a tensor has imported its module, which is too slow to import for everybody.
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def register(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Fills in one operator: PyTorch implementation, fake tensors, autocast and gradient.

    Without `backward` (the gradient operators themselves) a second derivative is refused: PyTorch would only
    warn and go on. The operators run with autocast off, because the matrix products inside a loss must not be
    rounded to the autocast type.
    """
    operator = torch._library.utils.lookup_op(f"vlp_ops::{name}")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlp_ops::{name}", fake, lib=LIBRARY)
    for device in ("cpu", "cuda"):

        def under_autocast(*args: Any, device: str = device) -> Any:
            with torch.autocast(device, enabled=False):
                return operator(*args)

        LIBRARY.impl(name, under_autocast, f"Autocast{device.upper()}")
    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"vlp_ops::{name} cannot be differentiated: "
                "the operators of vlp_ops have first derivatives only; "
                "vlp_ops.reference has functions that are differentiable twice"
            )

    torch.library.register_autograd(f"vlp_ops::{name}", backward, setup_context=setup_context, lib=LIBRARY)
