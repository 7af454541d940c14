"""Where a run goes on: the checkpoint that it starts from, and the one to go back to when its loss jumps."""

from pathlib import Path

from megatron_taipan.checkpoint.folder import WEIGHTS, Found, checkpoints, is_checkpoint, read_metadata, step_of
from megatron_taipan.checkpoint.verification import first_undamaged, newest_first, newest_verified, refuse_damaged
from megatron_taipan.config import Config
from megatron_taipan.errors import UserError


def find_checkpoint(config: Config) -> Found | None:
    """The verified checkpoint to start from, by checkpoint.load; None to start anew. Collective, the same everywhere.

    Raises:
        UserError: a new run was asked for in a folder that holds one, or the wanted checkpoint is not there.
    """
    directory, wanted = Path(config.checkpoint.dir), config.checkpoint.load
    there = checkpoints(directory)
    if wanted is None:
        if there:
            raise UserError(
                f"checkpoint.load=null starts a new run, but {directory} holds checkpoints up to {there[-1].name};"
                " choose another checkpoint.dir, or checkpoint.load=auto to resume"
            )
        return None
    found = newest_verified(directory)
    if found is None and there:
        names = ", ".join(path.name for path in there)
        raise UserError(f"{directory} holds only damaged checkpoints ({names}); delete them to start anew")
    if found is not None or wanted == "auto":
        return found
    if is_checkpoint(Path(wanted)):
        if read_metadata(Path(wanted)).get("contents") == WEIGHTS:
            raise UserError(
                f"checkpoint.load={wanted} holds weights only; start a new run with checkpoint.init={wanted}"
            )
        refuse_damaged(Path(wanted))
        return Found(Path(wanted), [])
    found = newest_verified(Path(wanted))
    if found is None:
        raise UserError(f"checkpoint.load={wanted} holds no complete and undamaged checkpoint")
    return found


def rewind_target(directory: Path, save_every: int) -> Path | None:
    """The newest verified checkpoint of the regular cadence, so that one written by a stop on the way changes nothing.

    Where none of the cadence is left, the newest; None before the first. Collective, the same on every rank.
    """
    there = newest_first(directory)
    regular = [path for path in there if save_every and (step_of(path) or 0) % save_every == 0]
    others = [path for path in there if path not in regular]
    found = first_undamaged([*regular, *others])
    return found.path if found else None
