"""Which pairs a group of scored pictures gives, and what becomes of a given label: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.data.records import TIE
from diffalign.errors import DiffalignError

Array = NDArray[np.float64]
PairRule = Literal["best_worst", "best_random", "adjacent", "ranked"]
Mode = Literal["flip", "drop", "soften", "replace", "posterior"]
Ranks = tuple[int, int]

KEPT, UNSCORED = "kept", "unscored"
DISAGREES, UNCERTAIN = "dropped: disagrees", "dropped: uncertain"


@dataclass(frozen=True)
class Selection:
    """Which pairs of a group are made.

    Fields:
        rule: `best_worst`, the widest gap; `best_random`, the best picture against one drawn from the worse ones (both
            of PF-PPO, arXiv 2409.06957); `adjacent`, neighbours in the ranking; `ranked`, every two different scores.
        min_margin: smallest gap of scores that makes a pair; equal scores never do.
        chosen_ranks, rejected_ranks: first and last rank (1 is best) that the two pictures may have; None: any.
    """

    rule: PairRule = "best_worst"
    min_margin: float = 0.0
    chosen_ranks: Ranks | None = None
    rejected_ranks: Ranks | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_margin < float("inf"):
            raise DiffalignError(f"the smallest margin is {self.min_margin}; expected a number of at least 0")
        for name, ranks in (("chosen", self.chosen_ranks), ("rejected", self.rejected_ranks)):
            if ranks is not None and not 1 <= ranks[0] <= ranks[1]:
                raise DiffalignError(
                    f"the ranks of {name} pictures are {ranks[0]} to {ranks[1]}; expected first <= last, from 1 (best)"
                )


def ranks(scores: ArrayLike) -> NDArray[np.int64]:
    """Rank `[K]` of each score, 1 for the best; equal scores share a rank (1, 2, 2, 4)."""
    values = np.asarray(scores, np.float64)
    return 1 + (values[None, :] > values[:, None]).sum(1)


def group_pairs(scores: ArrayLike, selection: Selection, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Indices (chosen, rejected) of the pairs of one group, all of them with a positive gap.

    Of pictures with equal scores the first one represents them, except in `ranked`.

    Args:
        scores: `[K]` finite. rng: draws the other picture of `best_random`.
    """
    values = np.asarray(scores, np.float64)
    candidates = _candidates(values, selection)
    return _PAIR_RULES[selection.rule](values, candidates, rng) if candidates else []


def _candidates(values: Array, selection: Selection) -> list[tuple[int, int]]:
    """Every pair that the margin and the ranks allow, best chosen pictures first."""
    place = ranks(values)
    first = _within(place, selection.chosen_ranks)
    second = _within(place, selection.rejected_ranks)
    order = np.argsort(-values, kind="stable").tolist()
    return [
        (i, j)
        for i in order
        for j in order
        if values[i] > values[j] and values[i] - values[j] >= selection.min_margin and first[i] and second[j]
    ]


def _within(place: NDArray[np.int64], allowed: Ranks | None) -> NDArray[np.bool_]:
    low, high = allowed or (1, len(place))
    return (place >= low) & (place <= high)


def _widest(
    values: Array, candidates: list[tuple[int, int]], rng: np.random.Generator
) -> list[tuple[int, int]]:
    return [max(candidates, key=lambda pair: values[pair[0]] - values[pair[1]])]


def _best_against_random(
    values: Array, candidates: list[tuple[int, int]], rng: np.random.Generator
) -> list[tuple[int, int]]:
    best = candidates[0][0]
    worse = [j for i, j in candidates if i == best]
    return [(best, worse[int(rng.integers(len(worse)))])]


def _neighbours(
    values: Array, candidates: list[tuple[int, int]], rng: np.random.Generator
) -> list[tuple[int, int]]:
    firsts = np.unique(-values, return_index=True)[1].tolist()
    return [pair for pair in pairwise(firsts) if pair in candidates]


def _every(
    values: Array, candidates: list[tuple[int, int]], rng: np.random.Generator
) -> list[tuple[int, int]]:
    return candidates


_PairMaker = Callable[[Array, list[tuple[int, int]], np.random.Generator], list[tuple[int, int]]]
_PAIR_RULES: dict[str, _PairMaker] = {
    "best_worst": _widest,
    "best_random": _best_against_random,
    "adjacent": _neighbours,
    "ranked": _every,
}


@dataclass(frozen=True)
class LabelRule:
    """What a reward may do to given labels.

    Fields:
        mode: `flip` reverses labels that the reward contradicts, `drop` removes their pairs, `soften` mixes label and
            chance, `replace` takes the chance alone, `posterior` combines both by Bayes' rule under a label noise.
        threshold: chance that the reward must give to the image against the label, for `flip` and `drop`.
        trust: share of the reward in `soften`, in [0, 1].
        max_uncertainty: where the reward is less certain than this it has no say: `drop` removes the pair, all other
            modes keep the label. In [0, 1]; None: no limit.
        decide_ties: `flip` also decides ties where the chance passes the threshold.
        hard: `replace` takes the preferred image as certain, as people's labels are.
    """

    mode: Mode = "soften"
    threshold: float = 0.9
    trust: float = 0.5
    max_uncertainty: float | None = None
    decide_ties: bool = False
    hard: bool = False

    def __post_init__(self) -> None:
        if not 0.5 < self.threshold <= 1:
            raise DiffalignError(f"the threshold is {self.threshold}; expected a chance above 0.5, up to 1")
        if not 0 <= self.trust <= 1:
            raise DiffalignError(f"trust is {self.trust}; expected 0 (the label) to 1 (the reward)")
        if self.max_uncertainty is not None and not 0 <= self.max_uncertainty <= 1:
            raise DiffalignError(f"the greatest uncertainty is {self.max_uncertainty}; expected 0 to 1")


