"""Running a float model: evaluation mode, hooks on submodules, and the inputs of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .families import LayerInput, decoder_layers, has_more
from .modules import is_transformers_model
from .routing import expert_arguments, expert_parts, num_experts, routed_inputs


class HeadReached(Exception):
    """Raised by a hook at the input of an output head: what follows it is not needed."""


def without_head(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The base model, without the language head, if it contains all named layers; otherwise the
    model itself."""
    base = getattr(model, "base_model", model)
    prefix = next((name + "." for name, m in model.named_modules() if m is base and name), "")
    return base if all(name.startswith(prefix) for name in names) else model


@torch.no_grad()
def runs_on_tokens(model: nn.Module) -> bool:
    """Whether a transformers model needs no input but token ids.

    A model of an unknown family is tried, unless its parameters are on meta.
    """
    if not is_transformers_model(model) or getattr(model, "main_input_name", "") != "input_ids":
        return False
    first = next(model.parameters())
    if decoder_layers(model) or first.is_meta:
        return True
    try:
        with evaluating(model):
            run_tokens(model, torch.zeros(1, 3, dtype=torch.int64, device=first.device))
    except Exception:  # whatever a model raises that misses an input
        return False
    return True


def text_model(model: Any) -> Any:
    """What computes a model's logits from tokens alone: the text model within one that also takes
    images, if it has the output head; else the model itself."""
    if not has_more(model):
        return model
    inner = model.get_decoder()
    return model if inner.get_output_embeddings() is None else inner


def run_tokens(model: nn.Module, tokens: Tensor) -> Any:
    """Call a model with token ids [B, T], without a cache.

    The decoder of an encoder-decoder model gets the same tokens as its encoder.
    """
    config: Any = getattr(model, "config", None)
    model = text_model(model)
    options: dict[str, Any] = {"use_cache": False} if hasattr(config, "use_cache") else {}
    if getattr(config, "is_encoder_decoder", False):
        options["decoder_input_ids"] = tokens
    return model(tokens, **options)


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence that a model takes, in tokens; None if its config states no limit."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # a model of text and images has two configs
        config = config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # XLNet has -1
        return None
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and "position" in name
        if table and module.num_embeddings == positions and module.padding_idx is not None:
            return positions - module.padding_idx - 1  # RoBERTa's positions begin after padding
    return positions


def check_positions(model: nn.Module, **tokens: int) -> None:
    """Raise ValueError if the model has too few positions for the sum of these numbers of tokens.

    tokens: {name of an argument, for the message: its number of tokens}.
    """
    positions = max_positions(model)
    if positions is not None and sum(tokens.values()) > positions:
        raise ValueError(
            f"{' + '.join(tokens)} must be at most {positions}, the model's maximum; "
            f"got {' + '.join(map(str, tokens.values()))}"
        )


def check_token_ids(model: nn.Module, token_ids: Tensor) -> None:
    """Raise ValueError if the model has no embedding for one of the token ids (int64, any shape).

    An index beyond a table is an error without a name on the CPU, and ends the process on a GPU.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embedding, "num_embeddings", None)
    largest = int(token_ids.max())
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"model has {vocabulary} token ids, but the tokenizer gave id {largest}: they do not "
            "belong together"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; on exit, restore every module's previous mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable], after: bool = False) -> Iterator[None]:
    """Register hooks on submodules; remove them on exit.

    Args:
        hooks: {full name of a submodule: hook(module, args, kwargs)}, called before the submodule.
        after: call the hooks after the submodule, with its output as a fourth argument.
    """
    register = "register_forward_hook" if after else "register_forward_pre_hook"
    handles = [
        getattr(model.get_submodule(name), register)(hook, with_kwargs=True)
        for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_argument(args: tuple, kwargs: dict) -> Tensor:
    """The input of a hooked linear, whether positional or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


def input_hooks(
    inputs: Sequence[LayerInput], visit: Callable[[tuple[str, ...], Tensor], None]
) -> dict[str, Callable]:
    """Hooks for `hooked` that call ``visit(names, x)`` for every distinct layer input.

    ``x`` has shape [..., K]. ``names`` is one of: the linears that read x; a fused experts module;
    one expert's matrix, with the tokens routed to it. Experts without tokens are not visited.
    """

    def linear_hook(item: LayerInput) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            visit(item.linears, first_argument(args, kwargs))

        return hook

    def experts_hook(item: LayerInput, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x, top_k_index, _ = expert_arguments(num_experts(module), args, kwargs)
            visit((name,), x)
            for expert, *matrix_inputs in routed_inputs(module, x, top_k_index):
                for part, matrix_input in zip(expert_parts(module), matrix_inputs, strict=True):
                    visit((item.expert_linear(expert, part),), matrix_input)

        return hook

    hooks = {item.linears[0]: linear_hook(item) for item in inputs if item.linears}
    return hooks | {
        item.experts: experts_hook(item, item.experts) for item in inputs if item.experts
    }
