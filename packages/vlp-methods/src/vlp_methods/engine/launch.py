"""Start the ranks of a run on this machine, or write the SLURM script that starts them on several. Imports no
torch.

Ranks are plain child processes, not torchrun's: torchrun kills its workers 30 s after a SIGTERM, which may be
shorter than a save, and reports a worker's exit code 75 as a failure.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

RENDEZVOUS = "VLP_RENDEZVOUS"
"""Environment variable: where ranks on one machine meet (a file:// URL, so no port can be taken by someone
else)."""
PARENT = "VLP_PARENT"
"""Environment variable: process id of the launcher, watched by its ranks."""
STOPPED = 75
"""Exit code of a run that was asked to stop and has saved (EX_TEMPFAIL: run it again)."""
GRACE = 10.0
"""Seconds that ranks get to end by themselves after one has failed; they may wait for it in a collective
forever."""


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spawn(ranks: int, arguments: Sequence[str]) -> int:
    """Run `vlp-train *arguments` as `ranks` processes on this machine; returns the exit code of the first
    that failed, else 0 or 75.

    SIGTERM, SIGUSR1 and Ctrl-C are passed on to all ranks.
    """
    with tempfile.TemporaryDirectory(prefix="vlp-train-") as folder:
        common = {
            **os.environ,
            RENDEZVOUS: f"file://{folder}/rendezvous",
            PARENT: str(os.getpid()),
            "WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // ranks))),
        }
        children: list[subprocess.Popen[bytes]] = []

        def forward(number: int, _: object) -> None:
            for child in children:
                child.send_signal(number)

        before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        try:
            for rank in range(ranks):
                child = subprocess.Popen(
                    # -P: files of the working folder hide no module
                    [sys.executable, "-P", "-m", "vlp_methods.cli", *arguments],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,  # Ctrl-C reaches the ranks once, through `forward`
                )
                children.append(child)
            return _wait(children)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
            for number, handler in before.items():
                signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    failed: int | None = None
    deadline = float("inf")
    while running := [child for child in children if child.poll() is None]:
        if failed is None:
            failed = next((c.returncode for c in children if c.returncode not in (None, 0, STOPPED)), None)
            if failed is not None:
                deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for child in running:
                child.kill()
        time.sleep(0.02)
    codes = [child.returncode for child in children]
    if failed is None:
        failed = next((code for code in codes if code not in (0, STOPPED)), None)
    if failed is not None:
        return failed if failed > 0 else 128 - failed  # killed by a signal: the shell's code for it
    return max(codes)


def sbatch(arguments: Sequence[str], *, nodes: int, ranks: int, name: str, run: str) -> str:
    """A SLURM script that runs `vlp-train *arguments` on `nodes` nodes with `ranks` ranks each and requeues
    itself after a stop.

    SLURM sends SIGUSR1 to every rank three minutes before the time limit; they save and exit 75, and the
    script asks for the next turn.
    """
    command = shlex.join(["vlp-train", *arguments, "--run", run])
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={ranks}
#SBATCH --gpus-per-node={ranks}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180

# Written by `vlp-train --sbatch`. Change the lines above to your cluster; another number of nodes needs no
# other change. The batch in the recipe is that of all ranks of all nodes.
# The run folder must be on a file system that all nodes see.

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

srun bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank \\
    {command}
code=$?
if [ "$code" -eq {STOPPED} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def write_sbatch(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
