"""The table of what a run has sent."""

import io
import shutil
from contextlib import redirect_stdout

import pytest
from ranks import run_ranks
from toy import ds_config, train_here, write_inputs

from megamoe.planning.traffic_table import describe_traffic
from megamoe.training.collectives import Collectives


def said(run):
    with redirect_stdout(io.StringIO()) as console:
        train_here(run)
    return console.getvalue()


def test_a_run_ends_with_the_collectives_of_megamoe_and_of_deepspeed_next_to_what_is_predicted(tmp_path):
    ds = ds_config(2, accumulation=2, comms_logger={"enabled": True})
    ds["zero_optimization"].update(stage=2, reduce_bucket_size=5000)
    run = {**write_inputs(tmp_path, ds), "run_dir": str(tmp_path / "run"), "ep_size": 2, "steps": 3, "log_interval": 9}
    run["data"] += [shutil.copytree(run["data"][0], tmp_path / "other")]
    text = run_ranks(4, said, {**run, "data": list(map(str, run["data"]))})[0]
    assert "means of 3 steps" in text
    rows = [line.replace(",", "").split() for line in text.partition("predicted bytes\n")[2].splitlines()]
    found = {(kind, ranks): tuple(map(float, numbers)) for kind, ranks, *numbers in rows}
    others = {(kind, ranks) for kind in ("all_gather", "all_reduce") for ranks in "24"}
    assert found.keys() == {*others, ("all_to_all", "2")}
    calls, size, expected = found.pop(("all_to_all", "2"))
    assert calls == 2 * 2 * 7  # micro-batches, layers, and what each sends
    assert size == pytest.approx(expected, rel=0.2)  # as many rows to each rank are predicted
    assert all(size == expected > 0 for _, size, expected in found.values())


def test_without_a_prediction_none_is_shown():
    collectives = Collectives()
    collectives.entered, collectives.calls["reduce", 8], collectives.payload["reduce", 8] = 4, 2, 4096
    assert describe_traffic(collectives, None).splitlines()[-1].split() == ["reduce", "8", "0.5", "1,024", "-"]
