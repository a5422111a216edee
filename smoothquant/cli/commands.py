"""The command line, `smoothquant <verb>`.

Commands answer 0 when all is well, 1 for a mistake in what they were given (one line on stderr says
which; MIXEDQUANT_TRACEBACK=1 shows where), 2 for wrong usage and 130 after Ctrl-C. torch and
transformers are imported by commands, so that --help and completions do not wait for them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.config import RECIPES
from ..core.errors import CheckpointError
from ..core.version import __version__
from .console import (
    faults_as_exit_codes,
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

Recipe = Enum("Recipe", {name: name for name in RECIPES}, type=str)
Format = Enum("Format", {"compressed_tensors": "compressed-tensors"}, type=str)

app = typer.Typer(
    name="smoothquant",
    help="Real W4A4 quantization of Hugging Face models: 4-bit weights and activations.",
    epilog="A MODEL is smollm2-135m, tiny-opt, a folder, or a Hugging Face id.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name, folder or id.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a quantized model.")]

Target = Annotated[
    Path, typer.Argument(metavar="DST", help="Folder to write, whole or not at all.")
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there of that kind.")]

Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Texts to calibrate on: .txt, .raw, .jsonl, .jsonl.zst, .parquet. "
        "[default: the WikiText-2 validation split in the package]",
    ),
]

CalibrationTokens = Annotated[int, typer.Option(metavar="N", help="Tokens drawn from them.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of what is drawn.")]


def main() -> None:
    """The program; ends the process."""
    app(prog_name="smoothquant")


def command(**settings: Any) -> Callable:
    """Registers a command whose faults become a line on stderr and an exit code."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            with faults_as_exit_codes():
                function(*args, **kwargs)

        return app.command(**settings)(run)

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
    output: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file to write.")],
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 32768,
    seed: Seed = 42,
    overwrite: Overwrite = False,
) -> None:
    """Collect statistics for `quantize --stats`.

    They are those of every distinct input of a layer, channel by channel.
    """
    from ..bundled import load_model
    from ..calibration.collect import collect_stats
    from ..calibration.stats_files import save_stats
    from ..calibration.tokens import calibration_batches
    from ..core.config import MixedQuantConfig

    config = MixedQuantConfig(
        calibration=_texts(calibration), calibration_tokens=calibration_tokens, seed=seed
    )
    if output.suffix != ".safetensors":
        raise ValueError(f"FILE must end in .safetensors; got {str(output)!r}")
    if output.exists() and not (overwrite and output.is_file()):
        raise ValueError(f"FILE exists already: {output} (--overwrite replaces a file)")
    loaded, tokenizer = load_model(model)
    stats = collect_stats(loaded, calibration_batches(loaded, tokenizer, config))
    save_stats(stats, output)
    typer.echo(f"Statistics of {len(stats)} layers are in {output.resolve()}")


