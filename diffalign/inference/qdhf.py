"""QDHF as a method: encoders look at pictures, a proxy or a person judges similarity, an archive is what comes of it.

Ding et al. 2024, arXiv 2310.12103, algorithm 1. The search is `diffalign/inference/qd.py`; here it is given features
and judgements, compared with as many independent noises on the same axes, and shown as a sheet of elites.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from diffalign.data.labelling import Comparison, Labeller, PersonLabeller, Words
from diffalign.errors import DiffalignError
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.diversity import judged_by
from diffalign.inference.problem import Judged, Problem
from diffalign.inference.qd import (
    Archive,
    QualityDiversity,
    QualityDiversityConfig,
    collage,
)
from diffalign.inference.search import draw
from diffalign.inference.sheet import Sheet
from diffalign.inference.trace import Trace
from diffalign.randomness import derive_seed
from diffalign.rewards import place
from diffalign.rewards.encoders import Encoder, load_encoder

SCENES, USUAL = "scenes-clip", "clip:ViT-B-16@laion2b_s34b_b88k"


class QDHFConfig(QualityDiversityConfig):
    """Options of quality diversity with axes that a proxy's judgements decide on."""

    rounds: int = Field(default=80, ge=1)
    """Rounds where no budget is given; the paper: 200 after the first noises."""
    encoder: str | None = None
    """Whose features the axes are linear in: `clip:SOURCE`, `dino:ID`, `pixels:N` and so on; null: the embedded world's
    CLIP for its models, else CLIP ViT-B/16."""
    proxy: str | None = None
    """Encoder whose cosines judge which of two pictures is more like a third, as the paper's DreamSim; null: `encoder`,
    and the axes are those that keep most of what it finds similar."""
    person: str | None = None
    """A folder: a person in the terminal judges in place of the proxy, and pictures and answers are kept there. The
    same run with the same folder goes on where it was stopped. Set `judgements` to a few dozen."""
    judgements: int = Field(default=400, ge=0)
    """Per prompt and refit; those of a proxy cost no pictures. 0 keeps the principal axes. The paper: 2500."""
    refits: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    """When there are judgements and the axes are learned anew, in shares of the rounds after the first noises, as in
    the paper; in between and afterwards elites are improved on fixed axes. A budget of seconds counts as `rounds`."""
    compare: bool = True
    """Draw as many independent noises and place them on the same axes, which doubles the time."""
    sheet: int = Field(default=5, ge=0)
    """Pictures along each side of the sheet of elites, which are drawn again; 0: none. Needs two axes."""


WORDS = Words(
    question="more alike? ",
    help=(
        "Each sheet shows the same picture on the left. 1: the two of the first sheet are more alike, 2: those of the "
        "second, =: no difference, s: skip, q: stop"
    ),
    what="triplets",
    unasked="method.person is set, but nobody can be asked: the input has ended. Run in a terminal, or leave it out.",
    again="the same run with the same folder goes on",
)


@dataclass
class Seen:
    """What was told so far.

    Fields:
        rewards: `[B, M]` of each round. memory: what the proxy thinks of a noise's picture, by the noise.
    """

    rewards: list[Tensor]
    memory: dict[bytes, Tensor]


