"""Rendered scenes as single pictures and groups, cached for a tiny random model, and prepared trainers on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pair_world import open_model, open_pairs, png, scene_records

from diffalign.config import DataConfig
from diffalign.data.picture_cache import GroupCache, PictureCache
from diffalign.data.picture_labels import Pictures, pictures_of, pictures_of_pairs
from diffalign.data.pictures import PictureRecord, PictureRecords, as_pictures
from diffalign.data.records import as_records
from diffalign.data.store import EncodedRecords, open_encoded
from diffalign.samples import scenes
from diffalign.trainers import trainer_class


def scored_scenes(groups: int = 4, size: int = 3) -> PictureRecords:
    """Groups of pictures of one caption: the right one scores highest, others fall off."""
    world = scenes.training_scenes(0)
    records = []
    for g in range(groups):
        (scene, right), *others = [next(world) for _ in range(size)]
        shown = [right, *(placed for _, placed in others)]
        records += [
            PictureRecord(scenes.caption(scene), png(placed), float(i == 0), -1.0 * i, group=str(g))
            for i, placed in enumerate(shown)
        ]
    return as_pictures(records)


def make(
    method: str, model: Path, folder: Path, records: Any = None, opening: Any = None, **options: Any
) -> Any:
    """A trainer of `method`, prepared on scored scenes, or on `records` (pairs are taken apart)."""
    backbone = open_model(model, **(opening or {}))
    kind = trainer_class(method)
    trainer = kind(kind.Config(**options), backbone, seed=0)
    if "groups" in kind.data_kinds:
        trainer.prepare(open_groups(backbone, folder, records, trainer.config.group_size))
    else:
        store, known = encoded_pictures(backbone, folder, records)
        trainer.prepare(PictureCache(store, kind.choose(trainer.config, known)))
    return trainer


def open_groups(backbone: Any, folder: Path, records: Any = None, size: int | None = None) -> GroupCache:
    """The cached groups of scored scenes or of `records`."""
    return GroupCache(*encoded_pictures(backbone, folder, records), size)


def encoded_pictures(backbone: Any, folder: Path, records: Any = None) -> tuple[EncodedRecords, Pictures]:
    """Pictures of scored scenes or of `records`, encoded by `backbone` on first use, and what is known of them."""
    records = scored_scenes() if records is None else records
    data = DataConfig(source="unused", resolution=64, cache_dir=str(folder))
    store = open_encoded(records, lambda: backbone, data, backbone.config)
    return store, pictures_of(records) if isinstance(records, PictureRecords) else pictures_of_pairs(records)


def pairs_of(trainer: Any, folder: Path, count: int = 6) -> Any:
    """The same scenes as cached pairs."""
    return open_pairs(trainer.backbone, folder, count)


def scene_pairs(count: int = 6) -> Any:
    """Pairs of scenes, to be taken apart."""
    return as_records(scene_records(count))
