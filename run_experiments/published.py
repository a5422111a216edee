"""The published functions that work on a model, kept for existing code that imports them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant import ppl_eval
from smoothquant.bundled import wikitext
from smoothquant.core.progress import progress_bar


def get_calib_dataset(
    tokenizer: Any = None, n_samples: int = 256, block_size: int = 512
) -> list[Tensor]:
    """Return token blocks of WikiText-2 validation as published: lines shuffled, joined and cut.

    Args:
        tokenizer: a transformers tokenizer.
        n_samples: lines to take. Empty lines and lines longer than block_size are skipped.
        block_size: tokens per block.

    Returns:
        list of int64 [1, block_size]. An incomplete last block is dropped.

    Raises:
        ValueError: there is no tokenizer, or a count is below 1.
    """
    if tokenizer is None:
        raise ValueError("tokenizer must be a transformers tokenizer; got None")
    for name, value in (("n_samples", n_samples), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value!r}")
    import numpy

    rows = wikitext("validation")
    token_ids: list[int] = []
    taken = 0
    # The generator and seed that the published code's dataset library shuffles with.
    for index in numpy.random.default_rng(42).permutation(len(rows)):
        line = tokenizer.encode(rows[index].strip())
        if not line or len(line) > block_size:
            continue
        token_ids += line
        taken += 1
        if taken == n_samples:
            break
    count = len(token_ids) // block_size
    print(f" * Split into {count} blocks")
    ids = torch.tensor(token_ids[: count * block_size], dtype=torch.int64)
    return list(ids.view(count, 1, block_size))


@torch.no_grad()
def get_calib_feat(model: nn.Module, tokenizer: Any) -> dict[str, list[Tensor]]:
    """Return the mean absolute input per channel of every nn.Linear, as published.

    `smoothquant.calibration.collect_stats` is faster and also collects the statistics for sorting
    by rms, max or mean + 3 STD.

    Args:
        model: the model.
        tokenizer: a transformers tokenizer.

    Returns:
        {name of the linear: [a float32 [K] CPU tensor per block of `get_calib_dataset`]}.
    """
    features: dict[str, list[Tensor]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            mean = x.reshape(-1, x.shape[-1]).float().abs().mean(dim=0)
            features.setdefault(name, []).append(mean.cpu())

        return hook

    handles = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    device = next(model.parameters()).device
    try:
        for block in progress_bar(get_calib_dataset(tokenizer), desc="calibrating", unit="block"):
            model(block.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return features


class Evaluator(ppl_eval.Evaluator):
    """Perplexity on the first `n_samples` windows of `batch_size` tokens, as published.

    Args:
        dataset: a mapping with the texts under "text", a list of texts, or a path.
        tokenizer: a transformers tokenizer.
        device: device for the tokens.
        n_samples: number of windows; None for all.
        batch_size: tokens per window (the published name).
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        device: str | torch.device,
        n_samples: int | None = 10,
        batch_size: int = 2048,
    ) -> None:
        super().__init__(dataset, tokenizer, device, n_samples, seq_len=batch_size)
        self.batch_size = batch_size
