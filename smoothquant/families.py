"""Transformer architectures as a table: which linears share an input, and which norm makes it.

The table is keyed by ``config.model_type`` and never imports a transformers model class: a row
says how the decoder layers are called, which children of a layer read the same activation, and
which norm produces it. A model type without a row is walked generically, with a warning.
"""

import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn


@dataclass(frozen=True)
class LayerInput:
    """One activation of a model and everything that reads it.

    name: the entry under which its statistics are kept: the first linear fed; for fused experts
        the experts module.
    norm: full name of the norm whose output is this input and nothing else, or None. Its gain may
        be folded into the weights fed.
    linears: full names of the nn.Linear modules fed.
    experts: full name of a fused experts module fed (parameters ``gate_up_proj [E, 2I, H]`` and
        ``down_proj [E, H, I]``, called with hidden states, expert indices and routing weights), or
        None. Its statistics are kept per expert matrix under the names of `expert_linear`;
        `smoothquant.moe.routed_inputs` gives what each matrix reads.
    router: full name of a module with a ``weight [E, H]`` that also reads the input but stays in
        16 bits, or None.
    norm_offset: the norm multiplies by ``norm_offset + norm.weight``.
    """

    name: str
    norm: str | None
    linears: tuple[str, ...]
    experts: str | None = None
    router: str | None = None
    norm_offset: float = 0.0

    def expert_linear(self, expert: int, part: str) -> str:
        """The name of one expert's matrix, part "gate_up_proj" or "down_proj":
        ``model.layers.0.mlp.experts.3.gate_up_proj``."""
        return f"{self.experts}.{expert}.{part}"


class Reads(NamedTuple):
    """Children of a decoder layer that read one activation, and the norms that may produce it
    (the first that the layer has). Activations of the same norm are the same activation."""

    linears: tuple[str, ...]
    norms: tuple[str, ...] = ()
    experts: str | None = None
    router: str | None = None


class Family(NamedTuple):
    """layers: name of the list of decoder layers. reads: in forward order. residual_from_norm: a
    config field and the value under which the norms also feed the residual stream, so that no
    gain can be folded. norm_offset: as in LayerInput."""

    layers: str
    reads: tuple[Reads, ...]
    residual_from_norm: tuple[str, object] | None = None
    norm_offset: float = 0.0


_ATTENTION = (
    Reads(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("input_layernorm",)),
    Reads(("self_attn.o_proj",)),
)
_LLAMA_READS = _ATTENTION + (
    Reads(("mlp.gate_proj", "mlp.up_proj"), ("post_attention_layernorm",)),
    Reads(("mlp.down_proj",)),
)
_LLAMA = Family("layers", _LLAMA_READS)

# Top-level linears that turn hidden states into answers, by their names in transformers.
HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "qa_outputs"})

# Linears whose outputs enter the attention products, by the last part of their names.
ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"})

