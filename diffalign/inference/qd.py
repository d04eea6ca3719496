"""Quality diversity over initial noises: the best picture of each kind, not only the best picture.

MAP-Elites (Mouret and Clune 2015, arXiv 1504.04909): a grid over axes of diversity holds in each cell the best noise
whose picture falls there; new candidates are changed elites. QDHF (Ding et al. 2024, arXiv 2310.12103): the axes are
learned from judgements of similarity (`diffalign/inference/diversity.py`), again whenever judgements come in.

The paper adds `0.1 xi` to an elite, which lengthens it at each generation; here an elite is turned by that angle, so
that its norm stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.inference.diversity import Axes, learned_axes, principal_axes
from diffalign.inference.search import NoiseSearch, failed_as_nan, rotated
from diffalign.randomness import generator
from diffalign.strict import StrictModel


class QualityDiversityConfig(StrictModel):
    """Options of MAP-Elites with learned axes."""

    method: Literal["qd"] = "qd"
    """An archive of the best noise of each kind."""
    candidates: int = Field(default=8, ge=1)
    """Noises per round and prompt."""
    initial: int = Field(default=64, ge=4)
    """Fresh noises before elites are changed; they decide the box of the grid. The paper: 400."""
    grid: int = Field(default=10, ge=2)
    """Cells per axis, the paper: 20. Every cell keeps a noise: 400 of SDXL are 105 MB per prompt."""
    keep_all: bool = True
    """Keep the noises of all pictures, so that new axes place all of them again; 480 of SDXL are 126 MB per prompt.
    Off, as in the paper, only elites are placed again, and those that meet in a cell are lost at every refit."""
    axes: int = Field(default=2, ge=1)
    """Axes of diversity; a collage shows two."""
    sigma: float = Field(default=0.5, gt=0)
    """Size of a change in units of the noise's deviation: tan of the angle by which an elite is turned. The paper: 0.1,
    which at 480 noises did not reach the QD score of independent ones on a quadratic; 0.3 to 0.8 were 10 to 50 %
    above."""


@dataclass(frozen=True)
class Archive:
    """The elites of one prompt.

    Fields:
        noises: `[cells, *shape]`. rewards: `[cells]`, -inf in an empty cell. features: `[cells, D]`, to place elites
            anew when the axes change.
    """

    noises: Tensor
    rewards: Tensor
    features: Tensor

    @property
    def filled(self) -> Tensor:
        """Numbers of the cells that hold an elite, rising."""
        return (self.rewards > -math.inf).nonzero()[:, 0]

    @property
    def coverage(self) -> float:
        """Share of the cells that hold an elite."""
        return len(self.filled) / len(self.rewards)

    def score(self, floor: float) -> float:
        """QD score: the sum over elites of their rewards above `floor`, which should be below all of them."""
        return float((self.rewards[self.filled].double() - floor).clamp(min=0).sum())

    def insert(self, cells: Tensor, noises: Tensor, rewards: Tensor, features: Tensor) -> Archive:
        """The archive after N candidates: in each cell the best, the older one of equals; NaN never enters.

        Args:
            cells: `[N]`. noises: `[N, *shape]`. rewards: `[N]`. features: `[N, D]`.
        """
        found = Archive(self.noises.clone(), self.rewards.clone(), self.features.clone())
        for row, cell in enumerate(cells.tolist()):
            if rewards[row] > found.rewards[cell]:
                found.noises[cell], found.rewards[cell] = noises[row], rewards[row]
                found.features[cell] = features[row]
        return found


def empty_archive(cells: int, shape: Sequence[int], width: int) -> Archive:
    """An archive without elites, for noises of `shape` and features of `width` numbers."""
    return Archive(torch.zeros(cells, *shape), torch.full((cells,), -math.inf), torch.zeros(cells, width))


def collage(archive: Archive, grid: int, pictures: int) -> Tensor:
    """Which elites to show: the best of each block of cells, `[pictures, pictures]` cell numbers, -1 for none.

    The first axis runs to the right and the second one upwards, so row 0 shows the highest places on it.

    Raises:
        DiffalignError: the grid is not one of two axes, or has fewer cells than pictures.
    """
    if len(archive.rewards) != grid * grid or pictures > grid:
        raise DiffalignError(
            f"a collage of {pictures} x {pictures} pictures needs an archive of two axes with at least {pictures} "
            f"cells each; this one has {len(archive.rewards)} cells in all. Set method.axes to 2, or ask for fewer "
            "pictures."
        )
    block = torch.arange(grid) * pictures // grid
    found = torch.full((pictures, pictures), -1)
    for cell in archive.filled[archive.rewards[archive.filled].argsort()].tolist():
        found[pictures - 1 - block[cell % grid], block[cell // grid]] = cell
    return found


@dataclass(frozen=True)
class _Row:
    """What is known of one prompt: axes and archive once there are, candidates (until then, or all), and judgements."""

    noises: Tensor
    rewards: Tensor
    features: Tensor
    triplets: Tensor
    second_nearer: Tensor
    axes: Axes | None = None
    archive: Archive | None = None


class QualityDiversity(NoiseSearch):
    """An archive per row. Tells take features of the pictures, too; `triplets` and `learn` are the way to judge.

    The axes of the first archive are the principal ones of the first `initial` candidates.
    """

    def __init__(
        self, start: Tensor, seeds: Sequence[int], config: QualityDiversityConfig | None = None
    ) -> None:
        super().__init__(start, seeds)
        self.config = config or QualityDiversityConfig()
        self._features = torch.empty(0)
        self._rows = [self._unknown(0) for _ in self.seeds]

    @property
    def archives(self) -> list[Archive | None]:
        """The archive of each row; None before `initial` candidates were told."""
        return [row.archive for row in self._rows]

    def tell(self, rewards: Tensor, features: Tensor | None = None) -> None:
        """Take rewards `[B, M]` and features of the pictures `[B, M, D]`; a candidate with a NaN in either failed.

        Raises:
            DiffalignError: no features, or another shape.
        """
        if features is None or features.shape[:2] != rewards.shape:
            shape = None if features is None else list(features.shape)
            raise DiffalignError(
                f"quality diversity was told features of shape {shape}; expected {list(rewards.shape)} and the width "
                "of an encoder: it needs to know what pictures are like, not only how good they are."
            )
        self._features = features.detach().to("cpu", torch.float32)
        known = self._features.isfinite().all(2)
        super().tell(torch.where(known, failed_as_nan(rewards), torch.nan))

    def placed(self, rewards: Tensor, features: Tensor) -> list[Archive | None]:
        """Archives on this search's axes of other pictures, to compare with; they hold no noises.

        Args:
            rewards: `[B, N]`, NaN where failed. features: `[B, N, D]`.
        """
        found: list[Archive | None] = []
        for row, values, seen in zip(self._rows, rewards, features, strict=True):
            if row.axes is None:
                found.append(None)
                continue
            fine = values.isfinite() & seen.isfinite().all(1)
            cells = row.axes.cells(seen[fine], self.config.grid)
            empty = empty_archive(self.config.grid**self.config.axes, (0,), seen.shape[1])
            found.append(empty.insert(cells, torch.empty(len(cells), 0), values[fine], seen[fine]))
        return found

    def candidates_of(self, row: int) -> tuple[Tensor, Tensor]:
        """Noises `[N, *shape]` and features `[N, D]` that axes are fitted to and triplets are drawn from.

        All that were told; without `keep_all`, elites once there are any.
        """
        noises, _, features = self._known(self._rows[row])
        return noises, features

    def triplets(self, row: int, count: int) -> Tensor:
        """Numbers `[count, 3]` of different candidates (reference, first, second) of a row to be judged.

        Raises:
            DiffalignError: fewer than three candidates.
        """
        total = len(self.candidates_of(row)[0])
        if total < 3:
            raise DiffalignError(f"a triplet needs 3 pictures of a prompt; prompt {row} has {total}.")
        numbers = generator(self.seeds[row], self.round, "triplets")
        return torch.stack([torch.randperm(total, generator=numbers)[:3] for _ in range(count)])

    def learn(self, row: int, triplets: Tensor, second_nearer: Tensor) -> float:
        """Take judgements, fit the axes to all of them so far and place the pictures anew.

        Args:
            triplets: numbers `[T, 3]` from `triplets`, in the same round. second_nearer: `[T]` bool.

        Returns:
            Agreement with held-out judgements, 0.5 by chance.
        """
        known = self._rows[row]
        _, features = self.candidates_of(row)
        known = replace(
            known,
            triplets=torch.cat([known.triplets.view(-1, 3, features.shape[1]), features[triplets]]),
            second_nearer=torch.cat([known.second_nearer, second_nearer]),
        )
        axes, agreed = learned_axes(
            features, known.triplets, known.second_nearer, self.config.axes, self.seeds[row]
        )
        self._rows[row] = self._placed(known, axes)
        self._asked = None
        return agreed

    def _unknown(self, width: int) -> _Row:
        none = torch.empty(0, *self.start.shape[1:])
        return _Row(
            none,
            torch.empty(0),
            torch.empty(0, width),
            torch.empty(0, 3, width),
            torch.empty(0, dtype=torch.bool),
        )

    def _propose(self) -> Tensor:
        fresh = self._fresh(self.config.candidates, "qd")
        if self.round == 0:
            return torch.cat([self.start[:, None], fresh[:, 1:]], 1)
        return torch.stack([self._changed(row, each) for row, each in enumerate(fresh)])

    def _changed(self, row: int, fresh: Tensor) -> Tensor:
        """Elites drawn with equal chances and turned towards fresh noises `[M, *shape]`; those while there are none."""
        archive = self._rows[row].archive
        if archive is None or len(archive.filled) == 0:
            return fresh
        numbers = generator(self.seeds[row], self.round, "elites")
        drawn = torch.randint(len(archive.filled), (len(fresh),), generator=numbers)
        return rotated(archive.noises[archive.filled[drawn]], fresh, 1 / math.hypot(1, self.config.sigma))

    def _learn(self, noises: Tensor, rewards: Tensor) -> None:
        for row, (found, values, features) in enumerate(zip(noises, rewards, self._features, strict=True)):
            fine = ~values.isnan()
            self._rows[row] = self._with(self._rows[row], found[fine], values[fine], features[fine])

    def _with(self, known: _Row, noises: Tensor, rewards: Tensor, features: Tensor) -> _Row:
        """A row after more candidates."""
        if known.archive is None or self.config.keep_all:
            known = replace(
                known,
                noises=torch.cat([known.noises, noises]),
                rewards=torch.cat([known.rewards, rewards]),
                features=torch.cat([known.features.view(-1, features.shape[1]), features]),
            )
        if known.archive is not None and known.axes is not None:
            cells = known.axes.cells(features, self.config.grid)
            return replace(known, archive=known.archive.insert(cells, noises, rewards, features))
        if len(known.rewards) < self.config.initial:
            return known
        return self._placed(known, principal_axes(known.features, self.config.axes))

    def _known(self, row: _Row) -> tuple[Tensor, Tensor, Tensor]:
        """Noises, rewards and features that new axes would place."""
        if row.archive is None or self.config.keep_all:
            return row.noises, row.rewards, row.features
        cells = row.archive.filled
        return row.archive.noises[cells], row.archive.rewards[cells], row.archive.features[cells]

    def _placed(self, known: _Row, axes: Axes) -> _Row:
        """A row whose pictures so far are placed on these axes."""
        noises, rewards, features = self._known(known)
        width, cells = features.shape[1], self.config.grid**self.config.axes
        archive = empty_archive(cells, self.start.shape[1:], width)
        archive = archive.insert(axes.cells(features, self.config.grid), noises, rewards, features)
        if self.config.keep_all:
            return replace(known, axes=axes, archive=archive)
        none = self._unknown(width)
        return replace(
            known,
            axes=axes,
            archive=archive,
            noises=none.noises,
            rewards=none.rewards,
            features=none.features,
        )

    def _state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, row in enumerate(self._rows):
            for part in (row, row.axes, row.archive):
                values = {} if part is None else vars(part)
                prefix = f"{number}.{type(part).__name__}."
                found |= {prefix + name: each for name, each in values.items() if isinstance(each, Tensor)}
        return found

    def _restore(self, state: dict[str, Tensor]) -> None:
        self._rows = []
        for number in range(len(self.seeds)):
            parts = {
                kind.__name__: _fields(state, f"{number}.{kind.__name__}.") for kind in (_Row, Axes, Archive)
            }
            self._rows.append(
                _Row(
                    **parts["_Row"],
                    axes=Axes(**parts["Axes"]) if parts["Axes"] else None,
                    archive=Archive(**parts["Archive"]) if parts["Archive"] else None,
                )
            )


def _fields(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
