"""Closed forms: what attention must take, from shapes alone.

Every function says its formula, symbols, units and source. Nothing here needs torch, a model or a
device; what a program really takes is measured (`attnprof.trace`) or run dry (`attnprof.dry_run`).

    architecture, config, models    shapes of models, and where to get them
    dtypes, devices                 bytes per element; capacity and speed of accelerators
    recipes, scores                 what lies between QKᵀ and PV, op by op and copy by copy
    sdpa                            which kernel CUDA takes for a call
    cache                           what is carried from token to token
    flops, traffic                  operations, bytes moved, least times
    activations, capacity           what a layer keeps, what a model takes, the largest n that fits
    forecast                        all of it for one model
"""

from attnprof.theory.architecture import Architecture, Experts, Latent
from attnprof.theory.config import read_config
from attnprof.theory.devices import DEVICES, Device, find_device
from attnprof.theory.forecast import Forecast, forecast_model
from attnprof.theory.models import MODELS, find_model
from attnprof.theory.recipes import Mask, ScorePath
from attnprof.theory.scores import ScoreMemory, predict_scores

__all__ = [
    "DEVICES",
    "MODELS",
    "Architecture",
    "Device",
    "Experts",
    "Forecast",
    "Latent",
    "Mask",
    "ScoreMemory",
    "ScorePath",
    "find_device",
    "find_model",
    "forecast_model",
    "predict_scores",
    "read_config",
]
