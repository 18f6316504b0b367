import torch
import torch.nn.functional as F
from vlp_core.losses import masked_language_loss


def test_mean_over_the_labels_that_count():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -100, 6], [0, -100, -100]])
    kept = labels != -100
    torch.testing.assert_close(
        masked_language_loss(logits, labels), F.cross_entropy(logits[kept], labels[kept])
    )


def test_nothing_masked_is_zero_with_zero_gradient():
    logits = torch.randn(2, 3, 7).requires_grad_()
    loss = masked_language_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0
    assert logits.grad.count_nonzero() == 0


def test_half_precision_logits_give_an_fp32_loss():
    loss = masked_language_loss(torch.randn(1, 2, 5).bfloat16(), torch.tensor([[1, 2]]))
    assert loss.dtype == torch.float32
