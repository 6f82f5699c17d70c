"""featcache: embed images once, cache the embeddings with proof of origin, train classifiers on them in seconds.

The functions behind the commands, importable without loading torch until one of them needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.backbones.embedder import Embedder as Embedder
    from featcache.backbones.load import backbone_names as backbone_names
    from featcache.backbones.load import load_backbone as load_backbone
    from featcache.cache.cache import FeatureCache as FeatureCache
    from featcache.curation.split import split as split
    from featcache.curation.split_result import Split as Split
    from featcache.errors import FeatcacheError as FeatcacheError
    from featcache.extraction.external import ImportReport as ImportReport
    from featcache.extraction.external import import_vectors as import_vectors
    from featcache.extraction.extract import ExtractReport as ExtractReport
    from featcache.extraction.extract import extract as extract
    from featcache.extraction.in_parts import PartReport as PartReport
    from featcache.extraction.in_parts import extract_part as extract_part
    from featcache.extraction.in_parts import merge as merge
    from featcache.extraction.repair import RepairReport as RepairReport
    from featcache.extraction.repair import repair as repair
    from featcache.extraction.request import ExtractRequest as ExtractRequest
    from featcache.finetuning.finetune import finetune as finetune
    from featcache.finetuning.result import FinetuneReport as FinetuneReport
    from featcache.images.source import ImageList as ImageList
    from featcache.images.source import Source as Source
    from featcache.images.source import list_images as list_images
    from featcache.images.splits import hold_out as hold_out
    from featcache.models.evaluate import evaluate as evaluate
    from featcache.models.export import ExportReport as ExportReport
    from featcache.models.export import export_model as export_model
    from featcache.models.fit import FitReport as FitReport
    from featcache.models.fit import fit_head as fit_head
    from featcache.models.model import Model as Model
    from featcache.models.model import load_model as load_model
    from featcache.models.predict import predict as predict
    from featcache.models.prediction import Prediction as Prediction
    from featcache.models.prediction import Predictions as Predictions
    from featcache.reports.audit.audit import Audit as Audit
    from featcache.reports.audit.audit import audit as audit
    from featcache.reports.doctor import doctor as doctor
    from featcache.reports.info import describe as describe
    from featcache.reports.model_report.embedding_map import map as map
    from featcache.reports.model_report.report import Report as Report
    from featcache.reports.model_report.report import report as report
    from featcache.reports.notebook import Page as Page
    from featcache.reports.notebook import gallery as gallery
    from featcache.reports.preview import Preview as Preview
    from featcache.reports.preview import preview as preview
    from featcache.reports.source_stats.stats import Statistics as Statistics
    from featcache.reports.source_stats.stats import stats as stats
    from featcache.reports.tables import CacheExport as CacheExport
    from featcache.reports.tables import export_cache as export_cache
    from featcache.spec import PreprocessSpec as PreprocessSpec

__version__ = "0.1.0"
_HOME = {
    "Audit": "reports.audit.audit",
    "CacheExport": "reports.tables",
    "Embedder": "backbones.embedder",
    "ExportReport": "models.export",
    "ExtractReport": "extraction.extract",
    "ExtractRequest": "extraction.request",
    "FeatcacheError": "errors",
    "FeatureCache": "cache.cache",
    "FinetuneReport": "finetuning.result",
    "FitReport": "models.fit",
    "ImageList": "images.source",
    "ImportReport": "extraction.external",
    "Model": "models.model",
    "Page": "reports.notebook",
    "PartReport": "extraction.in_parts",
    "Prediction": "models.prediction",
    "Predictions": "models.prediction",
    "PreprocessSpec": "spec",
    "Preview": "reports.preview",
    "RepairReport": "extraction.repair",
    "Report": "reports.model_report.report",
    "Source": "images.source",
    "Split": "curation.split_result",
    "Statistics": "reports.source_stats.stats",
    "audit": "reports.audit.audit",
    "backbone_names": "backbones.load",
    "describe": "reports.info",
    "doctor": "reports.doctor",
    "evaluate": "models.evaluate",
    "export_cache": "reports.tables",
    "export_model": "models.export",
    "extract": "extraction.extract",
    "extract_part": "extraction.in_parts",
    "finetune": "finetuning.finetune",
    "fit_head": "models.fit",
    "gallery": "reports.notebook",
    "hold_out": "images.splits",
    "import_vectors": "extraction.external",
    "list_images": "images.source",
    "load_backbone": "backbones.load",
    "load_model": "models.model",
    "map": "reports.model_report.embedding_map",
    "merge": "extraction.in_parts",
    "predict": "models.predict",
    "preview": "reports.preview",
    "repair": "extraction.repair",
    "report": "reports.model_report.report",
    "split": "curation.split",
    "stats": "reports.source_stats.stats",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"featcache.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
