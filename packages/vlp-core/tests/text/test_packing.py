import pytest
import torch
from vlp_core.text.bert import Bert
from vlp_core.text.packing import Packing, pack, spread, unpack

# Padding at the end, at the start and in between; the last column is never used.
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
# What `Bert` allows: the first token is always real.
TEXTS = MASK[[0, 1, 3]]


def encoder(**changes) -> Bert:
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 4, "heads": 2, "hidden": 24, "fusion_layer": 2, "image_width": 10}
    return Bert(
        **{
            "vocabulary": 30,
            "positions": 12,
            "pad_id": 1,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            **sizes,
            **changes,
        }
    ).double()


def test_packed_tokens_return_to_their_places():
    packing = Packing.of(MASK)
    x = torch.randn(4, 6, 3)
    packed = pack(x, packing)
    assert torch.equal(packed, x[MASK.bool()])
    expected = x * MASK[..., None]
    assert torch.equal(unpack(packed, packing), expected)
    rows = spread(packed, packing)
    assert torch.equal(rows, expected[:, :5])  # no longer than the longest text
    assert torch.equal(pack(rows, packing), packed)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3), torch.zeros(2, 3, device="meta")])
def test_nothing_is_packed_without_padding_or_on_an_accelerator(mask):
    assert Packing.of(mask) is None
    x = torch.randn(2, 3, 4)
    assert all(function(x, None) is x for function in (pack, spread, unpack))


def test_nothing_is_packed_under_compilation():
    def packs(mask):
        return torch.tensor(Packing.of(mask) is not None)

    assert packs(MASK)
    assert not torch.compile(packs, backend="eager", fullgraph=True)(MASK)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("turns", [None, "one", "two"])
def test_skipping_padding_changes_no_real_state_and_no_gradient(kind, causal, turns):
    ids = torch.randint(2, 30, TEXTS.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.where(TEXTS.bool(), ids, 1)
    pool = torch.randn(4, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pool_mask = torch.tensor([5, 3, 1, 4])[:, None] > torch.arange(5)
    first = torch.tensor([2, 0, 3])
    index = {None: None, "one": first, "two": (first, first - 1 + 4 * first.eq(0))}[turns]
    if index is None:
        pool, pool_mask = pool[:3], pool_mask[:3]
    found = []
    for skip in (False, True):
        text = encoder(kind=kind)
        image = pool.clone().requires_grad_()
        states = text(
            ids,
            TEXTS,
            image,
            image_mask_MS=pool_mask,
            image_index=index,
            causal=causal,
            skip_padding=skip,
        )
        assert skip != bool(states[~TEXTS.bool()].any())
        states[TEXTS.bool()].sin().sum().backward()
        gradients = {name: p.grad for name, p in text.named_parameters()}
        found.append({"states": states[TEXTS.bool()], "image": image.grad, **gradients})
    for name, expected in found[0].items():
        torch.testing.assert_close(
            found[1][name], expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_reading_positions_of_packed_texts_equals_gathering_them_with_gradients():
    ids = torch.randint(2, 30, TEXTS.shape, generator=torch.Generator().manual_seed(1))
    pool = torch.randn(2, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([1, 1, 0])
    read = (torch.zeros(1, 1, dtype=torch.long), torch.tensor([[3, 0], [1, 4]]))
    found = []
    for packed in (False, True):
        text = encoder()
        states = text.encode(ids, TEXTS, skip_padding=packed)
        if packed:
            groups = text.fuse_and_read(states, TEXTS, pool, read, image_index=index)
        else:
            full = text.fuse(states, TEXTS, pool, image_index=index)
            groups = full[:1, :1], torch.stack([full[1, [3, 0]], full[2, [1, 4]]])
        sum(group.sin().sum() for group in groups).backward()
        found.append((*groups, *(p.grad for p in text.parameters())))
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


def test_packed_texts_run_under_autocast():
    text = encoder().float()
    ids, pool = torch.randint(2, 30, TEXTS.shape), torch.randn(3, 5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full, packed = (text(ids, TEXTS, pool, skip_padding=skip) for skip in (False, True))
    packed.sum().backward()
    assert packed.dtype == full.dtype
    torch.testing.assert_close(packed[TEXTS.bool()], full[TEXTS.bool()], rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in text.parameters() if p.grad is not None)
