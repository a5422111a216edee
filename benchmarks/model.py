"""Speed, size and quality of a whole model, beside llama.cpp, in one interleaved run.

    python benchmarks/llamacpp.py                                   # once: builds llama.cpp
    python benchmarks/model.py --contenders W4A4 llama.cpp           # SmolLM2-135M
    python benchmarks/model.py --model llama-1.1b --contenders W4A4 llama.cpp --new 32 --turns 2
    python benchmarks/model.py --gate                                # after changing a kernel

The contenders are the model in fp32 and bf16 and quantized, with the rest in fp32 or bf16 and with
the output head and the embeddings in INT8, 16 bits or INT4, in `models.generation.generate`, and
llama.cpp's Q4_0 in llama-bench and llama-batched-bench. All start from the same weights, rounded to
16 bits. They take turns, and the script reports medians of

- prefill: the tokens of a prompt, until the first new token;
- decode: one token after another, after a prompt of SHORT_PROMPT tokens (llama-bench: none);
- batch: the same for several prompts at a time, counting all tokens.

Size counts the tensors of a model in memory, and the GGUF file. KL divergence, perplexity and top-1
agreement are against the model in 16 bits, on the second half of each window of WikiText-2, which
is what llama-perplexity scores; it reads our token ids and the reference's logits from a file.
llama-1.1b has random weights in the shape of TinyLlama.

--profile shows where the time of a forward pass goes. --gate fails if W4A4 has a smaller share of
the baseline's speed than FLOORS. Benchmarks need a quiet machine.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import llamacpp
import torch
import transformers
from linear import chip
from token_parts import LAYERS, PARTS, parts_of, token_parts, weight_bytes

from smoothquant import MixedQuantConfig, collect_stats, quantize
from smoothquant.bundled import load_model, wikitext
from smoothquant.calibration.tokens import token_blocks
from smoothquant.channels.statistics import ChannelStats
from smoothquant.evaluation.perplexity import Evaluator, HeadLogits
from smoothquant.evaluation.speed import generate_times
from smoothquant.kernels import ops
from smoothquant.layers.decoder import use_fused_layers
from smoothquant.layers.linear import QuantizedLinear
from smoothquant.models.modules import module_copy, stored_bytes
from smoothquant.models.tables import head_name

PHASES = ("prefill", "decode", "batch")
SHORT_PROMPT = 16
RANDOM = "llama-1.1b"
RANDOM_SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
# {suffix of a contender: format of the output head and the embeddings}
TABLES = {"": None, "-head16": "16bit", "-head4": "int4"}
# {name: fields of the config}
QUANTIZED: dict[str, dict[str, Any]] = {
    f"W4A{bits}{suffix}": {"act_bits": bits, "head": kind, "embeddings": kind}
    for bits in (4, 8)
    for suffix, kind in TABLES.items()
}
LLAMA_CPP = "llama.cpp"
CONTENDERS = ("fp32", "bf16", *(q + rest for q in QUANTIZED for rest in ("", "-bf16")), LLAMA_CPP)
# {baseline: {phase: smallest accepted ratio of W4A4's speed to it}}, SmolLM2-135M on one thread
FLOORS = {
    LLAMA_CPP: {"prefill": 1.2, "decode": 0.75, "batch": 1.2},
    "fp32": {"prefill": 1.1, "decode": 1.1, "batch": 1.2},
}


@dataclass
class TorchContender:
    """A model in `models.generation.generate`."""

    name: str
    model: Any

    @property
    def size(self) -> int:
        return stored_bytes(self.model)

    def speeds(self, prompts: torch.Tensor, new: int) -> dict[str, float]:
        """Tokens per second in each phase; `prompts` is int64 [B, T]."""
        short = prompts[:, :SHORT_PROMPT]
        return {
            "prefill": prompts.shape[1] / generate_times(self.model, prompts[:1], 2)[0],
            "decode": 1 / generate_times(self.model, short[:1], new)[1],
            "batch": len(prompts) / generate_times(self.model, short, new)[1],
        }

    def warm_up(self, prompts: torch.Tensor) -> None:
        self.speeds(prompts[:, :SHORT_PROMPT], 3)


@dataclass
class LlamaCpp:
    """A GGUF file in llama.cpp's own benchmarks, which warm up by themselves."""

    name: str
    in_16_bits: Path
    gguf: Path
    folder: Path

    @property
    def size(self) -> int:
        return self.gguf.stat().st_size

    def speeds(self, prompts: torch.Tensor, new: int) -> dict[str, float]:
        threads, (batch, length) = torch.get_num_threads(), prompts.shape
        prefill, decode = llamacpp.bench(self.gguf, threads, length, new, self.folder)
        sizes = threads, SHORT_PROMPT, new, batch
        together = llamacpp.batched_bench(self.gguf, *sizes, self.folder)
        return {"prefill": prefill, "decode": decode, "batch": together}

    def warm_up(self, prompts: torch.Tensor) -> None:
        pass


