"""Winning back what pruning cost. So far: a plain training loop."""

from secateur.recover.training import Epoch, Recipe, fit_

__all__ = ["Epoch", "Recipe", "fit_"]
