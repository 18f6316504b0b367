"""Whole evaluations with ViCHA's models against ViCHA's own numbers: retrieval, weakly supervised grounding,
questions, statements."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from vlp_core import models
from vlp_core.models.vicha import checkpoints as vicha
from vlp_data import schema as data
from vlp_data.options import ConceptOptions
from vlp_data.text import Encoded, Reading
from vlp_eval import (
    Gallery,
    Subject,
    evaluate_entailment,
    evaluate_nlvr,
    evaluate_retrieval,
    evaluate_vqa,
    evaluate_weak_grounding,
)
from vlp_eval.benchmarks.grounding import WeakGroundingOptions
from vlp_eval.benchmarks.retrieval import RetrievalOptions
from vlp_eval.benchmarks.statements import EntailmentOptions, NlvrOptions
from vlp_eval.benchmarks.vqa import VqaOptions
from vlp_eval.metrics import retrieval as metric
from vlp_eval.vqa import Questions


class Given:
    """Stands for the tokenizer: texts, answers (with separator) and concepts are numbers of rows of the case,
    read as they are there."""

    cls_id, sep_id, pad_id = 2, 3, 0
    end = sep_id

    def __init__(self, inputs):
        self.inputs = inputs

    def encode(self, texts, *, max_tokens=None, separator, pad="longest"):
        rows, name = [int(text) for text in texts], "candidate" if separator else "text"
        return Encoded(self.inputs[f"{name}_ids"][rows], self.inputs[f"{name}_mask"][rows])

    def token_ids(self, text):
        name, row = text[:-1] or "kw", int(text[-1])
        ids, mask = (self.inputs[f"{name}_{part}"][row] for part in ("ids", "mask"))
        return ids[mask == 1].tolist()[1:]

    def frame(self, ids, *, max_tokens, separator):
        assert not separator
        return [self.cls_id, *ids][:max_tokens]

    def pad(self, rows, length=None):
        length = max(map(len, rows)) if length is None else length
        ids = torch.tensor([[*row, *[self.pad_id] * (length - len(row))] for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def shape(bert, **more):
    return {
        "vocabulary": bert["vocab_size"],
        "width": bert["hidden_size"],
        "layers": bert["num_hidden_layers"],
        "heads": bert["num_attention_heads"],
        "hidden": bert["intermediate_size"],
        "positions": bert["max_position_embeddings"],
        "fusion_layer": bert["fusion_layer"],
        **more,
    }


def model_of(case, stage, *, layers=None, **arguments):
    config = case.config
    text = shape(config["bert"])
    model = models.create(
        "vicha",
        stage,
        vision={
            "kind": "vit",
            "image_size": config["image_res"],
            "patch": config["patch_size"],
            "width": config["vision_width"],
            "depth": config["vit_depth"],
            "heads": config["vit_heads"],
            "local_depth": 0,
        },
        text=text if layers is None else {**text, "layers": layers},
        concepts={"layers": config["num_hidden_layers_kw"]},
        **arguments,
    )
    own = vicha.split(case.tensors("weights")).model
    model.load_state_dict(vicha.vicha_adapter(model).to_ours(own))
    return model.eval()


def two_towers(case):
    return model_of(case, "retrieval", embed_width=case.config["embed_dim"])


class Rows:
    """A source in memory whose image n is of grey n, by which `view` finds the tensor of the case."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        return self.samples[row]

    def describe(self):
        return {}


def subject(model, inputs, view, concepts=ConceptOptions()):  # noqa: B008 - frozen
    """The model with texts read as the case has them."""
    return Subject(
        model=model,
        view=view,
        tokenizer=Given(inputs),
        reading=Reading(clean="none"),
        concepts=concepts,
    )


def grey(row, size=(4, 4)):
    return data.Image(array=np.full((size[1], size[0], 3), row, np.uint8))


def view_of(inputs):
    return lambda image: inputs["image"][image.getpixel((0, 0))[0]]


def concept(row):
    return data.Text(text=str(row), role="concept")


