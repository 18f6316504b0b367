"""Use the installed wheels from outside the checkout: `python -I tests/check_wheels.py CHECKOUT`, run by the
wheels session.

Holds what an editable install hides: modules, type marker, package data and console scripts must be inside
the wheels.
"""

import importlib
import pkgutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

checkout = Path(sys.argv[1]).resolve()
modules = sorted(path.parent.name for path in checkout.glob("packages/*/src/*/py.typed"))
assert len(modules) == 5, modules

for name in modules:
    module = importlib.import_module(name)
    place = Path(module.__file__).parent
    assert not place.is_relative_to(checkout / "packages"), f"{name} comes from the checkout: {place}"
    assert metadata.version(name.replace("_", "-")) == module.__version__
    source = checkout / "packages" / name.replace("_", "-") / "src" / name
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = {line for line in listed.stdout.splitlines() if (source / line).is_file()}
    missing = sorted(line for line in wanted if not (place / line).exists())
    assert not missing, f"the wheel of {name} lacks {missing}"
    for part in pkgutil.walk_packages(module.__path__, prefix=f"{name}."):
        if not part.name.endswith("__main__"):
            importlib.import_module(part.name)
    print(f"{name} {module.__version__}: every module imports")

scripts = Path(sysconfig.get_path("scripts"))


def run(*command: str, folder: str) -> str:
    print("$", *command, flush=True)
    done = subprocess.run(
        [str(scripts / command[0]), *command[1:]], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


with tempfile.TemporaryDirectory() as folder:
    assert "xvlm/shapes" in run("vlp-train", "ls", folder=folder)
    run("vlp-eval", "--help", folder=folder)
    run("vlp-data", "shapes", "shapes", "--images", "12", folder=folder)
    assert (Path(folder) / "shapes" / "vocab.txt").is_file()
    print(run("vlp-train", "xvlm/shapes", "--dry-run", folder=folder))
