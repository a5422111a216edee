"""Quality of exported GGUF files in llama.cpp, beside llama.cpp's own Q4_0 of the same weights.

    python benchmarks/llamacpp.py                  # once: builds llama.cpp
    python benchmarks/export_gguf.py               # SmolLM2-135M; minutes

Every model starts from the same weights, rounded to 16 bits, and is calibrated on the same 2,048
tokens. KL divergence, perplexity and top-1 agreement are as in model.py: llama-perplexity compares
with the 16-bit model on the second half of each window of WikiText-2. "codes" are those whose
values Q4_0 expresses exactly.
"""

import argparse
import tempfile
from pathlib import Path

import llamacpp
import torch
import transformers
from linear import chip
from model import LlamaCpp, quality, round_to_16_bits

from smoothquant import MixedQuantConfig, quantize
from smoothquant.bundled import load_model, wikitext
from smoothquant.calibration.tokens import token_blocks
from smoothquant.checkpoints.export_gguf import export_gguf
from smoothquant.models.modules import module_copy

CODES = {"group_size": 32, "salient_prop": 0.0, "sort": "none", "act_bits": 8, "recipe": "rtn"}
# {name: (fields of the config, round_to)}
EXPORTS = {
    "codes, nearest": (CODES, "Q4_0"),
    "codes, scales of least error": (CODES | {"weight_scale": "mse"}, "Q4_0"),
    "codes, GPTQ": (CODES | {"weight_scale": "mse", "weight_rounding": "gptq"}, "Q4_0"),
    "recipe fast, Q8_0": ({"group_size": 32}, "Q8_0"),
    "recipe fast, Q4_0": ({"group_size": 32}, "Q4_0"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, folder or id")
    parser.add_argument("--exports", nargs="+", choices=EXPORTS, default=list(EXPORTS))
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--windows", type=int, default=4, help="windows to score")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--llama-cpp", type=Path, default=llamacpp.FOLDER, help="where it is built")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    round_to_16_bits(model)
    calibration = token_blocks(wikitext("validation"), tokenizer, 4, 512)
    print(f"{args.model}; {chip()}; {llamacpp.version(args.llama_cpp)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = folder / "plain.gguf"
        export_gguf(model, plain)
        contenders = []
        for export in args.exports:
            fields, round_to = EXPORTS[export]
            packed, path = module_copy(model), folder / f"{len(contenders)}.gguf"
            config = MixedQuantConfig(**fields)
            quantize(packed, config, batches=calibration, progress=False)
            print(export, export_gguf(packed, path, round_to=round_to), flush=True)
            contenders.append(LlamaCpp(export, plain, path, args.llama_cpp))
        own = llamacpp.quantized(plain, folder / "q4_0.gguf", args.llama_cpp)
        contenders.append(LlamaCpp("llama.cpp Q4_0", plain, own, args.llama_cpp))
        for contender in contenders:
            print(f"{contender.name}: {contender.size / 2**20:.1f} MiB")
        quality(contenders, args, model, tokenizer)


if __name__ == "__main__":
    main()
