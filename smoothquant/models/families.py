"""Transformer architectures as a table: which linears share an input, and what produces it.

The table is keyed by ``config.model_type`` and imports no transformers model class. A row names
the list of decoder layers, the children of a layer that read the same activation, and the norm or
linears that produce it. For a model type without a row, the linears are guessed, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kept import check_ignore, kept_modules
from .linears import is_linear
from .routing import is_fused_experts


@dataclass(frozen=True)
class LayerInput:
    """One activation of a model and all modules that read it.

    Module names are full names.

    name: key of its statistics: the first linear that reads it, or else the experts module.
    norm: the norm that produces it and feeds nothing else, or None. Its gain may be folded into
        the weights that read the activation.
    linears: the linears that read it (`smoothquant.models.linears`).
    experts: the fused experts module that reads it, or None (`smoothquant.models.routing`).
        Statistics are kept per expert matrix, with keys from `expert_linear`.
    router: a module with a ``weight [E, H]`` that also reads the activation but stays in 16 bits,
        or None.
    norm_offset: the norm multiplies by ``norm_offset + norm.weight``.
    made_by: the linears whose output channels become this activation's channels one to one; may be
        empty.
    made_from: how those channels correspond, see `MADE_FROM`; None if made_by is empty.
    num_heads: for an attention output, the number of heads concatenated in it; otherwise 0.
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
        """The name of one expert's matrix, for example
        ``model.layers.0.mlp.experts.3.gate_up_proj``.

        Args:
            part: "gate_up_proj", "up_proj" or "down_proj".
        """
        return f"{self.experts}.{expert}.{part}"


# How the K channels of an input correspond to the output channels of the linears in made_by.
#   "channel": channel c is an elementwise function of channel c of every linear, or of channel c in
#     both halves of a single linear with 2 K outputs.
#   The other values describe attention outputs: num_heads concatenated heads. Channel c of a head
#   is a weighted sum of channel c of one head of v, which consecutive heads may share. The linear
#   outputs
#   "v": the heads of v;
#   "q, k, v": all heads of q, then all heads of k, then all heads of v;
#   "qkv by head": for each head of v: the heads of q that share it, its head of k, the head of v.
MADE_FROM = ("channel", "v", "q, k, v", "qkv by head")


class Reads(NamedTuple):
    """The children of a decoder layer that read one activation.

    norms: names of the norm that produces it; the first one that exists in the layer counts. Rows
        with the same norm describe the same activation.
    experts, router, made_by, made_from: as in LayerInput, but with names relative to the layer.
    projection: a linear through which the experts read the activation, or None. Where it is no
        linear (nn.Identity), they read it directly.
    """

    linears: tuple[str, ...]
    norms: tuple[str, ...] = ()
    experts: str | None = None
    router: str | None = None
    made_by: tuple[str, ...] = ()
    made_from: str | None = None
    projection: str | None = None


class DecoderParts(NamedTuple):
    """The children of a decoder layer with RMSNorms, attention and a gated MLP.

    x + attention_post(o(attention(qkv(attention_norm(x))))) = h is the layer's first half,
    h + mlp_post(down(act(gate) * up)) with gate and up of mlp_norm(h) the second. Norms that are
    None are left out. plain_attention: the attention rotates q and k by position in full, and does
    nothing else to them.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    attention_norm: str = "input_layernorm"
    attention_post: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp_post: str | None = None
    norm_offset: float = 0.0
    attention: str = "self_attn"
    o: str = "self_attn.o_proj"
    plain_attention: bool = False
    mlp: str = "mlp"
    down: str = "mlp.down_proj"

    @property
    def names(self) -> tuple[str, ...]:
        """All children."""
        return (
            *(self.attention, self.mlp, *self.qkv, self.o, *self.gate_up, self.down),
            *self.norms,
        )

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that are not left out."""
        names = (self.attention_norm, self.attention_post, self.mlp_norm, self.mlp_post)
        return tuple(name for name in names if name is not None)


