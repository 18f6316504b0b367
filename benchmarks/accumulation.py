"""X-VLM pre-training with four times the batch in four parts (`parts` of a recipe) against the batch in one:
peak of what tensors hold, and time per pair.

    python benchmarks/accumulation.py [--size quarter] [--times 4] [--repeats 3] [--cpu-time] [--save]

The peak is counted as in `vicha_step.py`: the most bytes that tensors of a step hold at a time beyond what
stood before it (parameters, optimizer, batch), in a process of its own for each row. Exits with 1 when four
times the batch takes more than 1.15 times the memory.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import interleaved, machine, median, ratio, save, spread, table
from pretrain_step import SIZES, arguments, batch_of, image_batch, region_batch
from torch.profiler import ProfilerActivity, profile
from vlp_core import models
from vlp_methods.engine.gradients import InOne, InParts
from vlp_methods.engine.wrap import Alone
from vlp_methods.xvlm.pretrain import PretrainTask

MOST = 1.15
BATCHES = {"images": image_batch, "regions": region_batch}


def make(size: str, kind: str, times: int, parts: int) -> Callable[[], None]:
    """An update of `times` the batch in `parts` parts."""
    torch.manual_seed(0)
    task = PretrainTask(models.create("xvlm", "pretrain", **arguments(size))).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-5, fused=True)
    SIZES["larger"] = {**SIZES[size], "batch": times * int(SIZES[size]["batch"])}
    batch = batch_of(BATCHES[kind]("larger", torch.Generator().manual_seed(1)))
    how: Any = {
        "device": torch.device("cpu"),
        "autocast": partial(torch.autocast, "cpu", enabled=False),
        "scale": lambda loss: loss,
    }
    module = Alone(task)
    gradients = InOne(module, **how) if parts == 1 else InParts(module, parts, **how)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients(batch, count=1, last=True, unused=(), seed=0)
        optimizer.step()

    return step


def peak(step: Callable[[], None]) -> int:
    """The most bytes that tensors hold at a time in a step, beyond what stood before it."""
    step()  # makes the state of the optimizer
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure_peak(size: str, kind: str, times: int, parts: int) -> int:
    words = [sys.executable, __file__, "--size", size, "--peak", kind, str(times), str(parts)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="quarter")
    parser.add_argument("--times", type=int, default=4, help="how many times the batch, and parts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/accumulation.json")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, for a busy machine")
    parser.add_argument(
        "--peak", nargs=3, metavar=("KIND", "TIMES", "PARTS"), help="print the peak of one row and stop"
    )
    options = parser.parse_args()
    if options.peak:
        kind, times, parts = options.peak
        print(peak(make(options.size, kind, int(times), int(parts))))
        return 0
    clock = time.process_time if options.cpu_time else time.perf_counter
    count, more = int(SIZES[options.size]["batch"]), options.times
    rows = [["batch", "pairs", "parts", "peak", "of one batch", "step", "time per pair"]]
    results: dict[str, Any] = {}
    good = True
    for kind in BATCHES:
        forms = {"one batch": (1, 1), f"{more} x in one": (more, 1), f"{more} x in parts": (more, more)}
        memory = {name: measure_peak(options.size, kind, *form) for name, form in forms.items()}
        timed = {name: make(options.size, kind, *form) for name, form in forms.items() if form != (more, 1)}
        seconds = interleaved(timed, repeats=options.repeats, clock=clock)
        first, last = seconds["one batch"], seconds[f"{more} x in parts"]
        for name, (times, parts) in forms.items():
            share = memory[name] / memory["one batch"]
            slower = f"{ratio(seconds[name], first) / times:.2f}" if name in seconds else ""
            step = spread(seconds[name]) if name in seconds else "not timed"
            row = [kind, str(times * count), str(parts), f"{memory[name] / 1e6:.0f} MB", f"{share:.2f}"]
            rows.append([*row, step, slower])
        share = memory[f"{more} x in parts"] / memory["one batch"]
        good &= share <= MOST
        results[kind] = {
            "memory": memory,
            "share": share,
            "seconds": {name: median(values) for name, values in seconds.items()},
            "time_per_pair": ratio(last, first) / more,
        }
    print(f"X-VLM pre-training, size {options.size}, CPU, fp32, {machine()['threads']} threads\n")
    print(table(rows))
    print(f"\n{more} x the batch in at most {MOST} x the memory of one: {'yes' if good else 'NO'}")
    if options.save:
        print(f"{save('accumulation', {'size': options.size, 'pairs': count, **results})} written")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
