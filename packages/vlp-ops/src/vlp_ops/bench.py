"""python -m vlp_ops.bench: ours against what one would use otherwise, in one process and run, on the GPU if
there is one, else on the CPU.

Every case first checks outputs and all gradients, of ours and of each peer: against the definition in float64
on a small problem, and against each other on the one that is timed. Then it times all of them. A ratio is
peer / ours. Floors are in bench_targets.json; the exit status is 1 when a result is wrong (`TOLERANCE`) or a
ratio is below its floor (on the CPU: in the run with one thread).

CPU: float32; minimum of several repetitions taken in turn; processor time with one thread (other work on the
machine then counts less), wall time with more. Peak memory of the losses in processes of their own.
GPU: bfloat16 (locations and scales float32); median of triton's do_bench, which clears the L2 cache before
each run; calls under 100 us also as replay of a CUDA graph, which leaves out the time of the host, over sets
of inputs that together are twice the L2 cache. Peak memory of every case.

    python -m vlp_ops.bench                     # everything
    python -m vlp_ops.bench --device cpu --op clip_loss --threads 4 --repeat 3 --json result.json
"""

import argparse
import itertools
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import vlp_ops
from vlp_ops.bench_cases import (
    CASES,
    LOSS_SIZES,
    LOSSES,
    Case,
    Run,
    in_float64,
    loss_functions,
    loss_inputs,
    prepare,
    results_of,
)
from vlp_ops.dense import product

# So long the turns of a case go on: seven of a few milliseconds can all fall into one busy moment of the
# machine.
LEAST_SECONDS = 4.0
WARM_BELOW = 0.5
# A call this short is timed without the host, too.
GRAPH_BELOW = 100e-6
# Largest error against the largest number of the exact result. Half types round inputs, products and results;
# PyTorch's own gradient of a bias is 0.06 away in bfloat16.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass
class Result:
    key: str
    seconds: dict[str, float] = field(default_factory=dict)
    graph_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    # Against the definition on the small problem; against the peer that is nearest (for a peer: against ours)
    # on the problem that is timed.
    errors: dict[str, float] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    # Share of the ceiling of this run, of copies or of matrix products.
    of_ceiling: float = math.nan
    speed: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        return ratios_of(self.seconds)


def ratios_of(found: dict[str, float] | dict[str, int]) -> dict[str, float]:
    return {peer: value / max(found["ours"], 1e-12) for peer, value in found.items() if peer != "ours"}


# ---- CPU ---------------------------------------------------------------------------------------------------


