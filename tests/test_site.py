"""The site is built without a warning, has every public name, and its tutorial runs."""

import os
import re
import subprocess
import sys

import pytest
from programs import ROOT

from smoothquant import load_quantized, public

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


def test_every_public_name_is_in_the_reference(site):
    page = (site / "docs" / "reference" / "index.html").read_text(encoding="utf-8")
    described = set(re.findall(r'id="smoothquant(?:\.\w+)*\.(\w+)"', page))
    assert set(public.__all__) <= described


def test_notebooks_and_pictures_are_pages(site):
    for name in ("smoothquant_llama_demo", "smoothquant_opt_demo"):
        assert "data:image/png" in (site / "examples" / name / "index.html").read_text("utf-8")
    assert (site / "docs" / "method.svg").is_file()


def test_nothing_is_fetched_from_elsewhere(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', page)


def test_the_tutorial_runs(tmp_path):
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("perplexity ") == 2 and "bits calibration" in run.stdout
    assert "perplexity, 4 windows" in (tmp_path / "opt-w4a4" / "README.md").read_text()
    assert load_quantized(tmp_path / "opt-w4a4").mixedquant_config.recipe == "fast"
