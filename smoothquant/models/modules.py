"""Finding and replacing a model's modules and tensors by their full names."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def is_transformers_model(model: nn.Module) -> bool:
    """Whether the model has a transformers config."""
    return hasattr(getattr(model, "config", None), "save_pretrained")


def check_no_adapter(model: Any) -> None:
    """Raise ValueError if a model has an adapter of PEFT."""
    if getattr(model, "peft_config", None) or any(
        isinstance(getattr(module, "base_layer", None), nn.Module) for module in model.modules()
    ):
        raise ValueError(
            "model must have no adapter of PEFT. Save an adapter with model.save_pretrained(folder)"
            " and remove it with model.unload(), which returns the model without it; or merge it "
            "into a float model with model.merge_and_unload()"
        )


def module_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's modules that shares its tensors, so that replacing layers in the copy
    leaves the model intact and costs no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


Places = dict[nn.Module, list[tuple[nn.Module, str]]]


def module_places(model: nn.Module) -> Places:
    """Every module's places in the model, as (parent, name within the parent)."""
    places: Places = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return places


def replace_module(
    model: nn.Module, name: str, module: nn.Module, places: Places | None = None
) -> None:
    """Replace a submodule by `module`, under every name that the model has for it.

    Args:
        name: one of the submodule's full names.
        places: the result of `module_places`, to compute it only once for many replacements. The
            old submodule and its descendants are removed from it, so that their weights are freed.
    """
    old = model.get_submodule(name)
    module.train(old.training)
    places = module_places(model) if places is None else places
    for parent, key in places.pop(old):
        setattr(parent, key, module)
    below = set(old.modules())
    for child in below & places.keys():
        elsewhere = [place for place in places.pop(child) if place[0] not in below]
        if elsewhere:
            places[child] = elsewhere


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a checkpoint of the model, with shared tensors only once.

    Returns:
        tensors: {name: parameter or persistent buffer}, under the first name of each.
        aliases: {further name of a shared tensor: its first name}.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        in_memory = tensor.numel() > 0 and tensor.device.type != "meta"
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = first.setdefault(place if in_memory else id(tensor), name)
        if owner == name:
            tensors[name] = tensor
        else:
            aliases[name] = owner
    return tensors, aliases


def stored_bytes(model: nn.Module) -> int:
    """Size in bytes of the tensors in a checkpoint of the model."""
    return sum(tensor.nbytes for tensor in distinct_tensors(model)[0].values())


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Non-persistent buffers: computed on construction, absent from the state_dict."""
    saved = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer by its full name.

    A parameter stays a parameter. It requires no gradient, unless `tensor` is a parameter itself.
    """
    block, _, leaf = name.rpartition(".")
    module = model.get_submodule(block)
    if leaf in module._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)
