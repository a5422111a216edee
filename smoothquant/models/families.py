"""Transformer architectures as a table: which linears share an input, and what makes it.

The table is keyed by ``config.model_type`` and never imports a transformers model class: a row
says how the decoder layers are called, which children of a layer read the same activation, and
which norm or linears produce it. A model type without a row is walked generically, with a warning.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn


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
        `smoothquant.models.routing.routed_inputs` gives what each matrix reads.
    router: full name of a module with a ``weight [E, H]`` that also reads the input but stays in
        16 bits, or None.
    norm_offset: the norm multiplies by ``norm_offset + norm.weight``.
    made_by: full names of the linears whose output channels become this input's channels one by
        one; empty where there are none.
    made_from: which output channel becomes which, see `MADE_FROM`; None without made_by.
    num_heads: heads whose outputs, one after the other, are this input; 0 if it is no output of
        attention.
    """

    name: str
    norm: str | None
    linears: tuple[str, ...]
    experts: str | None = None
    router: str | None = None
    norm_offset: float = 0.0
    made_by: tuple[str, ...] = ()
    made_from: str | None = None
    num_heads: int = 0

    def expert_linear(self, expert: int, part: str) -> str:
        """The name of one expert's matrix, part "gate_up_proj" or "down_proj":
        ``model.layers.0.mlp.experts.3.gate_up_proj``."""
        return f"{self.experts}.{expert}.{part}"


# How an input of K channels comes from the output channels of the linears that make it.
#   "channel": channel c is an elementwise function of channel c of each linear, or of channel c of
#     both halves of one with 2 K channels.
#   The others are attention: the input is num_heads heads, channel c of each of them a weighted sum
#   of channel c of a head of v, which one or several heads in a row share. The linear makes
#   "v": the heads of v;
#   "q, k, v": all heads of q, then those of k, then those of v;
#   "qkv by head": for each head of v the heads of q that share it, then its k, then itself.
MADE_FROM = ("channel", "v", "q, k, v", "qkv by head")


class Reads(NamedTuple):
    """Children of a decoder layer that read one activation, and the norms that may produce it
    (the first that the layer has). Activations of the same norm are the same activation. made_by,
    made_from: as in LayerInput."""

    linears: tuple[str, ...]
    norms: tuple[str, ...] = ()
    experts: str | None = None
    router: str | None = None
    made_by: tuple[str, ...] = ()
    made_from: str | None = None


class Family(NamedTuple):
    """layers: name of the list of decoder layers. reads: in forward order. residual_from_norm: a
    config field and the value under which the norms also feed the residual stream, so that no
    gain can be folded. norm_offset: as in LayerInput."""

    layers: str
    reads: tuple[Reads, ...]
    residual_from_norm: tuple[str, object] | None = None
    norm_offset: float = 0.0


def _made(linear: str, *made_by: str, made_from: str = "channel") -> Reads:
    return Reads((linear,), made_by=made_by, made_from=made_from)


_ATTENTION = (
    Reads(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("input_layernorm",)),
    _made("self_attn.o_proj", "self_attn.v_proj", made_from="v"),
)

_FUSED_ATTENTION = _made(
    "self_attention.dense", "self_attention.query_key_value", made_from="qkv by head"
)

