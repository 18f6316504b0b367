"""Text encoders of transformers, from tiny folders made on the spot."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from vlp_core.text import Bert, TransformersText, create_text

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[3, 7, 9, 2, 49, 0], [3, 8, 49, 0, 0, 0], [3, 5, 6, 7, 8, 9]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


def config(kind: str, **changes):
    makers = {
        "bert": lambda: transformers.BertConfig(vocab_size=50, **SMALL, max_position_embeddings=8, **changes),
        "roberta": lambda: transformers.RobertaConfig(
            vocab_size=50, **SMALL, max_position_embeddings=10, pad_token_id=1, **changes
        ),
        "clip": lambda: transformers.CLIPConfig(
            text_config={
                **SMALL,
                "vocab_size": 50,
                "max_position_embeddings": 8,
                "bos_token_id": 3,
                "eos_token_id": 49,
                **changes,
            },
            vision_config={**SMALL, "image_size": 32, "patch_size": 16},
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, **changes
        ),
    }
    return makers[kind]()


@pytest.fixture
def folder(tmp_path, request):
    """A folder with weights, and the model of transformers that wrote it."""
    made = config(request.param)
    torch.manual_seed(0)
    model = {
        "bert": transformers.BertForMaskedLM,
        "roberta": transformers.RobertaModel,
        "clip": transformers.CLIPModel,
        "t5": transformers.T5ForConditionalGeneration,
    }[request.param](made).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def states(model: nn.Module, ids, mask):
    """What the model of transformers says."""
    match model:
        case transformers.BertForMaskedLM():
            model = model.bert
        case transformers.CLIPModel():
            model = model.text_model
        case transformers.T5ForConditionalGeneration():
            model = model.encoder
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("folder", ["bert", "roberta", "clip", "t5"], indirect=True)
def test_states_are_those_of_transformers_and_come_back_from_the_config(folder):
    path, theirs = folder
    ours = create_text("transformers", path=str(path)).eval()
    assert (ours.width, ours.vocabulary) == (16, 50)
    expected = states(theirs, IDS, MASK)
    assert_close(ours.encode(IDS, MASK), expected)
    assert_close(ours(IDS, MASK), expected[:, 0])
    again = TransformersText(config=json.loads(json.dumps(ours.config))).eval()
    assert not torch.allclose(again.encode(IDS, MASK), expected, atol=1e-3)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.encode(IDS, MASK), ours.encode(IDS, MASK))
    fresh = TransformersText(path=path, weights=False)
    assert fresh.state_dict().keys() == ours.state_dict().keys()
    assert not torch.allclose(fresh.eval().encode(IDS, MASK), expected, atol=1e-3)


@pytest.mark.parametrize("folder", ["bert", "roberta", "clip"], indirect=True)
def test_every_parameter_gets_a_gradient(folder):
    text = TransformersText(path=folder[0], pool="last")
    assert text.training
    text(IDS, MASK).square().sum().backward()
    assert not [name for name, p in text.named_parameters() if p.grad is None]


@pytest.mark.parametrize("folder", ["clip"], indirect=True)
def test_the_pooled_state_is_the_chosen_one(folder):
    path, theirs = folder
    expected = states(theirs, IDS, MASK)
    for pool, places in (("first", [0, 0, 0]), ("last", [4, 2, 5]), ("end", [4, 2, 5])):
        found = TransformersText(path=path, pool=pool).eval()(IDS, MASK)
        assert_close(found, expected[torch.arange(3), places])
    # The first end token, not a later one; a cut text is read at its last token.
    twice = torch.tensor([[3, 2, 7, 2, 49, 0]])
    text = TransformersText(path=path, pool="end", end_id=2).eval()
    assert_close(text(twice, MASK[:1]), text.encode(twice, MASK[:1])[:, 1])
    pooled = theirs.text_model(input_ids=IDS[:2], attention_mask=MASK[:2]).pooler_output
    assert_close(TransformersText(path=path, pool="end").eval()(IDS[:2], MASK[:2]), pooled)


def test_the_end_token_of_old_clip_configs_is_the_last_of_the_vocabulary():
    settings = config("clip", eos_token_id=2).text_config.to_dict()
    assert TransformersText(config=settings, pool="end").end_id == 49


@pytest.mark.parametrize(("kind", "longest"), [("bert", 8), ("roberta", 8), ("clip", 8), ("t5", None)])
def test_texts_longer_than_the_position_table_are_refused(kind, longest):
    text = TransformersText(config=config(kind).to_dict()).eval()
    assert text.positions == longest
    ids = torch.full((1, 9), 5)
    if longest is None:
        assert text.encode(ids, torch.ones_like(ids)).shape == (1, 9, 16)
        return
    assert text.encode(ids[:, :8], torch.ones(1, 8, dtype=torch.long)).shape == (1, 8, 16)
    with pytest.raises(ValueError, match="texts of 9 tokens do not fit 8 positions; lower max_tokens"):
        text.encode(ids, torch.ones_like(ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "made from path or from config: give one of them"),
        ({"path": "nowhere"}, r"nowhere is no folder of transformers: it holds no config\.json"),
        ({"config": {}}, "has no model_type"),
        ({"config": {"model_type": "bertie"}}, "knows no model type 'bertie'"),
        ({"config": {"model_type": "vit", "hidden_size": 16}}, "model type vit encodes no texts"),
        ({"config": {"model_type": "bart"}}, "makes no text encoder of model type 'bart'"),
        ({"pool": "mean", "config": {"model_type": "bert"}}, "pool='mean' is not known; choose first, last"),
        ({"end_id": 3, "config": {"model_type": "bert"}}, "end_id=3 belongs to pool=end, but pool is first"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_text("transformers", **arguments)


def test_an_end_token_must_be_known():
    with pytest.raises(ValueError, match=r"pool=end needs an end token, .* give end_id"):
        TransformersText(config=config("bert", eos_token_id=None).to_dict(), pool="end")


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_weights_that_are_not_there_are_refused(folder):
    path, _ = folder
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(
        ValueError, match=r"lacks 16 of the weights that its config\.json asks for, such as encoder\.layer"
    ):
        TransformersText(path=path)
    (path / "config.json").write_text(json.dumps(settings | {"vocab_size": 60}))
    with pytest.raises(
        ValueError,
        match=r"word_embeddings\.weight in .* has shape \[50, 16\], but its config\.json asks for \[60, 16\]",
    ):
        TransformersText(path=path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights .*say weights=false for fresh ones"):
        TransformersText(path=path)


def test_transformers_is_imported_only_when_one_is_made():
    code = (
        "import sys, vlp_core.text\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try: vlp_core.text.TransformersText(config={'model_type': 'bert'})\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = "text kind transformers needs transformers: pip install 'vlp-core[transformers]'"
    assert done.stdout.strip() == expected


def test_kinds_are_known_by_name():
    small = {"vocabulary": 9, "width": 8, "layers": 1, "heads": 2, "hidden": 8, "positions": 8}
    assert isinstance(create_text(**small), Bert)
    assert create_text("roberta", **small).kind == "roberta"
    with pytest.raises(
        ValueError, match="text kind 'gpt' is not known; choose bert, roberta or transformers"
    ):
        create_text("gpt")
