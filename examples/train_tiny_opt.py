"""Train the bundled tiny OPT, a real OPT small enough to ship with the package.

The model (1.3 million parameters) and its byte-level BPE tokenizer see only the *validation* split
of WikiText-2 raw, so that the test split stays a fair test. After training, a few LayerNorm
channels are scaled up by a power of two and the columns of the next weights scaled down by the
same. The function stays the same to the last bit, but the activations get the large outlier
channels of models a thousand times bigger, and INT4 without salient channels fails on both.

    python examples/train_tiny_opt.py --output smoothquant/data/tiny-opt

One run takes about seven minutes on one core, of which training takes five and a half. The same
seed, torch version and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from smoothquant.bundled import wikitext

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0..3, as in every published OPT
MAX_POSITIONS = 2048
FP16_SMALLEST_NORMAL = 2.0**-14

# (window length, windows per step, share of the steps): short windows teach words cheaply, long
# ones teach attention to cope with 2,048 keys.
SCHEDULE = ((128, 8, 0.67), (512, 2, 0.25), (2048, 1, 0.08))

# Factors for randomly chosen channels of each LayerNorm that feeds a linear: four extreme
# channels, which ruin any group they share, and eight moderate ones, which sorting puts into groups
# of their own.
OUTLIER_FACTORS = (64.0, 32.0, 32.0, 16.0, 8.0, 8.0, 4.0, 4.0, 4.0, 4.0, 2.0, 2.0)


def train_tokenizer(rows: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `rows`. Like OPT's tokenizer, it starts each text with `</s>`."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A",
        pair="</s> $A </s> $B",
        special_tokens=[("</s>", tokenizer.token_to_id("</s>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> OPTForCausalLM:
    """Return a randomly initialized OPT: 4 layers, hidden size 128, 4 heads, FFN size 512.

    Position embeddings start at zero: with so little text, random ones would stay noise.
    """
    torch.manual_seed(seed)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=512,
            max_position_embeddings=MAX_POSITIONS,
            word_embed_proj_dim=128,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.zero_()
    return model


def schedule_at(step: int, steps: int) -> tuple[int, int]:
    """Return (window length, windows per step) at `step` of `steps`."""
    end = 0.0
    for length, windows, share in SCHEDULE:
        end += share
        if step < round(end * steps):
            return length, windows
    return SCHEDULE[-1][:2]


def build_optimizers(model: OPTForCausalLM, peak_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (it needs half of AdamW's steps here), AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=peak_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.4 * peak_lr, betas=(0.9, 0.97), weight_decay=0.01),
    ]


def train(
    model: OPTForCausalLM, token_ids: torch.Tensor, *, steps: int, peak_lr: float, seed: int
) -> float:
    """Train `model` in place on random windows of `token_ids` (int64 [T]); return the last loss.

    Short windows get random positions, so every position embedding is trained. A quarter of the
    windows begin with the start token, as a prompt does.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizers = build_optimizers(model, peak_lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    warmup = max(1, steps // 25)
    model.train()
    bar = tqdm(range(steps), desc="training", unit="step", mininterval=2.0)
    smooth_loss = math.nan
    for step in bar:
        length, windows = schedule_at(step, steps)
        decay = (step - warmup) / max(1, steps - warmup)
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * decay))
        ramp = (step + 1) / warmup if step < warmup else cosine
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * ramp
        starts = torch.randint(len(token_ids) - length, (windows,), generator=generator)
        input_ids = torch.stack([token_ids[s : s + length] for s in starts])
        first_positions = torch.randint(
            MAX_POSITIONS - length + 1, (windows, 1), generator=generator
        )
        with_start = torch.rand(windows, generator=generator) < 0.25
        input_ids[with_start, 0] = model.config.bos_token_id
        logits = model(
            input_ids=input_ids, position_ids=first_positions + torch.arange(length)
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), input_ids[:, 1:].reshape(-1)
        )
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        value = loss.item()
        smooth_loss = value if math.isnan(smooth_loss) else 0.98 * smooth_loss + 0.02 * value
        if step % 20 == 0:
            bar.set_postfix(loss=f"{smooth_loss:.3f}", window=length)
    model.eval()
    return smooth_loss


