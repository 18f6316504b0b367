"""What goes with a model while it is trained, a momentum teacher and a queue of features: in export folders,
and at the start from a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from vlp_core.momentum import FeatureQueue
from vlp_core.weights import files, loading
from vlp_core.weights.adapter import CheckpointError, groups
from vlp_core.weights.loading import LoadReport

COMPANIONS = ("teacher", "queue")
"""What can stand in `momentum.safetensors` of an export folder, each with its name before those of its
tensors."""

FILE = "momentum.safetensors"


def write(folder: Path, momentum: Mapping[str, nn.Module] | None) -> None:
    """Write teacher and queue into an export folder; None takes away those of an earlier export.

    Raises:
        ValueError: Another key than "teacher" and "queue".
    """
    if unknown := sorted(set(momentum or ()) - set(COMPANIONS)):
        raise ValueError(f"momentum holds {', '.join(unknown)}; it takes {' and '.join(COMPANIONS)}")
    if not momentum:
        (folder / FILE).unlink(missing_ok=True)
        return
    state = {
        f"{part}.{key}": x for part, module in momentum.items() for key, x in module.state_dict().items()
    }
    files.write(folder / FILE, state)


def read(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of "teacher" and "queue" in an export folder; empty where it has none.

    Raises:
        CheckpointError: A file that holds something else.
    """
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in COMPANIONS}
    file = folder / FILE
    state = files.read(file) if file.is_file() else {}
    if foreign := [key for key in state if key.partition(".")[0] not in COMPANIONS]:
        raise CheckpointError(
            f"{file} holds {groups(foreign)}; only {' and '.join(COMPANIONS)} can stand there"
        )
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = tensor
    return parts


def copy_to_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """Give a teacher the values of its model, for checkpoints that hold none."""
    values = model.state_dict()
    teacher.load_state_dict({key: values[key] for key in teacher.state_dict()})


def start_queue(queue: FeatureQueue, state: Mapping[str, Tensor], *, name: str) -> LoadReport:
    """Go on with the features of a checkpoint's queue. Identities that it lacks stay unknown, so that its
    entries match nothing.

    Args:
        queue: Queue to fill.
        state: Tensors of the checkpoint's queue, under our names.
        name: What messages call the checkpoint.

    Raises:
        CheckpointError: A queue of another size.
    """
    if "image" in state and state["image"].shape != queue.image.shape:
        found, own = (" x ".join(map(str, shape)) for shape in (state["image"].shape, queue.image.shape))
        raise CheckpointError(
            f"the queue of {name} holds {found} numbers, that of this run {own}; give both one size, or "
            "begin with an empty queue"
        )
    spare = ("ids",) if queue.ids is None else ()
    return loading.load(
        queue, state, allow_missing=("ids",), allow_unexpected=spare, name=f"the queue of {name}"
    )
