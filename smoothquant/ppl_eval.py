"""Perplexity by the one protocol that every number of this project follows, and its command line.

    python -m smoothquant.ppl_eval --model_path smollm2-135m --n_samples 4 --quantize --compare

Rows joined by a blank line, one tokenizer call, non-overlapping windows, the last partial one
dropped, exp(mean token NLL). A subset of windows is a different number, so how many were scored
is always printed. Beside perplexity, a model can be compared token by token with the 16-bit model
that it was made from: KL divergence and top-1 agreement are less noisy than two perplexities.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence

from .bundled import BUNDLED_MODELS, check_model_name, load_model, wikitext
from .calibration import load_act_scales
from .calibration.collect import collect_stats
from .calibration.tokens import token_blocks
from .core.config import MixedQuantConfig, check_integer, check_real
from .core.errors import CheckpointError
from .core.texts import read_texts
from .evaluation.perplexity import Evaluator
from .in_memory import quantize
from .layers.linear import refuse_quantized
from .quantization.smoothing import smooth_lm


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags; the published ones keep their names."""
    parser = argparse.ArgumentParser(
        prog="python -m smoothquant.ppl_eval",
        description="Perplexity on WikiText-2, of a model as it is, smoothed or quantized.",
    )
    add = parser.add_argument
    add(
        "--model_path",
        default="smollm2-135m",
        help=f"{', '.join(BUNDLED_MODELS)}, a folder or a Hugging Face id (default: %(default)s)",
    )
    add("--smooth", action="store_true", help="smooth the model first; needs --act_scales_path")
    add("--act_scales_path", help="activation scales, a .pt or .safetensors file")
    add(
        "--alpha", type=float, default=0.5, help="smoothing strength, 0 to 1 (default: %(default)s)"
    )
    add("--quantize", action="store_true", help="quantize weights and activations")
    add("--num_bits", type=int, default=4, help="bits of both (default: %(default)s)")
    add(
        "--group_size",
        type=int,
        default=128,
        help="channels that share a scale (default: %(default)s)",
    )
    add(
        "--salient_prop",
        type=float,
        default=0.05,
        help="share of channels that stay in 16 bits, 0 to 1 (default: %(default)s)",
    )
    add("--sort", default="rms", help="order of the channels (default: %(default)s)")
    add(
        "--backend",
        default="int4",
        help="int4 (packed weights, integer kernels) or fake (simulation) (default: %(default)s)",
    )
    add(
        "--calibration_path",
        help="texts for calibration (default: the bundled WikiText-2 validation split)",
    )
    add(
        "--calibration_blocks",
        type=int,
        default=32,
        help="blocks of 512 tokens (default: %(default)s)",
    )
    add("--dataset_path", help="texts to score (default: the bundled WikiText-2 test split)")
    add("--n_samples", type=int, help="windows to score (default: all)")
    add("--seq_len", type=int, default=2048, help="tokens per window (default: %(default)s)")
    add(
        "--compare",
        action="store_true",
        help="also print KL divergence and top-1 agreement to the model as it was loaded",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; every argument is checked before the model is loaded."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        model, reference, evaluator = _prepared(args, *_checked(args))
    except (ValueError, TypeError, CheckpointError) as error:
        parser.error(str(error))
    if reference is None:
        print(f"Perplexity: {evaluator.evaluate(model)}")
    else:
        result = evaluator.compare(model, reference)
        print(f"Perplexity: {result.perplexity}")
        print(f"KL divergence: {result.kl}")
        print(f"Top-1 agreement: {result.top1}")


def _prepared(args: argparse.Namespace, config, act_scales, calibration_texts, dataset):
    """Return (model, reference or None, evaluator), the model smoothed and quantized as asked."""
    model, tokenizer = load_model(args.model_path)
    device = next(model.parameters()).device
    evaluator = Evaluator(dataset, tokenizer, device, args.n_samples, seq_len=args.seq_len)
    evaluator.check_model(model)
    if args.smooth or args.quantize:
        refuse_quantized(model)
    if args.quantize:
        blocks = token_blocks(calibration_texts, tokenizer, args.calibration_blocks, 512)
    reference = copy.deepcopy(model) if args.compare else None
    if args.smooth:
        smooth_lm(model, act_scales, args.alpha)
        print(f"smoothed with alpha {args.alpha}")
    if args.quantize:
        records = quantize(model, config, collect_stats(model, blocks))
        print(f"{args.model_path}: {_description(config, records)}")
    else:
        print(f"{args.model_path}: not quantized here")
    return model, reference, evaluator


def _checked(args: argparse.Namespace):
    """Return (config, act_scales, calibration texts, dataset) or raise on the first bad flag."""
    check_model_name(args.model_path)
    check_integer("seq_len", args.seq_len, 2)
    check_integer("calibration_blocks", args.calibration_blocks, 1)
    if args.n_samples is not None:
        check_integer("n_samples", args.n_samples, 1)
    check_real("alpha", args.alpha, 0, 1)
    if args.smooth and args.act_scales_path is None:
        raise ValueError("--smooth needs --act_scales_path (see examples/generate_act_scales.py)")
    if args.compare and not (args.smooth or args.quantize):
        raise ValueError("--compare needs --smooth or --quantize, whose effect it measures")
    config = MixedQuantConfig(
        num_bits=args.num_bits,
        group_size=args.group_size,
        salient_prop=args.salient_prop,
        sort=args.sort,
        backend=args.backend,
    )
    act_scales = load_act_scales(args.act_scales_path) if args.smooth else None
    calibration_texts = (
        read_texts(args.calibration_path) if args.calibration_path else wikitext("validation")
    )
    dataset = list(read_texts(args.dataset_path)) if args.dataset_path else wikitext("test")
    return config, act_scales, calibration_texts, dataset


def _description(config: MixedQuantConfig, records) -> str:
    quantized = [
        (math.prod(r.shape), r.bits_per_weight) for r in records if r.action == "quantized"
    ]
    weights = sum(count for count, _ in quantized)
    bits = sum(count * bits for count, bits in quantized) / weights
    return (
        f"W{config.num_bits}A{config.num_bits}, {bits:.2f} bits per weight with all scales, "
        f"group size {config.group_size}, {config.salient_prop:.0%} salient channels in 16 bits, "
        f"sort {config.sort}, backend {config.backend}"
    )


if __name__ == "__main__":
    main()
