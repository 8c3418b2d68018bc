"""Asking other hosts for their reports. Over real ssh and srun it is in tests/launchers."""

from dataclasses import replace

import pytest

from megamoe.commands import preflight
from megamoe.config.run import RunConfig
from megamoe.launch.preflight import Report
from megamoe.launch.remote import ask_by_ssh, reports_in


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (
            "echo 'ssh: Could not resolve hostname h2' >&2; exit 255",
            ["h2 does not answer by ssh (ssh: Could not resolve hostname h2); see that it is up and lets this host in"
             " by key."],
        ),
        # Its own sentences name it already, and all of them count.
        (
            "for what in torch pydantic; do echo error: h2 has no $what. >&2; done; exit 2",
            ["h2 has no torch.", "h2 has no pydantic."],
        ),
    ],
)  # fmt: skip
def test_a_host_that_gives_no_report_is_named_next_to_the_reports_and_what_it_says_is_passed_on(does, said, programs):
    programs(ssh=does)
    assert ask_by_ssh(["h2"], ["true"]) == ({}, said)


def test_nodes_that_share_a_host_name_have_a_report_each(monkeypatch, capsys):
    first = Report("h1", "", 0, {}, ["data/" + 600 * "x"], True, "h2", "10.0.0.1", 1234, False, [])
    both = [first, replace(first, node=1, port=4321)]
    told = iter(both)
    monkeypatch.setattr(preflight, "report", lambda *_: next(told))
    for _ in both:
        preflight.print_report(preflight.Preflight(launcher="report", words=["h2"]), "h2", RunConfig(), [])
    assert reports_in(capsys.readouterr().out) == both
