"""How to fine-tune, as data: optimizer, schedule, head, what is unfrozen, augmentation. Nothing here runs.

In: a name, the user's changes, the number of training images. Out: a frozen ``Recipe`` with every value settled. Recipe, images,
start, seed and precision decide the numbers of a run, the ``Job``; the recipe is stored with the model.
"""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from featcache.errors import UsageError
from featcache.images.source import ImageList

if TYPE_CHECKING:
    from featcache.system.device import Runtime
    from featcache.system.distributed import Processes

Step = tuple[str | float, ...]  # name of an augmentation, then its numbers; see augment.py
_MOST = 1e6


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        images: labelled, each in train, val or test. output: the model folder to be written.
        recipe: its name. changes: fields of ``Recipe`` to override. seed: of everything random.
        precision: fp32, bf16 or fp16, of training.
        runtime: what to compute with. processes: who computes along.
        overwrite: whether a model that is there already may be replaced.
        precision_is_auto: whether ``precision`` was chosen here, so that float32 may take its place.
    """

    images: ImageList
    output: Path
    recipe: str
    changes: dict[str, Any]
    seed: int
    precision: str
    runtime: "Runtime"
    processes: "Processes"
    overwrite: bool = False
    precision_is_auto: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train.

    Attributes:
        about: for whom, or where it comes from.
        hidden: sizes of the hidden layers of a new, random head; None: start from the cached head (LP-FT).
        dropout: share dropped after each hidden layer.
        unfreeze: what trains besides the head: nothing (``head``), the ``last-stage``, ``all``, or all, opened stage by
            stage from the top during the first half of the epochs (``gradual``; Howard and Ruder 2018).
        batchnorm: ``frozen``: keep the statistics of pre-training; ``train``: follow the batches.
        backbone_dropout: whether dropout and drop path inside the backbone are on while it trains, as in its pre-training.
        optimizer: adamw, adam or sgd. lr, backbone_lr: peak learning rates of the head and of the backbone's last stage.
        layer_decay: factor on the learning rate per stage further down.
        momentum: of sgd. weight_decay: on weights; never on biases and norms.
        schedule: cosine (to zero), step (times ``gamma`` every ``step_epochs``), or constant.
        warmup: share of all optimizer steps during which the rate rises from zero.
        epochs: None: by the number of images. batch_size: images per batch; None: by their number.
        accumulation: batches per optimizer step.
        augmentation: steps in their order (``augment.py``).
        label_smoothing, clip_norm (largest norm of the gradient, 0: any).
        ema: decay of the moving average of weights, which is then what is evaluated and kept (0: none).
        patience: stop after so many epochs without a better one (0: never).
        interpolate: look for the best point between head-only and fine-tuned weights (WiSE-FT, Wortsman et al. 2022).

    Raises:
        UsageError: a value that makes no sense.
    """

    about: str
    hidden: tuple[int, ...] | None = None
    dropout: tuple[float, ...] = ()
    unfreeze: Literal["head", "last-stage", "all", "gradual"] = "all"
    batchnorm: Literal["frozen", "train"] = "frozen"
    backbone_dropout: bool = False
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    backbone_lr: float = 1e-4
    layer_decay: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "step", "constant"] = "constant"
    warmup: float = 0.0
    step_epochs: int = 1
    gamma: float = 1.0
    epochs: int | None = None
    batch_size: int | None = None
    accumulation: int = 1
    augmentation: tuple[Step, ...] = ()
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0
    patience: int = 0
    interpolate: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in allowed:
                raise UsageError(f"unknown {field.name} {value!r}; choose one of {', '.join(allowed)}")
        shares = {"momentum": self.momentum, "ema": self.ema, "label_smoothing": self.label_smoothing}
        shares |= {"warmup": self.warmup, **{f"dropout {k + 1}": value for k, value in enumerate(self.dropout)}}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise UsageError(f"{name} must be a number from 0 to below 1, found {value}")
        at_least = {"lr": 0, "backbone_lr": 0, "weight_decay": 0, "epochs": 1, "batch_size": 1, "accumulation": 1}
        at_least |= {"patience": 0, "clip_norm": 0, "step_epochs": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= _MOST:
                raise UsageError(f"{name} must be a number from {least} to {_MOST:g}, found {value}")
        if self.lr == 0:
            raise UsageError("lr must be positive: the head always trains")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of everything that changes the numbers (all but ``about``)."""
        values: dict[str, Any] = json.loads(json.dumps(vars(self)))  # tuples become lists
        del values["about"]
        return values


_CROP, _FLIP = ("resized_crop", 0.08, 1.0, 1.0), ("flip", 0.5)
_ANTS_BEES = Recipe(
    about="the transfer-learning tutorial of ants and bees (T1), also copied for any two folders (T5)",
    hidden=(),
    batchnorm="train",
    optimizer="sgd",
    lr=1e-3,
    backbone_lr=1e-3,
    schedule="step",
    step_epochs=7,
    gamma=0.1,
    epochs=25,
    batch_size=4,
    augmentation=(_CROP, _FLIP),
)
_FLOWERS = Recipe(
    about="the flowers tutorial (T3): second stage, all weights, batch norm frozen, head 512-256, a step every second batch",
    hidden=(512, 256),
    dropout=(0.25, 0.5),
    optimizer="adam",
    lr=1e-3,
    backbone_lr=1e-4,  # the tutorial: 1e-3, which ruins a backbone whose batch norms are frozen (benchmarks/LOG.md)
    epochs=20,
    batch_size=64,
    accumulation=2,
    augmentation=(_CROP, _FLIP, ("rotate", 90)),
)
_DEFAULT = Recipe(
    about="200 to 20,000 images, starting from the cached head",
    optimizer="adamw",
    lr=3e-4,
    backbone_lr=3e-5,
    layer_decay=0.9,
    weight_decay=0.01,
    schedule="cosine",
    warmup=0.1,
    augmentation=(("resized_crop", 0.35, 1.0, 1.0), _FLIP),
    label_smoothing=0.1,
    clip_norm=1.0,
    ema=0.98,
    patience=5,
    interpolate=True,
)
RECIPES: dict[str, Recipe] = {
    "default": _DEFAULT,
    "ants-bees": _ANTS_BEES,
    "ants-bees-frozen": dataclasses.replace(
        _ANTS_BEES, about="first half of T1 and T5: the new head only", unfreeze="head", batchnorm="frozen"
    ),
    "cats-dogs": Recipe(
        about="the cats-and-dogs course (T2): a head with one hidden layer of 256 on a frozen backbone",
        hidden=(256,),
        dropout=(0.2,),
        unfreeze="head",
        optimizer="adam",
        lr=3e-3,
        epochs=1,
        batch_size=64,
        augmentation=(("rotate", 30), _CROP, _FLIP),
    ),
    "flowers": _FLOWERS,
    "flowers-frozen": dataclasses.replace(
        _FLOWERS,
        about="the flowers tutorial (T3): first stage, the new head only, a step every second batch of 256",
        hidden=(),
        dropout=(),
        unfreeze="head",
        batch_size=256,
    ),
    "caltech101": Recipe(
        about="the Caltech-101 tutorial (T4): a head of 256 with dropout on a frozen backbone",
        hidden=(256,),
        dropout=(0.4,),
        unfreeze="head",
        optimizer="adam",
        epochs=20,
        batch_size=128,
        patience=5,
        augmentation=(
            ("resized_crop", 0.8, 1.0, 256 / 224),
            ("rotate", 15),
            _FLIP,
            ("center_crop",),
        ),
    ),
    "gradual": dataclasses.replace(
        _DEFAULT,
        about="as default, but stages open one after the other from the top, for data far from the pre-training's",
        unfreeze="gradual",
        patience=0,
    ),
}


def choose_recipe(name: str, n_train: int, **changes: Any) -> Recipe:
    """The recipe called ``name`` with the user's ``changes`` (None: as in the recipe), every value settled.

    Args:
        name: key of ``RECIPES``.
        n_train: training images; decides epochs and batch size where the recipe leaves them open.
        changes: fields of ``Recipe``.

    Raises:
        UsageError: no such recipe, or an impossible value.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=2) or list(RECIPES)
        raise UsageError(f"no recipe is called {name!r}; choose {', '.join(near)}")
    if unknown := sorted(set(changes) - {field.name for field in dataclasses.fields(Recipe)}):
        raise UsageError(f"a recipe has no {', '.join(unknown)}")
    recipe = dataclasses.replace(RECIPES[name], **{k: v for k, v in changes.items() if v is not None})
    epochs = recipe.epochs or (15 if n_train < 500 else 10 if n_train < 5000 else 6)
    batch = recipe.batch_size or (32 if n_train < 5000 else 64)
    return dataclasses.replace(recipe, epochs=epochs, batch_size=min(batch, n_train))