@torch.no_grad()
def add_outliers(model: OPTForCausalLM, seed: int) -> list[dict]:
    """Give each LayerNorm that feeds a linear a few large channels, in place.

    Gain and bias of a chosen channel are multiplied by a power of two, and the column of every
    linear that reads it is divided by the same. In floating point, this does not change the model's
    function by a single bit unless something under- or overflows. Returns what was scaled, one
    record per LayerNorm.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = torch.tensor(OUTLIER_FACTORS)
    records = []
    for index, layer in enumerate(model.model.decoder.layers):
        attention = layer.self_attn
        for name, norm, readers in (
            (
                "self_attn_layer_norm",
                layer.self_attn_layer_norm,
                (attention.q_proj, attention.k_proj, attention.v_proj),
            ),
            ("final_layer_norm", layer.final_layer_norm, (layer.fc1,)),
        ):
            channels = torch.randperm(norm.weight.numel(), generator=generator)[: len(factors)]
            norm.weight[channels] *= factors
            norm.bias[channels] *= factors
            for reader in readers:
                reader.weight[:, channels] /= factors
            records.append(
                {
                    "norm": f"model.decoder.layers.{index}.{name}",
                    "channels": channels.tolist(),
                    "factors": list(OUTLIER_FACTORS),
                }
            )
    return records


@torch.no_grad()
def round_to_normal_fp16(model: torch.nn.Module) -> None:
    """Round every parameter in place to zero or a normal fp16 number.

    Subnormal fp16 numbers have few bits, and some hardware flushes them to zero. A value below the
    smallest normal number becomes zero or that number, whichever is nearer.
    """
    for name, parameter in model.named_parameters():
        half = parameter.half()
        if not half.isfinite().all():
            raise ValueError(f"parameter {name} does not fit fp16: max {parameter.abs().max()}")
        tiny = half.abs() < FP16_SMALLEST_NORMAL
        snapped = torch.where(
            half.abs() < FP16_SMALLEST_NORMAL / 2,
            torch.zeros_like(half),
            torch.copysign(torch.full_like(half, FP16_SMALLEST_NORMAL), half),
        )
        parameter.copy_(torch.where(tiny, snapped, half))


def perplexity(model: torch.nn.Module, token_ids: torch.Tensor, window: int = 2048) -> float:
    """Perplexity of `model` on non-overlapping windows of `token_ids` (int64 [T])."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(token_ids) - window + 1, window):
            ids = token_ids[start : start + window]
            logits = model(ids[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            count += window - 1
    return math.exp(total / count)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("smoothquant/data/tiny-opt"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--peak-lr", type=float, default=1e-2)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.vocab_size < 256 + len(SPECIAL_TOKENS):
        parser.error(f"--vocab-size must be at least 260, got {args.vocab_size}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    rows = wikitext("validation")
    tokenizer = train_tokenizer(rows, args.vocab_size)
    token_ids = tokenizer("\n\n".join(rows), return_tensors="pt", verbose=False).input_ids[0]
    model = build_model(tokenizer, args.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(token_ids):,} training tokens", flush=True)
    loss = train(model, token_ids, steps=args.steps, peak_lr=args.peak_lr, seed=args.seed)
    seconds = time.perf_counter() - started
    print(f"trained {args.steps} steps in {seconds:.0f} s, training loss {loss:.3f}", flush=True)

    test_ids = tokenizer(
        "\n\n".join(wikitext("test")), return_tensors="pt", verbose=False
    ).input_ids[0]
    trained = perplexity(model, test_ids)
    records = add_outliers(model, args.seed)
    with_outliers = perplexity(model, test_ids)
    round_to_normal_fp16(model)
    rounded = perplexity(model, test_ids)
    print(
        f"test perplexity (windows of 2,048): trained {trained:.4f}, "
        f"with outliers {with_outliers:.4f}, in fp16 {rounded:.4f}"
    )
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "outliers.json").write_text(json.dumps(records, indent=1) + "\n")
    print(f"saved in {args.output}")


if __name__ == "__main__":
    main()
