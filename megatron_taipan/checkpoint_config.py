"""Options of saving and resuming."""

from megatron_taipan.section import Section, option


class CheckpointConfig(Section):
    """Saving and resuming."""

    dir: str = option(..., "folder of this run's checkpoints")
    save_every: int = option(1000, "steps between full checkpoints; 0 saves at the end only", ge=0)
    load: str | None = option(
        "auto",
        "auto: resume from checkpoint.dir if it holds one; null: start from scratch; a folder: as auto, but while"
        " checkpoint.dir holds none start from that folder's newest",
    )
    init: str | None = option(
        None,
        "weights that a new run starts from: an export, an import, or a checkpoint of any run and layout; ignored once"
        " the run has a checkpoint",
    )
    save_weights_every: int = option(
        0, "steps between saves of the weights alone (a third of the size; for export and evaluation); 0: never", ge=0
    )
    keep_last_weights: int | None = option(None, "newest weights-only saves that are kept; null keeps all", ge=1)
    save_minutes: float | None = option(None, "save as well when this many minutes have passed since the last", gt=0)
    retry_s: float = option(60.0, "seconds after which a checkpoint that could not be written is tried again", gt=0)
    last_tries: int = option(10, "tries for the checkpoint at a run's end before it gives up with status 74", ge=1)
    asynchronous: bool = option(True, "write checkpoints in the background: training stops only to copy the state")
    keep_last: int | None = option(None, "newest full checkpoints that are kept; null keeps all", ge=1)
    keep_every: int | None = option(None, "checkpoints at multiples of this many steps are never deleted", ge=1)
