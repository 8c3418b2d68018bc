"""What the log of a run says of it before its first step."""

import json
import re

import native_models
import torch
from tokenizers import Tokenizer, models
from toy import check

from megamoe import run_record
from megamoe.formats.config_json import preset_of
from megamoe.run_record import describe_experts_gemms, first_lines


def lines(run, **options):
    return first_lines(check({**run, **options}), 0, None, None)


def test_a_corpus_without_held_out_text_trains_without_evaluation_and_says_so(inputs, tmp_path):
    assert "600 held-out tokens in" in lines(inputs)[0]
    for suffix in ("bin", "idx"):
        (tmp_path / "corpus" / f"valid.{suffix}").unlink()
    assert "so nothing is evaluated (--valid_data gives some)" in lines(inputs)[0]
    assert "\n" not in lines(inputs)[0]


def test_the_record_names_the_token_that_ends_a_document(inputs, tmp_path):
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "<halt>": 1})).save(str(tmp_path / "corpus/tokenizer.json"))
    for settings, end in (({}, "<|endoftext|>"), ({"eos_token": "<halt>"}, "<halt>")):
        (tmp_path / "corpus/tokenizer_config.json").write_text(json.dumps(settings))
        assert check(inputs).record["end_of_text"] == end


def test_best_fit_packing_says_what_it_wastes(inputs):
    assert "best-fit" not in lines(inputs)[0]
    assert "(best-fit packing: 375 samples, 0.0% of positions unused)" in lines(inputs, packing="best_fit")[0]


def test_a_corpus_that_is_read_more_than_four_times_is_said(inputs):
    samples = int(re.search(r"(\d+) x 16 tokens per step", lines(inputs)[0])[1])
    once = 375 / samples  # steps
    assert len(lines(inputs, schedule_steps=int(3.9 * once))) == 1
    (said,) = lines(inputs, schedule_steps=int(13 * once))[1:]
    assert said.startswith(f"reads {inputs['data'][0]} 13 times: ")


def test_experts_gemms_other_than_torchs_one_kernel_are_said(monkeypatch):
    for kernel, said in (("grouped_mm", None), ("triton", "Triton"), ("loop", "waits for the device")):
        monkeypatch.setattr(run_record, "kernel_for", lambda device, dtype, kernel=kernel: kernel)
        line = describe_experts_gemms(torch.device("cpu"), torch.float32)
        assert (said in line and line.startswith("the experts' GEMMs are ")) if said else line is None


def test_what_a_preset_changes_of_the_directory_that_a_run_starts_from_is_said(inputs, tmp_path):
    directory = tmp_path / "hf"
    native_models.new_model("Glm4Moe").save_pretrained(directory)
    changed = {**preset_of(directory).model_dump(), "rope_theta": 5e5, "router_aux_loss_coef": 0.1}
    (tmp_path / "other.json").write_text(json.dumps(changed))
    options = {"init_from": str(directory), "seq_len": 16}
    _, line = lines(inputs, preset=str(tmp_path / "other.json"), **options)
    assert line == f"the model differs from that of {directory} in rope_theta"
    assert len(lines(inputs, preset=str(directory), **options)) == 1