Contender = TorchContender | LlamaCpp


def memory_bytes(field: str) -> int:
    """Resident memory of this process: VmRSS, or VmHWM for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_of(work: Callable[[], object]) -> tuple[float, int]:
    """(seconds that work() takes, peak bytes above the level before)."""
    with suppress(OSError):  # on kernels without it, the peak since the process started
        Path("/proc/self/clear_refs").write_text("5")
    before, start = memory_bytes("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - start, memory_bytes("VmHWM") - before


def packing(
    model: torch.nn.Module, config: MixedQuantConfig, stats: Mapping[str, ChannelStats]
) -> tuple[torch.nn.Module, dict]:
    """(a quantized copy of the model, its row in the table)."""
    packed = module_copy(model)  # shares all tensors, so the float ones stay in memory
    seconds, peak = peak_of(lambda: quantize(packed, config, stats, progress=False))
    linears = [m for m in packed.modules() if isinstance(m, QuantizedLinear)]
    packed_bytes = sum(b.nbytes for m in linears for b in m.buffers())
    row = {
        "threads": torch.get_num_threads(),
        "weights": sum(m.in_features * m.out_features for m in linears),
        "seconds": seconds,
        "packed_bytes": packed_bytes,
        "largest_float_bytes": max(4 * m.in_features * m.out_features for m in linears),
        "peak_above_packed_bytes": peak - packed_bytes,
    }
    return packed, row


def random_llama() -> Any:
    """A LLaMA in the shape of TinyLlama with seeded random weights, float32 on the CPU."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**RANDOM_SHAPE)).eval()


