"""What each tracker's own reader finds of a run that goes back once and is resumed once, and that no server holds it
up."""

import csv
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import torch
from ranks import run_alone

from megamoe.monitoring import sinks as module
from megamoe.monitoring import wandb_api
from megamoe.monitoring.names import flat_config, named
from megamoe.monitoring.sink import Sample, Sink
from megamoe.monitoring.sinks import BackgroundSink, SinkGroup, make_sinks

RUN_ID = "0123456789abcdef0123456789abcdef"
RECORD = {
    "run_id": RUN_ID, "command": ["--on_event", "https://secret"], "model": {"hidden_size": 32, "qk_norm": None},
    "deepspeed": {"optimizer": {"params": {"betas": [0.9, 0.95]}}, "comet": {"enabled": False, "api_key": "secret"}},
    "run": {"on_event": "https://secret", "compile": False},
}  # fmt: skip
CONFIG = {
    "run_id": RUN_ID, "model.hidden_size": 32, "deepspeed.optimizer.params.betas": "[0.9, 0.95]", "run.compile": False,
}  # fmt: skip
STEPS = ((10, 4.5), (20, 4.0), (30, 3.5), (20, 3.75), (40, 3.25))  # goes back to 10 before the fourth, resumes after it
KEPT = [(10, 4.5), (20, 3.75), (40, 3.25)]
COUNTS = torch.tensor([[4, 0, 12, 8], [6, 6, 6, 6]])
BUCKETS = [[0.0, 0.5, 4.0], [0.5, 1.5, 0.0], [1.5, 2.5, 12.0], [2.5, 3.0, 8.0]]  # of the first row
CONSOLE = (
    "loss", "lr", "tokens_per_second", "mfu", "max_vio", "running_max_vio", "grad_norm", "memory_gib", "seconds_left",
)  # fmt: skip
SAMPLE = Sample("To be", ", or *not*")


def open_sinks(folder, first_step, trackers):
    sinks = SinkGroup(make_sinks(trackers))
    sinks.open(folder, first_step, RECORD)
    return sinks