class Family(NamedTuple):
    """A row of the table.

    layers: the end of the name of the list of decoder layers.
    reads: the activations in a layer, in forward order.
    more: linears outside the decoder layers are quantized too, each with an input of its own, such
        as those of a vision tower.
    residual_from_norm: (config field, value). If the field has this value, the norms also feed the
        residual stream, so their gains cannot be folded.
    norm_offset: as in LayerInput.
    decoder: the parts of a layer that `smoothquant.layers.decoder` can fuse, or None.
    """

    layers: str
    reads: tuple[Reads, ...]
    residual_from_norm: tuple[str, object] | None = None
    norm_offset: float = 0.0
    decoder: DecoderParts | None = None
    more: bool = False


def _produced(linear: str, *made_by: str, made_from: str = "channel") -> Reads:
    return Reads((linear,), made_by=made_by, made_from=made_from)


_ATTENTION = (
    Reads(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("input_layernorm",)),
    _produced("self_attn.o_proj", "self_attn.v_proj", made_from="v"),
)

_FUSED_ATTENTION = _produced(
    "self_attention.dense", "self_attention.query_key_value", made_from="qkv by head"
)

_GATED = _produced("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
_4H_TO_H = _produced("mlp.dense_4h_to_h", "mlp.dense_h_to_4h")

_LLAMA_READS = _ATTENTION + (
    Reads(("mlp.gate_proj", "mlp.up_proj"), ("post_attention_layernorm",)),
    _GATED,
)

# The experts of Llama 4 read the activation times the router's score, so its gain is not folded.
_LLAMA4_READS = _ATTENTION + (
    Reads(("feed_forward.gate_proj", "feed_forward.up_proj"), ("post_attention_layernorm",)),
    _produced("feed_forward.down_proj", "feed_forward.gate_proj", "feed_forward.up_proj"),
    Reads((), experts="feed_forward.experts"),
    Reads(("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj")),
    _produced(
        "feed_forward.shared_expert.down_proj",
        "feed_forward.shared_expert.gate_proj",
        "feed_forward.shared_expert.up_proj",
    ),
)

_ARIA_READS = _ATTENTION + (
    Reads(
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        ("post_attention_layernorm",),
        experts="mlp.experts",
        router="mlp.router",
    ),
    _produced(
        "mlp.shared_experts.down_proj",
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
    ),
)

_LLAMA = Family("layers", _LLAMA_READS, decoder=DecoderParts(plain_attention=True))

# Last parts of the names of linears whose outputs enter the attention products.
ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"})

FAMILIES = {
    "opt": Family(
        "layers",
        (
            Reads(_ATTENTION[0].linears, ("self_attn_layer_norm",)),
            _produced("self_attn.out_proj", "self_attn.v_proj", made_from="v"),
            Reads(("fc1",), ("final_layer_norm",)),
            _produced("fc2", "fc1"),
        ),
        residual_from_norm=("do_layer_norm_before", False),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Family("layers", _LLAMA_READS, decoder=DecoderParts()),
    "gemma": Family(
        "layers",
        _LLAMA_READS,
        norm_offset=1.0,
        decoder=DecoderParts(norm_offset=1.0, plain_attention=True),
    ),
    "gemma2": Family(
        "layers",
        _ATTENTION
        + (
            Reads(("mlp.gate_proj", "mlp.up_proj"), ("pre_feedforward_layernorm",)),
            _GATED,
        ),
        norm_offset=1.0,
        decoder=DecoderParts(
            attention_post="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post="post_feedforward_layernorm",
            norm_offset=1.0,
        ),
    ),
    "mixtral": Family(
        "layers",
        _ATTENTION
        + (Reads((), ("post_attention_layernorm",), experts="mlp.experts", router="mlp.gate"),),
    ),
    "gpt_oss": Family(
        "layers",
        _ATTENTION
        + (Reads((), ("post_attention_layernorm",), experts="mlp.experts", router="mlp.router"),),
    ),
    "llama4_text": Family("layers", _LLAMA4_READS),
    "llama4": Family("language_model.model.layers", _LLAMA4_READS, more=True),
    "aria_text": Family("layers", _ARIA_READS),
    "aria": Family("language_model.layers", _ARIA_READS, more=True),
    # A layer is a Mamba mixer, attention, an MLP or a mixture of experts. The input of a Mamba
    # mixer's out_proj comes from a norm of its own.
    "nemotron_h": Family(
        "layers",
        (
            Reads(
                (
                    "mixer.in_proj",
                    "mixer.q_proj",
                    "mixer.k_proj",
                    "mixer.v_proj",
                    "mixer.up_proj",
                    "mixer.shared_experts.up_proj",
                ),
                ("norm",),
                experts="mixer.experts",
                router="mixer.gate",
                projection="mixer.fc1_latent_proj",
            ),
            Reads(("mixer.out_proj",)),
            _produced("mixer.o_proj", "mixer.v_proj", made_from="v"),
            _produced("mixer.down_proj", "mixer.up_proj"),
            Reads(("mixer.fc2_latent_proj",)),
            _produced("mixer.shared_experts.down_proj", "mixer.shared_experts.up_proj"),
        ),
    ),
    # The cross-attention's q_attn reads the decoder's states; its c_attn those of the encoder.
    "gpt2": Family(
        "h",
        (
            Reads(("attn.c_attn",), ("ln_1",)),
            _produced("attn.c_proj", "attn.c_attn", made_from="q, k, v"),
            Reads(("crossattention.q_attn",), ("ln_cross_attn",)),
            Reads(("crossattention.c_attn",)),
            Reads(("crossattention.c_proj",)),
            Reads(("mlp.c_fc",), ("ln_2",)),
            _produced("mlp.c_proj", "mlp.c_fc"),
        ),
    ),
    # The inputs of o_proj come from some of the rows of kv_b_proj; the others make keys.
    "deepseek_v3": Family(
        "layers",
        (
            Reads(
                ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
                ("input_layernorm",),
            ),
            Reads(("self_attn.q_b_proj",), ("self_attn.q_a_layernorm",)),
            Reads(("self_attn.kv_b_proj",), ("self_attn.kv_a_layernorm",)),
            Reads(("self_attn.o_proj",)),
            Reads(
                (
                    "mlp.gate_proj",
                    "mlp.up_proj",
                    "mlp.shared_experts.gate_proj",
                    "mlp.shared_experts.up_proj",
                ),
                ("post_attention_layernorm",),
                experts="mlp.experts",
                router="mlp.gate",
            ),
            _GATED,
            _produced(
                "mlp.shared_experts.down_proj",
                "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj",
            ),
        ),
    ),
    # Some layers may be dense. No norm is named: it also feeds the gate of the shared expert, which
    # stays in 16 bits, so its gain cannot be folded.
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
            _produced(
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
            _produced("self_attn.dense", "self_attn.v_proj", made_from="v"),
            _produced("mlp.fc2", "mlp.fc1"),
        ),
    ),
    "phi3": Family(
        "layers",
        (
            Reads(("self_attn.qkv_proj",), ("input_layernorm",)),
            _produced("self_attn.o_proj", "self_attn.qkv_proj", made_from="q, k, v"),
            Reads(("mlp.gate_up_proj",), ("post_attention_layernorm",)),
            _produced("mlp.down_proj", "mlp.gate_up_proj"),
        ),
        decoder=DecoderParts(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    ),
    # Falcon has three variants: two parallel norms (ln_attn, ln_mlp), one norm shared by attention
    # and MLP, or two norms in sequence.
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
            _produced("attention.dense", "attention.query_key_value", made_from="qkv by head"),
            Reads(("mlp.dense_h_to_4h",), ("post_attention_layernorm",)),
            _4H_TO_H,
        ),
    ),
}