@dataclass(frozen=True)
class NewLabels:
    """What became of N labels.

    Fields:
        label: `[N]` chance that the first image is preferred. keep: `[N]`. action: N words, such as `flipped`.
    """

    label: Array
    keep: NDArray[np.bool_]
    action: list[str]


def new_labels(
    given: ArrayLike,
    chance: ArrayLike,
    rule: LabelRule,
    uncertainty: ArrayLike | None = None,
    label_noise: float = 0.0,
) -> NewLabels:
    """Apply a rule to given labels.

    Args:
        given: `[N]` label of the first image, 0.5 for a tie.
        chance: `[N]` that the first image is better, by the reward; NaN where it has no score: the label stays.
        uncertainty: `[N]` of the chance, in [0, 1].
        label_noise: rate at which given labels are wrong, in [0, 0.5), for `posterior`.
    """
    q, p = np.asarray(given, np.float64), np.asarray(chance, np.float64)
    scored = np.isfinite(p)
    heard = scored.copy()
    if rule.max_uncertainty is not None and uncertainty is not None:
        heard &= np.asarray(uncertainty, np.float64) <= rule.max_uncertainty
    if rule.mode == "drop":
        return _dropped(q, p, scored, heard, rule.threshold)
    label = np.where(heard, _heard_label(q, np.where(scored, p, TIE), rule, label_noise), q)
    words = [_word(*row) for row in zip(q, label, scored, strict=True)]
    return NewLabels(label, np.ones(len(q), bool), words)


def _dropped(
    q: Array, p: Array, scored: NDArray[np.bool_], heard: NDArray[np.bool_], threshold: float
) -> NewLabels:
    disagrees = heard & contradicted(q, p, threshold)
    uncertain = scored & ~heard
    action = np.select([~scored, uncertain, disagrees], [UNSCORED, UNCERTAIN, DISAGREES], KEPT)
    return NewLabels(q, ~(disagrees | uncertain), action.tolist())


def _heard_label(q: Array, p: Array, rule: LabelRule, label_noise: float) -> Array:
    """Labels `[N]` where the reward has its say."""
    if rule.mode == "flip":
        flipped = np.where(contradicted(q, p, rule.threshold), 1 - q, q)
        decided = (q == TIE) & (np.maximum(p, 1 - p) >= rule.threshold) & rule.decide_ties
        return np.where(decided, _winner(p), flipped)
    if rule.mode == "soften":
        return (1 - rule.trust) * q + rule.trust * p
    if rule.mode == "posterior":
        return posterior(q, p, label_noise)
    return _winner(p) if rule.hard else p


def contradicted(given: Array, chance: Array, threshold: float) -> NDArray[np.bool_]:
    """Decided labels `[N]` against which the reward gives at least `threshold`."""
    against = np.where(given > TIE, 1 - chance, chance)
    return (given != TIE) & (against >= threshold)


def posterior(given: Array, chance: Array, label_noise: float) -> Array:
    """Chance `[N]` that the first image is better, from the reward's chance p and a label that errs at rate e.

    For a label in favour, `p (1 - e) / (p (1 - e) + (1 - p) e)`. A soft label q stands for a mixture of both hard
    ones; a tie says nothing, so p remains. Where p and a label without noise exclude each other, the label holds.

    Raises:
        DiffalignError: a noise outside [0, 0.5).
    """
    if not 0 <= label_noise < 0.5:
        raise DiffalignError(f"the label noise is {label_noise}; expected a rate from 0 to below 0.5")
    favour = (1 - label_noise) * given + label_noise * (1 - given)
    first, second = chance * favour, (1 - chance) * (1 - favour)
    total = first + second
    return np.where(total > 0, first / np.where(total > 0, total, 1.0), given)


def uncertainty_weights(uncertainty: ArrayLike) -> Array:
    """`exp(-u)` in (0, 1] for uncertainties `[N]`, 1 where there is none (NaN): Ctrl-U's weights, arXiv 2410.11236."""
    return np.exp(-np.nan_to_num(np.asarray(uncertainty, np.float64)))


def _winner(p: Array) -> Array:
    """1 or 0 for the more probable image, 0.5 where both are alike."""
    return (1 + np.sign(p - TIE)) / 2


def _word(given: float, label: float, scored: bool) -> str:
    """What happened to a label, in a word."""
    if not scored:
        return UNSCORED
    if label == given:
        return KEPT
    if given == TIE:
        return "tie decided"
    return "flipped" if (label - TIE) * (given - TIE) < 0 else "softened"
