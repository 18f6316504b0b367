"""Models of the tasks beside the reference: equal results by other ways, and what is refused."""

import pytest
import torch
from torch import nn
from vlp_core import models
from vlp_core.images import Images
from vlp_core.losses import self_critical_loss
from vlp_core.models.fusion.nlvr import assign, assignment_weights

VISION = {"kind": "vit", "image_size": 32, "patch": 16, "width": 8, "depth": 1, "heads": 2, "local_depth": 0}
TEXT = {
    "vocabulary": 30,
    "width": 16,
    "layers": 4,
    "heads": 2,
    "hidden": 24,
    "positions": 16,
    "fusion_layer": 2,
}
START, END = 2, 3


def make(name: str, std: float = 0.4, **arguments) -> nn.Module:
    torch.manual_seed(0)
    model = models.create("xvlm", name, vision=VISION, text=TEXT, **arguments).eval()
    for parameter in model.parameters():  # initial values of 0.02 would hide mistakes
        nn.init.normal_(parameter, std=std)
    return model


def questions() -> tuple[torch.Tensor, torch.Tensor]:
    states = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return states, mask


def answers(number: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 30, (number, 6), generator=generator)
    lengths = torch.randint(3, 7, (number,), generator=generator)
    place = torch.arange(6)
    ids[:, 0] = START
    ids = ids.masked_fill(place == lengths[:, None] - 1, END).masked_fill(place >= lengths[:, None], 0)
    return ids, (place < lengths[:, None]).long()


def vqa() -> nn.Module:
    return make("vqa", decoder={**TEXT, "layers": 2, "fusion_layer": 0})


@pytest.mark.parametrize("k", [1, 5, 12])
def test_ranking_equals_running_the_decoder_on_every_pair(k):
    model, (states, mask), (ids, real) = vqa(), questions(), answers()
    everything = torch.arange(3).repeat_interleave(12)
    logits = model.answer(states, mask, ids.repeat(3, 1), real.repeat(3, 1), everything)
    logs = logits[:, :-1].log_softmax(-1).gather(2, ids.repeat(3, 1)[:, 1:, None])[..., 0]
    logs = (logs * real.repeat(3, 1)[:, 1:]).view(3, 12, 5)
    found = model.rank_answers(states, mask, ids, real, k, pairs=7)
    for question in range(3):
        chosen = logs[question, :, 0].topk(k).indices
        scores = (logs[question, :, 0] + logs[question].sum(1))[chosen].softmax(0)
        order = scores.argsort(descending=True)
        torch.testing.assert_close(found.scores[question], scores[order], rtol=1e-4, atol=1e-6)
        assert found.indices[question].tolist() == chosen[order].tolist()


def test_padding_of_questions_and_candidates_changes_no_rank():
    model, (states, mask), (ids, real) = vqa(), questions(), answers()
    plain = model.rank_answers(states, mask, ids, real, 5)
    wider = [torch.nn.functional.pad(x, (0, 3), value=0) for x in (mask, ids, real)]
    longer = torch.cat([states, torch.randn(3, 3, 16)], 1)
    found = model.rank_answers(longer, *wider, 5)
    assert torch.equal(found.indices, plain.indices)
    torch.testing.assert_close(found.scores, plain.scores)


def test_candidates_of_one_token_are_ranked_by_it():
    model, (states, mask), (ids, real) = vqa(), questions(), answers()
    found = model.rank_answers(states, mask, ids[:, :2], real[:, :2], 4)
    start = model.answer(states, mask, ids[:1, :1].expand(3, 1), mask[:, :1], torch.arange(3))[:, 0]
    twice = 2 * start.log_softmax(1)[:, ids[:, 1]]
    torch.testing.assert_close(found.scores, twice.topk(4).values.softmax(1))
    torch.testing.assert_close(twice.gather(1, found.indices), twice.topk(4).values)


def test_candidates_that_cannot_be_ranked_are_refused():
    model, (states, mask), (ids, real) = vqa(), questions(), answers()
    for k in (0, 13):
        with pytest.raises(ValueError, match=f"k={k} must lie between 1 and the number of candidates, 12"):
            model.rank_answers(states, mask, ids, real, k)
    with pytest.raises(ValueError, match="needs a start token and at least one more"):
        model.rank_answers(states, mask, ids[:, :1], real[:, :1], 3)
    ids[4, 0] = 9
    with pytest.raises(ValueError, match="begin with the same start token"):
        model.rank_answers(states, mask, ids, real, 3)


def test_written_answers_score_what_the_decoder_says():
    model, (states, mask) = vqa(), questions()
    found = model.generate_answers(states, mask, start_id=START, end_id=END, beams=4, max_tokens=8)
    assert (found.ids[:, 0] == START).all()
    for row, ids in enumerate(found.ids):
        length = int((ids == END).nonzero()[0, 0]) if (ids == END).any() else len(ids)
        given = ids[None, : length + 1]
        one = slice(row, row + 1)
        logits = model.answer(states[one], mask[one], given, torch.ones_like(given), torch.tensor([0]))
        logs = logits[0, :-1].log_softmax(-1).gather(1, given[0, 1:, None])
        assert found.score[row].item() == pytest.approx(logs.sum().item() / length, rel=1e-4)


