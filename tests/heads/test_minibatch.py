"""Training by mini-batches: what is read and when, in memory and not; NumPy, PyTorch and logistic regression are the oracles."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from blobs import SHORT, D, blobs
from torch.optim.adamw import adamw

from featcache.errors import TrainingError, UsageError
from featcache.heads import metrics
from featcache.heads.feature_batches import Budget, FeatureBatches
from featcache.heads.head import FittedHead, Head, TorchSettings
from featcache.heads.logreg import fit_logreg
from featcache.heads.minibatch import _Dropout, fit_torch_head
from featcache.heads.validation import fit_temperature, stratified_folds

# Nothing fits in memory: mini-batches come from a buffer of some 256 rows.
TIGHT = dataclasses.replace(SHORT, memory=0, buffer=256 * 2 * D)


def fit(kind: Any, X: Any, y: np.ndarray, *, budget: Budget = SHORT, **options: Any) -> FittedHead:
    options = {"rows": np.arange(len(y)), "folds": 0} | options
    return fit_torch_head(X, y=y, kind=kind, n_classes=int(y.max()) + 1, budget=budget, **options)


class Recorded:
    """Features that remember which rows were read."""

    def __init__(self, X: np.ndarray) -> None:
        self.X, self.shape, self.dtype = X, X.shape, X.dtype
        self.reads: list[np.ndarray] = []

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.reads.append(rows)
        return self.X[rows]


def test_of_too_many_logits_some_rows_give_the_temperature() -> None:
    X, y = blobs(300, spread=3.0)
    few = fit("linear", X, y, folds=3, budget=dataclasses.replace(SHORT, logits=3 * 100))
    all_of_them = fit("linear", X, y, folds=3)
    assert few.out_of_fold is not None and all_of_them.out_of_fold is not None and all_of_them.kept is None
    assert few.kept is not None and few.kept.tolist() == list(range(0, 300, 3))
    every_third = all_of_them.out_of_fold[::3] * np.float32(all_of_them.temperature)
    assert few.temperature == pytest.approx(fit_temperature(y[::3], every_third)[0], rel=1e-4)
    np.testing.assert_allclose(few.out_of_fold * few.temperature, every_third, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ what is read


def test_features_that_fit_in_memory_are_read_once() -> None:
    X, y = blobs(300)
    rows = np.flatnonzero(np.arange(300) % 7)
    source = Recorded(X)
    fit("linear", source, y[rows], rows=rows, folds=3)
    (read,) = source.reads
    np.testing.assert_array_equal(read, rows)


def mini_batches(n: int, size: int, memory: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(row numbers per batch, row numbers per read) of half the rows, ten classes in order; each has its right label."""
    source = Recorded(np.arange(2 * n, dtype=np.float32)[:, None])
    rows = np.sort(np.random.default_rng(1).choice(2 * n, n, replace=False))
    data = FeatureBatches(source, rows, np.arange(n) * 10 // n, budget=Budget(memory=memory, buffer=4 * size))
    batches = []
    for x, labels in data.mini_batches(np.arange(n), size, np.random.default_rng(seed)):
        places = np.searchsorted(rows, x[:, 0].numpy())
        np.testing.assert_array_equal(labels, places * 10 // n)
        batches.append(places)
    return batches, [np.searchsorted(rows, read) for read in source.reads]


@pytest.mark.parametrize("memory", [0, 2**28])
@pytest.mark.parametrize("size", [40, 700])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 999, 5000])
def test_mini_batches_hold_every_row_once(n: int, size: int, memory: int) -> None:
    batches, reads = mini_batches(n, size, memory)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(n))
    assert max(map(len, batches)) <= size
    others, _ = mini_batches(n, size, memory, seed=1)
    assert n < 100 or any(set(one) != set(other) for one, other in zip(batches, others, strict=True))
    for read in reads:
        assert (np.diff(read) > 0).all()  # from the beginning of the file to its end
        assert (np.diff(read) > 1).sum() <= len(read) / 16  # in runs


