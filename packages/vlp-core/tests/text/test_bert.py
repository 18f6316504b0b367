import pytest
import torch
from torch import nn
from vlp_core.heads import MaskedLanguageHead
from vlp_core.losses import masked_language_loss
from vlp_core.text.bert import Bert, take_positions
from vlp_core.weights import bert as bert_weights

SIZES = {
    "vocabulary": 30,
    "width": 16,
    "layers": 4,
    "heads": 2,
    "hidden": 24,
    "positions": 12,
    "fusion_layer": 2,
    "image_width": 10,
}


def encoder(**changes) -> Bert:
    torch.manual_seed(0)
    return Bert(**{**SIZES, **changes}).eval()


def is_text_case(case) -> bool:
    """Outputs of an encoder alone: no images, image states as inputs."""
    return {"text_ids", "image_embeds", "image_embeds2"} <= case.tensor_names("inputs")


def from_official(text_config) -> nn.ModuleDict:
    c = text_config
    text = Bert(
        kind=c["model_type"],
        vocabulary=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        positions=c["max_position_embeddings"],
        token_types=c["type_vocab_size"],
        pad_id=c["pad_token_id"],
        fusion_layer=c["fusion_layer"],
        image_width=c["encoder_width"],
        dropout=c["hidden_dropout_prob"],
        attention_dropout=c["attention_probs_dropout_prob"],
        norm_eps=c["layer_norm_eps"],
    )
    head = MaskedLanguageHead(width=text.width, vocabulary=c["vocab_size"], norm_eps=c["layer_norm_eps"])
    return nn.ModuleDict({"text": text, "mlm_head": head})


@pytest.mark.golden("xvlm", is_text_case)
def test_all_modes_and_gradients_equal_the_reference(case):
    inputs, expected = case.tensors("inputs"), case.tensors("outputs")
    model = from_official(case.config["text_config"])
    text = model["text"]
    adapter = bert_weights.language_model_adapter(text)
    model.load_state_dict(adapter.to_ours(case.tensors("weights")))
    ids, mask = inputs["text_ids"], inputs["text_atts"]
    image, image_mask = inputs["image_embeds"], inputs["image_atts"]
    rows = torch.arange(len(ids))

    states = text.encode(ids, mask)
    found = {
        "text": states,
        "fusion": text.fuse(states, mask, image, image_mask_MS=image_mask),
        "multi_modal": text(ids, mask, image, image_mask_MS=image_mask),
        "multi_modal_two_images": text(
            ids,
            mask,
            torch.cat([image, inputs["image_embeds2"]]),
            image_mask_MS=torch.cat([image_mask, image_mask]),
            image_index=(rows, len(rows) + rows),
        ),
        "causal": text(ids, mask, image, image_mask_MS=image_mask, causal=True),
    }
    (masked,) = text.fuse_and_read(
        text.encode(inputs["text_ids_masked"], mask),
        mask,
        image,
        (inputs["masked_pos"],),
        image_mask_MS=image_mask,
    )
    found["mlm_logits"] = model["mlm_head"](masked, text.word_embedding.weight)
    found["loss_total"] = masked_language_loss(found["mlm_logits"], inputs["masked_ids"])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )

    found["loss_total"].backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {key: g.norm().item() for key, g in adapter.to_source(ours, gradients=True).items()}
    reference = {key: norm for key, norm in case.json("grads").items() if norm is not None}
    assert norms == pytest.approx(reference, rel=1e-3, abs=1e-6)


@pytest.mark.golden("xvlm", is_text_case)
def test_reference_weights_survive_the_round_trip(case):
    weights = case.tensors("weights")
    model = from_official(case.config["text_config"])
    adapter = bert_weights.language_model_adapter(model["text"])
    model.load_state_dict(adapter.to_ours(weights))
    back = adapter.to_source(model.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_padding_changes_nothing(kind):
    text = encoder(kind=kind, pad_id=1)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    padded = torch.cat([ids, torch.ones(2, 2, dtype=torch.long)], dim=1)
    mask = (torch.arange(5) < 3).expand(2, 5)
    image = torch.randn(2, 4, 10)
    torch.testing.assert_close(text(padded, mask, image)[:, :3], text(ids, None, image))


def test_roberta_positions_follow_real_tokens_only():
    text = encoder(kind="roberta", pad_id=1)
    left = torch.tensor([[1, 1, 5, 6]])
    right = torch.tensor([[5, 6, 1, 1]])
    torch.testing.assert_close(text.embed(left)[:, 2:], text.embed(right)[:, :2])


def test_hidden_image_tokens_do_not_matter():
    text = encoder()
    ids = torch.tensor([[5, 6, 7]])
    image = torch.randn(1, 4, 10)
    mask = torch.tensor([[1, 1, 0, 0]])
    torch.testing.assert_close(text(ids, None, image, image_mask_MS=mask), text(ids, None, image[:, :2]))


def test_rows_share_the_images_of_a_pool():
    text = encoder()
    ids = torch.randint(2, 30, (5, 6))
    pool, index = torch.randn(3, 4, 10), torch.tensor([2, 0, 0, 1, 2])
    pool_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]])
    pooled = text(ids, None, pool, image_mask_MS=pool_mask, image_index=index)
    torch.testing.assert_close(pooled, text(ids, None, pool[index], image_mask_MS=pool_mask[index]))


