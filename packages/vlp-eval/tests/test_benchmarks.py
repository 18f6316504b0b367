"""The table of benchmarks, rows of other packages, subjects, and the protocols of what comes next."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from vlp_core import models
from vlp_core.images import Images
from vlp_core.models.family import every
from vlp_data import schema as data
from vlp_data import shapes
from vlp_data.options import ConceptOptions
from vlp_data.sources import source_type
from vlp_data.views import Detection, Squash, evaluation
from vlp_eval import Scores, Subject, benchmarks, command, protocol, take
from vlp_eval.benchmarks import ROWS, Benchmark, find
from vlp_eval.benchmarks.options import BenchmarkOptions, TextBenchmarkOptions
from vlp_eval.inference import Execution, evaluate_rows


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_names_what_is_there_and_what_it_can_be_run_with(row):
    options = row.part("options")
    assert issubclass(options, TextBenchmarkOptions if row.name != "captioning" else BenchmarkOptions)
    assert all(callable(row.part(part)) for part in ("evaluate", "figure"))
    for part in ("files", "open", "predictions"):
        assert (row.part(part) is None) == (getattr(row, part) == "")
    assert row.ability in {
        ability for family in every() for stage in family.stages for ability in stage.abilities
    }
    assert source_type(row.holds)
    assert command.keys(row).common
    assert not row.format or row.format in command.keys(row).formats


def test_numbers_are_named_after_their_result_where_a_benchmark_has_several():
    results = {"dual": {"tr_r1": 1.0, "rsum": 9.0}, "reranked": {"tr_r1": 2.0, "rsum": 8.0}}
    scores = Scores(benchmark="retrieval", settings={}, counts={}, results=results, hits={})
    row = find("retrieval")
    assert row.numbers(scores) == {"dual/tr_r1": 1.0, "reranked/tr_r1": 2.0}
    assert set(row.numbers(scores)) < set(row.names) and "pairs/r_mean" in row.names
    scores = Scores(benchmark="vqa", settings={}, counts={}, results={"chosen": {"accuracy": 3.0}}, hits={})
    assert find("vqa").numbers(scores) == {"accuracy": 3.0} and "accuracy" in find("vqa").names


def test_concepts_are_not_drawn_and_padded_alike_where_images_are_compared():
    trained = ConceptOptions(max_tokens=9, share=0.3)
    assert find("retrieval").concepts(trained) == ConceptOptions(max_tokens=9, pad="max")
    assert find("nlvr").concepts(trained) == ConceptOptions(max_tokens=9)
    assert find("nlvr").concepts(None) is None


def test_reports_of_earlier_versions_are_read():
    now = Scores(benchmark="nlvr", settings={}, counts={"a": 1}, results={"classified": {"x": 1.0}}, hits={})
    then = now.json().replace('"results"', '"stages"')
    assert '"stages"' in then and Scores.read(then) == Scores.read(now.json())
    assert Scores.read(then).metrics == {"x": 1.0}
    for text in ("[]", "{", '{"benchmark": "nlvr"}'):
        with pytest.raises(ValueError, match="this is no report of vlp-eval"):
            Scores.read(text)


# --------------------------------------------------------------------------------------------------
# rows of other packages


def pointing(monkeypatch, **values):
    """Entry points of `vlp.benchmarks`: name = "module:attribute"."""
    points = [EntryPoint(name, value, benchmarks.GROUP) for name, value in values.items()]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    benchmarks.benchmarks.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_table():
    yield
    benchmarks.benchmarks.cache_clear()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mine": "no_such_module:ROW"}, "mine = no_such_module:ROW .* cannot be imported"),
        ({"mine": "vlp_eval.benchmarks:OWN"}, r"is no vlp_eval\.benchmarks\.Benchmark but a dict"),
        ({"mine": "other_rows:vqa"}, "calls itself vqa; give both one name"),
        ({"vqa": "other_rows:vqa"}, "has the name of another benchmark"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_entry_point(values, message, monkeypatch):
    row = Benchmark(
        name="vqa", about="", ability="", holds="", options="", evaluate="", figure="", metrics=()
    )
    monkeypatch.setitem(sys.modules, "other_rows", SimpleNamespace(vqa=row))
    pointing(monkeypatch, **values)
    with pytest.raises(ValueError, match=message):
        benchmarks.benchmarks()
    assert find("nlvr").name == "nlvr"  # our own are there all the same


def test_an_unknown_benchmark_is_answered_with_all_names(monkeypatch):
    pointing(monkeypatch)
    with pytest.raises(ValueError, match="benchmark 'vpa' is not known; choose among retrieval, vqa"):
        find("vpa")


PLUGIN = '''
"""A benchmark of another package: is an image bright?"""
from dataclasses import dataclass

from vlp_eval.benchmarks import Benchmark
from vlp_eval.benchmarks.options import BenchmarkOptions


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    """How brightness is measured."""

    least: float = 0.0
    """Brightness from which on an image is bright."""


ROW = Benchmark(
    name="brightness",
    about="Share of bright images",
    ability="retrieval",
    holds="captions",
    options="brightness:Options",
    evaluate="brightness_work:evaluate",
    figure="vlp_eval.figures:samples_figure",
    metrics=("bright",),
    reads_text=False,
)
'''
WORK = """
from vlp_eval import Scores
from vlp_eval.inference import evaluate_rows, settings_of


