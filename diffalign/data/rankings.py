"""Rankings of several pictures of one prompt, as pairs of two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

from diffalign.data.records import TIE


def ranking_pairs(ranks: Sequence[float | None], pairs: str = "all") -> list[tuple[int, int]]:
    """Which pictures of a ranking are compared.

    Args:
        ranks: rank of each picture, the smallest is the best; None: not ranked, left out.
        pairs: `all`: every two, in the order of the pictures; `best_worst`: the best and the worst;
            `adjacent`: each with the next best. Of equal ranks the earlier picture counts as the better.

    Returns:
        Indices of two pictures each; equal ranks are a tie (`rank_label`).
    """
    ranked = [i for i, rank in enumerate(ranks) if rank is not None]
    if len(ranked) < 2:
        return []
    if pairs == "all":
        return list(combinations(ranked, 2))
    order = sorted(ranked, key=lambda i: ranks[i])  # type: ignore[arg-type, return-value]
    return [(order[0], order[-1])] if pairs == "best_worst" else list(pairwise(order))


def rank_label(first: float, second: float) -> float:
    """Probability that the first of two ranked pictures is preferred: 1, 0, or 0.5 when the ranks are equal."""
    return TIE if first == second else float(first < second)


def rating_label(first: float, second: float) -> float:
    """The same for ratings, where the greater is the better."""
    return rank_label(second, first)


def vote_share(judges: Sequence[Sequence[float]], first: int, second: int) -> float:
    """Share of judges that prefer picture `first` to `second`; equal ranks count half.

    Args:
        judges: the ranks that each judge gave to all pictures, at least one judge.
    """
    return sum(rank_label(ranks[first], ranks[second]) for ranks in judges) / len(judges)
