import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, distributed, nn

from revnet import AdditiveCoupling, ReversibleSequence
from revnet.reversible import ReconstructionError, ReconstructionWarning, Watch
from revnet.training import Classifier, DriftGuard
from tests.training.tiny import CLASSES, tiny_batches, tiny_network

Fit = Callable[..., pl.Trainer]
CALM, DRIFTS, EXPLODES = 1.0, 1e5, 1e8  # reconstruction errors of about 1e-7, 1e-2 and 1


class Branch(nn.Module):
    """Its output is scaled by `gain`; far above 1 the half that it is added to is lost in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.gain = CALM

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.conv(x).float().tanh()


class Network(nn.Module):
    """Two reversible sequences, `body.0` and `body.1`, of which the second can be made to explode."""

    def __init__(self, activations: str = "reconstruct", exact: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        layers = [[AdditiveCoupling(Branch())] for _ in range(2)]
        self.body = nn.ModuleList(ReversibleSequence(part, activations, exact) for part in layers)
        self.head = nn.Sequential(nn.Flatten(), nn.LayerNorm(128), nn.Linear(128, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        halves = self.stem(images), -self.stem(images)
        for sequence in self.body:
            halves = sequence(*halves)
        return self.head(torch.cat(halves, dim=1))


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
AdamW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.01)


def classifier(network: nn.Module | None = None, optimizer: Any = SGD) -> Classifier:
    return Classifier(Network() if network is None else network, optimizer)


class Course(pl.Callback):
    """Sets the gain of every batch, and remembers what stood in the network and the optimizer before and after it."""

    def __init__(self, *gains: float) -> None:
        self.gains = gains
        self.weights: list[list[Tensor]] = []
        self.states: list[Any] = []
        self.activations: list[list[Any]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._remember(trainer, pl_module)
        pl_module.network.body[1][0].branch.gain = self.gains[batch_idx]

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._remember(trainer, pl_module)

    def _remember(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.network.parameters()])
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
        self.activations.append([sequence.activations for sequence in pl_module.network.body])

    def changes(self) -> list[tuple[bool, bool]]:
        """For every batch, whether weights and the optimizer's state are other bits after it."""
        return [
            tuple(not _same(values[batch], values[batch + 1]) for values in (self.weights, self.states))
            for batch in range(len(self.weights) - 1)
        ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return all(map(_same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@contextmanager
def warned() -> Iterator[list[str]]:
    """What the reconstruction warnings say; any other warning is an error (`pytest.warns` would hide Lightning's)."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=ReconstructionWarning)
        yield messages
    messages += [str(warning.message) for warning in caught]


BOTH, NEITHER = (True, True), (False, False)


STEPS = {
    "sgd": (SGD, None),
    "nesterov": (partial(SGD, nesterov=True), None),
    "adamw": (AdamW, None),
    "fused": (partial(AdamW, fused=True), None),
    "sgd-bf16": (SGD, "bf16-mixed"),
    "sgd-fp16": (SGD, "16-mixed"),
    "adamw-fp16": (AdamW, "16-mixed"),
    "fused-fp16": (partial(AdamW, fused=True), "16-mixed"),
}


@pytest.mark.parametrize(
    ("step", "clip"),
    # Lightning refuses to clip what a fused optimizer unscales.
    [(step, clip) for step in STEPS for clip in (None, "norm", "value") if clip is None or step != "fused-fp16"],
)
def test_a_step_beyond_the_threshold_changes_nothing_and_the_next_one_stores(
    fit: Fit, step: str, clip: str | None
) -> None:
    optimizer, precision = STEPS[step]
    network, guard, course = Network(), DriftGuard(fall_back_above=0.1), Course(CALM, EXPLODES, EXPLODES, CALM)
    settings: Any = {} if clip is None else {"gradient_clip_val": 0.5, "gradient_clip_algorithm": clip}
    if precision is not None:
        # By its name Lightning would replace fp16 by bf16 on a CPU; at a small scale no gradient here overflows.
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if precision == "16-mixed" else None
        settings["plugins"] = MixedPrecision(precision, "cpu", scaler)
    with warned() as messages:
        trainer = fit(classifier(network, optimizer), callbacks=[guard, course], max_epochs=1, **settings)
    assert course.changes() == [BOTH, NEITHER, BOTH, BOTH]
    assert course.activations == [["reconstruct", "reconstruct"]] * 2 + [["reconstruct", "store"]] * 3
    assert all(p.isfinite().all() for p in network.parameters())
    assert guard.fallen_back == ["body.1"]
    assert trainer.gradient_clip_val == settings.get("gradient_clip_val")
    (message,) = messages
    assert re.search(
        r"'body\.1' is [6-9]\.\de-01 off .* fall_back_above=0\.1: step 2 is not applied.*stores.*exact=True", message
    )


@pytest.mark.parametrize("gains", [(CALM, CALM, EXPLODES, CALM), (CALM, CALM, CALM, EXPLODES)])
def test_one_of_the_accumulated_batches_is_enough(fit: Fit, gains: tuple[float, ...]) -> None:
    course, guard = Course(*gains), DriftGuard(fall_back_above=0.1)
    with warned() as messages:
        fit(classifier(), callbacks=[guard, course], max_epochs=1, accumulate_grad_batches=2)
    assert [bool(re.search(r"step 2 is not applied", message)) for message in messages] == [True]
    assert course.changes() == [NEITHER, BOTH, NEITHER, NEITHER]
    assert course.activations[-1] == ["reconstruct", "store"]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_exception"])
def test_what_an_accumulated_batch_has_found_is_kept_over_a_stop(fit: Fit, hook: str) -> None:
    states: list[dict[str, Any]] = []

    class Stop(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            self.save("on_train_batch_end")
            raise InterruptedError

        def on_exception(self, *args: Any) -> None:
            self.save("on_exception")

        def save(self, place: str) -> None:
            states.extend([copy.deepcopy(first.state_dict())] if place == hook else [])

    first, again = DriftGuard(fall_back_above=0.1), DriftGuard(fall_back_above=0.1)
    settings: Any = {"max_epochs": 1, "accumulate_grad_batches": 2}
    with pytest.raises(InterruptedError):
        fit(classifier(), callbacks=[first, Course(*[EXPLODES] * 4), Stop()], **settings)
    (state,) = states
    assert state["largest"]["body.1"] > 0.1
    again.load_state_dict(state)
    course = Course(*[CALM] * 4)
    with warned() as messages:
        fit(classifier(), callbacks=[again, course], **settings)
    assert [bool(re.search(r"step 1 is not applied", message)) for message in messages] == [True]
    assert course.changes() == [NEITHER, NEITHER, NEITHER, BOTH]
    assert again.state_dict() == {"fallen_back": ["body.1"], "largest": {}}


@pytest.mark.parametrize("gain", [math.nan, math.inf])
@pytest.mark.parametrize("threshold", [0.1, math.inf])
def test_an_error_that_is_not_finite_is_beyond_every_threshold(fit: Fit, gain: float, threshold: float) -> None:
    course = Course(CALM, gain, CALM, CALM)
    with warned() as messages:
        fit(classifier(), callbacks=[DriftGuard(fall_back_above=threshold), course], max_epochs=1)
    assert [bool(re.search(r"'body\.1' is inf off", message)) for message in messages] == [True]
    assert course.changes() == [BOTH, NEITHER, BOTH, BOTH]


@pytest.mark.parametrize("scales", [(1.0, 1e-4), (1e-4, 1.0)])  # of small inputs the relative error is larger
def test_a_sequence_that_runs_twice_in_a_step_is_judged_by_the_worse_run(fit: Fit, scales: tuple[float, ...]) -> None:
    class Twice(Network):
        def forward(self, images: Tensor) -> Tensor:
            x = self.stem(images)
            return self.head(sum(torch.cat(self.body[1](scale * x, scale * x), dim=1) for scale in scales))

    course = Course(*[CALM] * 4)
    with warned() as messages:
        fit(classifier(Twice()), callbacks=[DriftGuard(fall_back_above=1e-6), course], max_epochs=1)
    assert [bool(re.search(r"'body\.1' .* step 1 is not applied", message)) for message in messages] == [True]
    assert course.changes() == [NEITHER, BOTH, BOTH, BOTH]
    assert course.activations[-1] == ["reconstruct", "store"]


def test_a_sequence_that_is_switched_back_starts_afresh(fit: Fit) -> None:
    class Back(Course):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                pl_module.network.body[1].activations = "reconstruct"
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    course, guard = Back(EXPLODES, CALM, CALM, EXPLODES), DriftGuard(fall_back_above=0.1)
    with warned() as messages:
        fit(classifier(), callbacks=[guard, course], max_epochs=1)
    assert course.changes() == [NEITHER, BOTH, BOTH, NEITHER]
    assert [re.search(r"step \d", message)[0] for message in messages] == ["step 1", "step 4"]
    assert guard.fallen_back == ["body.1"]


@pytest.mark.parametrize(("gain", "threshold"), [(DRIFTS, 0.5), (EXPLODES, 1e4)])
def test_up_to_the_threshold_steps_are_applied_and_the_sequence_warns(fit: Fit, gain: float, threshold: float) -> None:
    guard, course = DriftGuard(fall_back_above=threshold), Course(gain, CALM, CALM, CALM)
    with warned() as messages:
        fit(classifier(), callbacks=[guard, course], max_epochs=1)
    assert [bool(re.search("its gradients are inaccurate", message)) for message in messages] == [True]
    assert course.changes() == [BOTH] * 4
    assert guard.fallen_back == []


def test_an_exact_sequence_that_leaves_its_range_falls_back_too(fit: Fit) -> None:
    network, course = Network(exact=True), Course(CALM, DRIFTS, EXPLODES, CALM)
    with warned() as messages:
        fit(classifier(network), callbacks=[DriftGuard(fall_back_above=0.1), course], max_epochs=1)
    assert ["is not applied" in message for message in messages] == [False, True]
    assert all("range of the fixed-point grid" in message and "exact=True" not in message for message in messages)
    assert course.changes() == [BOTH, BOTH, NEITHER, BOTH]
    assert course.activations[-1] == ["reconstruct", "store"]


def test_clipping_is_as_it_was_after_a_step_that_is_left_out_and_raises(fit: Fit) -> None:
    class Raises(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            self.trainer = trainer
            assert trainer.gradient_clip_val is None
            raise ArithmeticError("planned")

    raises = Raises()
    callbacks = [DriftGuard(fall_back_above=0.1), raises, Course(EXPLODES)]
    with warned(), pytest.raises(ArithmeticError, match="planned"):
        fit(classifier(), callbacks=callbacks, max_epochs=1, gradient_clip_val=0.5)
    assert raises.trainer.gradient_clip_val == 0.5


def test_what_falls_back_is_logged(fit: Fit) -> None:
    entries = []

    class Recorder(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            entries.append((step, metrics))

    guard, course = DriftGuard(fall_back_above=0.1), Course(CALM, EXPLODES, CALM, CALM)
    with warned():
        fit(classifier(), callbacks=[guard, course], logger=Recorder(), max_epochs=1)
    ((step, metrics),) = [entry for entry in entries if "sequences_fallen_back" in entry[1]]
    assert step == 2
    assert metrics.keys() == {"reconstruction_error/body.1", "sequences_fallen_back"}
    assert metrics["reconstruction_error/body.1"] > 0.1
    assert metrics["sequences_fallen_back"] == 1


@pytest.mark.parametrize("threshold", [0.1, None])
def test_a_resumed_training_goes_on_storing(fit: Fit, tmp_path: Path, threshold: float | None) -> None:
    first = [DriftGuard(fall_back_above=0.1), Course(CALM, EXPLODES, CALM, CALM)]
    with warned():
        trainer = fit(classifier(), callbacks=first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert saved["DriftGuard"] == {"fallen_back": ["body.1"], "largest": {}}
    guard, course = DriftGuard(fall_back_above=threshold), Course(*[EXPLODES] * 4)
    fit(classifier(), callbacks=[guard, course], max_epochs=2, ckpt=tmp_path / "last.ckpt")
    assert course.activations == [["reconstruct", "store"]] * 5
    assert course.changes() == [BOTH] * 4
    assert guard.state_dict() == saved["DriftGuard"]


class Thresholds(pl.Callback):
    """Those that hold while the training runs."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen = [(sequence.watch.warn_above, sequence.watch.raise_above) for sequence in pl_module.network.body]


@pytest.mark.parametrize(
    ("given", "first", "second"),
    [
        ({}, (None, None), (0.3, 0.4)),
        ({"warn_above": 0.1}, (0.1, None), (0.1, 0.4)),
        ({"warn_above": 0, "raise_above": 2}, (0, 2), (0, 2)),
        ({"fall_back_above": 0.2}, (None, math.inf), (0.3, math.inf)),
        ({"warn_above": 0.1, "fall_back_above": 0.2}, (0.1, math.inf), (0.1, math.inf)),
    ],
)
@pytest.mark.filterwarnings("ignore::revnet.reversible.ReconstructionWarning")  # at threshold 0
def test_thresholds_hold_while_the_training_runs(fit: Fit, given: Any, first: Any, second: Any) -> None:
    network, thresholds = Network(), Thresholds()
    network.body[1].watch = Watch(0.3, 0.4)
    own = [sequence.watch for sequence in network.body]
    fit(classifier(network), callbacks=[DriftGuard(**given), thresholds], max_epochs=1)
    assert thresholds.seen == [first, second]
    assert all(sequence.watch is watch for sequence, watch in zip(network.body, own, strict=True))


@pytest.mark.parametrize(("raise_above", "gain"), [(None, EXPLODES), (1e-4, DRIFTS)])
def test_beyond_raise_above_no_gradient_is_written(fit: Fit, raise_above: float | None, gain: float) -> None:
    network, guard = Network(), DriftGuard(raise_above=raise_above)
    own = network.body[1].watch
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(ReconstructionError, match=f"threshold of {raise_above or 0.1:.1e}"):
        fit(classifier(network), callbacks=[guard, Course(gain)], max_epochs=1)
    assert all(p.grad is None for part in (network.stem, network.body) for p in part.parameters())
    assert _same(before, list(network.parameters()))
    assert network.body[1].watch is own


@pytest.mark.parametrize("build", [tiny_network, partial(Network, "store"), partial(Network, "recompute")])
def test_where_nothing_is_reconstructed_nothing_happens(fit: Fit, build: Callable[[], nn.Module]) -> None:
    results = []
    for callbacks in ([], [DriftGuard(fall_back_above=0.0)]):
        torch.manual_seed(1)
        network = build()
        fit(classifier(network), callbacks=callbacks, max_epochs=1)
        results.append(list(network.parameters()))
    assert _same(*results)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warn_above": -0.1}, r"warn_above=-0\.1: give a relative error, at least 0, or None"),
        ({"raise_above": math.nan}, r"raise_above=nan: give"),
        ({"fall_back_above": "much"}, r"fall_back_above='much': give"),
        ({"raise_above": 1.0, "fall_back_above": 0.1}, r"raise_above=1\.0 and fall_back_above=0\.1: .* one of the two"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DriftGuard(**given)


def test_a_strategy_that_keeps_the_gradients_is_refused(fit: Fit) -> None:
    class Engine(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(ValueError, match=r"fall_back_above=0\.1: Engine keeps the gradients .* raise_above instead"):
        fit(classifier(), callbacks=[DriftGuard(fall_back_above=0.1)], strategy=Engine(torch.device("cpu")))


def train_as_one_of_two(culprit: int, gain: float, options: dict[str, Any]) -> tuple[Any, ...]:
    network = Network()
    course = Course(CALM, gain if distributed.get_rank() == culprit else CALM, CALM, CALM)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(cluster_environment=TorchElasticEnvironment(), **options),
        callbacks=[DriftGuard(fall_back_above=0.7), course],  # above the mean of the two processes
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with warned() as messages:
        trainer.fit(classifier(network), tiny_batches(4))
    said = sum("step 2 is not applied" in message for message in messages)
    return course.changes(), course.activations, [p.tolist() for p in network.parameters()], said


@pytest.mark.parametrize(
    ("culprit", "gain", "options"),
    [(0, EXPLODES, {}), (1, EXPLODES, {"static_graph": True}), (0, math.nan, {}), (1, math.nan, {})],
)
def test_two_processes_fall_back_together(
    together: Callable[..., list[Any]], culprit: int, gain: float, options: dict[str, Any]
) -> None:
    results = together(train_as_one_of_two, culprit, gain, options)
    for changes, activations, _, _ in results:
        assert changes == [BOTH, NEITHER, BOTH, BOTH]
        assert activations == [["reconstruct", "reconstruct"]] * 2 + [["reconstruct", "store"]] * 3
    assert results[0][2] == results[1][2]
    assert [said for _, _, _, said in results] == [1, 0]
