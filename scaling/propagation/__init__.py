"""How every operator hands sizes on: forward the size of a value at init and of its change, backward that of its gradient.

Sums of n independent terms grow like √n, sums of n aligned terms like n (Yang et al. 2022, arXiv 2203.03466, table 14). A random matrix
moves any vector by at most its spectral norm, σ(√fan_in + √fan_out), and what training changes is aligned with it (Yang et al. 2023,
arXiv 2310.17813): one formula for hidden weights (√n) and readouts (n). An update is of low rank and aligned with its input: n.

A rule takes a call and the pieces of its tensor arguments, and returns the pieces of its value and a function that hands the gradient back
to the arguments. All rules are rows of `scaling.propagation.table`.
"""

from scaling.propagation.context import HALF, Context, Pull
from scaling.propagation.table import MOVES, RULES, propagate

__all__ = ["HALF", "MOVES", "RULES", "Context", "Pull", "propagate"]
