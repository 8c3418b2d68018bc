"""pretrain.py under DeepSpeed's own launcher, as a user starts it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from ranks import free_port
from toy import ds_config, write_inputs

from megamoe.checkpoint.reader import find_checkpoint, load_weights, open_source
from megamoe.config import ModelConfig
from megamoe.model.decoder import Decoder

ROOT = Path(__file__).parent.parent.parent


def command(run, ranks=2, **options):
    run = {**run, **options}
    words = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
    ]
    words.append(str(ROOT / "megamoe" / "pretrain.py"))
    for name, value in run.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


def start(words, folder):
    return subprocess.Popen(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def test_a_run_prints_the_logged_form_saves_and_its_weights_load_into_a_plain_model(tmp_path):
    run = write_inputs(tmp_path, ds_config(2))
    process = start(command(run, steps=4, ep_size=2, run_dir=tmp_path / "run"), tmp_path)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    lines = [line for line in stdout.splitlines() if re.match(r"step=\d+ avg_loss=", line)]
    assert len(lines) == 4  # one rank speaks
    assert re.match(r"step=4 avg_loss=\d\.\d{4} lr=0\.01 tok/s=\d+ mfu=\d+\.\d% max_vio=", lines[-1])
    preset = json.loads((tmp_path / "run" / "run.json").read_text())["model"]
    model = Decoder(ModelConfig(**preset))
    load_weights(model, open_source(find_checkpoint(tmp_path / "run")), torch.float32)
    ids = torch.arange(16).unsqueeze(0)
    assert torch.isfinite(model.eval()(ids)).all()


def test_every_problem_of_a_bad_configuration_is_said_once_with_exit_code_2_and_nothing_written(tmp_path):
    ds = ds_config(2, zero_optimization={"stage": 3}, fp16={"enabled": True}, gradient_cliping=1.0)
    run = write_inputs(tmp_path, ds)
    process = start(command(run, ep_size=3, data=[str(tmp_path / "none")], run_dir=tmp_path / "run"), tmp_path)
    _, stderr = process.communicate(timeout=200)
    said = errors(stderr)
    assert process.returncode == 2
    assert len(said) == len(set(said))
    assert any("zero_optimization.stage is 3" in line for line in said)
    assert any("fp16 on CPU has no loss scale" in line for line in said)
    assert any('did you mean "gradient_clipping"?' in line for line in said)
    assert sum("ep_size is 3" in line for line in said) == 2  # neither the ranks nor the experts
    assert any(f"{tmp_path / 'none'}.bin" in line for line in said)
    assert "Traceback" not in stderr
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_holds_another_run_is_left_alone(tmp_path):
    run = write_inputs(tmp_path, ds_config(2))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    process = start(command(run, steps=2, run_dir=folder), tmp_path)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 2
    assert len(errors(stderr)) == 1
    assert "holds another run" in stderr
    assert [path.name for path in folder.iterdir()] == ["run.json"]
