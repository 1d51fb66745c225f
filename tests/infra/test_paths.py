"""Ray's workers cannot start from a path with a space: such a project is reached through a link."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def printed_root(project, links):
    script = project / "infra/local/root.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "infra/local/root.sh", script)
    environment = os.environ | {"TMPDIR": str(links)}
    done = subprocess.run([script], env=environment, check=True, capture_output=True, text=True)
    return Path(done.stdout.rstrip("\n"))


def test_a_path_without_a_space_is_printed_as_it_is(tmp_path):
    assert printed_root(tmp_path / "project", tmp_path) == tmp_path / "project"


def test_a_path_with_a_space_is_reached_through_a_link(tmp_path):
    link = printed_root(tmp_path / "my project", tmp_path)
    assert " " not in str(link)
    assert link.resolve() == tmp_path / "my project"
