from __future__ import annotations

import json

from viommu.cli.check import Check, Outcome


def test_an_answer_becomes_json_as_it_is() -> None:
    check = Check("memfd", Outcome.OK, "can be made")

    assert json.loads(json.dumps(check._asdict())) == {
        "name": "memfd",
        "outcome": "ok",
        "found": "can be made",
        "remedy": "",
    }
