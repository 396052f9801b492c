"""The workspace of a factorisation (`emloc.linalg.lowrank`), step by step, for the planner.

Precision as there: eigenproblems below `DENSE_BELOW` in float64, others in the weights' dtype.
"""

from emloc.formats.layer_format import GroupShape
from emloc.linalg.eigen import basis_sizes
from emloc.linalg.gram import Side
from emloc.linalg.lowrank import DENSE_BELOW

DOUBLE = 8


def factorise_bytes(side: Side, shape: GroupShape, rank: int, itemsize: int) -> int:
    """The most that `lowrank.factorise` holds beside weights and moments, its factors included."""
    m, d, k = shape.rows, shape.d_in, rank
    size = m if side == "output" else min(m, d)
    small = size < DENSE_BELOW
    high = DOUBLE if small else itemsize
    weights = m * d * high if small else 0
    matrix = (m if side == "output" else d) ** 2 * high if small else 0
    symmetric, made = size * size * high, [0]
    root = 0
    if side == "input" and m <= d:
        weights += m * d * high  # stacked
        made.append(matrix + m * d * high + symmetric)
        matrix = symmetric
    elif side == "input":
        root = d * d * high
        diagonal = 3 * min(d, max(256, -(-d // 8))) ** 2 * high  # mirrored, block by block
        made += [matrix + 2 * root + diagonal, matrix + root + 2 * d * d * high + diagonal]
        matrix = symmetric
    if not root:
        made.append(matrix + 2 * symmetric)
        matrix = symmetric
    made.append(matrix + _eigen_bytes(size, k, high, small))
    vectors = size * k * high
    right = k * d * high
    left = 2 * m * k * high + d * k * high if root else vectors
    made.append(vectors + right + left)
    return weights + root + max(made)


def _eigen_bytes(size: int, count: int, itemsize: int, small: bool) -> int:
    """Beside the matrix: eigenvectors and LAPACK's workspace, or a Krylov basis with its projection."""
    dense = 3 * size * size * itemsize + size * count * itemsize
    if small:
        return dense
    sizes = basis_sizes(size, count)
    if not sizes:
        return dense
    basis = sizes[-1] * size * itemsize
    projected = sizes[-1] ** 2 * itemsize
    solved = sizes[0] ** 2 * 3 * itemsize + 2 * size * count * itemsize
    return basis + projected + solved
