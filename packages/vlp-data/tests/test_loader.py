"""The loader: same batches whatever the workers, exact positions, dirty data, faults that do not hang."""

import json
import logging
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from vlp_data.cli import main
from vlp_data.errors import BadSample, DataError, WorkerLost
from vlp_data.examples import ImageTextExamples, RegionExamples
from vlp_data.loader import ATTEMPTS, TOLERATED_BAD_SAMPLES, Loader
from vlp_data.options import ImageTextLines, MaskingOptions, RegionLines, RegionOptions, Squash, TextOptions


@dataclass(frozen=True)
class Numbers:
    """Examples that are (index, a draw); batches are lists. Some cannot be used, some fail."""

    length: int = 10
    bad: frozenset = frozenset()
    failing: frozenset = frozenset()
    sleep: float = 0.0

    def __len__(self):
        return self.length

    def example(self, index, rng):
        if index in self.failing:
            raise RuntimeError("out of luck")
        if index in self.bad:
            raise BadSample("broken image", f"images/{index}.jpg", "OSError: truncated")
        time.sleep(self.sleep)
        return index, rng.random()

    def collate(self, examples, rng):
        return [*examples, rng.random()]


def take(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


@pytest.fixture
def examples(image_lines, tokenizer):
    source = ImageTextLines(files=(str(image_lines / "lines"),), root=str(image_lines)).open()
    return ImageTextExamples(
        source=source,
        tokenizer=tokenizer,
        image=Squash(size=32),
        text=TextOptions(max_tokens=8),
        masking=MaskingOptions(max_masks=2),
    )


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys == b.keys
        for name, value in vars(a).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(b, name)), name


def test_batches_do_not_depend_on_the_number_of_workers(examples):
    batches = [take(Loader(examples, global_batch=4, seed=1, workers=w), 8) for w in (0, 1, 2)]
    assert_same(batches[0], batches[1])
    assert_same(batches[0], batches[2])


def test_region_batches_do_not_depend_on_the_number_of_workers(tmp_path, region_line, tokenizer):
    (tmp_path / "a").write_text("".join(region_line(n) + "\n" for n in range(6)))
    examples = RegionExamples(
        source=RegionLines(files=(str(tmp_path / "a"),)).open(),
        tokenizer=tokenizer,
        image=Squash(size=32),
        batch_texts=20,
        patch_size=16,
    )
    loaders = [Loader(examples, global_batch=4, seed=1, workers=w) for w in (0, 2)]
    first, second = (take(loader, 4) for loader in loaders)
    assert_same(first, second)
    assert all(len(batch.text_ids) == 20 for batch in first)
    assert loaders[0].counts == loaders[1].counts
    assert loaders[0].counts["padded_pairs"] == sum(batch.padded_pairs for batch in first) > 0


