"""The command line, `smoothquant <verb>`.

Exit codes: 0 success; 1 an error, reported as one line on stderr (MIXEDQUANT_TRACEBACK=1 shows the
traceback); 2 wrong usage; 130 Ctrl-C. Commands import torch and transformers themselves, so that
--help and shell completion stay fast.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.config import RECIPES
from ..core.errors import CheckpointError
from ..core.messages import naming
from ..core.version import __version__
from .console import (
    Command,
    Group,
    prepare_streams,
    print_bytes,
    print_json,
    print_memory,
    print_table,
    stdout_for_json,
)

if TYPE_CHECKING:
    from ..channels.statistics import ChannelStats
    from ..core.config import MixedQuantConfig

    Stats = Mapping[str, ChannelStats] | None

Recipe = Enum("Recipe", [(name, name) for name in RECIPES], type=str)  # type: ignore[misc]
FAST = Recipe("fast")
Format = Enum("Format", {"compressed_tensors": "compressed-tensors"}, type=str)
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

Json = Annotated[bool, typer.Option("--json", help="Print only JSON to stdout.")]
OVERWRITE = "--overwrite"
OverwriteFile = Annotated[bool, typer.Option(OVERWRITE, help="Replace an existing file.")]
OverwriteModel = Annotated[
    bool, typer.Option(OVERWRITE, help="Replace a folder that holds a model.")
]
OverwriteQuantized = Annotated[
    bool, typer.Option(OVERWRITE, help="Replace a folder that holds a quantized model.")
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


def command(**settings: Any) -> Callable:
    """Register a command that reports errors as one line on stderr and an exit code."""
    return app.command(cls=Command, **settings)


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
) -> None:
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


@command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help=MODEL_HELP)],
    target: Target,
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="fast: rotate, then round to nearest. best: also search and use GPTQ (minutes). "
            "rtn: only round to nearest."
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
            help="Load one decoder layer of the folder SRC at a time. Rerun to resume.",
        ),
    ] = False,
    spill: Annotated[
        bool,
        typer.Option(
            "--spill",
            help="With --by-layer: keep hidden states and GPTQ matrices on disk.",
        ),
    ] = False,
    overwrite: OverwriteQuantized = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print settings, sizes and memory use; write nothing."),
    ] = False,
) -> None:
    """Quantize a model and save it.

    Loads the whole model into memory unless --by-layer is given.
    """
    from ..calibration.stats_files import load_stats
    from ..checkpoints.conversion import convert
    from ..checkpoints.folder import check_target
    from ..core.config import WEIGHTS, MixedQuantConfig, parse_field

    if no_calibration and (stats or calibration):
        raise typer.BadParameter(
            "--no-calibration cannot be combined with --calibration or --stats"
        )
    if by_layer and fold:
        raise typer.BadParameter("--by-layer cannot be combined with --fold")
    if spill and not by_layer:
        raise typer.BadParameter("--spill requires --by-layer")
    config = MixedQuantConfig.from_dict(
        {
            "recipe": recipe.value,
            "group_size": group_size,
            "salient_prop": salient_prop,
            "bits": bits,
            "calibration": WEIGHTS if no_calibration else _calibration(calibration),
            "calibration_tokens": calibration_tokens,
            "seed": seed,
            "ignore": ignore or [],
        }
        | dict(map(parse_field, fields or []))
    )
    if no_calibration and config.needs_tokens:
        raise ValueError(f"{config.needs_tokens} needs calibration; drop --no-calibration")
    target = check_target(target, overwrite=overwrite)
    loaded_stats = load_stats(stats) if stats else None
    if dry_run:
        _print_plan(source, config, loaded_stats, by_layer=by_layer, spill=spill)
    elif by_layer:
        convert(source, target, config, loaded_stats, spill=spill, overwrite=overwrite)
        typer.echo(f"The quantized model is in {target}")
    else:
        _quantize_in_memory(source, target, config, loaded_stats, fold=fold, overwrite=overwrite)


def _print_plan(
    source: str, config: MixedQuantConfig, stats: Stats, *, by_layer: bool, spill: bool
) -> None:
    """Print what `quantize --dry-run` reports: settings, sizes and peak memory."""
    from ..bundled import load_model
    from ..checkpoints.conversion import float_shapes
    from ..checkpoints.sizes import bytes_by_kind, planned_bytes
    from ..core.config import WEIGHTS
    from ..quantization.memory import planned_memory

    model = float_shapes(source) if by_layer else load_model(source)[0]
    for name, value in config.to_dict().items():
        typer.echo(f"{name:<20}{value}")
    calibrates = config.calibration != WEIGHTS and (stats is None or bool(config.needs_tokens))
    after = planned_bytes(model, config, stats, stats_to_come=calibrates)
    print_bytes(bytes_by_kind(model), after)
    tokens = config.calibration_tokens if calibrates else 0
    size = sum(after.values())
    print_memory(planned_memory(model, config, size, tokens, stats, by_layer=by_layer, spill=spill))


def _quantize_in_memory(
    source: str,
    target: Path,
    config: MixedQuantConfig,
    stats: Stats,
    *,
    fold: bool,
    overwrite: bool,
) -> None:
    from ..bundled import BUNDLED_MODELS, bundled_folder, load_model
    from ..checkpoints.folder import save_quantized
    from ..checkpoints.sizes import bytes_by_kind
    from ..in_memory import quantize
    from ..models.loading import Companions
    from ..quantization.folding import fold_permutations
    from ..quantization.records import weight_counts

    model, tokenizer = load_model(source)
    before = bytes_by_kind(model)
    quantize(model, config, stats, tokenizer=tokenizer)
    if fold:
        typer.echo(f"Folded the channel permutations of {len(fold_permutations(model))} layers")
    files = Companions(bundled_folder(source) if source in BUNDLED_MODELS else source)
    save_quantized(model, target, files, overwrite=overwrite)
    print_bytes(before, bytes_by_kind(model))
    typer.echo(f"\n{weight_counts(model)}")
    typer.echo(f"\nThe quantized model is in {target}")


@command()
def dequantize(source: Folder, target: Target, overwrite: OverwriteModel = False) -> None:
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


@command()
def export(
    source: Folder,
    target: Target,
    to: Annotated[Format, typer.Option("--format", help="Output format.")],
    overwrite: OverwriteModel = False,
) -> None:
    """Export a quantized model for another inference engine.

    Weights keep their exact values. A model that the format cannot express is rejected with the
    reason.
    """
    from ..checkpoints.export import export_compressed_tensors
    from ..checkpoints.folder import check_target, load_quantized
    from ..models.loading import Companions

    target = check_target(target, overwrite=overwrite, of_any_model=True)
    files = Companions(source)
    export_compressed_tensors(load_quantized(source), target, files, overwrite=overwrite)
    typer.echo(f"The {to.value} model is in {target}")


@command()
def inspect(folder: Folder, as_json: Json = False) -> None:
    """Show the contents of a quantized model folder, layer by layer.

    Reads file headers only, no weights.
    """
    from ..checkpoints.inspection import inspect_folder

    report = inspect_folder(folder)
    if as_json:
        return print_json(report)
    for name in ("folder", "architecture", "format_version", "dtype"):
        typer.echo(f"{name:<18}{report[name]}")
    typer.echo(
        f"{'size':<18}{report['bytes']:,} bytes in {report['tensors']} tensors\n"
        f"{'quantized':<18}{report['quantized_layers']} layers, "
        f"{report['quantized_weights']:,} weights at {report['bits_per_weight']:.3f} bits"
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
    return None


@command()
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check that a quantized model folder is intact.

    Reads every tensor, repeats all checks that loading makes, and runs each quantized layer.
    """
    from ..checkpoints.inspection import verify_folder

    try:
        report = {"ok": True, **verify_folder(folder)}
    except (ValueError, CheckpointError) as error:
        if as_json:
            print_json({"ok": False, "folder": str(folder.resolve()), "error": str(error)})
        raise
    if as_json:
        return print_json(report)
    for check in report["checks"]:
        typer.echo(f"ok: {check}")
    typer.echo(
        f"{report['folder']}: {report['layers']} quantized layers, {report['tensors']} tensors, "
        f"{report['bytes']:,} bytes"
    )
    return None


