"""X-VLM retrieval training on two processes: losses and averaged gradients, for both ways back through the
gather."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from vlp_core import models
from vlp_core.images import Images
from vlp_core.losses import Negatives
from vlp_core.models.xvlm import checkpoints as xvlm
from vlp_core.models.xvlm.losses import retrieval_losses


class Training(torch.nn.Module):
    """What a task does: model and losses behind one forward, so that DDP sees it."""

    def __init__(self, model: torch.nn.Module, gather_gradient: str, *, only_contrast: bool) -> None:
        super().__init__()
        self.model = model
        self.gather_gradient = gather_gradient
        self.only_contrast = only_contrast

    def forward(self, inputs: dict) -> dict[str, torch.Tensor]:
        pairs = self.model.pair(
            Images(inputs["image"]),
            inputs["text_ids"],
            inputs["text_atts"],
            identities_B=inputs["idx"],
            negatives=Negatives(inputs["neg_image_idx"], inputs["neg_text_idx"]),
        )
        losses = retrieval_losses(
            pairs,
            self.model.temperature,
            identities_B=inputs["idx"],
            gather_gradient=self.gather_gradient,
        )
        if self.only_contrast:
            # DDP waits for a gradient of every parameter.
            losses["itm"] = losses["itm"].detach() + 0.0 * sum(p.sum() for p in self.model.parameters())
        return losses


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    work = torch.load(Path(folder) / "work.pt")
    ranks = work["ranks"]
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found = {}
    for way, only_contrast in (("local", False), ("local", True), ("sum", True)):
        model = models.create("xvlm", work["stage"], **work["arguments"])
        xvlm.FILES.load(model, work["weights"], stage=work["stage"])
        task = DistributedDataParallel(Training(model.eval(), way, only_contrast=only_contrast))
        losses = task(work["inputs"][rank])
        sum(losses.values()).backward()
        ours = {key: p.grad for key, p in model.named_parameters()}
        source = xvlm.xvlm_adapter(model).to_source(ours, gradients=True)
        found[f"{way} {only_contrast}"] = {
            "losses": {key: loss.item() for key, loss in losses.items()},
            "norms": {key: gradient.norm().item() for key, gradient in source.items()},
        }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.golden(
    "xvlm", lambda case: case.config.get("world_size", 1) > 1 and case.has("grads_itc_only.json")
)
def test_losses_and_averaged_gradients_equal_the_reference(case, golden_arguments, tmp_path):
    config, inputs = case.config, case.tensors("inputs")
    ranks, rows = config["world_size"], config["batch_per_rank"]
    stage, arguments = golden_arguments(config)
    per_rank = [
        {
            key: x[rank] if key.startswith("neg_") else x[rank * rows : (rank + 1) * rows]
            for key, x in inputs.items()
        }
        for rank in range(ranks)
    ]
    work = {
        "stage": stage,
        "arguments": arguments,
        "weights": case.tensors("weights"),
        "inputs": per_rank,
        "ranks": ranks,
    }
    torch.save(work, tmp_path / "work.pt")
    mp.spawn(train, args=(str(tmp_path),), nprocs=ranks)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]

    expected = case.tensors("outputs")
    for rank in range(ranks):
        losses = found[rank]["local False"]["losses"]
        assert losses["itc"] == pytest.approx(expected["loss_itc"][rank].item(), rel=1e-4, abs=1e-5)
        assert losses["itc"] == pytest.approx(expected["loss_itc_single_process"].item(), rel=1e-4, abs=1e-5)
        assert losses["itm"] == pytest.approx(expected["loss_itm"][rank].item(), rel=1e-4, abs=1e-5)
    files = {
        "local False": "grads",
        "local True": "grads_itc_only",
        "sum True": "grads_itc_only_if_gather_were_fully_differentiable",
    }
    for way, file in files.items():
        # What the loss does not reach has no gradient in the reference, and one of zero here.
        reference = {key: norm or 0.0 for key, norm in case.json(file).items()}
        for rank in range(ranks):
            assert found[rank][way]["norms"] == pytest.approx(reference, rel=1e-3, abs=1e-6)
