import pytest
import torch
import torch.nn.functional as F
from vlp_core.losses import matching_loss, negative_weights, sample_negatives


def features(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(rows, 8, generator=generator) for _ in range(2))
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def test_weights_are_softmax_plus_a_little_without_the_pair_itself():
    image, text = features()
    image_weights, text_weights = negative_weights(image, text, temperature=0.1)
    expected = (image @ text.t() / 0.1).softmax(1) + 1e-5
    torch.testing.assert_close(text_weights, expected.fill_diagonal_(0))
    expected = (text @ image.t() / 0.1).softmax(1) + 1e-5
    torch.testing.assert_close(image_weights, expected.fill_diagonal_(0))


def test_weights_carry_no_gradient():
    image, text = features()
    image.requires_grad_()
    assert not any(w.requires_grad for w in negative_weights(image, text, temperature=0.1))


def test_pairs_of_equal_id_are_never_drawn():
    image, text = features()
    ids = torch.tensor([0, 0, 1, 0, 1])
    weights = negative_weights(image, text, temperature=0.1, ids_B=ids)
    same = ids[:, None] == ids[None, :]
    for part in weights:
        assert torch.equal(part == 0, same)
    for seed in range(20):
        drawn = sample_negatives(*weights, generator=torch.Generator().manual_seed(seed))
        assert (ids[drawn.image] != ids).all()
        assert (ids[drawn.text] != ids).all()


def test_one_id_for_all_falls_back_to_every_other_row():
    image, text = features()
    for part in negative_weights(image, text, temperature=0.1, ids_B=torch.zeros(5)):
        assert torch.equal(part, 1 - torch.eye(5))


def test_draws_follow_the_weights():
    weights = torch.tensor([[0.0, 0.75, 0.25]]).expand(8000, 3)
    drawn = sample_negatives(weights, weights, generator=torch.Generator().manual_seed(0))
    for part in drawn:
        share = part.bincount(minlength=3) / len(part)
        torch.testing.assert_close(share, weights[0], rtol=0, atol=0.02)


def test_nan_features_can_still_be_drawn_from():
    image, text = features()
    weights = negative_weights(image.fill_(torch.nan), text, temperature=0.1)
    drawn = sample_negatives(*weights)
    assert (drawn.image != torch.arange(5)).all()


def test_a_single_pair_is_refused():
    image, text = features(1)
    with pytest.raises(ValueError, match="at least 2 pairs per rank"):
        negative_weights(image, text, temperature=0.1)


def test_loss_takes_the_first_rows_as_matches():
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0], [3.0, 0.0]])
    expected = F.cross_entropy(logits, torch.tensor([1, 0, 0]))
    torch.testing.assert_close(matching_loss(logits, 1), expected)