@torch.no_grad()
def round_to_16_bits(model: torch.nn.Module) -> None:
    """Round matrices to float16, as in a GGUF file, so that all contenders start from the same."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(parameter.half())


def make_contenders(
    args: argparse.Namespace, model: Any, stats: Mapping[str, ChannelStats]
) -> tuple[list[Contender], list[dict]]:
    """(the contenders in the order asked for, a row of `packing` for each quantized one)."""
    packed, rows = {}, []
    for name, fields in QUANTIZED.items():
        if {name, f"{name}-bf16"} & set(args.contenders):
            config = MixedQuantConfig(
                recipe=args.recipe,
                group_size=args.group_size,
                salient_prop=args.salient_prop,
                **fields,
            )
            packed[name], row = packing(model, config, stats)
            rows.append({"contender": name} | row)
    result: list[Contender] = []
    for name in args.contenders:
        if name == LLAMA_CPP:
            result.append(LlamaCpp("llama.cpp Q4_0", *gguf_files(args, model), args.llama_cpp))
            continue
        contender = packed.get(name.removesuffix("-bf16"), model)
        if name.endswith("bf16"):
            contender = copy.deepcopy(contender).to(torch.bfloat16)
        result.append(TorchContender(name, contender))
    if args.compile:
        for torch_contender in [c for c in result if isinstance(c, TorchContender)]:
            compiled: Any = module_copy(torch_contender.model)
            compiled.forward = torch.compile(compiled.forward, dynamic=True)
            result.append(TorchContender(f"{torch_contender.name}, compiled", compiled))
    return result, rows


def gguf_files(args: argparse.Namespace, model: Any) -> tuple[Path, Path]:
    """The model as GGUF in 16 bits and in Q4_0; random weights are kept in Q4_0 alone."""
    name = Path(args.model).name
    plain, quantized = (args.llama_cpp / f"{name}-{kind}.gguf" for kind in ("f16", "q4_0"))
    if not (args.model == RANDOM and quantized.is_file()):
        llamacpp.write_files(model, name, args.llama_cpp)
    if args.model == RANDOM:
        plain.unlink(missing_ok=True)
    return plain, quantized


def speeds(
    contenders: Sequence[Contender], args: argparse.Namespace, prompts: torch.Tensor
) -> list[dict]:
    """Measure the contenders in turns and print a row for each."""
    baseline = next((c for c in contenders if isinstance(c, LlamaCpp)), contenders[0])
    names = {"prefill": "prefill", "decode": "decode", "batch": f"decode, batch of {args.batch}"}
    head = [f"{names[phase]}, tokens/s | x {baseline.name}" for phase in PHASES]
    print(f"\n| threads | contender | MiB | {' | '.join(head)} |")
    print("|" + "---|" * (3 + 2 * len(PHASES)))
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for contender in contenders:
            contender.warm_up(prompts)
        turns: dict[str, list[dict[str, float]]] = {c.name: [] for c in contenders}
        for _ in range(args.turns):
            for contender in contenders:
                turns[contender.name].append(contender.speeds(prompts, args.new))
        medians = {
            name: {phase: statistics.median(turn[phase] for turn in taken) for phase in PHASES}
            for name, taken in turns.items()
        }
        for contender in contenders:
            speed = medians[contender.name]
            ratio = {phase: speed[phase] / medians[baseline.name][phase] for phase in PHASES}
            row = {"threads": threads, "contender": contender.name, "bytes": contender.size}
            rows.append(row | {"tokens_per_second": speed, "ratio": ratio})
            cells = [f"{speed[phase]:.1f} | {ratio[phase]:.2f}" for phase in PHASES]
            size = f"{contender.size / 2**20:.1f}"
            print(f"| {threads} | {contender.name} | {size} | {' | '.join(cells)} |", flush=True)
    return rows


@torch.no_grad()
def quality(
    contenders: Sequence[Contender], args: argparse.Namespace, model: Any, tokenizer: Any
) -> list[dict]:
    """Compare each contender with the 16-bit model and print a row for it."""
    torch.set_num_threads(max(args.threads))
    text, sizes = wikitext("test"), {"n_samples": args.windows, "seq_len": args.window}
    evaluator = Evaluator(text, tokenizer, **sizes, progress=False)
    _, inputs = evaluator.head_inputs(model)
    if inputs is None:
        raise ValueError(f"the logits of a {type(model).__name__} are not its head's plain output")
    reference = HeadLogits(model.get_output_embeddings(), inputs)
    second_half = args.window // 2
    print(f"\nWikiText-2 test, second halves of {args.windows} windows of {args.window} tokens:")
    print("\n| contender | perplexity | KL divergence, nats | same top token |\n|---|---|---|---|")

    scored: set[Path] = set()

    def measured() -> Iterator[tuple[str, dict[str, float]]]:
        for contender in contenders:
            if isinstance(contender, TorchContender):
                scores = evaluator.token_comparison(contender.model, reference)
                nlls, kls, same = (score[:, second_half:].double().mean() for score in scores)
                values = {"perplexity": nlls.exp(), "kl": kls, "top1": same}
                yield contender.name, {key: value.item() for key, value in values.items()}
            else:
                windows = torch.cat([evaluator.window(i) for i in range(args.windows)])
                logits = (reference[index] for index in range(args.windows))
                base = args.llama_cpp / "base_logits.bin"
                llamacpp.write_base_logits(base, windows, logits, model.config.vocab_size)
                for name, gguf in (
                    ("llama.cpp F16", contender.in_16_bits),
                    (contender.name, contender.gguf),
                ):
                    if gguf in scored:
                        continue
                    scored.add(gguf)
                    threads = max(args.threads)
                    yield name, llamacpp.compare(gguf, base, args.window, threads, args.llama_cpp)
                base.unlink()

    rows = []
    for name, values in measured():
        rows.append({"contender": name} | values)
        print(
            f"| {name} | {values['perplexity']:.3f} | {values['kl']:.5f} | {values['top1']:.2%} |",
            flush=True,
        )
    return rows


def profile(
    contenders: Sequence[Contender], args: argparse.Namespace, prompts: torch.Tensor
) -> list[dict]:
    """Measure the parts of a forward pass, and the same pass untimed, in turns. A model with fused
    layers is measured step by step, too."""
    print("\n| threads | contender | phase | part | ms | share | GB/s of weights |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for contender in contenders:
            if isinstance(contender, LlamaCpp):
                continue
            rows += profile_model(contender.name, contender.model, threads, args, prompts)
            if LAYERS in parts_of(contender.model).values():
                use_fused_layers(False)
                name = f"{contender.name}, steps"
                rows += profile_model(name, contender.model, threads, args, prompts)
                use_fused_layers(True)
    return rows


def profile_model(
    name: str, model: Any, threads: int, args: argparse.Namespace, prompts: torch.Tensor
) -> list[dict]:
    rows = []
    sizes = weight_bytes(model, parts_of(model))
    for phase, prompt, new in (
        ("prefill", prompts[:1], 2),
        ("decode", prompts[:1, :SHORT_PROMPT], args.new),
    ):
        index = ("prefill", "decode").index(phase)
        inside, whole = [], []
        for _ in range(args.turns):
            inside.append(token_parts(model, prompt, new)[index])
            whole.append(generate_times(model, prompt, new)[index])
        parts = {part: statistics.median(turn[part] for turn in inside) for part in PARTS}
        rows.append(
            {
                "threads": threads,
                "contender": name,
                "phase": phase,
                "parts": {part: seconds for part, seconds in parts.items() if seconds},
                "untimed": statistics.median(whole),
                "weight_bytes": sizes,
            }
        )
        print_parts(rows[-1])
    return rows


def print_parts(row: Mapping[str, Any]) -> None:
    start = f"| {row['threads']} | {row['contender']} | {row['phase']} |"
    total = sum(row["parts"].values())
    for part, seconds in row["parts"].items():
        size = row["weight_bytes"].get(part)
        speed = f"{size / seconds / 1e9:.1f}" if size and row["phase"] == "decode" else "-"
        print(f"{start} {part} | {1e3 * seconds:.2f} | {seconds / total:.0%} | {speed} |")
    print(f"{start} all parts | {1e3 * total:.2f} | 100% | - |")
    print(f"{start} untimed | {1e3 * row['untimed']:.2f} | - | - |", flush=True)


def draw_profile(
    profiles: Sequence[Mapping], rows: Sequence[Mapping], model: str, path: Path
) -> None:
    """Draw the parts of a decoded token for each contender; llama.cpp's token is one part."""
    from run_experiments.drawing import draw_stacks

    def label(row: Mapping) -> str:
        return f"{row['contender']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"

    bars = {
        label(row): {part: 1e3 * seconds for part, seconds in row["parts"].items()}
        for row in profiles
        if row["phase"] == "decode"
    }
    for row in rows:
        if row["contender"].startswith(LLAMA_CPP):
            bars[label(row)] = {"llama.cpp": 1e3 / row["tokens_per_second"]["decode"]}
    about = f"{chip()}; {ops.isa()}; torch {torch.__version__}; {date.today()}"
    draw_stacks(f"{model}: one decoded token", about, "Milliseconds", bars, path)