_GATED = _made("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
_4H_TO_H = _made("mlp.dense_4h_to_h", "mlp.dense_h_to_4h")

_LLAMA_READS = _ATTENTION + (
    Reads(("mlp.gate_proj", "mlp.up_proj"), ("post_attention_layernorm",)),
    _GATED,
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
            _made("self_attn.out_proj", "self_attn.v_proj", made_from="v"),
            Reads(("fc1",), ("final_layer_norm",)),
            _made("fc2", "fc1"),
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
            _GATED,
        ),
        norm_offset=1.0,
    ),
    "mixtral": Family(
        "layers",
        _ATTENTION
        + (Reads((), ("post_attention_layernorm",), experts="mlp.experts", router="mlp.gate"),),
    ),
    # Layers may be dense instead. The gate of the shared experts also reads what the norm makes, so
    # its gain is not folded; that gate stays in 16 bits.
    "qwen2_moe": Family(
        "layers",
        _ATTENTION
        + (
            Reads(
                (
                    "mlp.gate_proj",
                    "mlp.up_proj",
                    "mlp.shared_expert.gate_proj",
                    "mlp.shared_expert.up_proj",
                ),
                experts="mlp.experts",
                router="mlp.gate",
            ),
            _GATED,
            _made(
                "mlp.shared_expert.down_proj",
                "mlp.shared_expert.gate_proj",
                "mlp.shared_expert.up_proj",
            ),
        ),
    ),
    "qwen3_moe": Family(
        "layers",
        _ATTENTION
        + (
            Reads(
                ("mlp.gate_proj", "mlp.up_proj"),
                ("post_attention_layernorm",),
                experts="mlp.experts",
                router="mlp.gate",
            ),
            _GATED,
        ),
    ),
    "phi": Family(
        "layers",
        (
            Reads(_ATTENTION[0].linears + ("mlp.fc1",), ("input_layernorm",)),
            _made("self_attn.dense", "self_attn.v_proj", made_from="v"),
            _made("mlp.fc2", "mlp.fc1"),
        ),
    ),
    "phi3": Family(
        "layers",
        (
            Reads(("self_attn.qkv_proj",), ("input_layernorm",)),
            _made("self_attn.o_proj", "self_attn.qkv_proj", made_from="q, k, v"),
            Reads(("mlp.gate_up_proj",), ("post_attention_layernorm",)),
            _made("mlp.down_proj", "mlp.gate_up_proj"),
        ),
    ),
    # Three decoders: two parallel norms (ln_attn, ln_mlp), one shared norm, or one after the other.
    "falcon": Family(
        "h",
        (
            Reads(("self_attention.query_key_value",), ("ln_attn", "input_layernorm")),
            _FUSED_ATTENTION,
            Reads(
                ("mlp.dense_h_to_4h",), ("ln_mlp", "post_attention_layernorm", "input_layernorm")
            ),
            _4H_TO_H,
        ),
    ),
    "bloom": Family(
        "h",
        (
            Reads(("self_attention.query_key_value",), ("input_layernorm",)),
            _FUSED_ATTENTION,
            Reads(("mlp.dense_h_to_4h",), ("post_attention_layernorm",)),
            _4H_TO_H,
        ),
        residual_from_norm=("apply_residual_connection_post_layernorm", True),
    ),
    "gpt_neox": Family(
        "layers",
        (
            Reads(("attention.query_key_value",), ("input_layernorm",)),
            _made("attention.dense", "attention.query_key_value", made_from="qkv by head"),
            Reads(("mlp.dense_h_to_4h",), ("post_attention_layernorm",)),
            _4H_TO_H,
        ),
    ),
}


def layer_inputs(model: nn.Module) -> list[LayerInput]:
    """Every distinct input of a quantizable linear of a float model, in forward order.

    model: a transformers model (headless or with a head) or any nn.Module. Without a row for
    ``model.config.model_type`` every nn.Linear counts as having an input of its own, output heads
    excepted, and a warning names what was guessed. Raises ValueError when nothing is found.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    found = known_inputs(model) or _generic(model, model_type)
    if not found:
        raise ValueError(f"model has no quantizable nn.Linear: {type(model).__name__}")
    return found


def known_inputs(model: nn.Module) -> list[LayerInput]:
    """What `layer_inputs` takes from the table, for float and quantized models alike; empty without
    a row for the model."""
    config = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", None))
    if family is None:
        return []
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
                item = LayerInput(name, norm, linears, experts, router, family.norm_offset)
                made_by = full(reads.made_by)
                if made_by and len(made_by) == len(reads.made_by):
                    heads = 0 if reads.made_from == "channel" else config.num_attention_heads
                    item = replace(
                        item, made_by=made_by, made_from=reads.made_from, num_heads=heads
                    )
                found.append(item)
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


def value_rows(item: LayerInput, in_features: int, out_features: int) -> Tensor | None:
    """Which output channels of the linear that makes an output of attention are v's.

    Args:
        item: the input of the linear behind attention, which has in_features channels.
        out_features: of the linear in item.made_by.

    Returns:
        int64 [heads of v, channels of a head], in order; None where item is no output of attention
        or the sizes do not fit its heads.
    """
    if not item.num_heads or not in_features or in_features % item.num_heads:
        return None
    size = in_features // item.num_heads
    fused = item.made_from != "v"
    num_values, odd = divmod(out_features - fused * in_features, size * (1 + fused))
    if odd or num_values < 1 or item.num_heads % num_values:
        return None
    heads = torch.arange(out_features).view(-1, size)
    if item.made_from == "qkv by head":
        return heads.view(num_values, -1, size)[:, -1]
    return heads[-num_values:]


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
