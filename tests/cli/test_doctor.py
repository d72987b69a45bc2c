from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from viommu.cli.exit_codes import ExitCode
from viommu.cli.host_checks import Check, Outcome
from viommu.cli.main import cli

GOOD = Check("python", Outcome.OK, "3.13")
ABSENT = Check("/dev/iommu", Outcome.ABSENT, "not there", "load it")
MISSING = Check("qemu", Outcome.MISSING, "none", "install it")


@pytest.mark.parametrize(
    ("checks", "code"),
    [([GOOD, ABSENT], ExitCode.OK), ([GOOD, MISSING], ExitCode.HOST)],
    ids=["ready", "lacking"],
)
def test_report(checks: list[Check], code: ExitCode, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def examine(qemu: str | None) -> list[Check]:
        asked.append(qemu)
        return checks

    monkeypatch.setattr("viommu.cli.doctor.examine_host", examine)

    table = CliRunner().invoke(cli, ["doctor", "--qemu", "q"])
    as_json = CliRunner().invoke(cli, ["doctor", "--json"])

    assert table.exit_code == as_json.exit_code == code
    assert asked == ["q", None]
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["ok", "python", "3.13"]
    assert lines[1].split()[:2] == list(checks[1][:2])[::-1]
    assert lines[2].strip() == f"-> {checks[1].remedy}"
    assert json.loads(as_json.stdout) == {
        "ready": code == ExitCode.OK,
        "checks": [
            {"name": c.name, "outcome": c.outcome, "found": c.found, "remedy": c.remedy}
            for c in checks
        ],
    }


def test_this_host() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--qemu", "/no/such"])

    assert result.exit_code == ExitCode.HOST
    assert "correct the path" in result.stdout
