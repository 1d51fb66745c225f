"""What a sealed folder holds: size and SHA-256 of every file, in a MANIFEST.json that is written last."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"

Entries = dict[str, dict[str, Any]]  # file relative to the folder -> bytes, sha256


def entries(folder: Path) -> Entries:
    """Size and hash of every file of a folder."""
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(MANIFEST))
    return {str(p.relative_to(folder)): _entry(p) for p in paths}


def text(listed: Entries) -> str:
    """What a MANIFEST.json with these entries says."""
    return json.dumps({"files": dict(sorted(listed.items()))}, indent=1)


def write_manifest(folder: Path) -> None:
    """Seal a folder: list every file with size and hash, then put the list in place by one rename."""
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(text(entries(folder)))
    partial.rename(folder / MANIFEST)


def declared(manifest: str | bytes) -> Entries:
    """The entries of a manifest.

    Raises:
        ValueError: it is cut off, or no manifest.
    """
    try:
        files = json.loads(manifest)["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error!r}") from None
    if not files or not isinstance(files, dict):
        raise ValueError(f"{MANIFEST} lists no files")
    for name, entry in files.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"{MANIFEST} says {entry!r} of {name}, not bytes and sha256")
    return files


def problem(folder: Path, *, read_files: bool = True) -> str | None:
    """Why a folder does not hold what was sealed in it, or None if it does.

    Args:
        folder: that was sealed.
        read_files: whether the files' content is looked at; otherwise whether they are there and how large.
    """
    try:
        listed = declared((folder / MANIFEST).read_bytes())
        reasons = (_wrong(folder / name, name, entry, read=read_files) for name, entry in listed.items())
        return next((reason for reason in reasons if reason), None)
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not finished"
    except (OSError, ValueError) as error:
        return str(error)


def _wrong(path: Path, name: str, entry: Mapping[str, Any], *, read: bool) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{name} has {size} bytes, {MANIFEST} says {entry['bytes']}"
    if read and _entry(path) != entry:
        return f"{name} has not the SHA-256 that {MANIFEST} says"
    return None


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
