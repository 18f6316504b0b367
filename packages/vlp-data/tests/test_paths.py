from pathlib import Path

from vlp_data.options import TaskJson
from vlp_data.paths import rebase

RELEASED = "/data/someone/data/coco/val2014/x.jpg"


def test_paths_of_vicha_lists_are_below_the_root() -> None:
    assert rebase(RELEASED, prefixes={}, root="mine") == "mine/coco/val2014/x.jpg"
    assert rebase(RELEASED, prefixes={}, root="") == RELEASED
    assert rebase("val2014/x.jpg", prefixes={}, root="mine") == "mine/val2014/x.jpg"
    assert rebase("/other/x.jpg", prefixes={}, root="mine") == "/other/x.jpg"


def test_the_longest_prefix_that_fits_whole_pieces_is_replaced() -> None:
    chosen = {"/data/someone": "/disk", "/data/someone/data/coco/": "s3://bucket/coco", "old": ""}
    assert rebase(RELEASED, prefixes=chosen, root="mine") == "s3://bucket/coco/val2014/x.jpg"
    assert rebase("/data/someone/y.jpg", prefixes=chosen, root="") == "/disk/y.jpg"
    assert rebase("/data/someone2/y.jpg", prefixes=chosen, root="mine") == "/data/someone2/y.jpg"
    assert rebase("old/y.jpg", prefixes=chosen, root="mine") == "mine/y.jpg"
    same = {"/data/someone": "/data/someone"}
    assert rebase(RELEASED, prefixes=same, root="mine") == RELEASED


def test_task_lists_find_images_that_were_moved(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text(f'[{{"image": "{RELEASED}", "caption": "a dog"}}]')
    options = {"files": (str(file),), "root": "mine"}
    assert TaskJson(**options).open()[0].images[0].path == "mine/coco/val2014/x.jpg"
    moved = TaskJson(**options, prefixes={"/data/someone/data": "there"})
    assert moved.open()[0].images[0].path == "mine/there/coco/val2014/x.jpg"
