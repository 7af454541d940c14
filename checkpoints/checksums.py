"""SHA256SUMS: what the files of an exported folder were when it was written, as `sha256sum -c SHA256SUMS` reads it.

transformers does not look at the file. README.md is not in it: a card is there to be edited.
"""

from pathlib import Path

from megatron_taipan.checkpoint.files import flush_folder, size_and_sha256
from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import plain_name

SUMS = "SHA256SUMS"
EDITED = {"README.md", SUMS}
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


def write_sums(folder: Path) -> None:
    """Hashes every file of a finished folder; all of them are on the disk afterwards."""
    hashes = {path.name: size_and_sha256(path, flush=True)[1] for path in sorted(folder.iterdir())}
    lines = [f"{digest}  {name}\n" for name, digest in hashes.items() if name not in EDITED]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    size_and_sha256(folder / SUMS, flush=True)
    flush_folder(folder)


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by file name.

    Raises:
        UserError: the file does not exist, or it holds something else.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {SUMS}, so there is nothing to compare it with; export it again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / SUMS} cannot be read: {error}") from error
    sums = {}
    for number, line in enumerate(lines, 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not plain_name(name):
            raise UserError(f"{folder / SUMS} line {number} is not a SHA-256 and a file name; the file is damaged")
        sums[name] = digest
    return sums


def changed_files(folder: Path) -> list[str]:
    """What became of the files since: a sentence for each that is missing or changed, or is weights of other origin.

    Raises:
        UserError: as `read_sums`.
    """
    sums, faults = read_sums(folder), []
    for name, digest in sums.items():
        try:
            if size_and_sha256(folder / name, flush=False)[1] != digest:
                faults.append(f"{name} changed since it was written")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    present = {path.name for path in folder.iterdir()}
    strange = sorted(name for name in present - sums.keys() - EDITED if name.endswith(WEIGHTS))
    return faults + [f"{name} is not part of the export, and might be loaded instead of it" for name in strange]
