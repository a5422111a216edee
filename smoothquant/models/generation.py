"""Greedy decoding and sampling with little work between two tokens."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CACHES = ("cache", "past_key_values")  # the cache's name in transformers, newer and older
# Arguments of the model that need no preparation from one token to the next.
PLAIN = {*CACHES, "attention_mask", "use_cache", "logits_to_keep", "cache_position", "position_ids"}
# Options that transformers keeps from a custom loop.
KEPT_BACK = ("tokenizer", "assistant_model", "assistant_tokenizer", "synced_gpus", "stop_strings")


_thread = threading.local()


Known = weakref.WeakKeyDictionary[nn.Module, Any]


def known_while_generating() -> Known | None:
    """What was found out about modules since `generate` started in this thread: it holds until the
    last token. None if it does not run."""
    return getattr(_thread, "known", None)


@contextmanager
def _generating() -> Iterator[None]:
    outer = known_while_generating()
    _thread.known = Known()
    try:
        yield
    finally:
        _thread.known = outer


def generate(model: Any, *args: Any, streamer: Any = None, **options: Any) -> Any:
    """As ``model.generate``, with less work between two tokens.

    Chooses the same tokens, with transformers' own logits processors, stopping criteria and random
    numbers, but calls the model with nothing except the new token, its position and the cache, and
    trusts that nobody changes the model's modules meanwhile. What
    needs more (padding, a cache with tokens in it, ``return_dict_in_generate``, stop strings, an
    assistant, models that prepare their inputs in a way of their own) goes through transformers'
    own loop.

    Args:
        model: a transformers model that generates text.
        The others are those of ``model.generate``.

    Raises:
        ValueError: the options ask for beams or anything else but greedy decoding and sampling.
    """
    if any(options.get(name) is not None for name in (*KEPT_BACK, "custom_generate")):
        return model.generate(*args, streamer=streamer, **options)
    # transformers does not hand its streamer to a custom loop, but gives it the prompt.
    loop = partial(_decode, streamer=streamer)
    with _generating():
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
    from transformers import GenerationMixin

    mode = generation_config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise ValueError(
            f"generate decodes greedily or samples, one sequence at a time; got {mode}"
        )
    name = next((name for name in CACHES if model_kwargs.get(name) is not None), "")
    cache, mask = model_kwargs.get(name), model_kwargs.get("attention_mask")
    positions = model_kwargs.get("position_ids")
    own = type(model).prepare_inputs_for_generation
    is_plain = (
        own is GenerationMixin.prepare_inputs_for_generation
        and not generation_config.return_dict_in_generate
        and not getattr(generation_config, "prefill_chunk_size", None)
        and not model.config.is_encoder_decoder
        and model_kwargs.get("use_cache")
        and cache is not None
        and _is_empty(cache)
        and not cache.is_compileable
        and (mask is None or bool((mask == 1).all()))
        and (positions is None or positions.shape[-1] == input_ids.shape[-1])
        and all(key in PLAIN or value is None for key, value in model_kwargs.items())
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
        if positions is not None:
            options["position_ids"] = positions
            positions = positions[..., -1:] + 1
        logits = model(input_ids=new, **options).logits[:, -1]
        logits = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if has_end:
            tokens = torch.where(running, tokens, pad.to(tokens.device))
        new = tokens[:, None]
        input_ids = torch.cat((input_ids, new), dim=-1)
        running = running & ~stopping_criteria(input_ids, None)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if not running.any():
            break
    if streamer is not None:
        streamer.end()
    return input_ids


def _is_empty(cache: Any) -> bool:
    try:
        return not cache.get_seq_length()
    except ValueError:  # it has only layers that count no tokens
        return False
