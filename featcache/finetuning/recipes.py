"""How to fine-tune, as data: optimizer, schedule, head, what is unfrozen, augmentation. Nothing here runs.

In: a name, the user's changes, the number of training images. Out: a frozen ``Recipe`` with every value settled. Recipe, images,
start, seed and precision decide the numbers of a run, the ``Job``; the recipe is stored with the model.
"""

import dataclasses
import difflib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from featcache.errors import UsageError
from featcache.finetuning.recipe_values import Step, as_toml, check, converted
from featcache.images.source import ImageList
from featcache.system.display import quantity

if TYPE_CHECKING:
    from featcache.system.device import Runtime
    from featcache.system.distributed import Processes

log = logging.getLogger("featcache")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        images: labelled, each in train, val or test. output: the model folder to be written.
        recipe: its name. settings: the recipe, epochs and batch size perhaps open. seed: of everything random.
        precision: fp32, bf16 or fp16, of training.
        runtime: what to compute with. processes: who computes along.
        overwrite: whether a model that is there already may be replaced.
        precision_is_auto: whether ``precision`` was chosen here, so that float32 may take its place.
        budget: seconds that the run may take, see ``budget.py``; None: as long as the recipe takes.
        clock: what tells seconds. started: when the run was, by it.
        parts_are_auto: whether it was chosen here how many images a forward pass takes, so that the network may change it.
        groups: what is known of the groups of ``images``, as ``FinetuneReport`` has it; None: they have none.
    """

    images: ImageList
    output: Path
    recipe: str
    settings: "Recipe"
    seed: int
    precision: str
    runtime: "Runtime"
    processes: "Processes"
    overwrite: bool = False
    precision_is_auto: bool = False
    budget: float | None = None
    clock: Callable[[], float] = time.perf_counter
    started: float = 0.0
    parts_are_auto: bool = False
    groups: dict[str, Any] | None = None


Depth = Literal["head", "last-stage", "half", "most", "all"]
_FREEZEOUT: tuple[Depth, ...] = ("all", "most", "half")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train.

    Attributes:
        about: for whom, or where it comes from.
        hidden: sizes of the hidden layers of a new, random head; None: start from the cached head (LP-FT).
        dropout: share dropped after each hidden layer, or one for all.
        unfreeze: what trains besides the head: nothing (``head``), the ``last-stage``, ``most``, which is all but the first
            stages with together 2 % of the backbone's parameters at most, ``half``, which is all but those with half of them at
            most, or ``all``. Or one after the other: ``freezeout``, which is all, most and half, each for a third of the epochs, as
            the rate falls (stages that freeze from below: FreezeOut, Brock et al. 2017); ``gradual``, in which stages open from the
            top during the first half of the epochs (Howard and Ruder 2018). None: by the number of images.
        batchnorm: ``frozen``: keep the statistics of pre-training; ``train``: follow the batches.
        backbone_dropout: whether dropout and drop path inside the backbone are on while it trains, as in its pre-training.
        drop_path: share of images for which training leaves out the last block, less and less further down (stochastic depth,
            Huang et al. 2016; 0.1 to 0.2 is usual for a ViT-B); 0: none but what ``backbone_dropout`` says.
        optimizer: adamw, adam or sgd. lr, backbone_lr: peak learning rates of the head and of the backbone's last stage; None:
            by whether the backbone has batch norms.
        layer_decay: factor on the learning rate per stage further down; None: by whether the backbone has batch norms.
        momentum: of sgd. weight_decay: on weights; never on biases and norms.
        schedule: cosine (to zero), step (times ``gamma`` every ``step_epochs``), or constant.
        warmup: share of all optimizer steps during which the rate rises from zero.
        epochs: None: by the number of images. batch_size: images per batch; None: by their number.
        accumulation: batches per optimizer step.
        augmentation: steps in their order (``augment.py``).
        label_smoothing, clip_norm (largest norm of the gradient, 0: any).
        ema: decay of the moving average of weights, which is then what is evaluated and kept (0: none).
        eval_every: score val after so many optimizer steps, too; None: after each epoch only.
        patience: stop after so many epochs without a better score in any of them (0: never).
        interpolate: look for the best point between head-only and fine-tuned weights (WiSE-FT, Wortsman et al. 2022).

    Raises:
        UsageError: a value that makes no sense.
    """

    about: str
    hidden: tuple[int, ...] | None = None
    dropout: tuple[float, ...] = ()
    unfreeze: Literal["head", "last-stage", "half", "most", "all", "freezeout", "gradual"] | None = "all"
    batchnorm: Literal["frozen", "train"] = "frozen"
    backbone_dropout: bool = False
    drop_path: float = 0.0
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    backbone_lr: float | None = 1e-4
    layer_decay: float | None = 1.0
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
    eval_every: int | None = None
    patience: int = 0
    interpolate: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field.name, field.type, getattr(self, field.name))
        if self.lr == 0:
            raise UsageError("lr must be positive: the head always trains")
        layers = len(self.hidden or ())
        if self.dropout and len(self.dropout) != layers and (len(self.dropout) > 1 or not layers):
            raise UsageError(
                f"dropout = {as_toml(self.dropout)} does not fit hidden = {as_toml(self.hidden)}: give a share for each hidden "
                "layer of the new head, one for all, or [] for none"
            )

    @property
    def trains_batch_norms(self) -> bool:
        """Whether those of the backbone, if it has any, would follow the batches."""
        return self.batchnorm == "train" and self.unfreeze != "head"

    def phases(self, epochs: int) -> dict[Depth, int]:
        """What trains in how many of so many epochs, one phase after the other; of ``gradual`` what trains in the end."""
        if self.unfreeze is None or self.unfreeze == "gradual":
            return {"all": epochs}
        if self.unfreeze != "freezeout":
            return {self.unfreeze: epochs}
        ends = [-(-k * epochs // len(_FREEZEOUT)) for k in range(len(_FREEZEOUT) + 1)]
        each = zip(_FREEZEOUT, itertools.pairwise(ends), strict=True)
        return {depth: end - start for depth, (start, end) in each if end > start}

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
    unfreeze=None,
    optimizer="adamw",
    lr=3e-4,
    backbone_lr=None,
    layer_decay=None,
    weight_decay=0.01,
    schedule="cosine",
    warmup=0.1,
    augmentation=(("resized_crop", 0.7, 1.0, 1.0), _FLIP),
    label_smoothing=0.1,
    clip_norm=1.0,
    ema=0.98,
    patience=5,
    interpolate=True,
)
# By whether there are batch norms: measured on a MobileNetV2, and on a vision transformer (below).
_BACKBONE_LR = {True: 3e-4, False: 3e-5}
_LAYER_DECAY = {True: 1.0, False: 0.9}
# What ``explain`` cites of the default, by the same; 2026-11: benchmarks/recipes.py, how is said in benchmarks/LOG.md
_MEASURED = {
    True: "measured on MobileNetV2: digits, far from ImageNet and not mirrored, 90.7, 97.0 and 98.9 % right after 50, 200 and 1,000 "
    "images, frozen head 73.4, 86.8 and 93.8 %; near it, where it may also lose, 200 cats and dogs 93.1 and 91.7 %, 500 93.5 and 94.8 %, "
    "160 ants and bees 88.5 and 88.7 % (means of 3 to 7 draws)",
    False: "measured on a ViT-S/14, DINOv2's but trained further for another task: digits, not mirrored, 96.8 % right after 200 images, "
    "frozen head 88.2 %; 200 cats and dogs 88.7 and 83.4 %, 160 ants and bees 85.8 and 78.0 % (means of 3 draws)",
}
# field -> the other field on which it depends, and the values of that with which it does something.
_ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "momentum": ("optimizer", ("sgd",)),
    **dict.fromkeys(("gamma", "step_epochs"), ("schedule", ("step",))),
    **dict.fromkeys(
        ("backbone_lr", "batchnorm", "backbone_dropout", "drop_path"),
        ("unfreeze", ("last-stage", "half", "most", "all", "freezeout", "gradual")),
    ),
    "layer_decay": ("unfreeze", ("half", "most", "all", "freezeout", "gradual")),
    "interpolate": ("hidden", (None,)),
}
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
        about="as default, but stages open one after the other from the top, by Howard and Ruder",
        unfreeze="gradual",
        patience=0,
    ),
}


