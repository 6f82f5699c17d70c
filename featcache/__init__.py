"""featcache: embed images once, cache the embeddings with proof of origin, train classifiers on them in seconds.

The functions behind the commands, importable without loading torch until one of them needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.backbones.embedder import Embedder
    from featcache.backbones.load import backbone_names, load_backbone
    from featcache.cache.cache import FeatureCache
    from featcache.errors import FeatcacheError
    from featcache.extraction.extract import ExtractReport, extract
    from featcache.extraction.repair import RepairReport, repair
    from featcache.extraction.request import ExtractRequest
    from featcache.finetuning.finetune import finetune
    from featcache.finetuning.result import FinetuneReport
    from featcache.images.source import ImageList, list_images
    from featcache.images.splits import hold_out
    from featcache.models.export import ExportReport, export_model
    from featcache.models.fit import FitReport, fit_head
    from featcache.models.model import Model, load_model
    from featcache.models.predict import Prediction, evaluate, predict
    from featcache.reports.doctor import doctor
    from featcache.reports.info import describe
    from featcache.spec import PreprocessSpec

__version__ = "0.1.0"
_HOME = {
    "Embedder": "backbones.embedder",
    "ExportReport": "models.export",
    "ExtractReport": "extraction.extract",
    "ExtractRequest": "extraction.request",
    "FeatcacheError": "errors",
    "FeatureCache": "cache.cache",
    "FinetuneReport": "finetuning.result",
    "FitReport": "models.fit",
    "ImageList": "images.source",
    "Model": "models.model",
    "Prediction": "models.predict",
    "PreprocessSpec": "spec",
    "RepairReport": "extraction.repair",
    "backbone_names": "backbones.load",
    "describe": "reports.info",
    "doctor": "reports.doctor",
    "evaluate": "models.predict",
    "export_model": "models.export",
    "extract": "extraction.extract",
    "finetune": "finetuning.finetune",
    "fit_head": "models.fit",
    "hold_out": "images.splits",
    "list_images": "images.source",
    "load_backbone": "backbones.load",
    "load_model": "models.model",
    "predict": "models.predict",
    "repair": "extraction.repair",
}
__all__ = [
    "Embedder",
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
    "describe",
    "doctor",
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
