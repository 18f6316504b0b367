"""The commands of `vlp-train`, their messages and exit codes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vlp_core import recipe as recipes


def test_ls_shows_recipes_with_method_task_and_purpose(toy, capsys):
    assert toy.train("ls") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("toy/tiny"))
    assert line.split(maxsplit=3) == ["toy/tiny", "toy", "fit", "two streams on random numbers"]
    assert toy.train("ls", "RANDOM num") == 0
    assert toy.train("ls", "nothing like it") == 2


def test_show_explains_every_key(toy, capsys):
    assert toy.train("show", "toy/tiny", "optimizer.lr=1e-4") == 0
    output = capsys.readouterr().out
    assert "optimizer.lr: 0.0001\n    float; command line. Peak learning rate." in output
    assert "optimizer.betas: [0.9, 0.98]\n    list of 2 (float, float); recipe." in output
    assert "save.keep: 2\n    int; default. Newest checkpoints that stay." in output


def test_cp_gives_a_recipe_that_runs(toy, tmp_path, capsys):
    assert toy.train("cp", "toy/tiny", "mine.yaml") == 0
    assert Path("mine.yaml").read_text().startswith("# A toy; one second.\n")
    assert toy.train("cp", "toy/tiny", "mine.yaml") == 2
    assert "exists already" in capsys.readouterr().err
    assert toy.train("cp", "toy/tiny", "mine.txt") == 2
    assert toy.train("mine.yaml", "steps=2") == 0
    assert [path.name.rsplit("-", 1)[0] for path in Path("runs").iterdir()] == ["mine"]


def test_recorded_recipe_is_complete_and_valid(toy, tmp_path):
    from toy_method.schema import Fit

    assert toy.train("toy/tiny", "seed=3", "steps=2", "--run", "first") == 0
    recorded = recipes.read("first/recipe.yaml")
    assert recorded == recipes.dump(recipes.build(Fit, recorded))
    assert recorded["save"] == {"every": 5, "keep": 2, "keep_every": None}
    assert toy.train("first/recipe.yaml", "--run", "second") == 0
    assert toy.losses(Path("first")) == toy.losses(Path("second"))


def test_history_is_a_table(toy, capsys):
    assert toy.train("toy/tiny", "steps=6", "report.every=2", "evaluate.every=3", "--run", "run") == 0
    capsys.readouterr()
    assert toy.train("history", "run") == 0
    reports, evaluations = capsys.readouterr().out.split("\n\n")
    rows = [line.split() for line in reports.splitlines()]
    assert [row[0] for row in rows] == ["step", "2", "4", "6"]
    assert rows[0][-2:] == ["lr", "samples/s"]
    assert len({len(row) for row in rows}) == 1
    assert [line.split() for line in evaluations.splitlines()][1][0] == "3"
    assert toy.train("history", "elsewhere") == 2


def test_export_writes_the_newest_checkpoint(toy, tmp_path, capsys):
    assert toy.train("toy/tiny", "steps=6", "regions=0", "--run", "run") == 0
    for folder in ("run/export", "elsewhere/model"):
        assert toy.train("export", "run", *([folder] if folder != "run/export" else [])) == 0
        assert json.loads(Path(folder, "config.json").read_text()) == {"updates": 6}
    assert toy.train("export", "run", "elsewhere/model") == 2
    assert "exists already" in capsys.readouterr().err
    assert toy.train("toy/tiny", "faults.crash=true", "--run", "none") == 1
    assert toy.train("export", "none") == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_dry_run_says_what_there_is_and_writes_nothing(toy, tmp_path, capsys):
    assert toy.train("toy/tiny", "--dry-run", "accumulate=2") == 0
    output = capsys.readouterr().out
    for expected in (
        "in all                             265 parameters, 258 of them trained",
        "stream regions, per rank (x 2 per update, x 1 ranks)",
        "  x                        float32  (8, 6)",
        "memory per rank: weights",
        "learning rate by step: 0: 0.0025, 1: 0.005, 4: 0.01",
    ):
        assert expected in output
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_at_once_with_the_nearest_key(toy, capsys):
    assert (
        toy.train(
            "toy/tiny",
            "optimizer.lrr=1",
            "dropuot=0",
            "steps=abc",
            "precision=bf61",
            "lr",
            "data.root=${env:NOT_SET}",
        )
        == 2
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    for expected in (
        "lr: not of the form key=value",
        "optimizer.lrr: unknown key; did you mean optimizer.lr?",
        "dropuot: unknown key; did you mean dropout?",
        "steps: expected int or mapping, got 'abc'",
        "precision: expected one of fp32, bf16, fp16, got 'bf61'; did you mean bf16?",
        "data.root: '${env:NOT_SET}': environment variable NOT_SET is not set",
    ):
        assert expected in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy/tinny"], "toy/tinny: no such recipe; did you mean toy/tiny?"),
        (["hist"], "did you mean vlp-train history?"),
        (["nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["show", "nothing"], "nothing: no such recipe"),
        (["toy/tiny", "--nproc", "0"], "--nproc 0 must be at least 1"),
        (["toy/tiny", "--frsh"], "unrecognized arguments: --frsh"),
        (["toy/tiny", "device=cuda"], "device=cuda: torch sees no GPU"),
        (
            ["toy/tiny", "report.wandb=mine"],
            "report.wandb=mine needs wandb, which is not installed: pip install 'vlp-methods[wandb]'",
        ),
    ],
)
def test_mistakes_on_the_command_line_exit_2_with_one_line(toy, capsys, monkeypatch, arguments, message):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert toy.train(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: toi\ntask: fit\nabout: x\n", "method: 'toi' is not known; did you mean toy? (known: "),
        ("method: toy\ntask: fti\nabout: x\n", "task: 'fti' is not known; did you mean fit? (known: fit)"),
        ("about: x\n", "method: required (known: "),
        ("method: toy\ntask: fit\n", "about: required (text)"),
        ("method: toy\n  task: fit\n", "line 2, column 7: mapping values are not allowed"),
        ("- method: toy\n", "expected `key: value` lines"),
    ],
)
def test_mistakes_in_a_file_name_the_file(toy, capsys, text, message):
    Path("mine.yaml").write_text(text)
    assert toy.train("mine.yaml") == 2
    error = capsys.readouterr().err
    assert "mine.yaml:\n" in error
    assert message in error


def test_sbatch_script_is_valid_and_requeues(toy, tmp_path, capsys):
    words = ("toy/tiny", "seed=3", "--nproc", "4", "--nodes", "3", "--sbatch", "job.sh", "--run", "a run")
    assert toy.train(*words) == 0
    assert "#SBATCH --nodes=3" in Path("job.sh").read_text()
    assert not Path("a run").exists()
    script = Path("job.sh").read_text()
    assert "#SBATCH --ntasks-per-node=4" in script
    assert "vlp-train toy/tiny seed=3 --run 'a run'" in script
    # Run it with a stand-in for SLURM: the ranks' environment and the requeue on exit code 75.
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in (
        ("scontrol", 'if [ "$1" = show ]; then echo node1; else echo "scontrol $*" >> calls; fi'),
        ("srun", 'SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_LOCALID=1 "$@"'),
        (
            "vlp-train",
            (
                'echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK at $MASTER_ADDR:$MASTER_PORT: $*" '
                ">> calls; exit 75"
            ),
        ),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "x",
    }
    assert subprocess.run(["bash", "job.sh"], env=environment, check=False).returncode == 75
    assert Path("calls").read_text().splitlines() == [
        "rank 1 of 4, local 1 at node1:20017: toy/tiny seed=3 --run a run",
        "scontrol requeue 17",
    ]


def test_tensorboard_events_are_written_when_asked_for(toy, monkeypatch):
    pytest.importorskip("tensorboard")
    assert toy.train("toy/tiny", "report.tensorboard=true", "steps=3", "--run", "run") == 0
    events = b"".join(path.read_bytes() for path in Path("run/tensorboard").iterdir())
    assert b"images/fit" in events
    assert b"evaluation/output" in events


def test_wandb_gets_the_numbers_when_asked_for(toy, monkeypatch, tmp_path):
    sent = []
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "wandb.py").write_text(
        "calls = []\n"
        "class Run:\n"
        "    def log(self, values, step): calls.append((step, values))\n"
        "    def finish(self): calls.append('finished')\n"
        "def init(**options):\n"
        "    calls.append(options)\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(fake)
    assert toy.train("toy/tiny", "report.wandb=mine", "steps=2", "--run", "run") == 0
    sent = sys.modules.pop("wandb").calls
    assert (sent[0]["project"], sent[0]["id"], sent[0]["config"]["steps"]) == ("mine", "run", 2)
    assert [call[0] for call in sent[1:-1]] == [1, 2, 2]
    assert "images/fit" in sent[1][1]
    assert sent[-1] == "finished"


def test_several_loggers_get_the_same_numbers(toy, monkeypatch, tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    record = (
        "calls = []\n"
        "class Run:\n"
        "    def log(self, values, step): calls.append((step, values))\n"
        "    def finish(self): calls.append('finished')\n"
        "def init(**options):\n"
        "    calls.append(options)\n"
        "    return Run()\n"
        "log, finish = Run().log, Run().finish\n"
    )
    for name in ("wandb", "trackio"):
        (fake / f"{name}.py").write_text(record)
    monkeypatch.syspath_prepend(fake)
    words = (
        "report={every: 1, csv: true, wandb: mine, trackio: ours, name: third try, notes: why, tags: [a, b]}",
    )
    monkeypatch.setenv("TOY_STOP_AFTER", "2")
    assert toy.train("toy/tiny", *words, "steps=3", "save.every=1", "--run", "run") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    with Path("run/metrics.csv").open("a") as file:
        file.write("3,lost,1.0\n3,cut o")  # a later step, and a line that a crash has cut
    assert toy.train("toy/tiny", *words, "steps=3", "save.every=1", "--run", "run") == 0
    wandb, trackio = (sys.modules.pop(name).calls for name in ("wandb", "trackio"))
    assert (wandb[0]["project"], wandb[0]["name"], wandb[0]["id"]) == ("mine", "third try", "run")
    assert (wandb[0]["notes"], wandb[0]["tags"]) == ("why", ["a", "b"])
    assert (trackio[0]["project"], trackio[0]["name"], trackio[0]["resume"]) == ("ours", "third try", "allow")
    assert wandb[1:3] == trackio[1:3]
    assert [call for call in wandb if isinstance(call, tuple)] == [
        call for call in trackio if isinstance(call, tuple)
    ]
    head, *rows = Path("run/metrics.csv").read_text().splitlines()
    assert head == "step,name,value"
    assert not any("lost" in row or "cut o" in row for row in rows)
    fits = [row.split(",") for row in rows if ",images/fit," in row]
    reported = [line["losses"]["images/fit"] for line in toy.reports(Path("run")) if "losses" in line]
    assert [(int(step), float(value)) for step, _, value in fits] == list(enumerate(reported, 1))


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("{notes: why}", "notes and tags go to wandb alone"),
        ("{name: mine}", "name goes to wandb and trackio"),
        ("{trackio: mine}", "report.trackio=mine needs trackio, which is not installed"),
    ],
)
def test_a_logger_that_is_not_there_is_refused(toy, capsys, report, message):
    assert toy.train("toy/tiny", f"report={report}") == 2
    assert message in capsys.readouterr().err


def test_nodes_belong_to_sbatch(toy, capsys):
    assert toy.train("toy/tiny", "--nodes", "2") == 2
    assert "belongs to --sbatch" in capsys.readouterr().err


def test_the_gpu_of_a_mac_is_a_device(toy, monkeypatch, capsys):
    from vlp_methods.engine.ranks import Ranks
    from vlp_methods.engine.step import widest

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert toy.train("toy/tiny", "device=mps") == 2
    assert "device=mps: torch sees no GPU of a Mac" in capsys.readouterr().err
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = Ranks("mps").device
    assert device.type == "mps"
    assert widest(device) == torch.float32  # it has no double precision
    assert widest(torch.device("cpu")) == torch.float64
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert toy.train("toy/tiny", "device=mps") == 2
    assert "train on one rank" in capsys.readouterr().err


STARTS = (["ls"], ["--version"], ["toy/tinny"], ["toy/tiny", "optimizer.lrr=1", "steps=abc"])


@pytest.mark.parametrize("arguments", STARTS, ids=" ".join)
def test_start_is_quick_and_loads_no_torch(toy, arguments):
    """The budget is 0.15 s on a quiet machine (`nox -s bench` measures); here four times that of the
    processor, the best of five, so that other work of the machine counts little."""
    code = (
        "import sys; from vlp_methods.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy', 'pydantic', 'PIL'} & set(sys.modules), 'heavy import'"
    )
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=toy.environment, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "heavy import" not in done.stderr
    assert min(seconds) < 0.6


def test_every_task_of_an_installed_method_has_a_torch_free_schema_and_a_builder(toy):
    """Run on what is installed, so a method that forgets its line is noticed."""
    code = (
        "import importlib, sys\n"
        "from vlp_methods.engine import entry\n"
        "from vlp_methods.engine.options import Training\n"
        "tasks = [t for m in entry.methods().values() for t in importlib.import_module(m).tasks.values()]\n"
        "assert tasks\n"
        "for task in tasks: assert issubclass(entry.attribute(task.schema), Training)\n"
        "for name in entry.shipped(): print(name)\n"
        "assert 'torch' not in sys.modules\n"
        "for task in tasks: assert callable(entry.attribute(task.build))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=toy.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "toy/tiny" in done.stdout.split()


WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch comes, threads spin", os.environ.get("GOMP_SPINCOUNT"))
        return None
sys.meta_path.insert(0, Watch())
from vlp_methods.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_threads_are_told_to_spin_little_before_torch_is_imported(toy, tmp_path):
    environment = {
        key: value
        for key, value in toy.environment.items()
        if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    command = [sys.executable, "-c", WATCH, "toy/tiny", "--dry-run", "--run", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torch comes, threads spin 10000" in done.stdout
