"""The benchmark of the limiter's scripts runs: what it asks changes with them."""

from __future__ import annotations

import pytest

from benchmarks import limiter_cost
from tests.support import ValkeyServer


def test_the_cost_of_a_script_is_printed_for_every_kind_of_limit(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each question is granted whole, or it would measure another one."""
    monkeypatch.setattr(limiter_cost, "ROUNDS", 1)
    monkeypatch.setattr(limiter_cost, "CALLS", 2)
    limiter_cost.server_time(valkey.url)
    assert capsys.readouterr().out.count("us in the server") == 12
