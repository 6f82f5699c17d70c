"""featcache: embed images once, cache the embeddings with proof of origin, train classifiers on them in seconds.

The functions behind the commands, importable without loading torch until one of them needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.backbones import backbone_names, load_backbone
    from featcache.cache import FeatureCache
    from featcache.errors import FeatcacheError
    from featcache.exporting import ExportReport, export_model
    from featcache.extraction import ExtractReport, extract
    from featcache.finetuned import FinetuneReport
    from featcache.finetuning import finetune
    from featcache.images import ImageList, hold_out, list_images
    from featcache.model import Model, load_model
    from featcache.prediction import Prediction, evaluate, predict
    from featcache.preprocess import PreprocessSpec
    from featcache.repairing import RepairReport, repair
    from featcache.request import ExtractRequest
    from featcache.training import FitReport, fit_head

__version__ = "0.1.0"
_HOME = {
    "ExportReport": "exporting",
    "ExtractReport": "extraction",
    "ExtractRequest": "request",
    "FeatcacheError": "errors",
    "FeatureCache": "cache",
    "FinetuneReport": "finetuned",
    "FitReport": "training",
    "ImageList": "images",
    "Model": "model",
    "Prediction": "prediction",
    "PreprocessSpec": "preprocess",
    "RepairReport": "repairing",
    "backbone_names": "backbones",
    "evaluate": "prediction",
    "export_model": "exporting",
    "extract": "extraction",
    "finetune": "finetuning",
    "fit_head": "training",
    "hold_out": "images",
    "list_images": "images",
    "load_backbone": "backbones",
    "load_model": "model",
    "predict": "prediction",
    "repair": "repairing",
}
__all__ = [
    "ExportReport",
    "ExtractReport",
    "ExtractRequest",
    "FeatcacheError",
    "FeatureCache",
    "FinetuneReport",
    "FitReport",
    "ImageList",
    "Model",
    "Prediction",
    "PreprocessSpec",
    "RepairReport",
    "backbone_names",
    "evaluate",
    "export_model",
    "extract",
    "finetune",
    "fit_head",
    "hold_out",
    "list_images",
    "load_backbone",
    "load_model",
    "predict",
    "repair",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"featcache.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
