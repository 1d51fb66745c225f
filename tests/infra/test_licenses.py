"""What the images hold may be passed on: no package under the GPL or AGPL that was not thought about."""

import pytest

from infra import audit
from infra.licenses import make_list
from infra.licenses.make_list import EXCEPTIONS, Licence


def test_the_list_has_every_locked_package_at_its_version():
    listed = {licence.name: licence.version for licence in make_list.kept()}
    assert listed == make_list.locked(), "run make licenses"
    assert make_list.as_text(make_list.kept()) == make_list.LIST.read_text()


def test_no_package_is_under_a_refused_licence_but_those_that_are_named_with_a_reason():
    refused = {licence.name for licence in make_list.kept() if licence.is_refused}
    assert refused == set(EXCEPTIONS)
    assert make_list.refused(make_list.kept()) == 0


@pytest.mark.parametrize(
    ("licence", "refused"),
    [
        ("GPL-3.0-or-later", True),
        ("GNU General Public License v3 (GPLv3)", True),
        ("AGPL-3.0-only", True),
        ("GNU Affero General Public License v3", True),
        ("MIT AND GPL-2.0-only", True),
        ("UNKNOWN", True),
        ("MIT OR GPL-2.0-only", False),
        ("LGPL-3.0-only", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("BSD-3-Clause", False),
    ],
)
def test_gpl_and_agpl_are_refused_where_there_is_no_choice(licence, refused, capsys):
    found = Licence("planted", "1.0", licence)
    assert found.is_refused is refused
    assert make_list.refused([found]) == int(refused)
    assert ("planted 1.0" in capsys.readouterr().out) is refused


def test_a_library_in_a_wheel_counts():
    assert Licence("planted", "1.0", "MIT", "libx264 (GPL-2.0-or-later)").is_refused


def test_what_could_not_be_audited_is_no_success(capsys):
    known = {"name": "a", "version": "1", "vulns": []}
    assert audit.report([known]) == 0
    assert audit.report([known, {"name": "b", "skip_reason": "not found"}]) == audit.UNKNOWN
    assert "not audited: not found" in capsys.readouterr().out
    bad = known | {"vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
    assert audit.report([bad]) == 1
    assert "a 1: PYSEC-1, fixed in 2" in capsys.readouterr().out
