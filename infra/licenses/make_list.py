"""The licences of what the images install -> infra/licenses/runtime.md; GPL and AGPL are refused.

python infra/licenses/make_list.py --python <one that has infra/docker/requirements.txt installed>

What a package says of itself is not all: its wheel may carry libraries of others, so these are looked for.
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from packaging.utils import canonicalize_name

ROOT = Path(__file__).absolute().parents[2]
LOCK = ROOT / "infra/docker/requirements.txt"
LIST = ROOT / "infra/licenses/runtime.md"
READ = {  # by us, of packages whose metadata name none
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",  # a package without files that pulls NVIDIA's
    "huey": "MIT",
    "skops": "MIT",
}
CARRIED = {"libx264": "GPL-2.0-or-later", "libx265": "GPL-2.0-or-later", "libreadline": "GPL-3.0-or-later"}
"""Libraries by the beginning of their file's name."""
EXCEPTIONS = {
    "av": "its wheel links FFmpeg with x264 and x265, which encode; we only decode. Who passes the images on "
    "passes these on, under the GPL; PyAV built against an FFmpeg without them does the same for us.",
}
"""Why a package that would be refused is borne."""


class Licence(NamedTuple):
    name: str
    version: str
    licence: str
    carried: str = ""
    """Libraries in its wheel under a licence that is refused."""

    @property
    def is_refused(self) -> bool:
        """Unknown, or GPL or AGPL and no other to choose; the LGPL is none of them."""
        closed = r"UNKNOWN|\bA?GPL|(?<!Lesser )General Public"
        return bool(self.carried) or all(re.search(closed, text) for text in self.licence.split(" OR "))


def main(python: Path) -> int:
    found = licences(python)
    LIST.write_text(as_text(found))
    return refused(found)


def refused(found: list[Licence]) -> int:
    """Print what may not be there; the exit code."""
    bad = [licence for licence in found if licence.is_refused and licence.name not in EXCEPTIONS]
    for licence in bad:
        print(f"{licence.name} {licence.version}: {licence.licence} {licence.carried}".rstrip())
    return int(bool(bad))


def locked() -> dict[str, str]:
    """Name -> version, of the lock file."""
    entry = re.compile(r"^([a-z0-9.-]+)(?:\[[a-z,-]+\])?==(\S+)", re.MULTILINE)
    return dict(entry.findall(LOCK.read_text()))


def licences(python: Path) -> list[Licence]:
    """Of every package of the lock file, as it is installed there."""
    command = [Path(sys.executable).parent / "pip-licenses", "--python", python, "--from=mixed"]
    command += ["--with-system", "--format=json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    installed = {str(canonicalize_name(package["Name"])): package for package in json.loads(done.stdout)}
    libraries = _libraries(python)
    found = []
    for name, version in sorted(locked().items()):
        package = installed[name]
        if package["Version"] != version:
            raise ValueError(f"{name}: {package['Version']} is installed, the lock file has {version}")
        licence = READ.get(name) or " ".join(package["License"].split())
        found.append(Licence(name, version, licence, ", ".join(libraries[name])))
    return found


def _libraries(python: Path) -> dict[str, list[str]]:
    """Name of a package -> what is in its wheel of the libraries that are looked for."""
    (site,) = (python.parents[1] / "lib").glob("python3*/site-packages")
    return {
        canonicalize_name(package.metadata["Name"]): [
            f"{library} ({licence})"
            for library, licence in CARRIED.items()
            if any(file.name.startswith(library) for file in package.files or [])
        ]
        for package in importlib.metadata.distributions(path=[str(site)])
    }


def as_text(found: list[Licence]) -> str:
    """The list as it is kept."""
    lines = [
        "# Licences of what the images install",
        "",
        "Made by `make licenses` from infra/docker/requirements.txt; GPL and AGPL are refused. NVIDIA's",
        "packages are under NVIDIA's own licences, and come with torch.",
        "",
        *(f"- **{name}** is borne: {why}" for name, why in EXCEPTIONS.items()),
        "",
        "| package | version | licence | carries |",
        "|---|---|---|---|",
        *(f"| {' | '.join(licence)} |" for licence in found),
    ]
    return "\n".join(lines) + "\n"


def kept() -> list[Licence]:
    """The list as it was read from the file."""
    rows = re.findall(r"^\| ([a-z0-9.-]+) \| (\d\S*) \| (.*?) \| (.*?) ?\|$", LIST.read_text(), re.MULTILINE)
    return [Licence(*row) for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True)
    sys.exit(main(parser.parse_args().python))
