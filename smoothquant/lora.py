"""LoRA on quantized linears, by PEFT, which knows layer types of its own only.

    config = on_quantized(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)

Gradients pass a quantized linear straight through, see `QuantizedLinear.forward`. PEFT does not
save what `on_quantized` adds: give it again when an adapter is loaded:

    config = on_quantized(LoraConfig.from_pretrained(folder))
    model = PeftModel.from_pretrained(model, folder, config=config)
"""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.lora import Linear

from .layers.linear import FakeW4A4Linear, W4A4Linear


class LoraQuantizedLinear(Linear):
    """A quantized linear with adapters beside it, which cannot be merged into it."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "an adapter cannot be merged into packed weights; keep it beside them, or load it on "
            "the float model and quantize that"
        )


def on_quantized(config: LoraConfig) -> LoraConfig:
    """The same config, which from now on also takes quantized linears for its target modules."""
    config._register_custom_module(
        {W4A4Linear: LoraQuantizedLinear, FakeW4A4Linear: LoraQuantizedLinear}
    )
    return config