def test_mini_batches_from_a_buffer_are_of_every_class() -> None:
    for batch in mini_batches(5000, 700, 0)[0]:  # rows of a class are neighbours
        assert np.bincount(batch // 500, minlength=10).min() > 0.05 * len(batch)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("memory", [0, 2**28])
def test_a_device_gets_the_same_batches(memory: int, dtype: Any) -> None:
    """Blocks of which it picks rows itself, here on the CPU: the same bits, also where a batch is changed in place."""
    X = np.random.default_rng(0).normal(3, 1, (2000, 9)).astype(dtype)
    rows, budget = np.arange(0, 2000, 2), Budget(memory=memory, buffer=300 * 18, batch_rows=128)
    here, there = (FeatureBatches(X, rows, rows % 7, budget=budget, device=d) for d in (None, torch.device("cpu")))
    picked = np.flatnonzero(np.arange(1000) % 3)

    def everything(data: FeatureBatches) -> list[list[Any]]:
        batches = []
        for source in (data.mini_batches(picked, 100, np.random.default_rng(1)), data.in_order(picked)):
            for x, y in source:
                batches.append([x.clone(), y.clone()])
                x.sub_(5)
        return batches

    for one, other in zip(everything(here), everything(there), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for a, b in zip(here.moments(picked), there.moments(picked), strict=True):
        np.testing.assert_array_equal(a, b)


def test_moments_of_large_features_are_finite_and_right() -> None:
    """Their squares are none in float32; the other columns, and ordinary features, are as they were."""
    X = np.random.default_rng(0).normal(3, 1, (2000, 4)).astype(np.float32)
    X *= np.array([1, 1e25, 1e14, 1e-3], np.float32)
    data = FeatureBatches(X, np.arange(2000), np.arange(2000) % 7, budget=Budget(batch_rows=128))
    mean, deviation = data.moments(np.arange(2000))
    np.testing.assert_allclose(mean, X.astype(np.float64).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(deviation, X.astype(np.float64).std(axis=0), rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_of_large_features_can_be_read_again(kind: Any) -> None:
    X, y = blobs(60)
    head = fit(kind, X.astype(np.float32) * np.float32(1e25), y, settings=TorchSettings(epochs=5)).head
    assert Head.from_tensors(head.kind, head.scaling, head.to_tensors()).dim == X.shape[1]
    usual = fit(kind, X.astype(np.float32), y, settings=TorchSettings(epochs=5)).head
    answers = head.probabilities(X.astype(np.float32) * np.float32(1e25)).argmax(axis=1)
    assert (answers == usual.probabilities(X.astype(np.float32)).argmax(axis=1)).mean() > 0.95
    with np.errstate(over="ignore"), pytest.raises(TrainingError, match="too large for float32"):
        fit(kind, (np.sign(X) * 3e38).astype(np.float32), y, settings=TorchSettings(epochs=1))


def test_early_stopping_takes_few_rows_of_a_large_class() -> None:
    y = np.repeat([0, 1, 2, 3], [2000, 2000, 2, 1])
    source = Recorded(np.random.default_rng(0).normal(size=(len(y), D)).astype(np.float16))
    fit("linear", source, y, budget=Budget(memory=2000, held_out_rows=50, max_rounds=1))
    held_out, _, train = source.reads[:3]  # these fit in memory; then come a first row and all, for mean and deviation
    np.testing.assert_array_equal(np.sort(np.r_[train, held_out]), np.arange(len(y)))
    np.testing.assert_array_equal(np.bincount(y[held_out], minlength=4), [25, 25, 1, 0])


# ------------------------------------------------------------------------------------------- what is computed


def test_features_are_standardised_by_the_training_rows() -> None:
    X, y = blobs(600)
    X[:, 3] = 7
    rows = np.sort(np.random.default_rng(0).choice(600, 200, replace=False))
    exact = X[rows].astype(np.float64)
    for budget in (SHORT, dataclasses.replace(TIGHT, batch_rows=64)):
        head = fit("linear", X, y[rows], rows=rows, budget=budget).head
        np.testing.assert_allclose(head.mean, exact.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(head.scale, np.where(np.arange(D) == 3, 1, exact.std(axis=0)), rtol=1e-5)


def test_small_data_are_trained_as_by_pytorchs_adamw() -> None:
    X, y = blobs(30)  # one batch
    fitted = fit("linear", X, y, budget=Budget(max_rounds=25, patience=25))
    x = torch.from_numpy((X.astype(np.float64) - fitted.head.mean) / fitted.head.scale).float()
    layer = torch.nn.Linear(D, 3)
    layer.load_state_dict({"weight": torch.zeros(3, D), "bias": torch.zeros(3)})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=1e-2)
    assert fitted.chosen["epochs"] > 10
    for _ in range(fitted.chosen["epochs"]):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x), torch.from_numpy(y)).backward()
        optimizer.step()
    ((weight, bias),) = fitted.head.layers
    np.testing.assert_allclose(weight, layer.weight.detach(), atol=1e-5)
    np.testing.assert_allclose(bias, layer.bias.detach(), atol=1e-5)


def plain_network(hidden: tuple[int, ...], dropout: float = 0.0) -> torch.nn.Sequential:
    sizes = [D, *hidden, 3]
    modules: list[torch.nn.Module] = []
    for before, after in pairwise(sizes):
        modules += [torch.nn.Linear(before, after), torch.nn.ReLU(), torch.nn.Dropout(dropout)]
    return torch.nn.Sequential(*modules[:-2])


def standardised(X: np.ndarray, fitted: FittedHead) -> torch.Tensor:
    return torch.from_numpy((X.astype(np.float64) - fitted.head.mean) / fitted.head.scale).float()


@pytest.mark.parametrize("hidden", [(7,), (20, 9), (8, 8, 8)])
def test_layers_rate_and_epochs_are_those_asked_for(hidden: tuple[int, ...]) -> None:
    """PyTorch's AdamW trains a network of that shape to the same head, which computes what the network computes."""
    X, y = blobs(30)
    settings = TorchSettings(hidden, dropout=(0.0,), epochs=20, lr=0.01, batch_size=30)
    fitted = fit("mlp", X, y, settings=settings, seed=4)
    x = standardised(X, fitted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        network = plain_network(hidden)
    torch.nn.init.zeros_(network[-1].weight)
    torch.nn.init.zeros_(network[-1].bias)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=1e-2)
    history = []
    for epoch in range(1, 21):
        optimizer.zero_grad()
        logits = network(x)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        hits = float((logits.argmax(1).numpy() == y).mean())
        history.append({"epoch": epoch, "train_loss": pytest.approx(loss.item(), abs=1e-4), "train_accuracy": hits})
    assert fitted.history == history
    expected = torch.softmax(network(x), 1).detach().numpy()
    np.testing.assert_allclose(fitted.head.probabilities(X), expected, atol=1e-4)
    assert np.abs(expected - 1 / 3).max() > 0.1
    facts = {"scaling": "standardise", "lr": 0.01, "batch_size": 30, "epochs": 20}
    assert fitted.chosen == facts | {"hidden": list(hidden), "dropout": [0.0] * len(hidden)}


def test_a_plain_network_with_the_heads_tensors_gives_its_probabilities() -> None:
    X, y = blobs(120)
    fitted = fit("mlp", X, y, settings=TorchSettings((16, 10), dropout=(0.3, 0.1)))
    network = plain_network((16, 10), dropout=0.5).eval()
    tensors = fitted.head.to_tensors()
    names = {f"{3 * k}.{name}": f"layers.{k}.{name}" for k in range(3) for name in ("weight", "bias")}
    network.load_state_dict({name: torch.from_numpy(tensors[own]) for name, own in names.items()})
    expected = torch.softmax(network(standardised(X, fitted)), 1).detach().numpy()
    np.testing.assert_allclose(fitted.head.probabilities(X), expected, atol=1e-5)


def test_every_dropout_acts_on_its_layer() -> None:
    X, y = blobs(60)
    cases = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.5,)]
    fitted = [fit("mlp", X, y, settings=TorchSettings((9, 9), dropout=each, epochs=3)).head for each in cases]
    heads = [head.logits(X) for head in fitted]
    np.testing.assert_array_equal(heads[3], heads[4])  # one for all
    assert len({head.tobytes() for head in heads}) == 4
    for shares, blind in (((0.0, 1 - 1e-9), True), ((1 - 1e-9, 0.0), False)):
        last = fit("mlp", X, y, settings=TorchSettings((9, 9), dropout=shares, epochs=3)).head.layers[-1][0]
        assert (not last.any()) == blind  # it starts from zeros, and learns only from what it gets to see


