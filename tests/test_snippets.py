"""The code blocks of README.md and docs/ run as they are written, in order, without a network.

A block that cannot has `<!-- not run: REASON -->` on the line before it, and a page of measurements
`<!-- not run on this page: REASON -->` once. NOT_RUN counts them.
"""

import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from programs import ROOT

from run_experiments.run_experiments import parse_args
from smoothquant import MixedQuantConfig, load_quantized
from smoothquant.cli import app

tomllib = pytest.importorskip("tomllib")  # Python 3.11

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {"README.md": 1, "CONTRIBUTING.md": 1, "install.md": 1, "tutorial.md": 1, "how-to.md": 5}
NOT_RUN |= {"serving.md": 3}
NOT_RUN_PAGES = {"results.md"}

MARK, PAGE_MARK = "<!-- not run: ", "<!-- not run on this page: "
FENCE = re.compile(r"(?m)^(?P<mark><!-- .*-->\n)?```(?P<language>\w*)\n(?P<code>(?s:.*?))^```$")
INDENTED = re.compile(r"(?m)^\n {4}(?! *[-*]).*$")


def blocks(page):
    """[(language, code, whether it is marked)]; a fence without a language is for the shell."""
    found = [
        (match["language"] or "shell", match["code"], (match["mark"] or "").startswith(MARK))
        for match in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]
    return [block for block in found if block[0] != "text"]


def commands(code):
    """The words of every command of a shell block."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_is_marked(page):
    text = page.read_text(encoding="utf-8")
    marked = [block for block in blocks(page) if block[2]]
    assert len(marked) == text.count(MARK) == NOT_RUN.get(page.name, 0)
    assert (PAGE_MARK in text) == (page.name in NOT_RUN_PAGES)
    if page.name not in NOT_RUN_PAGES:
        assert not INDENTED.search(FENCE.sub("", text)), (
            "code in a fence is run; indented, it is not"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_these_options(page):
    program = typer.main.get_command(app)
    for language, code, marked in blocks(page):
        if language == "python":
            ast.parse(code)
        elif language == "toml":
            assert re.match(r"# \S+\.toml\n", code)  # its file
            MixedQuantConfig.from_fields(tomllib.loads(code))
        elif not marked:
            for words in commands(code):
                if words[:3] == ["python", "-m", "run_experiments"]:
                    parse_args(words[3:])
                    continue
                assert words[0] == "smoothquant" and words[1] in program.commands, words
                program.commands[words[1]].make_context(words[1], words[2:])


def _program(page):
    """All blocks of a page as one Python program."""
    parts = ["import subprocess"]
    for language, code, marked in blocks(page):
        if marked:
            continue
        if language == "toml":
            code = f"open({code.split()[1]!r}, 'w').write({code!r})\n"
        if language == "shell":
            code = f"subprocess.run(['bash', '-ec', {code!r}], check=True)\n"
        parts.append(code)
    return "\n".join(parts)


RUN = [page for page in PAGES if page.name not in NOT_RUN_PAGES and "\n" in _program(page)]


@pytest.mark.long
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_blocks_run_as_they_are_written(page, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, words in (("python", ""), ("smoothquant", " -m smoothquant")):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{words} "$@"\n')
        path.chmod(0o755)
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(search),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    folder = tmp_path / "here"
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", _program(page)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    if page.name == "tutorial.md":
        assert run.stdout.count("perplexity ") >= 2 and "bits calibration" in run.stdout
        assert "perplexity, 4 windows" in (folder / "opt-w4a4" / "README.md").read_text()
        assert load_quantized(folder / "opt-w4a4").mixedquant_config.recipe == "fast"
    for saved in folder.glob("*-w4a4"):  # every folder is complete
        assert (saved / "tokenizer.json").is_file(), saved


def test_the_how_to_lists_every_field():
    table = (
        (ROOT / "docs" / "how-to.md").read_text(encoding="utf-8").partition("These are the fields")
    )
    rows = table[2].partition("\n## ")[0]
    fields = [field.name for field in dataclasses.fields(MixedQuantConfig)]
    assert sorted(re.findall(r"`(\w+)`", rows)) == sorted(fields)


def test_every_kind_of_page_is_run():
    names = {"README.md", "tutorial.md", "how-to.md", "command-line.md", "export.md"}
    assert names <= {page.name for page in RUN}


def test_the_readme_and_its_picture_have_the_same_numbers():
    pytest.importorskip("matplotlib")
    sys.path.append(str(ROOT / "docs"))
    import draw_recipes

    rows, bits = draw_recipes.bars(draw_recipes.CELLS)
    assert [name for name, _ in rows] == ["16-bit model", "best", "fast", "rtn"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"{number:.2f}" in text for number in (bits, *(value for _, value in rows)))
