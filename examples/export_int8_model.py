"""Smooth a model, quantize it to 4-bit weights and activations, and save both models.

    python examples/export_int8_model.py --model-name tiny-opt --num-samples 16

The script keeps its published name but writes W4A4: packed 4-bit weights, 4-bit activations and
16-bit salient channels. With --export-FT it saves only the smoothed 16-bit model and, for an OPT,
the static INT8 scales that go with it, as the published script does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from smoothquant import (
    CheckpointError,
    MixedQuantConfig,
    collect_stats,
    quantize,
    save_quantized,
    smooth_lm,
)
from smoothquant.bundled import check_model_name, load_model, wikitext
from smoothquant.calibration import (
    get_act_scales,
    get_static_decoder_layer_scales,
    load_act_scales,
    token_blocks,
)
from smoothquant.checkpoints.folder import check_target
from smoothquant.core.texts import read_texts


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags. The published ones keep their names.

    Also sets args.config and the output folders args.smoothed and args.packed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-name", default="smollm2-135m", help="bundled model, folder or Hugging Face id")
    add("--num-samples", type=int, default=512, help="texts or token blocks (default: %(default)s)")
    add("--seq-len", type=int, default=512, help="tokens per text or block (default: %(default)s)")
    add("--act-scales", help="file of activation scales (default: measure them)")
    add("--output-path", type=Path, default=Path("quantized_models"), help="parent folder")
    add(
        "--dataset-path",
        help="calibration texts: .txt, .raw, .jsonl, .jsonl.zst or .parquet "
        "(default: the bundled WikiText-2 validation split)",
    )
    add("--overwrite", action="store_true", help="replace an existing packed model")
    add("--export-FT", action="store_true", help="save only the smoothed 16-bit model")
    add("--alpha", type=float, default=0.5, help="smoothing strength (default: %(default)s)")
    add("--group-size", type=int, default=128, help="channels per scale (default: %(default)s)")
    add(
        "--salient-prop",
        type=float,
        default=0.05,
        help="share of channels that stay in 16 bits (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    for flag in ("num_samples", "seq_len"):
        if getattr(args, flag) < 1:
            parser.error(f"{flag} must be at least 1; got {getattr(args, flag)}")
    if not 0 <= args.alpha <= 1:
        parser.error(f"alpha must be in [0, 1]; got {args.alpha}")
    try:
        check_model_name(args.model_name)
        if args.dataset_path is not None:
            read_texts(args.dataset_path)
        args.config = MixedQuantConfig(group_size=args.group_size, salient_prop=args.salient_prop)
        stem = f"{args.output_path / Path(args.model_name).name}-smoothquant"
        args.smoothed = Path(stem)
        args.packed = Path(f"{stem}-w{args.config.num_bits}a{args.config.num_bits}")
        if not args.export_FT:
            check_target(args.packed, overwrite=args.overwrite)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        act_scales = None if args.act_scales is None else load_act_scales(args.act_scales)
    except CheckpointError as error:
        raise SystemExit(f"--act-scales: {error}") from error
    if args.dataset_path is None:
        texts = wikitext("validation")
    else:
        texts = list(read_texts(args.dataset_path))
    try:
        model, tokenizer = load_model(args.model_name)
        if not args.export_FT:
            blocks = token_blocks(texts, tokenizer, args.num_samples, args.seq_len)
    except (CheckpointError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if act_scales is None:
        act_scales = get_act_scales(model, tokenizer, texts, args.num_samples, args.seq_len)
    smooth_lm(model, act_scales, args.alpha)

    model.save_pretrained(args.smoothed)
    tokenizer.save_pretrained(args.smoothed)
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"saved the smoothed model ({dtype}) in {args.smoothed}")
    if args.export_FT:
        if model.config.model_type == "opt":
            _, ranges = get_static_decoder_layer_scales(
                model, tokenizer, texts, args.num_samples, args.seq_len
            )
            path = args.smoothed.with_name(f"{args.smoothed.name}-scales.pt")
            torch.save(ranges, path)
            print(f"saved the static INT8 scales in {path}")
        return

    config = args.config
    quantize(model, config, collect_stats(model, blocks))
    save_quantized(model, args.packed, tokenizer, overwrite=args.overwrite)
    print(
        f"saved the packed model in {args.packed}: {config.num_bits}-bit weights and activations, "
        f"group size {config.group_size}, {config.salient_prop:.0%} salient channels in 16 bits"
    )


if __name__ == "__main__":
    main()
