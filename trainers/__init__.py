"""One file per algorithm. `TRAINERS` names them; nothing is imported before it is asked for."""

from __future__ import annotations

TRAINERS: dict[str, str] = {
    "dpo": "diffalign.trainers.dpo:DPOTrainer",
}
