"""The site is built without a warning and has every public name."""

import re
import subprocess
import sys

import pytest
from programs import ROOT

from smoothquant import public

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
