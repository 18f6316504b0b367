"""Our image encoders against timm's of the same size, with the same weights, on the CPU in fp32.

    python benchmarks/backbones.py [--size small] [--repeats 5] [--cpu-time] [--save]

Swin, ViT (DeiT) and CLIP's ViT, each as `vlp_core.vision` has it and as `vlp_core.vision.TimmVision` makes it
of timm (`vision: {kind: timm, ...}`): whole images forward (without gradient), forward and backward, and in
region mode. First checks that features and regions of both are equal. Ratios are timm's time over ours: above
1 ours is faster. This is what decides whether an encoder of our own stays: exits with 1 when one of them is
slower than timm's forward and backward by more than a tenth.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from common import interleaved, machine, ratio, save, spread, table
from torch import Tensor
from vlp_core.vision import ImageEncoder, TimmVision, create_vision
from vlp_core.weights.deit import deit_adapter
from vlp_core.weights.swin import timm_swin_adapter
from vlp_core.weights.timm import load_timm

FLOOR = 0.9

# Images, batch; width, heads and depth of the ViTs; width, depths and heads of Swin.
SIZES = {
    "small": {"image": 112, "batch": 8, "vit": (192, 3, 6), "swin": (64, (2, 2, 2), (2, 4, 8))},
    "base": {"image": 224, "batch": 8, "vit": (768, 12, 12), "swin": (128, (2, 2, 18, 2), (4, 8, 16, 32))},
}
PATCH, WINDOW, TEXTS_PER_IMAGE = 16, 7, 3


def pairs(size: str) -> dict[str, tuple[ImageEncoder, TimmVision]]:
    """Each of our encoders, and timm's with its weights."""
    sizes = SIZES[size]
    side = sizes["image"]
    width, heads, depth = sizes["vit"]
    swin_width, depths, swin_heads = sizes["swin"]
    torch.manual_seed(0)
    vit = {"image_size": side, "patch": PATCH, "width": width, "heads": heads, "depth": depth}
    theirs = {"patch_size": PATCH, "embed_dim": width, "num_heads": heads, "depth": depth}
    found = {
        "swin": (
            create_vision(
                "swin",
                image_size=side,
                window=WINDOW,
                width=swin_width,
                depths=depths,
                heads=swin_heads,
                drop_path=0.0,
            ),
            TimmVision(
                name="swin_base_patch4_window7_224",
                image_size=side,
                arguments={"embed_dim": swin_width, "depths": depths, "num_heads": swin_heads},
            ),
            timm_swin_adapter(stages=len(depths)).to_source,
        ),
        "vit": (
            create_vision("vit", **vit),
            TimmVision(name="vit_base_patch16_224", image_size=side, arguments=theirs),
            deit_adapter().to_source,
        ),
        "clip": (
            create_vision("clip", **vit, hidden=4 * width),
            TimmVision(name="vit_base_patch16_clip_quickgelu_224", image_size=side, arguments=theirs),
            clip_names,
        ),
    }
    for ours, other, names in found.values():
        load_timm(other, names(ours.state_dict()))
    return {name: (ours, other) for name, (ours, other, _) in found.items()}


def clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our CLIP under the names that timm gives it: those of its ViT, and the norm before the
    blocks."""
    before = {key: x for key, x in state.items() if key.startswith("pre_norm.")}
    rest = deit_adapter().to_source({key: x for key, x in state.items() if key not in before})
    return rest | {key.replace("pre_norm", "norm_pre"): x for key, x in before.items()}


def make_regions(model: ImageEncoder, images: int) -> tuple[Tensor, Tensor]:
    """Texts of every image, each of a fifth of its patches or so."""
    count = TEXTS_PER_IMAGE * images
    mask = (torch.rand(count, model.tokens, generator=torch.Generator().manual_seed(2)) < 0.2).long()
    mask[:, :2] = 1
    return torch.arange(count) % images, mask


def forward(model: ImageEncoder, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image)


def backward(model: ImageEncoder, image: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(image).square().mean().backward()


def backward_regions(model: ImageEncoder, image: Tensor, index: Tensor, mask: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    found = model.forward_regions(image, index, mask)
    (found.image_embeds.square().mean() + found.full_embeds.square().mean()).backward()


def check_equal(name: str, ours: ImageEncoder, theirs: TimmVision, image: Tensor) -> None:
    """Features of images and regions of both; raises when they differ."""
    index, mask = make_regions(ours, len(image))
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")
    with torch.no_grad():
        close(ours(image), theirs(image))
        for found, wanted in zip(
            ours.forward_regions(image, index, mask), theirs.forward_regions(image, index, mask), strict=True
        ):
            close(found, wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count the work of this process alone")
    parser.add_argument("--save", action="store_true", help="write results/backbones.json")
    chosen = parser.parse_args()
    clock = time.process_time if chosen.cpu_time else time.perf_counter
    side, batch = SIZES[chosen.size]["image"], SIZES[chosen.size]["batch"]
    image = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))

    rows, ratios = [["encoder", "", "vlp", "timm", "timm / vlp"]], {}
    for name, both in pairs(chosen.size).items():
        check_equal(name, both[0].eval(), both[1].eval(), image)
        index, mask = make_regions(both[0], batch)
        modes: dict[str, Callable[[ImageEncoder], object]] = {
            "forward": partial(forward, image=image),
            "forward and backward": partial(backward, image=image),
            "regions, forward and backward": partial(backward_regions, image=image, index=index, mask=mask),
        }
        for mode, run in modes.items():
            for model in both:
                model.train()
            seconds = interleaved(
                {"vlp": partial(run, both[0]), "timm": partial(run, both[1])},
                repeats=chosen.repeats,
                clock=clock,
            )
            found = ratio(seconds["timm"], seconds["vlp"])
            ratios[f"{name}, {mode}"] = found
            rows.append([name, mode, spread(seconds["vlp"]), spread(seconds["timm"]), f"{found:.2f}"])
    print(f"{batch} images of {side} pixels, {TEXTS_PER_IMAGE} texts each in region mode; {machine()}\n")
    print(table(rows))
    if chosen.save:
        print(f"\n{save('backbones', {'size': chosen.size, 'timm_over_vlp': ratios})}")
    slow = [
        name for name, found in ratios.items() if name.endswith(", forward and backward") and found < FLOOR
    ]
    for name in slow:
        print(
            f"{name}: timm's is faster than ours by more than a tenth ({ratios[name]:.2f})", file=sys.stderr
        )
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
