"""featcache in scikit-learn's pipelines: images in, embeddings out, and the classifier of ``fit-head`` on them.

>>> import featcache
>>> from featcache.sklearn import FeatureExtractor, HeadClassifier
>>> from sklearn.pipeline import make_pipeline
>>> images = featcache.list_images("photos")
>>> X = [images.root / path for path in images.paths]
>>> y = [images.classes[label] for label in images.labels]
>>> extractor = FeatureExtractor("squeezenet1_1", weights="none", cache="kept")
>>> pipeline = make_pipeline(extractor, HeadClassifier(C=1.0)).fit(X, y)
>>> print(*pipeline.predict(X[:2]))
blue blue

Nothing here loads PyTorch before an image has to be embedded.
"""

import dataclasses
import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from featcache.backbones.choice import AUTO, choose_backbone, warn_of_licence
from featcache.backbones.saved import SavedBackbone
from featcache.errors import BackboneError, SourceError, UsageError
from featcache.extraction.kept import KeptEmbeddings, Settled, embed_now
from featcache.extraction.request import ExtractRequest, load_requested
from featcache.heads.head import Array, Head, softmax
from featcache.heads.logreg import C_GRID, fit_logreg
from featcache.heads.validation import different_images
from featcache.images.groups import group_by_name, group_name, joined
from featcache.images.in_memory import Held
from featcache.images.read import Paths, refusals
from featcache.images.source import ImageList, Source
from featcache.images.tables import is_table
from featcache.models.model import Model, load_model
from featcache.models.predict import named_inputs
from featcache.spec import Spec, canonical_json
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_runtime_options, check_whole

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.backbones.embedder import Embedder
    from featcache.backbones.encoder import Precision

__all__ = ["FeatureExtractor", "HeadClassifier"]
_REQUEST = tuple(field.name for field in dataclasses.fields(ExtractRequest))
_RUNTIME = ("device", "workers", "batch_size")
_loaded: "OrderedDict[str, Backbone]" = (
    OrderedDict()
)  # so that clones of an estimator, and two side by side, share them
_MAX_LOADED = 2
# What each estimator embeds with: checked on the images that it was fitted on. Not part of it, which is data.
_ready: "weakref.WeakKeyDictionary[FeatureExtractor, tuple[str, Embedder]]" = weakref.WeakKeyDictionary()
_getting_ready = threading.Lock()


