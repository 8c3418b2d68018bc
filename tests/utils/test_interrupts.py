"""Ctrl-C."""

import signal

import pytest

from megamoe.utils.interrupts import on_interrupt


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_an_interrupt_that_is_ignored_stays_so_and_any_other_is_handled(before, monkeypatch):
    given = []
    monkeypatch.setattr(signal, "getsignal", lambda number: before)
    monkeypatch.setattr(signal, "signal", lambda *handled: given.append(handled))
    on_interrupt(signal.default_int_handler)
    assert given == [(signal.SIGINT, signal.default_int_handler)] * (before is signal.SIG_DFL)