def test_workers_can_be_spawned(examples):
    spawned = take(Loader(examples, global_batch=4, seed=1, workers=1, start_method="spawn"), 2)
    assert_same(spawned, take(Loader(examples, global_batch=4, seed=1), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_from_any_position_gives_the_same_batches(examples, workers):
    straight = take(Loader(examples, global_batch=4, seed=1, workers=workers), 9)
    for stop in (1, 5, 8):
        first = Loader(examples, global_batch=4, seed=1, workers=workers)
        taken = take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        assert state["position"] == 4 * stop
        second = Loader(examples, global_batch=4, seed=1, workers=2 - workers)
        second.load_state_dict(state)
        assert_same(straight, taken + take(second, 9 - stop))


def test_ranks_share_the_global_batches(examples):
    alone = take(Loader(examples, global_batch=6, seed=1), 5)
    ranks = [take(Loader(examples, global_batch=6, seed=1, rank=r, world=3), 5) for r in range(3)]
    for number, batch in enumerate(alone):
        assert batch.keys == sum((rank[number].keys for rank in ranks), ())
        assert torch.equal(batch.image, torch.cat([rank[number].image for rank in ranks]))


def test_a_run_goes_on_with_another_number_of_ranks(examples):
    alone = Loader(examples, global_batch=6, seed=1)
    before = take(alone, 3)
    after = []
    for rank in range(2):
        loader = Loader(examples, global_batch=6, seed=1, rank=rank, world=2)
        loader.load_state_dict(alone.state_dict())
        after.append(take(loader, 2))
    together = [first.keys + second.keys for first, second in zip(*after, strict=True)]
    assert [b.keys for b in before] + together == [
        b.keys for b in take(Loader(examples, global_batch=6, seed=1), 5)
    ]


def test_batches_of_ranks_differ_in_their_own_draws():
    draws = [take(Loader(Numbers(), global_batch=4, seed=0, rank=r, world=2), 1)[0][-1] for r in range(2)]
    assert draws[0] != draws[1]


def test_every_epoch_brings_every_sample_once_with_new_draws():
    batches = take(Loader(Numbers(10), global_batch=4, seed=0, workers=2), 5)
    taken = [example for batch in batches for example in batch[:-1]]
    assert sorted(i for i, _ in taken[:10]) == sorted(i for i, _ in taken[10:]) == list(range(10))
    assert len({draw for _, draw in taken}) == 20


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(1), random.random()
    for workers in (0, 1):
        torch.manual_seed(0)
        random.seed(0)
        take(Loader(Numbers(), global_batch=2, seed=0, workers=workers), 2)
        assert (torch.rand(1), random.random()) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[::-1],
        lambda lines: [lines[0].replace("dog", "god"), *lines[1:]],
    ],
    ids=["reversed", "another word"],
)
def test_a_run_does_not_go_on_with_changed_lines(examples, image_lines, change):
    state = json.loads(json.dumps(Loader(examples, global_batch=4, seed=1).state_dict()))
    Loader(examples, global_batch=4, seed=1).load_state_dict(state)
    part = image_lines / "lines" / "part-1"
    part.write_text("\n".join(change(part.read_text().splitlines())) + "\n")
    with pytest.raises(
        DataError, match=r"cannot go on in the data: files\.1 changed since the state was saved"
    ):
        Loader(examples, global_batch=4, seed=1).load_state_dict(state)
    del state["data"]  # of an earlier version
    Loader(examples, global_batch=4, seed=1).load_state_dict(state)


def test_boxes_that_are_left_out_are_counted_and_named_once(tmp_path, region_line, tokenizer, caplog):
    good, bad = ({"caption": "a dog", "bb": box} for box in ([5, 5, 20, 20], [50, 5, 20, 20]))
    (tmp_path / "a").write_text("".join(region_line(n, elems=[good, bad, bad]) + "\n" for n in range(4)))
    examples = RegionExamples(
        source=RegionLines(files=(str(tmp_path / "a"),)).open(),
        tokenizer=tokenizer,
        image=Squash(size=32),
        batch_texts=6,
        patch_size=16,
        regions=RegionOptions(crop="none"),
    )
    loader = Loader(examples, global_batch=4, seed=0)
    with caplog.at_level(logging.WARNING, logger="vlp_data.loader"):
        take(loader, 3)
    assert loader.counts["left out: box outside the image"] == 24 and not loader.bad
    assert len(caplog.records) == 1 and "a:" in caplog.text and "box 1" in caplog.text


def test_training_with_no_usable_box_stops(tmp_path, region_line, tokenizer):
    elems = [{"caption": "a dog", "bb": [0.1, 0.1, 0.5, 0.4]}]
    (tmp_path / "a").write_text("".join(region_line(n, elems=elems) + "\n" for n in range(40)))
    for crop in ("none", "around_box"):
        examples = RegionExamples(
            source=RegionLines(files=(str(tmp_path / "a"),)).open(),
            tokenizer=tokenizer,
            image=Squash(size=32),
            batch_texts=6,
            patch_size=16,
            regions=RegionOptions(crop=crop),
        )
        with pytest.raises(DataError, match=r"cannot be used.*box without area: \d+ \(.*a:\d"):
            take(Loader(examples, global_batch=4, seed=0), 3)


def test_states_of_other_data_are_refused():
    state = Loader(Numbers(10), global_batch=2, seed=0).state_dict()
    with pytest.raises(DataError, match="length was 10 when the state was saved and is 11 now"):
        Loader(Numbers(11), global_batch=2, seed=0).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 0 when the state was saved and is 1 now"):
        Loader(Numbers(10), global_batch=2, seed=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 5, "world": 2}, "5 must be a positive multiple of the 2 ranks"),
        ({"global_batch": 0}, "0 must be a positive multiple"),
        ({"global_batch": 2, "rank": 1}, "rank 1 is not one of 1"),
        ({"global_batch": 2, "max_bad_fraction": 1.5}, "max_bad_fraction=1.5 must lie"),
    ],
)
def test_impossible_splits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(Numbers(), seed=0, **arguments)


