import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from vlp_data import shapes
from vlp_data.cli import main


def test_shapes_command_writes_what_the_function_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "shapes",
        str(tmp_path / "cli"),
        "--images",
        "6",
        "--seed",
        "3",
        "--size",
        "32",
        "--val",
        "2",
        "--test",
        "1",
    ]
    assert main(arguments) == 0
    assert "6 scenes of 32 x 32 pixels" in capsys.readouterr().out
    other = shapes.write(tmp_path / "function", images=6, seed=3, size=32, val=2, test=1)
    assert (tmp_path / "cli" / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def test_user_errors_are_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for arguments, message in (
        (["shapes", str(tmp_path), "--images", "5"], "is not empty"),
        (["shapes", str(tmp_path / "new"), "--images", "2"], "each split needs at least one scene"),
        (["shapes", str(tmp_path / "new"), "--size", "5"], "size=5 must be between"),
        (["sheet", str(tmp_path)], "annotations.jsonl not found"),
        (["verify", str(tmp_path)], "manifest.json not found"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith(f"vlp-data {arguments[0]}: ")
        assert error.count("\n") == 1


def test_readme_commands_and_example_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    text = (
        (Path(__file__).parents[1] / "README.md")
        .read_text()
        .split("## The shapes world")[1]
        .split("\n## ")[0]
    )
    (commands,) = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for command in commands.splitlines():
        name, *arguments = shlex.split(command, comments=True)
        assert name == "vlp-data"
        assert main(arguments) == 0
    capsys.readouterr()
    exec(example, {})
    assert capsys.readouterr().out == shapes.annotate(shapes.draw(0, 7)).captions[0] + "\n"


def test_unknown_option_exits_2() -> None:
    with pytest.raises(SystemExit) as error:
        main(["shapes", "out", "--pictures", "5"])
    assert error.value.code == 2


def test_verify_and_sheet_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shapes.write(tmp_path / "data", images=4, size=32)
    assert main(["verify", str(root)]) == 0
    assert "all files are as written" in capsys.readouterr().out
    assert main(["sheet", str(root), "--first", "2", "--boxes", "--to", str(tmp_path / "page.png")]) == 0
    assert (tmp_path / "page.png").stat().st_size > 1000
    assert capsys.readouterr().out.endswith("page.png: 2 scenes\n")
    (root / "vocab.txt").write_text("changed")
    assert main(["verify", str(root)]) == 1
    assert capsys.readouterr().out.splitlines()[0] == "vocab.txt: changed since it was written"


def test_progress_line_is_shown_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["shapes", str(tmp_path / "data"), "--images", "4", "--size", "32"]) == 0
    assert capsys.readouterr().err.endswith("\rscenes 4/4 (100 %)\n")


def test_start_of_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys, vlp_data.cli; vlp_data.cli._parser();"
        "print(sorted({'torch', 'numpy', 'cv2', 'PIL', 'tokenizers', 'pycocotools', "
        "'fsspec'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_shapes_do_not_import_torch() -> None:
    code = "import sys, vlp_data.shapes; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