def too_slow(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each phase in which W4A4 is below its floor."""
    ours = next(row for row in rows if row["contender"] == "W4A4")
    baseline = LLAMA_CPP if any(r["contender"].startswith(LLAMA_CPP) for r in rows) else "fp32"
    return [
        f"W4A4, {phase}: {ours['ratio'][phase]:.2f} x {baseline}, expected at least {floor}"
        for phase, floor in FLOORS[baseline].items()
        if ours["ratio"][phase] < floor
    ]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2-135m", help=f"bundled name, folder or id, or {RANDOM}"
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=["fp32", "bf16", "W4A4", "W4A8"]
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count()])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=8, help="prompts to decode together")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contender")
    parser.add_argument("--windows", type=int, default=4, help="windows to score, 0 for none")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--salient-prop", type=float, default=0.05)
    parser.add_argument("--recipe", default="fast", choices=["rtn", "fast"])
    parser.add_argument(
        "--compile", action="store_true", help="also measure each model with torch.compile"
    )
    parser.add_argument("--profile", action="store_true", help="show where a model spends its time")
    parser.add_argument(
        "--figure", type=Path, help="with --profile, draw a token as this path + .png and .svg"
    )
    parser.add_argument("--llama-cpp", type=Path, default=llamacpp.FOLDER, help="where it is built")
    parser.add_argument("--gate", action="store_true", help="fail if W4A4 is too slow")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    least = {"prompt": SHORT_PROMPT, "new": 2, "batch": 1, "turns": 1, "windows": 0, "window": 4}
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            parser.error(f"--{name} must be at least {smallest}; got {getattr(args, name)}")
    if args.figure and not args.profile:
        parser.error("--figure needs --profile")
    if args.gate:
        baseline = LLAMA_CPP if llamacpp.is_built(args.llama_cpp) else "fp32"
        args.model, args.contenders = "smollm2-135m", [baseline, "W4A4"]
        args.threads, args.turns, args.windows = [1], 3, 0
    if LLAMA_CPP in args.contenders:
        try:
            llamacpp.version(args.llama_cpp)
        except RuntimeError as error:
            parser.error(str(error))
    return args


def main() -> None:
    args, started = parse_args(), time.perf_counter()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(max(args.threads))

    if args.model == RANDOM:
        model, tokenizer, args.windows = random_llama(), None, 0
        ids = torch.randint(RANDOM_SHAPE["vocab_size"], (args.batch, args.prompt))
        calibration = [ids[:1, :128]]
    else:
        model, tokenizer = load_model(args.model, dtype=torch.float32)
        ids = torch.cat(token_blocks(wikitext("test"), tokenizer, args.batch, args.prompt))
        calibration = token_blocks(wikitext("validation"), tokenizer, 4, 512)
    round_to_16_bits(model)
    stats = collect_stats(model, calibration, head=head_name(model), progress=False)

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if LLAMA_CPP in args.contenders:
        versions[LLAMA_CPP] = llamacpp.version(args.llama_cpp)
    named = "; ".join(f"{name} {text.removeprefix(name + ' ')}" for name, text in versions.items())
    recipe = f"{args.recipe}, g = {args.group_size}, {args.salient_prop:.0%} salient"
    print(f"{args.model}; {recipe}; {chip()}; {ops.isa()}; {named}; {date.today()}")
    contenders, packs = make_contenders(args, model, stats)
    if packs:
        print("\n| contender | threads | million weights | packing, s | packed, MiB | peak above |")
        print("|---|---|---|---|---|---|")
    for row in packs:
        print(
            f"| {row['contender']} | {row['threads']} | {row['weights'] / 1e6:.1f} "
            f"| {row['seconds']:.2f} | {row['packed_bytes'] / 2**20:.1f} "
            f"| {row['peak_above_packed_bytes'] / 2**20:.1f} |",
            flush=True,
        )
    scores = quality(contenders, args, model, tokenizer) if args.windows else []
    del model  # the contenders keep what they need
    rows = speeds(contenders, args, ids)
    profiles = profile(contenders, args, ids) if args.profile else []
    print(f"\nAll of it took {(time.perf_counter() - started) / 60:.1f} minutes.")
    if args.figure:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        draw_profile(profiles, rows, args.model, args.figure)
    if args.json:
        record = {"chip": chip(), "isa": ops.isa(), "date": str(date.today())} | versions
        arguments = {name: value for name, value in vars(args).items() if name != "llama_cpp"}
        record |= {"arguments": arguments, "packing": packs, "quality": scores}
        with open(args.json, "w") as file:
            json.dump(record | {"rows": rows, "profile": profiles}, file, indent=1, default=str)
    if args.gate:
        sys.exit("\n".join(too_slow(rows)) or None)


if __name__ == "__main__":
    main()
