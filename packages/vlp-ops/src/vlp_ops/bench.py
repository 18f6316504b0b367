"""python -m vlp_ops.bench: ours against what one would use otherwise, in one process and run, on the CPU.

Every case first checks ours and each peer against the definition in float64 on a small problem, then times them in turn: the minimum of several
repetitions, in processor time with one thread (other work on the machine then counts less) and in wall time with more. A ratio is peer / ours.
Floors are in bench_targets.json; the exit status is 1 when a ratio of the one-thread run is below its floor.

    python -m vlp_ops.bench                     # everything, one thread
    python -m vlp_ops.bench --op clip_loss --threads 4 --repeat 3 --json result.json
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlp_ops
from vlp_ops import reference

Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: `runs` maps "ours" and the names of peers to what is timed."""

    op: str
    name: str
    phase: str
    runs: dict[str, Run]
    # Result of ours and of each peer on a small problem, and the definition's in float64.
    check: Callable[[], tuple[dict[str, Tensor], Tensor]] | None = None
    # What the operation cannot do without: bytes read and written once, and floating-point operations.
    gigabytes: float = 0.0
    gigaflops: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.op}/{self.name}/{self.phase}"


@dataclass
class Result:
    key: str
    seconds: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    of_ceiling: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        return {peer: value / self.seconds["ours"] for peer, value in self.seconds.items() if peer != "ours"}


def measure(runs: dict[str, Run], repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Minimum time of each, taken in turn so that a busy moment of the machine meets all of them."""
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, math.inf)
    for _ in range(repeat):
        for name, run in runs.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return best


def backward_of(loss: Tensor, leaves: Sequence[Tensor], upstream: Tensor | None = None) -> Run:
    return lambda: torch.autograd.grad(loss, leaves, upstream, retain_graph=True)


# ---- ms_deform_attn --------------------------------------------------------------------------------------------------------------


def grid_sample_attention(
    value: Tensor, shapes: list[tuple[int, int]], location: Tensor, weight: Tensor
) -> Tensor:
    """What published code does without its kernel: grid_sample for each level, everything in memory."""
    batch, _, heads, width = value.shape
    queries, points = location.shape[1], location.shape[4]
    samples = []
    for level, part in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        part = part.flatten(2).transpose(1, 2).reshape(batch * heads, width, *shapes[level])
        grid = (2 * location[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(part, grid, padding_mode="zeros", align_corners=False))
    weights = weight.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2).contiguous()


def deformable_inputs(
    shapes: list[tuple[int, int]], queries: int | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder (queries is None): every position looks around itself, N(0, 3 pixels); decoder: uniform places."""
    heads, width, points, levels = 8, 32, 4, len(shapes)
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)[:, None]
    if queries is None:
        centres = [
            torch.stack(
                torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1
            )
            for h, w in shapes
        ]
        centre = torch.cat([part.reshape(-1, 2) for part in centres])
        queries = len(centre)
        location = (
            centre[None, :, None, None, None] + 3 * torch.randn(1, queries, heads, levels, points, 2) / size
        )
    else:
        location = torch.rand(1, queries, heads, levels, points, 2)
    value = torch.randn(1, sum(h * w for h, w in shapes), heads, width)
    weight = torch.rand(1, queries, heads, levels, points)
    weight /= weight.sum((-1, -2), keepdim=True)
    return tuple(tensor.to(dtype).requires_grad_() for tensor in (value, location, weight))


