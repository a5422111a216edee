"""The map of the package: who imports whom, what an import does, which paths are promised."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import types
from unittest import mock

import pytest
from programs import ROOT

import smoothquant
from smoothquant import old_paths, public

CODE = (".py", ".ipynb")

# What published code, the documentation and earlier versions' documentation import. An entry is a
# promise: it may be added to, not taken from.
PUBLISHED = {
    "smoothquant": [
        "CheckpointError",
        "MixedQuantConfig",
        "QuantizedKVCache",
        "W4A4Linear",
        "collect_stats",
        "convert",
        "dequantize",
        "fold_permutations",
        "load_quantized",
        "load_stats",
        "ops",
        "quantization_report",
        "quantize",
        "quantize_model",
        "save_quantized",
        "smooth_lm",
        "__version__",
    ],
    "smoothquant.bundled": [
        "bundled_folder",
        "check_model_name",
        "load_bundled",
        "load_model",
        "model_folder",
        "wikitext",
    ],
    "smoothquant.calibration": [
        "calibration_batches",
        "collect_stats",
        "draw_blocks",
        "get_act_scales",
        "get_static_decoder_layer_scales",
        "load_act_scales",
        "load_stats",
        "save_act_scales",
        "save_stats",
        "token_blocks",
    ],
    "smoothquant.checkpoint": ["check_target", "load_quantized", "save_quantized"],
    "smoothquant.cli": ["main"],
    "smoothquant.config": ["MixedQuantConfig"],
    "smoothquant.convert": ["convert"],
    "smoothquant.errors": ["CheckpointError"],
    "smoothquant.export": ["export_compressed_tensors"],
    "smoothquant.fake_quant": [
        "FakeW4A4Linear",
        "W4A4Linear",
        "quantize_activation_per_group_absmax",
        "quantize_activation_per_group_absmax_sort",
        "quantize_activation_per_tensor_absmax",
        "quantize_activation_per_token_absmax",
        "quantize_falcon",
        "quantize_llama_like",
        "quantize_mixtral",
        "quantize_model",
        "quantize_opt",
        "quantize_weight_per_channel_absmax",
        "quantize_weight_per_group_absmax",
        "quantize_weight_per_group_absmax_sort",
        "quantize_weight_per_tensor_absmax",
    ],
    "smoothquant.families": ["layer_inputs"],
    "smoothquant.folding": ["fold_permutations"],
    "smoothquant.inspection": ["bytes_by_kind", "inspect_folder", "planned_bytes", "verify_folder"],
    "smoothquant.layer_report": ["layer_report"],
    "smoothquant.linear": ["FakeW4A4Linear", "QuantizedLinear", "W4A4Linear"],
    "smoothquant.lora": ["on_quantized"],
    "smoothquant.model_size": ["Byte", "GiB", "KiB", "MiB", "get_model_size"],
    "smoothquant.ops": ["build_info", "isa", "set_isa", "supported_isas", "w4a4_linear"],
    "smoothquant.ppl_eval": ["Evaluator", "main"],
    "smoothquant.quantize": ["LinearRecord", "dequantize", "quantization_report", "quantize"],
    "smoothquant.reference": ["w4a4_linear"],
    "smoothquant.smooth": ["smooth_lm", "smooth_ln_fcs", "smooth_ln_fcs_llama_like"],
    "smoothquant.sorting": ["ChannelPlan", "ChannelStats", "choose_channels"],
    "smoothquant.speed": ["layer_speeds", "model_speeds"],
    "smoothquant.texts": ["read_texts"],
    "run_experiments": [
        "Evaluator",
        "get_calib_dataset",
        "get_calib_feat",
        "plot_results",
        "run_experiments",
    ],
}


def test_imports_go_downward_and_never_in_a_circle():
    found = subprocess.run(
        [sys.executable, "-c", "import importlinter.cli as c; c.lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 kept, 0 broken" in found.stdout


@pytest.mark.parametrize("module", PUBLISHED)
def test_published_names_are_where_they_were(module):
    found = importlib.import_module(module)
    for name in PUBLISHED[module]:
        assert getattr(found, name) is not None, name


def test_every_public_name_is_promised():
    assert {*public.__all__, "ops", "__version__"} == set(PUBLISHED["smoothquant"])
    assert {*smoothquant.__all__, "ops"} == set(PUBLISHED["smoothquant"])
    assert set(public.__all__) <= set(dir(smoothquant))


def test_old_modules_lead_to_the_new_ones():
    from smoothquant.linear import W4A4Linear

    from smoothquant.layers import linear

    assert W4A4Linear is linear.W4A4Linear
    for old, homes in old_paths.MOVED.items():
        module = importlib.import_module(f"smoothquant.{old}")
        main = importlib.import_module(f"smoothquant.{homes[0]}")
        if len(homes) == 1:
            assert module is main
        for name in vars(main):
            assert name.startswith("__") or getattr(module, name) is getattr(main, name)
    for name in old_paths.NAMES_OF_FUNCTIONS:
        assert isinstance(getattr(smoothquant, name), types.FunctionType)


def test_public_functions_can_be_patched():
    import smoothquant.quantize  # noqa: F401

    before = smoothquant.quantize
    with mock.patch("smoothquant.quantize", "patched"):
        assert smoothquant.quantize == "patched"
    assert smoothquant.quantize is before


def test_no_function_shadows_a_module():
    modules = {name for _, name, _ in pkgutil.iter_modules(smoothquant.__path__)}
    assert not modules & set(public.__all__)
    # nor does a module of today stand where an old path leads elsewhere
    assert not modules & set(old_paths.MOVED)


def test_importing_the_package_loads_nothing_heavy(run_python):
    run_python(
        "import sys, smoothquant\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert smoothquant.__version__\n"
        "assert callable(smoothquant.quantize) and smoothquant.MixedQuantConfig().num_bits == 4\n"
        "assert 'transformers' not in sys.modules"
    )


@pytest.mark.parametrize("order", ["torch, smoothquant", "smoothquant, torch"])
def test_torch_has_the_ops_in_whichever_order(order, run_python):
    run_python(f"import {order}\nassert callable(torch.ops.mixedquant.w4a4_linear)")


def test_looking_for_torch_without_importing_it_changes_nothing(run_python):
    run_python(
        "import importlib.util, smoothquant\n"
        "assert importlib.util.find_spec('torch') and importlib.util.find_spec('torch')\n"
        "import torch; assert callable(torch.ops.mixedquant.w4a4_linear)"
    )


def test_torch_imports_where_the_kernels_do_not_load(run_python):
    found = run_python(
        "import sys, smoothquant\n"
        "sys.modules['smoothquant._C'] = None\n"
        "import torch\n"
        "try: smoothquant.quantize\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "smoothquant cannot register with torch" in found.stderr
    assert found.stdout.startswith("MixedQuant's compiled kernels could not be loaded")


def code_of(path):
    """The Python code of a module or a notebook."""
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n".join(re.sub(r"^[%!].*", "", cell, flags=re.MULTILINE) for cell in code)


def calls_of_from_pretrained(path):
    """Calls of from_pretrained that may run code of a repository."""
    for node in ast.walk(ast.parse(code_of(path))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", getattr(node.func.value, "attr", ""))
            if node.func.attr == "from_pretrained" and owner != "GenerationConfig":
                yield node


def test_code_of_a_repository_never_runs():
    folders = ("smoothquant", "run_experiments", "benchmarks", "examples")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in CODE]
    calls = {path: list(calls_of_from_pretrained(path)) for path in paths}
    loading = ROOT / "smoothquant" / "models" / "loading.py"
    assert [path for path, found in calls.items() if found] == [loading]
    for call in calls[loading]:
        trusts = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert trusts["trust_remote_code"] == "False", ast.unparse(call)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'smoothquant' has no attribute 'nothing'"):
        smoothquant.nothing  # noqa: B018


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "smoothquant" / "py.typed").is_file()
