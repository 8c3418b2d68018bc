"""Asking other hosts for their reports. Over real ssh and srun it is in tests/launchers."""

import pytest

from megamoe.launch.remote import ask_by_ssh


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
