import pytest
import torch
from vlp_core.losses import (
    answer_loss,
    distilled_language_loss,
    language_loss,
    mean_of_others,
    self_critical_loss,
)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator, dtype=torch.float32).requires_grad_()
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, :3] = labels[1, 4:] = -100
    return logits, labels


def by_hand(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> list[list[torch.Tensor]]:
    rows = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        rows.append([])
        for place in range(len(row_labels) - 1):
            gold = int(row_labels[place + 1])
            if gold != -100:
                target = torch.full((logits.shape[-1],), smoothing / logits.shape[-1])
                target[gold] = 1 - smoothing
                rows[-1].append(-(target * row_logits[place].log_softmax(0)).sum())
    return rows


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_value_and_gradient_are_those_of_the_definition(smoothing):
    logits, labels = example()
    rows = by_hand(logits, labels, smoothing)
    for reduction, expected in (
        ("row", torch.stack([torch.stack(row).sum() for row in rows])),
        ("mean", torch.stack([x for row in rows for x in row]).mean()),
    ):
        found = language_loss(logits, labels, smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        (wanted,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, wanted)


def test_what_is_not_to_be_predicted_gets_no_gradient():
    logits, labels = example()
    language_loss(logits, labels, smoothing=0.1).backward()
    assert (logits.grad[0, :2] == 0).all()
    assert (logits.grad[1, 3:] == 0).all()
    assert (logits.grad[:, -1] == 0).all()
    assert (logits.grad[2, :5] != 0).all()


def test_a_batch_without_labels_gives_zero():
    logits, labels = example()
    loss = language_loss(logits, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_half_precision_is_summed_in_fp32():
    logits, labels = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = language_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, language_loss(logits.bfloat16().float(), labels))


def test_bad_arguments_are_refused():
    logits, labels = example()
    with pytest.raises(ValueError, match=r"labels \[3, 5\] do not belong to logits \[3, 6, 11\]"):
        language_loss(logits, labels[:, 1:])
    with pytest.raises(ValueError, match="reduction='sum' is not known; choose mean or row"):
        language_loss(logits, labels, reduction="sum")
    with pytest.raises(ValueError, match=r"smoothing=1.0 must lie in 0..1"):
        language_loss(logits, labels, smoothing=1.0)


def test_answers_count_by_weight_and_questions():
    loss = answer_loss(torch.tensor([2.0, 4.0, 1.0]), torch.tensor([0.5, 0.25, 1.0]), 2)
    assert loss.item() == pytest.approx((1 + 1 + 1) / 2)
    # An answer in two halves of the weight is one answer.
    halves = answer_loss(torch.tensor([2.0, 4.0, 4.0, 1.0]), torch.tensor([0.5, 0.125, 0.125, 1.0]), 2)
    assert halves.item() == pytest.approx(loss.item())


def test_better_samples_than_the_baseline_become_more_probable():
    log_probability = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    reward = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    self_critical_loss(log_probability, reward, torch.tensor([1.0, 2.0, 2.0])).backward()
    assert log_probability.grad.tolist() == pytest.approx([-2 / 3, 1 / 3, 0.0])
    assert reward.grad is None
    with pytest.raises(ValueError, match="one number per sampled text each"):
        self_critical_loss(log_probability, reward, torch.tensor([1.0]))


def test_baseline_of_a_sample_leaves_itself_out():
    baseline = mean_of_others(torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 30.0]), 3)
    assert baseline.tolist() == pytest.approx([4.0, 3.5, 1.5, 25.0, 20.0, 15.0])
    for rewards, samples in ((4, 1), (5, 2)):
        with pytest.raises(ValueError, match="every image needs that many samples, at least 2"):
            mean_of_others(torch.zeros(rewards), samples)


def test_a_teacher_has_its_share_in_the_loss_of_each_text():
    generator = torch.Generator().manual_seed(0)
    logits, taught = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[1, 3:] = -100
    hard = language_loss(logits, labels, reduction="row")
    torch.testing.assert_close(distilled_language_loss(logits, labels, None, alpha=0.4), hard)
    torch.testing.assert_close(distilled_language_loss(logits, labels, taught, alpha=0.0), hard)
    soft = -(taught[:, :-1].softmax(-1) * logits[:, :-1].log_softmax(-1)).sum(-1)
    soft = (soft * (labels[:, 1:] != -100)).sum(1)
    found = distilled_language_loss(logits, labels, taught.requires_grad_(), alpha=0.4)
    torch.testing.assert_close(found, 0.6 * hard + 0.4 * soft)
    assert not found.requires_grad


def test_distilled_losses_refuse_what_does_not_belong_together():
    logits, labels = torch.randn(3, 5, 7), torch.zeros(3, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels of \[3, 4\] places do not belong to logits of \[3, 5\]"):
        distilled_language_loss(logits, labels[:, 1:], None, alpha=0.0)
    with pytest.raises(ValueError, match=r"teacher_logits of \[2, 5\] places do not belong"):
        distilled_language_loss(logits, labels, logits[:2], alpha=0.4)
