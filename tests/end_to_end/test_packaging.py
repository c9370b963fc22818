"""The wheel carries everything that `clew` needs, and works away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cl
from tests.end_to_end.clew import ROOT, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip install .` would install."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_what_the_checkout_has(wheel: Path) -> None:
    assert wheel.name == f"clew-{cl.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "cl", "pipelines", "cluster", "configs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    expected = {
        f"cl/_configs/{name.removeprefix('configs/')}" if name.startswith("configs/") else name for name in tracked
    }
    # The README's pictures are for the README alone.
    missing = {name for name in expected - names if name and not name.startswith("pipelines/report/pictures/")}
    assert not missing
    assert not {name for name in names if name.startswith(("tests/", "configs/", "runs/")) or name.endswith(".pyc")}


def test_it_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    """Unpacked as an installation would be, Clew finds its shipped configs, pins and sample corpus by itself."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import cl, cl.config, cluster.doctor, importlib.metadata as m\n"
        f"assert cl.__file__.startswith({str(site)!r}), cl.__file__\n"
        "assert cl.config.configs_dir().name == '_configs'\n"
        "assert cluster.doctor.pins()['ray'].startswith('2.60')\n"
        "assert {'curate', 'train', 'eval', 'sweep'} <= {k for k in ('curate', 'train', 'eval', 'sweep')"
        " if cl.config.shipped_configs(k)}\n"
        "(point,) = [p for p in m.entry_points(group='console_scripts') if p.name == 'clew']\n"
        "point.load()(['train', '--help'])\n"
    )
    env = environment() | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: clew train" in done.stdout
