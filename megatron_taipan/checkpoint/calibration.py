"""Calibrated gate thresholds: `calibration.json` beside a checkpoint's state.

    {"capacity": 0.15, "tokens": 65536, "data": "...", "thresholds": {"layers.6.gate.threshold": 1.234, ...}}

They belong to evaluation, not to the training state: the checkpoint's manifest does not know the file, a resumed run
ignores it, and evaluation and export use them in place of the configured threshold.
"""

import json
from pathlib import Path

from megatron_taipan.checkpoint.files import write_text
from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import parse_json

CALIBRATION_FILE = "calibration.json"


def write_thresholds(checkpoint: Path, thresholds: dict[str, float], **facts: float | int | str) -> Path:
    """Stores thresholds by buffer name, and facts about how they were found; replaces what was there."""
    write_text(checkpoint / CALIBRATION_FILE, json.dumps({**facts, "thresholds": thresholds}, indent=1) + "\n")
    return checkpoint / CALIBRATION_FILE


def read_thresholds(checkpoint: Path) -> dict[str, float]:
    """Calibrated thresholds by buffer name; empty where the checkpoint has none.

    Raises:
        UserError: the file is there and damaged.
    """
    try:
        text = (checkpoint / CALIBRATION_FILE).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{checkpoint / CALIBRATION_FILE} cannot be read: {error.strerror}") from error
    try:
        return {str(name): float(value) for name, value in parse_json(text)["thresholds"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint / CALIBRATION_FILE} is damaged ({error}); delete it and calibrate again"
        ) from error


def read_capacity(checkpoint: Path) -> float | None:
    """The share of held-out tokens that the thresholds were calibrated to select; None where they were not."""
    try:
        return float(parse_json((checkpoint / CALIBRATION_FILE).read_bytes())["capacity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # `read_thresholds` reports a damaged file
