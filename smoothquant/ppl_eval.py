"""Perplexity on a text, and the command line that measures it.

    python -m smoothquant.ppl_eval --model_path smollm2-135m --n_samples 4 --quantize --compare

All perplexities of this project follow one protocol: join the rows with blank lines, tokenize them
in one call, cut the tokens into non-overlapping windows, drop the last partial one, and take
exp(mean token NLL). A subset of the windows gives a different number, so the count of scored
windows is always printed.

`--compare` also measures KL divergence and top-1 agreement, token by token, against the model as it
was loaded. Both are less noisy than the difference of two perplexities.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from .bundled import BUNDLED_MODELS, check_model_name, load_model, wikitext
from .calibration.collect import collect_stats
from .calibration.stats_files import load_act_scales
from .calibration.tokens import token_blocks
from .core.config import MixedQuantConfig, check_integer, check_real
from .core.errors import CheckpointError
from .core.messages import REPORTED_ERRORS, naming, one_line, option_words
from .core.texts import read_texts
from .evaluation.perplexity import Comparison, Evaluator, HeadLogits
from .in_memory import quantize
from .layers.linear import refuse_quantized
from .models.running import check_token_ids, max_positions
from .quantization.records import LinearRecord
from .quantization.smoothing import smooth_lm

__all__ = ["Comparison", "Evaluator", "HeadLogits", "main"]

CALIBRATION_BLOCK = 512  # tokens

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with code 2 on a bad argument."""
    try:
        app(args=None if argv is None else list(argv), prog_name="python -m smoothquant.ppl_eval")
    except SystemExit as stopped:
        if stopped.code:
            raise


@app.command()
def _command(
    context: typer.Context,
    model_path: Annotated[
        str,
        typer.Option(
            "--model_path", help=f"{', '.join(BUNDLED_MODELS)}, a folder or a Hugging Face id."
        ),
    ] = "smollm2-135m",
    smooth: Annotated[
        bool, typer.Option("--smooth", help="Smooth the model first; needs --act_scales_path.")
    ] = False,
    act_scales_path: Annotated[
        Path | None,
        typer.Option("--act_scales_path", help="Activation scales, a .pt or .safetensors file."),
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha", help="Smoothing strength, 0 to 1.")] = 0.5,
    quantized: Annotated[
        bool, typer.Option("--quantize", help="Quantize weights and activations.")
    ] = False,
    num_bits: Annotated[
        int, typer.Option("--num_bits", help="Bits of weights and activations.")
    ] = 4,
    group_size: Annotated[
        int, typer.Option("--group_size", help="Channels that share a scale.")
    ] = 128,
    salient_prop: Annotated[
        float,
        typer.Option("--salient_prop", help="Fraction of channels to keep in 16 bits, 0 to 1."),
    ] = 0.05,
    sort: Annotated[str, typer.Option("--sort", help="Order of the channels.")] = "rms",
    backend: Annotated[
        str,
        typer.Option(
            "--backend", help="int4 (packed weights, integer kernels) or fake (simulation)."
        ),
    ] = "int4",
    calibration_path: Annotated[
        str | None,
        typer.Option(
            "--calibration_path",
            help="Calibration texts. [default: the bundled WikiText-2 validation split]",
        ),
    ] = None,
    calibration_blocks: Annotated[
        int,
        typer.Option(
            "--calibration_blocks", help=f"Calibration blocks of {CALIBRATION_BLOCK} tokens."
        ),
    ] = 32,
    dataset_path: Annotated[
        str | None,
        typer.Option(
            "--dataset_path", help="Text to score. [default: the bundled WikiText-2 test split]"
        ),
    ] = None,
    n_samples: Annotated[
        int | None, typer.Option("--n_samples", help="Windows to score. [default: all]")
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq_len", help="Tokens per window.")] = 2048,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also print KL divergence from, and top-1 agreement with, the model as loaded.",
        ),
    ] = False,
) -> None:
    """Measure the perplexity of a model on WikiText-2: as it is, smoothed or quantized."""
    with _errors_in_one_line(option_words(context.command.params)):
        # Check every argument before the model is loaded.
        check_model_name(model_path)
        check_integer("seq_len", seq_len, 2)
        check_integer("calibration_blocks", calibration_blocks, 1)
        if n_samples is not None:
            check_integer("n_samples", n_samples, 1)
        check_real("alpha", alpha, 0, 1)
        if smooth and act_scales_path is None:
            raise ValueError(
                "--smooth needs --act_scales_path (see examples/generate_act_scales.py)"
            )
        if compare and not (smooth or quantized):
            raise ValueError("--compare needs --smooth or --quantize")
        config = MixedQuantConfig(
            recipe="rtn",
            num_bits=num_bits,
            group_size=group_size,
            salient_prop=salient_prop,
            sort=sort,
            backend=backend,
            head="16bit",
            embeddings="16bit",
        )
        act_scales = load_act_scales(act_scales_path) if smooth and act_scales_path else {}
        with naming(source="calibration_path"):
            calibration_texts = (
                wikitext("validation") if calibration_path is None else read_texts(calibration_path)
            )
        with naming(source="dataset_path"):
            dataset = wikitext("test") if dataset_path is None else list(read_texts(dataset_path))

        model, tokenizer = load_model(model_path)
        device = next(model.parameters()).device
        evaluator = Evaluator(dataset, tokenizer, device, n_samples, seq_len=seq_len)
        evaluator.check_model(model)
        if smooth or quantized:
            refuse_quantized(model)
        if quantized:
            with naming(source="calibration_path", block_size="calibration_path"):
                size = min(CALIBRATION_BLOCK, max_positions(model) or CALIBRATION_BLOCK)
                blocks = token_blocks(calibration_texts, tokenizer, calibration_blocks, size)
            check_token_ids(model, torch.cat(blocks))
        reference = copy.deepcopy(model) if compare else None
        if smooth:
            smooth_lm(model, act_scales, alpha)
            print(f"smoothed with alpha {alpha}")
        if quantized:
            records = quantize(model, config, collect_stats(model, blocks))
            print(f"{model_path}: {_description(config, records)}")
        else:
            print(f"{model_path}: not quantized here")

        if reference is None:
            print(f"Perplexity: {evaluator.evaluate(model)}")
        else:
            result = evaluator.compare(model, reference)
            print(f"Perplexity: {result.perplexity}")
            print(f"KL divergence: {result.kl}")
            print(f"Top-1 agreement: {result.top1}")


@contextmanager
def _errors_in_one_line(words: Mapping[str, str]) -> Iterator[None]:
    """Report the user's mistakes as wrong usage, code 2, and what else goes wrong with code 1."""
    try:
        yield
    except REPORTED_ERRORS as error:
        message = one_line(error, words)
        if isinstance(error, (ValueError, TypeError, CheckpointError)):
            raise typer.BadParameter(message) from error
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1) from error


def _description(config: MixedQuantConfig, records: Sequence[LinearRecord]) -> str:
    packed = [record for record in records if record.action == "quantized"]
    counts = [math.prod(record.shape) for record in packed]
    bits = sum(n * r.bits_per_weight for n, r in zip(counts, packed, strict=True)) / sum(counts)
    return (
        f"{config.scheme}, {bits:.2f} bits per weight with all scales, "
        f"group size {config.group_size}, {config.salient_prop:.0%} salient channels in 16 bits, "
        f"sort {config.sort}, backend {config.backend}"
    )


if __name__ == "__main__":
    main()
