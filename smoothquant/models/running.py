"""Running a float model: modes, hooks on submodules, and the inputs that its linears see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from .families import LayerInput
from .routing import PARTS, expert_arguments, routed_inputs


def without_head(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The part of the model that holds all named layers; its language head is not needed."""
    base = getattr(model, "base_model", model)
    prefix = next((name + "." for name, m in model.named_modules() if m is base and name), "")
    return base if all(name.startswith(prefix) for name in names) else model


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The keyword that keeps a transformers model from filling a cache, where it has one."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable], after: bool = False) -> Iterator[None]:
    """Calls {name of a submodule: hook(module, args, kwargs, output if after)} while inside."""
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
    """What a hooked linear is called with."""
    return args[0] if args else next(iter(kwargs.values()))


def input_hooks(
    inputs: Sequence[LayerInput], visit: Callable[[tuple[str, ...], Tensor], None]
) -> dict[str, Callable]:
    """Hooks for `hooked` that call visit(names, x) for every distinct input of a matrix.

    names: what stands for the input: the linears that read x, one expert's matrix, or an experts
        module as a whole. x: [..., K]; expert matrices get the tokens routed to them, and only
        those experts that get any are visited.
    """

    def linear_hook(item: LayerInput) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            visit(item.linears, first_argument(args, kwargs))

        return hook

    def experts_hook(item: LayerInput) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x, top_k_index = expert_arguments(module, args, kwargs)
            visit((item.experts,), x)
            for expert, *part_inputs in routed_inputs(module, x, top_k_index):
                for part, part_input in zip(PARTS, part_inputs, strict=True):
                    visit((item.expert_linear(expert, part),), part_input)

        return hook

    hooks = {item.linears[0]: linear_hook(item) for item in inputs if item.linears}
    return hooks | {item.experts: experts_hook(item) for item in inputs if item.experts}
