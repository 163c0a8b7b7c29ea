"""Exercise 3: bilinear sampling, features between the cells of a grid.

A handle moves by fractions of a cell, so features are wanted at points between cell centers. Cell (r, c)
has its center at the point (r, c). With r = floor(row), c = floor(column), and the remainders d = row - r
(how far down) and e = column - c (how far right):

    F(row, column) = (1 - d) [(1 - e) F[r, c]     + e F[r, c + 1]]
                   +      d  [(1 - e) F[r + 1, c] + e F[r + 1, c + 1]]

A point beyond the border of the grid has the features of the nearest point on the border.

In words:
1. Move each point to the nearest one on the grid: rows 0 to R - 1, columns 0 to S - 1.
2. Find the cell up and left of it, and the remainders.
3. Find the next row and the next column. On the last row there is no next one; its weight is 0 there, so
   any row that exists will do.
4. Mix the four cells. Gradients must flow to the features.
"""

from torch import Tensor


def sample(features: Tensor, points: Tensor) -> Tensor:
    """Sample features between cells.

    features: (C, R, S), channels, rows, columns. points: (P, 2), each (row, column). Returns (C, P).
    """
    raise NotImplementedError
