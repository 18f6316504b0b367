"""Every task of X-VLM, or of ViCHA, on drawn images: what each stage's metric is before and after its
training.

    python benchmarks/chain.py [--method xvlm] [--short] [--runs DIR] [--only STAGE ...]

The commands are those of the documentation (`vlp-train RECIPE model.weights.model=RUN/export`). "Before" is
the same command with steps=1 and schedule.warmup_steps=1, so that its only update has learning rate 0.
`--short` trains a few steps everywhere, which shows that the chain holds, not that it learns. Started again
with the same folder, it goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Stage(NamedTuple):
    """One run of the chain."""

    name: str
    recipe: str
    start: str
    """Run that it starts from, with the folder of the model; "" for pre-training."""
    metric: str
    """Number of the test that the table shows; "" for a stage without a test of its own."""
    guess: float | None = None
    """What guessing gives in percent; see docs/xvlm-shapes.md and docs/vicha-shapes.md."""
    overrides: tuple[str, ...] = ()
    """Settings other than the recipe's, at full length."""


# The steps of the small pre-training recipes teach the encoders; the fusion layers, which all tasks build on,
# need the rest.
XVLM = (
    Stage("pretrain", "xvlm/shapes", "", "dual/r_mean", 2.7, ("steps=2000",)),
    Stage("retrieval", "xvlm/shapes_retrieval", "pretrain/export", "reranked/r_mean", 2.7),
    Stage("vqa", "xvlm/shapes_vqa", "pretrain/export", "accuracy", 16.5),
    Stage("nlvr_domain", "xvlm/shapes_nlvr_domain", "pretrain/export", ""),
    Stage("nlvr", "xvlm/shapes_nlvr", "nlvr_domain/export", "accuracy", 50.0),
    Stage("refcoco_weak", "xvlm/shapes_refcoco_weak", "pretrain/export", "accuracy", 17.3),
    Stage("boxes_domain", "xvlm/shapes_refcoco_boxes_domain", "pretrain/export", ""),
    Stage("refcoco_boxes", "xvlm/shapes_refcoco_boxes", "boxes_domain/export", "accuracy", 7.5),
    Stage("captioning_domain", "xvlm/shapes_captioning_domain", "pretrain/export", ""),
    Stage("captioning", "xvlm/shapes_captioning", "captioning_domain/export", "cider"),
    Stage("captioning_scst", "xvlm/shapes_captioning_scst", "captioning/export-best", "cider"),
)
VICHA = (
    Stage("pretrain", "vicha/shapes", "", "dual/r_mean", 2.7, ("steps=2000", "teacher.ramp_steps=2000")),
    Stage("retrieval", "vicha/shapes_retrieval", "pretrain/export", "reranked/r_mean", 2.7),
    Stage("vqa", "vicha/shapes_vqa", "pretrain/export", "accuracy", 16.5),
    Stage("entailment", "vicha/shapes_entailment", "pretrain/export", "accuracy", 33.3),
    Stage("nlvr_domain", "vicha/shapes_nlvr_domain", "pretrain/export", ""),
    Stage("nlvr", "vicha/shapes_nlvr", "nlvr_domain/export", "accuracy", 50.0),
    Stage("grounding", "vicha/shapes_grounding", "pretrain/export", "accuracy", 17.3),
)
CHAINS = {"xvlm": XVLM, "vicha": VICHA}


def train(stage: Stage, run: Path, runs: Path, *overrides: str) -> None:
    """Run `vlp-train`; a run that is complete already ends at once."""
    start = [f"model.weights.model={runs / stage.start}"] if stage.start else []
    subprocess.run(
        [sys.executable, "-m", "vlp_methods.cli", stage.recipe, "--run", str(run), *start, *overrides],
        check=True,
    )


def tested(stage: Stage, run: Path) -> float:
    """The stage's number: of the test of the selected model, or, for pre-training, of the last evaluation."""
    kind, prefix = ("test", "test/") if stage.start else ("step", "")
    reports = sorted((run / "eval").glob(f"{kind}-*.json"))
    if not reports:
        raise FileNotFoundError(f"{run}/eval holds no result of {stage.recipe}")
    return json.loads(reports[-1].read_text())[prefix + stage.metric]


def main() -> int:
    """Run the chain and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=list(CHAINS), default="xvlm")
    parser.add_argument("--short", action="store_true", help="a few steps of every stage")
    parser.add_argument("--runs", type=Path, default=Path("runs/chain"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of stages")
    options = parser.parse_args()
    stages = CHAINS[options.method]
    names = [stage.name for stage in stages]
    if unknown := [name for name in options.only or () if name not in names]:
        parser.error(f"--only {unknown[0]}: the stages are {', '.join(names)}")
    short = (
        "steps=4",
        "schedule.warmup_steps=1",
        "data.world.images=60",
        "data.world.val=8",
        "data.world.test=8",
    )
    lines = ["| stage | guess | before | after | seconds |", "| --- | --- | --- | --- | --- |"]
    for stage in stages:
        if stage.name not in (options.only or names):
            continue
        run = options.runs / stage.name
        overrides = short if options.short else stage.overrides
        began = time.monotonic()
        train(stage, run, options.runs, *overrides)
        seconds = time.monotonic() - began
        before = after = ""
        if stage.metric:
            after = f"{tested(stage, run):.1f}"
            if stage.start:
                first = options.runs / f"{stage.name}-before"
                train(stage, first, options.runs, *overrides, "steps=1", "schedule.warmup_steps=1")
                before = f"{tested(stage, first):.1f}"
        guess = "" if stage.guess is None else f"{stage.guess:.1f}"
        lines.append(
            f"| {stage.name} ({stage.metric or 'no test'}) | {guess} | {before} | {after} | {seconds:.0f} |"
        )
        print(lines[-1], flush=True)
    print("\n".join(["", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
