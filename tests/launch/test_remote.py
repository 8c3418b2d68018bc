"""Asking other hosts for their reports. Over real ssh and srun it is in tests/launchers."""

import stat

from megamoe.launch.remote import ask_by_ssh


def test_a_host_that_does_not_exist_is_named_next_to_the_reports():
    reports, silent = ask_by_ssh(["no-such-host.invalid"], ["true"])
    assert reports == {}
    assert len(silent) == 1
    assert silent[0].startswith("no-such-host.invalid does not answer by ssh (")


def test_what_a_host_says_of_itself_is_passed_on(tmp_path, monkeypatch):
    """Its own sentences name it already, and all of them count."""
    (tmp_path / "ssh").write_text(
        "#!/bin/sh\nfor what in torch pydantic; do echo error: h2 has no $what. >&2; done; exit 2\n"
    )
    (tmp_path / "ssh").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert ask_by_ssh(["h2"], ["true"]) == ({}, ["h2 has no torch.", "h2 has no pydantic."])
