"""A ViCHA pre-training step of vlp against the plain formulation (`plain_vicha.py`): same weights, same
samples, CPU.

    python benchmarks/vicha_step.py [--size quarter] [--repeats 5] [--cpu-time] [--save]

First checks that both give the same losses and gradients in fp32 for the same negatives and the same removed
patches, then measures whole steps (teacher, forward, backward, AdamW) in turns, and the peak of what tensors
hold in one, in a process of its own for each. The plain step is fp32 without autocast, as the reference
trains; vlp runs in fp32 and as `precision: bf16` does, which needs a CPU with bf16 units to be fast. Exits
with 1 when vlp in fp32 is less than 1.5 times as fast or takes more than 0.7 of the memory; bf16 is shown,
not judged.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from common import interleaved, machine, median, ratio, save, spread, table
from plain_text import PlainAdamW
from plain_vicha import PlainVicha
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from vlp_core import models
from vlp_core.images import Concepts, Images
from vlp_core.losses.matching import Negatives
from vlp_core.models.vicha.checkpoints import FILES, vicha_adapter
from vlp_core.models.vicha.model import NOT_TAUGHT
from vlp_core.momentum import FeatureQueue, follow, teacher_of
from vlp_methods.vicha.losses import pretrain_losses

FASTER, SMALLER = 1.5, 0.7

# Images of 256 pixels, 15 concepts of which 4 are drawn, captions cut at 25 tokens, a queue of 65,536: the
# published sizes; widths of the published model, a half or a quarter of them, and something tiny, for a look
# at the script itself.
SIZES = {
    "base": {"image": (256, 16, 768, 12, 12), "text": (768, 12, 12, 3072, 30522), "batch": 4, "queue": 65536},
    "half": {"image": (256, 16, 384, 12, 6), "text": (384, 12, 6, 1536, 30522), "batch": 8, "queue": 65536},
    "quarter": {
        "image": (256, 16, 192, 12, 3),
        "text": (192, 12, 3, 768, 30522),
        "batch": 16,
        "queue": 65536,
    },
    "tiny": {"image": (64, 16, 32, 3, 2), "text": (32, 4, 2, 64, 200), "batch": 8, "queue": 64},
}
TOKENS, CONCEPT_TOKENS, EMBED = 25, 10, 256

PLAIN, VLP, VLP_BF16 = "plain, fp32", "vlp, fp32", "vlp, bf16"


def arguments(size: str) -> dict:
    image_size, patch, width, depth, heads = SIZES[size]["image"]
    text_width, layers, text_heads, hidden, vocabulary = SIZES[size]["text"]
    return {
        "vision": {
            "kind": "vit",
            "image_size": image_size,
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
            "local_depth": 0,
        },
        "text": {
            "vocabulary": vocabulary,
            "width": text_width,
            "layers": layers,
            "heads": text_heads,
            "hidden": hidden,
            "fusion_layer": layers // 2,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "embed_width": EMBED,
        "levels": min(5, layers // 2 - 1),
        "concepts": {"layers": 2},
        "masked_image": {"width": width, "depth": 2, "heads": max(2, 16 * width // 768)},
    }


def make_batch(size: str) -> dict[str, Tensor]:
    """Captions of 6 to 20 tokens, of which about 15 % are masked, and concepts of 5 to 10 tokens."""
    rng = torch.Generator().manual_seed(1)
    side, count, vocabulary = SIZES[size]["image"][0], SIZES[size]["batch"], SIZES[size]["text"][4]

    def words(low: int, high: int, columns: int) -> tuple[Tensor, Tensor]:
        length = torch.randint(low, high + 1, (count,), generator=rng)
        mask = (torch.arange(columns) < length[:, None]).long()
        return torch.randint(5, vocabulary, (count, columns), generator=rng) * mask, mask

    ids, mask = words(6, 20, TOKENS)
    concept_ids, concept_mask = words(5, CONCEPT_TOKENS, CONCEPT_TOKENS)
    places, labels = torch.zeros(count, 4, dtype=torch.long), torch.full((count, 4), -100)
    masked = ids.clone()
    for row, tokens in enumerate(mask.sum(1).tolist()):
        chosen = 1 + torch.randperm(tokens - 1, generator=rng)[: max(1, round(0.15 * tokens))]
        places[row, : len(chosen)], labels[row, : len(chosen)] = chosen, ids[row, chosen]
        masked[row, chosen] = 4
    return {
        "image": torch.randn(count, 3, side, side, generator=rng),
        "text_ids": ids,
        "attention_mask": mask,
        "masked_ids": masked,
        "masked_positions": places,
        "masked_labels": labels,
        "concept_ids": concept_ids,
        "concept_mask": concept_mask,
    }


class Ours:
    """Student, teacher and queue of vlp."""

    def __init__(self, size: str) -> None:
        torch.manual_seed(0)
        self.model = models.create("vicha", "pretrain", **arguments(size)).train()
        self.teacher = teacher_of(self.model, without=NOT_TAUGHT)
        self.queue = FeatureQueue(SIZES[size]["queue"], EMBED)

    def losses(self, batch: dict[str, Tensor], **fixed: object) -> dict[str, Tensor]:
        pixels, *texts, ids, mask = batch.values()
        images = Images(pixels, concepts=Concepts(ids, mask))
        follow(self.teacher, self.model, 0.995)
        taught = self.teacher.teach(images, *texts)
        pairs = self.model.pretrain(images, *texts, taught=taught, **fixed)
        return pretrain_losses(pairs, taught, self.model.temperature, self.queue)

    def plain(self, size: str) -> PlainVicha:
        """The plain formulation with the same values."""
        state = FILES.to_source(self.model, teacher=self.teacher, queue=self.queue)
        chosen = arguments(size)
        return PlainVicha(
            state,
            patch=chosen["vision"]["patch"],
            image_heads=chosen["vision"]["heads"],
            decoder_heads=chosen["masked_image"]["heads"],
            text_heads=chosen["text"]["heads"],
            fusion_layer=chosen["text"]["fusion_layer"],
            text_eps=self.model.text.embedding_norm.eps,
            levels=chosen["levels"],
            mask_ratio=self.model.masked_image.ratio,
        )


def check_equal(ours: Ours, plain: PlainVicha, batch: dict[str, Tensor]) -> None:
    """Losses and gradients of both for the same draws; raises when they differ."""
    count = len(batch["text_ids"])
    shifted = [(row + 1) % count for row in range(count)]
    noise = torch.rand(count, ours.model.vision.tokens - 1, generator=torch.Generator().manual_seed(2))
    negatives = Negatives(*(torch.tensor(shifted) for _ in range(2)))
    found = ours.losses(batch, negatives=negatives, patch_noise_BL=noise)
    wanted = plain.losses(**batch, negatives=(shifted, shifted), noise=noise)
    assert found.keys() == wanted.keys()
    for name, loss in wanted.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    sum(found.values()).backward()
    sum(wanted.values()).backward()
    named = {name: p.grad for name, p in ours.model.named_parameters() if p.grad is not None}
    for name, gradient in vicha_adapter(ours.model).to_source(named, gradients=True).items():
        torch.testing.assert_close(
            gradient.norm(),
            plain.p[name].grad.norm(),
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for parameter in [*ours.model.parameters(), *plain.p.values()]:
        parameter.grad = None


def step(
    losses: Callable[[], dict[str, Tensor]],
    parameters: list[Tensor],
    optimizer: object,
    *,
    bf16: bool = False,
) -> None:
    for parameter in parameters:
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        total = sum(losses().values())
    total.backward()
    optimizer.step()


def ours_step(ours: Ours, batch: dict[str, Tensor], *, bf16: bool) -> Callable[[], None]:
    parameters: list[nn.Parameter] = list(ours.model.parameters())
    update = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.02, fused=True)
    return partial(step, partial(ours.losses, batch), parameters, update, bf16=bf16)


def plain_step(plain: PlainVicha, batch: dict[str, Tensor]) -> Callable[[], None]:
    trained = plain.trained()
    update = PlainAdamW(trained, lr=1e-5, weight_decay=0.02)
    return partial(step, partial(plain.losses, **batch), list(trained.values()), update)


def peak(name: str, size: str) -> None:
    """Print the most bytes that tensors of one step hold at a time, beyond what stood before it: parameters,
    optimizer, teacher, queue, batch.

    What the process takes from the system depends on the habits of its allocator more than on the step.
    """
    ours, batch = Ours(size), make_batch(size)
    run = (
        plain_step(ours.plain(size), batch)
        if name == PLAIN
        else ours_step(ours, batch, bf16=name == VLP_BF16)
    )
    run()  # makes the state of the optimizer
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    print(most)


def measure_peak(name: str, size: str) -> int:
    found = subprocess.run(
        [sys.executable, __file__, "--size", size, "--peak", name], check=True, capture_output=True, text=True
    )
    return int(found.stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="quarter")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/vicha_step.json")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure processor time, for a busy machine; with OMP_NUM_THREADS=1, since threads that wait "
        "count as well",
    )
    parser.add_argument(
        "--peak", choices=[PLAIN, VLP, VLP_BF16], help="print the peak memory of one formulation and stop"
    )
    options = parser.parse_args()
    if options.peak:
        peak(options.peak, options.size)
        return 0
    clock = time.process_time if options.cpu_time else time.perf_counter
    ours, batch = Ours(options.size), make_batch(options.size)
    plain = ours.plain(options.size)
    check_equal(ours, plain, batch)
    runs = {
        PLAIN: plain_step(plain, batch),
        VLP: ours_step(ours, batch, bf16=False),
        VLP_BF16: ours_step(ours, batch, bf16=True),
    }
    seconds = interleaved(runs, repeats=options.repeats, clock=clock)
    memory = {name: measure_peak(name, options.size) for name in runs}
    count = SIZES[options.size]["batch"]
    print(
        f"ViCHA pre-training step, size {options.size}, {count} pairs, CPU, {machine()['threads']} threads;"
    )
    print("losses and gradient norms in fp32 are equal (checked before timing)\n")
    faster = {name: ratio(seconds[PLAIN], seconds[name]) for name in runs}
    smaller = {name: memory[name] / memory[PLAIN] for name in runs}
    good = {name for name in runs if faster[name] >= FASTER and smaller[name] <= SMALLER}
    rows = [["", "step", "plain / this", "peak memory", "this / plain", f"{FASTER} and {SMALLER}"]]
    rows += [
        [
            name,
            spread(seconds[name]),
            f"{faster[name]:.2f}",
            f"{memory[name] / 1e6:.0f} MB",
            f"{smaller[name]:.2f}",
            "" if name == PLAIN else "yes" if name in good else "NO",
        ]
        for name in runs
    ]
    print(table(rows))
    if options.save:
        results = {"size": options.size, "pairs": count, "repeats": options.repeats}
        medians = {name: median(values) for name, values in seconds.items()}
        numbers = {"seconds": medians, "memory": memory, "ratio": faster, "memory_share": smaller}
        print(f"{save('vicha_step', {**results, **numbers})} written")
    return 0 if VLP in good else 1


if __name__ == "__main__":
    sys.exit(main())
