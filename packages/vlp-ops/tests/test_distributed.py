"""Losses over gathered features in real process groups, against the reference's numbers per rank."""

import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from vlp_ops import clip_loss, gather_features, siglip_loss


def run(rank: int, ranks: int, rendezvous: str, program, arguments, queue) -> None:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=60),
        )
        queue.put((rank, program(rank, ranks, *arguments)))
        # Nobody leaves while another rank still talks to it.
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, traceback.format_exc()))


@pytest.fixture
def over_ranks(tmp_path):
    """Runs program(rank, ranks, *arguments) in as many processes; returns what each gave, by rank."""

    def start(program, ranks: int, *arguments):
        context = mp.get_context("spawn")
        queue = context.SimpleQueue()
        processes = [
            context.Process(
                target=run, args=(rank, ranks, str(tmp_path / "store"), program, arguments, queue)
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        found = dict(queue.get() for _ in processes)
        for process in processes:
            process.join()
        for result in found.values():
            assert not isinstance(result, str), result
        return [found[rank] for rank in range(ranks)]

    return start


def losses_of_rank(rank: int, ranks: int, inputs: dict[str, list], local_rows: int) -> dict[str, list]:
    """Every variant of the reference on this rank: loss and gradients, as lists (queues of tensors need
    shared memory)."""
    inputs = {name: torch.tensor(values) for name, values in inputs.items()}
    own = slice(rank * local_rows, (rank + 1) * local_rows)
    found = {}

    def record(name, loss, leaves):
        loss.backward()
        found[f"{name}.loss"] = [loss.item()]
        for leaf_name, leaf in leaves.items():
            found[f"{name}.grad_{leaf_name}"] = leaf.grad.tolist()

    for gradient in (False, True):
        names = ("image", "text")
        leaves = {name: inputs[name][own].clone().requires_grad_() for name in names}
        leaves["logit_scale"] = inputs["logit_scale"].clone().requires_grad_()
        image, text, scale = leaves.values()
        mode = "sum" if gradient else "none"
        everything = [gather_features(tensor, gather_grad=mode) for tensor in (image, text)]
        loss = clip_loss(
            image,
            text,
            scale,
            all_image=everything[0],
            all_text=everything[1],
            labels_offset=rank * local_rows,
        )
        record(f"clip_local1_gradgather{int(gradient)}", loss, leaves)
        leaves = {name: inputs[name][own].clone().requires_grad_() for name in names}
        leaves["logit_scale"] = inputs["logit_scale"].clone().requires_grad_()
        image, text, scale = leaves.values()
        gathered = []
        for tensor in (image, text):
            rows = gather_features(tensor, gather_grad=mode)
            # Without gradient through the gather the reference puts its own rows back in, so that they keep
            # theirs.
            gathered.append(rows if gradient else torch.cat([rows[: own.start], tensor, rows[own.stop :]]))
        record(f"clip_local0_gradgather{int(gradient)}", clip_loss(*gathered, scale), leaves)
    leaves = {name: inputs[name][own].clone().requires_grad_() for name in ("image", "text")}
    leaves |= {name: inputs[name].clone().requires_grad_() for name in ("logit_scale", "logit_bias")}
    image, text, scale, bias = leaves.values()
    loss = siglip_loss(image, gather_features(text), scale, bias, labels_offset=rank * local_rows)
    record("siglip", loss, leaves)
    return found


def is_distributed(case) -> bool:
    return {"world_size", "per_rank_batch"} <= set(case.config) and {"image", "text"} <= case.tensor_names(
        "inputs"
    )


@pytest.mark.golden("memclip", is_distributed)
def test_losses_over_ranks(case, over_ranks, close):
    ranks, rows = case.config["world_size"], case.config["per_rank_batch"]
    inputs = {name: tensor.tolist() for name, tensor in case.tensors("inputs").items()}
    outputs = case.tensors("outputs")
    for rank, found in enumerate(over_ranks(losses_of_rank, ranks, inputs, rows)):
        for name, values in found.items():
            variants = (
                [name]
                if name.startswith("clip")
                else [
                    name.replace("siglip", f"siglip_{way}") for way in ("bidir", "shift", "reduce", "gather")
                ]
            )
            for variant in variants:
                expected = outputs[f"rank{rank}.{variant}"]
                actual = torch.tensor(values).view(expected.shape)
                # A single number that nearly cancels has no better than float32's error of its terms.
                close.gradient(
                    actual, expected, f"rank {rank} {variant}", 1e-4 if expected.numel() == 1 else 2e-5
                )


def gathered_gradients(rank: int, ranks: int) -> list:
    results = []
    for mode in ("sum", "local", "none"):
        rows = torch.full((2, 3), float(rank)).requires_grad_()
        everything = gather_features(rows, gather_grad=mode)
        weights = torch.arange(float(ranks * 2))[:, None] * (rank + 1)
        grad = torch.autograd.grad((everything * weights).sum() + 0 * rows.sum(), rows)[0]
        results.append((everything.tolist(), grad.tolist()))
    return results


def test_what_flows_back_through_a_gather(over_ranks):
    for rank, (everything, local, none) in enumerate(over_ranks(gathered_gradients, 2)):
        assert everything[0] == local[0] == none[0] == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        own = [2.0 * rank, 2.0 * rank + 1]
        assert everything[1] == [[3 * place] * 3 for place in own]
        assert local[1] == [[(rank + 1) * place] * 3 for place in own]
        assert none[1] == [[0.0] * 3] * 2


def test_gather_without_a_process_group():
    rows = torch.randn(2, 3, requires_grad=True)
    assert gather_features(rows) is rows
    assert not gather_features(rows, gather_grad="none").requires_grad
    with pytest.raises(ValueError, match="gather_grad must be 'sum', 'local' or 'none', got 'all'"):
        gather_features(rows, gather_grad="all")