class FeatureExtractor(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Images in, embeddings of a frozen backbone out: (N, D) float32, the values that ``extract`` would store.

    X is a list, pandas column or array of N images, one a row: paths of image files, PIL images, or uint8 arrays (H, W), (H, W, 3)
    in the order RGB, (H, W, 4) with alpha, or one array (N, H, W, 3). ``fit`` settles what embeddings are (on a few of the images:
    backbone, weights, precision, storage); nothing is learnt from them. A pickle holds that, and no weights: they are loaded again
    when an image has to be embedded, and refused if they are others.

    Args:
        backbone, weights, resize, crop, interpolation, pool, layers, decode, white_level, precision, dtype: as in
            ``ExtractRequest``; ``backbone`` may be the folder of a saved or fine-tuned model.
        device, workers, batch_size: as in ``extract``; they change the speed alone. Every forward pass has the whole batch size,
            so that embeddings do not depend on what is embedded beside them; for single images ``batch_size=1`` is faster.
        cache: a folder in which embeddings are kept by the content of their images and the spec, for all later calls, clones
            and processes: ``GridSearchCV`` embeds each image once. None: every call embeds. (``Pipeline(memory=...)`` knows paths
            by their names alone, and does not notice that a file has changed.)
        on_refused: what to do if an image cannot be embedded: ``raise`` SourceError with the reason, or ``nan``, a row of NaN.

    Attributes:
        spec_: all that decides the numbers. fingerprint_: its sha256, as of a cache. n_features_out_: D.
    """

    def __init__(
        self,
        backbone: AnyPath = AUTO,
        *,
        weights: AnyPath = AUTO,
        resize: int | tuple[int, int] | None = None,
        crop: int | None = None,
        interpolation: str | None = None,
        pool: str | None = None,
        layers: int | None = None,
        decode: str | None = None,
        white_level: int | None = None,
        precision: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        workers: int | None = None,
        batch_size: int | None = None,
        cache: AnyPath | None = None,
        on_refused: Literal["raise", "nan"] = "raise",
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.resize = resize
        self.crop = crop
        self.interpolation = interpolation
        self.pool = pool
        self.layers = layers
        self.decode = decode
        self.white_level = white_level
        self.precision = precision
        self.dtype = dtype
        self.device = device
        self.workers = workers
        self.batch_size = batch_size
        self.cache = cache
        self.on_refused = on_refused

    def fit(self, X: Any, y: Any = None) -> Self:
        """Settle what embeddings are; with a cache, as it was settled there for the same settings.

        Raises:
            SourceError: X is empty, or no image of it can be embedded. BackboneError, ModelError: backbone or weights.
            UsageError: X is not a list of images, one a row; impossible settings. StorageError: the cache cannot be written.
        """
        files, request = _one_a_row(X), self._request()
        if (kept := self._kept()) is None:
            settled = self._settle(request, files)
        else:
            settled = kept.settle(request.record(), lambda: self._settle(request, files))
        self.spec_, self.n_features_out_ = settled.spec, settled.dim
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:
        """(N, D) embeddings of N images.

        Raises:
            SourceError: an image cannot be embedded, and ``on_refused`` is ``raise``; what was embedded is kept in the cache.
            SpecMismatchError, BackboneError: the backbone is not what it was when this was fitted, or not to be had.
            Otherwise as ``fit``.
        """
        check_is_fitted(self)
        files, request = _one_a_row(X), self._request()
        settled, kept = Settled(self.spec_, self.n_features_out_), self._kept()
        if kept is None:
            found, refused = embed_now(files, self._embedder(request, files, self.spec_), settled)
        else:
            found, refused = kept.embed(
                files, settled, lambda: self._embedder(request, files, self.spec_), request.record()
            )
        if refused and self.on_refused == "raise":
            first, reason = next(iter(sorted(refused.items())))
            raise SourceError(
                f"{len(refused)} of {len(files.paths)} images cannot be embedded, the first X[{first}] ({files.paths[first]}): {reason}; "
                'leave them out, or on_refused="nan" gives rows of NaN'
            )
        return found

    @classmethod
    def from_model(cls, model: Model | AnyPath, **options: Any) -> Self:
        """What embeds images for a saved model, fitted: ``make_pipeline(FeatureExtractor.from_model(m), HeadClassifier.from_model(m))``.

        Args:
            model: its folder, or loaded. options: device, workers, batch_size, cache, on_refused.

        Raises:
            ModelError: it cannot be read. UsageError: another option, which would not be the model's.
        """
        if wrong := sorted(options.keys() - {*_RUNTIME, "cache", "on_refused"}):
            raise UsageError(
                f"{wrong[0]} is the model's own; give FeatureExtractor(backbone=MODEL, {wrong[0]}=...) and fit it"
            )
        loaded = model if isinstance(model, Model) else load_model(model)
        made = cls(str(loaded.path), **options)
        made.spec_, made.n_features_out_ = loaded.spec, loaded.head.dim
        return made

    @property
    def fingerprint_(self) -> str:
        """sha256 (hex) of the spec."""
        check_is_fitted(self)
        return self.spec_.fingerprint

    @property
    def _n_features_out(self) -> int:
        return self.n_features_out_

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "spec_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.input_tags.two_d_array = False  # rows are images
        tags.transformer_tags.preserves_dtype = []
        return tags

    def _kept(self) -> KeptEmbeddings | None:
        return None if self.cache is None else KeptEmbeddings(as_path(self.cache))

    def _request(self) -> ExtractRequest:
        """Raises UsageError, BackboneError."""
        if self.on_refused not in ("raise", "nan"):
            raise UsageError(f"unknown on_refused {self.on_refused!r}; choose raise or nan")
        values = {name: _plain(getattr(self, name)) for name in _REQUEST}
        pair = values["resize"] if isinstance(values["resize"], tuple) else (values["resize"],)
        counts = {name: getattr(self, name) for name in ("crop", "layers", "white_level", "workers", "batch_size")}
        for name, value in (*counts.items(), *(("resize", edge) for edge in pair)):
            if value is not None:
                check_whole(name, value, 1)
        check_runtime_options(self.device, workers=self.workers, batch_size=self.batch_size)
        request = ExtractRequest(**values)
        request.check_paths()
        return request

    def _settle(self, request: ExtractRequest, files: Paths) -> Settled:
        """Raises SourceError: no image can be decoded. Otherwise as ``_embedder``."""
        from featcache.backbones.self_check import survives_rounding

        request.check_named()
        embedder = self._embedder(request, files)
        if not len(embedder.sample):
            refused = refusals(files, range(len(files.paths)), spec=embedder.backbone.preprocess)
            first, reason = next(iter(refused.items()))
            raise SourceError(f"no image of X can be embedded, the first X[{first}] ({files.paths[first]}): {reason}")
        saved = request.saved()
        asked = request.resolved(saved.spec) if saved else request
        rounded = "float16" if survives_rounding(embedder.encoder(embedder.sample)) else "float32"
        precision = asked.precision if saved and asked.precision == saved.spec.precision else None
        storage = rounded if asked.dtype == AUTO else asked.dtype
        return Settled(embedder.spec(storage=storage, precision=precision), embedder.backbone.dim)

    def _embedder(self, request: ExtractRequest, files: Paths, fitted: Spec | None = None) -> "Embedder":
        """What ``request`` asks for, checked on ``files``. fitted: what it was settled to mean, once that is so.

        Raises:
            BackboneError, ModelError: backbone or weights are not to be had. UsageError: impossible settings.
        """
        from featcache.backbones.embedder import Embedder
        from featcache.system.device import choose_runtime

        with _getting_ready:
            runtime = choose_runtime(**{name: getattr(self, name) for name in _RUNTIME})
            if request.backbone == AUTO:
                name = fitted.backbone if fitted else choose_backbone(runtime.device.type)
                request = dataclasses.replace(request, backbone=name)
            key = canonical_json({"record": request.record(), "runtime": str(runtime)})
            before, embedder = _ready.get(self, ("", None))
            if embedder and fitted and before == key:
                return embedder
            saved = request.saved()
            asked = request.resolved(saved.spec) if saved else request
            precision = asked.precision
            if fitted and precision != "fp32":  # what passed when it was fitted need not pass on fewer images
                precision = AUTO if fitted.precision == "reference" else fitted.precision
            backbone = _load(request, asked, saved)
            embedder = Embedder.prepare(backbone, files, runtime=runtime, precision=cast("Precision", precision))
            if len(embedder.sample):  # else nothing was checked
                _ready[self] = key, embedder
            return embedder


def _load(request: ExtractRequest, asked: ExtractRequest, saved: SavedBackbone | None) -> "Backbone":
    """The backbone of ``request``; ``asked``: with what ``saved`` says where it is silent. Raises BackboneError, ModelError."""
    record = request.record()
    key = canonical_json(record)
    if key not in _loaded:
        backbone = load_requested(asked, saved)
        if request.record() != record:
            raise BackboneError(f"the weights of {request.backbone} changed while they were read; do it again")
        warn_of_licence(backbone.name, backbone.weights, loaded=True)
        _loaded[key] = backbone
        while len(_loaded) > _MAX_LOADED:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    return _loaded[key]


class HeadClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The logistic regression of ``fit-head``: C and scaling chosen by cross-validation, probabilities calibrated.

    Rows that are equal to the bit count as copies of one image, and lie in the same fold. On the training rows of a cache it is
    the head that ``fit_head`` trains. Multinomial, deterministic; see ``heads.logreg.fit_logreg``.

    Args:
        C: inverse regularisation strength; chosen by cross-validation when None.
        folds: of the cross-validation; fewer if a class has fewer different rows. 0 for none: then ``C`` has to be given, features
            are standardised and probabilities are as they come.
        class_weight: None, ``balanced``, or a dictionary class -> weight above 0 (1 where it is silent), in training.
        random_state: of the folds: a seed, a ``RandomState``, or None for another one each time.

    Attributes:
        classes_: (C,) labels, sorted. head_: what computes: scaling and weights, in which the temperature is contained.
        C_, scaling_, temperature_: as chosen. n_folds_: how many there were.
        cv_accuracy_, cv_log_loss_: out of fold, corrected for the choice (``heads.validation``); None without folds.
        curve_: every setting tried, with its scores. notes_: sentences worth reading, as that the best C lies on the edge.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
    """

    def __init__(
        self,
        *,
        C: float | None = None,
        folds: int = 5,
        class_weight: Mapping[Any, float] | Literal["balanced"] | None = None,
        random_state: Any = 0,
    ) -> None:
        self.C = C
        self.folds = folds
        self.class_weight = class_weight
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Train on (N, D) embeddings and (N,) labels of any type.

        Args:
            groups: (N,) names of what belongs together (patient, place): such rows lie in one fold. None, NaN, NA or an empty text
                stands alone. In a pipeline ``headclassifier__groups=``, or by metadata routing.

        Raises:
            ValueError: one class only, NaN, impossible settings, too few different rows (or groups) of a class for folds.
            UsageError: not enough memory.
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        if y.dtype == object and any(label is None for label in y):
            raise ValueError("y holds None where a label is expected; leave these rows out")
        check_classification_targets(y)
        self._check_settings()
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class only ({self.classes_.tolist()[0]!r}); a classifier needs at least two")
        copies = group_by_name([hashlib.sha256(row).hexdigest() for row in np.ascontiguousarray(X)])
        if groups is not None:
            check_consistent_length(X, groups)
            copies = joined(copies, group_by_name([group_name(group) for group in groups]))
        self.n_folds_ = self._possible_folds(labels, copies)
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31)
        weights = None
        if isinstance(self.class_weight, Mapping):
            weights = compute_class_weight(dict(self.class_weight), classes=self.classes_, y=y)
        try:
            fitted = fit_logreg(
                X,
                np.arange(len(X)),
                labels,
                grid=C_GRID if self.C is None else (float(self.C),),
                folds=self.n_folds_,
                balanced=self.class_weight == "balanced" if weights is None else False,
                class_weight=weights,
                seed=int(seed),
                copies=copies,
            )
        except SourceError as error:  # groups that cannot be divided
            raise ValueError(str(error)) from error
        self.head_, self.curve_, self.notes_ = fitted.head, fitted.curve, fitted.notes
        self.C_, self.scaling_, self.temperature_ = fitted.chosen["C"], fitted.head.scaling, fitted.temperature
        self.cv_accuracy_, self.cv_log_loss_ = fitted.cv_accuracy, fitted.cv_log_loss
        return self

    @classmethod
    def from_model(cls, model: Model | AnyPath) -> Self:
        """The head of a saved model, fitted, for embeddings of the model's spec (``FeatureExtractor.from_model``).

        A clone of it is not fitted, and becomes a logistic regression whatever the head is. The other way, from here to a model
        folder, leads through ``fit_head`` on a cache, which knows the images: a model says what it was trained on.

        Raises:
            ModelError: it cannot be read.
        """
        loaded = model if isinstance(model, Model) else load_model(model)
        training, metrics = loaded.manifest["training"], loaded.manifest["metrics"]
        weight = training.get("class_weight")
        made = cls(C=training.get("C"), class_weight="balanced" if weight == "balanced" else None)
        made.classes_, made.head_, made.n_features_in_ = np.array(loaded.classes), loaded.head, loaded.head.dim
        made.C_, made.scaling_, made.temperature_ = training.get("C"), loaded.head.scaling, metrics.get("temperature")
        made.cv_accuracy_, made.cv_log_loss_ = metrics.get("cv_accuracy"), metrics.get("cv_log_loss")
        return made

    def decision_function(self, X: Any) -> Array:
        """(N, C) logits; of two classes (N,), the log of the odds of the second."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: Any) -> Array:
        """(N, C) calibrated probabilities, columns in the order of ``classes_``."""
        return softmax(self._logits(X))

    def predict(self, X: Any) -> Array:
        """(N,) labels."""
        best = self._logits(X).argmax(axis=1)
        found: Array = self.classes_[best]
        return found

    def _logits(self, X: Any) -> Array:
        check_is_fitted(self)
        head: Head = self.head_
        return head.logits(validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))

    def _check_settings(self) -> None:
        """Raise ValueError for what makes no sense."""
        weight = self.class_weight
        if self.C is not None and not (_is_number(self.C) and 0 < self.C < float("inf")):
            raise ValueError(f"C must be a positive number, or None to choose it, found {self.C!r}")
        if not isinstance(self.folds, int | np.integer) or self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds must be 0 (none) or at least 2, found {self.folds!r}")
        if self.folds == 0 and self.C is None:
            raise ValueError("without folds nothing can choose C; give C as well")
        if weight is not None and weight != "balanced" and not isinstance(weight, Mapping):
            raise ValueError(f"class_weight must be None, 'balanced' or a dictionary, found {weight!r}")
        if isinstance(weight, Mapping) and not all(_is_number(w) and 0 < w < float("inf") for w in weight.values()):
            raise ValueError(
                f"class_weight must hold numbers above 0, found {dict(weight)!r}; leave out rows that are not to count"
            )

    def _possible_folds(self, labels: Array, copies: Array) -> int:
        """``folds``, or as many as the rarest class has different rows. Raises ValueError: it has one only."""
        if not self.folds:
            return 0
        counts = different_images(labels, copies)
        if counts.min() < 2:
            raise ValueError(
                f"class {self.classes_.tolist()[counts.argmin()]!r} has 1 sample or group of equal samples; cross-validation needs at "
                "least two: add some, take the class out, or do without (folds=0, C=1.0)"
            )
        return min(int(self.folds), int(counts.min()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A setting as ``ExtractRequest`` takes it, of the types that grids and files of parameters bring along."""
    value = value.item() if isinstance(value, np.generic) else value
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _one_a_row(X: Any) -> Paths:
    """The images of X, of which each is one row of the result. Raises UsageError: it is none; SourceError: X is empty."""
    array = isinstance(X, np.ndarray)
    if isinstance(X, str | os.PathLike | Source | Image.Image) or (array and X.dtype == np.uint8 and X.ndim in (2, 3)):
        what = "one image" if array or isinstance(X, Image.Image) else f"one path ({X})"
        folder = not array and not isinstance(X, Image.Image) and Source.of(X).path.is_dir()
        raise UsageError(f"X is {what}, expected a list of images, one a row; {_LISTED if folder else 'give [X]'}")
    # An iterator is read once, a set has no order.
    if not array and not (isinstance(X, Sized) and hasattr(X, "__getitem__")):
        advice = f"; {_LISTED}" if isinstance(X, ImageList) else "; give list(X)" if isinstance(X, Iterator) else ""
        raise UsageError(
            f"X is a {type(X).__name__}, expected a list, a pandas column or an array of images, one a row{advice}"
        )
    if isinstance(X, list | tuple):
        for number, entry in enumerate(X):
            if isinstance(entry, np.ndarray) and entry.ndim == 4:
                raise UsageError(
                    f"X[{number}] is an array of {len(entry)} images, expected one image a row; give each of them"
                )
    paths, held = list[str](), dict[int, Held]()
    for number, (name, entry) in enumerate(named_inputs(X, "X")):
        if isinstance(entry, Source):
            entry.check_options("single image")
            if entry.path.is_dir() or is_table(entry.path):
                raise UsageError(f"X[{number}] ({entry}) is not one image, as each row has to be; {_LISTED}")
            paths.append(str(entry.path))
        else:
            paths.append(name)
            held[number] = entry
    if not paths:
        raise SourceError("X is empty, expected at least one image")
    return Paths(None, tuple(paths), held)


_LISTED = "list them: images = featcache.list_images(FOLDER); X = [images.root / path for path in images.paths]"