class Eyes:
    """Encodes the pictures of candidates as they are made."""

    def __init__(self, config: QDHFConfig, problem: Problem) -> None:
        self.problem = problem
        backbone = problem.generation.backbone
        usual = SCENES if backbone.config.path.startswith("scenes:") else USUAL
        self.encoder = _loaded(config.encoder or usual, backbone.device)
        self.proxy = _loaded(config.proxy, backbone.device) if config.proxy else self.encoder

    def judge(self, candidates: Tensor, problem: Problem | None = None) -> tuple[Judged, Tensor, Tensor]:
        """Rewards of candidates `[B, M, *shape]`, and features `[B, M, D]` and `[B, M, E]` of encoder and proxy.

        Args:
            problem: with another budget than the method's.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        judged = (problem or self.problem).judge(candidates, lambda media: parts.append(self._look(media)))
        features, similar = (
            _per_prompt(torch.cat(found), judged.rewards) for found in zip(*parts, strict=True)
        )
        return judged, features, similar

    def _look(self, media: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = self.encoder.embed(media).float().cpu()
            same = self.proxy is self.encoder
            return features, features if same else self.proxy.embed(media).float().cpu()


class QDHF:
    """Quality diversity with learned axes, for B prompts at once.

    Args:
        labeller: who judges triplets in place of the proxy; None: as the options say.
    """

    def __init__(self, config: QDHFConfig | None = None, labeller: Labeller | None = None) -> None:
        self.config = config or QDHFConfig()
        if labeller is None and self.config.person is not None:
            labeller = PersonLabeller(Path(self.config.person), words=WORDS)
        self.labeller = labeller

    def run(self, problem: Problem, trace: Trace) -> None:
        """Fill the archives, then note QD score and coverage and make the sheets.

        Raises:
            DiffalignError: the budget ends before the first archive, or an encoder cannot be loaded.
        """
        self._check(problem)
        eyes = Eyes(self.config, problem)
        search = QualityDiversity(problem.first, problem.seeds, self.config)
        refits = self._refits(problem)
        seen, agreed = Seen([], {}), torch.full((len(problem),), torch.nan)
        while problem.meter.affordable(problem.generation.cost) and self._goes_on(search, problem):
            candidates = search.ask()
            judged, features, similar = eyes.judge(candidates)
            seen.rewards.append(judged.rewards)
            self._remember(seen, candidates, similar)
            search.tell(judged.rewards, features)
            trace.saw(judged.best, judged.media, judged.noises)
            if search.round in refits:
                self._learn(search, seen, agreed, problem)
        problem.meter.stop()
        self._report(search, problem, trace, eyes, torch.cat(seen.rewards, 1))
        trace.note("agreement", agreed)

    def _check(self, problem: Problem) -> None:
        """Whether the budget reaches beyond the first noises."""
        pictures = problem.meter.affordable(problem.generation.cost)
        if pictures < self.config.initial:
            raise DiffalignError(
                f"the budget allows {pictures} pictures per prompt, but method.initial is {self.config.initial} before "
                "there is an archive. Raise the budget or lower method.initial."
            )

    def _goes_on(self, search: QualityDiversity, problem: Problem) -> bool:
        return problem.meter.budget.limited or search.round < self.config.rounds

    def _refits(self, problem: Problem) -> set[int]:
        """Numbers of told rounds after which the axes are learned."""
        options, limit = self.config, problem.meter.budget.evaluations
        pictures = limit // problem.generation.cost if limit else options.rounds * options.candidates
        first = -(-options.initial // options.candidates)
        rest = max(0, pictures // options.candidates - first)
        return {first + int(share * rest) for share in options.refits} if options.judgements else set()

    def _remember(self, seen: Seen, candidates: Tensor, similar: Tensor) -> None:
        """Keep what the proxy saw, since the search keeps the encoder's features only."""
        for noises, found in zip(candidates, similar, strict=True):
            seen.memory |= {_key(noise): row for noise, row in zip(noises, found, strict=True)}

    def _learn(self, search: QualityDiversity, seen: Seen, agreed: Tensor, problem: Problem) -> None:
        """Have triplets of each prompt's pictures judged, and fit the axes to them."""
        for row in range(len(agreed)):
            noises, _ = search.candidates_of(row)
            if len(noises) < 3:
                continue
            numbers = search.triplets(row, self.config.judgements)
            if self.labeller is None:
                similar = torch.stack([seen.memory[_key(noise)] for noise in noises])
                nearer = judged_by(similar[numbers])
            else:
                numbers, nearer = self._asked(problem, row, noises, numbers)
            if len(numbers):
                agreed[row] = search.learn(row, numbers, nearer)

    def _asked(self, problem: Problem, row: int, noises: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Triplets `[T, 3]` that somebody could judge, and whether the second is more like the reference `[T]`.

        Their pictures are drawn again, which is not counted; nor is the time of the answers.
        """
        assert self.labeller is not None
        problem.meter.stop()
        shown = numbers.unique()
        rows = [row] * len(shown)
        media = problem.generation.media(problem.full(noises[shown], rows), rows)
        pictures = dict(zip(shown.tolist(), media.float(), strict=True))
        questions = [
            triplet_question(problem, row, [noises[n] for n in triple], [pictures[n] for n in triple])
            for triple in numbers.tolist()
        ]
        answers = [math.nan if a is None else a for a in self.labeller.judge(questions)]
        problem.meter.start()
        first_nearer = torch.tensor(answers)
        told = first_nearer.isfinite() & (first_nearer != 0.5)
        return numbers[told], first_nearer[told] < 0.5

    def _report(
        self, search: QualityDiversity, problem: Problem, trace: Trace, eyes: Eyes, told: Tensor
    ) -> None:
        """Figures of each prompt's archive, and of independent noises on its axes; and its sheet."""
        archives = search.archives
        other = independent(problem, eyes, told.shape[1]) if self.config.compare else None
        floors = lowest(told, None if other is None else other[0])
        trace.note("floor", floors)
        _note(trace, "", archives, floors)
        if other is not None:
            _note(trace, "_independent", search.placed(*other), floors)
        for row, archive in enumerate(archives):
            if archive is None:
                trace.fail(row, f"fewer than method.initial={self.config.initial} pictures could be judged")
            elif self.config.sheet and self.config.axes == 2:
                trace.sheets[row] = sheet_of(archive, self.config, problem, row)


def triplet_question(
    problem: Problem, row: int, noises: Sequence[Tensor], pictures: Sequence[Tensor]
) -> Comparison:
    """A reference and two pictures as two sheets `[3, H, 2 W]`, each with the reference on the left.

    The name of a question is made of its noises, so that an answer is found again whenever they are.
    """
    reference, first, second = pictures
    name = hashlib.blake2b(b"".join(_key(noise) for noise in noises), digest_size=8).hexdigest()
    sheets = (torch.cat([reference, other], 2) for other in (first, second))
    return Comparison(f"{problem.seeds[row]}/{name}", problem.texts[row], *sheets)


def independent(problem: Problem, eyes: Eyes, count: int) -> tuple[Tensor, Tensor]:
    """Rewards `[B, count]` and features `[B, count, D]` of the noises that best-of-N would draw."""
    own = replace(problem, meter=Meter(Budget(), len(problem)))
    seeds = [derive_seed(seed, "baseline") for seed in problem.seeds]
    size = max(1, problem.generation.sampler.batch_size // len(problem))
    rewards, features = [], []
    for first in range(0, count, size):
        many = min(size, count - first)
        noises = draw(seeds, many, problem.first.shape[1:], "best_of_n", first=first)
        judged, found, _ = eyes.judge(noises, own)
        rewards.append(judged.rewards)
        features.append(found)
    return torch.cat(rewards, 1), torch.cat(features, 1)


def lowest(*told: Tensor | None) -> Tensor:
    """The lowest finite reward of each row `[B]` of all given `[B, M]`: the floor of a QD score."""
    both = torch.cat([each for each in told if each is not None], 1)
    return both.nan_to_num(torch.inf, posinf=torch.inf, neginf=torch.inf).amin(1)


def sheet_of(archive: Archive, config: QDHFConfig, problem: Problem, row: int) -> Sheet:
    """The best elites of a prompt's regions, drawn again, with their rewards."""
    side = min(config.sheet, config.grid)
    cells = collage(archive, config.grid, side).flatten().tolist()
    shown = [cell for cell in cells if cell >= 0]
    rows = [row] * len(shown)
    noises = problem.full(archive.noises[shown], rows)
    pictures = iter(problem.generation.media(noises, rows).float())
    height, width = problem.generation.backbone.resolution
    blank = torch.ones(3, height, width)
    labels = ["" if cell < 0 else f"{float(archive.rewards[cell]):.3g}" for cell in cells]
    return Sheet(torch.stack([blank if cell < 0 else next(pictures) for cell in cells]), labels, side, noises)


def _note(trace: Trace, suffix: str, archives: Sequence[Archive | None], floors: Tensor) -> None:
    """Coverage and QD score of archives, NaN where there is none."""
    figures = [
        (torch.nan, torch.nan) if archive is None else (archive.coverage, archive.score(float(floor)))
        for archive, floor in zip(archives, floors, strict=True)
    ]
    for name, values in zip(("coverage", "qd_score"), zip(*figures, strict=True), strict=True):
        trace.note(name + suffix, torch.tensor(values))


def _loaded(spec: str, device: torch.device | str) -> Encoder:
    encoder = load_encoder(spec).requires_grad_(False).eval()
    return place(encoder, device)  # type: ignore[arg-type, return-value]


def _per_prompt(found: Tensor, rewards: Tensor) -> Tensor:
    """Features `[B * made, D]` as `[B, M, D]`, NaN for candidates that the budget did not reach."""
    rows, many = rewards.shape
    made = found.view(rows, -1, found.shape[-1])
    full = torch.full((rows, many, found.shape[-1]), torch.nan)
    full[:, : made.shape[1]] = made
    return full


def _key(noise: Tensor) -> bytes:
    return hashlib.blake2b(noise.contiguous().numpy().tobytes(), digest_size=16).digest()
