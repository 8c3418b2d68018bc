"""Asking other hosts for their reports. Over real ssh and srun it is in tests/launchers."""

from megamoe.launch.remote import ask_by_ssh


def test_a_host_that_does_not_exist_is_named_next_to_the_reports():
    reports, silent = ask_by_ssh(["no-such-host.invalid"], ["true"])
    assert reports == {}
    assert len(silent) == 1
    assert silent[0].startswith("no-such-host.invalid does not answer by ssh (")
