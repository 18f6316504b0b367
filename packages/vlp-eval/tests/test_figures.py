"""The picture of what was retrieved."""

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from vlp_eval import figures
from vlp_eval.gallery import Gallery
from vlp_eval.metrics import retrieval as metric
from vlp_eval.report import Scores


def square(i):
    return Image.new("RGB", (40 + 10 * i, 60), (20 * i + 10, 0, 200))


def gallery(texts=None):
    texts = texts or tuple(f"picture number {j // 2} said {j}" for j in range(16))
    return Gallery(
        image=square,
        image_ids=tuple(f"p{i}" for i in range(8)),
        texts=texts,
        text_ids=tuple(f"t{j}" for j in range(16)),
        image_of_text=tuple(j // 2 for j in range(16)),
    )


def scores(own, similarity):
    image = torch.tensor(own.image_of_text)
    text_ranks, image_ranks = metric.text_ranks(similarity, image), metric.image_ranks(similarity.T, image)
    best = [s.argsort(dim=1, descending=True)[:, :5].tolist() for s in (similarity, similarity.T)]
    return Scores(
        benchmark="retrieval",
        settings={},
        counts={},
        stages={"dual": metric.summary(text_ranks, image_ranks)},
        hits={"dual": {}},
        samples={
            "images": [
                {
                    "id": f"p{i}",
                    "texts": [f"t{2 * i}", f"t{2 * i + 1}"],
                    "rank": {"dual": int(text_ranks[i])},
                    "best": {"dual": [f"t{j}" for j in best[0][i]]},
                }
                for i in range(8)
            ],
            "texts": [
                {
                    "id": f"t{j}",
                    "image": f"p{j // 2}",
                    "text": own.texts[j],
                    "rank": {"dual": int(image_ranks[j])},
                    "best": {"dual": [f"p{i}" for i in best[1][j]]},
                }
                for j in range(16)
            ],
        },
    )


def green(page):
    """Number of pixels in the colour of right answers."""
    want = tuple(int(figures.RIGHT[n : n + 2], 16) for n in (1, 3, 5))
    return sum(count for count, colour in page.getcolors(1 << 24) if colour == want)


def test_right_answers_are_marked_and_wrong_ones_are_not():
    own = gallery()
    right = torch.zeros(8, 16)
    right[torch.tensor(own.image_of_text), torch.arange(16)] = 1
    noise = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) / 2
    found = figures.retrieval_figure(scores(own, right + noise), own, queries=3)
    missed = figures.retrieval_figure(scores(own, noise - right), own, queries=3)
    frame = 4 * 5 * (figures.THUMB - 5)
    assert green(found) >= 3 * frame
    assert green(missed) == 0
    assert found.size == missed.size


def test_queries_are_spread_over_the_gallery_and_never_more_than_there_are():
    assert figures._spread(100, 4) == [12, 37, 62, 87]
    assert figures._spread(3, 10) == [0, 1, 2]
    own = gallery()
    similarity = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    assert (
        figures.retrieval_figure(scores(own, similarity), own, queries=1).height
        < figures.retrieval_figure(scores(own, similarity), own, queries=20).height
    )


def test_long_texts_stay_inside_their_column():
    draw = ImageDraw.Draw(Image.new("RGB", (10, 10)))
    font = ImageFont.load_default(18)
    text = "a few words and " + "x" * 200 + " and more " * 40
    rows = figures.wrap(draw, text, 250, font)
    assert all(draw.textlength(row, font=font) <= 250 for row in rows)
    assert "".join(rows).replace(" ", "") == text.replace(" ", "")
    own = gallery(texts=tuple(f"{text} {j}" for j in range(16)))
    similarity = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    page = figures.retrieval_figure(scores(own, similarity), own, queries=2)
    assert page.getpixel((figures.WIDTH - 1, page.height // 2)) == (255, 255, 255)


def test_scores_of_another_gallery_are_refused():
    own = gallery()
    result = scores(own, torch.rand(8, 16, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="another gallery"):
        figures.retrieval_figure(result, own.first_texts(1))
