"""What `python -m vlp_ops.bench` measures: operators, sizes, and what one would use otherwise.

Sizes are those of the systems (see the README of the package) and two larger ones that published benchmarks
use. Peers that are not part of PyTorch are used when they are installed and said to be missing when they are
not.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlp_ops
from vlp_ops import reference
from vlp_ops.contrastive import KEEP_CPU

Run = Callable[[], Any]
Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement of `functions` ("ours" and peers), all called with the same arguments.

    phase: "forward", "backward" or "forward+backward"; gradients are those of the arguments that want one.
    """

    op: str
    name: str
    phase: str
    functions: dict[str, Function]
    # Fresh random arguments; the same for a small problem, and the definition, which is called with these in
    # float64.
    inputs: Callable[[], tuple[Any, ...]]
    small: Callable[[], tuple[Any, ...]]
    definition: Function
    # Share of the numbers that two right implementations may have otherwise: a point at the border of a pixel
    # has two slopes, and rounding chooses between equal scores.
    undecided: float = 0.0
    # Whether rounding to a half type keeps the result: a memory may choose other slots.
    same_in_half: bool = True
    # What the operation cannot do without: bytes read and written once, and floating-point operations.
    gigabytes: float = 0.0
    gigaflops: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.op}/{self.name}/{self.phase}"


class Packed:
    """A peer that wants other arguments: `pack` makes them once, outside of what is timed."""

    def __init__(self, function: Function, pack: Callable[..., tuple[Any, ...]]) -> None:
        self.function, self.pack = function, pack

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def leaves_of(args: Sequence[Any]) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]


def upstream_of(out: Tensor) -> Tensor:
    """A gradient of both signs, the same for every implementation."""
    return torch.arange(out.numel(), device=out.device).cos().view(out.shape).to(out.dtype)


def prepare(phase: str, function: Function, args: tuple[Any, ...]) -> Run:
    """What is timed: one phase of one implementation."""
    if isinstance(function, Packed):
        args = function.pack(*args)
    if phase == "forward":
        fixed = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        return lambda: function(*fixed)
    leaves, out = leaves_of(args), function(*args)
    upstream = upstream_of(out)
    if phase == "backward":
        return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(function(*args), leaves, upstream)


def results_of(phase: str, function: Function, args: tuple[Any, ...]) -> list[Tensor]:
    """Output (the first of several) and, if the phase has them, the gradients of all arguments with one."""
    packed = isinstance(function, Packed)
    if isinstance(function, Packed):
        args = function.pack(*args)
    if phase == "forward":
        out = function(*(arg.detach() if isinstance(arg, Tensor) else arg for arg in args))
        return [out if isinstance(out, Tensor) else out[0]]
    leaves, out = leaves_of(args), function(*args)
    grads = torch.autograd.grad(out, leaves, upstream_of(out))
    # Packed arguments have other gradients, but for the first.
    return [out.detach(), *(grads[:1] if packed else grads)]


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        arg.detach().double().requires_grad_(arg.requires_grad)
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for arg in args
    )


def bytes_of(*tensors: Tensor) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) * 1e-9


# ---- optional peers ----------------------------------------------------------------------------------------


def optional(notes: dict[str, str], peers: dict[str, Callable[[], Function]]) -> dict[str, Function]:
    """Those of the peers that can be imported; why not, in `notes`, for the others."""
    found = {}
    for name, load in peers.items():
        try:
            found[name] = load()
        except ModuleNotFoundError:
            notes[name] = "not installed"
        # A peer is foreign code: whatever is wrong with it, the others are still measured.
        except Exception as error:
            notes[name] = f"cannot be used: {(str(error).splitlines() or [repr(error)])[0]}"
    return found


@cache
def level_tensors(shapes: tuple[tuple[int, int], ...], device: str) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor(shapes, device=device)
    areas = sizes.prod(1)
    return sizes, areas.cumsum(0) - areas


