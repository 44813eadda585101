"""Winning back what pruning cost: training at any scale, its hooks, and what needs no training."""

from secateur.recover.accelerated import join_processes
from secateur.recover.batchnorm import Step, recalibrate_
from secateur.recover.compensation import Compensation, compensate_
from secateur.recover.distillation import distil
from secateur.recover.hooks import Hooks
from secateur.recover.objectives import Objective, cross_entropy
from secateur.recover.reconstruction import Fit
from secateur.recover.settings import Training
from secateur.recover.tensorboard import tensorboard_log
from secateur.recover.training import Epoch, Run, fit_

__all__ = [
    "Compensation",
    "Epoch",
    "Fit",
    "Hooks",
    "Objective",
    "Run",
    "Step",
    "Training",
    "compensate_",
    "cross_entropy",
    "distil",
    "fit_",
    "join_processes",
    "recalibrate_",
    "tensorboard_log",
]
