"""Measure a model's activation scales, max|x| per input channel of every linear, for `smooth_lm`.

    python examples/generate_act_scales.py --model-name tiny-opt --num-samples 64

It needs no network: the model is a bundled one, a folder or an id in the local Hugging Face cache,
and the texts come from a file or from the bundled WikiText-2 validation split.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from smoothquant.bundled import check_model_name, load_model, wikitext
from smoothquant.calibration import get_act_scales, save_act_scales
from smoothquant.core.texts import read_texts


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags. The published ones keep their names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-name", default="smollm2-135m", help="bundled model, folder or Hugging Face id")
    add(
        "--output-path",
        type=Path,
        help="file to write: .pt as published, any other suffix: safetensors "
        "(default: act_scales/<model>.pt)",
    )
    add(
        "--dataset-path",
        help="calibration texts: .txt, .raw, .jsonl, .jsonl.zst or .parquet "
        "(default: the bundled WikiText-2 validation split)",
    )
    add("--num-samples", type=int, default=512, help="maximum texts (default: %(default)s)")
    add("--seq-len", type=int, default=512, help="maximum tokens per text (default: %(default)s)")
    args = parser.parse_args(argv)
    for flag in ("num_samples", "seq_len"):
        if getattr(args, flag) < 1:
            parser.error(f"{flag} must be at least 1; got {getattr(args, flag)}")
    try:
        check_model_name(args.model_name)
        if args.dataset_path is not None:
            read_texts(args.dataset_path)
    except ValueError as error:
        parser.error(str(error))
    if args.output_path is None:
        args.output_path = Path("act_scales") / f"{Path(args.model_name).name}.pt"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, tokenizer = load_model(args.model_name)
    texts = wikitext("validation") if args.dataset_path is None else args.dataset_path
    scales = get_act_scales(model, tokenizer, texts, args.num_samples, args.seq_len)
    save_act_scales(scales, args.output_path)
    print(f"saved the activation scales of {len(scales)} layers in {args.output_path}")


if __name__ == "__main__":
    main()
