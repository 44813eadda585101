"""What engines do between layers, found from whole networks: a price for each feature of a network.

Layers alone do not tell how long a network takes: sums, pooling and norms that stay by themselves move activations,
weights come from memory, and every call costs something. Some networks of known widths are timed as a whole, and the
prices ``p >= 0`` are those that predict their times with the least squared relative error,

    min_p  sum_n (x_n p / t_n - 1)^2  +  sum_f (r_f (p_f - q_f))^2 ,

which holds prices near ``q`` (1 for the layers' own times, 0 for the rest) where few networks cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.errors import BadRequest
from secateur.latencies.tables import FEATURES

PRIOR = 0.1
"""How firmly the layers' price is held near 1: as firmly as by a network predicted to a tenth."""
LOOSE = 0.02
"""How firmly the other parts of the dense network's time are held near none of it."""


def fit_prices(features: np.ndarray, times_ms: Sequence[float]) -> np.ndarray:
    """The prices ``[F]`` of networks with ``features [N, F]`` (see ``tables.FEATURES``) that took ``times_ms [N]``, the
    dense one first. Raises ``BadRequest`` for times that are not positive numbers."""
    from scipy.optimize import nnls

    times = np.asarray(times_ms, dtype=np.float64)
    if not len(times) or not np.isfinite(times).all() or (times <= 0).any():
        raise BadRequest(f"latencies of whole networks must be positive numbers of milliseconds, not {list(times_ms)}")
    scale = np.where(features[0] > 0, features[0] / times[0], 1.0)  # prices in shares of the dense network's time
    seen = features / times[:, None] / scale
    first = np.zeros(len(FEATURES))
    first[0] = scale[0]
    held = np.diag(np.where(np.arange(len(FEATURES)) == 0, PRIOR / scale[0], LOOSE))
    rows = np.concatenate([seen, held])
    wanted = np.concatenate([np.ones(len(times)), held @ first])
    found, _ = nnls(rows, wanted)
    return np.asarray(found / scale)