def explain(recipe: Recipe, n_train: int) -> list[str]:
    """What a settled recipe does and why, a line per decision."""
    start = "the cached head, where linear probing ended (LP-FT, Kumar et al. 2022)"
    if recipe.hidden is not None:
        start = f"a new random head {'-'.join(map(str, recipe.hidden)) or 'of one layer'}"
    rates = f"learning rate {recipe.lr:g} for the head"
    if recipe.unfreeze != "head":
        rates += f", {recipe.backbone_lr:g} for the backbone: its features are good already, and must not be washed out"
        if recipe.layer_decay != 1:
            rates += f"; times {recipe.layer_decay:g} per stage down, where they are most general"
    batch = (recipe.batch_size or 0) * recipe.accumulation
    lines = [
        f"start: {start}",
        f"trains: {recipe.unfreeze}; {recipe.optimizer}, {rates}",
        f"{recipe.epochs} epochs of {n_train} images in steps of {min(batch, n_train)}; schedule {recipe.schedule}"
        + (f" after a warm-up over {recipe.warmup:.0%} of the steps" if recipe.warmup else ""),
    ]
    if recipe.unfreeze != "head":
        frozen = (
            "frozen: batches this small would only blur them" if recipe.batchnorm == "frozen" else "following the data"
        )
        dropout = "on, as in its pre-training" if recipe.backbone_dropout else "off, as when its features were cached"
        lines.append(f"batch-norm statistics {frozen}; dropout and drop path of the backbone {dropout}")
    if recipe.augmentation:
        lines.append("augmentation: " + ", ".join(_step_in_words(step) for step in recipe.augmentation))
    guards = [
        f"label smoothing {recipe.label_smoothing:g}" if recipe.label_smoothing else "",
        f"gradient clipped at {recipe.clip_norm:g}" if recipe.clip_norm else "",
        f"moving average of weights {recipe.ema:g}" if recipe.ema else "",
        f"stops after {recipe.patience} epochs without a better one" if recipe.patience else "",
        "best point between head-only and fine-tuned weights kept (WiSE-FT)" if recipe.interpolate else "",
    ]
    if any(guards):
        lines.append("; ".join(guard for guard in guards if guard))
    return lines


def _step_in_words(step: Step) -> str:
    return " ".join([str(step[0]).replace("_", " "), *(f"{value:g}" for value in step[1:])])
