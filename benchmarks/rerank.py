"""Re-ranking of retrieval by the fusion encoder against the plain loop over queries: same weights, same
candidates, same scores, CPU, fp32.

    python benchmarks/rerank.py [--size quarter] [--images 12] [--candidates 8] [--repeats 3] [--cpu-time]
    [--save]

The plain loop is that of the published evaluations: one query at a time, its candidates as one batch, the
image repeated for every text (or every image encoded anew for one text) and projected to keys and values in
every layer of every pair, texts padded to 40 tokens, both directions each by itself. vlp
(`vlp_eval.retrieval.rerank`) projects an image once per batch, takes many queries per batch, cuts padding to
the longest text of the batch, and scores a pair that both directions want once. Images are features of 384
pixels (145 tokens), five texts each. First checks that all scores are equal. Exits with 1 when vlp is less
than 3 times as fast.
"""

import argparse
import sys
import time

import torch
from common import interleaved, machine, median, ratio, save, spread, table
from plain_xvlm import PlainXvlm
from pretrain_step import SIZES, TOKENS, arguments
from torch import Tensor
from torch.nn.functional import normalize
from vlp_core import models
from vlp_core.models.xvlm.checkpoints import xvlm_adapter
from vlp_core.models.xvlm.model import ImageFeatures, TextFeatures
from vlp_eval.metrics import retrieval as metric
from vlp_eval.retrieval import rerank

TARGET = 3.0
PATCHES, TEXTS_PER_IMAGE, EMBED = 144, 5, 256

PLAIN, PLAIN_TRIMMED = "plain, one query at a time", "plain, texts padded to the longest of all"
VLP_PADDED, VLP = "vlp, texts padded to 40 as plain", "vlp"


def plain_rerank(
    plain: PlainXvlm, image: ImageFeatures, text: TextFeatures, of_image: Tensor, of_text: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of the candidates of both directions, query by query."""

    def match(texts: Tensor, images: Tensor) -> Tensor:
        seen = image.embeds[images]
        states = plain.fuse(text.embeds[texts], text.attention_mask[texts], seen, torch.ones(seen.shape[:2]))
        return plain.head("itm_head", states[:, 0])[:, 1]

    by_image = [match(own, torch.full_like(own, i)) for i, own in enumerate(of_image)]
    by_text = [match(torch.full_like(own, j), own) for j, own in enumerate(of_text)]
    return torch.stack(by_image), torch.stack(by_text)


def features(model: torch.nn.Module, size: str, images: int) -> tuple[ImageFeatures, TextFeatures]:
    """Random images, and texts of as many tokens as those of COCO (6 to 20), padded to 40."""
    rng = torch.Generator().manual_seed(1)
    texts = images * TEXTS_PER_IMAGE
    embeds = torch.randn(images, 1 + PATCHES, model.vision.width, generator=rng)
    projection = normalize(torch.randn(images, EMBED, generator=rng), dim=-1)
    length = torch.randint(6, 21, (texts,), generator=rng)
    mask = (torch.arange(TOKENS)[None] < length[:, None]).long()
    ids = torch.randint(5, SIZES[size]["text"][4], (texts, TOKENS), generator=rng) * mask
    return ImageFeatures(embeds, projection), model.encode_text(ids, mask)


def trimmed(text: TextFeatures) -> TextFeatures:
    longest = int(text.attention_mask.sum(1).max())
    return text._replace(embeds=text.embeds[:, :longest], attention_mask=text.attention_mask[:, :longest])


class Untrimmed:
    """The model with every text widened to 40 tokens again, to tell what the padding alone costs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def match(
        self, image: ImageFeatures, text: TextFeatures, image_index: Tensor, text_index: Tensor
    ) -> Tensor:
        missing = TOKENS - text.embeds.shape[1]
        text = text._replace(
            embeds=torch.nn.functional.pad(text.embeds, (0, 0, 0, missing)),
            attention_mask=torch.nn.functional.pad(text.attention_mask, (0, missing)),
        )
        return self.model.match(image, text, image_index, text_index)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--size", choices=list(SIZES), default="quarter", help="widths, as in pretrain_step.py"
    )
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--candidates", type=int, default=8, help="K; of images at most as many as there are")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/rerank.json")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time: on a busy machine")
    options = parser.parse_args()

    torch.manual_seed(0)
    chosen = arguments(options.size)
    model = models.create("xvlm", "pretrain", **chosen).eval()
    vision, text_arguments = chosen["vision"], chosen["text"]
    plain = PlainXvlm(
        xvlm_adapter(model).to_source(model.state_dict()),
        image_size=vision["image_size"],
        window=vision["window"],
        heads=vision["heads"],
        text_heads=text_arguments["heads"],
        fusion_layer=text_arguments["fusion_layer"],
        text_eps=model.text.embedding_norm.eps,
        all_positions=False,
    )
    image, text = features(model, options.size, options.images)
    similarity = image.projection @ text.projection.T
    of_image = metric.top(similarity, min(options.candidates, len(text.embeds)))
    of_text = metric.top(similarity.T, min(options.candidates, options.images))
    runs = {
        PLAIN: lambda: plain_rerank(plain, image, text, of_image, of_text),
        PLAIN_TRIMMED: lambda: plain_rerank(plain, image, trimmed(text), of_image, of_text),
        VLP_PADDED: lambda: rerank(Untrimmed(model), image, text, of_image, of_text),
        VLP: lambda: rerank(model, image, text, of_image, of_text),
    }
    expected = runs[PLAIN]()
    for run in runs.values():
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)

    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds = interleaved(runs, repeats=options.repeats, warmup=0, clock=clock)
    ratios = {name: ratio(seconds[PLAIN], found) for name, found in seconds.items()}
    wanted = of_image.numel() + of_text.numel()
    print(
        f"re-ranking {options.images} images and {len(text.embeds)} texts, K={options.candidates}, {wanted} "
        "wanted scores; size "
        f"{options.size}, CPU, fp32, {machine()['threads']} threads; all scores are equal (checked before "
        "timing)\n"
    )
    rows = [["", "time", "plain / this row"]]
    rows += [[name, spread(found), f"{ratios[name]:.2f}"] for name, found in seconds.items()]
    print(table(rows))
    met = ratios[VLP] >= TARGET
    print(f"\nvlp at least {TARGET:g} times as fast as the plain loop: {'yes' if met else 'NO'}")
    if options.save:
        results = {
            "size": options.size,
            "images": options.images,
            "candidates": options.candidates,
            "repeats": options.repeats,
            "seconds": {name: median(found) for name, found in seconds.items()},
            "ratio": ratios,
        }
        print(f"{save('rerank', results)} written")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
