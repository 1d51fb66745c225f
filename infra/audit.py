"""Known vulnerabilities of what the images install, by pip-audit; `make audit`.

Ends with 0 when none is known, 1 when some are, and 2 when the database did not answer for every package:
pip-audit itself says "No known vulnerabilities found" of packages that it could not look up.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCK = Path(__file__).absolute().parent / "docker/requirements.txt"
PROBE = "requests==2.19.0"  # known to be vulnerable: CVE-2018-18074
UNKNOWN = 2


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.txt"
        probe.write_text(f"{PROBE}\n")
        (answer,) = audited(probe, "--no-deps")
    if not answer.get("vulns"):
        reason = answer.get("skip_reason", f"it names no vulnerability of {PROBE}")
        print(f"nothing was audited, the database of vulnerabilities cannot be reached from here: {reason}")
        return UNKNOWN
    return report(audited(LOCK, "--require-hashes"))


def audited(requirements: Path, *options: str) -> list[dict[str, Any]]:
    """What pip-audit says of each package: `vulns`, or `skip_reason` when it does not know."""
    command = [Path(sys.executable).parent / "pip-audit", "--requirement", requirements, *options]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"]
    except json.JSONDecodeError:
        return [{"name": str(requirements), "skip_reason": done.stderr.strip().splitlines()[-1]}]


def report(found: list[dict[str, Any]]) -> int:
    """Print what was found; the exit code."""
    for package in found:
        for vulnerability in package.get("vulns", []):
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
        if "skip_reason" in package:
            print(f"not audited: {package['skip_reason']}")
    if any(package.get("vulns") for package in found):
        return 1
    if any("skip_reason" in package for package in found):
        return UNKNOWN
    print(f"{len(found)} packages, no known vulnerability")
    return 0


if __name__ == "__main__":
    sys.exit(main())
