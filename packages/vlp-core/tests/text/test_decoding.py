import pytest
import torch
from vlp_core.text import decoding
from vlp_core.text.bert import Bert


def make(kind: str = "bert", fusion_layer: int = 1, **changes) -> Bert:
    torch.manual_seed(0)
    bert = Bert(
        **{
            "kind": kind,
            "vocabulary": 20,
            "width": 16,
            "layers": 3,
            "heads": 2,
            "hidden": 24,
            "positions": 14,
            "pad_id": 1,
            "fusion_layer": fusion_layer,
            "image_width": 8,
            **changes,
        }
    )
    for parameter in bert.parameters():  # initial values of 0.02 would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return bert.eval()


def inputs(rows: int = 4, images: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(images, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return (
        torch.randint(2, 20, (rows, 7), generator=generator),
        torch.randn(images, 5, 8, generator=generator),
        mask,
    )


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("fusion_layer", [0, 1])
@pytest.mark.parametrize("cuts", [(7,), (3, 1, 1, 2), (1,) * 7])
def test_pieces_give_the_states_of_the_whole_causal_text(kind, fusion_layer, cuts):
    bert = make(kind, fusion_layer)
    ids, images, mask = inputs()
    whole = bert(ids, None, images, image_mask_MS=mask, image_index=torch.tensor([0, 0, 1, 1]), causal=True)
    cache, pieces = decoding.start(bert, images, mask), []
    for piece in ids.split(cuts, dim=1):
        states, cache = decoding.extend(bert, piece, cache)
        pieces.append(states)
    assert cache.tokens == 7
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_gradients_flow_through_the_pieces():
    ids, images, mask = inputs()
    gradients = []
    for step in (7, 2):
        bert = make()
        cache, total = decoding.start(bert, images, mask), torch.zeros(())
        for piece in ids.split(step, dim=1):
            states, cache = decoding.extend(bert, piece, cache)
            total = total + states.pow(3).sum()
        total.backward()
        gradients.append([parameter.grad for parameter in bert.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


def test_selected_and_repeated_rows_continue_the_right_text():
    bert = make()
    ids, images, _ = inputs(2)
    _, cache = decoding.extend(bert, ids[:, :4], decoding.start(bert, images))
    rows = torch.tensor([1, 0, 3, 3])
    text = ids[:, :4].repeat_interleave(2, 0)
    text[1] = text[0].flip(0)
    _, other = decoding.extend(bert, text, decoding.start(bert, images))
    new = torch.tensor([[5], [6], [7], [8]])
    found, _ = decoding.extend(bert, new, other.select(rows))
    index = torch.tensor([0, 0, 1, 1])
    whole = bert(torch.cat([text[rows], new], 1), None, images, image_index=index, causal=True)
    torch.testing.assert_close(found, whole[:, -1:])
    repeated, _ = decoding.extend(bert, new, cache.repeat(2))
    whole = bert(
        torch.cat([ids[:, :4].repeat_interleave(2, 0), new], 1), None, images, image_index=index, causal=True
    )
    torch.testing.assert_close(repeated, whole[:, -1:])


def test_shared_projections_are_used_by_all_layers_that_share_them():
    bert = make(layers_per_image_projection=2)
    ids, images, _ = inputs(2)
    states, _ = decoding.extend(bert, ids, decoding.start(bert, images))
    torch.testing.assert_close(states, bert(ids, None, images, causal=True))


def test_misuse_is_refused():
    bert = make()
    ids, images, _ = inputs(3)
    cache = decoding.start(bert, images)
    with pytest.raises(ValueError, match="3 texts cannot be divided evenly over 2 images"):
        decoding.extend(bert, ids, cache)
    _, full = decoding.extend(bert, ids[:2].repeat(1, 2), cache)
    with pytest.raises(
        ValueError, match="do not fit the position table of 14 rows, whose first position is 14"
    ):
        decoding.extend(bert, ids[:2, :1], full)
    with pytest.raises(ValueError, match="no fusion layers"):
        decoding.start(make(fusion_layer=None, image_width=None), images)
