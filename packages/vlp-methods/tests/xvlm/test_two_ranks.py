"""X-VLM retrieval training on two processes: the task's losses and averaged gradients, for both ways back
through the gather."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from vlp_core import models
from vlp_core.models.xvlm import checkpoints as official
from vlp_data.batch import RetrievalBatch
from vlp_methods.xvlm.retrieval import RetrievalTask

WAYS = (("local", 1.0, "grads"), ("local", 0.0, "grads_itc_only"),
        ("sum", 0.0, "grads_itc_only_if_gather_were_fully_differentiable"))  # fmt: skip
"""Way back through the gather, weight of the matching loss, file of the gradients."""


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    work = torch.load(Path(folder) / "work.pt")
    store = dist.FileStore(str(Path(folder) / "store"), work["ranks"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=work["ranks"])
    x = work["inputs"][rank]
    draws = iter([x["neg_image_idx"][:, None], x["neg_text_idx"][:, None]] * len(WAYS))
    torch.multinomial = lambda *_, **__: next(draws)
    batch = RetrievalBatch(
        keys=(), image=x["image"], text_ids=x["text_ids"], attention_mask=x["text_atts"], image_ids=x["idx"]
    )
    found = {}
    for way, matching, file in WAYS:
        model = models.create("xvlm", "retrieval", **work["arguments"])
        official.FILES.load(model, work["weights"], stage="retrieval")
        task = DistributedDataParallel(RetrievalTask(model.eval(), gather_gradient=way))
        losses = task(batch)
        (losses["itc"] + matching * losses["itm"]).backward()
        ours = {key: p.grad for key, p in model.named_parameters()}
        source = official.xvlm_adapter(model).to_source(ours, gradients=True)
        found[file] = {
            "losses": {key: loss.item() for key, loss in losses.items()},
            "norms": {key: gradient.norm().item() for key, gradient in source.items()},
        }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.golden(
    "xvlm", lambda case: case.config.get("world_size", 1) > 1 and case.has("grads_itc_only.json")
)
def test_losses_and_averaged_gradients_equal_the_reference(case, tmp_path):
    config, inputs = case.config, case.tensors("inputs")
    ranks, rows = config["world_size"], config["batch_per_rank"]
    work = {
        "arguments": {
            "vision": official.vision_arguments(
                config["vision"], config["vision_config"], image_size=config["image_res"]
            ),
            "text": official.text_arguments(config["text_config"]),
            "embed_width": config["embed_dim"],
        },
        "weights": case.tensors("weights"),
        "inputs": [
            {
                key: x[rank] if key.startswith("neg_") else x[rank * rows : (rank + 1) * rows]
                for key, x in inputs.items()
            }
            for rank in range(ranks)
        ],
        "ranks": ranks,
    }
    torch.save(work, tmp_path / "work.pt")
    mp.spawn(train, args=(str(tmp_path),), nprocs=ranks)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]

    expected = case.tensors("outputs")
    for rank in range(ranks):
        losses = found[rank]["grads"]["losses"]
        assert losses["itc"] == pytest.approx(expected["loss_itc"][rank].item(), rel=1e-4, abs=1e-5)
        assert losses["itc"] == pytest.approx(expected["loss_itc_single_process"].item(), rel=1e-4, abs=1e-5)
        assert losses["itm"] == pytest.approx(expected["loss_itm"][rank].item(), rel=1e-4, abs=1e-5)
    for _, _, file in WAYS:
        # What the loss does not reach has no gradient in the reference, and one of zero here.
        reference = {key: norm or 0.0 for key, norm in case.json(file).items()}
        for rank in range(ranks):
            assert found[rank][file]["norms"] == pytest.approx(reference, rel=1e-3, abs=1e-6)
