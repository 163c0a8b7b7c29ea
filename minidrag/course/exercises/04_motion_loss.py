"""Exercise 4: motion supervision, the loss that pulls the content of a handle toward its target.

Equation 3 of the paper, first term. h_i: a handle, g_i: its target, F_q: the features at q, Omega(h_i,
r_1): the cells at most r_1 rows and columns away from h_i, and sg: stop-gradient, a value without a
gradient.

    sum_i sum_{q in Omega(h_i, r_1)} || F_{q + d_i}(z_t) - sg(F_q(z_t)) ||_1
    d_i = (g_i - h_i) / || g_i - h_i ||_2

The features one step ahead are to become those at the handle now. So only the patch ahead has a gradient;
otherwise the cheapest way would be to change both to something in between.

In words, for each handle:
1. Skip it if it has arrived: `arrived(handle, target, config.tolerance)`. (The project's default holds it
   there instead, by `config.hold_steps`, which is 0 here.)
2. d_i points from the handle to the target. Its length is `config.motion_step`, but at most the distance
   to the target, or 1 if the target is nearer than that.
3. The cells q: `patch(handle, config.motion_radius, features)`, (P, 2); fewer at the border.
4. Ahead: the features at q + d_i.
5. The reference, without a gradient: `reference.view.features` around `reference.handles[i]`, at the same
   cells relative to it as q has to the handle. In the paper the reference is the present image itself, as
   above; in GoodDrag (arXiv 2404.07206) it is the image before the drag. Your function need not know which.
6. Add the absolute differences (C, P). With `config.motion_loss` "sum" add up all of them. With "mean"
   take their mean, times the number of cells in a whole patch, (2 r_1 + 1)^2.

The result is 0 if all handles have arrived, and has a gradient even then: start from `features.sum() *
0`. From minidrag.method.drag, `arrived`, `patch`, and `sample` (exercise 3) help. There, `pull` does steps 1
and 2.
"""

from torch import Tensor

from minidrag.config import EditConfig
from minidrag.method.drag import Cells, Origin


def motion_loss(
    features: Tensor, handles: Cells, targets: Cells, reference: Origin, config: EditConfig
) -> Tensor:
    """Sum up the differences between the patches ahead and the reference's.

    features: (C, R, S). handles, targets: one (row, column) each. Returns a number as a 0-d tensor.
    """
    raise NotImplementedError