def deformable_cases() -> Iterator[Case]:
    for name, shapes, queries in (
        ("ViSFT 73x73", [(73, 73)], None),
        ("Mask2Former 3 levels", [(32, 32), (64, 64), (128, 128)], None),
        ("Deformable-DETR 4 levels", [(128, 128), (64, 64), (32, 32), (16, 16)], None),
        ("decoder 300 queries", [(128, 128), (64, 64), (32, 32), (16, 16)], 300),
    ):
        leaves = deformable_inputs(shapes, queries)
        functions = {"ours": vlp_ops.ms_deform_attn, "grid_sample": grid_sample_attention}
        small = [(max(1, h // 8), max(1, w // 8)) for h, w in shapes]

        def check(small=small, queries=queries, functions=functions) -> tuple[dict[str, Tensor], Tensor]:
            tensors = deformable_inputs(small, queries and queries // 8)
            exact = reference.ms_deform_attn(tensors[0].double(), small, *(t.double() for t in tensors[1:]))
            return {key: run(tensors[0], small, *tensors[1:]) for key, run in functions.items()}, exact

        def forward(run, shapes=shapes, leaves=leaves) -> Run:
            with torch.no_grad():
                fixed = [leaf.detach() for leaf in leaves]
            return lambda: run(fixed[0], shapes, *fixed[1:])

        size = sum(leaf.numel() for leaf in leaves) * 4e-9
        results = {key: run(leaves[0], shapes, *leaves[1:]) for key, run in functions.items()}
        upstream = torch.randn_like(results["ours"])
        out = upstream.numel() * 4e-9
        runs = {key: forward(run) for key, run in functions.items()}
        yield Case(
            op="ms_deform_attn", name=name, phase="forward", runs=runs, check=check, gigabytes=size + out
        )
        yield Case(
            op="ms_deform_attn",
            name=name,
            phase="backward",
            runs={key: backward_of(result, leaves, upstream) for key, result in results.items()},
            gigabytes=2 * size + out,
        )


# ---- memory ----------------------------------------------------------------------------------------------------------------------


def torch_bag(indices: Tensor, weight: Tensor, shares: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=shares, mode="sum")


def zipf(rows: int, shape: tuple[int, int]) -> Tensor:
    """Few popular rows and a long tail, exponent 1.1."""
    chances = torch.arange(1, rows + 1, dtype=torch.float64) ** -1.1
    return torch.multinomial(chances, shape[0] * shape[1], replacement=True).view(shape)


def bag_cases() -> Iterator[Case]:
    for name, bags, bag, rows, width in (
        ("64 x 256", 3940, 8, 64, 256),
        ("65k x 256", 3940, 128, 65536, 256),
    ):
        for spread in ("uniform", "Zipf"):
            indices = torch.randint(rows, (bags, bag)) if spread == "uniform" else zipf(rows, (bags, bag))
            weight = torch.randn(rows, width).requires_grad_()
            shares = torch.rand(bags, bag).requires_grad_()
            functions = {"ours": vlp_ops.embedding_bag, "F.embedding_bag": torch_bag}

            def check(indices=indices, weight=weight, shares=shares, functions=functions):
                part = slice(0, len(indices) // 8)
                few = [tensor.detach().double().requires_grad_() for tensor in (weight, shares[part])]
                upstream = torch.randn(len(indices[part]), weight.shape[1])
                exact = torch.autograd.grad(
                    reference.embedding_bag(indices[part], *few), few, upstream.double()
                )[0]
                found = {}
                for key, run in functions.items():
                    leaves = [tensor.detach().requires_grad_() for tensor in (weight, shares[part])]
                    found[key] = torch.autograd.grad(run(indices[part], *leaves), leaves, upstream)[0]
                return found, exact

            results = {key: run(indices, weight, shares) for key, run in functions.items()}
            upstream = torch.randn_like(results["ours"])
            yield Case(
                op="embedding_bag",
                name=f"{name} {spread}",
                phase="backward",
                runs={
                    key: backward_of(result, (weight, shares), upstream) for key, result in results.items()
                },
                check=check,
                gigabytes=(2 * weight.numel() + 2 * shares.numel() + upstream.numel() + 2 * indices.numel())
                * 4e-9,
            )


def plain_topk(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Three torch.topk over all k*k candidates, as the published memory layer has it."""
    half, n = query.shape[-1] // 2, keys.shape[2]
    first, index1 = torch.einsum("thd,hnd->thn", query[..., :half], keys[:, 0]).topk(k, dim=-1)
    second, index2 = torch.einsum("thd,hnd->thn", query[..., half:], keys[:, 1]).topk(k, dim=-1)
    scores, chosen = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(k, dim=-1)
    return scores, index1.gather(-1, chosen // k) * n + index2.gather(-1, chosen % k)


def topk_cases() -> Iterator[Case]:
    for name, tokens, heads, n, k, half in (
        ("n=8 k=4", 3940, 2, 8, 4, 128),
        ("n=1024 k=32", 1024, 4, 1024, 32, 128),
    ):
        query, keys = torch.randn(tokens, heads, 2 * half), torch.randn(heads, 2, n, half)
        functions = {"ours": vlp_ops.product_key_topk, "einsum + 3 topk": plain_topk}

        def check(query=query, keys=keys, k=k, functions=functions):
            few = query[:64]
            exact = plain_topk(few.double(), keys.double(), k)[0]
            return {key: run(few, keys, k)[0] for key, run in functions.items()}, exact

        runs: dict[str, Run] = {key: partial(run, query, keys, k) for key, run in functions.items()}
        gemm = 4 * tokens * heads * n * half * 1e-9
        yield Case(op="product_key_topk", name=name, phase="forward", runs=runs, check=check, gigaflops=gemm)


# ---- contrastive -----------------------------------------------------------------------------------------------------------------


def plain_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The loss of open_clip on one process: both logit matrices and two cross-entropies."""
    labels = torch.arange(len(image))
    both = F.cross_entropy(scale * image @ text.T, labels) + F.cross_entropy(scale * text @ image.T, labels)
    return both / 2


def plain_siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The sigmoid loss of open_clip on one process."""
    logits = scale * image @ text.T - 10.0
    labels = 2 * torch.eye(len(image)) - torch.ones(len(image), len(text))
    return -F.logsigmoid(labels * logits).sum() / len(image)


def our_siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return vlp_ops.siglip_loss(image, text, scale, -10.0)


LOSSES: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "clip_loss": {"ours": vlp_ops.clip_loss, "open_clip's formula": plain_clip},
    "siglip_loss": {"ours": our_siglip, "open_clip's formula": plain_siglip},
}


def loss_inputs(n: int, d: int) -> list[Tensor]:
    image = F.normalize(torch.randn(n, d), dim=1)
    text = F.normalize(image + 0.05 * torch.randn(n, d), dim=1)
    return [tensor.requires_grad_() for tensor in (image, text, torch.tensor(14.3))]


def both_passes(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Run:
    return lambda: torch.autograd.grad(function(*leaves), leaves)


def loss_cases(n: int, d: int = 512) -> Iterator[Case]:
    leaves = loss_inputs(n, d)
    for op, functions in LOSSES.items():
        definition = {"clip_loss": reference.clip_loss, "siglip_loss": reference.siglip_loss}[op]
        more = () if op == "clip_loss" else (-10.0,)

        def check(functions=functions, definition=definition, more=more):
            few = loss_inputs(n // 8, d)
            exact = [leaf.detach().double().requires_grad_() for leaf in few]
            wanted = torch.autograd.grad(definition(*exact, *more), exact)[0]
            return {key: both_passes(run, few)()[0] for key, run in functions.items()}, wanted

        runs = {key: both_passes(run, leaves) for key, run in functions.items()}
        flops = (4 if op == "clip_loss" else 3) * 2 * n * n * d * 1e-9
        yield Case(
            op=op, name=f"{n} x {d}", phase="forward+backward", runs=runs, check=check, gigaflops=flops
        )


def peak_of(op: str, which: str, n: int, d: int) -> int:
    """Bytes beyond the inputs that forward and backward need at most, in this process."""
    leaves = loss_inputs(n, d)
    function = LOSSES[op][which]
    few = loss_inputs(64, d)
    both_passes(function, few)()

    def status(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {name}")

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    both_passes(function, leaves)()
    return status("VmHWM") - before


def memory_results(ops: Sequence[str], n: int, d: int = 512) -> Iterator[tuple[str, dict[str, int]]]:
    """Peak memory of each implementation in a process of its own."""
    for op, functions in LOSSES.items():
        if op not in ops:
            continue
        found = {}
        for which in functions:
            code = f"import torch; torch.set_num_threads(1); from vlp_ops import bench; print(bench.peak_of({op!r}, {which!r}, {n}, {d}))"
            found[which] = int(
                subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=True
                ).stdout
            )
        yield f"{op}/{n} x {d}/peak memory", found


# ---- tokens and attention --------------------------------------------------------------------------------------------------------


def token_cases() -> Iterator[Case]:
    batch, length, kept, width = 64, 196, 49, 768
    x = torch.randn(batch, length, width)
    order = torch.rand(batch, length).argsort(1)
    ids, restore = order[:, :kept].contiguous(), order.argsort(1)
    few, token = x[:, :kept].contiguous(), torch.zeros(1, 1, width)

    def repeated(x: Tensor, ids: Tensor) -> Tensor:
        return torch.gather(x, 1, ids[..., None].repeat(1, 1, x.shape[-1]))

    def restored(kept_: Tensor, restore: Tensor, token: Tensor) -> Tensor:
        masks = token.repeat(kept_.shape[0], restore.shape[1] - kept_.shape[1], 1)
        return repeated(torch.cat([kept_, masks], dim=1), restore)

    name = f"{batch} x {length} x {width} keep {kept}"
    yield Case(
        op="take_tokens",
        name=name,
        phase="forward",
        runs={"ours": lambda: vlp_ops.take_tokens(x, ids), "gather": lambda: repeated(x, ids)},
        check=lambda: (
            {"ours": vlp_ops.take_tokens(x, ids), "gather": repeated(x, ids)},
            reference.take_tokens(x.double(), ids),
        ),
        gigabytes=2 * few.numel() * 4e-9,
    )
    yield Case(
        op="restore_tokens",
        name=name,
        phase="forward",
        runs={
            "ours": lambda: vlp_ops.restore_tokens(few, restore, token),
            "gather": lambda: restored(few, restore, token),
        },
        check=lambda: (
            {"ours": vlp_ops.restore_tokens(few, restore, token), "gather": restored(few, restore, token)},
            reference.restore_tokens(few.double(), restore, token.double()),
        ),
        gigabytes=(few.numel() + x.numel()) * 4e-9,
    )


def attention_cases() -> Iterator[Case]:
    query, key, value = torch.randn(3, 8, 12, 197, 64).unbind()
    mask = torch.arange(197) < torch.randint(60, 198, (8, 1))

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) / 8.0 + (1 - mask[:, None, None].to(q.dtype)) * -10000.0
        return logits.softmax(-1) @ v

    def best(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])

    functions = {
        "ours": lambda *t: vlp_ops.attention(*t, mask=mask),
        "explicit softmax": explicit,
        "SDPA": best,
    }
    yield Case(
        op="attention",
        name="8 x 12 x 197 x 64 padded",
        phase="forward",
        runs={name: lambda run=run: run(query, key, value) for name, run in functions.items()},
        check=lambda: (
            {name: run(query, key, value) for name, run in functions.items()},
            explicit(query.double(), key.double(), value.double()),
        ),
        gigaflops=4 * 8 * 12 * 197 * 197 * 64 * 1e-9,
    )


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "ms_deform_attn": deformable_cases,
    "embedding_bag": bag_cases,
    "product_key_topk": topk_cases,
    "take_tokens": token_cases,
    "attention": attention_cases,
}


# ---- the run ---------------------------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.detach().double() - exact).abs().max() / exact.abs().max()).item()


def ceilings(repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Copy in GB/s (read plus written) and float32 matrix product in GFLOP/s, in this run."""
    source = torch.randn(32 << 20)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 1024, 1024).unbind()
    best = measure({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}, repeat, clock)
    return {"copy": 2 * source.numel() * 4e-9 / best["copy"], "gemm": 2 * 1024**3 * 1e-9 / best["gemm"]}


def head(threads: int) -> list[str]:
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    processor = platform.processor() or platform.machine()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    info = vlp_ops.backend_info()
    kernels = "native" if info["cpu"]["native"] else f"PyTorch ({info['cpu']['reason']})"
    return [
        f"vlp_ops {vlp_ops.__version__} {revision or '(no revision)'}, torch {torch.__version__}, Python {platform.python_version()}",
        f"{names[0].split(':')[1].strip() if names else processor}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread(s)",
        f"CPU kernels: {kernels}; built: {info['built'].get('cpu', {})}",
    ]


def floors() -> dict[str, dict[str, float]]:
    """Least ratio of each case and peer."""
    return json.loads((Path(__file__).parent / "bench_targets.json").read_text())


def below(results: dict[str, dict[str, float]], targets: dict[str, dict[str, float]]) -> list[str]:
    """A line for each ratio that is below its floor."""
    failed = []
    for key, peers in targets.items():
        for peer, floor in peers.items():
            ratio = results.get(key, {}).get(peer)
            if ratio is not None and ratio < floor:
                failed.append(f"{key}: {ratio:.2f}x {peer}, floor {floor:g}x")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vlp_ops.bench", description="Time vlp_ops against its alternatives on the CPU."
    )
    names = [*CASES, *LOSSES]
    parser.add_argument(
        "--op", action="append", choices=names, help="only this operator (may be given more than once)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads (default 1: processor time; more: wall time)"
    )
    parser.add_argument(
        "--repeat", type=int, default=7, help="repetitions of which the fastest counts (default 7)"
    )
    parser.add_argument(
        "--losses", type=int, default=8192, metavar="N", help="batch of the losses (default 8192)"
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(arguments)
    wanted = options.op or names
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for line in head(options.threads):
        print(line)
    limits = ceilings(options.repeat, clock)
    print(
        f"ceilings of this run: copy {limits['copy']:.1f} GB/s, float32 product {limits['gemm']:.0f} GFLOP/s\n"
    )
    results: list[Result] = []

    def cases() -> Iterator[Case]:
        for name, make in CASES.items():
            if name in wanted:
                yield from make()
        if set(wanted) & set(LOSSES):
            yield from (case for case in loss_cases(options.losses) if case.op in wanted)

    for case in cases():
        result = Result(case.key, {})
        if case.check is not None:
            found, exact = case.check()
            result.errors = {name: relative_error(tensor, exact) for name, tensor in found.items()}
        result.seconds = measure(case.runs, options.repeat, clock)
        ours = result.seconds["ours"]
        if case.gigabytes:
            speed = case.gigabytes / ours
            result.of_ceiling = f"{speed:.1f} GB/s, {100 * speed / limits['copy']:.0f} % of copy"
        elif case.gigaflops:
            speed = case.gigaflops / ours
            result.of_ceiling = f"{speed:.0f} GFLOP/s, {100 * speed / limits['gemm']:.0f} % of product"
        results.append(result)
        print(f"{result.key}: ours {1e3 * ours:.2f} ms ({result.of_ceiling})")
        for peer, ratio in result.ratios.items():
            print(f"    {peer} {1e3 * result.seconds[peer]:.2f} ms: {ratio:.2f}x")
        if result.errors:
            print(
                "    error against float64: "
                + ", ".join(f"{name} {error:.1e}" for name, error in result.errors.items())
            )
    ratios = {result.key: result.ratios for result in results}
    if sys.platform == "linux":
        for key, found in memory_results(wanted, options.losses):
            ratios[key] = {peer: value / found["ours"] for peer, value in found.items() if peer != "ours"}
            print(f"{key}: ours {found['ours'] / 1e6:.0f} MB")
            for peer, ratio in ratios[key].items():
                print(f"    {peer} {found[peer] / 1e6:.0f} MB: {ratio:.1f}x")
    for name in wanted:
        values = [
            ratio for key, peers in ratios.items() if key.startswith(name + "/") for ratio in peers.values()
        ]
        if values:
            print(f"{name}: geometric mean {math.exp(sum(map(math.log, values)) / len(values)):.2f}x")
    failed = below(ratios, floors()) if options.threads == 1 else []
    for line in failed:
        print(f"BELOW ITS FLOOR {line}")
    if options.json:
        numbers = {result.key: {"seconds": result.seconds, "errors": result.errors} for result in results}
        record = {
            "head": head(options.threads),
            "ceilings": limits,
            "cases": numbers,
            "ratios": ratios,
            "below": failed,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
