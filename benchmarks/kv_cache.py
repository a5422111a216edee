"""Quality, size and speed of the key-value cache: float, INT8 and INT4.

    python benchmarks/kv_cache.py
    python benchmarks/kv_cache.py --model ./smollm2-w4a8 --contexts 1024 4096 --turns 30

SmolLM2-135M is quantized to W4A8 (recipe fast, head and embeddings in INT8), unless a quantized
folder is given. The first half of each window of WikiText-2 is a prompt. The second half is then
read one token at a time, as in decoding. KL divergence and top-1 agreement there are against the
same model with transformers' DynamicCache; the last column is the KL divergence from the model
before quantization.

For the speed, caches hold the same tokens and take turns; the script reports medians. Bytes are
those of all tensors, per token. Benchmarks need a quiet machine.
"""

import argparse
import statistics
import time
from datetime import date

import torch
from transformers import DynamicCache

from smoothquant import MixedQuantConfig, QuantizedKVCache, quantize
from smoothquant.bundled import load_model, wikitext
from smoothquant.cli.doctor import chip_name
from smoothquant.layers.cache import cache_argument
from smoothquant.layers.linear import QuantizedLinear
from smoothquant.models.modules import module_copy

W4A8 = {"act_bits": 8, "head": "int8", "embeddings": "int8"}
CACHES = {
    "float": lambda config: DynamicCache(config=config),
    "int8": lambda config: QuantizedKVCache(config, bits=8),
    "int4": lambda config: QuantizedKVCache(config, bits=4),
}


def log_probs(model, tokens: torch.Tensor, cache) -> torch.Tensor:
    """[T / 2, V]: of the second half of tokens [1, T], read one by one."""
    half = tokens.shape[1] // 2
    rows = []
    for part in (tokens[:, :half], *tokens[:, half:].split(1, 1)):
        logits = model(part, **{cache_argument(model): cache}, logits_to_keep=1).logits
        rows.append(logits[0].float().log_softmax(-1))
    return torch.cat(rows[1:])


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.inference_mode()
def print_quality(model, original, windows: list[torch.Tensor]) -> None:
    results = {name: [] for name in CACHES}
    for tokens in windows:
        outputs = {
            name: log_probs(model, tokens, made(model.config)) for name, made in CACHES.items()
        }
        reference = outputs["float"]
        if original is not None:
            half = tokens.shape[1] // 2
            exact = original(tokens).logits[0, half:].float().log_softmax(-1)
        for name, output in outputs.items():
            same = (output.argmax(-1) == reference.argmax(-1)).float().mean()
            distance = divergence(exact, output) if original is not None else float("nan")
            results[name].append((divergence(reference, output), float(same), distance))
    print("\n| cache | KL divergence | same top token | KL from the float model |")
    print("|---|---|---|---|")
    for name, rows in results.items():
        kl, same, distance = (statistics.mean(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {kl:.5f} | {100 * same:.2f} % | {distance:.5f} |")


def size(cache) -> int:
    """Bytes of keys and values, spare room included if the cache tells it."""
    if isinstance(cache, QuantizedKVCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.inference_mode()
def print_speed(model, text: torch.Tensor, contexts: list[int], turns: int) -> None:
    print("\n| context | cache | bytes per token | ms per token | speed |\n|---|---|---|---|---|")
    for context in contexts:
        plain = DynamicCache(config=model.config)
        for part in text[:, :context].split(512, 1):
            model(part, **{cache_argument(model): plain}, logits_to_keep=1)
        caches = {name: made(model.config) for name, made in CACHES.items()}
        for cache in caches.values():
            for index, layer in enumerate(plain.layers):
                cache.update(layer.keys, layer.values, index)
        bytes_before = {name: size(cache) / context for name, cache in caches.items()}
        times = {name: [] for name in caches}
        for turn in range(-2, turns):
            for name, cache in caches.items():
                start = time.perf_counter()
                model(text[:, :1], **{cache_argument(model): cache}, logits_to_keep=1)
                if turn >= 0:
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            ratio = medians["float"] / median
            print(
                f"| {context} | {name} | {bytes_before[name]:.0f} | {1e3 * median:.1f} "
                f"| {ratio:.2f}x |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Not in inference mode: layers loaded there cannot be fused.
    model, tokenizer = load_model(args.model)
    original = None
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        original = module_copy(model)
        quantize(model, MixedQuantConfig(**W4A8), tokenizer=tokenizer)
    model.to(getattr(torch, args.dtype))
    print(f"{chip_name()}; {args.threads} threads; torch {torch.__version__}; {date.today()}")
    text = tokenizer("\n\n".join(wikitext("test")), return_tensors="pt", verbose=False).input_ids
    if args.windows:
        windows = text[:, : args.windows * args.seq_len].split(args.seq_len, 1)
        print_quality(model, original, list(windows))
    print_speed(model, text, args.contexts, args.turns)


if __name__ == "__main__":
    main()
