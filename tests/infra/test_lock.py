"""What the images are made of: a lock file that fits pyproject.toml, packages known by bytes, our files."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.checks import ROOT

LOCK = ROOT / "infra/docker/requirements.txt"
EXTRAS = ("train", "serve", "sim", "cluster")
ENTRY = re.compile(r"^(?P<name>[a-z0-9.-]+)(\[[a-z,-]+\])?==(?P<version>\S+)")


def entries():
    """Name -> (version, text of the entry)."""
    found = {}
    for text in re.split(r"\n(?=[a-z0-9])", LOCK.read_text()):
        match = ENTRY.match(text)
        assert match, text[:80]
        found[match["name"]] = match["version"], text
    return found


def asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][name] for name in EXTRAS)]
    return [Requirement(line) for lines in lists for line in lines]


def test_every_requirement_is_locked_at_a_version_that_it_allows():
    locked = entries()
    for requirement in asked_for():
        version, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version}; run make lock"


def test_nothing_is_locked_that_nobody_asks_for():
    direct = {
        name for name, (_, text) in entries().items() if re.search(r"smolvla-ray \(pyproject\.toml\)", text)
    }
    assert direct == {canonicalize_name(requirement.name) for requirement in asked_for()}
    for name, (_, text) in entries().items():
        assert "# via" in text, name


def test_every_package_is_known_by_its_hash():
    for name, (_, text) in entries().items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", text), name


def test_what_the_dockerfile_copies_is_there_and_sent_to_the_builder():
    dockerfile = (ROOT / "infra/docker/Dockerfile").read_text()
    copied = [
        source
        for words in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE)
        for source in words.split()[:-1]
    ]
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{source}" for source in copied} == {line for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert all((ROOT / source).exists() for source in copied)
