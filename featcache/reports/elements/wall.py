"""Pictures in an order in which similar ones are neighbours. In: embeddings. Out: an order, for a wall of pictures.

Method: hierarchical clustering (Ward 1963), its leaves ordered so that neighbours are as similar as the tree allows
(Bar-Joseph, Gifford and Jaakkola 2001). People found pictures faster in such a grid than in one made from t-SNE (Bertucci
et al. 2023, "DendroMap"). Of the orders that were tried its neighbours in the grid are the most similar, whatever the number
of columns; a curve through the t-SNE map comes next (``benchmarks/LOG.md``).
"""

import numpy as np

from featcache.heads.head import Array, Indices

WALL = 1000  # pictures; ordering takes two seconds, and more are hardly looked at


def order_by_similarity(X: Array) -> Indices:
    """(n, D) rows, n of some hundreds -> (n,) their numbers, similar ones beside each other. Starts at the row first given."""
    if len(X) < 3:
        return np.arange(len(X))
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering

    points = np.asarray(X, np.float64)
    order: Indices = np.asarray(leaves_list(optimal_leaf_ordering(linkage(points, "ward"), points)), np.intp)
    # An order read backwards is as good: which of the two must not depend on rounding.
    return order if order[0] < order[-1] else order[::-1]