_NOTHING = nn.Identity()


def layer_inputs(model: nn.Module, ignore: Sequence[str] = ()) -> list[LayerInput]:
    """All distinct inputs of a float model's quantizable linears and experts, in forward order.

    `smoothquant.models.kept` decides what is not quantizable.

    Args:
        model: a transformers model, with or without a head, or any nn.Module. If the table has no
            row for ``model.config.model_type``, every quantizable module is assumed to have its own
            input, and a warning lists these guesses. So are those that `Family.more` means.
        ignore: patterns of modules to leave out, as in `MixedQuantConfig`.

    Raises:
        ValueError: the model has no quantizable nn.Linear, or a pattern matches no module.
    """
    check_ignore(model, ignore)
    kept = kept_modules(model, ignore)
    inputs = known_inputs(model)
    if inputs:
        modules = dict(model.named_modules())
        named = [name for item in inputs for name in item.linears]
        adapted = sorted(name for name in named if "base_layer" in modules[name]._modules)
        inputs = without(inputs, {*adapted, *kept})
        unexpected = [f"{name} (it has an adapter)" for name in adapted] + [
            f"{name} ({kept[name]})"
            for name in named
            if name in kept and not kept[name].startswith("ignore")
        ]
        if unexpected:
            warnings.warn(f"not quantized: {_listed(unexpected)}", stacklevel=2)
        if has_more(model):
            inside = tuple(f"{layer}." for layer in decoder_layers(model))
            alone = _inputs_alone(model, kept)
            inputs = [item for item in alone if not item.name.startswith(inside)] + inputs
    else:
        inputs = _guessed_inputs(model, kept)
    if not inputs:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3])
        raise ValueError(
            f"model has no quantizable nn.Linear: {type(model).__name__}{why and f' ({why})'}"
        )
    return inputs