def with_level_tensors(function: Function) -> Function:
    """Of a function of (value, shapes, starts, locations, weights), one of (value, list of shapes, locations,
    weights)."""

    def call(value: Tensor, shapes: list[tuple[int, int]], location: Tensor, weight: Tensor) -> Tensor:
        return function(value, *level_tensors(tuple(shapes), str(value.device)), location, weight)

    return call


def deformops() -> Function:
    return with_level_tensors(importlib.import_module("deformops.registry").msda)


def hub_kernel() -> Function:
    """The kernels of Deformable-DETR as the hub has them built: raw operators, made differentiable here."""
    kernel = importlib.import_module("kernels").get_kernel("kernels-community/deformable-detr", version=1)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Tensor) -> Tensor:
            ctx.save_for_backward(*args)
            return kernel.ms_deform_attn_forward(*args, 64)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            value, location, weight = kernel.ms_deform_attn_backward(
                *ctx.saved_tensors, grad.contiguous(), 64
            )
            return value, None, None, location, weight

    # It takes one dtype for everything.
    return with_level_tensors(
        lambda value, shapes, starts, location, weight: Attention.apply(
            value, shapes, starts, location.to(value.dtype), weight
        )
    )


def mmcv() -> Function:
    function = importlib.import_module("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction
    return with_level_tensors(
        lambda value, shapes, starts, location, weight: function.apply(
            value, shapes, starts, location.to(value.dtype), weight, 64
        )
    )


def flash_deform() -> Function:
    """DCNv4: locations and the logarithms of the weights in one tensor, softmax inside."""
    function = importlib.import_module("DCNv4.functions").FlashDeformAttnFunction

    def pack(value: Tensor, shapes: list[tuple[int, int]], location: Tensor, weight: Tensor) -> tuple:
        both = torch.cat([location.flatten(3), weight.log().flatten(3)], -1).to(value.dtype).detach()
        sizes = level_tensors(tuple(shapes), str(value.device))
        return value, *sizes, both.requires_grad_(location.requires_grad), 64, location.shape[4]

    return Packed(function.apply, pack)


def triton_bag() -> Function:
    """The embedding bag of facebookresearch/memory, where its checkout is on the path."""
    return importlib.import_module("lingua.product_key.xformer_embeddingbag").xformers_embedding_bag


def open_clip_loss() -> Function:
    loss = importlib.import_module("open_clip.loss").ClipLoss()
    return lambda image, text, scale: loss(image, text, scale)


def open_clip_sigmoid() -> Function:
    loss = importlib.import_module("open_clip.loss").SigLipLoss()
    return lambda image, text, scale: loss(image, text, scale, torch.full_like(scale, -10.0))


def inf_cl() -> Function:
    loss = importlib.import_module("inf_cl").cal_inf_loss
    return lambda image, text, scale: (loss(image, text, scale=scale) + loss(text, image, scale=scale)) / 2


def linear_cross_entropy() -> Function:
    """Both directions with PyTorch's chunked loss."""
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(image), device=image.device)
        one, two = ((scale * a).to(a.dtype) for a in (image, text))
        return (
            F.linear_cross_entropy(one, text, labels, options=options)
            + F.linear_cross_entropy(two, image, labels, options=options)
        ) / 2

    return loss


