"""The whole of two-stage retrieval with X-VLM's model, against the matrices of X-VLM's evaluation."""

import pytest
import torch
from vlp_core import models
from vlp_core.images import Images
from vlp_core.models.xvlm import checkpoints as xvlm
from vlp_data.text import Reading
from vlp_eval import Subject
from vlp_eval.benchmarks.retrieval import RetrievalOptions
from vlp_eval.gallery import Gallery
from vlp_eval.metrics import retrieval as metric
from vlp_eval.retrieval import evaluate_retrieval, rerank

MATRICES = {"score_i2t", "score_t2i", "sims_i2t"}


def has_matrices(case):
    return case.tensor_names("outputs") >= MATRICES and case.has("weights.safetensors", "inputs.safetensors")


def model_of(case):
    config = case.config
    model = models.create(
        "xvlm",
        "retrieval",
        vision=xvlm.vision_arguments(
            config["vision"], config["vision_config"], image_size=config["image_res"]
        ),
        text=xvlm.text_arguments(config["text_config"]),
        embed_width=config["embed_dim"],
    )
    xvlm.FILES.load(model, case.tensors("weights"), stage="retrieval")
    return model.eval()


@pytest.mark.golden("xvlm", has_matrices)
@torch.no_grad()
def test_similarities_and_match_scores_equal_x_vlm(case):
    model, inputs, outputs, k = (
        model_of(case),
        case.tensors("inputs"),
        case.tensors("outputs"),
        case.config["k_test"],
    )
    image = model.encode_image(Images(inputs["image"]))
    text = model.encode_text(inputs["text_ids"], inputs["text_atts"])
    similarity = image.projection @ text.projection.T
    torch.testing.assert_close(similarity, outputs["sims_i2t"], rtol=1e-4, atol=1e-5)
    of_image, of_text = metric.top(similarity, k), metric.top(similarity.T, k)
    scores_NK, scores_MK = rerank(model, image, text, of_image, of_text, pair_batch=4)
    for scores, candidates, name in ((scores_NK, of_image, "score_i2t"), (scores_MK, of_text, "score_t2i")):
        filled = torch.full_like(outputs[name], -100).scatter(1, candidates, scores)
        torch.testing.assert_close(filled, outputs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.golden("xvlm", has_matrices)
@pytest.mark.filterwarnings("ignore::vlp_eval.metrics.retrieval.TieWarning")
def test_evaluation_equals_x_vlm(case):
    inputs, outputs = case.tensors("inputs"), case.tensors("outputs")
    per_image, k = case.config["captions_per_image"], case.config["k_test"]
    images, texts = len(inputs["image"]), len(inputs["text_ids"])

    class Words:
        """Stands for the tokenizer: the ids of the case, padded as the case has them."""

        def encode(self, words, *, max_tokens, separator, pad):
            rows = [int(word) for word in words]
            return inputs["text_ids"][rows], inputs["text_atts"][rows]

    gallery = Gallery(
        image=lambda i: inputs["image"][i],
        image_ids=tuple(f"image {i}" for i in range(images)),
        texts=tuple(str(j) for j in range(texts)),
        text_ids=tuple(f"text {j}" for j in range(texts)),
        image_of_text=tuple(j // per_image for j in range(texts)),
    )
    subject = Subject(
        model=model_of(case),
        view=lambda image: image,
        tokenizer=Words(),
        reading=Reading(clean="none", max_tokens=40),
    )
    options = RetrievalOptions(rerank=k, image_batch=2, text_batch=3, pair_batch=4)
    scores = evaluate_retrieval(subject, gallery, options)
    of_text = torch.tensor(gallery.image_of_text)
    text_ranks = metric.text_ranks(outputs["score_i2t"], of_text)
    image_ranks = metric.image_ranks(outputs["score_t2i"], of_text)
    assert scores.results["reranked"] == metric.summary(text_ranks, image_ranks)
    assert scores.results["dual"] == metric.summary(
        metric.text_ranks(outputs["sims_i2t"], of_text), metric.image_ranks(outputs["sims_i2t"].T, of_text)
    )
    for kind, ranks in (("images", text_ranks), ("texts", image_ranks)):
        assert [one["rank"]["reranked"] for one in scores.samples[kind]] == ranks.tolist()
    # The reference's own recall, where its sort has no say: within the candidates, or over the whole gallery.
    for ours, theirs, gallery_size in (("tr", "txt", texts), ("ir", "img", images)):
        for at in (1, 5, 10):
            if at <= k or at >= gallery_size:
                want = outputs[f"metric_{theirs}_r{at}"].item()
                assert scores.metrics[f"{ours}_r{at}"] == pytest.approx(want, abs=1e-6)
