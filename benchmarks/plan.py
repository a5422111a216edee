"""What `smoothquant quantize --dry-run` says of time, beside the time that quantizing takes.

    python benchmarks/plan.py --model smollm2-135m --tokens 4096 --layers 3

One planning before and one after each run, whose mean stands in the table: other programs on the
machine count for both.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch

from smoothquant import MixedQuantConfig, quantize
from smoothquant.bundled import load_model, wikitext
from smoothquant.calibration import CALIBRATION_BLOCK, token_blocks
from smoothquant.config import RECIPES
from smoothquant.cost import planned_cost
from smoothquant.doctor import chip_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-opt")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, help="Of the model's decoder layers, the first.")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
    if args.layers:
        decoder = model.get_decoder()
        decoder.layers = decoder.layers[: args.layers]
        model.config.num_hidden_layers = args.layers
    size = min(CALIBRATION_BLOCK, model.config.max_position_embeddings)
    batches = token_blocks(wikitext("validation"), tokenizer, args.tokens // size, size)
    tokens = sum(batch.numel() for batch in batches)
    print(f"{chip_name()}, {args.threads} threads, {args.model}, {tokens} tokens; seconds\n")
    print(f"{'recipe':<8}{'planned':>9}{'taken':>9}  taken / planned")
    for recipe in args.recipes:
        config, quantized = MixedQuantConfig(recipe=recipe), copy.deepcopy(model)
        planned = planned_cost(model, config, 0, tokens).seconds
        started = time.perf_counter()
        quantize(quantized, config, batches=batches, progress=False)
        taken = time.perf_counter() - started
        planned = (planned + planned_cost(model, config, 0, tokens).seconds) / 2
        print(f"{recipe:<8}{planned:>9.2f}{taken:>9.2f}  {taken / planned:.2f}", flush=True)


if __name__ == "__main__":
    main()
