"""Ways to spoil a saved model: each makes a function that does it to a folder."""

import json

from safetensors.torch import load_file, save_file

from smoothquant.core.tensor_files import CONFIG, INDEX, TENSORS

LAYER = "model.layers.1.mlp.down_proj"


def put(index, value):
    """A change of a tensor: one element, counted through all dimensions, gets a value."""

    def change(tensor):
        tensor.view(-1)[index] = value
        return tensor

    return change


def set_tensor(name, change):
    """change(tensor) in a tensor's place, in whichever file holds it; None for no tensor at all."""

    def spoil(folder):
        index = folder / INDEX
        placed = json.loads(index.read_text())["weight_map"] if index.exists() else {}
        file = folder / placed.get(name, TENSORS)
        tensors = load_file(file)
        changed = change(tensors.pop(name).clone())
        save_file(tensors if changed is None else tensors | {name: changed}, file, {"format": "pt"})

    return spoil


def edit(file, *keys, value):
    """A value deep inside a JSON file."""

    def spoil(folder):
        content = json.loads((folder / file).read_text())
        target = content
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return spoil


def edit_manifest(*keys, value):
    """A value of what config.json says about the quantization."""
    return edit(CONFIG, "quantization_config", *keys, value=value)


def without_checksums(folder):
    """Make a folder one of an earlier version, so that other checks have to notice changes."""
    content = json.loads((folder / CONFIG).read_text())
    for field in ("checksums", "checksum"):
        del content["quantization_config"][field]
    (folder / CONFIG).write_text(json.dumps(content))