# ---------------------------------------------------------------------------------------------- dirty data


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_logged_once_and_replaced(caplog, workers):
    examples = Numbers(200, bad=frozenset({3, 50, 120}))
    loader = Loader(examples, global_batch=8, seed=0, workers=workers, max_bad_fraction=0.05)
    with caplog.at_level(logging.WARNING, logger="vlp_data.loader"):
        batches = take(loader, 50)
    taken = [index for batch in batches for index, _ in batch[:-1]]
    assert len(taken) == 400 and not {3, 50, 120} & set(taken)
    assert loader.counts["broken image"] == loader.bad >= 6
    assert loader.read == 400 + loader.bad
    assert len(caplog.records) == 1
    assert "skipped a sample: broken image: images/" in caplog.text
    assert batches == take(Loader(examples, global_batch=8, seed=0, max_bad_fraction=0.05), 50)


def test_replacing_goes_on_exactly_after_a_resume():
    examples = Numbers(50, bad=frozenset(range(0, 50, 5)))
    arguments = {"global_batch": 4, "seed": 0, "max_bad_fraction": 0.5}
    straight = Loader(examples, **arguments)
    batches = take(straight, 20)
    first = Loader(examples, **arguments)
    taken = take(first, 7)
    second = Loader(examples, **arguments)
    second.load_state_dict(first.state_dict())
    assert taken + take(second, 13) == batches
    assert second.state_dict() == straight.state_dict()


def test_one_bad_sample_early_does_not_stop_a_run():
    examples = Numbers(
        1000, bad=frozenset(i for _, i in Loader(Numbers(1000), global_batch=1, seed=0).order.indices(0, 1))
    )
    loader = Loader(examples, global_batch=4, seed=0)
    take(loader, 3)
    assert loader.bad == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_with_causes_and_files(workers):
    loader = Loader(Numbers(100, bad=frozenset(range(10))), global_batch=4, seed=0, workers=workers)
    with pytest.raises(DataError) as error:
        take(loader, 100)
    message = str(error.value)
    assert f"{loader.bad} of {loader.read} samples cannot be used, more than max_bad_fraction=0.01" in message
    assert "broken image: 1" in message and "(images/" in message and ", ...)" in message
    assert loader.bad > TOLERATED_BAD_SAMPLES
    assert not multiprocessing.active_children()


def test_fewer_bad_samples_than_the_limit_never_stop_the_run():
    loader = Loader(Numbers(400, bad=frozenset({7, 8, 9})), global_batch=40, seed=0)
    take(loader, 60)  # six epochs, 0.75 % bad
    assert loader.bad > TOLERATED_BAD_SAMPLES


def test_a_limit_of_zero_stops_at_the_first():
    loader = Loader(Numbers(10, bad=frozenset({4})), global_batch=2, seed=0, max_bad_fraction=0.0)
    with pytest.raises(DataError, match=r"1 of \d+ samples cannot be used"):
        take(loader, 5)


def test_data_without_one_usable_sample_stop_at_once():
    examples = Numbers(10, bad=frozenset(range(10)))
    with pytest.raises(DataError, match=f"{ATTEMPTS} of {ATTEMPTS} samples cannot be used"):
        take(Loader(examples, global_batch=2, seed=0), 1)
    with pytest.raises(
        DataError, match=r"50 samples in a row cannot be used; the last one: broken image: images/\d\.jpg"
    ):
        take(Loader(examples, global_batch=2, seed=0, max_bad_fraction=1.0), 1)


def test_dirty_files_from_disk(image_lines, tokenizer, caplog):
    (image_lines / "images" / "01.jpg").write_bytes(b"")
    (image_lines / "images" / "09.jpg").unlink()
    part = image_lines / "lines" / "part-2"
    part.write_text(part.read_text().replace("\n", "\n\n", 1))
    source = ImageTextLines(files=(str(image_lines / "lines"),), root=str(image_lines)).open()
    examples = ImageTextExamples(source=source, tokenizer=tokenizer, image=Squash(size=32))
    loader = Loader(examples, global_batch=5, seed=0, workers=2, max_bad_fraction=0.5)
    batches = take(loader, 10)
    assert dict(loader.counts).keys() == {"empty image", "missing file", "empty line"}
    assert all(len(batch.keys) == 5 for batch in batches)
    for cause, file in (("empty image", "01.jpg"), ("missing file", "09.jpg"), ("empty line", "part-2:2")):
        records = [record for record in caplog.records if cause in record.message]
        assert len(records) == 1 and file in records[0].message


