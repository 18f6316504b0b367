"""What each addition of ViCHA to ALBEF brings on drawn images: the small model, without each of the three,
and without all.

    python benchmarks/ablation.py [--short] [--runs DIR] [--only VARIANT]... [key=value ...]

Every variant is `vlp-train vicha/shapes steps=1000 teacher.ramp_steps=1000` with the same seed and data;
further words go to all of them. The numbers are those of the retrieval test among unseen scenes. One run
each: differences of a few points are within what another seed gives. `--short` trains a few steps, which
    shows that every variant runs. Started again with the same folder, it goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

CONCEPTS = ("model.concepts=null", "data.concepts=null")
HIERARCHY = ("model.hierarchy=null",)
MASKED_IMAGE = ("model.masked_image=null",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "without concepts": CONCEPTS,
    "without hierarchy": HIERARCHY,
    "without masked images": MASKED_IMAGE,
    "without all three (ALBEF)": (*CONCEPTS, *HIERARCHY, *MASKED_IMAGE),
}
# Long enough for the fusion layers to begin, which the recipe's steps are not.
LONG = ("steps=1000", "teacher.ramp_steps=1000")
SHORT = (
    "steps=3",
    "schedule.warmup_steps=1",
    "data.world.images=60",
    "data.world.val=8",
    "data.world.test=8",
)
SHOWN = {
    "dual/tr_r1": "TR@1",
    "dual/ir_r1": "IR@1",
    "dual/r_mean": "r_mean",
    "reranked/tr_r1": "TR@1 re-ranked",
    "reranked/ir_r1": "IR@1 re-ranked",
    "reranked/r_mean": "r_mean re-ranked",
}


def train(name: str, runs: Path, words: tuple[str, ...]) -> Path:
    """Run `vlp-train`; a run that is complete already ends at once. Returns its folder."""
    run = runs / name.partition(" (")[0].replace(" ", "-")
    command = [sys.executable, "-m", "vlp_methods.cli", "vicha/shapes", "--run", str(run)]
    subprocess.run([*command, *VARIANTS[name], *words], check=True)
    return run


def main() -> int:
    """Train the variants and print their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few steps of every variant")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="may be repeated")
    parser.add_argument("words", nargs="*", metavar="key=value", help="for all variants")
    options = parser.parse_intermixed_args()
    words = (*(SHORT if options.short else LONG), *options.words)
    lines = [f"| variant | {' | '.join(SHOWN.values())} | seconds |", f"| --- |{' --- |' * (len(SHOWN) + 1)}"]
    for name in options.only or VARIANTS:
        began = time.monotonic()
        run = train(name, options.runs, words)
        seconds = time.monotonic() - began
        reports = sorted((run / "eval").glob("step-*.json"))
        if not reports:
            raise FileNotFoundError(f"{run}/eval holds no result")
        numbers = json.loads(reports[-1].read_text())
        shown = " | ".join(f"{numbers[key]:.1f}" for key in SHOWN)
        lines.append(f"| {name} | {shown} | {seconds:.0f} |")
    print("\n".join(["", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
