import math

import pytest
import torch
import torch.nn.functional as F
from vlp_core.losses import info_nce


def features(rows: int = 6, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, width, generator=generator) for _ in range(2))
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def test_value_of_a_case_worked_by_hand():
    image = text = torch.eye(2)
    loss = info_nce(image, text, image, text, temperature=0.5)
    assert loss.loss.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_distinct_ids_are_the_diagonal():
    image, text = features()
    plain = info_nce(image, text, image, text, temperature=0.07)
    ids = torch.tensor([9, 3, 5, 1, 0, 7])
    with_ids = info_nce(image, text, image, text, temperature=0.07, ids_B=ids, all_ids_G=ids)
    torch.testing.assert_close(plain.loss, with_ids.loss)


def test_repeated_ids_share_the_target_evenly():
    image, text = features(4)
    ids = torch.tensor([0, 0, 1, 2])
    loss = info_nce(image, text, image, text, temperature=0.1, ids_B=ids, all_ids_G=ids)
    logs = (image @ text.t() / 0.1).log_softmax(1)
    rows = [(logs[0, 0] + logs[0, 1]) / 2, (logs[1, 0] + logs[1, 1]) / 2, logs[2, 2], logs[3, 3]]
    torch.testing.assert_close(loss.image_to_text, -torch.stack(rows).mean())


def test_rows_of_two_ranks_average_to_the_whole_batch():
    image, text = features()
    whole = info_nce(image, text, image, text, temperature=0.07)
    parts = [
        info_nce(image[s : s + 3], text[s : s + 3], image, text, temperature=0.07, first=s) for s in (0, 3)
    ]
    torch.testing.assert_close((parts[0].loss + parts[1].loss) / 2, whole.loss)


def test_permuting_the_batch_changes_nothing():
    image, text = features()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    loss = info_nce(image, text, image, text, temperature=0.07).loss
    image, text = image[order], text[order]
    torch.testing.assert_close(info_nce(image, text, image, text, temperature=0.07).loss, loss)


def test_fp32_under_autocast_with_gradient_for_the_temperature():
    image, text = features()
    temperature = torch.tensor(0.07, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(image, text, image, text, temperature=temperature).loss
    torch.testing.assert_close(loss, info_nce(image, text, image, text, temperature=0.07).loss)
    loss.backward()
    assert temperature.grad.isfinite()
    assert temperature.grad != 0


def test_ids_of_one_side_only_are_refused():
    image, text = features()
    with pytest.raises(ValueError, match="ids_B and all_ids_G together"):
        info_nce(image, text, image, text, temperature=1.0, ids_B=torch.arange(6))