# ---------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_of_the_program_names_the_sample_and_stops(workers, image_lines, tokenizer):
    source = ImageTextLines(files=(str(image_lines / "lines"),), root=str(image_lines)).open()
    examples = ImageTextExamples(source=source, tokenizer=tokenizer, image=Squash(size=32))
    object.__setattr__(examples, "text", None)  # a program error in every sample
    with pytest.raises(AttributeError) as error:
        take(Loader(examples, global_batch=2, seed=0, workers=workers), 1)
    told = str(error.value) + "".join(getattr(error.value, "__notes__", []))
    assert "while reading sample" in told and "lines/part-" in told
    assert not multiprocessing.active_children()


def test_silence_of_the_workers_ends_in_an_error():
    loader = Loader(Numbers(sleep=2.0), global_batch=2, seed=0, workers=1, timeout_seconds=0.5)
    with pytest.raises(DataError, match=r"no batch within 0\.5 s at position 0"):
        next(loader)


def test_a_killed_worker_is_replaced_and_the_batches_stay_the_same(caplog):
    loader = Loader(Numbers(sleep=0.01), global_batch=2, seed=0, workers=2)
    with loader, caplog.at_level(logging.WARNING, logger="vlp_data.loader"):
        batches = [next(loader) for _ in range(3)]
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        # In the step, where torch would raise it.
        time.sleep(0.2)
        batches += [next(loader) for _ in range(12)]
    assert batches == take(Loader(Numbers(), global_batch=2, seed=0), 15)
    assert "a worker of the loader died (killed, mostly for want of memory) and is replaced" in caplog.text
    assert not multiprocessing.active_children()


def collect(loader, taken):
    while True:
        taken.append(next(loader))


@dataclass(frozen=True)
class Dying(Numbers):
    """Kills the worker that makes sample 3."""

    def example(self, index, rng):
        if index == 3 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().example(index, rng)


def test_workers_that_die_again_and_again_end_in_an_error_that_can_be_saved_on():
    loader = Loader(Dying(), global_batch=2, seed=0, workers=1)
    taken = []
    with pytest.raises(
        WorkerLost, match=r"died 4 times at position \d+ \(killed, mostly for want of memory\)"
    ):
        collect(loader, taken)
    assert not multiprocessing.active_children()
    assert issubclass(WorkerLost, DataError)
    state = loader.state_dict()
    assert state["position"] == 2 * len(taken)
    after = Loader(Numbers(), global_batch=2, seed=0)
    after.load_state_dict(state)
    assert taken + [next(after) for _ in range(3)] == take(
        Loader(Numbers(), global_batch=2, seed=0), len(taken) + 3
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=str)
def test_workers_pay_no_heed_to_signals_that_mean_the_run(number):
    loader = Loader(Numbers(), global_batch=2, seed=0, workers=2)
    loader._iterator = loader._start()  # at their first moment too
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    first = [next(loader) for _ in range(4)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
        os.kill(worker.pid, number)
    workers = multiprocessing.active_children()
    with loader:
        batches = first + [next(loader) for _ in range(20)]
        assert multiprocessing.active_children() == workers
    assert batches == take(Loader(Numbers(), global_batch=2, seed=0), 24)
    assert not multiprocessing.active_children()


def test_a_group_that_is_asked_to_stop_can_still_save(tmp_path):
    """What a scheduler does: SIGTERM to all processes of the run, whose main one goes on to its end."""
    program = tmp_path / "runs.py"
    program.write_text(
        "import os, signal\n"
        "from vlp_data.loader import Loader\n"
        "class Numbers:\n"
        "    def __len__(self): return 10\n"
        "    def example(self, index, rng): return index\n"
        "    def collate(self, examples, rng): return examples\n"
        "if __name__ == '__main__':\n"
        "    asked = []\n"
        "    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
        "    with Loader(Numbers(), global_batch=2, seed=0, workers=2) as loader:\n"
        "        next(loader)\n"
        "        os.killpg(0, signal.SIGTERM)\n"
        "        for _ in range(20): next(loader)\n"
        "    print('saved', asked, loader.state_dict()['position'])\n"
    )
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=90, start_new_session=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "saved [1] 42\n", "")


def test_closing_ends_the_workers_and_the_loader_can_go_on():
    loader = Loader(Numbers(), global_batch=2, seed=0, workers=2)
    first = [next(loader) for _ in range(3)]
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert not multiprocessing.active_children()
    with loader:
        assert first + [next(loader) for _ in range(3)] == take(Loader(Numbers(), global_batch=2, seed=0), 6)


