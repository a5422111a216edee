"""LoRA adapters on quantized linears, with PEFT.

    config = on_quantized(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)

`on_quantized` is needed because PEFT supports only layer types that it knows. Gradients pass
quantized linears by the straight-through estimator of `QuantizedLinear.forward`.

PEFT does not save what `on_quantized` adds, so call it again to load an adapter:

    config = on_quantized(LoraConfig.from_pretrained(folder))
    model = PeftModel.from_pretrained(model, folder, config=config)
"""

from __future__ import annotations

import functools
from typing import Any

from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.tuners.lora import Linear
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from .layers.int8 import Int8Linear
from .layers.linear import FakeW4A4Linear, QuantizedLinear, W4A4Linear


class LoraQuantizedLinear(Linear):
    """A quantized linear with adapters, which cannot be merged into it."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "an adapter cannot be merged into packed weights; keep it separate, or merge it into "
            "the float model and quantize that"
        )


def on_quantized(config: LoraConfig) -> LoraConfig:
    """Make a config accept quantized linears as target modules; returns the same config.

    ``target_modules="all-linear"`` then includes them.
    """
    config._register_custom_module(
        dict.fromkeys((W4A4Linear, Int8Linear, FakeW4A4Linear), LoraQuantizedLinear)
    )
    return config


_all_float_linears = tuners_utils._maybe_include_all_linear_layers


@functools.wraps(_all_float_linears)
def _all_linears(config: Any, model: nn.Module) -> Any:
    targets = getattr(config, "target_modules", None)
    config = _all_float_linears(config, model)
    everything = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if everything and W4A4Linear in (getattr(config, "_custom_modules", None) or {}):
        modules = model.named_modules()
        config.target_modules |= {
            name
            for name, module in modules
            if isinstance(module, QuantizedLinear)
            and not module.table  # as PEFT leaves out a float head
            and not name.endswith(".base_layer")
        }
    return config


# PEFT expands target_modules="all-linear" only when it has the model, which `on_quantized` has not.
setattr(tuners_utils, _all_float_linears.__name__, _all_linears)
