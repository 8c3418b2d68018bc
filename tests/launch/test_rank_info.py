"""Which rank a process is, from a launcher's environment."""

import pytest

from megamoe.launch.network import is_free
from megamoe.launch.rank_info import RankInfo, find_rank_info, hosts_of, tasks_per_node
from megamoe.utils.errors import UserError

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


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [(DEEPSPEED, "torch"), (TORCHRUN, "torch"), (SLURM, "slurm")],
    ids=["deepspeed", "torchrun", "slurm"],
)
def test_each_launchers_environment_gives_the_same_rank_info(environment, launcher):
    assert find_rank_info(environment) == RankInfo(5, 8, 1, 4, "a", 9, launcher)


def test_rank_info_survives_its_own_environment():
    assert find_rank_info(find_rank_info(SLURM).environment()) == RankInfo(5, 8, 1, 4, "a", 9, "torch")


def test_a_rank_without_a_launcher_is_alone_on_a_free_port():
    info = find_rank_info({})
    assert (info.rank, info.world_size, info.local_size, info.launcher) == (0, 1, 1, "none")
    assert is_free(info.port)


def test_a_batch_script_of_slurm_itself_is_no_rank():
    batch = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert find_rank_info(batch).world_size == 1


def test_half_an_environment_names_what_is_missing():
    with pytest.raises(UserError, match=r"RANK is 5, but WORLD_SIZE and MASTER_PORT are not set; start megamoe by"):
        find_rank_info({"RANK": "5", "MASTER_ADDR": "a"})


def test_under_slurm_all_ranks_compute_the_same_address_and_port(programs):
    programs(scontrol='[ "$1 $2" = "show hostnames" ] && echo "$3" | sed "s/n\\[1-2\\]/n1\\nn2/"')
    own = {key: value for key, value in SLURM.items() if not key.startswith("MASTER")}
    infos = {find_rank_info({**own, "SLURM_PROCID": str(rank)}) for rank in range(8)}
    assert {info.address for info in infos} == {"n1"}
    (port,) = {info.port for info in infos}
    assert 15_000 <= port < 30_000
    assert find_rank_info({**own, "SLURM_STEP_ID": "2"}).port != port
    assert find_rank_info({**own, "SLURM_JOB_ID": "13"}).port != port


def test_hosts_that_scontrol_cannot_expand_are_a_problem_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"n\[1-2\] cannot be expanded .*set MASTER_ADDR to the first"):
        hosts_of("n[1-2]")


def test_tasks_per_node_in_slurms_form():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]
