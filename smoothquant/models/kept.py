"""Which linears and fused experts of a float model must stay as they are, and why.

A module is replaced only if nothing but its weight and bias decides what it computes, and if the
model calls it instead of reading its weight.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .linears import CONV1D, class_path, is_linear
from .routing import BATCHED, expert_parameters, expert_parts, expert_weights, is_fused_experts

# Names of top-level linears that compute a model's outputs, for models that are not transformers'.
HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "qa_outputs"})

# Classes whose own forward computes what nn.Linear's does.
PLAIN_LINEARS = frozenset({CONV1D, "transformers.models.falcon.modeling_falcon.FalconLinear"})

# Experts known by name. Others are known by what transformers' decorator sets.
KNOWN_EXPERTS = BATCHED | {"MixtralExperts", "Qwen2MoeExperts", "Qwen3MoeExperts"}

# Branches of a forward under these conditions are not for inference, or are off by default. What
# they read is the dequantized weight.
_RARE_BRANCHES = frozenset({"training", "slow_but_exact"})

# What may be read of a weight without computing with it.
_PASSIVE = frozenset(
    {"dtype", "device", "shape", "size", "ndim", "numel", "is_meta", "requires_grad"}
)

_WEIGHT_READ = re.compile(r"\bself(\.\w+)+\.weight\b")  # worth parsing the code
_TASK = re.compile(r"For[A-Z]|Head")  # class names such as BertForMaskedLM and GPT2LMHeadModel
# Names, beside the experts of a mixture, of what weights them. Elsewhere, a "gate" may be anything;
# a "router" is one everywhere.
_ROUTER = re.compile(r"(^|_)gate$")
_INITIALIZE = ("__init__", "_init", "init", "reset", "tie", "_tie")  # names of such methods


def kept_modules(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, str]:
    """The linears and fused experts modules that are not to be quantized.

    Args:
        ignore: patterns of modules to leave out, as in `MixedQuantConfig`.

    Returns:
        {full name: reason}, under every name that the model has for a module.
    """
    why = reasons_to_keep(model, ignore)
    return {
        name: why[module]
        for name, module in model.named_modules(remove_duplicate=False)
        if module in why and (is_linear(module) or is_fused_experts(module))
    }


def reasons_to_keep(
    model: nn.Module, ignore: Sequence[str] = (), *, heads: bool = True
) -> dict[nn.Module, str]:
    """{module that is not to be quantized: reason}, for modules of every kind.

    Args:
        ignore: as for `kept_modules`.
        heads: an output head is one.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    why: dict[nn.Module, str] = {}

    def keep(module: nn.Module | None, reason: str) -> None:
        if reason and module is not None:
            why.setdefault(module, reason)

    for name, module in modules.items():
        pattern = next((pattern for pattern in ignore if matches(pattern, name)), None)
        if pattern is not None:
            for inner in module.modules():
                keep(inner, f"ignore={pattern!r}")
    for name in output_heads(model) if heads else ():
        keep(modules[name], "output head")
    for name, module in modules.items():
        kind: Any = type(module)
        for child in _read_by_weight(kind) if module._modules else ():
            keep(
                modules.get(f"{name}.{child}" if name else child),
                f"{kind.__name__} reads its weight",
            )
        if "base_layer" in module._modules:
            for inner in module.modules():
                keep(inner, "part of an adapter layer")
        if is_linear(module):
            keep(module, unlike_linear(module))
            keep(module, "router" if "router" in name.split(".") else "")
        elif is_fused_experts(module):
            keep(module, unlike_experts(module))
        if "experts" in module._modules or any(map(is_fused_experts, module.children())):
            for child, router in module.named_modules():
                if _ROUTER.search(child.partition(".")[0]):
                    keep(router, "router")
    return why


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of `MixedQuantConfig.ignore` matches the full name of a module."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def check_ignore(model: nn.Module, ignore: Sequence[str]) -> None:
    """Raise ValueError for a pattern that matches no module of the model."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for pattern in ignore:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"ignore: {pattern!r} matches no module of {type(model).__name__}; its modules "
                f"are called {', '.join(names[:3])} ..."
            )


def output_heads(model: nn.Module) -> set[str]:
    """Full names of the linears that compute the model's output, or share their weight
    with one of these or with an embedding.

    In a transformers model, the output is computed by everything outside its base model.
    """
    heads: set[nn.Module] = set()
    for module in model.modules():
        if hasattr(type(module), "base_model_prefix"):  # a transformers model, perhaps an inner one
            heads.update(_outside_base(module))
    root = model
    while len(children := list(root.children())) == 1:  # DataParallel and other wrappers
        root = children[0]
    named = [child for name, child in root.named_children() if name in HEADS]
    heads.update(module for head in named for module in head.modules())
    shared = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or (is_linear(module) and module in heads)
    }
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if is_linear(module) and (module in heads or id(module.weight) in shared)
    }


def _outside_base(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that compute a transformers model's outputs.

    These are its output embeddings and, in a class for a task, everything outside its base model
    that does not hold another transformers model.
    """
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if getter else None
    except (AttributeError, NotImplementedError):
        head = None
    if isinstance(head, nn.Module):
        yield from head.modules()
    base = getattr(model, "base_model", model)
    if base is model or not (isinstance(base, nn.Module) and _TASK.search(type(model).__name__)):
        return
    in_base = set(base.modules())
    for child in model.children():
        inner = list(child.modules())
        if base not in inner and not any(hasattr(type(m), "base_model_prefix") for m in inner):
            yield from (module for module in inner if module not in in_base)


