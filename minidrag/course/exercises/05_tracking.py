"""Exercise 5: point tracking, finding where the content of a handle went.

After an update of the latent, the handle's content has moved by an unknown bit. Equation 5: look around
the handle for the feature that the handle had before the drag.

    h_i^{k+1} = argmin_{q in Omega(h_i^k, r_2)} || F_q(z_t^{k+1}) - F_{h_i^0}(z_t) ||_1

h_i^k: the handle after k updates, h_i^0: where it was at first, z_t: the latent before the drag. The
reference never changes: compared with the features of a moment ago, small errors would add up, and
compared with the present ones, a handle would match itself and stay.

In words, for each handle:
1. The reference: the feature of `origin.view.features`, (C, R, S), in the cell `origin.handles[i]`.
2. The candidates: all cells at most `radius` rows and columns from the present handle, those beyond the
   border left out: `patch(handle, radius, features)` of minidrag.method.drag, (P, 2).
3. The distance of each candidate: the sum over channels of the absolute differences of features.
4. The new handle: the candidate with the smallest distance, in cells of the whole grid.
"""

from torch import Tensor

from minidrag.method.drag import Cell, Cells, Origin


def track(features: Tensor, handles: Cells, origin: Origin, radius: int) -> list[Cell]:
    """Move each handle to the best match of its original feature nearby.

    features: (C, R, S), of the present latent. handles: whole cells, one (row, column) each. radius: r_2.
    Returns a Cell(row, column) of two floats per handle.
    """
    raise NotImplementedError
