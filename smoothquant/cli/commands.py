"""The command line, `smoothquant <verb>`.

Exit codes: 0 success; 1 an error, reported as one line on stderr (MIXEDQUANT_TRACEBACK=1 shows the
traceback); 2 wrong usage; 130 Ctrl-C. Commands import torch and transformers themselves, so that
--help and shell completion stay fast.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.config import RECIPES
from ..core.messages import naming
from ..core.version import __version__, install_command
from .console import (
    Command,
    Group,
    prepare_streams,
    print_bytes,
    print_memory,
    print_table,
    with_output_options,
)

if TYPE_CHECKING:
    import torch

    from ..channels.statistics import ChannelStats
    from ..core.config import MixedQuantConfig

    Stats = Mapping[str, ChannelStats] | None

Report = dict[str, Any]  # a command's result, as JSON values
Recipe = Enum("Recipe", [(name, name) for name in RECIPES], type=str)  # type: ignore[misc]
FAST = Recipe("fast")
Device = Enum("Device", {"cpu": "cpu", "cuda": "cuda", "auto": "auto"}, type=str)
Dtype = Enum(
    "Dtype", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}, type=str
)
Format = Enum("Format", {"compressed_tensors": "compressed-tensors", "gguf": "gguf"}, type=str)
RoundTo = Enum("RoundTo", {"q8_0": "q8_0", "q4_0": "q4_0"}, type=str)
KV_CACHE_BITS = {"16bit": None, "int8": 8, "int4": 4}
KVCache = Enum("KVCache", [(name, name) for name in KV_CACHE_BITS], type=str)  # type: ignore[misc]
DEFAULT_KV_CACHE = KVCache("16bit")

LEAST_TEMPERATURE = 1e-6  # logits divided by less would overflow float32

app = typer.Typer(
    name="smoothquant",
    cls=Group,
    help="Quantize Hugging Face models to W4A4: 4-bit weights and 4-bit activations.",
    epilog="MODEL is a bundled model (smollm2-135m, tiny-opt), a folder, or a Hugging Face id.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "Bundled model name, folder or Hugging Face id."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Quantized model folder.")]

Target = Annotated[Path, typer.Argument(metavar="DST", help="Output folder, written atomically.")]

OVERWRITE = "--overwrite"
OverwriteFile = Annotated[bool, typer.Option(OVERWRITE, help="Replace an existing file.")]
OverwriteModel = Annotated[
    bool, typer.Option(OVERWRITE, help="Replace a folder that holds a model.")
]
OverwriteQuantized = Annotated[
    bool, typer.Option(OVERWRITE, help="Replace a folder that holds a quantized model.")
]

OnDevice = Annotated[
    Device, typer.Option(help="Where to run; auto: on a GPU if the kernels run there.")
]
InDtype = Annotated[
    Dtype | None,
    typer.Option(
        help="dtype of a float model's tensors. [default: float32 for bundled models, else the "
        "stored one]"
    ),
]

Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Calibration texts: .txt, .raw, .json, .jsonl, .jsonl.zst or .parquet. "
        "[default: the bundled WikiText-2 validation split]",
    ),
]

CalibrationTokens = Annotated[int, typer.Option(metavar="N", help="Number of calibration tokens.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed for drawing calibration tokens.")]


def main() -> None:
    """Run the command line and exit the process."""
    prepare_streams()
    app(prog_name="smoothquant")


def command(name: str | None = None, *, prints_result: bool = False) -> Callable:
    """Register a command that has `console.OUTPUT_OPTIONS`, and reports errors as one line on
    stderr and an exit code."""

    def register(function: Callable) -> Callable:
        app.command(name, cls=Command)(with_output_options(function, prints_result=prints_result))
        return function

    return register


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"smoothquant {__version__}")
        raise typer.Exit()


@command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="Output file (.safetensors).")],
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 32768,
    seed: Seed = 42,
    overwrite: OverwriteFile = False,
) -> Report:
    """Collect calibration statistics for `quantize --stats`.

    Writes per-channel statistics of every distinct layer input.
    """
    from ..bundled import load_model
    from ..calibration.collect import collect_stats
    from ..calibration.stats_files import save_stats
    from ..calibration.tokens import calibration_batches
    from ..core.config import MixedQuantConfig
    from ..models.tables import head_name

    config = MixedQuantConfig(
        calibration=_calibration(calibration), calibration_tokens=calibration_tokens, seed=seed
    )
    if output.suffix != ".safetensors":
        raise ValueError(f"FILE must end in .safetensors; got {str(output)!r}")
    if output.exists() and not (overwrite and output.is_file()):
        raise ValueError(f"FILE already exists: {output} (use --overwrite to replace it)")
    loaded, tokenizer = load_model(model)
    batches = calibration_batches(loaded, tokenizer, config)
    stats = collect_stats(loaded, batches, head=head_name(loaded))
    save_stats(stats, output)
    typer.echo(f"Wrote statistics of {len(stats)} layers to {output.resolve()}")
    return {"file": str(output.resolve()), "layers": len(stats)}


@command()
def quantize(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help=MODEL_HELP)],
    target: Target,
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="fast: rotate, then round to nearest. best: also search and use GPTQ (minutes). "
            "tuned: best, then trained against the 16-bit model. rtn: only round to nearest."
        ),
    ] = FAST,
    group_size: Annotated[
        int, typer.Option(metavar="G", help="Channels that share a scale.")
    ] = 128,
    salient_prop: Annotated[
        float | None,
        typer.Option(metavar="P", help="Fraction of channels to keep in 16 bits. [default: 0.05]"),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            metavar="B", help="Target bits per weight; chooses the salient fraction for you."
        ),
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Set any other MixedQuantConfig field. May be repeated.",
        ),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Set MixedQuantConfig fields from a .toml, .yaml or .json file; options and --set "
            "override it.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Keep modules as they are: whole parts of a name (vision_tower), a wildcard "
            "pattern, or re: and a regular expression. May be repeated.",
        ),
    ] = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 32768,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Statistics from `calibrate`, or a published act_scales/*.pt file (read safely, "
            "without running code).",
        ),
    ] = None,
    no_calibration: Annotated[
        bool,
        typer.Option(
            "--no-calibration",
            help="Choose salient channels from the weights alone, which costs accuracy.",
        ),
    ] = False,
    seed: Seed = 42,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold channel permutations into the preceding layers.")
    ] = False,
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer",
            help="Load one decoder layer of SRC at a time. Rerun to resume.",
        ),
    ] = False,
    spill: Annotated[
        bool,
        typer.Option(
            "--spill",
            help="With --by-layer: keep hidden states and GPTQ matrices on disk.",
        ),
    ] = False,
    device: OnDevice = Device.cpu,
    dtype: InDtype = None,
    overwrite: OverwriteQuantized = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print settings, sizes and memory use; write nothing."),
    ] = False,
) -> Report:
    """Quantize a model and save it.

    Loads the whole model into memory unless --by-layer is given.
    """
    from .. import in_memory
    from ..bundled import BUNDLED_MODELS, bundled_folder
    from ..calibration.stats_files import load_stats
    from ..checkpoints.folder import check_target, save_quantized
    from ..checkpoints.sizes import bytes_by_kind
    from ..core.config import WEIGHTS, MixedQuantConfig, parse_field, read_fields
    from ..core.files import hidden_sibling
    from ..models.loading import Companions
    from ..quantization.folding import fold_permutations

    if no_calibration and (stats or calibration):
        raise typer.BadParameter(
            "--no-calibration cannot be combined with --calibration or --stats"
        )
    if by_layer and fold:
        raise typer.BadParameter("--by-layer cannot be combined with --fold")
    if by_layer and (device != Device.cpu or dtype is not None):
        raise typer.BadParameter("--by-layer cannot be combined with --device or --dtype")
    if spill and not by_layer:
        raise typer.BadParameter("--spill requires --by-layer")
    options = {
        "recipe": recipe.value,
        "group_size": group_size,
        "salient_prop": salient_prop,
        "bits": bits,
        "calibration": WEIGHTS if no_calibration else _calibration(calibration),
        "calibration_tokens": calibration_tokens,
        "seed": seed,
        "ignore": ignore or [],
    }
    given = {name: options[name] for name in options if _is_given(context, name)}
    if no_calibration:
        given["calibration"] = WEIGHTS
    from_file = read_fields(config_file) if config_file else {}
    config = MixedQuantConfig.from_fields(
        options | from_file | given | dict(map(parse_field, fields or []))
    )
    if config.calibration == WEIGHTS and config.needs_tokens:
        without = "--no-calibration" if no_calibration else "calibration='weights'"
        raise ValueError(f"{config.needs_tokens} needs calibration; drop {without}")
    if by_layer and config.tune:
        raise typer.BadParameter(
            "--by-layer cannot be combined with recipe 'tuned' (tune=True), which needs the whole "
            "model in memory"
        )
    target = check_target(target, overwrite=overwrite)
    loaded_stats = load_stats(stats) if stats else None
    if dry_run:
        return _plan(source, config, loaded_stats, dtype, by_layer=by_layer, spill=spill)
    started = time.perf_counter()
    if by_layer:
        before = _convert(source, target, config, loaded_stats, spill=spill, overwrite=overwrite)
    else:
        model, tokenizer = _load(source, device, dtype)
        before = bytes_by_kind(model)
        state = hidden_sibling(target, "tuning") if config.tune else None
        if state is not None:
            typer.echo(f"Tuning keeps its progress in {state}; the same command resumes it.")
        in_memory.quantize(model, config, loaded_stats, tokenizer=tokenizer, tuning_state=state)
        if fold:
            typer.echo(f"Folded the channel permutations of {len(fold_permutations(model))} layers")
        files = Companions(bundled_folder(source) if source in BUNDLED_MODELS else source)
        save_quantized(model, target, files, overwrite=overwrite)
        if state is not None:
            state.unlink(missing_ok=True)
    return _summary(source, target, before, time.perf_counter() - started)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _convert(
    source: str,
    target: Path,
    config: MixedQuantConfig,
    stats: Stats,
    *,
    spill: bool,
    overwrite: bool,
) -> dict[str, int]:
    """Convert a model layer by layer; returns the bytes of the float model by kind."""
    from ..bundled import model_folder
    from ..checkpoints.conversion import convert, float_shapes
    from ..checkpoints.sizes import bytes_by_kind

    folder = model_folder(source)
    convert(folder, target, config, stats, spill=spill, overwrite=overwrite)
    return bytes_by_kind(float_shapes(folder))


def _summary(source: str, target: Path, before: Mapping[str, int], seconds: float) -> Report:
    """Print what `quantize` made, from the saved folder, and what to do next."""
    from ..checkpoints.folder import open_quantized
    from ..checkpoints.inspection import inspect_folder
    from ..quantization.records import weight_counts

    made = inspect_folder(target)
    counts = weight_counts(open_quantized(target).model)
    ratio = sum(before.values()) / made["bytes"]
    print_bytes(before, made["kinds"])
    typer.echo(f"\n{counts}")
    typer.echo(f"{made['bits_per_weight']:.3f} bits per quantized weight")
    typer.echo(f"{ratio:.2f} times smaller than {source}, after {seconds:.1f} s")
    typer.echo(f"\nThe quantized model is in {target}")
    words = ["smoothquant", "eval", str(target), "--windows", "8", "--compare", source]
    typer.echo(f"Next: {shlex.join(words)}")
    return {
        "folder": str(target),
        "bytes_before": sum(before.values()),
        "bytes": made["bytes"],
        "ratio": ratio,
        "bits_per_weight": made["bits_per_weight"],
        "share_quantized": counts.share,
        "seconds": seconds,
        "config": made["config"],
    }


def _plan(
    source: str,
    config: MixedQuantConfig,
    stats: Stats,
    dtype: Dtype | None,
    *,
    by_layer: bool,
    spill: bool,
) -> Report:
    """Print what `quantize --dry-run` reports: settings, sizes and peak memory."""
    from ..bundled import model_folder
    from ..checkpoints.conversion import float_shapes
    from ..checkpoints.sizes import bytes_by_kind, planned_bytes
    from ..core.config import WEIGHTS
    from ..quantization.memory import planned_memory
    from ..quantization.tuning import SEQUENCE, check_tunable, planned_steps

    how = Device.cpu, dtype
    model = float_shapes(model_folder(source)) if by_layer else _load(source, *how)[0]
    if config.tune:
        check_tunable(model, config)
    for name, value in config.to_dict().items():
        typer.echo(f"{name:<20}{value}")
    calibrates = config.calibration != WEIGHTS and (stats is None or bool(config.needs_tokens))
    after = planned_bytes(model, config, stats, stats_to_come=calibrates)
    before = bytes_by_kind(model)
    print_bytes(before, after)
    tokens = config.calibration_tokens if calibrates else 0
    size = sum(after.values())
    memory = planned_memory(model, config, size, tokens, stats, by_layer=by_layer, spill=spill)
    print_memory(memory)
    steps = planned_steps(tokens) if config.tune else 0
    if steps:
        typer.echo(f"Tuning takes {steps} training steps of {SEQUENCE} tokens each.")
    return {
        "bytes_before": sum(before.values()),
        "bytes": size,
        "ratio": sum(before.values()) / size,
        "kinds": after,
        "peak_memory": memory,
        "tuning_steps": steps,
        "config": config.to_dict(),
    }


@command()
def dequantize(source: Folder, target: Target, overwrite: OverwriteModel = False) -> Report:
    """Convert a quantized model back to a float model.

    The float weights have exactly the values that the 4-bit codes represent.
    """
    from ..checkpoints.folder import check_target, load_quantized, write_folder
    from ..models.loading import Companions
    from ..quantization.undo import dequantize

    target = check_target(target, overwrite=overwrite, of_any_model=True)
    model = load_quantized(source)
    dequantize(model)
    write_folder(model, target, Companions(source), overwrite=overwrite)
    typer.echo(f"The float model is in {target}")
    return {"folder": str(target)}


@command()
def export(
    source: Folder,
    target: Annotated[Path, typer.Argument(metavar="DST", help="Output folder, or file for gguf.")],
    to: Annotated[Format, typer.Option("--format", help="Output format.")],
    round_to: Annotated[
        RoundTo | None,
        typer.Option(
            help="gguf: format of quantized weights that Q4_0 cannot express exactly.",
            show_default="q8_0",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(OVERWRITE, help="Replace a folder that holds a model, or a file.")
    ] = False,
) -> Report:
    """Export a quantized model for another inference engine.

    compressed-tensors keeps the exact weights; gguf, for llama.cpp, those that Q4_0 can express,
    and rounds the others. A model that the format cannot express is rejected with the reason.
    """
    from ..checkpoints.export import export_compressed_tensors
    from ..checkpoints.export_gguf import check_gguf_target, export_gguf
    from ..checkpoints.folder import check_target, load_quantized
    from ..models.loading import Companions, load_tokenizer

    is_file = to is Format.gguf
    if round_to and not is_file:
        raise typer.BadParameter("--round-to requires --format gguf")
    report: Report = {"file" if is_file else "folder": str(target), "format": to.value}
    if is_file:
        check_gguf_target(target, overwrite=overwrite, name="DST", option="--overwrite")
        model = load_quantized(source)
        tokenizer = load_tokenizer(source) if Companions(source).has_tokenizer else None
        kind = (round_to or RoundTo["q8_0"]).value.upper()
        report["tensors"] = export_gguf(
            model, target, tokenizer, round_to=kind, overwrite=overwrite
        )
        if tokenizer is None:
            typer.echo("No tokenizer was found, so the file has no vocabulary")
    else:
        target = check_target(target, overwrite=overwrite, of_any_model=True)
        model = load_quantized(source)
        export_compressed_tensors(model, target, Companions(source), overwrite=overwrite)
    typer.echo(f"The {to.value} model is in {target}")
    return report


@command(prints_result=True)
def inspect(folder: Folder) -> Report:
    """Show the contents of a quantized model folder, layer by layer.

    Reads file headers only, no weights.
    """
    from ..checkpoints.inspection import inspect_folder
    from ..serving.shards import parallel_sizes

    report = inspect_folder(folder) | {"tensor_parallel": parallel_sizes(folder)}
    for name in ("folder", "architecture", "format_version", "dtype"):
        typer.echo(f"{name:<18}{report[name]}")
    typer.echo(
        f"{'size':<18}{report['bytes']:,} bytes in {report['tensors']} tensors\n"
        f"{'quantized':<18}{report['quantized_layers']} layers, "
        f"{report['quantized_weights']:,} weights at {report['bits_per_weight']:.3f} bits\n"
        f"{'tensor parallel':<18}{_parts(report['tensor_parallel'])}"
    )
    typer.echo("\nConfig: " + ", ".join(f"{k}={v}" for k, v in report["config"].items()) + "\n")
    print_table(("kind", "bytes"), [(k, f"{v:,}") for k, v in report["kinds"].items()])
    typer.echo()
    rows = [
        (
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            layer["action"],
            f"{layer['bits_per_weight']:.3f}",
            layer["num_salient"] or "",
            f"{layer['bytes']:,}",
            _remark(layer),
        )
        for layer in report["layers"]
    ]
    print_table(("layer", "shape", "", "bits", "salient", "bytes", ""), rows)
    return report


@command(prints_result=True)
def verify(folder: Folder) -> Report:
    """Check that a quantized model folder is intact.

    Reads every tensor, repeats all checks that loading makes, and runs each quantized layer.
    """
    from ..checkpoints.inspection import verify_folder
    from ..serving.shards import parallel_sizes

    report = {"ok": True, **verify_folder(folder), "tensor_parallel": parallel_sizes(folder)}
    for check in report["checks"]:
        typer.echo(f"ok: {check}")
    typer.echo(f"{'tensor parallel':<18}{_parts(report['tensor_parallel'])}")
    typer.echo(
        f"{report['folder']}: {report['layers']} quantized layers, {report['tensors']} tensors, "
        f"{report['bytes']:,} bytes"
    )
    return report


@command("eval", prints_result=True)
def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Text to score. [default: the bundled WikiText-2 test split]"
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(metavar="N", help="Score only the first N windows. [default: all]")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="T", help="Tokens per window. [default: the model's maximum, up to 2048]"
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Also report MODEL's perplexity, and KL divergence from and top-1 agreement with "
            "it.",
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Record the result in the model card (README.md).")
    ] = False,
    device: OnDevice = Device.cpu,
    dtype: InDtype = None,
) -> Report:
    """Measure perplexity.

    Joins the rows with blank lines, cuts the tokens into non-overlapping windows and reports
    exp(mean token NLL).
    """
    from ..bundled import check_model_name, wikitext
    from ..checkpoints.folder import is_quantized_folder
    from ..checkpoints.model_card import add_evaluation
    from ..core.texts import read_texts
    from ..evaluation.perplexity import Evaluator
    from ..models.running import max_positions

    if card and not is_quantized_folder(model):
        raise ValueError(f"--card needs a quantized model folder; got {model!r}")
    check_model_name(model)
    with naming(name_or_folder="--compare"):
        if compare is not None:
            check_model_name(compare)
    with naming(source="--text"):
        rows = wikitext("test") if text is None else list(read_texts(text))
    _check_dtype(dtype, model, compare)
    scored, tokenizer = _load(model, device, dtype)
    if seq_len is None:
        seq_len = min(2048, max_positions(scored) or 2048)
    evaluator = Evaluator(rows, tokenizer, n_samples=windows, seq_len=seq_len)
    evaluator.check_model(scored)
    with naming(name_or_folder="--compare"):
        reference = None if compare is None else _load(compare, device, dtype)[0]
    if reference is None:
        result = {"perplexity": float(evaluator.evaluate(scored))}
    else:
        result = evaluator.compare(scored, reference)._asdict()
    if card:
        source = Path(text).name if text else "WikiText-2 test"
        scope = f"{evaluator.num_windows} of {evaluator.available_windows}"
        dataset = f"{source}, {scope} windows of {seq_len} tokens"
        own = {name: value for name, value in result.items() if name != "reference_perplexity"}
        add_evaluation(model, {f"{name}, {dataset}": value for name, value in own.items()})
    measured = {"windows": evaluator.num_windows, "of_windows": evaluator.available_windows}
    names = {"model": model, "reference": compare, "text": text or "wikitext-2-raw test"}
    return {**result, **names, **measured, "seq_len": seq_len}


@command(prints_result=True)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[
        int,
        typer.Option("-n", "--max-new-tokens", metavar="N", min=1, help="Tokens to generate."),
    ] = 50,
    temperature: Annotated[
        float,
        typer.Option(metavar="T", min=0.0, help="Sampling temperature; 0 decodes greedily."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Sampling seed.")] = 0,
    kv_cache: Annotated[
        KVCache, typer.Option(help="Format of the key-value cache; 16bit: the model's dtype.")
    ] = DEFAULT_KV_CACHE,
    device: OnDevice = Device.cpu,
    dtype: InDtype = None,
) -> Report:
    """Generate text from a prompt."""
    import torch
    from transformers import TextStreamer

    from ..models.generation import generate as generate_text
    from ..models.running import check_positions, check_token_ids

    if temperature and not LEAST_TEMPERATURE <= temperature < math.inf:
        least = f"{LEAST_TEMPERATURE:g}"
        raise ValueError(f"temperature must be 0, or finite and >= {least}; got {temperature}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64 - 1]; got {seed}")
    _check_dtype(dtype, model)
    loaded, tokenizer = _load(model, device, dtype)
    if tokenizer is None or not loaded.can_generate():
        raise ValueError(f"MODEL must generate text and have a tokenizer; got {model!r}")
    torch.manual_seed(seed)
    if prompt != prompt.encode(errors="replace").decode():
        raise ValueError(f"prompt must be valid UTF-8; got {prompt!r}")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False)
    if inputs.input_ids.numel() == 0:
        raise ValueError(f"prompt must hold at least one token; got {prompt!r}")
    check_token_ids(loaded, inputs.input_ids)
    tokens = {"prompt": inputs.input_ids.shape[1], "max_new_tokens": max_new_tokens}
    if loaded.config.is_encoder_decoder:  # each part has positions of its own
        for name, count in tokens.items():
            check_positions(loaded, **{name: count})
    else:
        check_positions(loaded, **tokens)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    cache = {}
    if bits := KV_CACHE_BITS[kv_cache.value]:
        from ..layers.cache import QuantizedKVCache, cache_argument

        with naming(config="MODEL"):
            cache[cache_argument(loaded)] = QuantizedKVCache(loaded.config, bits)
    ids = generate_text(
        loaded,
        **inputs.to(loaded.device),
        **cache,
        **({"do_sample": False} | sampling),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id or 0,
    )[0]
    new = len(ids) - (0 if loaded.config.is_encoder_decoder else tokens["prompt"])
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"text": text, "prompt_tokens": tokens["prompt"], "new_tokens": new}


@command(prints_result=True)
def bench(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER]",
            help="Also benchmark this quantized model.",
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(min=2, metavar="T", help="Prompt length in tokens.")] = 128,
    new: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to generate.")] = 16,
    device: OnDevice = Device.cpu,
    dtype: Annotated[
        Dtype,
        typer.Option(help="dtype of the single layer; a folder's model keeps its own."),
    ] = Dtype.float32,
) -> Report:
    """Run a quick speed check.

    Compares one quantized layer with torch's float layer and, given FOLDER, a quantized model with
    its dequantized copy.
    """
    import torch

    from ..bundled import wikitext
    from ..calibration.tokens import token_blocks
    from ..checkpoints.folder import load_quantized
    from ..core.config import MixedQuantConfig
    from ..evaluation.speed import layer_speeds, model_speeds
    from ..kernels import ops
    from ..models.loading import load_tokenizer
    from ..models.running import check_positions, check_token_ids
    from .doctor import chip_name

    model = tokenizer = None
    place = _torch_device(device)
    if folder:
        model, tokenizer = load_quantized(folder).to(place), load_tokenizer(folder)
        if not model.can_generate():  # type: ignore[operator]
            raise ValueError(f"FOLDER must hold a model that generates text; got {folder}")
        check_positions(model, prompt=prompt, new=new)
        ids = token_blocks(wikitext("test"), tokenizer, 1, prompt)[0]
        check_token_ids(model, ids)
    report: dict[str, Any] = {
        "processor": chip_name(),
        "instruction_set": ops.isa(),
        "threads": torch.get_num_threads(),
        "device": str(place),
        "layer": layer_speeds(
            MixedQuantConfig(), dtype=getattr(torch, dtype.value), device=str(place)
        ),
    }
    if model is not None:
        report["model"] = model_speeds(model, ids.to(place), new)
    where = torch.cuda.get_device_name() if place.type == "cuda" else report["instruction_set"]
    typer.echo(f"{report['processor']}, {where}, {report['threads']} threads\n")
    for title, rows in (
        ("One 1024 x 1024 layer, group size 128, 5% salient, tokens/s", report["layer"]),
        (f"{folder}, tokens/s", report.get("model", [])),
    ):
        if rows:
            typer.echo(title)
            head = [name.removesuffix("_tokens_per_second") for name in rows[0]]
            print_table(head, [[_rounded(v) for v in row.values()] for row in rows])
            typer.echo()
    return report


@command(prints_result=True)
def doctor() -> Report:
    """Describe this machine and installation, for bug reports."""
    from .doctor import environment

    report = environment()
    for name, value in report.items():
        parts = value if isinstance(value, Mapping) else {"": value}
        for part, item in parts.items():
            item = ", ".join(item) if isinstance(item, list) else item
            typer.echo(f"{name + (part and f'.{part}'):<28}{item}")
    if "fault" in report:
        raise RuntimeError(f"smoothquant does not work here: {report['fault']}")
    return report


ARGUMENTS_PASSED_ON: dict[str, Any] = {
    "cls": Command,
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


@app.command("lm-eval", **ARGUMENTS_PASSED_ON)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness on quantized models.

    Example: smoothquant lm-eval run --model hf --model_args pretrained=FOLDER --tasks NAME
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise RuntimeError(f"lm-eval is not installed ({error}): pip install lm-eval") from error
    sys.argv[1:] = context.args
    cli_evaluate()


@app.command(cls=Command, context_settings=ARGUMENTS_PASSED_ON["context_settings"])
def serve(context: typer.Context, folder: Folder) -> None:
    """Serve a quantized model folder with vLLM, by OpenAI's API.

    Everything after FOLDER goes to vLLM's server: smoothquant serve FOLDER --port 8001
    """
    from ..serving.launch import server_command, server_environment

    argv = server_command(folder, context.args)
    sys.stdout.flush()
    os.execve(argv[0], argv, server_environment(context.args))


@app.command(**ARGUMENTS_PASSED_ON)
def sweep(context: typer.Context) -> None:
    """Measure many settings; rerun to resume."""
    _run_experiments(context.args)


@app.command(**ARGUMENTS_PASSED_ON)
def plot(context: typer.Context) -> None:
    """Plot the finished part of a sweep.

    Draws figures and writes an interactive page.
    """
    _run_experiments(["--plot", *context.args])


def _run_experiments(argv: list[str]) -> None:
    try:
        from run_experiments import main
    except ImportError as error:
        raise RuntimeError(
            f"run_experiments or a package that it needs is missing ({error}): "
            f"{install_command('experiments')}"
        ) from error
    raise typer.Exit(main(argv))


def _torch_device(device: Device) -> torch.device:
    """The device to run on; RuntimeError if it is "cuda" and the kernels do not run there."""
    import torch

    from ..kernels import ops

    fault = ""
    if device != Device.cpu:
        if not torch.cuda.is_available():
            fault = "PyTorch finds no GPU"
        elif not ops.has_cuda():
            fault = "MixedQuant was built without CUDA kernels"
    if fault and device == Device.cuda:
        raise RuntimeError(f"--device cuda cannot be used: {fault}")
    return torch.device("cpu" if fault or device == Device.cpu else "cuda")


def _check_dtype(dtype: Dtype | None, *models: str | None) -> None:
    """Raise ValueError if a dtype is given, but every model is quantized and keeps its own."""
    from ..checkpoints.folder import is_quantized_folder

    if dtype is not None and all(is_quantized_folder(name) for name in models if name):
        raise ValueError(
            "dtype must not be given for a quantized folder, which keeps its own; got "
            f"{dtype.value}"
        )


def _load(name: str, device: Device, dtype: Dtype | None) -> tuple[Any, Any]:
    """(model, tokenizer) of a bundled name, folder or Hugging Face id."""
    import torch

    from ..bundled import load_model

    place = _torch_device(device)
    wanted = None if dtype is None else getattr(torch, dtype.value)
    model, tokenizer = load_model(name, dtype=wanted)
    return model.to(place), tokenizer


def _calibration(texts: str | None) -> str:
    """The calibration file, checked now and not after the model is loaded; or the bundled text."""
    from ..core.config import WIKITEXT
    from ..core.texts import read_texts

    if texts is None:
        return WIKITEXT
    with naming(source="--calibration"):
        read_texts(texts)
    return texts


def _remark(layer: Mapping[str, Any]) -> str:
    """What `inspect` notes about a layer: why it was kept, or settings particular to it."""
    if "shared_with" in layer:
        return f"shared with {layer['shared_with']}"
    if layer["action"] == "kept":
        return layer["reason"]
    return ", ".join(f"{name}={value}" for name, value in layer["choices"].items())


def _parts(sizes: Mapping[int, str]) -> str:
    """The numbers of parts that fit, and why the first other one does not."""
    fit = ", ".join(str(parts) for parts, fault in sizes.items() if not fault)
    faults = (f"; not {parts}: {fault}" for parts, fault in sizes.items() if fault)
    return f"{fit or 'none'}{next(faults, '')}"


def _rounded(value: Any) -> Any:
    return f"{value:,.2f}" if isinstance(value, float) else value
