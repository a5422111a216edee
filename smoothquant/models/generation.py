"""Greedy decoding and sampling with little work between two tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

CACHES = ("cache", "past_key_values")  # the cache's name in transformers, newer and older
KNOWN = {*CACHES, "attention_mask", "use_cache", "logits_to_keep", "cache_position", "position_ids"}


def generate(model: Any, *args: Any, streamer: Any = None, **options: Any) -> Any:
    """As ``model.generate``, with less work between two tokens; without beams.

    Chooses the same tokens, with transformers' own logits processors, stopping criteria and random
    numbers, but calls the model with nothing except the new token and the cache. What needs more
    (padding, a cache with tokens in it, `return_dict_in_generate`, encoder-decoder models) goes
    through transformers' own loop.

    Args:
        model: a transformers model that generates text.
        The others are those of ``model.generate``.

    Raises:
        ValueError: beams are asked for.
    """
    # transformers does not hand its streamer to a custom loop, but gives it the prompt.
    loop = partial(_decode, streamer=streamer)
    return model.generate(*args, streamer=streamer, custom_generate=loop, **options)


@torch.no_grad()
def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """A decoding method as transformers defines them."""
    if generation_config.num_beams > 1:
        raise ValueError(f"num_beams must be 1; got {generation_config.num_beams}")
    name = next((name for name in CACHES if model_kwargs.get(name) is not None), "")
    cache, mask = model_kwargs.get(name), model_kwargs.get("attention_mask")
    is_plain = (
        not generation_config.return_dict_in_generate
        and not getattr(generation_config, "prefill_chunk_size", None)
        and not model.config.is_encoder_decoder
        and not synced_gpus
        and model_kwargs.get("use_cache")
        and cache is not None
        and not cache.get_seq_length()
        and not cache.is_compileable
        and (mask is None or bool((mask == 1).all()))
        and all(key in KNOWN or value is None for key, value in model_kwargs.items())
    )
    if not is_plain:
        return model._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    options = {name: cache, "use_cache": True, "return_dict": True}
    if "logits_to_keep" in model_kwargs:
        options["logits_to_keep"] = 1
    pad = generation_config._pad_token_tensor
    has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    new = input_ids
    while True:
        logits = model(input_ids=new, **options).logits[:, -1]
        scores = logits_processor(input_ids, logits.to(copy=True, dtype=torch.float32))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if has_end and not running.all():
            tokens = torch.where(running, tokens, pad.to(tokens.device))
        new = tokens[:, None]
        input_ids = torch.cat((input_ids, new), dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        running = running & ~stopping_criteria(input_ids, None)
        if not running.any():
            break
    if streamer is not None:
        streamer.end()
    return input_ids