@pytest.mark.golden("vicha", lambda case: {"score_i2t", "score_t2i"} <= case.tensor_names("outputs"))
@pytest.mark.filterwarnings("ignore::vlp_eval.metrics.retrieval.TieWarning")
def test_retrieval_equals_vicha(case):
    inputs, outputs, config = case.tensors("inputs"), case.tensors("outputs"), case.config
    owner = {text: int(image) for image, texts in config["img2txt"].items() for text in texts}
    texts, images = len(inputs["text_ids"]), len(inputs["image"])
    gallery = Gallery(
        image=lambda i: inputs["image"][i],
        image_ids=tuple(f"image {i}" for i in range(images)),
        texts=tuple(map(str, range(texts))),
        text_ids=tuple(f"text {j}" for j in range(texts)),
        image_of_text=tuple(owner[j] for j in range(texts)),
        concepts=tuple((str(i),) for i in range(images)),
    )
    how = ConceptOptions(max_tokens=config["kw_pad_len"], pad="max")
    own = subject(two_towers(case), inputs, lambda image: image, how)
    options = RetrievalOptions(rerank=config["k_test"])
    scores = evaluate_retrieval(own, gallery, replace(options, image_batch=2, text_batch=4, pair_batch=3))
    of_text = torch.tensor(gallery.image_of_text)
    text_ranks = metric.text_ranks(outputs["score_i2t"], of_text)
    image_ranks = metric.image_ranks(outputs["score_t2i"], of_text)
    for kind, ranks in (("images", text_ranks), ("texts", image_ranks)):
        assert [one["rank"]["reranked"] for one in scores.samples[kind]] == ranks.tolist()
    dual = metric.text_ranks(outputs["sims_i2t"], of_text)
    assert [one["rank"]["dual"] for one in scores.samples["images"]] == dual.tolist()
    # Beyond the candidates the reference's ranks are those of its sort among equal scores.
    for ours, theirs, size in (("tr", "txt", texts), ("ir", "img", images)):
        for at in (1, 5, 10):
            if at <= config["k_test"] or at >= size:
                assert scores.metrics[f"{ours}_r{at}"] == pytest.approx(config["recall"][f"{theirs}_r{at}"])
    assert evaluate_retrieval(own, gallery, options).results == scores.results


@pytest.mark.golden("vicha", lambda case: {"chosen_box", "gradcam_itc"} <= case.tensor_names("outputs"))
def test_grounding_equals_vicha(case):
    inputs, outputs, config = case.tensors("inputs"), case.tensors("outputs"), case.config
    known = config["grounding_eval"]
    samples = []
    for row, number in enumerate(inputs["ref_id"].tolist()):
        reference = known["Refs"][str(number)]
        image = str(reference["image_id"])
        boxes = [known["refToAnn"][str(number)]["bbox"], *(box[:4] for box in known["dets"][image])]
        samples.append(
            data.Sample(
                key=str(number),
                images=(grey(row, (known["Imgs"][image]["width"], known["Imgs"][image]["height"])),),
                texts=(data.Text(text=str(row), role="expression"), concept(row)),
                regions=tuple(data.Region(box=(x, y, x + w, y + h)) for x, y, w, h in boxes),
                target=data.Target(box=0),
                meta={"split": reference["split"]},
            )
        )
    how = ConceptOptions(max_tokens=config["kw_pad_len"], pad="max")
    own = subject(two_towers(case), inputs, view_of(inputs), how)
    scores = evaluate_weak_grounding(own, Rows(samples), WeakGroundingOptions(layer=config["block_num_itm"]))
    chosen = [one["predicted"] for one in scores.samples["expressions"]]
    np.testing.assert_allclose(chosen, outputs["chosen_box"].numpy(), rtol=1e-5)
    assert {f"{split}_d": value / 100 for split, value in scores.metrics.items() if split != "accuracy"} == (
        config["grounding_accuracy"]
    )
    # The heat of similarity chooses by its own map.
    options = WeakGroundingOptions(mode="itc", layer=config["block_num_itc"], image_batch=3)
    by_similarity = evaluate_weak_grounding(own, Rows(samples), options)
    heat = outputs["gradcam_itc"]
    assert [one["predicted"] for one in by_similarity.samples["expressions"]] == [
        pytest.approx(hottest(heat[row], samples[row], known)) for row in range(len(samples))
    ]


