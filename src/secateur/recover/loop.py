"""Steps and epochs of a training run that is set up: what ``fit_`` goes round in.

The loss is looked at after every step on a CPU, every 20 on a GPU: looking means waiting for it. What was looked at is
what progress shows, what sums to the epoch's loss, and what is found not to be finite.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from secateur.capture import in_mode
from secateur.core import Evaluate
from secateur.errors import BadRequest
from secateur.nests import flatten, unflatten
from secateur.processes import from_main, from_main_, is_main, rank, sum_over_processes_, world
from secateur.recover.checkpoints import write_checkpoint
from secateur.recover.interruption import Interruption
from secateur.recover.objectives import Objective, check_targets, mix, right
from secateur.recover.randomness import kept_randomness
from secateur.recover.rates import rate
from secateur.recover.reading import Batch, Data, cut, examples_of, read
from secateur.recover.state import (
    Epoch,
    Job,
    all_randomness,
    are_finite,
    copied,
    kept_weights,
    set_all_randomness,
    set_tensors_,
)

LOG_EVERY = 50


@dataclass
class Loop:
    """A job and what is at hand only while it runs. ``pending``: loss, right answers and size of every batch since the
    loss was last looked at, after step ``looked``. ``good``: the step and the weights to fall back on. ``images`` of
    this epoch ``since`` a moment. ``begun``: a step was made. ``stop``: a process was asked to."""

    job: Job
    data: Data
    objective: Objective
    evaluate: Evaluate | None
    noted: Interruption
    is_usual: bool = True
    classes: int | None = None
    pending: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    good: tuple[int, dict[str, Tensor]] = (0, {})
    facts: dict[str, float] = field(default_factory=dict)
    looked: int = 0
    images: float = 0.0
    since: float = 0.0
    begun: bool = False
    stop: bool = False


def train(loop: Loop, *, resumed: bool = False) -> list[Epoch]:
    """Every epoch that is left; the model then has the weights that are to be kept."""
    job, state = loop.job, loop.job.state
    loop.good, loop.looked = (state.step, copied(kept_weights(job))), state.step
    if state.history and state.history[-1].score is not None:
        loop.facts["score"] = state.history[-1].score
    if resumed:
        _tell(job, {"kind": "resumed", "step": state.step, "epoch": state.epoch})
    while state.epoch < job.epochs:
        _epoch(loop)
        if loop.stop:
            _interrupt(loop)
    if job.training.keep == "best" and state.best is not None:
        set_tensors_(job.model, state.best)
    elif job.average is not None:
        set_tensors_(job.model, kept_weights(job))
    return list(state.history)


def _epoch(loop: Loop) -> None:
    job, state = loop.job, loop.job.state
    reading = _begin(loop)
    job.model.train()
    if job.training.freeze_norms:
        _freeze_norms(job.model)
    loop.images, loop.since = 0.0, time.perf_counter()
    while batches := list(itertools.islice(reading, job.training.accumulate)):
        _step(loop, batches)
        # alone, and with every loss looked at, there is nobody to agree with
        if loop.stop or (world() == 1 and loop.noted.asked and not loop.pending):
            _checkpoint(loop)
            _interrupt(loop)
        if state.step % job.run.every == 0 and state.batch < job.batches:
            _checkpoint(loop)
    _call(job, "after_epoch")
    _end(loop)


def _freeze_norms(model: nn.Module) -> None:
    """Batch norms in eval mode: torch's, and whatever else owns running statistics, as in a rewritten graph."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        elif dict(module.named_buffers(recurse=False)).get("running_mean") is not None:
            module.training = False  # alone: what lies inside of it may be no norm


def _begin(loop: Loop) -> Iterator[Batch]:
    """The batches that are left of this epoch. What was done of it before an interruption is passed over under the
    epoch's own random state; then that of the checkpoint is put back."""
    job, state = loop.job, loop.job.state
    if state.begun is None or state.batch == 0:
        state.begun = all_randomness(job)
        return read(loop.data, state.epoch, 0, job.batches, job.stream)
    now = all_randomness(job)
    set_all_randomness(job, state.begun)
    reading = read(loop.data, state.epoch, state.batch, job.batches, job.stream)
    set_all_randomness(job, now)
    return reading


