import itertools
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vlp_core import distributed, optim
from vlp_core.losses import info_nce
from vlp_methods.engine.gradients import in_one, pieces
from vlp_methods.engine.job import FrozenFrom, Job, Mixing
from vlp_methods.engine.optimizers import make_optimizer

from toy_method.schema import Fit

WIDTH = 6


@dataclass(frozen=True)
class Batch:
    x: Tensor
    y: Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: Any) -> "Batch":
        return Batch(self.x.to(device), self.y.to(device), self.keys)

    def split(self, parts: int) -> "list[Batch]":
        sizes = [len(range(part, len(self), parts)) for part in range(parts)]
        keys = iter(self.keys)
        return [
            Batch(x, y, tuple(itertools.islice(keys, len(x))))
            for x, y in zip(self.x.split(sizes), self.y.split(sizes), strict=True)
        ]


class States(NamedTuple):
    hidden: Tensor
    nothing: None = None


class Stream:
    """In-memory stand-in of vlp_data.loader.Loader: order and samples are pure functions of (seed, epoch,
    index)."""

    def __init__(self, name: str, recipe: Fit) -> None:
        self.name, self.recipe, self.position = name, recipe, 0
        self.length, self.global_batch = recipe.data.samples, recipe.data.batch

    def sample(self, position: int) -> tuple[Tensor, Tensor, str]:
        epoch, place = divmod(position, self.recipe.data.samples)
        order = list(range(self.recipe.data.samples))
        random.Random(f"{self.name} {self.recipe.seed} {epoch}").shuffle(order)
        index = order[place]
        generator = torch.Generator().manual_seed(
            hash((self.recipe.seed, index, self.name == "images")) % (1 << 60)
        )
        x = torch.randn(WIDTH, generator=generator)
        noise = torch.randn(1, generator=torch.Generator().manual_seed(1000 * epoch + index))
        return x, x.sum().sin() + 0.01 * noise, f"{self.name}-{index}"

    def __iter__(self) -> Iterator[Batch]:
        total, world = self.recipe.data.batch, distributed.world_size()
        each = total // world
        while True:
            first = self.position + distributed.rank() * each
            rows = [self.sample(first + i) for i in range(each)]
            self.position += total
            x, y, keys = zip(*rows, strict=True)
            yield Batch(torch.stack(x), torch.stack(y), keys)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Task(nn.Module):
    def __init__(self, recipe: Fit) -> None:
        super().__init__()
        self.recipe = recipe
        self.body = nn.Sequential(
            nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(recipe.dropout), nn.Linear(16, WIDTH)
        )
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, 1)
        self.tied = nn.Linear(WIDTH, 1)
        self.tied.weight = self.out.weight
        self.momentum = nn.Linear(WIDTH, 1).requires_grad_(False)
        self.momentum.load_state_dict(self.out.state_dict())
        self.boxes = nn.Linear(WIDTH, 1) if recipe.boxes else None
        if recipe.contrast:
            self.temperature = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def before_forward(self, step: int) -> None:
        time.sleep(self.recipe.faults.sleep)
        with torch.no_grad():
            self.out.bias.clamp_(-5, 5)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return in_one(self, batch)

    def encode(self, batch: Batch) -> States:
        return States(self.head(self.body(batch.x)))

    def objective(self, states: States, parts: Sequence[Batch]) -> Iterator[dict[str, Tensor]]:
        for piece in pieces(map(len, parts)):
            losses = self.fit(states.hidden[piece.rows], parts[piece.number])
            yield {name: loss * piece.share for name, loss in losses.items()}
        if self.recipe.contrast:
            first, second = (F.normalize(half, dim=1) for half in states.hidden.chunk(2, 1))
            loss = info_nce(
                first,
                second,
                distributed.gather(first, "sum"),
                distributed.gather(second, "sum"),
                temperature=self.temperature,
                first=distributed.rank() * len(first),
            ).loss
            yield {"contrast": self.recipe.contrast * loss}

    def fit(self, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        faults = self.recipe.faults
        fit = (self.out(hidden) - batch.y).square().mean()
        with torch.no_grad():
            target = self.momentum(hidden) + self.queue.mean()
        agree = 0.1 * (self.tied(hidden) - target).square().mean()
        if faults.nan_key in batch.keys:
            fit = fit * float("nan")
        if faults.nan_gradient_key in batch.keys:
            fit = fit + (hidden * 0).abs().sum().sqrt()  # 0, with an infinite slope times 0
        if faults.wrong_step in batch.keys:
            raise ValueError("shapes do not fit")
        losses = {"fit": fit, "agree": agree}
        if self.boxes is not None and batch.keys[0].startswith("regions"):
            losses["boxes"] = (self.boxes(hidden) - batch.y).abs().mean()
        return losses

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        self.momentum.weight.lerp_(self.out.weight, 0.1)
        self.queue = torch.roll(self.queue, 1)
        self.queue[0] = self.momentum.weight.mean()
        self.updates += 1
        if (
            os.environ.get("TOY_STOP_AFTER") == str(step + 1)
            and distributed.rank() == distributed.world_size() - 1
        ):
            os.kill(os.getpid(), signal.Signals[os.environ.get("TOY_SIGNAL", "SIGTERM")])


def build(recipe: Fit) -> Job:
    if recipe.faults.missing_file:
        raise FileNotFoundError("images.json not found; make it with `toy images`")
    if recipe.faults.crash:
        raise RuntimeError("a bug")
    if recipe.faults.bad_value:
        raise ValueError("width=7 must be even")
    task = Task(recipe)
    rules = [
        optim.ParameterRule(pattern="bias", decay=False),
        optim.ParameterRule(pattern="^head", lr_scale=2.0),
    ]
    frozen_from = ()
    if recipe.frozen_file:
        task.body.load_state_dict(load_file(recipe.frozen_file))
        task.body.requires_grad_(False)
        frozen_from = (FrozenFrom(prefix="body.", file=Path(recipe.frozen_file)),)
        rules[0] = optim.ParameterRule(pattern="out.bias", decay=False)
    optimizer = make_optimizer(task, recipe.optimizer, rules)
    if recipe.lost:
        task.lost = nn.Parameter(torch.zeros(1))

    def evaluate(task: nn.Module, step: int, folder: Any) -> dict[str, float]:
        assert not task.training
        assert not torch.is_grad_enabled()
        faults = recipe.faults
        broken = faults.evaluation_from is not None and os.environ.get("TOY_FIXED") != "1"
        if broken and step >= faults.evaluation_from:
            raise RuntimeError("the benchmark is broken")
        deadline = time.monotonic() + faults.slow_evaluation
        if faults.slow_evaluation:
            (Path.cwd() / f"evaluating-{distributed.rank()}").touch()
        while time.monotonic() < deadline:
            time.sleep(0.01)
        x = torch.linspace(-1, 1, WIDTH)[None]
        torch.rand(3)  # an evaluation may use randomness; training must not notice
        return {
            "output": float(task.out(task.head(task.body(x)))),
            "step": float(step),
            "peak": -abs(step - 6.0),
            **({"score": recipe.score[min(step - 1, len(recipe.score) - 1)]} if recipe.score else {}),
        }

    def test(export: Any, device: torch.device, folder: Any) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        return {"test/updates": float(json.loads((export / "config.json").read_text())["updates"])}

    def export(folder: Any) -> None:
        save_file({"out.weight": task.out.weight.detach().cpu().clone()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"updates": int(task.updates)}))

    return Job(
        task=task,
        streams=lambda: {name: Stream(name, recipe) for name in ("regions", "images")},
        mixing=Mixing((("regions", recipe.regions), ("images", 1.0))),
        optimizer=optimizer,
        frozen_from=frozen_from,
        unused={"images": tuple(task.boxes.parameters())} if task.boxes is not None else {},
        evaluate=evaluate,
        export=export,
        test=test if recipe.tested else None,
    )
