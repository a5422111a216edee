"""Convert a checkpoint that is much larger than the memory the conversion may use.

    python benchmarks/convert.py                        # 6.6 GB of disk, twice that while it runs
    python benchmarks/convert.py --recipe best --layers 2

Creates a LLaMA with random bfloat16 weights, one file per decoder layer, and converts it in a
subprocess. After its imports, the subprocess may allocate

    2 x the largest decoder layer in float32 + the hidden states kept in memory + 500 MB

(RLIMIT_DATA: everything but pages mapped from files). A conversion that needs more fails. Prints as
JSON how much it used, and how much `quantize --dry-run` would have predicted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from smoothquant import MixedQuantConfig, convert
from smoothquant.checkpoints.conversion import float_shapes
from smoothquant.checkpoints.sizes import planned_bytes
from smoothquant.cli.doctor import chip_name
from smoothquant.core.tensor_files import INDEX
from smoothquant.quantization.memory import planned_memory

MB = 10**6
SEQ_LEN = 1024


def make_checkpoint(folder: Path, layers: int, hidden: int, intermediate: int, vocab: int) -> int:
    """Write the checkpoint; return the bytes of its largest decoder layer in float32."""
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 512, vocab_size=vocab,
        dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in shapes.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = tensor.shape
    weight_map: dict[str, str] = {}
    size = largest = 0
    for file, file_shapes in files.items():
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in file_shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(t.nbytes for t in tensors.values())
        if "rest" not in file:
            largest = max(largest, sum(4 * t.numel() for t in tensors.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return largest


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field + ":"))


def convert_limited(
    source: Path, target: Path, recipe: str, tokens: int, spill: bool, allowed: int
) -> None:
    """Limit the memory of this process for good, convert, and print JSON."""
    torch.manual_seed(0)
    batches = [torch.randint(0, 1000, (1, SEQ_LEN)) for _ in range(-(-tokens // SEQ_LEN))]
    torch.ones(512, 512) @ torch.ones(512, 512)  # starts the threads
    float_shapes(source)  # imports the model's class and optional packages of transformers
    before, resident = memory("VmData"), memory("RssAnon")
    resource.setrlimit(resource.RLIMIT_DATA, (before + allowed, before + allowed))
    peak, done = {"VmData": 0, "RssAnon": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for field in peak:
                peak[field] = max(peak[field], memory(field))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        config = MixedQuantConfig(recipe=recipe)
        convert(source, target, config, batches=batches, spill=spill, progress=False)
    finally:
        done.set()
        watcher.join()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "before": before, "resident": resident, **peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument(
        "--in-memory", action="store_true", help="keep hidden states in memory, not on disk"
    )
    parser.add_argument("--allowance", type=int, default=500, metavar="MB")
    parser.add_argument("--folder", type=Path, help="a folder with enough disk space")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, target = Path(folder, "float"), Path(folder, "quantized")
        source.mkdir()
        shape = args.layers, args.hidden, args.intermediate, args.vocab
        layer = make_checkpoint(source, *shape)
        activations = 0 if not args.in_memory else 2 * args.tokens * args.hidden
        allowed = 2 * layer + activations + args.allowance * MB
        model, config = float_shapes(source), MixedQuantConfig(recipe=args.recipe)
        size = sum(planned_bytes(model, config).values())
        planned = planned_memory(
            model, config, size, args.tokens, by_layer=True, spill=not args.in_memory
        )
        words = [source, target, args.recipe, args.tokens, int(not args.in_memory), allowed]
        command = [sys.executable, __file__, "child", *map(str, words)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            sys.exit(f"the conversion failed with a limit of {allowed / MB:,.0f} MB")
        measured = json.loads(run.stdout.splitlines()[-1])
        written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        checkpoint = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    result = {
        "processor": chip_name(),
        "threads": torch.get_num_threads(),
        "recipe": args.recipe,
        "tokens": args.tokens,
        "checkpoint_mb": checkpoint / MB,
        "written_mb": written / MB,
        "largest_layer_fp32_mb": layer / MB,
        "allowed_mb": allowed / MB,
        "peak_mb": (measured["VmData"] - measured["before"]) / MB,
        "peak_resident_mb": (measured["RssAnon"] - measured["resident"]) / MB,
        "imports_mb": measured["before"] / MB,
        "planned_peak_mb": sum(planned.values()) / MB,
        "seconds": measured["seconds"],
    }
    print(json.dumps({k: round(v) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        source, target, recipe, *numbers = sys.argv[2:]
        tokens, spill, allowed = map(int, numbers)
        convert_limited(Path(source), Path(target), recipe, tokens, bool(spill), allowed)
    else:
        main()
