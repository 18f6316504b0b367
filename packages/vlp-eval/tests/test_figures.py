"""Figures of what was answered."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from vlp_data import schema as data
from vlp_eval import figures
from vlp_eval.benchmarks.grounding import GroundingOptions, WeakGroundingOptions
from vlp_eval.benchmarks.options import BenchmarkOptions
from vlp_eval.benchmarks.retrieval import RetrievalOptions
from vlp_eval.gallery import Gallery
from vlp_eval.metrics import retrieval as metric
from vlp_eval.report import Scores


def square(i):
    return Image.new("RGB", (40 + 10 * i, 60), (20 * i + 10, 0, 200))


def gallery(texts=None):
    texts = texts or tuple(f"image number {j // 2} said {j}" for j in range(16))
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
        results={"dual": metric.summary(text_ranks, image_ranks)},
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


def green(page, colour=figures.RIGHT):
    """Number of pixels in the colour of right answers."""
    want = tuple(int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return sum(count for count, colour in page.getcolors(1 << 24) if colour == want)


def test_right_answers_are_marked_and_wrong_ones_are_not():
    own = gallery()
    right = torch.zeros(8, 16)
    right[torch.tensor(own.image_of_text), torch.arange(16)] = 1
    noise = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) / 2
    found = figures.retrieval_figure(scores(own, right + noise), own, RetrievalOptions(figures=3))
    missed = figures.retrieval_figure(scores(own, noise - right), own, RetrievalOptions(figures=3))
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
        figures.retrieval_figure(scores(own, similarity), own, RetrievalOptions(figures=1)).height
        < figures.retrieval_figure(scores(own, similarity), own, RetrievalOptions(figures=20)).height
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
    page = figures.retrieval_figure(scores(own, similarity), own, RetrievalOptions(figures=2))
    assert page.getpixel((figures.WIDTH - 1, page.height // 2)) == (255, 255, 255)


def test_scores_of_another_gallery_are_refused():
    own = gallery()
    result = scores(own, torch.rand(8, 16, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="another gallery"):
        figures.retrieval_figure(result, own.first_texts(1), RetrievalOptions())


class StoredImages:
    """A source of images in memory."""

    def __init__(self, count, each=1):
        self.count, self.each = count, each

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        images = tuple(data.Image(array=np.full((60, 80, 3), 40 + row, np.uint8)) for _ in range(self.each))
        return data.Sample(key=f"row {row}", images=images)


def expressions(*predicted):
    samples = [
        {
            "id": str(n),
            "text": "the red one",
            "box": [10, 10, 20, 30],
            "predicted": box,
            "right": box is not None,
        }
        for n, box in enumerate(predicted)
    ]
    return Scores(
        benchmark="grounding", settings={}, counts={}, results={}, hits={}, samples={"expressions": samples}
    )


def test_true_and_predicted_boxes_have_their_colours():
    both = figures.grounding_figure(expressions([40, 10, 20, 30]), StoredImages(1), GroundingOptions())
    none = figures.grounding_figure(expressions(None), StoredImages(1), GroundingOptions())
    scale = (figures.TEXT_WIDTH - figures.GAP) / 80
    frame = round(scale * 3 * 2 * (20 + 30) * 0.9)  # three pixels wide around the box, in the page's scale
    assert green(both) > frame and green(both, figures.WRONG) > frame
    assert green(none) > frame > green(none, figures.WRONG)


def test_heat_of_each_word_is_drawn_where_it_is(monkeypatch):
    left, nothing = np.zeros((2, 23, 23), np.float32)
    left[:, :8] = 1
    maps = [("all words", left), ("red", left / 1000), ("the", nothing)]
    options = WeakGroundingOptions(layer=3)

    def heat(subject, image, text, words, *, options):
        assert (subject, text, words, options.layer) == ("subject", "the red one", (), 3)
        return maps

    monkeypatch.setattr(figures, "word_heat", heat)
    page = figures.heat_figure(expressions(None), StoredImages(1), options, "subject")

    def redness(word):
        at = figures.MARGIN + figures.TEXT_WIDTH + figures.GAP + word * (figures.THUMB + figures.GAP)
        top = figures.MARGIN + 44 + figures.GAP + 40
        thumb = np.asarray(page.crop((at, top, at + figures.THUMB, top + figures.THUMB))).astype(int)
        red = thumb[..., 0] - thumb[..., 1]
        return red[:, : figures.THUMB // 5].mean(), red[:, figures.THUMB // 2 :].mean()

    for word, hot in ((0, True), (1, True), (2, False)):
        there, elsewhere = redness(word)
        assert (there > 60) == hot and elsewhere < 20


def test_heat_has_the_colours_and_weights_of_the_notebook():
    image = Image.new("RGB", (60, 40), (100, 100, 100))
    heat = np.zeros((4, 6), np.float32)
    assert np.array_equal(figures.heated(image, heat + 3), image)
    heat[1, 4] = 0.2
    shown = np.asarray(figures.heated(image, heat)).astype(int)
    # At the peak, the middle of the cell, all is colour: dark red, the last of jet.
    far = abs(shown - [128, 0, 0]).sum(-1)
    row, column = np.unravel_index(far.argmin(), far.shape)
    assert abs(row - 14.5) <= 1 and abs(column - 44.5) <= 1 and far.min() <= 3
    np.testing.assert_allclose(
        [[np.interp(x, *points) for points in figures._JET] for x in (0, 0.2, 0.5, 1)],
        [[0, 0, 0.5], [0, 0.3, 1], [0.484, 1, 0.484], [0.5, 0, 0]],
        atol=0.001,
    )


def test_blur_spreads_a_point_as_a_gaussian_and_keeps_its_sum():
    point = np.zeros((41, 61))
    point[20, 30] = 1
    found = figures._smooth(point, 3.0)
    assert found.shape == point.shape and found.sum() == pytest.approx(1, abs=1e-6)
    rows, columns = np.mgrid[:41, :61]
    expected = np.exp(-((rows - 20) ** 2 + (columns - 30) ** 2) / 18) / (18 * np.pi)
    assert abs(found - expected).max() < 1e-5
    assert figures._smooth(np.ones((5, 7)), 4.0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("benchmark", "kind", "right", "wrong"),
    [
        (
            "vqa",
            "questions",
            {"question": "what?", "answer": "a", "accuracy": 100.0, "answers": ["a"]},
            {"question": "what?", "answer": "b", "accuracy": 0.0, "answers": ["a"]},
        ),
        (
            "nlvr",
            "statements",
            {"text": "two dogs", "label": "True", "predicted": "True"},
            {"text": "two dogs", "label": "True", "predicted": "False"},
        ),
    ],
)
def test_right_and_wrong_answers_have_their_colours(benchmark, kind, right, wrong):
    source = StoredImages(1, each=2 if benchmark == "nlvr" else 1)
    pages = [
        figures.samples_figure(
            Scores(
                benchmark=benchmark, settings={}, counts={}, results={}, hits={}, samples={kind: [sample]}
            ),
            source,
            BenchmarkOptions(),
        )
        for sample in (right, wrong)
    ]
    assert green(pages[0]) > 0 == green(pages[0], figures.WRONG)
    assert green(pages[1]) == 0 < green(pages[1], figures.WRONG)