def measure(runs: dict[str, Run], repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Minimum time of each, taken in turn so that a busy moment of the machine meets all of them: `repeat`
    turns, and more of short ones.

    Short ones are called once more before the call that is timed. Otherwise a case of milliseconds pays for
    what the one before it did to the allocator (pages given back to the system) and the caches: 5 or 12 ms
    for the same gradient, by chance of the process.
    """
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, math.inf)
    began, turns = time.perf_counter(), 0
    while turns < repeat or (repeat > 1 and time.perf_counter() - began <= LEAST_SECONDS):
        for name, run in runs.items():
            if best[name] < WARM_BELOW:
                run()
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
        turns += 1
    return best


def peak_of(op: str, which: str, n: int, d: int) -> int:
    """Bytes beyond the inputs that forward and backward of a loss need at most, in this process."""
    function = LOSSES[op].get(which) or loss_functions(op, "cpu", {})[which]
    leaves = loss_inputs(n, d)
    prepare("forward+backward", function, loss_inputs(64, d))()

    def status(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {name}")

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    torch.autograd.grad(function(*leaves), leaves)
    return status("VmHWM") - before


def memory_results(ops: Sequence[str], rows: int | None = None) -> Iterator[tuple[str, dict[str, int]]]:
    """Peak memory of each implementation of a loss in a process of its own."""
    for op in (op for op in LOSSES if op in ops):
        for n, d in [(rows, 512)] if rows else LOSS_SIZES["cpu"]:
            found = {}
            for which in loss_functions(op, "cpu", {}):
                code = (
                    "import torch; torch.set_num_threads(1); from vlp_ops import bench; "
                    f"print(bench.peak_of({op!r}, {which!r}, {n}, {d}))"
                )
                done = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=True
                )
                found[which] = int(done.stdout)
            yield f"{op}/{n} x {d}/peak memory", found


# ---- GPU ---------------------------------------------------------------------------------------------------


def do_bench(run: Run) -> float:
    """Median time on the GPU in seconds, with a cold L2 cache."""
    from triton import testing

    return 1e-3 * cast(float, testing.do_bench(run, warmup=50, rep=300, return_mode="median"))


def graph_time(runs: Sequence[Run], stream: torch.cuda.Stream) -> float:
    """Seconds of one of the runs, out of a CUDA graph that holds all of them: no host, and inputs that are
    not in the cache."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    return do_bench(graph.replay) / len(runs)


def sets_of_inputs(gigabytes: float, cache_bytes: int) -> int:
    """How many sets of inputs are together twice the cache; at most 64, for a case so small that it lives in
    the cache anyway."""
    return min(64, 1 + math.ceil(2 * cache_bytes * 1e-9 / max(gigabytes, 1e-6)))


def peak_on_gpu(run: Run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_on_gpu(
    case: Case,
    sets: Sequence[dict[str, Run]],
    result: Result,
    notes: dict[str, str],
    stream: torch.cuda.Stream,
) -> None:
    """Fills in times and peak memory. A peer that cannot be captured has no graph time; ours has to be
    captured."""
    for name in list(sets[0]):
        runs = [runs[name] for runs in sets]
        turn = itertools.cycle(runs)
        result.seconds[name] = do_bench(lambda turn=turn: next(turn)())
        result.peak_bytes[name] = peak_on_gpu(runs[0])
    if result.seconds["ours"] > GRAPH_BELOW:
        return
    for name in result.seconds:
        try:
            result.graph_seconds[name] = graph_time([runs[name] for runs in sets], stream)
        except RuntimeError as error:
            if name == "ours":
                raise
            notes[f"{name}, {case.key}, in a CUDA graph"] = (
                f"cannot be captured: {str(error).splitlines()[0]}"
            )


# ---- the run -----------------------------------------------------------------------------------------------


def relative_error(found: Tensor, exact: Tensor, undecided: float = 0.0) -> float:
    """Largest error against the largest exact number, without the share of numbers that may differ.

    Infinite for another shape, and for what is not finite where the exact number is."""
    if found.shape != exact.shape:
        return math.inf
    errors = (found.detach().double() - exact.detach().double()).abs().flatten()
    if not errors.numel():
        return 0.0
    left_out = int(undecided * errors.numel())
    largest = errors.nan_to_num(nan=math.inf).topk(left_out + 1).values[-1].item()
    return largest / max(exact.detach().double().abs().max().item(), 1e-300)


def worst_error(found: Sequence[Tensor], exact: Sequence[Tensor], undecided: float = 0.0) -> float:
    """Of the output and of each gradient that both have."""
    return max(relative_error(ours, want, undecided) for ours, want in zip(found, exact, strict=False))


def runs_of(
    case: Case, args: tuple[Any, ...], notes: dict[str, str], skip: Sequence[str] = ()
) -> dict[str, Run]:
    """What is timed of each implementation, called once; a peer that fails is left out and noted."""
    runs = {}
    for name, function in case.functions.items():
        if name in skip:
            continue
        try:
            run = prepare(case.phase, function, args)
            run()
        # A peer is foreign code: whatever is wrong with it, the others are still measured.
        except Exception as error:
            if name == "ours":
                raise
            notes[f"{name}, {case.key}"] = f"failed: {(str(error).splitlines() or [repr(error)])[0]}"
        else:
            runs[name] = run
    return runs


def errors_of(case: Case, names: Sequence[str]) -> dict[str, float]:
    """Against the definition in float64, on the small problem."""
    args = case.small()
    exact = results_of(case.phase, case.definition, in_float64(args))
    return {
        name: worst_error(results_of(case.phase, case.functions[name], args), exact, case.undecided)
        for name in names
    }


def differences_of(case: Case, names: Sequence[str], args: tuple[Any, ...]) -> dict[str, float]:
    """Of each peer from ours, on the problem that is timed; for ours, from the nearest peer."""
    ours = results_of(case.phase, case.functions["ours"], args)
    found = {
        name: worst_error(results_of(case.phase, case.functions[name], args), ours, case.undecided)
        for name in names
        if name != "ours"
    }
    return {"ours": min(found.values()), **found} if found else {}


def wrong_of(case: Case, result: Result, dtype: torch.dtype) -> list[str]:
    """A line for each result that is wrong."""
    if not case.same_in_half and dtype in (torch.bfloat16, torch.float16):
        return []
    limit = TOLERANCE[dtype]
    kinds = (("small problem, against float64", result.errors), ("timed problem", result.differences))
    return [
        f"{case.key}: {name}, {kind}: error {error:.1e} > {limit:.0e}"
        for kind, errors in kinds
        for name, error in errors.items()
        # A NaN is no small error.
        if not error <= limit
    ]


def ceilings(device: str, repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Copy in GB/s (read plus written) and matrix product in GFLOP/s, in this run; on a GPU 8192^3 in
    bfloat16."""
    size, edge = (32 << 20, 1024) if device == "cpu" else (256 << 20, 8192)
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, edge, edge, device=device, dtype=DTYPES[device]).unbind()
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
    if device == "cpu":
        runs["gemm"] = lambda: product(a, b)
        best = measure(runs, repeat, clock)
    else:
        best = {name: do_bench(run) for name, run in runs.items()}
    return {"copy": 2 * size * 4e-9 / best["copy"], "gemm": 2 * edge**3 * 1e-9 / best["gemm"]}


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def head(device: str, threads: int) -> list[str]:
    revision = output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    info = vlp_ops.backend_info()
    native, reason = info[device]["native"], info[device]["reason"]
    lines = [
        (
            f"vlp_ops {vlp_ops.__version__} {revision or '(no revision)'}, torch {torch.__version__}, "
            f"Python {platform.python_version()}"
        )
    ]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        lines += [
            (
                f"{properties.name}, {properties.total_memory >> 30} GiB, "
                f"L2 {properties.L2_cache_size >> 20} MiB, CUDA {torch.version.cuda}"
            ),
            "driver, clocks (SM, memory, highest SM): "
            + output_of(
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm",
                "--format=csv,noheader",
            ),
        ]
    else:
        information = Path("/proc/cpuinfo")
        text = information.read_text() if information.is_file() else ""
        names = [line for line in text.splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
        lines.append(f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread(s)")
    kernels = "native" if native else f"PyTorch ({reason})"
    return [*lines, f"{device} kernels: {kernels}; built: {info['built'].get(device, {})}"]


def floors(device: str) -> dict[str, dict[str, float]]:
    """Least ratio of each case and peer; "ceiling" is the least share of the ceiling."""
    return json.loads((Path(__file__).parent / "bench_targets.json").read_text())[device]


def below(results: dict[str, dict[str, float]], targets: dict[str, dict[str, float]]) -> list[str]:
    """A line for each ratio that is below its floor."""
    failed = []
    for key, peers in targets.items():
        for peer, floor in peers.items():
            ratio = results.get(key, {}).get(peer)
            if ratio is not None and ratio < floor:
                failed.append(f"{key}: {ratio:.2f}x {peer}, floor {floor:g}x")
    return failed


def means(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Geometric mean of the ratios of each operator and phase to each peer, over the cases in which the peer
    was measured."""
    logarithms: dict[str, dict[str, list[float]]] = {}
    for result in results:
        key = f"{result.key.split('/')[0]}/geometric mean/{result.key.rpartition('/')[2]}"
        for peer, ratio in result.ratios.items():
            logarithms.setdefault(key, {}).setdefault(peer, []).append(math.log(ratio))
    return {
        key: {peer: math.exp(sum(values) / len(values)) for peer, values in peers.items()}
        for key, peers in logarithms.items()
    }


def show(result: Result, device: str) -> None:
    unit, factor = ("us", 1e6) if device == "cuda" else ("ms", 1e3)
    print(f"{result.key}: ours {factor * result.seconds['ours']:.2f} {unit} ({result.speed})")
    for peer, ratio in result.ratios.items():
        print(f"    {peer} {factor * result.seconds[peer]:.2f} {unit}: {ratio:.2f}x")
    if result.graph_seconds:
        ratios = ratios_of(result.graph_seconds)
        print(
            f"    in a CUDA graph: ours {factor * result.graph_seconds['ours']:.2f} {unit}"
            + "".join(f"; {peer} {ratio:.2f}x" for peer, ratio in ratios.items())
        )
    if result.peak_bytes:
        print("    peak memory: " + ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in result.peak_bytes.items()))
    print("    error against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in result.errors.items()))
    print("    difference as timed: " + ", ".join(f"{k} {v:.1e}" for k, v in result.differences.items()))
    for line in result.wrong:
        print(f"    WRONG RESULT {line}")


def run_case(
    case: Case, options: argparse.Namespace, limits: dict[str, float], notes: dict[str, str]
) -> Result:
    result = Result(case.key)
    args = case.inputs()
    runs = runs_of(case, args, notes)
    result.errors = errors_of(case, list(runs))
    result.differences = differences_of(case, list(runs), args)
    result.wrong = wrong_of(case, result, DTYPES[options.device])
    if options.device == "cpu":
        clock = time.process_time if options.threads == 1 else time.perf_counter
        result.seconds = measure(runs, options.repeat, clock)
    else:
        cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        missing = [name for name in case.functions if name not in runs]
        more = sets_of_inputs(case.gigabytes or 1.0, cache_bytes) - 1
        sets = [runs, *(runs_of(case, case.inputs(), notes, missing) for _ in range(more))]
        measure_on_gpu(case, sets, result, notes, torch.cuda.current_stream())
    # Without the time of the host where that is known: the ceiling is one of the device.
    ours = min(result.seconds["ours"], result.graph_seconds.get("ours", math.inf))
    amount, limit, unit, what = (
        (case.gigabytes, limits["copy"], "GB/s", "copy")
        if case.gigabytes
        else (case.gigaflops, limits["gemm"], "GFLOP/s", "product")
    )
    result.of_ceiling = amount / ours / limit
    result.speed = f"{amount / ours:.1f} {unit}, {100 * result.of_ceiling:.0f} % of {what}"
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vlp_ops.bench", description="Time vlp_ops against its alternatives."
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where torch finds a GPU",
    )
    parser.add_argument(
        "--op", action="append", choices=list(CASES), help="only this operator (may be given more than once)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU: threads (default 1: processor time; more: wall time)"
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=7,
        help=(
            "CPU: turns at least, of which the fastest counts (default 7); short ones go on for 4 s, "
            "unless it is 1"
        ),
    )
    parser.add_argument(
        "--losses", type=int, metavar="N", help="rows of the losses, instead of the usual ones"
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return options


def run_all(options: argparse.Namespace) -> int:
    wanted = options.op or list(CASES)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    about = head(options.device, options.threads)
    print(*about, sep="\n")
    clock = time.process_time if options.threads == 1 else time.perf_counter
    limits = ceilings(options.device, options.repeat, clock)
    product = "float32" if options.device == "cpu" else "bfloat16"
    print(
        f"ceilings of this run: copy {limits['copy']:.1f} GB/s, "
        f"{product} product {limits['gemm']:.0f} GFLOP/s\n"
    )
    notes: dict[str, str] = {}
    results: list[Result] = []
    for op in wanted:
        make = partial(CASES[op], rows=options.losses) if op in LOSSES else CASES[op]
        for case in make(options.device, DTYPES[options.device], notes):
            results.append(run_case(case, options, limits, notes))
            show(results[-1], options.device)
    ratios = {result.key: result.ratios for result in results}
    if options.device == "cuda":
        for result in results:
            key = f"{result.key.rpartition('/')[0]}/peak memory {result.key.rpartition('/')[2]}"
            ratios[key] = ratios_of(result.peak_bytes)
    elif sys.platform == "linux":
        for key, found in memory_results(wanted, options.losses):
            ratios[key] = ratios_of(found)
            print(f"{key}: ours {found['ours'] / 1e6:.0f} MB")
            for peer, ratio in ratios[key].items():
                print(f"    {peer} {found[peer] / 1e6:.0f} MB: {ratio:.1f}x")
    for key, peers in means(results).items():
        ratios[key] = peers
        print(f"{key}: " + ", ".join(f"{peer} {ratio:.2f}x" for peer, ratio in peers.items()))
    for what, why in notes.items():
        print(f"{what}: {why}: not measured")
    judged = {key: dict(found) for key, found in ratios.items()}
    for result in results:
        judged[result.key]["ceiling"] = result.of_ceiling
    # The floors of the CPU are for one thread.
    counts = options.device == "cuda" or options.threads == 1
    failed = below(judged, floors(options.device)) if counts else []
    wrong = [line for result in results for line in result.wrong]
    for line in wrong:
        print(f"WRONG RESULT {line}")
    for line in failed:
        print(f"BELOW ITS FLOOR {line}")
    if options.json:
        cases = {
            result.key: {
                "seconds": result.seconds,
                "graph_seconds": result.graph_seconds,
                "peak_bytes": result.peak_bytes,
                "errors": result.errors,
                "differences": result.differences,
                "of_ceiling": result.of_ceiling,
            }
            for result in results
        }
        record = {"head": about, "ceilings": limits, "cases": cases, "ratios": ratios, "not measured": notes}
        options.json.write_text(json.dumps(record | {"below": failed, "wrong": wrong}, indent=1) + "\n")
    return 1 if failed or wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cpu":
        return run_all(options)
    # Not the default stream: a graph can only be captured on another, and a backward pass runs where its
    # forward pass ran.
    with torch.cuda.stream(torch.cuda.Stream()):
        return run_all(options)


if __name__ == "__main__":
    sys.exit(main())
