"""Written text on two processes: ranks write texts of different lengths, yet gradients are those of one
process on the whole batch."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from vlp_core import models
from vlp_core.images import Images
from vlp_core.losses import answer_loss, language_loss, self_critical_loss

END = 3


def make(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    vision = {
        "kind": "vit",
        "image_size": 32,
        "patch": 16,
        "width": 8,
        "depth": 1,
        "heads": 2,
        "local_depth": 0,
    }
    text = {
        "vocabulary": 30,
        "width": 16,
        "layers": 4,
        "heads": 2,
        "hidden": 24,
        "positions": 16,
        "fusion_layer": 2,
    }
    if name == "vqa":
        arguments["decoder"] = {**text, "layers": 2, "fusion_layer": 0}
    model = models.create("xvlm", name, vision=vision, text=text, **arguments).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.6)
    return model


class SelfCritical(nn.Module):
    """Texts are written inside the forward that DDP wraps; calling the model behind it would leave gradients
    apart."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make("captioning")
        with torch.no_grad():
            self.model.lm_head.bias[END] += 2

    def forward(self, image: Tensor, prompt: Tensor, reward: Tensor) -> tuple[Tensor, int]:
        written = self.model.greedy(self.model.vision(image), prompt, max_tokens=12, end_id=END)
        loss = self_critical_loss(written.mean_log_probability(), reward, torch.zeros_like(reward))
        return loss, written.ids.shape[1]


class Answers(nn.Module):
    """Ranks have equally many questions, but not answers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make("vqa")

    def forward(self, image: Tensor, ids: Tensor, answers: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        logits = self.model(
            Images(image), ids, torch.ones_like(ids), answers, torch.ones_like(answers), index
        )
        return answer_loss(language_loss(logits, answers, reduction="row"), weights, len(image))


def captions() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    prompt = torch.tensor([[2, 14], [2, 5], [2, 15], [2, 16]])
    return torch.randn(4, 3, 32, 32, generator=generator), prompt, torch.randn(4, generator=generator)


def answers() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    image, ids = (
        torch.randn(4, 3, 32, 32, generator=generator),
        torch.randint(4, 30, (4, 5), generator=generator),
    )
    texts, index = torch.randint(4, 30, (5, 4), generator=generator), torch.tensor([0, 0, 0, 1, 1])
    weights = torch.rand(5, generator=generator)
    return [
        (image[:2], ids[:2], texts[:4], index[:4], weights[:4]),
        (image[2:], ids[2:], texts[4:], index[4:], weights[4:]),
    ]


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    batch = torch.load(f"{folder}/batch.pt")
    critical = DistributedDataParallel(SelfCritical())
    loss, length = critical(*(part[2 * rank : 2 * rank + 2] for part in batch["captions"]))
    loss.backward()
    vqa = DistributedDataParallel(Answers())
    vqa(*batch["answers"][rank]).backward()
    found = {
        "length": length,
        "captions": {name: p.grad for name, p in critical.module.named_parameters()},
        "answers": {name: p.grad for name, p in vqa.module.named_parameters()},
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_of_written_text_are_those_of_the_whole_batch(tmp_path):
    batch = {"captions": captions(), "answers": answers()}
    torch.save(batch, tmp_path / "batch.pt")
    mp.spawn(train, (str(tmp_path),), nprocs=2)
    found = [torch.load(Path(tmp_path) / f"{rank}.pt") for rank in range(2)]
    assert found[0]["length"] != found[1]["length"], "the ranks should write texts of different lengths"

    critical = SelfCritical()
    critical(*batch["captions"])[0].backward()
    vqa = Answers()
    (sum(vqa(*part) for part in batch["answers"]) / 2).backward()
    for name, task in (("captions", critical), ("answers", vqa)):
        for key, parameter in task.named_parameters():
            for rank in range(2):
                torch.testing.assert_close(found[rank][name][key], parameter.grad, rtol=1e-4, atol=1e-6)