def _step(loop: Loop, batches: list[Batch]) -> None:
    job, state, training = loop.job, loop.job.state, loop.job.training
    scaler = job.accelerator.scaler
    for group in job.optimizer.param_groups:
        group["lr"] = rate(training, state.step, job.steps_per_epoch)
    total = examples_of(batches, job.device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        # gradients are shared once, with the last batch of the step
        with nullcontext() if last or job.net is job.model else job.net.no_sync():  # type: ignore[operator]
            loss = _loss(loop, batch, index)
            share = batch.size * world() / total
            if not isinstance(share, float) or share != 1:
                loss = loss * share
            for hook in job.hooks if last else ():
                if hook.penalty is not None:
                    loss = loss + hook.penalty(job.model)
            (loss if scaler is None else scaler.scale(loss)).backward()
    if not loop.begun:
        _check_all_reached(job)
        loop.begun = True
    state.batch += len(batches)
    _look(loop)
    _update(job)
    state.step += 1
    if job.average is not None:
        job.average.update_parameters(job.model)
    if job.run.progress is not None and is_main():
        job.run.progress(state.step, job.steps, dict(loop.facts))
    if state.step % LOG_EVERY == 0:
        facts = {**loop.facts, "loss": state.sums[0] / state.sums[2]}
        _tell(job, {"kind": "step", "step": state.step, "epoch": state.epoch + 1, "lr": _lr(job), **facts})


def _update(job: Job) -> None:
    """From gradients to weights."""
    scaler = job.accelerator.scaler
    if scaler is not None:
        scaler.unscale_(job.optimizer)
    _call(job, "after_backward")
    if job.training.clip is not None:
        nn.utils.clip_grad_norm_(job.model.parameters(), job.training.clip)
    if scaler is None:
        job.optimizer.step()
    else:
        scaler.step(job.optimizer)
        scaler.update()
    job.optimizer.zero_grad(set_to_none=True)
    _call(job, "after_step")


def _loss(loop: Loop, batch: Batch, index: int) -> Tensor:
    """The mean loss over this process's part of a batch; what it came to is noted."""
    job, training = loop.job, loop.job.training
    inputs, targets = _moved(batch.inputs, job.device), _moved(batch.targets, job.device)
    given = batch.targets.device.type  # looking at what is on a GPU is waiting for it
    if training.mixup > 0:
        if loop.classes is None:
            loop.classes = _classes(loop, inputs, targets)
        # whatever the objective: class indices become probabilities here
        if given == "cpu" and (loop.is_usual or targets.ndim == 1):
            check_targets(batch.targets, loop.classes)
        seed = (training.seed, job.state.step, index, rank())
        inputs, targets = mix(inputs, targets, loop.classes, alpha=training.mixup, seed=seed)
    elif loop.is_usual and loop.classes is not None and given == "cpu" != job.device.type:
        check_targets(batch.targets, loop.classes)
    with job.accelerator.autocast():
        loss, scores = loop.objective(job.net, inputs, targets)
    loop.classes = scores.shape[1]
    if batch.size:
        loop.pending.append((loss.detach(), right(scores, targets), batch.size))
    return loss


def _classes(loop: Loop, inputs: Any, targets: Tensor) -> int:
    """How many classes the model scores, which probabilities for targets need to know: one example is run to see."""
    job = loop.job
    first = slice(0, 1)
    with in_mode(job.model, False), kept_randomness(job.device), torch.no_grad(), job.accelerator.autocast():
        _, scores = loop.objective(job.model, cut(inputs, len(targets), first), targets[first])
    return scores.shape[1]


def _moved(value: Any, device: torch.device) -> Any:
    tensors, skeleton = flatten(value)
    if all(tensor.device == device for tensor in tensors):
        return value
    return unflatten(skeleton, [tensor.to(device, non_blocking=True) for tensor in tensors])


def _look(loop: Loop) -> None:
    """Where it is time: what the last steps came to, over all processes."""
    job, state = loop.job, loop.job.state
    done = state.step + 1
    due = (
        done % looks_every(job.device) == 0
        or done % LOG_EVERY == 0
        or done % job.run.every == 0
        or state.batch >= job.batches
    )
    if not due and not (world() == 1 and loop.noted.asked):
        return
    sizes = [size for _, _, size in loop.pending]
    losses = torch.stack([loss for loss, _, _ in loop.pending]).tolist() if sizes else []
    rights = torch.stack([count for _, count, _ in loop.pending]).tolist() if sizes else []
    loss_sum = math.fsum(loss * size for loss, size in zip(losses, sizes, strict=True))
    news = _summed([loss_sum, float(sum(rights)), float(sum(sizes)), float(loop.noted.asked)], job.device)
    loop.pending.clear()
    if not math.isfinite(news[0]):
        first = loop.looked + 1
        _lost(loop, f"the loss is {news[0]}", f"at step {done}" if first == done else f"in steps {first} to {done}")
    loop.looked, loop.stop = done, news[3] > 0
    state.sums = [a + b for a, b in zip(state.sums, news, strict=False)]
    loop.images += news[2]
    loop.facts |= {
        "loss": news[0] / news[2],
        "accuracy": state.sums[1] / state.sums[2],
        "images_per_s": loop.images / (time.perf_counter() - loop.since),
    }


def looks_every(device: torch.device) -> int:
    """Steps from one look at the loss to the next: where the CPU computes it, it is there anyway."""
    return 1 if device.type == "cpu" else 20


def _summed(values: list[float], device: torch.device) -> list[float]:
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    sum_over_processes_([tensor])
    return tensor.tolist()


def _end(loop: Loop) -> None:
    """An epoch is over: evaluate, note, keep."""
    job, state = loop.job, loop.job.state
    _settle(loop)
    score = _score(loop)
    epoch = Epoch(state.epoch + 1, state.sums[0] / state.sums[2], state.sums[1] / state.sums[2], score)
    state.history.append(epoch)
    if score is not None and job.training.keep == "best":
        # a score that is no number is the worst of all
        if state.best is None or _height(score) > _height(state.best_score):
            state.best_score, state.best = score, copied(kept_weights(job))
    state.epoch, state.batch, state.sums, state.begun = state.epoch + 1, 0, [0.0, 0.0, 0.0], None
    write_checkpoint(job)
    record = {"kind": "epoch", "step": state.step, "epoch": epoch.number, "lr": _lr(job)}
    scored = {} if score is None else {"score": score}
    _tell(job, record | {"loss": epoch.loss, "accuracy": epoch.train_accuracy} | scored)
    loop.stop = _summed([float(loop.noted.asked)], job.device)[0] > 0


def _score(loop: Loop) -> float | None:
    if loop.evaluate is None:
        return None
    job = loop.job
    model = job.model if job.average is None else job.average.module
    model.eval()
    with kept_randomness(job.device):
        score = from_main(float(loop.evaluate(model)))
    loop.facts["score"] = score
    return score


def _height(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score


def _checkpoint(loop: Loop) -> None:
    if loop.job.run.folder is not None:
        _settle(loop)
        write_checkpoint(loop.job)


def _settle(loop: Loop) -> None:
    """The same buffers in all processes, and weights that are worth falling back on."""
    job = loop.job
    models = [job.model] if job.average is None else [job.model, job.average.module]
    for model in models if world() > 1 else ():
        from_main_(buffer for buffer in model.buffers() if buffer.numel())
    if not are_finite(p for p in job.model.parameters() if p.requires_grad):
        _lost(loop, "a weight is no longer finite", f"after step {job.state.step}")
    loop.good = job.state.step, copied(kept_weights(job))


def _lost(loop: Loop, what: str, when: str) -> NoReturn:
    """Back to the last good weights, with an error that says so."""
    job, training = loop.job, loop.job.training
    step, weights = loop.good
    set_tensors_(job.model, weights)
    advice = ["lower lr"] + ["set clip=1.0"] * (training.clip is None)
    advice += ["use precision='fp32'"] * (training.precision != "fp32") + ["look for inputs that are not finite"]
    folder = f" ({job.run.folder} holds a run with these settings: take another)" if job.run.folder is not None else ""
    raise BadRequest(
        f"{what} {when} of {job.steps} (epoch {job.state.epoch + 1}, lr {_lr(job):.3g}): training stopped, and the "
        f"model has its weights of {'the start' if step == 0 else f'step {step}'} again\n"
        f"  do: {', '.join(advice[:-1])}{folder}, or {advice[-1]}"
    )


def _interrupt(loop: Loop) -> NoReturn:
    job = loop.job
    where = "" if job.run.folder is None else f"; the same call goes on from {job.run.folder}"
    raise KeyboardInterrupt(f"training was interrupted after step {job.state.step} of {job.steps}{where}")


def _check_all_reached(job: Job) -> None:
    """Several processes wait for the gradient of every parameter that learns, forever for one that has none."""
    if job.net is job.model:
        return
    missed = [name for name, p in job.model.named_parameters() if p.requires_grad and p.grad is None]
    if missed:
        raise BadRequest(
            f"the loss does not depend on {missed[0]!r}" + (f" and {len(missed) - 1} more" if missed[1:] else "") + ", "
            "and several processes cannot train what has no gradient\n  do: set requires_grad=False there"
        )


def _call(job: Job, name: str) -> None:
    for hook in job.hooks:
        act = getattr(hook, name)
        if act is not None:
            act(job.model)


def _lr(job: Job) -> float:
    return job.optimizer.param_groups[0]["lr"]


def _tell(job: Job, record: dict[str, Any]) -> None:
    if job.run.log is not None and is_main():
        job.run.log(record)
