"""Which experts a rank holds, and that nobody else works it out."""

import ast
from pathlib import Path

import torch.distributed as dist
from ranks import run_ranks

from megamoe.model.topology import ExpertTopology

ROOT = Path(__file__).parents[2]
OWNER = "megamoe/model/topology.py"
HELPERS = [path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")]
PROGRAM = sorted([*(ROOT / "megamoe").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *HELPERS])


def groups_of_deepspeed(sizes):
    """By ep_size (ranks that hold one set of experts together, ranks that hold the same experts), as DeepSpeed has made
    them."""
    from deepspeed.utils import groups

    found = {}
    for ep_size in sizes:
        groups._create_expert_and_data_parallel(ep_size)
        name = f"ep_size_{ep_size}"
        members = [groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)]
        found[ep_size] = [dist.get_process_group_ranks(group) for group in members]
    return found


def test_the_groups_are_those_that_deepspeed_makes():
    for rank, made in enumerate(run_ranks(4, groups_of_deepspeed, (1, 2, 4))):
        for ep_size, (together, alike) in made.items():
            here = ExpertTopology(8, ep_size, 4, rank)
            others = [ExpertTopology(8, ep_size, 4, other) for other in range(4)]
            assert together.index(rank) == here.ep_rank
            assert alike.index(rank) == here.replica
            assert alike == [other.rank for other in others if other.expert_ids == here.expert_ids]
            assert len(alike) == here.replicas
            assert len(alike) == 1 or alike[1] - alike[0] == here.replica_stride
            assert [expert for other in together for expert in others[other].expert_ids] == list(range(8))


def arithmetic_with_ep_size(source):
    """Lines that compute with something called `ep_size`; strings put together by "%" or "*" do not count."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        operands = []
        if isinstance(node, ast.BinOp):
            operands = [node.left, node.right]
        elif isinstance(node, ast.AugAssign):
            operands = [node.target, node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "divmod":
            operands = node.args
        names = {getattr(operand, "id", getattr(operand, "attr", None)) for operand in operands}
        if "ep_size" in names:
            lines.append(node.lineno)
    return lines


def test_nobody_else_computes_with_ep_size():
    found = {
        str(path.relative_to(ROOT)): lines for path in PROGRAM if (lines := arithmetic_with_ep_size(path.read_text()))
    }
    assert found.keys() == {OWNER}, found
