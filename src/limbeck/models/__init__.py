"""Models: from what a person names to a module that reads the data, and back to files that stand alone."""

from limbeck.models._build import build_model, wrap_module
from limbeck.models._capture import Capture, called_layers, probe_shapes, validate_paths
from limbeck.models._files import load_state
from limbeck.models._heads import resize_head
from limbeck.models._identity import architecture_sha256, normalised_by_data, preprocessing_identity, sources
from limbeck.models._images import adapt_published, try_model
from limbeck.models._labels import class_map
from limbeck.models._model import Model, call_module, describe, logits_of, state_hash
from limbeck.models._names import SHORT_NAMES, known_models
from limbeck.models._pairing import exit_layers, pair_layers
from limbeck.models._python import call_factory
from limbeck.models._recompute import Recomputed, which_blocks
from limbeck.models._saved import load_into, load_saved, save_model

__all__ = [
    "SHORT_NAMES",
    "Capture",
    "Model",
    "Recomputed",
    "adapt_published",
    "architecture_sha256",
    "build_model",
    "call_factory",
    "call_module",
    "called_layers",
    "class_map",
    "describe",
    "exit_layers",
    "known_models",
    "load_into",
    "load_saved",
    "load_state",
    "logits_of",
    "normalised_by_data",
    "pair_layers",
    "preprocessing_identity",
    "probe_shapes",
    "resize_head",
    "save_model",
    "sources",
    "state_hash",
    "try_model",
    "validate_paths",
    "which_blocks",
    "wrap_module",
]