def unlike_linear(module: nn.Module) -> str:
    """Why a linear computes more than its weight and bias say; "" if it does not."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    plain: Any = next(b for b in kind.__mro__ if b is nn.Linear or class_path(b) in PLAIN_LINEARS)
    # accelerate's device hooks wrap the forward of the instance.
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    own_forward = kind.forward is not plain.forward or kind.__call__ is not nn.Module.__call__
    if replaced or own_forward:
        return f"{kind.__name__} has a forward of its own"
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return "it has tensors besides weight and bias"
    if type(module.weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(module.weight).__name__}"
    return ""


def unlike_experts(module: nn.Module) -> str:
    """Why fused experts do not compute what `W4A4Experts` does; "" if they do.

    Classes with transformers' decorator do: its fast implementations rely on what it sets.
    """
    kind: Any = type(module)
    decorated = (
        hasattr(module, "is_transposed")  # early versions of the decorator set nothing
        and hasattr(kind, "_apply_gate")
        and hasattr(kind.forward, "__wrapped__")
    )
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    if replaced or not (decorated or kind.__name__ in KNOWN_EXPERTS):
        return f"fused experts of another kind: {kind.__name__} has a forward of its own"
    if getattr(module, "has_post_expert_norm", False):
        return f"fused experts of another kind: {kind.__name__} has a norm after each expert"
    if not _has_usual_tensors(module):
        return f"fused experts of another kind: {kind.__name__} has other tensors"
    return ""


def _has_usual_tensors(experts: nn.Module) -> bool:
    """Whether fused experts have the tensors that `routing` describes, and no others."""
    names = [name for name, _ in (*experts.named_parameters(), *experts.named_buffers())]
    if sorted(names) != sorted(expert_parameters(experts)):
        return False
    first, second = expert_parts(experts)
    count, outputs, hidden = expert_weights(experts, first).shape
    inner, rest = divmod(outputs, 2 if getattr(experts, "has_gate", True) else 1)
    expected: dict[str, tuple[int, ...]] = {
        first: (count, outputs, hidden),
        second: (count, hidden, inner),
    }
    expected |= {f"{part}_bias": shape[:2] for part, shape in expected.items()}
    found = {name: tuple(experts.get_parameter(name).shape) for name in names}
    found |= {part: tuple(expert_weights(experts, part).shape) for part in (first, second)}
    return not rest and all(expected[name] == shape for name, shape in found.items())


@functools.cache
def _read_by_weight(kind: type[nn.Module]) -> frozenset[str]:
    """The children whose weight a class reads to compute with it, by its source code.

    For example ``dt_proj`` in Mamba, which is never called, and ``out_proj`` in
    nn.MultiheadAttention. Empty without source code.

    Returns:
        Paths of modules below a module of the class.
    """
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    read = [_read_in_module(base.__module__).get(base.__name__, set()) for base in bases]
    return frozenset().union(*read)


@functools.cache
def _read_in_module(name: str) -> dict[str, set[str]]:
    """{class: paths of the children whose weight it reads} for the classes of a Python module."""
    try:
        source = inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):
        return {}
    if not _WEIGHT_READ.search(source):
        return {}
    read: dict[str, set[str]] = {}
    try:
        tree = ast.parse(source)
    except SyntaxError:  # the file is being edited
        return {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            read.setdefault(node.name, set()).update(_weights_read(node))
    return read


def _weights_read(node: ast.AST) -> Iterator[str]:
    """Yield "a.b" for every value of ``self.a.b.weight`` that the code under `node` uses."""
    if isinstance(node, ast.FunctionDef) and node.name.startswith(_INITIALIZE):
        return
    if isinstance(node, ast.If) and _is_rare(node.test):
        for part in node.orelse:
            yield from _weights_read(part)
        return
    if isinstance(node, ast.Attribute) and node.attr in _PASSIVE:
        return
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "getattr"):
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
        owner, _, path = ast.unparse(node.value).partition(".")
        if owner == "self" and path:
            yield path
    for child in ast.iter_child_nodes(node):
        yield from _weights_read(child)


def _is_rare(test: ast.expr) -> bool:
    """Whether a condition holds only in a rare branch: it is one, or is joined to one by "and"."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(map(_is_rare, test.values))
    return isinstance(test, ast.Attribute) and test.attr in _RARE_BRANCHES