@command(name="eval")
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
            metavar="MODEL", help="Also report KL divergence from, and top-1 agreement with, MODEL."
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Record the result in the model card (README.md).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity.

    Joins the rows with blank lines, cuts the tokens into non-overlapping windows and reports
    exp(mean token NLL).
    """
    from ..bundled import check_model_name, load_model, wikitext
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
    scored, tokenizer = load_model(model)
    if seq_len is None:
        seq_len = min(2048, max_positions(scored) or 2048)
    evaluator = Evaluator(rows, tokenizer, n_samples=windows, seq_len=seq_len)
    evaluator.check_model(scored)
    with naming(name_or_folder="--compare"):
        reference = None if compare is None else load_model(compare)[0]
    with stdout_for_json(as_json):
        if reference is None:
            result = {"perplexity": float(evaluator.evaluate(scored))}
        else:
            result = evaluator.compare(scored, reference)._asdict()
    if card:
        source = Path(text).name if text else "WikiText-2 test"
        scope = f"{evaluator.num_windows} of {evaluator.available_windows}"
        dataset = f"{source}, {scope} windows of {seq_len} tokens"
        add_evaluation(model, {f"{name}, {dataset}": value for name, value in result.items()})
    if as_json:
        measured = {"windows": evaluator.num_windows, "of_windows": evaluator.available_windows}
        names = {"model": model, "reference": compare, "text": text or "wikitext-2-raw test"}
        print_json({**result, **names, **measured, "seq_len": seq_len})


@command()
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
) -> None:
    """Generate text from a prompt."""
    import torch
    from transformers import TextStreamer

    from ..bundled import load_model
    from ..models.running import check_positions, check_token_ids

    if temperature and not LEAST_TEMPERATURE <= temperature < math.inf:
        least = f"{LEAST_TEMPERATURE:g}"
        raise ValueError(f"temperature must be 0, or finite and >= {least}; got {temperature}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64 - 1]; got {seed}")
    loaded, tokenizer = load_model(model)
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
    loaded.generate(
        **inputs,
        **cache,
        **({"do_sample": False} | sampling),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id or 0,
    )


@command()
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
    as_json: Json = False,
) -> None:
    """Run a quick speed check.

    Compares one quantized layer with torch's fp32 layer and, given FOLDER, a quantized model with
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
    if folder:
        model, tokenizer = load_quantized(folder), load_tokenizer(folder)
        if not model.can_generate():  # type: ignore[operator]
            raise ValueError(f"FOLDER must hold a model that generates text; got {folder}")
        check_positions(model, prompt=prompt, new=new)
        ids = token_blocks(wikitext("test"), tokenizer, 1, prompt)[0]
        check_token_ids(model, ids)
    report: dict[str, Any] = {
        "processor": chip_name(),
        "instruction_set": ops.isa(),
        "threads": torch.get_num_threads(),
        "layer": layer_speeds(MixedQuantConfig()),
    }
    if model is not None:
        report["model"] = model_speeds(model, ids, new)
    if as_json:
        return print_json(report)
    typer.echo(f"{report['processor']}, {report['instruction_set']}, {report['threads']} threads\n")
    for title, rows in (
        ("One 1024 x 1024 layer, group size 128, 5% salient, tokens/s", report["layer"]),
        (f"{folder}, tokens/s", report.get("model", [])),
    ):
        if rows:
            typer.echo(title)
            head = [name.removesuffix("_tokens_per_second") for name in rows[0]]
            print_table(head, [[_rounded(v) for v in row.values()] for row in rows])
            typer.echo()
    return None


@command()
def doctor(as_json: Json = False) -> None:
    """Describe this machine and installation, for bug reports."""
    from .doctor import environment

    report = environment()
    if as_json:
        print_json(report)
    else:
        for name, value in report.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            for part, item in parts.items():
                item = ", ".join(item) if isinstance(item, list) else item
                typer.echo(f"{name + (part and f'.{part}'):<28}{item}")
    if "fault" in report:
        raise RuntimeError(f"smoothquant does not work here: {report['fault']}")


ARGUMENTS_PASSED_ON = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


@command(name="lm-eval", **ARGUMENTS_PASSED_ON)
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


@command(**ARGUMENTS_PASSED_ON)
def sweep(context: typer.Context) -> None:
    """Measure many settings; rerun to resume."""
    _run_experiments(context.args)


@command(**ARGUMENTS_PASSED_ON)
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
            "pip install 'smoothquant[experiments]'"
        ) from error
    raise typer.Exit(main(argv))


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


def _rounded(value: Any) -> Any:
    return f"{value:,.2f}" if isinstance(value, float) else value
