"""One thread, a cache of their own, the tests' own helpers importable, and Hypothesis set to repeat itself exactly."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)

_cache = tempfile.TemporaryDirectory(prefix="secateur-tests-")  # gone with the process
os.environ["SECATEUR_CACHE"] = _cache.name

# torch writes a long trace of every capture as soon as this logger has a handler, and pytest (9) gives one to each
# logger that does not propagate: slow, and pages of it under every failure.
logging.getLogger("torch.__trace").propagate = True

# Each example captures a network, so that shrinking takes minutes: HYPOTHESIS_PROFILE=explore does it, and draws anew.
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
settings.register_profile("explore", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