def evaluate(subject, source, options, execution):
    assert subject.tokenizer is None
    total = min(len(source), options.limit or len(source))

    def run(rows, batch):
        embeds = subject.model.encode_image(batch.images).embeds
        return [len(one) > 1 and pixels.mean().item() >= options.least
                for one, pixels in zip(embeds, batch.images.pixels)]

    found = evaluate_rows(subject, source, total, run, options, execution, what="images")
    return Scores(
        benchmark="brightness", settings=settings_of(subject, execution), counts={"images": total},
        results={"seen": {"bright": 100 * sum(found) / total}}, hits={},
        samples={"images": [{"id": n, "bright": one} for n, one in enumerate(found)]},
    )
"""


@pytest.fixture
def installed(tmp_path):
    """Environment with a package that brings the benchmark `brightness`, and an export without vocabulary."""
    site = tmp_path / "site"
    info = site / "brightness-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "brightness.py").write_text(PLUGIN)
    (site / "brightness_work.py").write_text(WORK)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{benchmarks.GROUP}]\nbrightness = brightness:ROW\n")
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def tiny(world):
    vocabulary = len((world / "vocab.txt").read_text().splitlines())
    return {
        "vision": {
            "kind": "vit",
            "image_size": 32,
            "patch": 16,
            "width": 16,
            "depth": 1,
            "heads": 2,
            "local_depth": 0,
        },
        "text": {
            "vocabulary": vocabulary,
            "width": 16,
            "layers": 2,
            "heads": 2,
            "hidden": 16,
            "fusion_layer": 1,
        },
        "embed_width": 8,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return shapes.ensure(tmp_path_factory.mktemp("shapes") / "world", images=20, seed=0, size=48)


@pytest.fixture
def export(world, tmp_path):
    def export(**changes):
        arguments = tiny(world)
        kinds = {"tokenizer": {"kind": "wordpiece", "files": ["vocab.txt"]}}
        given = {"view": {"kind": "squash", "size": 32}, "reading": kinds, **changes}
        models.save(
            tmp_path / "export",
            models.create("xvlm", "retrieval", **arguments),
            family="xvlm",
            stage="retrieval",
            arguments=arguments,
            text_files=[world / "vocab.txt"],
            **given,
        )
        return tmp_path / "export"

    return export


def run(environment, program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_benchmark_of_another_package_is_listed_shown_and_taken(installed, export, world, tmp_path):
    listed = run(
        installed,
        "import sys; from vlp_eval.cli import main; main(['ls']); main(['show', 'brightness'])\n"
        "assert 'torch' not in sys.modules",
    )
    assert "brightness      Share of bright images" in listed
    assert "  least = 0.0   float" in listed and "Brightness from which on" in listed
    assert "  data.annotations = (must be given)" in listed
    folder = export()
    (folder / "vocab.txt").unlink()  # a benchmark without text opens no tokenizer
    words = [
        "brightness",
        str(folder),
        "data.format=task_json",
        f"data.files=[{world}/shapes_test.json]",
        f"data.root={world}",
        "least=-100",
        "limit=2",
        "figures=0",
        "device=cpu",
        f"out={tmp_path}/out",
    ]
    printed = run(installed, f"from vlp_eval.cli import main; raise SystemExit(main({words!r}))")
    assert "100.00" in printed and "out/brightness.json written" in printed
    scores = Scores.read((tmp_path / "out" / "brightness.json").read_text())
    assert scores.counts == {"images": 2} and scores.settings["options"]["least"] == -100


def test_two_classes_of_a_benchmark_cannot_have_one_key():
    row = Benchmark(
        name="twice",
        about="",
        ability="",
        holds="captions",
        options="vlp_eval.benchmarks.vqa:VqaOptions",
        files="vlp_eval.benchmarks.options:BenchmarkOptions",
        evaluate="",
        figure="",
        metrics=(),
    )
    with pytest.raises(TypeError, match=r"VqaOptions\.limit: another class of this benchmark has this key"):
        command.schema(row)


def test_a_recipe_file_of_an_earlier_version_is_answered_with_the_new_names(tmp_path, capsys):
    from vlp_eval.cli import main

    (tmp_path / "old.yaml").write_text("k: 16\nanswers: a.json\ndata: {files: [x.json]}\n")
    assert main(["vqa", "nowhere", "--recipe", str(tmp_path / "old.yaml"), "pairs=3"]) == 2
    said = capsys.readouterr().err
    assert "k: unknown key; it is called candidates now" in said
    assert "pairs: unknown key; it is called pair_batch now" in said and "old.yaml:" in said


# --------------------------------------------------------------------------------------------------
# subjects


def test_a_subject_is_read_from_the_export(export, world):
    said = {"clean": "none", "max_tokens": 9, "separator": True, "vocabulary": 100_000}
    reading = {"tokenizer": {"kind": "wordpiece", "files": ["vocab.txt"]}, **said}
    view = {"kind": "centre_crop", "size": 32, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    loaded = models.load(export(reading=reading, view=view, settings={"prompt": "see "}))
    with pytest.raises(ValueError, match="was trained with 100000: another vocabulary"):
        Subject.of(loaded, find("nlvr"))
    del loaded.reading["vocabulary"]
    subject = Subject.of(loaded, find("nlvr"))
    assert (subject.reading.clean, subject.reading.max_tokens, subject.reading.separator) == ("none", 9, True)
    assert subject.tokenizer.vocabulary == len((world / "vocab.txt").read_text().splitlines())
    assert subject.settings["prompt"] == "see " and subject.concepts is None
    black = data.Image(array=np.zeros((40, 60, 3), np.uint8))
    from vlp_data.images import open_image

    pixels = subject.view(open_image(black))
    assert pixels.shape == (3, 32, 32)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([-0.1, -0.2, -0.3]))


def test_what_an_official_file_does_not_say_is_as_published(export):
    subject = Subject.of(models.load(export()), find("retrieval"))
    assert (subject.reading.max_words, subject.reading.max_tokens) == (30, 40)


def test_a_subject_that_lacks_something_is_refused_in_words(export, world):
    loaded = models.load(export(view=None))
    with pytest.raises(ValueError, match="does not say how its images are viewed"):
        Subject.of(loaded, find("retrieval"), name="this")
    loaded = models.load(export(reading=None))
    with pytest.raises(ValueError, match="a model that reads no text, which retrieval needs"):
        Subject.of(loaded, find("retrieval"), name="this")
    loaded = models.load(export(reading={"tokenizer": {"kind": "wordpiece", "files": []}}))
    with pytest.raises(ValueError, match=r"this holds no vocabulary: .* give the files of the vocabulary"):
        Subject.of(loaded, find("retrieval"), name="this")
    subject = Subject.of(loaded, find("retrieval"), tokenizer=[str(world / "vocab.txt")], name="this")
    assert subject.text()[0] is subject.tokenizer


def test_a_benchmark_is_taken_into_a_folder_with_what_the_caller_knows(export, world, tmp_path):
    row = find("retrieval")
    options = row.part("options")(limit=2, rerank=0, figures=1)
    source = source_type("captions")
    task = next(kind for kind in source.__args__ if kind.format == "task_json")
    opened = take.open_data(row, task(files=(f"{world}/shapes_test.json",), root=str(world)).open(), options)
    subject = Subject.of(models.load(export()), row)
    done = take.measure(row, subject, opened, options, tmp_path, settings={"step": 3})
    assert [file.name for file in done.files] == ["retrieval.json", "retrieval.png"]
    assert all(file.is_file() for file in done.files)
    assert next(iter(done.scores.settings)) == "step" and set(row.numbers(done.scores)) <= set(row.names)
    bare = take.measure(row, subject, opened, row.part("options")(rerank=0, figures=0), tmp_path)
    assert [file.name for file in bare.files] == ["retrieval.json"]


class Sizes:
    """A source of images of different sizes."""

    sizes = ((40, 60), (60, 40), (50, 50))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, row):
        width, height = self.sizes[row]
        return data.Sample(key=str(row), images=(data.Image(array=np.full((height, width, 3), 9, np.uint8)),))


def test_views_of_different_sizes_are_padded_in_their_batch_and_others_are_not():
    seen = []

    def look(rows, batch):
        seen.append(batch.images)
        return batch.sizes

    for view in (Detection(size=30, longest=60), Squash(size=16)):
        subject = Subject(model=nn.Identity(), view=evaluation(view))
        sizes = evaluate_rows(subject, Sizes(), 3, look, BenchmarkOptions(), Execution(), what="images")
        assert sizes == [[size] for size in Sizes.sizes]
    padded, squashed = seen
    assert padded.pixels.shape == (3, 3, 45, 45) and squashed.padding is None
    assert padded.padding.sum((1, 2)).tolist() == [45 * 15, 15 * 45, 45 * 45 - 30 * 30]
    assert not padded.pixels[0][:, padded.padding[0]].any()


# --------------------------------------------------------------------------------------------------
# protocols


class Toy:
    """Offers everything that the benchmarks to come ask for."""

    answers = classes = ("cat", "dog")

    def score(self, images, ids, attention_mask):
        return ids.sum(1).float()

    def classify_answers(self, images, ids, attention_mask):
        return torch.zeros(len(images), 2)

    def classify_images(self, images):
        return torch.zeros(len(images), 2)

    def find_objects(self, images):
        count = len(images)
        return SimpleNamespace(
            scores=torch.rand(count, 5),
            classes=torch.zeros(count, 5, dtype=torch.int64),
            boxes=torch.rand(count, 5, 4),
            masks=None,
        )

    def classify_pixels(self, images):
        return torch.zeros(len(images), 2, 4, 4)

    def encode_patches(self, images):
        return torch.zeros(len(images), 8, *(side // 16 for side in images.pixels.shape[2:]))


COMING = {
    protocol.PairScorer: ("score", torch.Size([2])),
    protocol.AnswerClasses: ("classify_answers", torch.Size([2, 2])),
    protocol.ImageClasses: ("classify_images", torch.Size([2, 2])),
    protocol.PixelClasses: ("classify_pixels", torch.Size([2, 2, 4, 4])),
    protocol.DenseFeatures: ("encode_patches", torch.Size([2, 8, 2, 3])),
}


@pytest.mark.parametrize("kind", list(COMING), ids=lambda kind: kind.__name__)
def test_protocols_are_told_apart_by_what_a_model_offers(kind):
    toy, (method, shape) = Toy(), COMING[kind]
    images = Images(torch.zeros(2, 3, 32, 48))
    ids = torch.ones(2, 4, dtype=torch.int64)
    texts = (ids, ids) if method in ("score", "classify_answers") else ()
    assert isinstance(toy, kind) and getattr(toy, method)(images, *texts).shape == shape
    assert not isinstance(nn.Identity(), kind)


def test_objects_may_have_boxes_masks_or_both():
    toy = Toy()
    assert isinstance(toy, protocol.ObjectFinder) and not isinstance(nn.Identity(), protocol.ObjectFinder)
    found: protocol.Objects = toy.find_objects(Images(torch.zeros(2, 3, 32, 32)))
    assert found.boxes is not None and found.boxes.shape == (2, 5, 4) and found.masks is None
