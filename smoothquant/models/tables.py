"""Output heads and embeddings: whether they can be quantized, and which of them are one weight.

A *table* is a weight with a row per token of the vocabulary: that of the output head, of the input
embeddings, or of both if they are tied.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from ..core.config import MixedQuantConfig
from .kept import reasons_to_keep, unlike_linear
from .linears import is_linear

# KL divergence and speed chose it: docs/results.md
DEFAULT_FORMAT = "int8"

# What an embedding of transformers may compute besides the lookup.
_SCALED = re.compile(
    r"return super\(\)\.forward\(\w+\) \* self\.embed_scale(\.to\(self\.weight\.dtype\))?\s*$"
)


class Table(NamedTuple):
    """A weight to quantize.

    kind: "int8" or "int4".
    head: full name of the output head, an nn.Linear, or None.
    embeddings: full names of the embeddings that look rows up in the weight.
    """

    kind: str
    head: str | None
    embeddings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first full name of the packed weight in the quantized model."""
        return f"{self.embeddings[0]}.packed" if self.embeddings else str(self.head)

    @property
    def needs_statistics(self) -> bool:
        """Whether statistics of the head's input choose its channels."""
        return self.kind == "int4" and self.head is not None

    @property
    def what(self) -> str:
        """What the weight belongs to, for reports."""
        embeddings = " and ".join(self.embeddings)
        if self.head is None:
            return f"embeddings ({embeddings})"
        return f"output head {self.head}, tied to {embeddings}" if embeddings else "output head"


class Tables(NamedTuple):
    """The tables to quantize, and {module: why it stays in 16 bits though it should not}."""

    quantized: tuple[Table, ...] = ()
    kept: dict[str, str] = {}


def find_tables(model: nn.Module, config: MixedQuantConfig) -> Tables:
    """What `config.head` and `config.embeddings` mean for a float or quantized model.

    Only ``get_output_embeddings()`` and ``get_input_embeddings()`` are looked at, and what shares
    their weights. What is quantized already is left out.

    Raises:
        ValueError: head and embeddings are one weight, but `config` asks for two formats.
    """
    wanted = {"head": config.head, "embeddings": config.embeddings}
    if set(wanted.values()) == {"16bit"}:
        return Tables()
    found = {"head": output_head(model), "embeddings": _embeddings(model)}
    weights = {part: module.weight for part, module in found.items() if module is not None}
    if len(weights) == 2 and weights["head"] is weights["embeddings"]:
        kinds = set(wanted.values()) - {None}
        if len(kinds) > 1:
            kinds.discard("16bit")  # as in configs where a missing field means that
        if len(kinds) > 1:
            raise ValueError(
                f"head and embeddings must not differ for {type(model).__name__}, which uses one "
                f"weight for both; got head={config.head!r} and embeddings={config.embeddings!r}"
            )
        wanted = dict.fromkeys(wanted, kinds.pop() if kinds else None)
        del weights["embeddings"]
    why = reasons_to_keep(model, config.ignore, heads=False)
    # transformers asks a model's parameters for its dtype and device.
    would_be_bare = not any(
        module._parameters and not (is_linear(module) or isinstance(module, nn.Embedding))
        for module in model.modules()
    )
    quantized, kept = [], {}
    for part, weight in weights.items():
        kind = wanted[part] or DEFAULT_FORMAT
        if kind == "16bit":
            continue
        readers = {
            name: module
            for name, module in model.named_modules()
            if module._parameters.get("weight") is weight
        }
        faults = [
            (name, why.get(module) or _unlike_table(module, found["head"]))
            for name, module in readers.items()
        ]
        if would_be_bare:
            faults += [(name, "no parameter would be left in the model") for name in readers]
        fault = next(((name, reason) for name, reason in faults if reason), None)
        if fault is None:
            embeddings = tuple(n for n, m in readers.items() if isinstance(m, nn.Embedding))
            head = next((n for n, m in readers.items() if isinstance(m, nn.Linear)), None)
            quantized.append(Table(kind, head, embeddings))
            continue
        for name, module in readers.items():
            what = "embedding" if isinstance(module, nn.Embedding) else "output head"
            shared = "" if name == fault[0] else f"shares its weight with {fault[0]}: "
            kept[name] = f"{what}, not {kind}: {shared}{fault[1]}"
    return Tables(tuple(quantized), kept)


def output_head(model: nn.Module) -> nn.Linear | None:
    """The float linear that computes the logits of a transformers model, or None."""
    head = _from_getter(model, "get_output_embeddings")
    return head if isinstance(head, nn.Linear) and _has_weight(head) else None


def head_name(model: nn.Module) -> str | None:
    """The full name of `output_head`."""
    head = output_head(model)
    return next((name for name, m in model.named_modules() if m is head), None) if head else None


def _embeddings(model: nn.Module) -> nn.Embedding | None:
    embedding = _from_getter(model, "get_input_embeddings")
    return embedding if isinstance(embedding, nn.Embedding) and _has_weight(embedding) else None


def _from_getter(model: nn.Module, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None


def _unlike_table(module: nn.Module, head: nn.Module | None) -> str:
    """Why a module that reads a table cannot read a packed one; "" if it can."""
    if any((module._forward_hooks, module._forward_pre_hooks)):
        return "it has hooks"
    if isinstance(module, nn.Embedding):
        return unlike_embedding(module)
    if isinstance(module, nn.Linear) and module is head:
        return unlike_linear(module)
    return f"{type(module).__name__} is no output head and no embedding"


def unlike_embedding(module: nn.Embedding) -> str:
    """Why an embedding computes more than a lookup, perhaps times a factor; "" if it does not."""
    kind: Any = type(module)
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    if replaced or (kind.forward is not nn.Embedding.forward and not _scaled_forward(kind)):
        return f"{kind.__name__} has a forward of its own"
    if set(module._parameters) != {"weight"} or module._modules:
        return "it has tensors besides its weight"
    if module._buffers.keys() - {"embed_scale"}:
        return "it has tensors besides its weight"
    return "max_norm changes its weight" if module.max_norm is not None else ""


@functools.cache
def _scaled_forward(kind: type[nn.Module]) -> re.Match[str] | None:
    """The last line of a forward that only multiplies an embedding by ``self.embed_scale``."""
    try:
        lines = inspect.getsource(kind.forward).strip().splitlines()
    except (OSError, TypeError):
        return None
    is_plain = kind.__mro__[1] is nn.Embedding and len(lines) == 2
    return _SCALED.search(lines[-1]) if is_plain else None


def embedding_scale(module: nn.Embedding) -> tuple[float | None, bool]:
    """What an embedding multiplies its rows by, or None; and whether it rounds that to its dtype
    first."""
    kind: Any = type(module)
    if kind.forward is nn.Embedding.forward:
        return None, False
    match = _scaled_forward(kind)
    scale: Any = getattr(module, "scalar_embed_scale", None)
    if scale is None:
        scale = getattr(module, "embed_scale", 1.0)
    return float(scale), bool(match and match[1])
