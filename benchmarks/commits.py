"""Training steps of this checkout against those of another commit, in one run.

    python benchmarks/commits.py OTHER_PYTHON [--repeats 5] [--steps 4]

OTHER_PYTHON is the interpreter of an environment that holds the packages of the other commit; `nox -s compare
-- COMMIT` makes one. Both build the same recipes, each in a process of its own, and take turns: a turn is a
few whole steps (forward, backward, update) on batches made before. Measured is processor time with one
thread, so that other work of the machine counts little. Exits with 1 when the median of the ratios of
neighbouring turns, other / this, is below 0.97 for a recipe.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import machine, ratio, spread, table

FLOOR = 0.97

WORLD = "data.world={images: 200, seed: 0, size: 64, val: 8, test: 8, difficulty: easy}"
RECIPES = {
    "X-VLM, small ViT": ["xvlm/shapes"],
    "X-VLM, Swin": [
        "xvlm/shapes",
        (
            "model.vision={kind: swin, image_size: 64, window: 2, width: 32, depths: [1, 1, 2, 1], "
            "heads: [1, 2, 4, 8]}"
        ),
        "data.view.size=64",
        WORLD,
    ],
    "ViCHA": ["vicha/shapes"],
}

WORKER = """
import json, sys, time
import torch
from vlp_methods.engine import entry
name, *overrides = json.loads(sys.argv[1])
recipe = entry.load(name, [*overrides, "workers=0"])
torch.manual_seed(0)
job = entry.attribute(recipe.entry.build)(recipe.settings)
batches = [next(iter(stream)) for stream in job.streams().values()]
job.task.train()

def step(batch):
    job.optimizer.zero_grad(set_to_none=True)
    if hasattr(job.task, "before_forward"):
        job.task.before_forward(0)
    sum(job.task(batch).values()).backward()
    job.optimizer.step()

print("ready", flush=True)
for line in sys.stdin:
    began = time.process_time()
    for _ in range(int(line)):
        for batch in batches:
            step(batch)
    print(time.process_time() - began, flush=True)
"""


class Side:
    """One commit, building a recipe and running steps of it when asked."""

    def __init__(self, python: str, recipe: list[str]) -> None:
        self.process = subprocess.Popen(
            [python, "-c", WORKER, json.dumps(recipe)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ready(self) -> None:
        """Wait until the recipe is built."""
        line = self._line()
        while line != "ready":  # what the builder logs
            line = self._line()

    def seconds(self, steps: int) -> float:
        """Processor seconds of so many steps on every batch."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with exit code {self.process.wait()}; its messages are above")
        return line.strip()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(other: str, recipe: list[str], repeats: int, steps: int) -> dict[str, list[float]]:
    """Seconds of the turns of both sides."""
    sides = {"other": Side(other, recipe), "this": Side(sys.executable, recipe)}
    try:
        for side in sides.values():
            side.ready()
            side.seconds(1)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, side in sides.items():
                seconds[name].append(side.seconds(steps))
        return seconds
    finally:
        for side in sides.values():
            side.close()


def main() -> int:
    """Measure every recipe and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("other", type=Path, help="interpreter of the other commit's environment")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    options = parser.parse_args()
    rows, slow = [["", "other", "this", "other / this"]], []
    for name, recipe in RECIPES.items():
        found = measure(str(options.other), recipe, options.repeats, options.steps)
        value = ratio(found["other"], found["this"])
        rows.append([name, spread(found["other"]), spread(found["this"]), f"{value:.3f}"])
        if value < FLOOR:
            slow.append(name)
    print(f"{options.steps} training steps, one thread, processor time; {machine()['processor']}\n")
    print(table(rows))
    print(f"\nat least {FLOOR}: " + (f"NO: {', '.join(slow)}" if slow else "yes"))
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