@command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Bundled name, folder or id.")],
    target: Target,
    recipe: Annotated[
        Recipe, typer.Option(help="rtn: to nearest. fast: rotated. best: GPTQ, searches.")
    ] = Recipe.rtn,
    group_size: Annotated[int, typer.Option(metavar="G", help="Channels to a scale.")] = 128,
    salient_prop: Annotated[
        float | None,
        typer.Option(metavar="P", help="Share of channels kept in 16 bits. [default: 0.05]"),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(metavar="B", help="Bits per weight, in --salient-prop's place.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Another field of MixedQuantConfig; repeatable."
        ),
    ] = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 32768,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Statistics from `calibrate`, or a published act_scales/*.pt (no code is run).",
        ),
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Choose channels by the weights alone.")
    ] = False,
    seed: Seed = 42,
    fold: Annotated[
        bool, typer.Option("--fold", help="Move permutations into other layers' rows.")
    ] = False,
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer",
            help="Hold one decoder layer of the folder SRC in memory; after a stop, go on.",
        ),
    ] = False,
    spill: Annotated[
        bool,
        typer.Option("--spill", help="By layer: hidden states and GPTQ's matrices in files."),
    ] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print choices, bytes and memory; write nothing."),
    ] = False,
) -> None:
    """Quantize a model and save it. It is held in memory as a whole, but with --by-layer."""
    from ..calibration.stats_files import load_stats
    from ..checkpoints.conversion import convert
    from ..checkpoints.folder import check_target
    from ..core.config import MixedQuantConfig, parse_field

    if no_calibration and (stats or calibration):
        raise typer.BadParameter("--no-calibration excludes --calibration and --stats")
    if by_layer and fold:
        raise typer.BadParameter("--by-layer excludes --fold")
    if spill and not by_layer:
        raise typer.BadParameter("--spill needs --by-layer")
    config = MixedQuantConfig.from_dict(
        {
            "recipe": recipe.value,
            "group_size": group_size,
            "salient_prop": salient_prop,
            "bits": bits,
            "calibration": None if no_calibration else _texts(calibration),
            "calibration_tokens": calibration_tokens,
            "seed": seed,
        }
        | dict(map(parse_field, fields or []))
    )
    if no_calibration and config.needs_tokens:
        raise ValueError(f"{config.needs_tokens} needs calibration; leave --no-calibration out")
    target = check_target(target, overwrite=overwrite)
    known = load_stats(stats) if stats else None
    if dry_run:
        _print_plan(source, config, known, by_layer=by_layer, spill=spill)
    elif by_layer:
        convert(source, target, config, known, spill=spill, overwrite=overwrite)
        typer.echo(f"The quantized model is in {target}")
    else:
        _quantize_in_memory(source, target, config, known, fold=fold, overwrite=overwrite)


def _print_plan(
    source: str, config: MixedQuantConfig, stats: Stats, *, by_layer: bool, spill: bool
) -> None:
    """`quantize --dry-run`: choices, bytes before and after, peak memory."""
    from ..bundled import load_model
    from ..checkpoints.conversion import float_shapes
    from ..checkpoints.sizes import bytes_by_kind, planned_bytes
    from ..quantization.memory import planned_memory

    model = float_shapes(source) if by_layer else load_model(source)[0]
    for name, value in config.to_dict().items():
        typer.echo(f"{name:<20}{value}")
    calibrates = config.calibration is not None and (stats is None or bool(config.needs_tokens))
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
    from ..bundled import load_model
    from ..checkpoints.folder import save_quantized
    from ..checkpoints.sizes import bytes_by_kind
    from ..in_memory import quantize
    from ..quantization.folding import fold_permutations

    model, tokenizer = load_model(source)
    before = bytes_by_kind(model)
    quantize(model, config, stats, tokenizer=tokenizer)
    if fold:
        typer.echo(f"Folded the permutations of {len(fold_permutations(model))} layers")
    save_quantized(model, target, tokenizer, overwrite=overwrite)
    print_bytes(before, bytes_by_kind(model))
    typer.echo(f"\nThe quantized model is in {target}")


@command()
def dequantize(source: Folder, target: Target, overwrite: Overwrite = False) -> None:
    """Make a plain model of a quantized folder.

    Its weights are floats of the values that the 4-bit codes stand for.
    """
    from ..checkpoints.folder import check_target, write_folder
    from ..quantization.undo import dequantize

    target = check_target(target, overwrite=overwrite, of_any_model=True)
    model, tokenizer = _quantized_model(source)
    dequantize(model)
    write_folder(model, target, tokenizer, overwrite=overwrite)
    typer.echo(f"The plain model is in {target}")


@command()
def export(
    source: Folder,
    target: Target,
    to: Annotated[Format, typer.Option("--format", help="Whose format.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a quantized folder for other engines.

    Weights are the same numbers; what the format cannot express is refused, with the reason.
    """
    from ..checkpoints.export import export_compressed_tensors
    from ..checkpoints.folder import check_target

    target = check_target(target, overwrite=overwrite, of_any_model=True)
    model, tokenizer = _quantized_model(source)
    export_compressed_tensors(model, target, tokenizer, overwrite=overwrite)
    typer.echo(f"The model in format {to.value} is in {target}")


@command()
def inspect(folder: Folder, as_json: Json = False) -> None:
    """Show what is in a quantized folder.

    Layer by layer, without reading weights.
    """
    from ..checkpoints.inspection import inspect_folder

    found = inspect_folder(folder)
    if as_json:
        return print_json(found)
    for name in ("folder", "architecture", "format_version", "dtype"):
        typer.echo(f"{name:<18}{found[name]}")
    typer.echo(
        f"{'size':<18}{found['bytes']:,} bytes in {found['tensors']} tensors\n"
        f"{'quantized':<18}{found['quantized_layers']} layers, "
        f"{found['quantized_weights']:,} weights at {found['bits_per_weight']:.3f} bits"
    )
    typer.echo("\nChoices: " + ", ".join(f"{k}={v}" for k, v in found["config"].items()) + "\n")
    print_table(("kind", "bytes"), [(k, f"{v:,}") for k, v in found["kinds"].items()])
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
        for layer in found["layers"]
    ]
    print_table(("layer", "shape", "", "bits", "salient", "bytes", ""), rows)
    return None


@command()
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check a quantized folder.

    All is read, with every check that loading has, and each layer is tried.
    """
    from ..checkpoints.inspection import verify_folder

    try:
        found = {"ok": True, **verify_folder(folder)}
    except (ValueError, CheckpointError) as error:
        if as_json:
            print_json({"ok": False, "folder": str(folder.resolve()), "error": str(error)})
        raise
    if as_json:
        return print_json(found)
    for check in found["checks"]:
        typer.echo(f"ok: {check}")
    typer.echo(
        f"{found['folder']}: {found['layers']} quantized layers, {found['tensors']} tensors, "
        f"{found['bytes']:,} bytes"
    )
    return None


@command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Texts to score. [default: the WikiText-2 test split]"),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(metavar="N", help="The first N windows only. [default: all]")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(metavar="T", help="Tokens per window. [default: at most 2048]")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also KL divergence and top-1 agreement to this one."),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Put it into the README.md of the quantized folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text.

    Rows joined by a blank line, non-overlapping windows, exp(mean token NLL).
    """
    from ..bundled import check_model_name, load_model, wikitext
    from ..checkpoints.folder import is_quantized_folder
    from ..checkpoints.model_card import add_evaluation
    from ..core.texts import read_texts
    from ..evaluation.perplexity import Evaluator

    if card and not is_quantized_folder(model):
        raise ValueError(f"--card needs a folder of a quantized model; got {model!r}")
    for name in filter(None, (model, compare)):
        check_model_name(name)
    rows = list(read_texts(text)) if text else wikitext("test")
    scored, tokenizer = load_model(model)
    if seq_len is None:
        seq_len = min(2048, getattr(scored.config, "max_position_embeddings", None) or 2048)
    evaluator = Evaluator(rows, tokenizer, n_samples=windows, seq_len=seq_len)
    reference = load_model(compare)[0] if compare else None
    with stdout_for_json(as_json):
        if reference is None:
            result = {"perplexity": float(evaluator.evaluate(scored))}
        else:
            result = evaluator.compare(scored, reference)._asdict()
    if card:
        source = Path(text).name if text else "WikiText-2 test"
        windows = f"{evaluator.num_windows} of {evaluator.available_windows}"
        where = f"{source}, {windows} windows of {seq_len} tokens"
        add_evaluation(model, {f"{name}, {where}": n for name, n in result.items()})
    if as_json:
        measured = {"windows": evaluator.num_windows, "of_windows": evaluator.available_windows}
        names = {"model": model, "reference": compare, "text": text or "wikitext-2-raw test"}
        print_json({**result, **names, **measured, "seq_len": seq_len})


@command()
def generate(
    model: Model,
    prompt: str,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", min=1)] = 50,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token each time.")
    ] = 0.0,
    seed: Seed = 0,
) -> None:
    """Continue a prompt."""
    import torch
    from transformers import TextStreamer

    from ..bundled import load_model

    loaded, tokenizer = load_model(model)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs.input_ids.numel() == 0:
        raise ValueError(f"PROMPT must hold at least one token; got {prompt!r}")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    loaded.generate(
        **inputs,
        **({"do_sample": False} | sampling),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id or 0,
    )


@command()
def bench(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="Also this quantized model. [default: a layer]"),
    ] = None,
    prompt: Annotated[int, typer.Option(min=2, metavar="T", help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to generate.")] = 16,
    as_json: Json = False,
) -> None:
    """Check the speed of kernels and model.

    Of a layer beside torch's, and of a quantized model beside itself with float weights.
    """
    import torch

    from ..bundled import wikitext
    from ..calibration.tokens import token_blocks
    from ..core.config import MixedQuantConfig
    from ..evaluation.speed import layer_speeds, model_speeds
    from ..kernels import ops
    from .doctor import chip_name

    model = tokenizer = None
    if folder:
        model, tokenizer = _quantized_model(folder)
        if tokenizer is None:
            raise ValueError(f"FOLDER must hold a tokenizer; got {folder}")
    found = {
        "processor": chip_name(),
        "instruction_set": ops.isa(),
        "threads": torch.get_num_threads(),
        "layer": layer_speeds(MixedQuantConfig()),
    }
    if model is not None:
        ids = token_blocks(wikitext("test"), tokenizer, 1, prompt)[0]
        found["model"] = model_speeds(model, ids, new)
    if as_json:
        return print_json(found)
    typer.echo(f"{found['processor']}, {found['instruction_set']}, {found['threads']} threads\n")
    for title, rows in (
        ("A layer of 1024 x 1024, g = 128, 5 % salient, tokens/s", found["layer"]),
        (f"{folder}, tokens/s", found.get("model", [])),
    ):
        if rows:
            typer.echo(title)
            head = [name.removesuffix("_tokens_per_second") for name in rows[0]]
            print_table(head, [[_rounded(v) for v in row.values()] for row in rows])
            typer.echo()
    return None


@command()
def doctor(as_json: Json = False) -> None:
    """Describe machine and installation.

    To paste into a report of a fault.
    """
    from .doctor import environment

    found = environment()
    if as_json:
        print_json(found)
    else:
        for name, value in found.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            for part, said in parts.items():
                said = ", ".join(said) if isinstance(said, list) else said
                typer.echo(f"{name + (part and f'.{part}'):<28}{said}")
    if "fault" in found:
        raise RuntimeError(f"the package does not work here: {found['fault']}")


ARGUMENTS_PASSED_ON = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


@command(name="lm-eval", **ARGUMENTS_PASSED_ON)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, which then reads quantized folders.

    As in: lm-eval run --model hf --model_args pretrained=FOLDER --tasks NAME
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise RuntimeError(f"lm-eval is not installed ({error}): pip install lm-eval") from error
    sys.argv[1:] = context.args
    cli_evaluate()


@command(**ARGUMENTS_PASSED_ON)
def sweep(context: typer.Context) -> None:
    """Measure many settings, resumably."""
    _run_experiments(context.args)


@command(**ARGUMENTS_PASSED_ON)
def plot(context: typer.Context) -> None:
    """Draw a sweep from what is finished, and write an interactive page of it."""
    _run_experiments(["--plot", *context.args])


def _run_experiments(argv: list[str]) -> None:
    try:
        from run_experiments import main
    except ImportError as error:
        raise RuntimeError(
            f"sweeps need run_experiments and its packages ({error}): pip install "
            "'smoothquant[experiments]', or run this in a clone"
        ) from error
    raise typer.Exit(main(argv))


def _texts(calibration: str | None) -> str | tuple[str, ...]:
    """The file, or the texts that stand for none."""
    from ..bundled import wikitext

    return calibration or tuple(wikitext("validation"))


def _quantized_model(folder: Path):
    """(model, tokenizer or None) of a quantized folder."""
    from transformers import AutoTokenizer

    from ..checkpoints.folder import load_quantized

    model = load_quantized(folder)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None


def _remark(layer: Mapping[str, Any]) -> str:
    """Of a layer in `inspect`: why it was kept, or what it has of its own."""
    if "shared_with" in layer:
        return f"shared with {layer['shared_with']}"
    if layer["action"] == "kept":
        return layer["reason"]
    return ", ".join(f"{name}={value}" for name, value in layer["choices"].items())


def _rounded(value: Any) -> Any:
    return f"{value:,.2f}" if isinstance(value, float) else value
