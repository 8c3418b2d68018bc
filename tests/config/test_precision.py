"""What "auto" stands for, what a resume keeps, and what a run says of it."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from toy import SHIPPED, begin, recipe_of, write_inputs

from megamoe import pretrain
from megamoe.config import precision
from megamoe.config.precision import by_rates, dtype_to_compute_in, find_precision, precision_of
from megamoe.config.run import RunConfig
from megamoe.utils.errors import Problems
from megamoe.utils.hardware import Peak
from megamoe.utils.json_files import read_json

AVX2, AMX = by_rates(0.56e9, 46e9), by_rates(1000e9, 180e9)


def recipe_with(bf16):
    return recipe_of({**read_json(SHIPPED / "zero2_fp32.json"), "bf16": {"enabled": bf16}})


@pytest.mark.parametrize(("ratio", "choice"), [(82, "fp32"), (0.18, "bf16"), (1.4, "bf16"), (1.5, "fp32")])
def test_auto_is_bf16_unless_fp32_is_one_and_a_half_times_as_fast(ratio, choice):
    assert by_rates(1e11, ratio * 1e11).choice == choice


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_is_bf16_on_a_gpu_with_bf16_instructions_whatever_is_measured(has_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GB10")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    found = precision_of(torch.device("cuda"))
    assert found.choice == ("bf16" if has_bf16 else "fp32")
    assert found.describe(recipe_with("auto")).startswith(
        f"computes in {found.choice}: NVIDIA GB10 has {'' if has_bf16 else 'no '}bf16 instructions"
    )


@pytest.mark.parametrize(
    ("found", "recorded", "bf16", "begins"),
    [
        (AVX2, None, "auto", "computes in fp32: "),
        (AMX, "bf16", "auto", "computes in bf16: "),
        (AVX2, "bf16", "auto", "computes in bf16, as the run began; "),
        (AMX, "fp32", "auto", "computes in fp32, as the run began; "),
        (AVX2, None, True, "warning: computes in bf16, as ds.json demands, but "),
        (AVX2, None, False, None),  # given and fast
        (AMX, None, True, None),
    ],
)
def test_a_run_says_what_it_computes_in_and_both_rates(found, recorded, bf16, begins):
    line = replace(found, recorded=recorded).describe(recipe_with(bf16))
    assert line.startswith(f"{begins}{found.reason}") if begins else line is None
    assert ('set "bf16": {"enabled": "auto"} there' in (line or "")) == (begins is not None and bf16 is True)


def test_mfu_is_a_share_of_the_faster_measured_rate_or_of_the_data_sheet(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for dtype, of_h100 in ((torch.bfloat16, 989e12), (torch.float32, 67e12)):
        assert AVX2.mfu_peak(torch.device("cpu"), dtype) == Peak(46e9, is_measured=True)
        gpu = torch.device("cuda")
        assert precision_of(gpu).mfu_peak(gpu, dtype) == Peak(of_h100, is_measured=False)


def test_a_saved_16_bit_model_computes_in_fp32_where_that_is_faster_on_cpu(monkeypatch):
    slow = {torch.bfloat16: 1e9, torch.float16: 1e9, torch.float32: 5e10}
    monkeypatch.setattr(precision, "measured_flops", lambda device, dtype: slow[dtype])
    for saved in slow:
        assert dtype_to_compute_in(saved, torch.device("cpu")) == torch.float32
    assert dtype_to_compute_in(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    slow[torch.bfloat16] = 4e10
    assert dtype_to_compute_in(torch.bfloat16, torch.device("cpu")) == torch.bfloat16


def checked_precision(run, found):
    """What a run that is begun on these ranks resolves to, and records, where rank 0 measures `found`."""
    with mock.patch.object(precision, "precision_of", return_value=found if dist.get_rank() == 0 else None):
        checked = pretrain.check(RunConfig(**run), Problems(), torch.device("cpu"), is_first_on_host=False)
    if checked.start.folder:
        begin(checked)
    return checked.recipe.dtype, checked.record["deepspeed"]["bf16"]["enabled"]


def test_all_ranks_take_what_rank_0_measured_and_a_resume_keeps_it(tmp_path):
    ds = {**read_json(SHIPPED / "tiny.json"), "train_micro_batch_size_per_gpu": 1}
    run = {**write_inputs(tmp_path, ds), "run_dir": str(tmp_path / "run"), "steps": 2, "auto_resume": True}
    assert run_ranks(2, checked_precision, run, AVX2) == [("fp32", False)] * 2
    assert json.loads((tmp_path / "run/run.json").read_text())["deepspeed"]["bf16"]["enabled"] is False
    assert run_ranks(2, checked_precision, run, AMX) == [("fp32", False)] * 2
    assert run_ranks(2, checked_precision, {**run, "run_dir": str(tmp_path / "other")}, AMX) == [("bf16", True)] * 2


def precisions_of_records(folder, records):
    """What each record, in place of run.json, has a resume keep."""
    found = []
    for record in records:
        (folder / "run.json").write_text(record)
        with mock.patch.object(precision, "precision_of", return_value=AMX):
            found.append(find_precision(torch.device("cpu"), folder).recorded)
    return found


def test_a_resume_keeps_fp32_and_bf16_only_and_nothing_of_a_damaged_record(tmp_path):
    sections = ({"bf16": {"enabled": True}}, {"bf16": {"enabled": False}}, {"fp16": {"enabled": True}})
    records = [*(json.dumps({"deepspeed": ds}) for ds in sections), '{"deepspeed": 1}', '{"deepsp']
    assert run_ranks(1, precisions_of_records, tmp_path, records) == [["bf16", "fp32", None, None, None]]
