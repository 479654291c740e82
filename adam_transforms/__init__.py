"""Adam for JAX as small pure `init`/`update` transformations that chain with Optax."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from adam_transforms._core import interrupts as _interrupts

if _interrupts.is_program(__name__):  # before the imports, which take seconds
    _interrupts.end_quietly()

from adam_transforms._core.sparse_rows import SparseRows, to_dense
from adam_transforms._core.trees import path_str
from adam_transforms._embeddings.collectives import all_reduce_rows
from adam_transforms._embeddings.deferred.adam import deferred_adam
from adam_transforms._embeddings.deferred.state import DeferredAdamState
from adam_transforms._embeddings.deferred.sync import Owed, catch_up, dense_equivalent, flush, owed
from adam_transforms._embeddings.explain import explain
from adam_transforms._embeddings.freeze_rows import FreezeRowsState, freeze_rows
from adam_transforms._embeddings.lazy import LazyState, lazy
from adam_transforms._embeddings.resize import resize
from adam_transforms._embeddings.value_and_grad import grad, value_and_grad
from adam_transforms._optimizers import adam, adamw, lazy_adam
from adam_transforms._tools.checkpoint import check_state
from adam_transforms._tools.metrics import metrics
from adam_transforms._tools.summary import summary
from adam_transforms._tools.transfer import TransferReport, transfer_state
from adam_transforms._transforms.accumulation import (
    AccumulateState,
    VariableAccumulateState,
    accumulate,
    flush_accumulated,
    has_updated,
)
from adam_transforms._transforms.adam import ScheduledDecayState, scale_by_adam, scale_by_amsgrad
from adam_transforms._transforms.apply_updates import apply_updates, update_and_apply
from adam_transforms._transforms.clipping import clip_by_global_norm, clip_by_norm, clip_by_value
from adam_transforms._transforms.compress_moments import CompressMomentsState, compress_moments
from adam_transforms._transforms.ema import ParamsEmaState, ema_params, finalize, params_ema
from adam_transforms._transforms.learning_rates import (
    ScaleByLearningRateState,
    ScaleByPathLearningRateState,
    by_path,
    path_mask,
    scale_by_learning_rate,
    scale_by_path_learning_rate,
)
from adam_transforms._transforms.loss_scaling import (
    DynamicLossScaleState,
    LimitedSkipNonfiniteState,
    SkipNonfiniteState,
    StaticLossScaleState,
    dynamic_loss_scale,
    scale_loss,
    skip_nonfinite,
    static_loss_scale,
)
from adam_transforms._transforms.master_weights import MasterWeightsState, master_weights
from adam_transforms._transforms.numerics import global_norm
from adam_transforms._transforms.row_norms import max_row_norm
from adam_transforms._transforms.state_sharding import shard_slots

__all__ = [
    "AccumulateState",
    "CompressMomentsState",
    "DeferredAdamState",
    "DynamicLossScaleState",
    "FreezeRowsState",
    "LazyState",
    "LimitedSkipNonfiniteState",
    "MasterWeightsState",
    "Owed",
    "ParamsEmaState",
    "ScaleByLearningRateState",
    "ScaleByPathLearningRateState",
    "ScheduledDecayState",
    "SkipNonfiniteState",
    "SparseRows",
    "StaticLossScaleState",
    "TransferReport",
    "VariableAccumulateState",
    "accumulate",
    "adam",
    "adamw",
    "all_reduce_rows",
    "apply_updates",
    "by_path",
    "catch_up",
    "check_state",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "compat",
    "compress_moments",
    "deferred_adam",
    "dense_equivalent",
    "dynamic_loss_scale",
    "ema_params",
    "explain",
    "finalize",
    "flush",
    "flush_accumulated",
    "freeze_rows",
    "global_norm",
    "grad",
    "has_updated",
    "interop",
    "lazy",
    "lazy_adam",
    "master_weights",
    "max_row_norm",
    "metrics",
    "owed",
    "params_ema",
    "path_mask",
    "path_str",
    "resize",
    "scale_by_adam",
    "scale_by_amsgrad",
    "scale_by_learning_rate",
    "scale_by_path_learning_rate",
    "scale_loss",
    "shard_slots",
    "skip_nonfinite",
    "static_loss_scale",
    "summary",
    "to_dense",
    "transfer_state",
    "update_and_apply",
    "value_and_grad",
]


if TYPE_CHECKING:
    from adam_transforms import compat, equinox as equinox, flax as flax, interop

__version__ = "0.2.0"

# Imported when first used: flax needs Flax, and equinox Equinox.
_SUBMODULES = ("compat", "equinox", "flax", "interop")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"adam_transforms.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, "__version__"})
