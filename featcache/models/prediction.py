"""What a model says of images. In: probabilities. Out: labels, rows of a table, a pandas data frame, a table in a notebook."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from featcache.errors import MissingDependencyError, UsageError
from featcache.heads.head import Array
from featcache.system.display import html_table, quantity

EVIDENCE = 3  # training images that are named per image
_NUMBERS = ("prob", "similarity", "unfamiliarity")  # how columns of numbers begin
_MOST_ROWS = 20  # that a notebook shows


class Neighbour(NamedTuple):
    """A training image near to another: its path in the cache, and the cosine similarity of their embeddings, -1..1."""

    path: str
    similarity: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """One input image.

    Attributes:
        path: as the user would type it (from a cache: relative to the source of the cache); of an image in memory
            ``inputs[3]``, the fourth of the inputs.
        probabilities: (C,), in the order of ``classes``; None if the image was refused.
        reason: why it was refused, else empty.
        digest: sha256 of the image's bytes, of an image in memory as ``images.in_memory.as_file`` gives them; empty if it
            was refused.
        classes: C names, the model's; one tuple for all its predictions.
        set: with a coverage: the classes that may be true, the most probable first; it may be empty. None: not asked for.
        nearest: with evidence: the nearest training images, the most similar first. None: not asked for.
        unfamiliarity: with evidence: the share of training images that are nearer to their neighbours than this one; 0..1.
        doubt: why the label should not be relied on; empty if nothing that was asked for speaks against it.
    """

    path: str
    probabilities: Array | None
    reason: str = ""
    digest: bytes = b""
    classes: tuple[str, ...] = ()
    set: tuple[str, ...] | None = None
    nearest: tuple[Neighbour, ...] | None = None
    unfamiliarity: float | None = None
    doubt: str = ""

    @property
    def status(self) -> str:
        """``ok``, ``unsure`` (``doubt`` says why) or ``refused`` (``reason`` says why)."""
        return "refused" if self.probabilities is None else "unsure" if self.doubt else "ok"

    @property
    def label(self) -> str | None:
        """The most probable class; None if the image was refused."""
        return None if self.probabilities is None else self.top(1)[0][0]

    @property
    def probability(self) -> float | None:
        """Of ``label``; None if the image was refused."""
        return None if self.probabilities is None else self.top(1)[0][1]

    def top(self, n: int = 5) -> list[tuple[str, float]]:
        """The ``n`` most probable classes, or all if there are fewer, with their probabilities; empty if refused."""
        if n < 1:
            raise UsageError(f"top shows at least one class, found {n}")
        if self.probabilities is None:
            return []
        order = np.argsort(-self.probabilities, kind="stable")[:n].tolist()
        return [(self.classes[k], float(self.probabilities[k])) for k in order]

    def to_row(self, *, top_k: int = 1, probs: bool = False) -> dict[str, Any]:
        """path, label, probability, status, reason (of a refusal or a doubt), then label_2, probability_2, ... up to ``top_k``,
        ``prob:CLASS`` for every class if asked; with a coverage ``set``, a list; with evidence nearest_1, similarity_1, ...
        and unfamiliarity. What a refused image does not have is None.
        """
        best: list[tuple[str | None, float | None]] = [*self.top(top_k), *[(None, None)] * top_k][:top_k]
        row: dict[str, Any] = {
            "path": self.path,
            "label": best[0][0],
            "probability": best[0][1],
            "status": self.status,
            "reason": self.reason or self.doubt,
        }
        for number, (label, probability) in enumerate(best[1:], 2):
            row |= {f"label_{number}": label, f"probability_{number}": probability}
        if probs:
            values = [None] * len(self.classes) if self.probabilities is None else self.probabilities.tolist()
            row |= {f"prob:{name}": value for name, value in zip(self.classes, values, strict=True)}
        if self.set is not None:
            row["set"] = None if self.probabilities is None else list(self.set)
        if self.nearest is not None:
            for number, (path, value) in enumerate([*self.nearest, *[(None, None)] * EVIDENCE][:EVIDENCE], 1):
                row |= {f"nearest_{number}": path, f"similarity_{number}": value}
            row["unfamiliarity"] = self.unfamiliarity
        return row

    def __repr__(self) -> str:
        if self.probabilities is None:
            return f"Prediction({self.path!r}: refused, {self.reason})"
        doubt = f", unsure: {self.doubt}" if self.doubt else ""
        return f"Prediction({self.path!r}: {self.label!r} {self.probability:.4f}{doubt})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Predictions(Sequence[Prediction]):
    """What a model says of several images, in the order of the inputs: a sequence of ``Prediction``.

    Attributes:
        rows: one per image. index: the inputs' own, if they were a pandas column with one image per entry, else None.
    """

    rows: tuple[Prediction, ...]
    index: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Prediction: ...
    @overload
    def __getitem__(self, at: slice) -> "Predictions": ...
    def __getitem__(self, at: int | slice) -> "Prediction | Predictions":
        if isinstance(at, slice):
            return Predictions(self.rows[at], None if self.index is None else self.index[at])
        return self.rows[at]

    def to_pandas(self, *, top_k: int = 1, probs: bool = False) -> Any:
        """A ``pandas.DataFrame``, a row per image, the columns of ``Prediction.to_row``.

        Its index is that of the column that was given, so that it joins the frame which the paths came from.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingDependencyError("a table for pandas needs pandas: pip install pandas") from error
        rows = [row.to_row(top_k=top_k, probs=probs) for row in self.rows]
        names = list(rows[0] if rows else Prediction("", None).to_row(top_k=top_k))
        # Texts as objects: a name that is not UTF-8 does not fit into pandas' own type, also that of a column (of a class).
        columns = [
            pd.Series([row[name] for row in rows], self.index, float if name.startswith(_NUMBERS) else object)
            for name in names
        ]
        frame = pd.DataFrame(dict(enumerate(columns)))
        frame.columns = pd.Index(names, dtype=object)
        return frame

    def __repr__(self) -> str:
        if len(self) <= 3:
            return f"[{', '.join(map(repr, self.rows))}]"
        counts = Counter(row.label for row in self.rows if row.label is not None).most_common()
        texts = [f"{label!r} {count}" for label, count in counts[:5]]
        texts += [f"{quantity(len(counts) - 5, 'class')} more"] * (len(counts) > 5)
        states = Counter(row.status for row in self.rows)
        texts += [f"{state} {states[state]}" for state in ("unsure", "refused") if states[state]]
        return f"Predictions({quantity(len(self), 'image')}: {', '.join(texts)})"

    def _repr_html_(self) -> str:
        with_sets, with_nearest = (
            any(getattr(row, name) is not None for row in self.rows) for name in ("set", "nearest")
        )
        heads = ["path", "label", "probability", "reason"]
        heads += ["set"] * with_sets + ["nearest training image", "similarity", "unfamiliarity"] * with_nearest
        rows = [tuple(heads)]
        for row in self.rows[:_MOST_ROWS]:
            numbers = [row.probability, row.nearest[0].similarity if row.nearest else None, row.unfamiliarity]
            certainty, similarity, unfamiliarity = ("" if number is None else f"{number:.4f}" for number in numbers)
            cells = [row.path, row.label or "", certainty, row.reason or row.doubt]
            cells += [", ".join(row.set or ())] * with_sets
            cells += [row.nearest[0].path if row.nearest else "", similarity, unfamiliarity] * with_nearest
            rows.append(tuple(cells))
        if len(self) > _MOST_ROWS:
            rows.append((f"... {quantity(len(self) - _MOST_ROWS, 'image')} more", *[""] * (len(heads) - 1)))
        return html_table(rows, caption=quantity(len(self), "prediction"))