def without(inputs: Sequence[LayerInput], names: Collection[str]) -> list[LayerInput]:
    """The inputs without the modules `names`.

    A norm that also feeds such a module cannot be folded any more.
    """
    remaining = []
    for item in inputs:
        linears = tuple(name for name in item.linears if name not in names)
        experts = None if item.experts in names else item.experts
        if (linears, experts) != (item.linears, item.experts):
            name = linears[0] if linears else experts or ""
            item = replace(item, name=name, linears=linears, experts=experts, norm=None)
        if item.name:
            remaining.append(item)
    return remaining


def known_inputs(model: nn.Module) -> list[LayerInput]:
    """The inputs that the table describes, for float and quantized models alike; empty if the table
    has no row for the model."""
    family = _family(model)
    if family is None:
        return []
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    modules = dict(model.named_modules())
    field, value = family.residual_from_norm or ("", None)
    can_fold = not field or getattr(config, field, None) != value
    inputs: list[LayerInput] = []
    # Modules have further names if layers share them. A norm that feeds one of them is not folded.
    further = {n for n, _ in model.named_modules(remove_duplicate=False)} - set(modules)
    unfoldable: set[str | None] = {None}
    layers = _decoder_layers(modules, family.layers)
    for layer in layers:

        def existing(*names: str | None, layer: str = layer) -> tuple[str, ...]:
            full = (f"{layer}.{name}" for name in names)
            return tuple(n for n in full if not isinstance(modules.get(n, _NOTHING), nn.Identity))

        index_by_norm: dict[str, int] = {}
        for reads in family.reads:
            linears, norm = existing(*reads.linears), next(iter(existing(*reads.norms)), None)
            if any(name in further for name in (f"{layer}.{part}" for part in reads.linears)):
                unfoldable.add(norm)
            experts = next(iter(existing(reads.experts)), None)
            projection = existing(reads.projection)
            projected = experts if projection else None
            if projected:
                linears, experts = projection + linears, None
            name = linears[0] if linears else experts
            if norm in index_by_norm:
                shared = inputs[index_by_norm[norm]]
                inputs[index_by_norm[norm]] = replace(shared, linears=shared.linears + linears)
            elif name:
                if norm:
                    index_by_norm[norm] = len(inputs)
                router = next(iter(existing(reads.router)), None)
                item = LayerInput(name, norm, linears, experts, router, family.norm_offset)
                made_by = existing(*reads.made_by)
                if made_by and len(made_by) == len(reads.made_by):
                    heads = 0 if reads.made_from == "channel" else text.num_attention_heads
                    item = replace(
                        item, made_by=made_by, made_from=reads.made_from, num_heads=heads
                    )
                inputs.append(item)
            if projected:
                inputs.append(LayerInput(projected, None, (), projected))

    names_of: dict[nn.Module, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, set()).add(name)

    def has_foldable_norm(item: LayerInput) -> bool:
        if not can_fold or item.norm in unfoldable:
            return False
        names = (item.norm, *item.linears, item.experts, item.router)
        # In a layer where the others are not, a module may have another input or other readers.
        start = len(next(layer for layer in layers if item.name.startswith(f"{layer}.")))
        in_layers = {
            frozenset(n.removesuffix(name[start:]) for n in names_of[modules[name]])
            for name in names
            if name
        }
        alone = len(in_layers) == 1
        return alone and getattr(modules[item.norm or ""], "weight", None) is not None

    return [item if has_foldable_norm(item) else replace(item, norm=None) for item in inputs]


