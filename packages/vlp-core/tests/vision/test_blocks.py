"""Stochastic depth and other modules in place of the feed-forward, for both plain ViTs."""

import pytest
import torch
from torch import Tensor, nn
from vlp_core.vision import ClipVisionTransformer, VisionTransformer
from vlp_core.vision.layers import Block, drop_path_rates

SIZE = {"image_size": 32, "patch": 8, "width": 24, "depth": 3, "heads": 3, "local_depth": 2}
KINDS = {
    "vit": lambda **changes: VisionTransformer(**SIZE | changes),
    "clip": lambda **changes: ClipVisionTransformer(**SIZE, hidden=32, **changes),
}


class Memory(nn.Module):
    """A stand-in for a memory layer: knows when it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Linear(24, 24)
        nn.init.constant_(self.values.weight, 0.01)
        nn.init.constant_(self.values.bias, 3.0)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.values(x)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make(kind: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind](**changes)


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_depth_rises_to_the_last_block_and_acts_in_training_only(kind):
    model = make(kind, drop_path=0.6)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.3, 0.6])
    plain = make(kind)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(model.eval()(images()), plain(images()))
    model.train()
    torch.manual_seed(1)
    first = model(images(16))
    torch.manual_seed(1)
    assert torch.equal(model(images(16)), first)
    assert not torch.equal(model(images(16)), first)


def test_both_branches_are_dropped_and_scaled():
    torch.manual_seed(0)
    block = Block(width=8, heads=2, hidden=16, activation="gelu", eps=1e-6, drop_path=0.5)
    x = torch.randn(64, 5, 8)
    found = block(x)
    whole = x + 2 * block.attention(block.attention_norm(x))
    kinds = [
        x,
        whole,
        x + 2 * block.mlp(block.mlp_norm(x)),
        whole + 2 * block.mlp(block.mlp_norm(whole)),
    ]
    counts = [0] * 4
    for row in range(64):
        fits = [torch.allclose(found[row], kind[row], atol=1e-5) for kind in kinds]
        assert sum(fits) == 1
        counts[fits.index(True)] += 1
    assert min(counts) > 5


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_outside_zero_to_one_are_refused(rate):
    with pytest.raises(ValueError, match=f"drop_path={rate} must be at least 0 and less than 1"):
        drop_path_rates(rate, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_module_stands_in_the_chosen_block_with_its_own_weights(kind):
    model, plain = make(kind, mlps={1: Memory}), make(kind)
    assert [isinstance(block.mlp, Memory) for block in model.blocks] == [False, True, False]
    changed = {key for key in model.state_dict() if key.startswith("blocks.1.mlp.")}
    assert changed == {"blocks.1.mlp.values.weight", "blocks.1.mlp.values.bias"}
    rest = {key for key in plain.state_dict() if not key.startswith("blocks.1.mlp.")}
    assert rest == model.state_dict().keys() - changed
    assert bool((model.blocks[1].mlp.values.weight == 0.01).all())
    assert bool((model.blocks[1].mlp.values.bias == 3.0).all())
    # The other blocks are initialised as ever.
    assert 0 < float(model.blocks[0].mlp.up.weight.detach().std()) < 0.3
    assert bool((model.blocks[0].mlp.up.bias == 0).all())
    assert not torch.allclose(model(images()), plain(images()))
    assert model.blocks[1].mlp.rows == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_regions_pass_a_given_module(kind):
    """It stands in a local block: the rows of texts and of images both go through it."""
    model, index = make(kind, mlps={2: Memory}), torch.tensor([1, 0, 1])
    mask = torch.ones(3, model.tokens)
    found = model.forward_regions(images(), index, mask)
    assert model.blocks[2].mlp.rows == [3, 2]
    torch.testing.assert_close(found.image_embeds, model(images())[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_not_there_are_refused(kind):
    with pytest.raises(ValueError, match=r"mlps name blocks \[-1, 3\], which are none of 0\.\.2"):
        make(kind, mlps={3: Memory, -1: Memory})
