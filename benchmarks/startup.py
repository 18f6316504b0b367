"""How long commands take to start, held to the budgets of the project.

    python benchmarks/startup.py [--repeats 7] [--save]

`vlp-train ls`, `--version` and a user error within 0.15 s; importing vlp packages within the time of `import
torch` + 0.3 s. Each command is a new process, and they take turns. Exits with 1 when a budget is exceeded.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import machine, save, table

COMMAND_BUDGET, IMPORT_BUDGET = 0.15, 0.3
# Named by the user, not by us: the commands run as they do from a shell.
SCRIPTS = Path(sys.executable).parent

COMMANDS: dict[str, tuple[list[str], int]] = {
    "vlp-train ls": ([str(SCRIPTS / "vlp-train"), "ls"], 0),
    "vlp-train --version": ([str(SCRIPTS / "vlp-train"), "--version"], 0),
    "vlp-train, mistyped key": ([str(SCRIPTS / "vlp-train"), "xvlm/shapes", "stepps=3"], 2),
    "vlp-eval ls": ([str(SCRIPTS / "vlp-eval"), "ls"], 0),
    "vlp-eval, mistyped key": ([str(SCRIPTS / "vlp-eval"), "retrieval", "nowhere", "rerrank=3"], 2),
    "vlp-data --help": ([str(SCRIPTS / "vlp-data"), "--help"], 0),
}
BASE = "import torch"
IMPORTS = [
    "import vlp_core",
    "import vlp_ops",
    "import vlp_data.order",
    "from vlp_core import models",
    "import vlp_eval.retrieval",
]


def run(command: Sequence[str], expected: int) -> tuple[float, float]:
    """Seconds of a process by the clock and of the processor.

    Raises RuntimeError when it does not end as expected: a failure is quick, and no measurement.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}, not {expected}:\n{done.stderr}"
        )
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/startup.json")
    options = parser.parse_args()
    runs = {
        "python": ([sys.executable, "-c", "pass"], 0),
        **COMMANDS,
        **{line: ([sys.executable, "-c", line], 0) for line in (BASE, *IMPORTS)},
    }
    wall: dict[str, list[float]] = {name: [] for name in runs}
    work: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, (command, expected) in runs.items():
            seconds, processor = run(command, expected)
            if repeat:  # the first round fills the caches of bytecode and files
                wall[name].append(seconds)
                work[name].append(processor)
    # What a command needs: the wall time of its quickest run, or its processor time where the machine was
    # busy with other things.
    needs = {name: min(*wall[name], statistics.median(work[name])) for name in runs}
    limits = dict.fromkeys(COMMANDS, COMMAND_BUDGET) | dict.fromkeys(IMPORTS, needs[BASE] + IMPORT_BUDGET)
    rows = [["", "needs", "wall, median", "processor, median", "budget", ""]]
    exceeded = [name for name, limit in limits.items() if needs[name] > limit]
    for name in runs:
        cells = (needs[name], statistics.median(wall[name]), statistics.median(work[name]))
        limit = f"{limits[name]:.2f} s" if name in limits else ""
        rows.append(
            [name, *(f"{cell:.2f} s" for cell in cells), limit, "EXCEEDED" if name in exceeded else ""]
        )
    print(table(rows))
    print("\nall within budget" if not exceeded else f"\nover budget: {', '.join(exceeded)}")
    if options.save:
        results = {"seconds": needs, "budgets": limits, "over_budget": exceeded}
        print(f"{save('startup', results)} written on {machine()['cores']} cores")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
