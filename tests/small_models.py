"""Small models of every class in transformers, built by shrinking the default configs."""

import contextlib
import re

import torch
import transformers
from transformers.models.auto import modeling_auto

# (pattern of a field's name, largest value); the first pattern that matches counts.
LARGEST = [
    (r"(num|n)_?(key_value|kv|query)_?(heads|groups)$|multi_query_group_num", 2),
    (r"num_(routed_)?experts_per_tok|top_?k$|moe_topk|num_selected", 2),
    (r"(num|n)_(local_|routed_|shared_)?experts$|moe_num_experts|n_group$|topk_group", 4),
    (r"heads?$|num_attention_heads|nhead|^n_groups$", 2),
    (r"(head|kv|key|value|v|qk_nope|d)_?(head)?_?dim$|d_kv|d_head|head_size|qk_rope_head_dim", 16),
    (r"max_(source|target)?_?(position|seq|len)|max_position|n_positions|n_ctx|context_length", 64),
    (r"layers?$|depth|num_blocks|blocks$|num_stages|repeats", 2),
    (r"vocab_size|num_embeddings|codebook_size|type_vocab", 128),
    (r"image_size|input_size|img_size|crop_size|max_image", 64),
    (r"rank$|lora", 8),
    (r"intermediate|ffn|inner|mlp_dim|d_ff|feed_?forward|fc_dim", 64),
    (r"hidden|embe?d|d_model|dim|size|channels|width|filters|features|units", 32),
]
KEPT = re.compile(
    r"(^|_)id$|_ids?$|patch_size|kernel|stride|padding|pad|(?<!^n_)group|window|num_labels|tubelet|pool|"
    r"num_channels|in_channels|in_chans|feat_extract|sampling|rate|bins|conv_dim|(in|out)_?_indices|stage"
)
LISTS = re.compile(r"depths|layers|blocks|repeats|num_heads|hidden_sizes|dims?$|channels|embed")
MOST_PARAMETERS = 5_000_000


TOKEN_ID = re.compile(r"_(id|index)$")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")


def shrunk(fields):
    """A config's fields with smaller sizes."""
    small = {name: _shrunk(name, value) for name, value in fields.items()}
    layers = next((name for name in LAYERS if isinstance(fields.get(name), int)), None)
    for name, value in fields.items():
        if layers and isinstance(value, list) and len(value) == fields[layers]:
            small[name] = value[: small[layers]]  # one entry per layer
        elif TOKEN_ID.search(name) and type(value) is int and value >= 100:
            small[name] = value % 97 + 3
    return small


def _largest(name):
    if KEPT.search(name):
        return None
    return next((most for pattern, most in LARGEST if re.search(pattern, name)), None)


def _shrunk(name, value):
    if isinstance(value, dict) and name.endswith("config"):
        return shrunk(value)
    most = _largest(name)
    if isinstance(value, bool) or most is None:
        return value
    if isinstance(value, int):
        return min(value, most) if value > 0 else value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        largest = max(value)  # keep the ratios, which others are computed from
        if re.search(r"depth|layers|blocks|repeats", name):
            return [min(item, 1) for item in value]
        if largest > most and LISTS.search(name):
            return [max(most // 2, item * most * 2 // largest // 16 * 16) for item in value]
    return value


# Per-layer lists that the configs compute again for fewer layers.
COMPUTED = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")


def _without_computed(fields):
    return {
        name: _without_computed(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in COMPUTED and name not in ("architectures", "transformers_version", "dtype")
    }


def model_classes():
    """All classes of the auto mappings, by name, in their order."""
    names = {}
    for mapping, entries in vars(modeling_auto).items():
        if mapping.startswith("MODEL_") and mapping.endswith("_MAPPING_NAMES"):
            for model_type, classes in entries.items():
                for name in classes if isinstance(classes, tuple) else (classes,):
                    names.setdefault(name, model_type)
    return names


def small_model(name, seed=0, **changes):
    """A small float32 model of a class, in evaluation mode, with random tensors throughout.

    Args:
        changes: fields of its config.

    Raises:
        Exception: the class cannot be built small; whatever its config or module raises.
    """
    cls = getattr(transformers, name)
    if cls.config_class is None:
        raise ValueError(f"{name} has no config")
    fields = cls.config_class().to_dict()
    attempts = (_without_computed(shrunk(fields)), shrunk(fields), fields)
    for attempt, remaining in zip(attempts, (2, 1, 0), strict=True):
        try:
            config = cls.config_class.from_dict(attempt | changes)
            with torch.device("meta"), contextlib.suppress(NotImplementedError):
                size = sum(p.numel() for p in cls(config).parameters())
                if size > MOST_PARAMETERS:
                    raise ValueError(f"{size} parameters")
            torch.manual_seed(seed)
            model = cls(config).eval()
            break
        except Exception:
            if not remaining:
                raise
    size = sum(p.numel() for p in model.parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():  # default initializations hide faults
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
