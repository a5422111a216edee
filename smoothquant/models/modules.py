"""The modules and tensors of a model, found and replaced by their full names."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def is_transformers_model(model: nn.Module) -> bool:
    """Whether transformers can save it."""
    return hasattr(getattr(model, "config", None), "save_pretrained")


def module_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules but share its tensors, so that layers can be swapped for nothing."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


Places = dict[nn.Module, list[tuple[nn.Module, str]]]


def module_places(model: nn.Module) -> Places:
    """{module: (its parent, its name there) for every place that the model has it in}."""
    places: Places = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(child, []).append((parent, name))
    return places


def replace_module(
    model: nn.Module, name: str, module: nn.Module, places: Places | None = None
) -> None:
    """Put `module` in the place of a submodule, under every name that the model has for it.

    places: `module_places` of the model, to look for them but once where many are replaced; the
    submodule and what is below it leave it, so that nothing keeps their weights.
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
    """What a checkpoint of the model holds, shared tensors once.

    Returns:
        ({name: parameter or persistent buffer}, {other name of a shared tensor: its first name}).
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
    """Bytes of the tensors that a checkpoint of the model holds."""
    return sum(tensor.nbytes for tensor in distinct_tensors(model)[0].values())


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are built, not saved; a cast model has cast them too."""
    saved = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter or buffer of a full name. What was a parameter stays one, without a
    gradient unless `tensor` is a parameter itself."""
    block, _, leaf = name.rpartition(".")
    module = model.get_submodule(block)
    if leaf in module._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)
