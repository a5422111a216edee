"""The name under which pip knows the package, and what an installation without torch says."""

import re
import subprocess
import sys

import pytest
from programs import ROOT

from smoothquant.core.version import DISTRIBUTION, install_command

tomllib = pytest.importorskip("tomllib")  # Python 3.11

FOLDERS = ("smoothquant", "run_experiments", "benchmarks", "examples", "docs", "tests")
OWN = "test_distribution.py"
SUFFIXES = (".py", ".md", ".ipynb", ".html", ".toml", ".yml", ".sh")


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def texts():
    """{path: text} of what a reader may take advice from; the changelog tells of the past."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    paths += [path for path in ROOT.glob("*") if path.name != "CHANGELOG.md"]
    paths = [
        path for path in paths if path.suffix in SUFFIXES and path.name != "test_distribution.py"
    ]
    return {path: path.read_text(encoding="utf-8") for path in paths if path.is_file()}


def test_there_is_one_name():
    assert project()["name"] == DISTRIBUTION
    extras = project()["optional-dependencies"]
    own = [r for required in extras.values() for r in required if "[" in r]
    for requirement in own:
        name, names = re.fullmatch(r"(\w+)\[([\w,-]+)\]", requirement).groups()
        assert name == DISTRIBUTION and set(names.split(",")) <= extras.keys()
    assert len(own) >= 4


def test_no_advice_uses_another_name():
    found = texts()
    assert ROOT / "README.md" in found and len(found) > 100
    stale = re.compile(r"smoothquant\\?\[[a-z{]|install '?smoothquant\b")
    advice = re.compile(r"(?:install_command\(['\"]|mixedquant\[)([a-z-]+)['\"\]]")
    extras = set()
    for path, text in found.items():
        assert not stale.search(text), path
        extras |= set(advice.findall(text))
    assert {"experiments", "search"} <= extras <= project()["optional-dependencies"].keys()
    assert install_command("dask") == "pip install 'mixedquant[dask]'"


def test_an_installation_without_torch_says_one_sentence(tmp_path):
    """pip asks for the metadata first, before it downloads any dependency."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        f"sys.argv = ['setup.py', '-q', 'dist_info', '--output-dir', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and not any(tmp_path.iterdir())
    (line,) = run.stderr.splitlines()  # setuptools has no complaint about pyproject.toml either
    assert line.startswith('MixedQuant: the build needs PyTorch; run "pip install torch==')