def choose_recipe(name: str, n_train: int, **changes: Any) -> Recipe:
    """``find_recipe``, settled for ``n_train`` training images."""
    return settle(find_recipe(name, changes), n_train)


def find_recipe(name: str, changes: dict[str, Any]) -> Recipe:
    """The recipe called ``name`` with the user's ``changes``.

    Args:
        name: key of ``RECIPES``.
        changes: fields of ``Recipe``, as Python or TOML have such values: lists for tuples, one number for several, a text
            with commas for numbers, ``none`` for what is left open. None: as in the recipe.

    Raises:
        UsageError: no such recipe, no such field, or an impossible value.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=2) or RECIPES
        known = "; ".join(f"{each} ({RECIPES[each].about})" for each in near)
        raise UsageError(f"no recipe is called {name!r}; choose {known}; or a file that ends in .toml")
    kinds = {field.name: field.type for field in dataclasses.fields(Recipe)}
    given = {field.replace("-", "_"): value for field, value in changes.items() if value is not None}
    for field in given:
        if field not in kinds:
            near = difflib.get_close_matches(field, kinds, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(kinds)}"
            raise UsageError(f"a recipe has no {field}; {remedy}")
    base, values = RECIPES[name], {field: converted(kinds[field], value) for field, value in given.items()}
    different = {field: value for field, value in values.items() if value != getattr(base, field)}
    changed = ", ".join(f"{field} = {as_toml(value)}" for field, value in different.items())
    about = {"about": f"as {name}, but {changed}"} if changed else {}
    recipe = dataclasses.replace(base, **(about | values))
    _warn_of_idle(recipe, different)
    return recipe


def _warn_of_idle(recipe: Recipe, changed: Iterable[str]) -> None:
    """Say which changes do nothing in this recipe."""
    for field, (other, allowed) in _ONLY_WITH.items():
        if field in changed and (value := getattr(recipe, other)) not in (*allowed, None):
            wanted = " or ".join(map(as_toml, allowed))
            log.warning("%s changes nothing: it takes %s = %s, found %s", field, other, wanted, as_toml(value))


def settle(recipe: Recipe, n_train: int, *, batch_norms: bool = True) -> Recipe:
    """``recipe`` with what it leaves open decided by the number of training images, and whether the backbone has batch norms."""
    epochs = recipe.epochs or (15 if n_train < 500 else 10 if n_train < 5000 else 6)
    batch = recipe.batch_size or (8 if n_train < 150 else 32 if n_train < 5000 else 64)
    dropout = recipe.dropout * len(recipe.hidden or ()) if len(recipe.dropout) == 1 else recipe.dropout
    rate = _BACKBONE_LR[batch_norms] if recipe.backbone_lr is None else recipe.backbone_lr
    decay = _LAYER_DECAY[batch_norms] if recipe.layer_decay is None else recipe.layer_decay
    # Few images of another kind than photographs lose by first stages that never move, 500 gain (benchmarks/LOG.md, "Which recipe").
    unfreeze = recipe.unfreeze or ("freezeout" if n_train < 500 else "most")
    settled: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": min(batch, n_train),
        "dropout": dropout,
        "unfreeze": unfreeze,
    }
    if not (batch_norms and recipe.trains_batch_norms):
        settled["batchnorm"] = "frozen"  # nothing asks for whole batches then, and one image is enough for a step
    return dataclasses.replace(recipe, **settled, backbone_lr=rate, layer_decay=decay)


def explain(recipe: Recipe, n_train: int, *, batch_norms: bool = True) -> list[str]:
    """What a settled recipe does and why, a line per decision; ``batch_norms``: as for ``settle``."""
    start = "the cached head, where linear probing ended (LP-FT, Kumar et al. 2022)"
    if recipe.hidden is not None:
        start = f"a new random head {'-'.join(map(str, recipe.hidden)) or 'of one layer'}"
        if any(recipe.dropout):
            start += f", dropout {'-'.join(f'{share:g}' for share in recipe.dropout)}"
    rates = f"learning rate {recipe.lr:g} for the head"
    if recipe.unfreeze != "head":
        rates += f", {recipe.backbone_lr:g} for the backbone"
        if (recipe.backbone_lr or 0.0) < recipe.lr:
            rates += ": its features are good already, and must not be washed out"
        if recipe.layer_decay != 1:
            rates += f"; times {recipe.layer_decay:g} per stage down, where they are most general"
    steps = -(-n_train // ((recipe.batch_size or 1) * recipe.accumulation))
    most = f"{'at most ' if n_train % steps else ''}{-(-n_train // steps)}"  # they are dealt evenly
    lines = [
        f"start: {start}",
        f"trains: {_trained_in_words(recipe)}; {recipe.optimizer}, {rates}",
        f"{quantity(recipe.epochs or 0, 'epoch')} of {quantity(n_train, 'image')} in steps of {most}; "
        f"schedule {recipe.schedule}"
        + (f" after a warm-up over {recipe.warmup:.0%} of the steps" if recipe.warmup else ""),
    ]
    if recipe.unfreeze != "head":
        frozen = (
            "frozen: batches this small would only blur them" if recipe.batchnorm == "frozen" else "following the data"
        )
        norms = f"batch-norm statistics {frozen}; " if batch_norms else ""
        dropout = "on, as in its pre-training" if recipe.backbone_dropout else "off, as when its features were cached"
        lines.append(f"{norms}dropout and drop path of the backbone {dropout}")
        if recipe.drop_path:
            lines[-1] += f", but a drop path of {recipe.drop_path:g} at the last block, less further down"
    if recipe.augmentation:
        lines.append("augmentation: " + ", ".join(map(step_in_words, recipe.augmentation)))
        if "flip" in (name for name, *_ in recipe.augmentation):
            lines[-1] += " (a digit or letter mirrored is none: leave that out there, --set augmentation=...)"
    guards = [
        f"label smoothing {recipe.label_smoothing:g}" if recipe.label_smoothing else "",
        f"gradient clipped at {recipe.clip_norm:g}" if recipe.clip_norm else "",
        f"moving average of weights {recipe.ema:g}" if recipe.ema else "",
        f"val is scored every {quantity(recipe.eval_every, 'step')}, too" if recipe.eval_every else "",
        f"stops after {quantity(recipe.patience, 'epoch')} without a better one" if recipe.patience else "",
        "best point between head-only and fine-tuned weights kept (WiSE-FT)"
        if recipe.interpolate and recipe.hidden is None
        else "",
    ]
    if any(guards):
        lines.append("; ".join(guard for guard in guards if guard))
    if recipe == settle(_DEFAULT, n_train, batch_norms=batch_norms):
        lines.append(_MEASURED[batch_norms])
    return lines


def _trained_in_words(recipe: Recipe) -> str:
    """What of the backbone trains, and when."""
    if recipe.unfreeze not in ("most", "half", "freezeout"):
        return recipe.unfreeze or "all"
    parts, first = list[str](), 1
    for depth, n in recipe.phases(recipe.epochs or 1).items():
        what = {
            "most": "all but its first stages, with 2 % of its weights at most",
            "half": "all but its first stages, with half of its weights at most",
        }.get(depth, "all")
        parts.append(f"from epoch {first} on {what}" if first > 1 else f"of the backbone {what}")
        first += n
    why = (
        "learn first (FreezeOut, Brock et al. 2017)"
        if recipe.unfreeze == "freezeout"
        else "fit most images as they are"
    )
    return f"{', '.join(parts)}: the first stages cost most to train, and {why}"


def step_in_words(step: Step) -> str:
    """One step of an augmentation, with its numbers."""
    name, *numbers = step
    values = [float(number) for number in numbers]
    if name == "resized_crop":
        words = f"a random part of {values[0]:.0%} to {values[1]:.0%} of the area"
        return words if values[2] == 1 else f"{words}, at {values[2]:.3g} times the size"
    if name == "jitter":
        kinds = zip(("brightness", "contrast", "saturation", "hue"), values, strict=True)
        return ", ".join(f"{kind} ±{value:g}" for kind, value in kinds)
    if name == "flip":
        return f"mirrored in {values[0]:.0%} of cases"
    if name == "rotate":
        return f"turned by up to {values[0]:g}°"
    if name == "center_crop":
        return "its middle"
    return " ".join([str(name).replace("_", " "), *(f"{value:g}" for value in values)])
