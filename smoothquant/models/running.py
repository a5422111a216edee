"""Running a float model: evaluation mode, hooks on submodules, and the inputs of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .families import LayerInput
from .routing import PARTS, expert_arguments, routed_inputs


def without_head(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The base model, without the language head, if it contains all named layers; otherwise the
    model itself."""
    base = getattr(model, "base_model", model)
    prefix = next((name + "." for name, m in model.named_modules() if m is base and name), "")
    return base if all(name.startswith(prefix) for name in names) else model


def no_cache(model: nn.Module) -> dict[str, bool]:
    """Keyword arguments that turn off a transformers model's cache; empty for other models."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def max_positions(model: nn.Module) -> int | None:
    """The largest number of tokens of a transformers model; None if its config has no limit."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


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
            x, top_k_index = expert_arguments(module, args, kwargs)
            visit((name,), x)
            for expert, *matrix_inputs in routed_inputs(module, x, top_k_index):
                for part, matrix_input in zip(PARTS, matrix_inputs, strict=True):
                    visit((item.expert_linear(expert, part),), matrix_input)

        return hook

    hooks = {item.linears[0]: linear_hook(item) for item in inputs if item.linears}
    return hooks | {
        item.experts: experts_hook(item, item.experts) for item in inputs if item.experts
    }
