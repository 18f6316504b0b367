"""An X-VLM pre-training step of vlp against the plain formulation (`plain_xvlm.py`): same weights, same
samples, CPU, fp32.

    python benchmarks/pretrain_step.py [--size quarter] [--repeats 5] [--cpu-time] [--save]

First checks that all formulations give the same losses and gradients for the same negatives, then measures
whole steps (forward, backward, clipping, AdamW) in turns. The yardstick is the plain formulation with its
language head over all positions; texts are padded to 40 tokens, as the reference's loader pads. Exits with 1
when vlp on the very same tensors is less than 1.5 times as fast with a batch of images, with one of regions,
or over both. Two more rows tell what the head at masked positions only is worth to the plain formulation, and
what vlp gains by texts padded to the longest.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from common import interleaved, machine, median, ratio, save, spread, table
from plain_text import PlainAdamW
from plain_xvlm import PlainXvlm
from torch import Tensor
from vlp_core import models
from vlp_core.losses.matching import Negatives
from vlp_core.models.xvlm.checkpoints import xvlm_adapter
from vlp_core.optim import AdamW, ParameterRule, parameter_groups
from vlp_data.batch import ImageTextBatch, RegionBatch
from vlp_methods.xvlm.pretrain import PretrainTask

TARGET = 1.5

# Images, texts and layers of the published model, and the same with a half or a quarter of every width; the
# model of the recipe xvlm/shapes; and something tiny, for a look at the script itself.
SIZES = {
    "base": {
        "swin": (224, 7, 128, [2, 2, 18, 2], [4, 8, 16, 32]),
        "text": (768, 12, 12, 3072, 30522),
        "batch": 4,
    },
    "half": {
        "swin": (224, 7, 64, [2, 2, 18, 2], [2, 4, 8, 16]),
        "text": (384, 12, 6, 1536, 30522),
        "batch": 8,
    },
    "quarter": {
        "swin": (224, 7, 32, [2, 2, 18, 2], [1, 2, 4, 8]),
        "text": (192, 12, 3, 768, 30522),
        "batch": 16,
    },
    "shapes": {"swin": (96, 6, 32, [1, 1, 2, 1], [1, 2, 4, 8]), "text": (128, 4, 4, 256, 500), "batch": 64},
    "tiny": {"swin": (64, 2, 8, [1, 1, 2, 1], [1, 2, 4, 8]), "text": (32, 4, 2, 64, 200), "batch": 8},
}
TOKENS, MASKS = 40, 8

PLAIN, PLAIN_AT_MASKS = "plain", "plain, language head at masked positions only"
VLP, VLP_LONGEST = "vlp, same tensors", "vlp, texts padded to the longest"


def arguments(size: str) -> dict:
    image_size, window, width, depths, heads = SIZES[size]["swin"]
    text_width, layers, text_heads, hidden, vocabulary = SIZES[size]["text"]
    return {
        "vision": {
            "kind": "swin",
            "image_size": image_size,
            "window": window,
            "width": width,
            "depths": depths,
            "heads": heads,
            "drop_path": 0.0,
        },
        "text": {
            "kind": "bert",
            "vocabulary": vocabulary,
            "width": text_width,
            "layers": layers,
            "heads": text_heads,
            "hidden": hidden,
            "fusion_layer": layers // 2,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    }


def texts(is_caption: Tensor, vocabulary: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Texts of as many tokens as those of COCO (captions, 6 to 20) and of regions (3 to 9), padded to 40, a
    quarter of the tokens masked."""
    count = len(is_caption)
    captions = torch.randint(6, 21, (count,), generator=rng)
    length = torch.where(is_caption.bool(), captions, torch.randint(3, 10, (count,), generator=rng))
    mask = (torch.arange(TOKENS)[None] < length[:, None]).long()
    ids = torch.randint(5, vocabulary, (count, TOKENS), generator=rng) * mask
    positions, labels = torch.zeros(count, MASKS, dtype=torch.long), torch.full((count, MASKS), -100)
    masked = ids.clone()
    for row, tokens in enumerate(length.tolist()):
        chosen = 1 + torch.randperm(tokens - 1, generator=rng)[: min(MASKS, round(tokens / 4))]
        positions[row, : len(chosen)], labels[row, : len(chosen)] = chosen, ids[row, chosen]
        masked[row, chosen] = 4
    return {
        "text_ids": ids,
        "attention_mask": mask,
        "masked_ids": masked,
        "masked_positions": positions,
        "masked_labels": labels,
    }


def image_batch(size: str, rng: torch.Generator) -> dict[str, Tensor]:
    side, count = SIZES[size]["swin"][0], SIZES[size]["batch"]
    return {
        "image": torch.randn(count, 3, side, side, generator=rng),
        **texts(torch.ones(count), SIZES[size]["text"][4], rng),
    }