def log_run(folder):
    os.environ |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    sys.argv = ["pretrain.py", *RECORD["command"]]
    module.CLOSE_SECONDS = 300
    run_dir = folder / "my_run"
    run_dir.mkdir()
    files = {name: {"folder": run_dir / name} for name in ("tensorboard", "csv")}
    trackers = {**files, "wandb": {"project": "mine", "group": "all", "team": None}, "trackio": {}}
    sinks = open_sinks(run_dir, 0, trackers)
    for number, (step, loss) in enumerate(STEPS):
        if number == 3:
            sinks.go_back(10)
        if number == 4:
            (run_dir / "before.csv").write_bytes((run_dir / "csv" / "train.csv").read_bytes())
            sinks.log_scalars("valid", 20, {"loss": 2.5, "tokens": 4096})
            sinks.close()
            sinks = open_sinks(run_dir, 20, trackers)
        values = {**dict.fromkeys(CONSOLE, 0.5), "loss": loss, "router_entropy_by_block": {"1": 1.0, "12": 2.0}}
        sinks.log_scalars("train", step, values | ({"mtp_loss": 7.0} if number > 1 else {}))
        sinks.log_expert_loads(step, [1, 12], COUNTS)
    sinks.log_samples(40, [SAMPLE])
    sinks.log_text(40, "a line")
    sinks.close()
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    found = [one.config for one in Api().runs("megamoe")], SQLiteStorage.get_logs("megamoe", f"my_run-{RUN_ID[:8]}")
    (folder / "trackio.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    run_alone(log_run, folder)
    return folder / "my_run"


def wandb_records(folder):
    """By the kinds of records in one of W&B's offline runs."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    records = [json.loads(line) for line in subprocess.check_output(words, text=True, timeout=300).splitlines()]
    return lambda kind: [one[kind] for one in records if one["type"] == kind]


def test_wandb_has_the_values_on_its_own_axis_of_steps_in_one_run_that_is_resumed(run):
    first, second = (wandb_records(folder) for folder in sorted((run / "wandb").glob("offline-run-*")))
    rows = [one["item"] for records in (first, second) for one in records("history")]
    losses = [(row["trainer/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == list(STEPS)  # what is superseded stays
    (began,), (resumed,) = first("run"), second("run")
    assert (began["run_id"], began["display_name"], began["project"], began["run_group"]) == (
        RUN_ID, "my_run", "mine", "all",
    )  # fmt: skip
    assert (resumed["run_id"], resumed["resume"]) == (RUN_ID, True)
    assert {key: value for key, value in began["config"]["update"].items() if key != "_wandb"} == CONFIG
    assert any(one.get("glob_name") == "*" and one["step_metric"] == "trainer/global_step" for one in first("metric"))
    load = "router/expert_load/layer_12"
    loads = [(row[f"{load}.values"], row[f"{load}.bins"]) for row in rows if f"{load}.values" in row]
    assert loads == [([6, 6, 6, 6], [-0.5, 0.5, 1.5, 2.5, 3.5])] * len(STEPS)
    (table,) = (run / "wandb").glob("offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [list(SAMPLE)]
    assert [row["run/text"] for row in rows if "run/text" in row] == ["a line"]


def test_no_tracker_keeps_the_command_line(run):
    files = [file for file in run.parent.rglob("*") if file.is_file()]
    assert files
    assert [file for file in files if b"https://secret" in file.read_bytes()] == []


def test_trackio_has_the_values_in_one_run_that_is_resumed(run):
    (found,), logs = json.loads((run.parent / "trackio.json").read_text())
    assert found.items() >= CONFIG.items()
    assert sorted((row["step"], row["train/loss"]) for row in logs if "train/loss" in row) == sorted(STEPS)
    loads = [row["router/expert_load/layer_01"] for row in logs if "router/expert_load/layer_01" in row]
    assert [load["values"] for load in loads] == [[4, 0, 12, 8]] * len(STEPS)
    assert [(row["step"], row["run/text"]) for row in logs if "run/text" in row] == [(40, "a line")]
    (table,) = (row["samples"] for row in logs if "samples" in row)
    assert table["_value"] == [SAMPLE._asdict()]


def test_tensorboard_serves_scalars_histograms_text_and_the_configuration_without_what_is_superseded(run):
    words = ["tensorboard.main", "--logdir", str(run / "tensorboard"), "--port=0", "--host=127.0.0.1"]
    server = subprocess.Popen(
        [sys.executable, "-m", *words, "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def get(path, body=None, **query):
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{url}data/plugin/{path}?{urlencode(query)}", data, {"Content-Type": "application/json"})
        return json.load(urlopen(request, timeout=300))

    try:
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        while "samples/text_summary" not in get("text/tags").get(".", ()):
            time.sleep(0.1)
        tags = get("scalars/tags")["."]
        losses = get("scalars/scalars", run=".", tag="train/loss")
        loads = get("histograms/histograms", run=".", tag="router/expert_load/layer_01")
        sample = get("text/text", run=".", tag="samples/text_summary")[0]
        everything = {"allowedStatuses": ["STATUS_RUNNING", "STATUS_UNKNOWN"], "colParams": [], "sliceSize": 9}
        (group,) = get("hparams/session_groups", everything)["sessionGroups"]
    finally:
        server.kill()
        server.wait()
    assert [(step, loss) for _, step, loss in losses] == KEPT
    assert {tag.partition("/")[0] for tag in tags} == {"train", "valid", "throughput", "optimizer", "router"}
    assert {"router/entropy/layer_12", "optimizer/lr", "router/max_vio", "train/mtp_loss", "valid/loss"} <= tags.keys()
    assert [(step, buckets) for _, step, buckets in loads] == [(step, BUCKETS) for step, _ in KEPT]
    assert "<pre><code>To be, or *not*" in sample["text"]
    assert group["hparams"] == CONFIG
    assert {one["name"]["tag"]: one["value"] for one in group["metricValues"]} == {
        "train/loss": 3.25,
        "valid/loss": 2.5,
    }


def test_csv_is_a_table_with_a_row_per_step_and_a_column_for_what_comes_later(run):
    with open(run / "csv" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["train/loss"])) for row in rows] == KEPT
    assert [line.split(",")[0] for line in (run / "before.csv").read_text().splitlines()] == ["step", "10", "20"]
    assert [row["train/mtp_loss"] for row in rows] == ["", "7.0", "7.0"]
    assert rows[0]["router/entropy/layer_12"] == "2.0"
    assert (run / "csv" / "valid.csv").read_text().splitlines() == ["step,valid/loss,valid/tokens", "20,2.5,4096"]


def test_names_keep_their_kind_where_no_group_has_them_and_a_configuration_its_secrets():
    values = {"loss/code": 1.0, "weight_norm/experts": 2.0, "router_z_loss": 3, "other": None}
    assert named("train", {**values, "running_max_vio_by_block": {"1": 0.5}}) == {
        "train/loss/code": 1.0, "optimizer/weight_norm/experts": 2.0, "train/router_z_loss": 3,
        "router/running_max_vio/layer_01": 0.5,
    }  # fmt: skip
    assert named("valid", {"lr": 1.0}) == {"valid/lr": 1.0}
    assert flat_config(RECORD) == CONFIG


def log_to_hanging_server(folder, address):
    os.environ |= {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40, "WANDB_X_DISABLE_VIEWER": "true"}
    os.environ.pop("WANDB_MODE", None)
    wandb_api.START_SECONDS, module.CLOSE_SECONDS = 1, 300
    sinks = open_sinks(folder, 0, {"wandb": {}})
    sinks.log_scalars("train", 10, dict.fromkeys(CONSOLE, 0.5))
    sinks.close()


def test_wandb_goes_on_offline_where_its_server_hangs(tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:  # takes connections and answers none
        run_alone(log_to_hanging_server, tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [one["item"]["train/loss"] for one in wandb_records(folder)("history")] == [0.5]


def test_a_sink_that_hangs_holds_neither_the_others_nor_the_end(monkeypatch, capsys):
    class Hanging(Sink):
        def log_text(self, step, text):
            hangs.wait()

    monkeypatch.setattr(module, "WAITING", 2)
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.01)
    hangs = threading.Event()
    sinks = SinkGroup([BackgroundSink(Hanging())])
    for step in range(5):
        sinks.log_text(step, "a line")
    (line,) = capsys.readouterr().err.splitlines()
    assert "Hanging is 2 calls behind" in line
    sinks = SinkGroup([BackgroundSink(Hanging())])
    sinks.log_text(1, "a line")
    sinks.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "Hanging has not finished within 0.01 s" in line
    hangs.set()
