"""Memory and speed of a whole model on a CUDA card: Llama-2-7B's shape, W4A4 against bf16.

    python benchmarks/card_model.py --json docs/benchmark_cuda_model.json
    python benchmarks/card_model.py --device cpu --layers 2 --hidden 256    # a quick trial

Weights are created and packed one decoder layer at a time, so that the card needs memory only for
the larger model. Channel order and salient channels are random, because speed does not depend on
them. Embedding, attention and head stay in bf16.

Prefill is the whole prompt. Decode adds greedy tokens one by one with a static cache, in three
ways: call by call, in a CUDA graph, and through torch.compile. If one of them fails, its row says
why. The script reports medians, and runs one model after the other to measure the memory peak of
each. benchmarks/card.sh builds and tests first.
"""

import argparse
import gc
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import transformers
from card import card
from linear import chip
from report import MODEL_HEAD, model_line
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, StaticCache

from smoothquant import MixedQuantConfig
from smoothquant.kernels import ops
from smoothquant.layers.linear import W4A4Linear
from smoothquant.models.modules import replace_module

DTYPE = torch.bfloat16
WARM_UP = 3  # steps


def shape(args: argparse.Namespace) -> PretrainedConfig:
    """Llama-2-7B's configuration, scaled by the arguments."""
    return AutoConfig.for_model(
        "llama",
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11008 // 4096,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 128),
        num_key_value_heads=max(1, args.hidden // 128),
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def packed(linear: nn.Linear, config: MixedQuantConfig) -> W4A4Linear:
    """The linear as a quantized layer with random salient channels."""
    n, k = linear.weight.shape
    count = int(config.salient_prop * k)
    options = {"bias": False, "config": config, "num_salient": count, "dtype": DTYPE}
    layer = W4A4Linear(k, n, device="meta", **options)
    layer.perm = torch.randperm(k, device=linear.weight.device).int()
    tensors = ops.pack_weight(linear.weight, layer.perm, count, layer.group_size)
    for name, tensor in zip(ops.PACKED, tensors, strict=True):
        setattr(layer, name, tensor)
    return layer


@torch.no_grad()
def build(args: argparse.Namespace, config: MixedQuantConfig | None) -> nn.Module:
    """Create the model on the device; with a config, quantize the linears of its decoder."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape(args), dtype=DTYPE).eval()
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(model.config).to(args.device)
    torch.manual_seed(0)
    for part in (body.embed_tokens, body.norm, model.lm_head, *body.layers):
        part.to_empty(device=args.device)
        for parameter in part.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
        if config is None or part is model.lm_head:
            continue
        for name, linear in list(part.named_modules()):
            if isinstance(linear, nn.Linear):
                replace_module(part, name, packed(linear, config))
    return model


def seconds(work: Callable[[], object], device: str) -> float:
    """Seconds that work() takes, including what it starts on the card."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Decoder:
    """Greedy decoding after a prompt.

    A step reads and writes the same memory every time, so that a CUDA graph of it can be replayed.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, max_tokens: int) -> None:
        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=max_tokens)
        # the argument has been renamed in transformers
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.forward: Callable = model
        self.ids = prompt[:, -1:].clone()
        self.position = torch.full_like(self.ids, prompt.shape[1])

    def logits(self, forward: Callable, ids: Tensor, position: Tensor) -> Tensor:
        options = {self.cache_name: self.cache, "use_cache": True, "logits_to_keep": 1}
        return forward(ids, position_ids=position, **options).logits

    def prefill(self) -> None:
        self.cache.reset()
        tokens = self.prompt.shape[1]
        position = torch.arange(tokens, device=self.prompt.device).expand_as(self.prompt)
        logits = self.logits(self.model, self.prompt, position)
        self.ids.copy_(logits.argmax(-1))
        self.position.fill_(tokens)

    def step(self) -> None:
        logits = self.logits(self.forward, self.ids, self.position)
        self.ids.copy_(logits.argmax(-1))
        self.position.add_(1)

    # Each of these returns a function that decodes the next token.

    def eager(self) -> Callable[[], None]:
        return self.step

    def graph(self) -> Callable[[], None]:
        if not self.prompt.is_cuda:
            raise RuntimeError("CUDA graphs need a CUDA card")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def compile(self) -> Callable[[], None]:
        self.forward = torch.compile(self.model, fullgraph=True)
        return self.step


MODES = {"eager": Decoder.eager, "graph": Decoder.graph, "compile": Decoder.compile}


@torch.no_grad()
def speeds(model: nn.Module, args: argparse.Namespace) -> list[dict]:
    """Rows for prefill and for each way to decode: tokens per second, or why it failed."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.vocab_size, (args.batch, args.prompt), generator=generator)
    prompt = prompt.to(args.device)
    max_tokens = args.prompt + args.turns * args.new + 2 * WARM_UP + 1
    rows: list[dict[str, Any]] = []
    decoder = Decoder(model, prompt, max_tokens)
    decoder.prefill()
    took = [seconds(decoder.prefill, args.device) for _ in range(args.turns)]
    rows.append({"phase": "prefill", "tokens_per_second": prompt.numel() / statistics.median(took)})
    for mode in args.modes:
        row: dict[str, Any] = {"phase": f"decode, {mode}"}
        rows.append(row)
        decoder = Decoder(model, prompt, max_tokens)
        decoder.prefill()
        try:
            step = MODES[mode](decoder)
            for _ in range(WARM_UP):
                step()
        except Exception as error:  # anything may fail in torch or in a compiler that it calls
            row["failed"] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            continue
        took = [
            seconds(lambda: [step() for _ in range(args.new)], args.device)  # noqa: B023
            for _ in range(args.turns)
        ]
        if not torch.isfinite(decoder.logits(model, decoder.ids, decoder.position)).all():
            sys.exit(f"{row['phase']}: a logit is NaN or Inf")
        row["tokens_per_second"] = args.batch * args.new / statistics.median(took)
    return rows


def measure(args: argparse.Namespace) -> list[dict]:
    """Measure all models; print and return the rows."""
    config = MixedQuantConfig(
        recipe="rtn", group_size=args.group_size, salient_prop=args.salient_prop
    )
    name = f"W4A4 g{args.group_size} p{args.salient_prop:g}"
    print("\n".join(MODEL_HEAD))
    rows: list[dict[str, Any]] = []
    bf16_speeds: dict[str, float] = {}
    for contender, chosen in (("bf16", None), (name, config)):
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = build(args, chosen)
        tensors = [*model.parameters(), *model.buffers()]
        weight_bytes = sum(t.nbytes for t in tensors)
        measured = speeds(model, args)
        peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
        for row in measured:
            row.update(contender=contender, weight_bytes=weight_bytes, peak_bytes=peak)
            speed = row.get("tokens_per_second")
            if speed and chosen is None:
                bf16_speeds[row["phase"]] = speed
            if speed and row["phase"] in bf16_speeds:
                row["ratio"] = speed / bf16_speeds[row["phase"]]
            print(model_line(row), flush=True)
        rows += measured
        del model, tensors
        torch.compiler.reset()
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate per turn")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--salient-prop", type=float, default=0.05)
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.hidden % 128 or args.hidden < 128:
        parser.error(f"--hidden must be a multiple of 128; got {args.hidden}")
    if args.device == "cuda" and not ops.has_cuda():
        sys.exit(
            "nothing was measured: there is no CUDA card, or MixedQuant was built without CUDA "
            f"(architectures built: {ops.build_info()['cuda_archs'] or 'none'})"
        )
    record: dict[str, Any] = {
        "chip": card() if args.device == "cuda" else chip(),
        "torch": torch.__version__,
    }
    record |= {"transformers": transformers.__version__, "date": str(date.today())}
    print("; ".join(record.values()) + "\n")
    record |= {"arguments": vars(args), "rows": measure(args)}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
