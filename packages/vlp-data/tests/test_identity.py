"""Whether data is still the same, by checksum."""

import json
import os

import pytest
from vlp_data import identity as module
from vlp_data.concepts.encoders import Clip
from vlp_data.concepts.jobs import files_job, items_job
from vlp_data.concepts.tables import encoded, write_bytes
from vlp_data.errors import DataError
from vlp_data.identity import checksum, differences, folder_checksum, identity
from vlp_data.options import ImageTextLines, Refer, TaskJson, TokenizerFiles


@pytest.fixture
def lines(tmp_path):
    rows = [json.dumps({"caption": f"a {n}", "image_rpath": "a.jpg"}) for n in range(9)]
    (tmp_path / "l").write_text("\n".join(rows) + "\n")
    return tmp_path / "l"


def test_order_counts_and_the_date_and_the_place_do_not(lines, tmp_path):
    before = identity(ImageTextLines(files=(str(lines),)).open())
    assert before.keys() == {"files.0"}
    copy = tmp_path / "other"
    copy.write_bytes(lines.read_bytes())
    os.utime(copy, (1, 1))
    index = str(tmp_path / "index")
    assert differences(before, identity(ImageTextLines(files=(str(copy),), index=index).open())) == []
    lines.write_text("\n".join(reversed(lines.read_text().splitlines())) + "\n")
    assert differences(before, identity(ImageTextLines(files=(str(lines),)))) == ["files.0"]


def test_every_file_that_options_name_counts(tmp_path):
    for name in ("a.json", "b.json", "vocab.txt", "refs.json", "instances.json"):
        (tmp_path / name).write_text(name)
    place = str(tmp_path)
    assert identity(TaskJson(files=(f"{place}/a.json",), annotations=(f"{place}/b.json",))).keys() == {
        "files.0",
        "annotations.0",
    }
    assert identity(
        Refer(files=(f"{place}/a.json",), refs=f"{place}/refs.json", instances=f"{place}/instances.json")
    ).keys() == {"files.0", "refs", "instances"}
    words = TokenizerFiles(files=(f"{place}/vocab.txt",))
    before = identity(words)
    (tmp_path / "vocab.txt").write_text("txt.bacov"[:9])
    assert differences(before, identity(words)) == ["files.0"]
    assert identity(object()) == {} == identity(None)


def test_of_many_files_there_is_one_checksum(tmp_path):
    for number in range(70):
        (tmp_path / f"{number:02d}").write_text(f"{number}\n")
    before = identity(ImageTextLines(files=(str(tmp_path),)))
    assert before.keys() == {"files"}
    (tmp_path / "33").write_text("x\n")
    assert differences(before, identity(ImageTextLines(files=(str(tmp_path),)))) == ["files"]


def test_long_files_are_looked_at_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", 100)
    monkeypatch.setattr(module, "BLOCKS", 4)
    monkeypatch.setattr(module, "BLOCK_BYTES", 50)
    rows = [f"{n:09d}\n" for n in range(100)]
    (tmp_path / "a").write_text("".join(rows))
    before = checksum(str(tmp_path / "a"))
    (tmp_path / "a").write_text("".join(reversed(rows)))
    assert checksum(str(tmp_path / "a")) != before
    (tmp_path / "a").write_text("".join(rows) + "x")
    assert checksum(str(tmp_path / "a")) != before
    (tmp_path / "a").write_text("".join(rows))
    assert checksum(str(tmp_path / "a")) == before


class Copy:
    """Work that copies."""

    def __init__(self, clip):
        self.clip = clip

    def identity(self):
        return self.clip.identity()

    def start(self):
        return lambda items: items


@pytest.mark.parametrize("weights", [False, True])
def test_concept_jobs_refuse_other_weights_at_the_same_path(tmp_path, weights):
    import pyarrow as pa

    model = tmp_path / "clip"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file = tmp_path / "weights.pt" if weights else model / "model.safetensors"
    file.write_bytes(b"one" * 100)
    clip = Clip(name="ViT-B-16", weights=str(file)) if weights else Clip(name=str(model))
    items, folder = pa.table({"key": ["a", "b"]}), str(tmp_path / "job")
    items_job(folder, Copy(clip), items, rows_per_shard=1)
    os.utime(file, (1, 1))
    items_job(folder, Copy(clip), items, rows_per_shard=1)
    file.write_bytes(b"one" * 99 + b"two")
    with pytest.raises(DataError, match=r"holds the parts of another job \((clip|weights) \(checksum\): "):
        items_job(folder, Copy(clip), items, rows_per_shard=1)


def test_jobs_on_files_go_by_what_is_in_them(tmp_path):
    import pyarrow as pa

    table = pa.table({"key": ["a", "b"]})
    path, folder = str(tmp_path / "v.parquet"), str(tmp_path / "job")
    write_bytes(path, encoded(table))
    files_job(folder, Copy(Clip(name="ViT-B-16")), [path])
    os.utime(path, (1, 1))
    files_job(folder, Copy(Clip(name="ViT-B-16")), [path])
    write_bytes(path, encoded(table.take([1, 0])))
    with pytest.raises(DataError, match=r"another job \(items: "):
        files_job(folder, Copy(Clip(name="ViT-B-16")), [path])
    (tmp_path / "job" / "job.json").write_text('{"clip": ')
    with pytest.raises(DataError, match=r"job\.json is damaged"):
        files_job(folder, Copy(Clip(name="ViT-B-16")), [path])


def test_the_checksum_of_a_folder_is_of_names_and_bytes(tmp_path):
    (tmp_path / "a").write_text("1")
    before = folder_checksum(str(tmp_path))
    (tmp_path / ".cache").write_text("x")
    assert folder_checksum(str(tmp_path)) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert folder_checksum(str(tmp_path)) != before
