"""From a launcher's environment to ranks that know each other."""

import os
import re
import socket
import stat
import threading

import pytest

from megamoe.errors import UserError
from megamoe.launch import rendezvous
from megamoe.launch.rendezvous import (
    Seat,
    address_towards,
    find_seat,
    free_port,
    hosts_of,
    interface_towards,
    meet,
    tasks_per_node,
    version_problems,
)

DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "9",
}
TORCHRUN = {**{key: value for key, value in DEEPSPEED.items() if key != "LOCAL_SIZE"}, "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "n[1-2]",
    "MASTER_ADDR": "a", "MASTER_PORT": "9",
}  # fmt: skip


# --- the seat -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [(DEEPSPEED, "torch"), (TORCHRUN, "torch"), (SLURM, "slurm")],
    ids=["deepspeed", "torchrun", "slurm"],
)
def test_each_launchers_environment_gives_the_same_seat(environment, launcher):
    assert find_seat(environment) == Seat(5, 8, 1, 4, "a", 9, launcher)


def test_a_seat_in_an_environment_gives_the_same_seat():
    assert find_seat(find_seat(SLURM).environment()) == Seat(5, 8, 1, 4, "a", 9, "torch")


def test_a_rank_without_a_launcher_is_alone_on_a_free_port():
    seat = find_seat({})
    assert (seat.rank, seat.world_size, seat.local_size, seat.launcher) == (0, 1, 1, "none")
    with socket.socket() as probe:
        probe.bind((seat.address, seat.port))


def test_a_batch_script_of_slurm_itself_is_no_rank():
    batch = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert find_seat(batch).world_size == 1


def test_half_an_environment_names_what_is_missing():
    with pytest.raises(UserError, match=r"RANK is 5, but WORLD_SIZE and MASTER_PORT are not set; start megamoe by"):
        find_seat({"RANK": "5", "MASTER_ADDR": "a"})


def put_scontrol(folder, monkeypatch):
    script = folder / "scontrol"
    script.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && echo "$3" | sed "s/n\\[1-2\\]/n1\\nn2/"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_under_slurm_ranks_agree_on_address_and_port_without_a_word(tmp_path, monkeypatch):
    put_scontrol(tmp_path, monkeypatch)
    own = {key: value for key, value in SLURM.items() if not key.startswith("MASTER")}
    seats = {find_seat({**own, "SLURM_PROCID": str(rank)}) for rank in range(8)}
    assert {seat.address for seat in seats} == {"n1"}
    (port,) = {seat.port for seat in seats}
    assert 15_000 <= port < 30_000
    assert find_seat({**own, "SLURM_STEP_ID": "2"}).port != port
    assert find_seat({**own, "SLURM_JOB_ID": "13"}).port != port


def test_hosts_that_slurm_cannot_spell_out_are_a_problem_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"n\[1-2\] cannot be spelled out .*set MASTER_ADDR to the first"):
        hosts_of("n[1-2]")


def test_tasks_per_node_in_slurms_form():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


# --- meeting --------------------------------------------------------------------------------------------------------


def meet_all(seats, seconds=30.0):
    """What each of the seats gets, a Meeting or a UserError; each on a thread of its own."""
    answers = {}

    def one(place, seat):
        try:
            answers[place] = meet(seat, seconds)
        except UserError as error:
            answers[place] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(seats)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[place] for place in range(len(seats))]


def seats(ranks, world_size, port=None):
    port = port or free_port()
    return [Seat(rank, world_size, rank, world_size, "127.0.0.1", port, "torch") for rank in ranks]


def test_ranks_that_have_met_know_each_other_and_share_a_store():
    meetings = meet_all(seats([0, 1, 2], 3))
    assert len({tuple(member.pid for member in meeting.members) for meeting in meetings}) == 1
    assert len(meetings[1].members) == 3
    meetings[0].store.set("key", "value")
    assert meetings[2].store.get("key") == b"value"


def test_a_rank_alone_needs_no_store():
    (meeting,) = meet_all(seats([0], 1))
    assert meeting.store is None


def test_ranks_that_do_not_come_are_named_once_and_all_end():
    said, silent = meet_all(seats([0, 2], 4), seconds=2)
    assert len(said.problems) == 1
    assert "2 of 4 ranks have joined" in said.problems[0]
    assert "rank 1, 3 did not" in said.problems[0]
    assert silent.problems == []


def test_a_rank_that_comes_twice_is_refused():
    port = free_port()
    first, *others = meet_all([*seats([0, 1], 2, port), *seats([1], 2, port)], seconds=5)
    refused = [answer for answer in others if isinstance(answer, UserError)]
    assert len(refused) == 1
    assert "is not the first rank 1 to come" in refused[0].problems[0]
    assert len(first.members) == 2


def test_a_rank_0_that_does_not_come_is_said_by_the_others():
    (answer,) = meet_all(seats([1], 2), seconds=1)
    assert "rank 1 on " in answer.problems[0]
    assert "cannot reach rank 0 at 127.0.0.1:" in answer.problems[0]


def test_a_busy_port_is_named():
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        (answer,) = meet_all(seats([0], 2, port), seconds=1)
    assert answer.problems == [
        f"port {port} is in use on {socket.gethostname()}; set MASTER_PORT to a free one, or leave it out."
    ]


def test_a_rank_with_other_versions_is_named_with_its_host(monkeypatch):
    names = iter(["h1", "h2"])
    monkeypatch.setattr(socket, "gethostname", lambda: next(names))
    versions = iter([{"torch": "2.13"}, {"torch": "2.12"}])
    monkeypatch.setattr(rendezvous, "versions", lambda: next(versions))
    answers = meet_all(seats([0, 1], 2))
    (problem,) = [problem for answer in answers for problem in answer.problems]
    assert re.fullmatch(
        r"(h1|h2) has torch 2\.1[23], but (h1|h2) has 2\.1[23]; install the same on every host\.", problem
    )


def test_version_problems_name_each_package_and_host_once():
    hosts = {"h1": {"torch": "2.13", "python": "3.11"}, "h2": {"torch": "2.13", "python": "3.10"}, "h3": {"torch": "2"}}
    assert version_problems(hosts) == [
        "h2 has python 3.10, but h1 has 3.11; install the same on every host.",
        "h3 has torch 2, but h1 has 2.13; install the same on every host.",
        "h3 has python None, but h1 has 3.11; install the same on every host.",
    ]


# --- the network ----------------------------------------------------------------------------------------------------


def test_the_way_to_this_host_is_a_loopback_and_names_no_interface():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_towards("127.0.0.1") is None


def test_there_is_no_way_to_a_name_that_means_nothing():
    assert address_towards("no-such-host.invalid") is None
    assert interface_towards("no-such-host.invalid") is None
