"""At the end of the run, a table: which client passed which scenario. What a scenario is, it does not know."""

from __future__ import annotations

import pytest

PASSED, FAILED, MISSING = "passed", "FAILED", "–"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found: dict[str, dict[str, str]] = {}               # scenario → client → outcome
    for outcome, word in (("passed", PASSED), ("failed", FAILED)):
        for report in terminalreporter.stats.get(outcome, ()):
            properties = dict(report.user_properties)
            if "scenario" in properties:
                found.setdefault(properties["scenario"], {})[properties["client"]] = word
    if found:
        terminalreporter.section("real clients")
        terminalreporter.write_line("\n".join(table(found)))


def table(found: dict[str, dict[str, str]]) -> list[str]:
    """In Markdown, so that it can be quoted."""
    clients = sorted({client for outcomes in found.values() for client in outcomes})
    rows = [["scenario", *clients], ["---"] * (len(clients) + 1)]
    rows += [[scenario, *(outcomes.get(client, MISSING) for client in clients)] for scenario, outcomes in found.items()]
    return [f"| {' | '.join(row)} |" for row in rows]
