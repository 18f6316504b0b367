"""Self-critical training of captions: rewards, baselines, and what several ranks do."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from vlp_core import models
from vlp_core.images import Images
from vlp_core.text.generation import Sampled
from vlp_data.batch import CaptionReferencesBatch
from vlp_data.schema import Image, Sample, Text
from vlp_data.text import Tokenizer
from vlp_methods.xvlm.captioning import CiderReward, ScstTask
from vlp_methods.xvlm.schema.captioning import Reward

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "picture",
    "of",
    "red",
    "green",
    "dog",
    "cat",
    "runs",
    "sleeps",
]
CAPTIONS = (
    ("A red dog runs.", "a dog runs", "red dog"),
    ("a green cat sleeps", "the cat sleeps", "green cat"),
    ("a red cat", "cat runs", "a cat"),
)


class ImageRows:
    """A source without pixels."""

    def __len__(self) -> int:
        return len(CAPTIONS)

    def __getitem__(self, index: int) -> Sample:
        texts = (
            *(Text(text=text, role="caption") for text in CAPTIONS[index]),
            Text(text="cat", role="concept"),
        )
        return Sample(key=str(index), images=(Image(path="x"),), texts=texts)

    def describe(self) -> dict:
        return {}


def make(folder: Path, *, dropout: float = 0.1, **options) -> ScstTask:
    """A small task with fixed weights."""
    vocabulary = folder / "vocab.txt"
    if not vocabulary.is_file():
        vocabulary.write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    model = models.create(
        "xvlm",
        "captioning",
        vision={
            "kind": "vit",
            "image_size": 32,
            "patch": 16,
            "width": 16,
            "depth": 1,
            "heads": 2,
            "local_depth": 1,
        },
        text={
            "vocabulary": len(WORDS),
            "width": 16,
            "layers": 2,
            "fusion_layer": 1,
            "heads": 2,
            "hidden": 16,
            "positions": 32,
            "dropout": dropout,
            "attention_dropout": dropout,
        },
    )
    reward = CiderReward(ImageRows(), max_words=10)
    tokenizer = Tokenizer.wordpiece(vocabulary)
    return ScstTask(
        model, tokenizer, reward, Reward(**{"samples": 3, "max_tokens": 10, **options}), "a picture of "
    )


def batch(*rows: int) -> CaptionReferencesBatch:
    generator = torch.Generator().manual_seed(rows[0])
    return CaptionReferencesBatch(
        keys=tuple(map(str, rows)),
        image=torch.randn(len(rows), 3, 32, 32, generator=generator),
        references=tuple(CAPTIONS[row] for row in rows),
    )


def test_reward_prefers_what_people_said():
    reward = CiderReward(ImageRows(), max_words=10)
    good, other, nothing = reward(["a red dog runs", "a green cat sleeps", ""], [CAPTIONS[0]] * 3).tolist()
    assert good > other >= nothing
    assert reward.frequency.images == 3
    # Counted over captions alone, cleaned as those of the model are: the concept "cat" and the capital A
    # leave no trace.
    assert reward.frequency.counts[("a", "red", "dog")] == 1
    assert reward.frequency.counts[("cat",)] == 2


def test_caption_is_cut_after_the_prompt(tmp_path):
    task = make(tmp_path)
    ids = torch.tensor([[2, 5, 6, 7, 8, 10, 3, 0]])
    assert task._texts(Sampled(ids, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))) == ["red dog"]


@pytest.mark.parametrize("baseline", ["greedy", "samples"])
def test_loss_is_that_of_the_drawn_captions(tmp_path, monkeypatch, baseline):
    """Texts, rewards and baseline that `forward` used, put together again from the formula."""
    task = make(tmp_path, baseline=baseline).train()
    seen, drawn = [], []
    reward, sample = task.reward, task.model.sample
    task.reward = lambda texts, references: seen.append((texts, references)) or reward(texts, references)
    monkeypatch.setattr(task.model, "sample", lambda *a, **k: drawn.append(sample(*a, **k)) or drawn[-1])
    torch.manual_seed(5)
    loss = task(batch(0, 1))["scst"]
    (texts, references), *rest = seen
    assert [len(texts), len(references)] == [6, 6]
    assert references[:4] == [CAPTIONS[0]] * 3 + [CAPTIONS[1]]
    gained = reward(texts, references)
    if baseline == "greedy":
        ((greedy, own),) = rest
        assert own == [CAPTIONS[0], CAPTIONS[1]]
        base = reward(greedy, own).repeat_interleave(3)
    else:
        assert not rest
        base = (gained.view(2, 3).sum(1, keepdim=True) - gained.view(2, 3)).flatten() / 2
    expected = -(drawn[0].mean_log_probability() * (gained - base)).mean()
    torch.testing.assert_close(loss, expected)
    assert task.model.training
    assert (gained != base).any(), "no caption differs from the baseline, so this shows nothing"
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())  # data parallelism waits for all of them


def test_greedy_baseline_has_no_dropout(tmp_path):
    task = make(tmp_path, dropout=0.5).train()
    image = batch(0, 1, 2).image
    texts = set()
    for seed in range(5):
        torch.manual_seed(seed)
        texts.add(tuple(task._texts(task._greedy(Images(image)))))
    assert len(texts) == 1
    assert task.model.training


def gradients(task, rows, rank: int) -> torch.Tensor:
    torch.manual_seed(100 + rank)
    task(batch(*rows))["scst"].backward()
    found = torch.cat([p.grad.flatten() for p in task.parameters()])
    task.zero_grad()
    return found


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    task = make(Path(folder)).train()
    rows = ((0, 1), (2, 0))[rank]
    alone = gradients(task, rows, rank)
    together = gradients(DistributedDataParallel(task), rows, rank)
    torch.save((alone, together), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_of_two_ranks_are_averaged(tmp_path):
    make(tmp_path)  # writes the vocabulary
    mp.spawn(on_rank, args=(str(tmp_path),), nprocs=2)
    (first, one), (second, two) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, (first + second) / 2)
    assert not torch.allclose(first, second)
