import pytest
import torch
from torch import nn
from vlp_core.heads import MaskedLanguageHead
from vlp_core.text.bert import Bert
from vlp_core.weights import CheckpointError
from vlp_core.weights import bert as bert_weights


class Model(nn.Module):
    def __init__(self, kind: str = "bert", *, fusion: bool = True) -> None:
        super().__init__()
        self.text = Bert(
            kind=kind,
            vocabulary=20,
            width=8,
            layers=4,
            heads=2,
            hidden=12,
            positions=10,
            token_types=1 if kind == "roberta" else 2,
            pad_id=1 if kind == "roberta" else 0,
            fusion_layer=2 if fusion else None,
            image_width=6 if fusion else None,
            norm_eps=1e-5 if kind == "roberta" else 1e-12,
        )
        self.mlm_head = MaskedLanguageHead(width=8, vocabulary=20, norm_eps=self.text.embedding_norm.eps)
        self.other = nn.Linear(2, 2)


def transformers_model(kind: str) -> nn.Module:
    """Hugging Face's model of the same sizes, with random weights."""
    import transformers

    torch.manual_seed(1)
    make, config = {
        "bert": (transformers.BertForMaskedLM, transformers.BertConfig),
        "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig),
    }[kind]
    roberta = kind == "roberta"
    return make(
        config(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=10,
            type_vocab_size=1 if roberta else 2,
            pad_token_id=1 if roberta else 0,
            bos_token_id=0,
            eos_token_id=2,
            layer_norm_eps=1e-5 if roberta else 1e-12,
        )
    ).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_published_weights_give_the_logits_of_transformers(kind):
    theirs = transformers_model(kind)
    model = Model(kind, fusion=False).eval()
    state = theirs.state_dict()
    state[f"{kind}.pooler.dense.weight"] = torch.ones(8, 8)
    loaded = bert_weights.load_published(model, state)
    assert loaded.missing == ()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, theirs.config.pad_token_id, theirs.config.pad_token_id]])
    mask = ids.ne(theirs.config.pad_token_id)
    with torch.no_grad():
        logits = model.mlm_head(model.text.encode(ids, mask), model.text.word_embedding.weight)
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(logits[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_cross_attention_keeps_its_initial_values():
    model = Model()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    loaded = bert_weights.load_published(model, transformers_model("bert").state_dict())
    changed = {key for key, x in model.state_dict().items() if not torch.equal(x, before[key])}
    assert len(loaded.missing) == 2 * 8
    assert all(".cross" in key for key in loaded.missing)
    assert not changed & set(loaded.missing)
    assert "text.layers.3.attention.query_key_value.weight" in changed
    assert not any(key.startswith("other") for key in changed)


def test_names_of_2018_are_read_and_todays_are_written():
    model = Model()
    adapter = bert_weights.language_model_adapter(model.text)
    ours = {key: x for key, x in model.state_dict().items() if not key.startswith("other")}
    today = adapter.to_source(ours)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for key, x in today.items()
    }
    assert old.keys() != today.keys()
    back = adapter.to_ours(old)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    assert not any("gamma" in key for key in today)


def test_a_tied_output_projection_that_differs_is_refused():
    state = dict(transformers_model("bert").state_dict())
    state["cls.predictions.decoder.weight"] = torch.zeros(20, 8)
    with pytest.raises(CheckpointError, match="must be one tensor"):
        bert_weights.load_published(Model(), state)


def test_a_file_without_text_weights_is_refused():
    with pytest.raises(CheckpointError, match="nothing in the state dict belongs"):
        bert_weights.load_published(Model(), {"vision.weight": torch.ones(1)})
