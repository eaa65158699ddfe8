"""The wheel and the source distribution: they build, hold what they should, and work in an empty environment."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from convert_cases import random_tensors, write

import dsa_jax

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", ".cache", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd, **environment):
    """The output of a command that must succeed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    ended = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution of this tree, built from a copy of it."""
    source, target = tmp_path_factory.mktemp("source") / "dsa_jax", tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    run(sys.executable, "-m", "build", "--outdir", str(target), cwd=source)
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder of the commands of a new environment that holds the wheel and what it needs."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    commands = home / "bin"
    run(str(commands / "python"), "-m", "pip", "install", "--quiet", "--no-input", str(built[0]), cwd=home)
    return commands


def test_the_version_is_said_once():
    assert dsa_jax.__version__ == PROJECT["version"]


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_marks_its_types(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    modules = {str(p.relative_to(ROOT)) for top in ("dsa_jax", "train") for p in (ROOT / top).rglob("*.py")}
    data = {"dsa_jax/py.typed", "train/py.typed", "train/planner/rates.json", "train/planner/serving_rates.json"}
    data |= {f"dsa_jax/server/page/{name}" for name in ("chat.html", "chat.css", "chat.js", "icon.svg")}
    assert modules | data == {name for name in names if not name.startswith("dsa_jax-")}


@pytest.mark.slow
def test_the_source_distribution_makes_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "again"), cwd=source)
    (again,) = (tmp_path / "again").glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(built[0]).namelist())


@pytest.mark.slow
def test_the_commands_work_in_an_empty_environment(installed, tmp_path):
    write(tmp_path / "checkpoint", random_tensors())
    assert "vocab_size = 32" in run(str(installed / "dsa-jax"), "info", "checkpoint", cwd=tmp_path)
    assert "--preset" in run(str(installed / "dsa-train"), "--help", cwd=tmp_path)
    plan = "plan --config tiny --mesh data=2 --seq-len 512 --batch 2".split()
    assert "tokens/s" in run(str(installed / "dsa-train"), *plan, cwd=tmp_path, JAX_PLATFORMS="cpu")


@pytest.mark.slow
def test_the_package_works_in_an_empty_environment(installed, tmp_path):
    script = (
        "import dsa_jax, jax.numpy as jnp, numpy as np\n"
        "selected = dsa_jax.select_topk(jnp.arange(6.0).reshape(1, 2, 3), 2)\n"
        "print(dsa_jax.__file__, np.asarray(selected).tolist())\n"
    )
    printed = run(str(installed / "python"), "-c", script, cwd=tmp_path, JAX_PLATFORMS="cpu")
    assert str(installed.parent) in printed and "[[[1, 2], [1, 2]]]" in printed
