"""Calibration: from texts to statistics of every distinct layer input.

`token_blocks` cuts texts into blocks of tokens. `collect_stats` runs them through a float model.
`save_stats` and `load_stats` store the statistics. `get_act_scales` and
`get_static_decoder_layer_scales` are the published functions.
"""

from .act_scales import get_act_scales, get_static_decoder_layer_scales
from .collect import collect_stats
from .stats_files import load_act_scales, load_stats, save_act_scales, save_stats
from .tokens import calibration_batches, draw_blocks, token_blocks

__all__ = [
    "calibration_batches",
    "collect_stats",
    "draw_blocks",
    "get_act_scales",
    "get_static_decoder_layer_scales",
    "load_act_scales",
    "load_stats",
    "save_act_scales",
    "save_stats",
    "token_blocks",
]