def region_batch(size: str, rng: torch.Generator) -> dict[str, Tensor]:
    """Texts and images in the proportion of the published recipe: 128 texts on at most 48 images."""
    side, count = SIZES[size]["swin"][0], SIZES[size]["batch"]
    images = max(2, round(count * 48 / 128))
    patches = (side // 32) ** 2
    boxes = torch.rand(count, 2, generator=rng) * 0.4 + 0.3
    mask = torch.cat(
        [torch.ones(count, 2), (torch.rand(count, patches - 1, generator=rng) < 0.4).float()], dim=1
    )
    is_image = (torch.arange(count) % 4 == 0).long()
    mask[is_image.bool()] = 1
    return {
        "image": torch.randn(images, 3, side, side, generator=rng),
        **texts(is_image, SIZES[size]["text"][4], rng),
        "image_index": torch.arange(count) % images,
        "image_attention_mask": mask.long(),
        "target_boxes": torch.cat([boxes, torch.full((count, 2), 0.4)], dim=1),
        "is_image": is_image,
    }


def step(
    losses: Callable[[], dict[str, Tensor]], parameters: list[Tensor], optimizer: AdamW | PlainAdamW
) -> None:
    for parameter in parameters:
        parameter.grad = None
    sum(losses().values()).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def check_equal(
    task: PretrainTask, plain: PlainXvlm, ours_batch: dict[str, Tensor], batch: dict[str, Tensor]
) -> None:
    """Losses and gradients of both for the same negatives; raises when they differ."""
    count = len(batch["text_ids"])
    shifted = [(row + 1) % count for row in range(count)]
    with mock.patch.object(
        task.model, "draw_negatives", lambda *_: Negatives(*(torch.tensor(shifted) for _ in range(2)))
    ):
        ours = task(batch_of(ours_batch))
    theirs = plain.losses(**batch, negatives=(shifted, shifted))
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    named = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    for name, gradient in xvlm_adapter(task.model).to_source(named, gradients=True).items():
        other = plain.p[name].grad
        norm = torch.zeros(()) if other is None else other.norm()
        torch.testing.assert_close(
            gradient.norm(), norm, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for parameter in [*task.parameters(), *plain.p.values()]:
        parameter.grad = None


def batch_of(batch: dict[str, Tensor]) -> ImageTextBatch | RegionBatch:
    keys = tuple(str(row) for row in range(len(batch["text_ids"])))
    return RegionBatch(**batch, keys=keys) if "image_index" in batch else ImageTextBatch(**batch, keys=keys)


def trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with texts padded to the longest of them, as `vlp_data` does with `pad: longest`."""
    longest = int(batch["attention_mask"].sum(1).max())
    return {
        name: field[:, :longest] if name in ("text_ids", "attention_mask", "masked_ids") else field
        for name, field in batch.items()
    }


def measure(
    size: str, batch: dict[str, Tensor], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of a step of every formulation, checked to be equal before."""
    torch.manual_seed(0)
    chosen = arguments(size)
    task = PretrainTask(models.create("xvlm", "pretrain", **chosen)).train()
    model = task.model
    image_size, window, _, _, heads = SIZES[size]["swin"]
    state = xvlm_adapter(model).to_source(model.state_dict())
    runs: dict[str, Callable[[], None]] = {}
    for name, all_positions in ((PLAIN, True), (PLAIN_AT_MASKS, False)):
        plain = PlainXvlm(
            state,
            image_size=image_size,
            window=window,
            heads=heads,
            text_heads=chosen["text"]["heads"],
            fusion_layer=chosen["text"]["fusion_layer"],
            text_eps=model.text.embedding_norm.eps,
            all_positions=all_positions,
        )
        for own in (batch, trimmed(batch)):
            check_equal(task, plain, own, batch)
        update = PlainAdamW(plain.p, lr=1e-5, weight_decay=0.01)
        runs[name] = partial(step, partial(plain.losses, **batch), list(plain.p.values()), update)
    optimizer = AdamW(
        parameter_groups(
            model, lr=1e-5, weight_decay=0.01, rules=[ParameterRule(pattern=r"bias|norm", decay=False)]
        )
    )
    for name, own in ((VLP, batch), (VLP_LONGEST, trimmed(batch))):
        runs[name] = partial(step, partial(task, batch_of(own)), list(task.parameters()), optimizer)
    return interleaved(runs, repeats=repeats, clock=clock)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="quarter")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/pretrain_step.json")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure processor time, for a busy machine; with OMP_NUM_THREADS=1, since threads that wait "
        "count as well",
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds = {
        kind: measure(
            options.size, make(options.size, torch.Generator().manual_seed(1)), options.repeats, clock
        )
        for kind, make in (("images", image_batch), ("regions", region_batch))
    }
    # One iteration of the recipe at its fullest: a batch of regions, then a batch of images, each with its
    # own update.
    names = list(next(iter(seconds.values())))
    seconds["both"] = {
        name: [sum(pair) for pair in zip(*(found[name] for found in seconds.values()), strict=True)]
        for name in names
    }
    ratios = {
        kind: {name: ratio(found[PLAIN], found[name]) for name in names} for kind, found in seconds.items()
    }
    rows = [["", *(cell for kind in seconds for cell in (kind, "ratio"))]]
    for name in names:
        cells = ((spread(found[name]), f"{ratios[kind][name]:.2f}") for kind, found in seconds.items())
        rows.append([name, *(cell for pair in cells for cell in pair)])
    count = SIZES[options.size]["batch"]
    print(
        f"X-VLM pre-training step, size {options.size}, {count} texts, CPU, fp32, {machine()['threads']} "
        "threads;"
    )
    print(
        "losses and gradient norms of all rows are equal (checked before timing); ratio: plain / this row\n"
    )
    print(table(rows))
    slow = [kind for kind in ratios if ratios[kind][VLP] < TARGET]
    verdict = f"NO: {', '.join(slow)}" if slow else "yes"
    print(
        f"\nvlp at least {TARGET} times as fast as plain on the same tensors, batch by batch and over both: "
        f"{verdict}"
    )
    if options.save:
        medians = {
            kind: {name: median(values) for name, values in found.items()} for kind, found in seconds.items()
        }
        results = {"size": options.size, "texts": count, "repeats": options.repeats}
        print(f"{save('pretrain_step', {**results, 'seconds': medians, 'ratio': ratios})} written")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