@pytest.mark.parametrize("budget", [SHORT, TIGHT])
def test_batch_size_decides_the_steps_of_an_epoch(budget: Budget) -> None:
    X, y = blobs(300)
    moved = {}
    for size in (50, 300, 10_000):
        fitted = fit("linear", X, y, budget=budget, settings=TorchSettings(epochs=1, lr=1e-6, batch_size=size))
        assert fitted.chosen["batch_size"] == min(size, 300)
        moved[size] = np.abs(fitted.head.layers[0][0]).max() / 1e-6  # a step of Adam moves a weight by its rate
    assert moved[300] == pytest.approx(1, rel=0.01)
    assert moved[10_000] == moved[300] or budget is TIGHT
    assert 5 < moved[50] < 8


@pytest.mark.parametrize("epochs", [None, 5])
def test_a_head_that_does_not_stay_finite_is_refused(epochs: int | None) -> None:
    X, y = blobs(60)
    with pytest.raises(TrainingError, match="no longer finite after .* epochs?; try a lower lr than 1e\\+38"):
        fit("mlp", X, y, settings=TorchSettings(lr=1e38, epochs=epochs))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden": (0,)}, "hidden layer 1 must be a whole number from 1 to 65536, found 0"),
        ({"hidden": (8, 2.5)}, "hidden layer 2 .* found 2.5"),
        ({"hidden": ()}, "without any it is clf linear"),
        ({"dropout": (1.0,)}, "dropout must lie between 0 and below 1, found 1.0"),
        ({"dropout": (float("nan"),)}, "dropout must"),
        ({"dropout": (0.1, 0.2)}, "dropout has 2 values for 1 hidden layers; give one, or one per layer"),
        ({"epochs": 0}, "epochs must be a whole number from 1"),
        ({"epochs": True}, "epochs must"),
        ({"batch_size": 10**6}, "batch size must .* found 1000000"),
        ({"lr": 0.0}, "lr must be a positive number, found 0.0"),
        ({"lr": float("nan")}, "lr must"),
        ({"lr": "fast"}, "lr must .* found fast"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TorchSettings(**settings)


def test_training_leaves_the_random_state_alone() -> None:
    X, y = blobs(60)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit("mlp", X, y, folds=2, budget=Budget(max_rounds=2))
    assert torch.equal(torch.rand(3), expected)


def test_linear_head_comes_close_to_the_convex_optimum() -> None:
    X, y = blobs(600, spread=2.5)
    unseen, truth = blobs(600, spread=2.5, seed=5)
    exact, ours = fit_logreg(X, np.arange(600), y, folds=3).head, fit("linear", X, y).head
    limit = metrics.log_loss(truth, exact.probabilities(unseen)) * 1.15
    assert metrics.log_loss(truth, ours.probabilities(unseen)) < limit


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_out_of_core_training_is_as_good(kind: str) -> None:
    X, y = blobs(1200, spread=2.5)
    unseen, truth = blobs(600, spread=2.5, seed=5)
    ours, usual = fit(kind, X, y, budget=TIGHT).head, fit(kind, X, y).head
    limit = metrics.log_loss(truth, usual.probabilities(unseen)) * 1.05
    assert metrics.log_loss(truth, ours.probabilities(unseen)) < limit


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_out_of_core_training_looks_at_the_loss_within_an_epoch(kind: str) -> None:
    X, y = blobs(300)
    budget = dataclasses.replace(TIGHT, round_rows=100, max_rounds=6)
    ours, again = (fit(kind, X, y, seed=3, folds=3, budget=budget) for _ in range(2))
    np.testing.assert_array_equal(ours.head.logits(X), again.head.logits(X))
    assert len(ours.fold_accuracies) == 3
    assert min(ours.fold_accuracies) > 0.8
    assert ours.chosen["epochs"] <= 2  # six rounds, three of them an epoch
    assert ("trained for 2 epochs" in "".join(ours.notes)) == (ours.chosen["epochs"] == 2)


@pytest.mark.parametrize("tight", [False, True], ids=["in memory", "from a buffer"])
def test_the_history_is_what_decided_when_to_stop(tight: bool) -> None:
    """Of the head trained on nine tenths, whose lowest loss on the last one says how long all rows are trained on."""
    X, y = blobs(300, spread=4.0)
    budget = dataclasses.replace(TIGHT, round_rows=100, max_rounds=40, patience=3) if tight else SHORT
    fitted = fit("mlp", X, y, budget=budget)
    losses = [row["held_out_loss"] for row in fitted.history]
    best = int(np.argmin(losses))
    assert fitted.history[best]["epoch"] == fitted.chosen["epochs"]
    assert len(losses) == best + 1 + budget.patience
    assert [row["epoch"] for row in fitted.history[:3]] == ([0.33, 0.67, 1] if tight else [1, 2, 3])
    assert 0.5 < fitted.history[0]["train_loss"] < np.log(3) + 0.1  # from equal probabilities on
    assert all(
        0 <= row["train_accuracy"] <= 1 and (30 * row["held_out_accuracy"]).is_integer() for row in fitted.history
    )
    assert fit("mlp", X, y, budget=budget, folds=3).history == fitted.history  # of no fold


# ------------------------------------------------------------------------------------------------ on which cores


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch's, of which the suite takes one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each step: its thread, and how many cores PyTorch gives it."""
    seen: list[tuple[int, int]] = []

    def step(*args: Any, **options: Any) -> None:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        adamw(*args, **options)

    monkeypatch.setattr("featcache.heads.minibatch.adamw", step)
    return seen


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("cores", [1, 2, 16])
def test_heads_are_trained_side_by_side_to_the_same_bits(
    kind: str, cores: int, steps: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = blobs(120, spread=3.0)
    monkeypatch.setattr("featcache.heads.minibatch.usable_cores", lambda: cores)
    found = fit(kind, X, y, folds=5)
    assert {threads for _, threads in steps} == {1}  # small steps
    assert 1 <= len({thread for thread, _ in steps}) <= min(cores, 6)
    assert cores == 1 or threading.get_ident() not in {thread for thread, _ in steps}
    assert torch.get_num_threads() == 2
    monkeypatch.setattr("featcache.heads.minibatch.usable_cores", lambda: 3)
    other = fit(kind, X, y, folds=5)
    for name, tensor in found.head.to_tensors().items():
        np.testing.assert_array_equal(tensor, other.head.to_tensors()[name])
    np.testing.assert_array_equal(found.out_of_fold, other.out_of_fold)
    # A fold's head is what the other rows train by themselves.
    folds = stratified_folds(y, np.arange(120), folds=5, seed=0)
    for train, held_out in folds[:2]:
        alone = fit(kind, X, y[train], rows=train).head.logits(X[held_out])
        np.testing.assert_allclose(
            alone, found.out_of_fold[held_out] * np.float32(found.temperature), rtol=2e-5, atol=2e-6
        )


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("folds", "tight"), [(0, False), (3, False), (0, True), (3, True)])
@pytest.mark.parametrize("worth", [1, 2**40])
def test_cores_share_large_steps(
    folds: int, tight: bool, worth: int, steps: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.heads.minibatch._WORTH_CORES", worth)
    X, y = blobs(120)
    for cores in (2, 8):
        monkeypatch.setattr("featcache.heads.minibatch.usable_cores", lambda cores=cores: cores)
        steps.clear()
        fit("linear", X, y, folds=folds, budget=dataclasses.replace(TIGHT if tight else SHORT, max_rounds=2))
        one_at_a_time = tight or not folds  # in the thread that asks, with all cores
        share = 2 if worth == 1 and (one_at_a_time or cores == 8) else 1
        assert {threads for _, threads in steps} == {share}
        assert ({thread for thread, _ in steps} == {threading.get_ident()}) == one_at_a_time
        assert torch.get_num_threads() == 2


def test_what_ends_one_head_ends_those_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the thread that asks, which waits; the others would train on, to the last of a thousand epochs."""
    X, y = blobs(120)
    monkeypatch.setattr("featcache.heads.minibatch.usable_cores", lambda: 2)
    training, begun = set[int](), threading.Event()

    def step(*args: Any, **options: Any) -> None:
        training.add(threading.get_ident())
        if len(training) == 2:
            begun.set()
        time.sleep(0.01)
        adamw(*args, **options)

    def interrupt(pool: Any, work: Any, parts: Any) -> Iterator[Any]:
        for part in parts:
            pool.submit(work, part)
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr("featcache.heads.minibatch.adamw", step)
    monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor.map", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fit("linear", X, y, folds=3, settings=TorchSettings(epochs=60_000))
    assert time.monotonic() - started < 100  # it would take ten minutes
    assert not any(thread.name.startswith("featcache-head") for thread in threading.enumerate())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_dropout_is_pytorchs(share: float) -> None:
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    ours, theirs = _Dropout(share, torch.Generator().manual_seed(8)), torch.nn.Dropout(share)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours(x), theirs(x))  # drawn anew
    assert torch.equal(ours.eval()(x), x)