def test_a_process_that_forgets_its_loader_ends(tmp_path):
    program = tmp_path / "forgets.py"
    program.write_text(
        "from vlp_data.loader import Loader\n"
        "class Numbers:\n"
        "    def __len__(self): return 10\n"
        "    def example(self, index, rng): return index\n"
        "    def collate(self, examples, rng): return examples\n"
        "if __name__ == '__main__':\n"
        "    loader = Loader(Numbers(), global_batch=2, seed=0, workers=2)\n"
        "    print(next(loader))\n"
    )
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.startswith("[") and not result.stderr


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    text = readme.split("## Readers and the loader")[1].split("\n### ")[0]
    (commands,) = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for command in commands.splitlines():
        assert main(shlex.split(command)[1:]) == 0
    capsys.readouterr()
    exec(example, {})
    assert capsys.readouterr().out == "(16, 3, 64, 64) (16, 40) 16\n"


# ------------------------------------------------------------------------------------------- file after file


def in_files(image_lines, tokenizer, **options):
    source = ImageTextLines(files=(str(image_lines / "lines"),), root=str(image_lines), **options).open()
    image, text = Squash(size=32), TextOptions(max_tokens=8)
    return ImageTextExamples(source=source, tokenizer=tokenizer, image=image, text=text)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", [{"order": "files"}, {"order": "files", "buffer": 5}, {}])
def test_ranks_with_workers_read_every_line_once_per_epoch(image_lines, tokenizer, world, options):
    examples = in_files(image_lines, tokenizer, **options)
    ranks = [
        take(Loader(examples, global_batch=2 * world, seed=3, rank=rank, world=world, workers=2), 24 // world)
        for rank in range(world)
    ]
    for epoch in range(2):
        steps = range(epoch * 12 // world, (epoch + 1) * 12 // world)
        keys = [key for batches in ranks for step in steps for key in batches[step].keys]
        assert len(keys) == len(set(keys)) == 24
    # The same global batches as one rank without workers.
    alone = take(Loader(examples, global_batch=2 * world, seed=3), 24 // world)
    for step, batch in enumerate(alone):
        assert batch.keys == tuple(key for batches in ranks for key in batches[step].keys)


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_reads_consecutive_lines(image_lines, tokenizer, world):
    examples = in_files(image_lines, tokenizer, order="files")
    loader = Loader(examples, global_batch=4 * world, seed=1, rank=1, world=world)
    assert loader.describe() == {
        "rank": f"1 of {world}",
        "samples": 24,
        "order": "3 files one after the other, buffer 0",
        "reads": f"places 4 to 7 of every {4 * world}",
        "position": 0,
    }
    for batch in take(loader, 4):
        places = [key.rsplit(":", 1) for key in batch.keys]
        assert len({file for file, _ in places}) == 1
        numbers = [int(number) for _, number in places]
        assert numbers == list(range(numbers[0], numbers[0] + 4))


@pytest.mark.parametrize("buffer", [0, 5])
def test_reading_file_after_file_goes_on_exactly(image_lines, tokenizer, buffer):
    examples = in_files(image_lines, tokenizer, order="files", buffer=buffer)
    straight = take(Loader(examples, global_batch=6, seed=2), 9)
    for stop in (1, 4, 7):
        first = Loader(examples, global_batch=6, seed=2, workers=2)
        taken = take(first, stop)
        second = Loader(examples, global_batch=6, seed=2, workers=1)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert_same(straight, taken + take(second, 9 - stop))
        rest = []
        for rank in range(3):  # on another number of ranks no line of the epoch is lost or read twice
            third = Loader(examples, global_batch=6, seed=2, rank=rank, world=3)
            third.load_state_dict(first.state_dict())
            rest.append(take(third, 9 - stop))
        for step, batch in enumerate(straight[stop:]):
            assert batch.keys == tuple(key for batches in rest for key in batches[step].keys)


def test_a_state_of_another_order_is_refused(image_lines, tokenizer):
    state = Loader(in_files(image_lines, tokenizer), global_batch=2, seed=0).state_dict()
    loader = Loader(in_files(image_lines, tokenizer, order="files"), global_batch=2, seed=0)
    with pytest.raises(
        DataError, match="order was shuffled when the state was saved and is 3 files one after"
    ):
        loader.load_state_dict(state)