def decoder_layers(model: nn.Module) -> list[str]:
    """Full names of the model's decoder layers in forward order; empty for an unknown family."""
    family = _family(model)
    return _decoder_layers(dict(model.named_modules()), family.layers) if family else []


def has_more(model: nn.Module) -> bool:
    """Whether the model also takes inputs other than tokens, such as images (`Family.more`)."""
    family = _family(model)
    return family is not None and family.more


def decoder_parts(model: nn.Module) -> DecoderParts | None:
    """The parts of the model's decoder layers; None if the family's layers are not fused."""
    family = _family(model)
    return family.decoder if family else None


def value_rows(item: LayerInput, in_features: int, out_features: int) -> Tensor | None:
    """The rows of v in the weight of the linear that produces v (alone, or fused with q and k).

    Args:
        item: an attention output.
        in_features: channels of that output.
        out_features: output channels of the linear in ``item.made_by``.

    Returns:
        int64 [heads of v, channels per head]: row indices, in order. None if item is not an
        attention output, or if the sizes do not fit its number of heads.
    """
    if not item.num_heads or not in_features or in_features % item.num_heads:
        return None
    size = in_features // item.num_heads
    fused = item.made_from != "v"
    num_values, remainder = divmod(out_features - fused * in_features, size * (1 + fused))
    if remainder or num_values < 1 or item.num_heads % num_values:
        return None
    heads = torch.arange(out_features).view(-1, size)
    if item.made_from == "qkv by head":
        return heads.view(num_values, -1, size)[:, -1]
    return heads[-num_values:]


def _family(model: nn.Module) -> Family | None:
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def _decoder_layers(modules: dict[str, nn.Module], list_name: str) -> list[str]:
    return [
        f"{name}.{child}" if name else child
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and f".{name}".endswith(f".{list_name}")
        for child, _ in module.named_children()
    ]


def _inputs_alone(model: nn.Module, kept: Mapping[str, str]) -> list[LayerInput]:
    """An input for every quantizable module of a model."""
    inputs = []
    for name, module in model.named_modules():
        if is_fused_experts(module) and name not in kept:
            inputs.append(LayerInput(name, None, (), experts=name))
        elif is_linear(module) and name not in kept:
            inputs.append(LayerInput(name, None, (name,)))
    return inputs


def _guessed_inputs(model: nn.Module, kept: Mapping[str, str]) -> list[LayerInput]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    inputs = _inputs_alone(model, kept)
    fused = {name for name, module in model.named_modules() if is_fused_experts(module)}
    if inputs:
        stay = [f"{name} ({reason})" for name, reason in kept.items()]
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3 and name.rpartition(".")[0] not in fused:
                stay.append(name)
        warnings.warn(
            f"model type {model_type!r} is unknown: assuming that each of these modules has its "
            f"own input: {_listed([item.name for item in inputs])}; not quantized: {_listed(stay)}",
            stacklevel=3,
        )
    return inputs


def _listed(names: list[str], limit: int = 8) -> str:
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(names[:limit] + more) or "none"
