"""Recipes: a run from data to report, written down in YAML and carried out so that nothing can interrupt it for good.

outcome = run_recipe(read_recipe("recipe.yaml"), "runs/mine")
outcome = run_recipe(named_recipe("li/resnet56-A", weights="resnet56.pth"), "runs/li")
"""

from secateur.recipes.job import Tell
from secateur.recipes.named import named_recipe
from secateur.recipes.reading import demo_recipe, make_recipe, parse_recipe, read_recipe, write_recipe
from secateur.recipes.runner import Outcome, run_recipe
from secateur.recipes.schema import Recipe, json_schema

__all__ = [
    "Outcome",
    "Recipe",
    "Tell",
    "demo_recipe",
    "json_schema",
    "make_recipe",
    "named_recipe",
    "parse_recipe",
    "read_recipe",
    "run_recipe",
    "write_recipe",
]