def test_reading_positions_equals_gathering_them():
    text = encoder()
    ids, image = torch.randint(2, 30, (5, 6)), torch.randn(2, 4, 10)
    mask = torch.tensor([6, 5, 4, 6, 2])[:, None] > torch.arange(6)
    index = torch.tensor([0, 1, 1, 0, 1])
    states = text.encode(ids, mask)
    first = torch.zeros(3, 1, dtype=torch.long)
    some = torch.tensor([[1, 4], [0, 0]])
    full = text.fuse(states, mask, image, image_index=index)
    read = text.fuse_and_read(states, mask, image, (first, some), image_index=index)
    torch.testing.assert_close(read[0], full[:3, :1])
    torch.testing.assert_close(read[1], take_positions(full[3:], some))


def test_causal_states_ignore_later_tokens():
    text = encoder()
    ids, image = torch.randint(2, 30, (1, 6)), torch.randn(1, 4, 10)
    changed = ids.clone()
    changed[0, 4] = 1 + ids[0, 4] % 28
    before, after = (text(x, None, image, causal=True) for x in (ids, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_shared_projections_equal_two_layers_with_equal_weights():
    shared = encoder(layers=6, layers_per_image_projection=2)
    plain = encoder(layers=6)
    state = shared.state_dict()
    for layer in (3, 5):
        for part in ("weight", "bias"):
            state[f"layers.{layer}.cross.key_value.{part}"] = state[
                f"layers.{layer - 1}.cross.key_value.{part}"
            ]
    plain.load_state_dict(state)
    ids, pool = torch.randint(2, 30, (2, 5)), torch.randn(4, 3, 10)
    turns = (torch.tensor([0, 1]), torch.tensor([2, 3]))
    torch.testing.assert_close(
        shared(ids, None, pool, image_index=turns), plain(ids, None, pool, image_index=turns)
    )


def test_dropout_is_on_in_training_only():
    text = encoder(dropout=0.5, attention_dropout=0.5)
    ids, image = torch.randint(2, 30, (2, 5)), torch.randn(2, 3, 10)
    assert torch.equal(text(ids, None, image), text(ids, None, image))
    text.train()
    assert not torch.equal(text(ids, None, image), text(ids, None, image))


def test_initial_values():
    text = encoder(vocabulary=2000, width=64, hidden=256, image_width=64)
    assert text.word_embedding.weight[0].count_nonzero() == 0
    assert text.word_embedding.weight[1:].std().item() == pytest.approx(0.02, rel=0.05)
    assert text.layers[0].expand.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert text.layers[0].expand.bias.count_nonzero() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width=16 must be a multiple of heads=3"),
        ({"image_width": None}, "give both for an encoder that attends to images"),
        ({"fusion_layer": 5}, "fusion_layer=5 must lie between 0 and layers=4"),
        ({"layers": 5, "layers_per_image_projection": 2}, "3 fusion layers cannot share"),
        ({"kind": "gpt"}, "choose bert or roberta"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        encoder(**changes)


@pytest.mark.parametrize(("kind", "tokens"), [("bert", 13), ("roberta", 11)])
def test_too_long_text_is_refused(kind, tokens):
    text = encoder(kind=kind, pad_id=1)
    text.encode(torch.full((1, tokens - 1), 5), None)
    with pytest.raises(ValueError, match=rf"{tokens} tokens do not fit the position table of 12 rows"):
        text.encode(torch.full((1, tokens), 5), None)


def test_groups_that_do_not_cover_the_rows_are_refused():
    text = encoder()
    states = text.encode(torch.ones(3, 4, dtype=torch.long), None)
    with pytest.raises(ValueError, match=r"the groups to read have \[2\] rows, the states 3"):
        text.fuse_and_read(states, None, torch.randn(3, 2, 10), (torch.zeros(2, 1, dtype=torch.long),))


def test_fusing_without_fusion_layers_is_refused():
    text = encoder(fusion_layer=None, image_width=None)
    with pytest.raises(ValueError, match="no fusion layers"):
        text(torch.ones(1, 3, dtype=torch.long), None, torch.ones(1, 2, 10))
