"""Paths, URLs, folders."""

import gzip

import fsspec
import pytest
from vlp_data import files
from vlp_data.errors import DataError


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def test_join():
    assert files.join("", "a.jpg") == "a.jpg"
    assert files.join("/data", "a/b.jpg") == "/data/a/b.jpg"
    assert files.join("/data", "/other/a.jpg") == "/other/a.jpg"
    assert files.join("/data", "s3://bucket/a.jpg") == "s3://bucket/a.jpg"
    assert files.join("hdfs://host/data", "a.jpg") == "hdfs://host/data/a.jpg"
    assert files.join("/data", "") == "/data"


def test_local_and_remote_reads_agree(tmp_path, memory):
    (tmp_path / "a").write_bytes(b"0123456789")
    memory.pipe("/x/a", b"0123456789")
    for path in (str(tmp_path / "a"), "memory://x/a", f"file://{tmp_path}/a"):
        assert files.read(path) == b"0123456789"
        assert files.read_range(path, 3, 4) == b"3456"
        assert files.stamp(path)[0] == 10
        with files.open_read(path) as stream:
            assert stream.read() == b"0123456789"
        with pytest.raises(EOFError, match="did it change"):
            files.read_range(path, 8, 4)
    for missing in (str(tmp_path / "b"), "memory://x/b"):
        with pytest.raises(FileNotFoundError):
            files.read(missing)


def test_compressed_files_are_streamed_decompressed(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    with files.open_read(str(tmp_path / "a.gz")) as stream:
        assert list(stream) == [b"one\n", b"two\n"]


def test_folders_are_expanded_in_order(tmp_path, memory):
    for name in ("b", "a", "_SUCCESS", ".hidden", "c_SUCCESS"):
        (tmp_path / name).write_text("x")
        memory.pipe(f"/d/{name}", b"x")
    (tmp_path / "deeper").mkdir()
    memory.pipe("/d/deeper/z", b"x")
    first = [str(tmp_path / "a"), str(tmp_path / "b")]
    second = ["memory:///d/a", "memory:///d/b"]
    assert files.expand((str(tmp_path), "memory://d")) == first + second
    assert files.expand((f"memory://d,{tmp_path / 'b'}",)) == [*second, first[1]]


def test_missing_paths_are_named(tmp_path, memory):
    for path in (str(tmp_path / "nowhere"), "memory://nowhere"):
        with pytest.raises(FileNotFoundError, match=r"nowhere not found \(neither a file nor a folder\)"):
            files.expand((path,))
    with pytest.raises(FileNotFoundError, match="no data files in"):
        files.expand((str(tmp_path),))
    with pytest.raises(FileNotFoundError, match="an empty list of paths"):
        files.expand(())


def test_unknown_protocols_are_named():
    with pytest.raises(DataError, match="nosuch://a cannot be reached: Protocol not known"):
        files.read("nosuch://a")


class Flaky:
    """A remote file system that fails a few times."""

    def __init__(self, failures, error):
        self.failures, self.error, self.calls = failures, error, 0

    def cat_file(self, path):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return b"data"


@pytest.mark.parametrize("error", [TimeoutError("slow"), RuntimeError("HTTP 503")])
def test_remote_reads_are_repeated(monkeypatch, error):
    pauses = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    flaky = Flaky(2, error)
    monkeypatch.setattr(files, "_filesystem", lambda url: (flaky, url))
    assert files.read("far://a") == b"data"
    assert flaky.calls == 3 and pauses == list(files.PAUSES_SECONDS[:2])
    dead = Flaky(99, error)
    monkeypatch.setattr(files, "_filesystem", lambda url: (dead, url))
    with pytest.raises(OSError, match=rf"far://a: {type(error).__name__}: {error}"):
        files.read("far://a")
    assert dead.calls == 1 + len(files.PAUSES_SECONDS)


def test_a_missing_remote_file_is_not_asked_for_again(monkeypatch):
    missing = Flaky(99, FileNotFoundError("gone"))
    monkeypatch.setattr(files, "_filesystem", lambda url: (missing, url))
    with pytest.raises(FileNotFoundError):
        files.read("far://a")
    assert missing.calls == 1
