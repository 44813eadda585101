"""The training loop: one process or many, any precision, interrupted or not, the same weights come out.

Your own loop is as good, since a pruned network is an ordinary module and what methods do inside a loop is ``Hooks``.

In several processes each works on its part of every batch, and its loss is weighted so that the gradients are those of
the whole batch also where the parts are not even: ``W`` processes give the weights that one gives, to rounding, as long
as examples do not see each other. Batch norm makes them: its statistics are those of each process's part, so that a
batch of 256 on 8 processes is normalised in 8 groups of 32 (as in any data-parallel training without synchronised batch
norm); running statistics are made equal, the main process's, at every checkpoint and at the end of an epoch. Mixup
mixes within a process's part.

Shapes: ``B`` examples, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from secateur.core import Evaluate
from secateur.errors import BadRequest
from secateur.processes import rank
from secateur.recover.accelerated import accelerated, over_processes
from secateur.recover.checkpoints import resume_
from secateur.recover.hooks import Hooks
from secateur.recover.interruption import interruptible
from secateur.recover.loop import Loop, train
from secateur.recover.objectives import Objective, cross_entropy
from secateur.recover.randomness import Stream, kept_randomness, seed_all
from secateur.recover.reading import Data, batches_in, check_data, generators
from secateur.recover.settings import Training, check_training
from secateur.recover.state import Epoch, Job, Log, Progress, Run

__all__ = ["Epoch", "Log", "Progress", "Run", "fit_", "parameter_groups"]


def fit_(
    model: nn.Module,
    data: Data,
    training: Training | None = None,
    *,
    evaluate: Evaluate | None = None,
    objective: Objective | None = None,
    hooks: Hooks | Sequence[Hooks] = (),
    run: Run | None = None,
) -> list[Epoch]:
    """Trains ``model`` in place and returns what each epoch gave; the model ends in eval mode, on the device it was on.

    ``data``: batches of ``(inputs, targets [B])`` that obey ``core.Epochs``, a DataLoader, or anything else that can
    be read once an epoch. ``evaluate`` is called after every epoch, in all processes, on the plain model in eval mode;
    it must not be the test set if ``keep="best"``. ``objective``: by default cross-entropy of scores ``[B, K]``.
    ``hooks`` act on the plain model. With ``run.folder`` the same call after a crash goes on where the last checkpoint
    was, and on the CPU in one process ends with the same weights, bit for bit (but what a DataLoader's
    ``persistent_workers`` drew cannot be saved). Global random states are left as they were found.

    Ctrl-C finishes the step, writes a checkpoint if there is a folder, and raises KeyboardInterrupt. After it, and
    after whatever ``evaluate``, ``objective``, ``hooks`` or ``data`` raise, the weights stay as they are then; after
    any error the train or eval mode of every module and the gradients are those from before the call.

    Raises BadRequest for settings or data out of range and for a loss that is no longer finite (the model then has the
    weights of the last checkpoint or epoch), MissingExtra without Accelerate, WrongModel or BadArtifact for a
    checkpoint of another network or a damaged one.

    >>> history = fit_(model, loader, Training(epochs=10, lr=0.05), evaluate=accuracy_on_validation)  # doctest: +SKIP
    """
    training, run = training or Training(), run or Run()
    hooks = (hooks,) if isinstance(hooks, Hooks) else tuple(hooks)
    _check(model, data, training, evaluate, run)
    with accelerated(training.precision, cpu=run.cpu) as accelerator, ExitStack() as stack:
        device = accelerator.device
        stack.enter_context(kept_randomness(device))
        stack.enter_context(_on_device(model, device))
        seed_all(training.seed, rank())
        stream = Stream(training.seed)
        with stream.used():
            batches = batches_in(data)
        stream = Stream(training.seed)
        seed_all(training.seed, rank())
        job = Job(
            model=model,
            net=over_processes(model, device),
            training=training,
            run=run,
            hooks=hooks,
            accelerator=accelerator,
            optimizer=_optimizer(model, training),
            average=_average(model, training),
            stream=stream,
            generators=generators(data),
            device=device,
            batches=batches,
        )
        noted = stack.enter_context(interruptible())
        resumed = run.folder is not None and resume_(job)
        usual = cross_entropy(training.label_smoothing)
        loop = Loop(job, data, objective or usual, evaluate, noted, is_usual=objective is None)
        return train(loop, resumed=resumed)


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_norms: bool = False) -> list[dict[str, Any]]:
    """Parameters that learn, in two groups: those that decay, and those of one axis (biases, norms), which do not
    unless ``decay_norms``."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": weight_decay if decay_norms else 0.0},
    ]


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    groups = parameter_groups(model, training.weight_decay, decay_norms=training.decay_norms)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr, betas=(training.momentum, 0.999))
    return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, nesterov=training.momentum > 0)


def _average(model: nn.Module, training: Training) -> torch.optim.swa_utils.AveragedModel | None:
    """A moving average of every tensor: running statistics of batch norm too, which belong to the averaged weights.
    Of what is not floating (a table of indices, batch norm's counter) there is no mean: the average has what is now."""
    if training.ema is None:
        return None
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    mean = get_ema_multi_avg_fn(training.ema)

    def update(averaged: Any, current: Any, count: Any) -> None:
        # lists of one dtype each, and torch's own function truncates the means of whole numbers
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            mean(averaged, current, count)
        else:
            for kept, now in zip(averaged, current, strict=True):
                kept.copy_(now)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


@contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """``model`` on ``device`` without gradients for the block; afterwards where it was, in eval mode, without
    gradients. After an error every module's mode and the gradients are those from before."""
    home = next(iter([*model.parameters(), *model.buffers()])).device
    modes = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters()}
    try:
        model.zero_grad(set_to_none=True)  # what is left of a backward of the user's is no part of the first step
        model.to(device)
        yield
        model.eval()
        modes, gradients = {}, {}
    finally:
        model.zero_grad(set_to_none=True)
        model.to(home)
        for module, mode in modes.items():
            module.training = mode
        for p, gradient in gradients.items():
            p.grad = gradient


def _check(model: nn.Module, data: Data, training: Training, evaluate: Evaluate | None, run: Run) -> None:
    check_training(training)
    check_data(data)
    if training.keep == "best" and evaluate is None:
        raise BadRequest("keep='best' has nothing to choose by\n  do: pass evaluate=, a function of the model")
    if isinstance(run.every, bool) or not isinstance(run.every, int) or run.every < 1:
        raise BadRequest(f"checkpoints every {run.every!r} steps cannot be\n  do: every is a whole number, at least 1")
    learning = [p for p in model.parameters() if p.requires_grad]
    if not learning:
        raise BadRequest("no parameter of the model learns\n  do: set requires_grad on those that should")
    devices = sorted({str(t.device) for t in [*model.parameters(), *model.buffers()]})
    if len(devices) > 1:
        raise BadRequest(f"the model lies on several devices ({', '.join(devices)})\n  do: move it to one first")
