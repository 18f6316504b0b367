import torch
from torch import nn
from vlp_core.heads import MaskedLanguageHead, mlp_head


def test_mlp_head_layers_and_names():
    head = mlp_head(6, 4)
    assert [tuple(p.shape) for p in head.parameters()] == [(12, 6), (12,), (12,), (12,), (4, 12), (4,)]
    assert list(head.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert isinstance(head[1], nn.LayerNorm)


def test_masked_language_head_projects_onto_the_given_embedding():
    head = MaskedLanguageHead(width=6, vocabulary=9)
    embedding = torch.randn(9, 6, requires_grad=True)
    states = torch.randn(2, 3, 6)
    with torch.no_grad():
        head.bias.copy_(torch.arange(9.0))
    logits = head(states, embedding)
    hidden = head.norm(torch.nn.functional.gelu(head.dense(states)))
    torch.testing.assert_close(logits, hidden @ embedding.t() + torch.arange(9.0))
    logits.sum().backward()
    assert embedding.grad.count_nonzero() > 0