def test_captions_drawn_carry_the_gradient_of_the_whole_text():
    model = make("captioning")
    with torch.no_grad():
        model.lm_head.bias[END] += (
            4  # texts shall end by themselves, so that every token drawn stands in the ids
        )
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    prompt = torch.tensor([[START, 7, 8], [START, 9, 5]])
    generator = torch.Generator().manual_seed(4)
    drawn = model.sample(
        model.vision(image), prompt, samples=3, max_tokens=16, end_id=END, generator=generator
    )
    assert torch.equal(drawn.ids[:, :3], prompt.repeat_interleave(3, 0))
    assert len(drawn.ids.unique(dim=0)) > 3
    assert drawn.ids.shape[1] < 16
    reward = torch.randn(6, generator=generator)
    self_critical_loss(drawn.mean_log_probability(), reward, torch.zeros(6)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    logits = model(Images(image), drawn.ids, torch.ones_like(drawn.ids), torch.arange(2).repeat_interleave(3))
    logs = logits[:, 2:-1].log_softmax(-1).gather(2, drawn.ids[:, 3:, None])[..., 0]
    torch.testing.assert_close(logs * drawn.drawn, drawn.log_probabilities * drawn.drawn)
    mean = (logs * drawn.drawn).sum(1) / drawn.drawn.sum(1)
    self_critical_loss(mean, reward, torch.zeros(6)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert found["vision.class_token"].abs().sum() > 0


def test_greedy_captions_are_samples_without_chance():
    model = make("captioning")
    embeds = model.vision(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
    prompt = torch.tensor([[START, 7]]).expand(2, -1)
    greedy = model.greedy(embeds, prompt, max_tokens=9, end_id=END)
    cold = model.sample(embeds, prompt, temperature=1e-4, max_tokens=9, end_id=END)
    assert torch.equal(greedy.ids, cold.ids)
    one = model.generate(embeds, prompt, beams=1, max_tokens=9, min_tokens=0, end_id=END)
    for row in range(2):  # a greedy text has the end token forced into its last place
        assert one.ids[row, :8].tolist() == greedy.ids[row, :8].tolist()


def test_assignment_of_the_domain_stage():
    """Shares of the labels, own images where they belong, no image of the text among the others."""
    model = make("nlvr_domain", embed_width=6)
    embeds = model.vision(torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
    own = torch.arange(5)
    generator, counts = torch.Generator().manual_seed(5), torch.zeros(3)
    for _ in range(600):
        found = model.assignment_pairs(embeds, generator=generator)
        counts += torch.bincount(found.labels, minlength=3)
        assert (found.first != found.second).all()
        assert torch.equal(found.first == own, found.labels == 0)
        assert torch.equal(found.second == own, found.labels == 1)
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.03
    assert embeds.requires_grad and not model.project(embeds).requires_grad


def test_other_images_are_drawn_by_likeness():
    features = torch.nn.functional.normalize(
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=1
    )
    weights = assignment_weights(features)
    assert (weights.diagonal() == 0).all()
    similarity = (features @ features.t()).fill_diagonal_(-2.0)
    assert torch.equal(weights.argmax(1), similarity.argmax(1))
    assert assignment_weights(features * torch.nan).multinomial(2).shape == (4, 2)
    with pytest.raises(ValueError, match="a batch of 2 images has no two others for each"):
        assignment_weights(features[:2])


def test_uniform_numbers_decide_as_in_the_reference():
    picked = torch.tensor([[1, 2], [2, 3], [3, 0]])
    pairs = assign(
        picked,
        pair_uniform_B=torch.tensor([0.34, 0.9, 0.33]),
        order_uniform_B=torch.tensor([0.51, 0.5, 0.9]),
    )
    assert pairs.labels.tolist() == [0, 1, 2]
    assert pairs.first.tolist() == [0, 2, 3]
    assert pairs.second.tolist() == [1, 1, 0]


def test_order_of_the_two_images_matters_and_rows_stay_apart():
    model = make("nlvr")
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    ids = torch.randint(4, 30, (2, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    first, second = torch.tensor([0, 1]), torch.tensor([2, 3])
    images = Images(image)
    logits = model([images], first, second, ids, mask)
    assert not torch.allclose(logits, model([images], second, first, ids, mask), atol=1e-3)
    alone = model(
        [images.rows(torch.tensor([1, 3]))], torch.tensor([0]), torch.tensor([1]), ids[1:], mask[1:]
    )
    torch.testing.assert_close(alone, logits[1:])


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'stage'"):
        make("nlvr", stage="domain")
    with pytest.raises(TypeError, match="unexpected keyword argument 'embed_width'"):
        make("nlvr", embed_width=6)
    with pytest.raises(ValueError, match="image_width=5 does not fit the image encoder's width 16"):
        make("vqa", decoder={**TEXT, "layers": 2, "fusion_layer": 0, "image_width": 5})