FAMILIES = {
    "opt": Family(
        "layers",
        (
            Reads(_ATTENTION[0].linears, ("self_attn_layer_norm",)),
            Reads(("self_attn.out_proj",)),
            Reads(("fc1",), ("final_layer_norm",)),
            Reads(("fc2",)),
        ),
        residual_from_norm=("do_layer_norm_before", False),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": Family("layers", _LLAMA_READS, norm_offset=1.0),
    "gemma2": Family(
        "layers",
        _ATTENTION
        + (
            Reads(("mlp.gate_proj", "mlp.up_proj"), ("pre_feedforward_layernorm",)),
            Reads(("mlp.down_proj",)),
        ),
        norm_offset=1.0,
    ),
    "mixtral": Family(
        "layers",
        _ATTENTION
        + (Reads((), ("post_attention_layernorm",), experts="mlp.experts", router="mlp.gate"),),
    ),
    "phi": Family(
        "layers",
        (
            Reads(_ATTENTION[0].linears + ("mlp.fc1",), ("input_layernorm",)),
            Reads(("self_attn.dense",)),
            Reads(("mlp.fc2",)),
        ),
    ),
    "phi3": Family(
        "layers",
        (
            Reads(("self_attn.qkv_proj",), ("input_layernorm",)),
            Reads(("self_attn.o_proj",)),
            Reads(("mlp.gate_up_proj",), ("post_attention_layernorm",)),
            Reads(("mlp.down_proj",)),
        ),
    ),
    # Three decoders: two parallel norms (ln_attn, ln_mlp), one shared norm, or one after the other.
    "falcon": Family(
        "h",
        (
            Reads(("self_attention.query_key_value",), ("ln_attn", "input_layernorm")),
            Reads(("self_attention.dense",)),
            Reads(
                ("mlp.dense_h_to_4h",), ("ln_mlp", "post_attention_layernorm", "input_layernorm")
            ),
            Reads(("mlp.dense_4h_to_h",)),
        ),
    ),
    "bloom": Family(
        "h",
        (
            Reads(("self_attention.query_key_value",), ("input_layernorm",)),
            Reads(("self_attention.dense",)),
            Reads(("mlp.dense_h_to_4h",), ("post_attention_layernorm",)),
            Reads(("mlp.dense_4h_to_h",)),
        ),
        residual_from_norm=("apply_residual_connection_post_layernorm", True),
    ),
    "gpt_neox": Family(
        "layers",
        (
            Reads(("attention.query_key_value",), ("input_layernorm",)),
            Reads(("attention.dense",)),
            Reads(("mlp.dense_h_to_4h",), ("post_attention_layernorm",)),
            Reads(("mlp.dense_4h_to_h",)),
        ),
    ),
}


def layer_inputs(model: nn.Module) -> list[LayerInput]:
    """Every distinct input of a quantizable linear of a float model, in forward order.

    model: a transformers model (headless or with a head) or any nn.Module. Without a row for
    ``model.config.model_type`` every nn.Linear counts as having an input of its own, output heads
    excepted, and a warning names what was guessed. Raises ValueError when nothing is found.
    """
    config = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", None))
    found = _by_table(model, config, family) if family else []
    found = found or _generic(model, getattr(config, "model_type", None))
    if not found:
        raise ValueError(f"model has no quantizable nn.Linear: {type(model).__name__}")
    return found


def _by_table(model: nn.Module, config, family: Family) -> list[LayerInput]:
    modules = dict(model.named_modules())
    switch, value = family.residual_from_norm or ("", None)
    fold = not switch or getattr(config, switch, None) != value
    found: list[LayerInput] = []
    for layer in _decoder_layers(modules, family.layers):

        def full(names, layer=layer):
            return tuple(f"{layer}.{name}" for name in names if f"{layer}.{name}" in modules)

        at_norm: dict[str, int] = {}
        for reads in family.reads:
            linears, norm = full(reads.linears), next(iter(full(reads.norms)), None)
            experts = next(iter(full([reads.experts])), None)
            if norm in at_norm:
                shared = found[at_norm[norm]]
                found[at_norm[norm]] = replace(shared, linears=shared.linears + linears)
            elif linears or experts:
                if norm:
                    at_norm[norm] = len(found)
                router = next(iter(full([reads.router])), None)
                name = linears[0] if linears else experts
                found.append(LayerInput(name, norm, linears, experts, router, family.norm_offset))
    # A norm without a gain, or whose output is also the residual, has nothing to fold into.
    return [
        item
        if fold and getattr(modules.get(item.norm), "weight", None) is not None
        else replace(item, norm=None)
        for item in found
    ]


def decoder_layers(model: nn.Module) -> list[str]:
    """Full names of the model's decoder layers in forward order; none for an unknown family."""
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", None))
    return _decoder_layers(dict(model.named_modules()), family.layers) if family else []


def _decoder_layers(modules: dict[str, nn.Module], list_name: str) -> list[str]:
    return [
        f"{name}.{child}" if name else child
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == list_name
        for child, _ in module.named_children()
    ]


def _generic(model: nn.Module, model_type: str | None) -> list[LayerInput]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    heads = output_heads(model)
    guessed = [name for name in linears if name not in heads]
    if guessed:
        fused = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
        warnings.warn(
            f"model type {model_type!r} has no row in the table of families: guessed that these "
            f"nn.Linear modules have an input each: {_listed(guessed)}; kept as they are: "
            f"{_listed([name for name in linears if name in heads] + fused)}",
            stacklevel=3,
        )
    return [LayerInput(name, None, (name,)) for name in guessed]


def output_heads(model: nn.Module) -> set[str]:
    """Full names of the nn.Linear modules that make the model's output or share an embedding."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (module is head or id(module.weight) in embedded or name in HEADS)
    }


def _listed(names: list[str], limit: int = 8) -> str:
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(names[:limit] + more) or "none"
