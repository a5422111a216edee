"""Perplexity of SmolLM2-135M by recipe, on WikiText-2.

    python benchmarks/accuracy.py --recipes best --group-sizes 128 --salient-props 0.05 0.1

Calibrates on evenly spaced blocks of the validation split and evaluates the first windows of the
test split (docs/results.md says how). Every row names what it was measured with.
"""

import argparse
import copy
import itertools
import math
import time

import torch

from smoothquant import MixedQuantConfig, collect_stats, quantize
from smoothquant.bundled import load_model, wikitext
from smoothquant.calibration import token_blocks
from smoothquant.config import RECIPES
from smoothquant.ppl_eval import Evaluator


def calibration_blocks(tokenizer, tokens: int, seqlen: int) -> list[torch.Tensor]:
    blocks = token_blocks(["\n\n".join(wikitext("validation"))], tokenizer, None, seqlen)
    count = min(tokens // seqlen, len(blocks))
    return [blocks[i * len(blocks) // count] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="bundled name or folder")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=["rtn", "best"])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[128])
    parser.add_argument("--salient-props", nargs="+", type=float, default=[0.05, 0.1])
    parser.add_argument("--sorts", nargs="+", default=["rms"])
    parser.add_argument("--clips", nargs="+", type=float, help="act_clip, instead of the recipe's")
    parser.add_argument("--backends", nargs="+", default=["int4"])
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = load_model(args.model)
    evaluator = Evaluator(
        {"text": wikitext("test")},
        tokenizer,
        "cpu",
        n_samples=args.windows,
        seq_len=args.seqlen,
        progress=False,
    )
    print("16-bit model:", end=" ")
    evaluator.evaluate(model)
    blocks = calibration_blocks(tokenizer, args.tokens, args.seqlen)
    stats = collect_stats(model, blocks)
    print(f"calibration: {len(blocks)} blocks of {args.seqlen} tokens; {args.threads} threads")
    choices = itertools.product(
        args.recipes,
        args.group_sizes,
        args.salient_props,
        args.sorts,
        args.clips or [None],
        args.backends,
    )
    for recipe, group_size, salient_prop, sort, act_clip, backend in choices:
        config = MixedQuantConfig(
            recipe=recipe,
            group_size=group_size,
            salient_prop=salient_prop,
            sort=sort,
            act_clip=act_clip,
            backend=backend,
        )
        start = time.perf_counter()
        quantized = copy.deepcopy(model)
        records = quantize(quantized, config, stats, blocks, progress=False)
        seconds = time.perf_counter() - start
        done = [record for record in records if record.action == "quantized"]
        size = sum(math.prod(record.shape) for record in done)
        bits = sum(record.bits_per_weight * math.prod(record.shape) for record in done)
        print(
            f"{recipe} g={group_size} p={salient_prop:g} sort={sort} clip={config.act_clip:g} "
            f"{backend}: {bits / size:.3f} bits per weight, quantized in {seconds:.0f} s;",
            end=" ",
            flush=True,
        )
        evaluator.evaluate(quantized)


if __name__ == "__main__":
    main()