def xformers_attention() -> Function:
    function = importlib.import_module("xformers.ops").memory_efficient_attention

    def pack(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple:
        # Its rows of the mask have to begin at multiples of 8 elements.
        batch, heads, length, _ = query.shape
        room = (length + 7) // 8 * 8
        bias = torch.zeros(batch, heads, length, room, device=query.device, dtype=query.dtype)[..., :length]
        bias.masked_fill_(~mask[:, None, None], -math.inf)
        return *(t.transpose(1, 2).contiguous() for t in (query, key, value)), bias

    return Packed(lambda q, k, v, bias: function(q, k, v, attn_bias=bias).transpose(1, 2), pack)


def compiled(function: Function) -> Function:
    """The plain definition through inductor: what one gets without writing any kernel."""
    # Each size is compiled on its own; beyond 8 of them the default would run the rest uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


# ---- ms_deform_attn ----------------------------------------------------------------------------------------


def grid_sample_attention(
    value: Tensor, shapes: list[tuple[int, int]], location: Tensor, weight: Tensor
) -> Tensor:
    """What published code does without its kernel: grid_sample for each level, everything in memory."""
    batch, _, heads, width = value.shape
    queries, points = location.shape[1], location.shape[4]
    samples = []
    for level, part in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        part = part.flatten(2).transpose(1, 2).reshape(batch * heads, width, *shapes[level])
        grid = (2 * location[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1).to(value.dtype)
        samples.append(F.grid_sample(part, grid, padding_mode="zeros", align_corners=False))
    weights = weight.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2).contiguous()


def deformable_inputs(
    shapes: list[tuple[int, int]],
    queries: int | None,
    *,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Encoder (queries is None): every position looks around itself, N(0, 3 pixels); decoder: uniform places.
    Locations are float32."""
    heads, width, points, levels = 8, 32, 4, len(shapes)
    if queries is None:
        size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=device)[:, None]
        centres = [
            torch.stack(
                torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1
            )
            for h, w in shapes
        ]
        centre = torch.cat([part.reshape(-1, 2) for part in centres]).to(device)
        queries = len(centre)
        around = torch.randn(batch, queries, heads, levels, points, 2, device=device)
        location = centre[None, :, None, None, None] + 3 * around / size
    else:
        location = torch.rand(batch, queries, heads, levels, points, 2, device=device)
    location = location.to(torch.promote_types(torch.float32, dtype))
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, device=device)
    weight = torch.rand(batch, queries, heads, levels, points, device=device)
    weight /= weight.sum((-1, -2), keepdim=True)
    value, weight = value.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    return value, shapes, location.requires_grad_(), weight


THREE = [(32, 32), (64, 64), (128, 128)]
FOUR = [(128, 128), (64, 64), (32, 32), (16, 16)]
# Name, level sizes, queries (None: one for each position), batch.
DEFORMABLE: dict[str, list[tuple[str, list[tuple[int, int]], int | None, int]]] = {
    "cpu": [
        ("ViSFT 73x73", [(73, 73)], None, 1),
        ("Mask2Former 3 levels", THREE, None, 1),
        ("Deformable-DETR 4 levels", FOUR, None, 1),
        ("decoder 300 queries", FOUR, 300, 1),
    ],
    "cuda": [
        ("ViSFT 73x73", [(73, 73)], None, 1),
        ("ViSFT 73x73 N=8", [(73, 73)], None, 8),
        ("Mask2Former 3 levels N=2", THREE, None, 2),
        ("Deformable-DETR 4 levels N=2", FOUR, None, 2),
        ("decoder 300 queries N=2", FOUR, 300, 2),
    ],
}


def deformable_cases(device: str, dtype: torch.dtype, notes: dict[str, str]) -> Iterator[Case]:
    functions: dict[str, Function] = {"ours": vlp_ops.ms_deform_attn, "grid_sample": grid_sample_attention}
    if device == "cuda":
        functions |= {"compiled definition": compiled(reference.ms_deform_attn)}
        functions |= optional(
            notes, {"deformops": deformops, "kernels": hub_kernel, "mmcv": mmcv, "DCNv4": flash_deform}
        )
    for name, shapes, queries, batch in DEFORMABLE[device]:
        make = partial(deformable_inputs, batch=batch, device=device, dtype=dtype)
        few = [(max(1, h // 8), max(1, w // 8)) for h, w in shapes]
        value, _, location, weight = make(shapes, queries)
        size, out = bytes_of(value, location, weight), value[0, 0].numel() * value.element_size()
        out *= location.shape[0] * location.shape[1] * 1e-9
        for phase, gigabytes in (("forward", size + out), ("backward", 2 * size + out)):
            yield Case(
                op="ms_deform_attn",
                name=name,
                phase=phase,
                functions=functions,
                inputs=partial(make, shapes, queries),
                small=partial(make, few, queries and queries // 8),
                definition=reference.ms_deform_attn,
                undecided=1e-3,
                gigabytes=gigabytes,
            )


# ---- memory ------------------------------------------------------------------------------------------------


def torch_bag(indices: Tensor, weight: Tensor, shares: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=shares, mode="sum")


def zipf(rows: int, shape: tuple[int, int], device: str = "cpu") -> Tensor:
    """Few popular rows and a long tail, exponent 1.1."""
    chances = (torch.arange(1, rows + 1, dtype=torch.float64, device=device) ** -1.1).cumsum(0)
    places = torch.rand(shape, dtype=torch.float64, device=device) * chances[-1]
    return torch.searchsorted(chances, places).clamp_(max=rows - 1)


def bag_inputs(
    spread: str, bags: int, bag: int, rows: int, width: int, *, device: str = "cpu", dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if spread == "uniform":
        indices = torch.randint(rows, (bags, bag), device=device)
    else:
        indices = zipf(rows, (bags, bag), device)
    weight = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    return indices, weight, torch.rand(bags, bag, device=device, dtype=dtype).requires_grad_()


# Name, bags, entries of a bag, rows of the table, width. The first is Memory-CLIP's.
BAGS = {
    "cpu": [("64 x 256", 3940, 8, 64, 256), ("65k x 256", 3940, 128, 65536, 256)],
    "cuda": [("64 x 256", 3940, 8, 64, 256), ("1M x 1024", 4096, 128, 1 << 20, 1024)],
}


def bag_cases(device: str, dtype: torch.dtype, notes: dict[str, str]) -> Iterator[Case]:
    functions: dict[str, Function] = {"ours": vlp_ops.embedding_bag, "F.embedding_bag": torch_bag}
    if device == "cuda":
        functions |= {"compiled definition": compiled(reference.embedding_bag)}
        functions |= optional(notes, {"facebookresearch/memory": triton_bag})
    # On the CPU the forward pass is F.embedding_bag itself.
    phases = ("backward",) if device == "cpu" else ("forward", "backward")
    for name, bags, bag, rows, width in BAGS[device]:
        for spread in ("uniform", "Zipf"):
            make = partial(bag_inputs, spread, device=device, dtype=dtype)
            element = torch.empty((), dtype=dtype).element_size()
            table, out, entries = rows * width * element, bags * width * element, bags * bag * (8 + element)
            for phase in phases:
                # A table that does not fit the cache is read once for every entry.
                read = min(table, bags * bag * width * element) if phase == "backward" else 0
                read = read or (bags * bag * width * element if table > 1 << 27 else table)
                written = table + entries if phase == "backward" else 0
                yield Case(
                    op="embedding_bag",
                    name=f"{name} {spread}",
                    phase=phase,
                    functions=functions,
                    inputs=partial(make, bags, bag, rows, width),
                    small=partial(make, bags // 8, bag, rows // 8, width),
                    definition=reference.embedding_bag,
                    gigabytes=(read + written + out + entries) * 1e-9,
                )


def plain_topk(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Three torch.topk over all k*k candidates, as the published memory layer has it."""
    half, n = query.shape[-1] // 2, keys.shape[2]
    first, index1 = torch.einsum("thd,hnd->thn", query[..., :half], keys[:, 0]).topk(k, dim=-1)
    second, index2 = torch.einsum("thd,hnd->thn", query[..., half:], keys[:, 1]).topk(k, dim=-1)
    scores, chosen = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(k, dim=-1)
    return scores, index1.gather(-1, chosen // k) * n + index2.gather(-1, chosen % k)


def plain_lookup(query: Tensor, keys: Tensor, values: Tensor, k: int) -> Tensor:
    scores, indices = plain_topk(query, keys, k)
    shares = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(values.dtype)
    return torch_bag(indices.flatten(1), values, shares.flatten(1))


def key_inputs(
    tokens: int, heads: int, n: int, half: int, *, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    query = torch.randn(tokens, heads, 2 * half, device=device, dtype=dtype).requires_grad_()
    return query, torch.randn(heads, 2, n, half, device=device, dtype=dtype).requires_grad_()


# Name, tokens, heads, keys per half, k, half of the width of a key. The first is Memory-CLIP's.
KEYS = {
    "cpu": [("n=8 k=4", 3940, 2, 8, 4, 128), ("n=1024 k=32", 1024, 4, 1024, 32, 128)],
    "cuda": [("n=8 k=4", 3940, 2, 8, 4, 128), ("n=1024 k=32", 4096, 4, 1024, 32, 256)],
}


def topk_cases(device: str, dtype: torch.dtype, notes: dict[str, str]) -> Iterator[Case]:
    functions: dict[str, Function] = {"ours": vlp_ops.product_key_topk, "einsum + 3 topk": plain_topk}
    if device == "cuda":
        functions |= {"compiled definition": compiled(plain_topk)}
    for name, tokens, heads, n, k, half in KEYS[device]:
        make = partial(key_inputs, heads=heads, n=n, half=half, device=device, dtype=dtype)
        yield Case(
            op="product_key_topk",
            name=name,
            phase="forward",
            functions=functions,
            inputs=lambda make=make, tokens=tokens, k=k: (*make(tokens), k),
            small=lambda make=make, k=k: (*make(64), k),
            definition=plain_topk,
            undecided=1e-3,
            gigaflops=4 * tokens * heads * n * half * 1e-9,
        )


def lookup_cases(device: str, dtype: torch.dtype, notes: dict[str, str]) -> Iterator[Case]:
    name, tokens, heads, n, k, half = KEYS[device][0]
    width = BAGS[device][0][4]

    def inputs(tokens: int = tokens) -> tuple[Any, ...]:
        values = torch.randn(n * n, width, device=device, dtype=dtype).requires_grad_()
        return *key_inputs(tokens, heads, n, half, device=device, dtype=dtype), values, k

    yield Case(
        op="product_key_lookup",
        name=name,
        phase="forward+backward",
        functions={"ours": vlp_ops.product_key_lookup, "einsum + 3 topk + F.embedding_bag": plain_lookup},
        inputs=inputs,
        small=partial(inputs, 64),
        definition=plain_lookup,
        undecided=1e-3,
        same_in_half=False,
        gigaflops=12 * tokens * heads * n * half * 1e-9,
    )


# ---- contrastive -------------------------------------------------------------------------------------------


def one_product_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The loss of open_clip with one product: the logits of the texts are those of the images, transposed."""
    labels = torch.arange(len(image), device=image.device)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def chunked_siglip(image: Tensor, text: Tensor, scale: Tensor, chunk: int = 256) -> Tensor:
    """The sigmoid loss of open_clip in chunks of rows, which stay nearer to the caches."""
    total = image.new_zeros((), dtype=scale.dtype)
    for start in range(0, len(image), chunk):
        logits = scale * image[start : start + chunk] @ text.T - 10.0
        signs = torch.full_like(logits, -1.0)
        signs.diagonal(start).fill_(1.0)
        total = total - F.logsigmoid(signs * logits).sum()
    return total / len(image)


def our_siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return vlp_ops.siglip_loss(image, text, scale, -10.0)


def exact_siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return reference.siglip_loss(image, text, scale, -10.0)


LOSSES: dict[str, dict[str, Function]] = {
    "clip_loss": {"ours": vlp_ops.clip_loss, "one product": one_product_clip},
    "siglip_loss": {"ours": our_siglip, "chunks of 256": chunked_siglip},
}
DEFINITIONS = {"clip_loss": reference.clip_loss, "siglip_loss": exact_siglip}


def loss_functions(op: str, device: str, notes: dict[str, str]) -> dict[str, Function]:
    """Ours and the peers of one loss."""
    peers: dict[str, Callable[[], Function]] = {
        "open_clip": open_clip_loss if op == "clip_loss" else open_clip_sigmoid
    }
    if op == "clip_loss" and device == "cuda":
        peers |= {"linear_cross_entropy twice": linear_cross_entropy, "inf_cl": inf_cl}
    functions = LOSSES[op] | optional(notes, peers)
    if device == "cuda":
        functions |= {"compiled definition": compiled(DEFINITIONS[op])}
    return functions


def loss_inputs(
    n: int, d: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    image = F.normalize(torch.randn(n, d, device=device), dim=1)
    text = F.normalize(image + 0.05 * torch.randn(n, d, device=device), dim=1)
    scale = torch.tensor(14.3, device=device, dtype=torch.promote_types(torch.float32, dtype))
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), scale.requires_grad_()


# Rows and width; the command line may name other rows.
LOSS_SIZES = {"cpu": [(2048, 512), (8192, 512)], "cuda": [(4096, 512), (32768, 512)]}


def loss_cases(
    device: str, dtype: torch.dtype, notes: dict[str, str], *, op: str, rows: int | None = None
) -> Iterator[Case]:
    for n, d in [(rows, 512)] if rows else LOSS_SIZES[device]:
        yield Case(
            op=op,
            name=f"{n} x {d}",
            phase="forward+backward",
            functions=loss_functions(op, device, notes),
            inputs=partial(loss_inputs, n, d, device, dtype),
            small=partial(loss_inputs, max(8, n // 8), d, device, dtype),
            definition=DEFINITIONS[op],
            # Products made: a large softmax loss makes that of the forward pass again.
            gigaflops=(4 if op == "clip_loss" and (device != "cpu" or n * n > KEEP_CPU) else 3)
            * (2 * n * n * d * 1e-9),
        )


# ---- tokens and attention ----------------------------------------------------------------------------------


def repeated_gather(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids[..., None].repeat(1, 1, x.shape[-1]))


def indexed(x: Tensor, ids: Tensor) -> Tensor:
    return x[torch.arange(len(x), device=x.device)[:, None], ids]


def indexed_restore(kept: Tensor, restore: Tensor, token: Tensor) -> Tensor:
    masks = token.expand(kept.shape[0], restore.shape[1] - kept.shape[1], -1)
    return indexed(torch.cat([kept, masks], dim=1), restore)


def gathered_restore(kept: Tensor, restore: Tensor, token: Tensor) -> Tensor:
    masks = token.repeat(kept.shape[0], restore.shape[1] - kept.shape[1], 1)
    return repeated_gather(torch.cat([kept, masks], dim=1), restore)


# Batch, tokens, width, kept.
TOKENS = {"cpu": (64, 196, 768, 49), "cuda": (256, 196, 768, 49)}


def token_cases(device: str, dtype: torch.dtype, notes: dict[str, str], *, op: str) -> Iterator[Case]:
    batch, length, width, kept = TOKENS[device]

    def inputs(batch: int = batch) -> tuple[Tensor, ...]:
        x = torch.randn(batch, length, width, device=device, dtype=dtype).requires_grad_()
        order = torch.rand(batch, length, device=device).argsort(1)
        if op == "take_tokens":
            return x, order[:, :kept].contiguous()
        token = torch.zeros(1, 1, width, device=device, dtype=dtype).requires_grad_()
        return x.detach()[:, :kept].contiguous().requires_grad_(), order.argsort(1), token

    functions: dict[str, Function] = {
        "take_tokens": {"ours": vlp_ops.take_tokens, "gather": repeated_gather, "x[rows, ids]": indexed},
        "restore_tokens": {
            "ours": vlp_ops.restore_tokens,
            "gather": gathered_restore,
            "x[rows, ids]": indexed_restore,
        },
    }[op]
    few, all_rows = (rows * width * torch.empty((), dtype=dtype).element_size() for rows in (kept, length))
    moved = {"take_tokens": (2 * few, few + all_rows), "restore_tokens": (few + all_rows, few + all_rows)}[op]
    for phase, bytes_moved in zip(("forward", "backward"), moved, strict=True):
        yield Case(
            op=op,
            name=f"{batch} x {length} x {width} keep {kept}",
            phase=phase,
            functions=functions,
            inputs=inputs,
            small=partial(inputs, max(1, batch // 8)),
            definition=getattr(reference, op),
            gigabytes=batch * bytes_moved * 1e-9,
        )


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    logits = logits + (1 - mask[:, None, None].to(query.dtype)) * -10000.0
    return logits.softmax(-1) @ value


def attention_cases(device: str, dtype: torch.dtype, notes: dict[str, str]) -> Iterator[Case]:
    batch = 8 if device == "cpu" else 64

    def inputs(batch: int = batch) -> tuple[Tensor, ...]:
        tensors = torch.randn(3, batch, 12, 197, 64, device=device, dtype=dtype).unbind()
        mask = torch.arange(197, device=device) < torch.randint(60, 198, (batch, 1), device=device)
        return *(tensor.requires_grad_() for tensor in tensors), mask

    functions: dict[str, Function] = {
        "ours": lambda q, k, v, mask: vlp_ops.attention(q, k, v, mask=mask),
        "explicit softmax": explicit_attention,
        "SDPA": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]),
    }
    if device == "cuda":
        functions |= optional(notes, {"xformers": xformers_attention})
    yield Case(
        op="attention",
        name=f"{batch} x 12 x 197 x 64 padded",
        phase="forward",
        functions=functions,
        inputs=inputs,
        small=partial(inputs, 2),
        definition=explicit_attention,
        gigaflops=4 * batch * 12 * 197 * 197 * 64 * 1e-9,
    )


# Rows, inputs, outputs: 16 images of ViCHA in a ViT a quarter as wide as the published one, 8 in a ViT-B.
LINEAR = ((4272, 192, 768), (1576, 768, 3072))


def linear_cases(device: str, dtype: torch.dtype, notes: dict[str, str]) -> Iterator[Case]:
    def inputs(rows: int, width: int, outputs: int) -> tuple[Tensor, ...]:
        sizes = ((rows, width), (outputs, width), (outputs,))
        return tuple(torch.randn(size, device=device, dtype=dtype).requires_grad_() for size in sizes)

    for rows, width, outputs in LINEAR:
        for phase, products in (("forward", 1), ("backward", 2)):
            yield Case(
                op="linear",
                name=f"{rows} x {width} x {outputs}",
                phase=phase,
                functions={"ours": vlp_ops.linear, "F.linear": F.linear},
                inputs=partial(inputs, rows, width, outputs),
                small=partial(inputs, rows // 4, width, outputs),
                definition=F.linear,
                gigaflops=products * 2 * rows * width * outputs * 1e-9,
            )


# Each makes the cases of one operator; called with device ("cpu" or "cuda"), dtype and a dict for remarks on
# missing peers.
CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "ms_deform_attn": deformable_cases,
    "embedding_bag": bag_cases,
    "product_key_topk": topk_cases,
    "product_key_lookup": lookup_cases,
    "clip_loss": partial(loss_cases, op="clip_loss"),
    "siglip_loss": partial(loss_cases, op="siglip_loss"),
    "take_tokens": partial(token_cases, op="take_tokens"),
    "restore_tokens": partial(token_cases, op="restore_tokens"),
    "attention": attention_cases,
    "linear": linear_cases,
}
