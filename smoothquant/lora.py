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

from peft import LoraConfig
from peft.tuners.lora import Linear

from .layers.linear import FakeW4A4Linear, W4A4Linear


class LoraQuantizedLinear(Linear):
    """A quantized linear with adapters, which cannot be merged into it."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "an adapter cannot be merged into packed weights; keep it separate, or merge it into "
            "the float model and quantize that"
        )


def on_quantized(config: LoraConfig) -> LoraConfig:
    """Make a config accept quantized linears as target modules; returns the same config."""
    config._register_custom_module(
        {W4A4Linear: LoraQuantizedLinear, FakeW4A4Linear: LoraQuantizedLinear}
    )
    return config
