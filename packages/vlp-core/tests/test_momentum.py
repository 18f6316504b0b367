import pytest
import torch
from torch import nn
from vlp_core.momentum import FeatureQueue, WeightAverage, follow, teacher_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.head = nn.Linear(2, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.register_buffer("counter", torch.zeros(()))


def test_a_teacher_follows_what_it_has_and_learns_nothing_itself():
    model = Model()
    teacher = teacher_of(model, without=("head", "temperature", "absent"))
    assert set(dict(teacher.named_parameters())) == {"body.weight", "body.bias"}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.body.weight.data_ptr() != model.body.weight.data_ptr()
    before = teacher.body.weight.clone()
    with torch.no_grad():
        model.body.weight.add_(1.0)
        model.counter.add_(1.0)
    follow(teacher, model, 0.9)
    torch.testing.assert_close(teacher.body.weight, before + 0.1)
    assert teacher.counter == 0
    follow(teacher, model, 0.0)
    assert torch.equal(teacher.body.weight, model.body.weight)
    with pytest.raises(ValueError, match=r"momentum=1\.5 must lie in 0\.\.1"):
        follow(teacher, model, 1.5)


def test_a_queue_goes_round_at_its_end():
    queue = FeatureQueue(5, 2)
    assert torch.allclose(queue.image.norm(dim=1), torch.ones(5))
    for start in (0, 3, 6):
        rows = torch.arange(start, start + 3).float()[:, None].expand(3, 2)
        queue.put(rows, -rows)
    assert queue.image[:, 0].tolist() == [5, 6, 7, 8, 4]
    assert torch.equal(queue.text, -queue.image)
    assert queue.pointer == 4
    assert queue.ids is None and set(queue.state_dict()) == {"image", "text", "pointer"}


def test_a_queue_with_identities_keeps_them_beside_the_features():
    queue = FeatureQueue(3, 2, identities=True)
    assert queue.ids.tolist() == [-100] * 3
    queue.put(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([4, 9]))
    assert queue.ids.tolist() == [4, 9, -100]
    with pytest.raises(ValueError, match="identities go with a queue"):
        queue.put(torch.zeros(1, 2), torch.zeros(1, 2))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 pairs of all ranks do not fit a queue of 3"):
        FeatureQueue(3, 2).put(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="size=0 holds nothing"):
        FeatureQueue(0, 2)


def test_a_queue_survives_a_state_dict():
    queue, other = FeatureQueue(4, 2, identities=True), FeatureQueue(4, 2, identities=True)
    queue.put(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([1, 2, 3]))
    other.load_state_dict(queue.state_dict())
    for one in (queue, other):
        one.put(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([4, 5]))
    assert all(torch.equal(a, b) for a, b in zip(queue.buffers(), other.buffers(), strict=True))


def test_average_of_weights_follows_and_gives_back_what_was_there():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = WeightAverage(dict(model.named_parameters()), decay=0.9, warmup=False)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update()
    own = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), 0.9 * first + 0.1 * own)
    assert torch.equal(model.weight.detach(), own)
    again = WeightAverage(dict(model.named_parameters()), decay=0.9)
    again.load(average.tensors, 1)
    assert torch.equal(again.tensors["weight"], average.tensors["weight"])
    again.load(None, 1)
    assert torch.equal(again.tensors["weight"], own)
    with pytest.raises(ValueError, match="not on both sides: bias"):
        again.load({"weight": own}, 1)


def test_warmup_of_the_average_forgets_the_first_weights():
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(dict(model.named_parameters()), decay=0.99)
    with torch.no_grad():
        model.weight.fill_(0.0)
        average.tensors["weight"].fill_(1.0)
    average.update()
    assert average.tensors["weight"].item() == pytest.approx(2 / 11)
    for _ in range(2000):
        average.update()
    before = average.tensors["weight"].item()
    average.update()
    assert average.tensors["weight"].item() == pytest.approx(0.99 * before)


def test_an_average_of_nothing_does_nothing():
    average = WeightAverage({})
    average.update()
    with average.applied():
        pass
    assert (average.updates, average.tensors) == (0, {})