def hottest(heat, sample, known):
    """The detection with the most heat, from the stored map."""
    image = sample.images[0].array
    full = torch.nn.functional.interpolate(heat[None, None], size=image.shape[:2], mode="bicubic")[0, 0]
    found = []
    for region in sample.regions[1:]:
        x0, y0, x1, y1 = region.box
        inside = full[int(y0) : int(y1), int(x0) : int(x1)].sum().item()
        found.append((inside / ((x1 - x0) * (y1 - y0)) ** 0.5, [x0, y0, x1 - x0, y1 - y0]))
    return max(found)[1]


@pytest.mark.golden("vicha", lambda case: {"predicted_answer", "topk_ids"} <= case.tensor_names("outputs"))
def test_answers_equal_vicha(case):
    inputs, outputs, config = case.tensors("inputs"), case.tensors("outputs"), case.config
    bert = config["bert"]
    decoder = shape(bert, layers=bert["num_hidden_layers"] - bert["fusion_layer"])
    del decoder["fusion_layer"]
    questions = len(inputs["image"])
    samples = [
        data.Sample(
            key=str(row),
            images=(grey(row),),
            texts=(data.Text(text=str(row), role="question", id=row), concept(row)),
        )
        for row in range(questions)
    ]
    candidates = list(map(str, range(len(inputs["candidate_ids"]))))
    scores = evaluate_vqa(
        subject(model_of(case, "vqa", decoder=decoder), inputs, view_of(inputs)),
        Questions(source=Rows(samples), answers=candidates),
        VqaOptions(candidates=config["k_test"]),
    )
    answers = [one["answer"] for one in scores.samples["questions"]]
    assert answers == [candidates[number] for number in outputs["predicted_answer"].tolist()]


def statements(case, role, names, concepts):
    """Rows of a case with labels: `names` of the tensors of its images, `concepts` of those of their
    words."""
    inputs = case.tensors("inputs")
    rows = len(inputs["targets"])
    samples = [
        data.Sample(
            key=str(row),
            images=tuple(grey(row + rows * place) for place in range(len(names))),
            texts=(
                data.Text(text=str(row), role=role),
                *(data.Text(text=f"{name}{row}", role="concept", image=n) for n, name in enumerate(concepts)),
            ),
            target=data.Target(label=int(label)),
        )
        for row, label in enumerate(inputs["targets"])
    ]
    tensors = {"image": torch.cat([inputs[name] for name in names])}
    return Rows(samples), view_of(tensors)


@pytest.mark.golden("vicha", lambda case: is_judged(case) and "image" in case.tensor_names("inputs"))
def test_entailment_equals_vicha(case):
    source, view = statements(case, "hypothesis", ["image"], ["kw"])
    own = subject(model_of(case, "entailment"), case.tensors("inputs"), view)
    scores = evaluate_entailment(own, source, EntailmentOptions())
    judged_alike(case, scores, ["contradiction", "neutral", "entailment"])


@pytest.mark.golden("vicha", lambda case: is_judged(case) and "image1" in case.tensor_names("inputs"))
def test_sentences_about_two_images_equal_vicha(case):
    source, view = statements(case, "sentence", ["image0", "image1"], ["kw1", "kw2"])
    bert = case.config["bert"]
    layers = 2 * bert["num_hidden_layers"] - bert["fusion_layer"]
    own = subject(model_of(case, "nlvr", layers=layers), case.tensors("inputs"), view)
    judged_alike(case, evaluate_nlvr(own, source, NlvrOptions()), ["False", "True"])


def is_judged(case):
    return "eval_prediction" in case.tensor_names("outputs")


def judged_alike(case, scores, names):
    logits, labels = case.tensors("outputs")["eval_prediction"], case.tensors("inputs")["targets"]
    given = logits.argmax(1)
    assert [one["predicted"] for one in scores.samples["statements"]] == [names[n] for n in given.tolist()]
    assert scores.metrics["accuracy"] == pytest.approx(100 * (given == labels).float().mean().item())
