"""What pretrain.py checks before it builds or writes anything."""

import json
import shutil
from pathlib import Path

import native_models
import pytest
import torch
from refusals import has, only, refusals
from tokenizers import Tokenizer, models
from toy import PRECISION, PRESET, ds_config, write_inputs

import megamoe.job
from megamoe.config.run import RunConfig
from megamoe.data.ledger import DataLedger
from megamoe.formats.config_json import preset_of
from megamoe.job import Job


def problems(run, world_size=1):
    return refusals(job, run, world_size)


def job(run, world_size=1):
    return Job(RunConfig(**run), world_size, torch.device("cpu"), PRECISION)


@pytest.fixture
def inputs(tmp_path):
    return {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run")}


def write_tokenizer(folder, size=96):
    vocabulary = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, size)}}
    Tokenizer(models.WordLevel(vocabulary)).save(str(folder / "tokenizer.json"))


def write_ds(folder, **changes):
    (folder / "ds.json").write_text(json.dumps({**ds_config(2), **changes}))


def started(run, **changes):
    """A run folder as an earlier run left it, with a checkpoint at step 3."""
    folder = job(run).run_dir
    job(run).enter_folder(0, None)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **changes}))
    (folder / "checkpoints" / "step_3").mkdir(parents=True)
    (folder / "checkpoints" / "step_3" / "index.json").write_text("{}\n")


def test_problems_of_all_owners_come_together(inputs, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(ds_config(2, zero_optimization={"stage": 3})))
    said = problems({**inputs, "ep_size": 3, "data": ["nowhere"], "resume": True, "steps": 10**6}, world_size=2)
    parts = ["holds no run to resume", "stage is 3", "the 2 ranks", "the 4 experts", "nowhere.bin", "steps is 1000000"]
    assert len(said) == len(parts)
    assert all(any(part in problem for problem in said) for part in parts), said


def test_a_vocabulary_too_small_for_the_corpus_is_found_by_the_rank_that_reads_it_before_training(inputs, tmp_path):
    (tmp_path / "preset.json").write_text(json.dumps({**PRESET, "vocab_size": 50}))
    cpu = torch.device("cpu")
    said = refusals(Job, RunConfig(**inputs), 2, cpu, PRECISION, False, True)
    assert len(said) == 2  # training and held-out text
    has(said[0], "beyond the model's vocabulary of 50")
    assert Job(RunConfig(**inputs), 2, cpu, PRECISION, False, False).data.corpora[0].num_tokens == 6000


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(inputs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    (problem,) = problems(inputs)
    assert "holds no run; choose another --run_dir" in problem
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_another_run_is_not_written_over(inputs):
    started(inputs)
    (problem,) = problems(inputs)
    assert "holds another run" in problem


@pytest.fixture
def resumed(inputs, tmp_path):
    """What is said of a resume of a run that was started with the changes."""

    def problem(**changes):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        started(inputs, **changes)
        return only(problems({**inputs, "resume": True}))

    return problem


def test_resuming_with_another_setting_that_changes_the_losses_is_refused_with_what_differs(inputs, resumed):
    record = job(inputs).record()
    model = {**record["model"], "hidden_size": 64}
    for key in ("seed", "seq_len", "samples_per_step", "tokenizer_sha256"):
        has(resumed(**{key: "another"}), f'{key} "another", not ')
    has(resumed(data=[{**record["data"][0], "weight": 2.0}]), 'data [{"', '"weight": 2.0')
    has(resumed(model=model), 'holds a run with model {"hidden_size": 64}, not {"hidden_size": 32}')
    for section, value in (
        ("optimizer", {"type": "Adam"}),
        ("gradient_clipping", 2.0),
        ("bf16", {"enabled": True}),
        ("communication_data_type", "fp32"),
    ):
        has(resumed(deepspeed={**ds_config(2), section: value}), f'optimization {{"{section}": ')


def test_a_longer_schedule_is_welcome_on_resume_and_refused_with_that_advice_on_auto_resume(inputs, tmp_path):
    before = ds_config(2)
    before["scheduler"]["params"]["decay_min_ratio"] = 0.1  # which the new one leaves out
    started(inputs, deepspeed=before)
    longer = ds_config(2)
    longer["scheduler"]["params"]["total_num_steps"] = 80
    write_ds(tmp_path, **longer)
    assert job({**inputs, "resume": True}).new_schedule == {"params": {"total_num_steps": 80, "decay_min_ratio": None}}
    (problem,) = problems({**inputs, "auto_resume": True})
    has(problem, '"total_num_steps": 40', "give --resume to continue with the new schedule")
    write_ds(tmp_path, **{**longer, "gradient_clipping": 9.0})
    has(only(problems({**inputs, "resume": True})), "gradient_clipping")


def test_a_schedule_of_another_type_is_welcome_on_resume_with_its_peak_wherever_that_is_set(inputs, tmp_path):
    started(inputs)
    cosine = ds_config(2)
    params = {"warmup_type": "linear", "warmup_num_steps": 4, "total_num_steps": 40}
    cosine["scheduler"] = {"type": "WarmupCosineLR", "params": params}
    cosine["optimizer"]["params"]["lr"] = 0.01
    (tmp_path / "ds.json").write_text(json.dumps(cosine))
    resumed = job({**inputs, "resume": True})
    assert resumed.new_schedule == {**cosine["scheduler"], "optimizer.params.lr": 0.01}
    assert resumed.schedule.peak == 0.01
    (problem,) = problems({**inputs, "auto_resume": True})
    assert "give --resume to continue with the new schedule" in problem
    cosine["optimizer"]["params"]["eps"] = 1e-5
    (tmp_path / "ds.json").write_text(json.dumps(cosine))
    (problem,) = problems({**inputs, "resume": True})
    assert '"eps": 1e-05' in problem


def test_the_peak_of_muons_matrices_changes_on_resume_as_that_of_the_schedule_does(inputs, tmp_path):
    def with_muon(muon_lr, **others):
        return ds_config(2, optimizer={"type": "Muon", "params": {"muon_lr": muon_lr, **others}})

    started(inputs, deepspeed=with_muon(0.02))
    (tmp_path / "ds.json").write_text(json.dumps(with_muon(0.01)))
    assert job({**inputs, "resume": True}).new_schedule == {"optimizer.params.muon_lr": 0.01}
    (problem,) = problems({**inputs, "auto_resume": True})
    assert "give --resume to continue with the new schedule" in problem
    (tmp_path / "ds.json").write_text(json.dumps(with_muon(0.01, momentum=0.9)))
    (problem,) = problems({**inputs, "resume": True})
    assert '"momentum": 0.9' in problem


def with_ramp(inputs, tmp_path, *ramp):
    (tmp_path / "ds.json").write_text(json.dumps(ds_config(2, accumulation=4)))
    return {**inputs, "batch_ramp": list(ramp)}


def test_a_batch_ramp_may_change_on_resume_for_steps_that_are_not_taken_yet_only(inputs, tmp_path):
    started(with_ramp(inputs, tmp_path, "2:5", "4:9"))  # and has a checkpoint at step 3
    for ramp, first in ((["2:4", "4:9"], 5), (["2:5"], 6), (["2:3"], 4), (["2:5", "4:9"], None)):
        assert job({**with_ramp(inputs, tmp_path, *ramp), "resume": True}).changes_ramp_at == first
    (problem,) = problems({**with_ramp(inputs, tmp_path, "2:2", "4:9"), "resume": True})
    assert "2 samples in step 3 of its batch_ramp, not 4, and 3 steps are taken" in problem
    (problem,) = problems({**with_ramp(inputs, tmp_path), "resume": True})
    assert "2 samples in step 1 of its batch_ramp, not 8" in problem
    (problem,) = problems({**with_ramp(inputs, tmp_path, "2:5"), "auto_resume": True})
    assert "give --resume to change step 6" in problem
    # A run that has gone back to step 3 has read data of further steps.
    DataLedger().gone_back(3, 6, generation=1).write(tmp_path / "run")
    assert job({**with_ramp(inputs, tmp_path, "2:5", "4:6"), "resume": True}).changes_ramp_at == 7
    (problem,) = problems({**with_ramp(inputs, tmp_path, "2:5"), "resume": True})
    assert "4 samples in step 6 of its batch_ramp, not 8, and 6 steps are taken" in problem


def test_a_run_that_began_before_there_were_ramps_had_none(inputs, tmp_path):
    run = with_ramp(inputs, tmp_path)
    started(run)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["run"]["batch_ramp"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert job({**run, "resume": True}).candidates
    (problem,) = problems({**with_ramp(inputs, tmp_path, "2:9"), "resume": True})
    assert "8 samples in step 1 of its batch_ramp, not 2" in problem


def test_a_run_without_a_precision_for_its_reductions_may_get_one_and_only_that(inputs, tmp_path):
    started(inputs)
    for way in ("resume", "auto_resume"):
        write_ds(tmp_path, communication_data_type="fp32")
        assert job({**inputs, way: True}).reduces_in_fp32_now
        write_ds(tmp_path, communication_data_type="fp32", gradient_clipping=9.0)
        (problem,) = problems({**inputs, way: True})
        assert "gradient_clipping" in problem
        assert "communication_data_type" not in problem


def test_how_a_run_began_is_never_overwritten_and_each_resume_appends_its_record(inputs, tmp_path):
    began = job({**inputs, "steps": 5})
    began.enter_folder(0, None)
    start = (tmp_path / "run" / "run.json").read_bytes()
    (tmp_path / "run" / "checkpoints" / "step_3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_3" / "index.json").write_text("{}\n")
    longer = ds_config(2)
    longer["scheduler"]["params"]["total_num_steps"] = 80
    (tmp_path / "ds.json").write_text(json.dumps(longer))
    again = job({**inputs, "resume": True})
    again.enter_folder(3, again.candidates[0])
    assert (tmp_path / "run" / "run.json").read_bytes() == start
    record = json.loads((tmp_path / "run" / "resumes.jsonl").read_text())
    assert (record["step"], record["checkpoint"], record["run_id"]) == (3, "step_3", json.loads(start)["run_id"])
    assert job({**inputs, "auto_resume": True}).candidates  # with the schedule of the last resume


def test_resuming_with_another_corpus_is_refused_but_it_may_lie_elsewhere(inputs, tmp_path):
    data = job(inputs).record()["data"]
    started(inputs, data=[{**data[0], "tokens": 5}])
    (problem,) = problems({**inputs, "resume": True})
    assert '"tokens": 5' in problem
    shutil.move(tmp_path / "corpus", tmp_path / "elsewhere")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "data": data}))
    assert job({**inputs, "resume": True, "data": [str(tmp_path / "elsewhere")]}).candidates


def test_resuming_with_what_leaves_the_losses_alone_is_welcome(inputs, tmp_path):
    started(inputs)
    for change in (
        {"zero_optimization": {"stage": 1}},
        {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
        {"steps_per_print": 7},
    ):
        write_ds(tmp_path, **change)
        assert job({**inputs, "resume": True}).candidates


def test_corpora_of_two_tokenizers_are_not_mixed(inputs, tmp_path):
    shutil.copytree(tmp_path / "corpus", tmp_path / "other")
    mix = {**inputs, "data": [str(tmp_path / "corpus"), str(tmp_path / "other")]}
    for name in ("corpus", "other"):
        write_tokenizer(tmp_path / name)
    assert len(job(mix).corpora) == 2
    write_tokenizer(tmp_path / "other", size=80)
    (problem,) = problems(mix)
    assert all(str(tmp_path / name / "tokenizer.json") in problem for name in ("corpus", "other"))


def test_what_deepspeed_itself_refuses_is_a_sentence_too(inputs, tmp_path):
    for change, parts in (
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, ["device", "'gpu'", "nvme"]),
        ({"flops_profiler": {"enabled": "maybe"}}, ["DeepSpeed refuses", "'str'"]),  # a TypeError in its code
        ({"communication_data_type": "foo"}, ["DeepSpeed refuses"]),
    ):
        write_ds(tmp_path, **change)
        has(only(problems(inputs)), *parts)


def test_resuming_goes_on_from_the_newest_checkpoint_whatever_latest_says(inputs):
    started(inputs)
    (Path(inputs["run_dir"]) / "checkpoints" / "latest").write_text("step_2")
    assert [path.name for path in job({**inputs, "resume": True}).candidates] == ["step_3"]


def test_resuming_without_a_complete_checkpoint_is_refused_and_auto_resume_begins_again(inputs):
    started(inputs)
    (Path(inputs["run_dir"]) / "checkpoints" / "step_3" / "index.json").unlink()  # killed while it was written
    (problem,) = problems({**inputs, "resume": True})
    assert "holds no complete checkpoint to resume from; give --auto_resume" in problem
    again = job({**inputs, "auto_resume": True})
    assert again.is_resuming
    assert again.candidates == []


def test_a_run_that_has_gone_back_from_all_its_checkpoints_begins_again_with_the_weights_it_was_started_with(inputs):
    started(inputs)
    record = json.loads((Path(inputs["run_dir"]) / "run.json").read_text())
    record["run"]["init_from"] = "old.pt"
    (Path(inputs["run_dir"]) / "run.json").write_text(json.dumps(record))
    DataLedger().gone_back(1, 3, generation=1).write(Path(inputs["run_dir"]))
    (problem,) = problems({**inputs, "auto_resume": True, "init_from": "old.pt"})
    assert "old.pt" in problem


def test_a_run_without_a_checkpoint_resumes_from_the_weights_it_was_started_with_only(inputs):
    started(inputs)
    shutil.rmtree(job({**inputs, "resume": True}).run_dir / "checkpoints")
    record = json.loads((Path(inputs["run_dir"]) / "run.json").read_text())
    record["run"]["init_from"] = "old.pt"
    (Path(inputs["run_dir"]) / "run.json").write_text(json.dumps(record))
    (problem,) = problems({**inputs, "auto_resume": True})
    assert 'init_from "old.pt", not null; give the same again' in problem
    (Path(inputs["run_dir"]) / "checkpoints" / "step_3").mkdir(parents=True)
    (Path(inputs["run_dir"]) / "checkpoints" / "step_3" / "index.json").write_text("{}\n")
    (problem,) = problems({**inputs, "resume": True, "init_from": "new.pt"})
    assert 'init_from "old.pt", not "new.pt"' in problem


def test_auto_resume_begins_a_run_goes_on_with_it_and_is_content_with_a_done_one_and_with_no_other(inputs):
    assert not job({**inputs, "auto_resume": True, "run_dir": inputs["run_dir"] + "-new"}).candidates
    started(inputs)
    again = job({**inputs, "auto_resume": True})
    assert [path.name for path in again.candidates] == ["step_3"]
    assert not again.claims_to_be_done
    assert job({**inputs, "auto_resume": True, "steps": 3}).claims_to_be_done
    has(only(problems({**inputs, "auto_resume": True, "seed": 7})), "holds a run with seed")


def test_a_corpus_without_held_out_text_trains_without_evaluation_and_says_so(inputs, tmp_path):
    assert "nothing is evaluated" not in job(inputs).describe(0)
    for suffix in ("bin", "idx"):
        (tmp_path / "corpus" / f"valid.{suffix}").unlink()
    unheld = job(inputs)
    assert unheld.evaluator() is None
    assert unheld.describe(0).count("so nothing is evaluated (--valid_data gives some)") == 1
    assert "\n" not in unheld.describe(0)


def test_experts_products_other_than_torchs_one_kernel_are_said(inputs, monkeypatch):
    for kernel, said in (("grouped_mm", None), ("triton", "Triton"), ("loop", "waits for the device")):
        asked = []
        monkeypatch.setattr(
            megamoe.job, "kernel_for", lambda *of, kernel=kernel, asked=asked: asked.append(of) or kernel
        )
        line = job(inputs).describe_products()
        assert (said in line and line.startswith("the experts' products are ")) if said else line is None
        assert asked == [(torch.device("cpu"), torch.float32)]


def test_compiling_without_a_compiler_is_refused(inputs):
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        (problem,) = problems({**inputs, "compile": True})
        assert "--compile needs a C++ compiler" in problem
        assert job(inputs)


def test_held_out_tokens_of_any_form_have_their_bits_per_byte(inputs, tmp_path):
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps({"valid": {"tokens": 600, "bytes": 1800}}))
    for form in ("", "/valid", "/valid.bin"):
        evaluator = job({**inputs, "valid_data": f"{tmp_path / 'corpus'}{form}"}).evaluator()
        assert evaluator.sets[0].tokens_per_byte == pytest.approx(1 / 3)


def test_a_tokenizer_with_ids_beyond_the_model_or_that_is_none_is_refused(inputs, tmp_path):
    write_tokenizer(tmp_path / "corpus", size=97)
    (problem,) = problems(inputs)
    assert "tokenizer.json has token id 96, beyond the model's vocabulary of 96" in problem
    (tmp_path / "corpus" / "tokenizer.json").write_text("{}")
    (problem,) = problems(inputs)
    assert "tokenizer.json cannot be read" in problem


def test_a_run_json_of_wrong_types_is_refused_in_a_sentence(inputs):
    started(inputs)
    file = Path(inputs["run_dir"]) / "run.json"
    record = json.loads(file.read_text())
    for key, value in (("run", []), ("deepspeed", "auto"), ("data", {}), ("data", [7]), ("model", []), ("seed", {})):
        file.write_text(json.dumps({**record, key: value}))
        said = problems({**inputs, "resume": True})
        assert any(key in problem and inputs["run_dir"] in problem for problem in said), said


# --- from a Hugging Face directory ------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    """A directory of a class of transformers, whose vocabulary is the corpus's."""
    native_models.new_model("Glm4Moe").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_directory_is_the_preset_and_the_weights_of_a_run(inputs, directory):
    run = {**inputs, "preset": str(directory), "init_from": str(directory), "seq_len": 16}
    assert job(run).model.router_score == "sigmoid"
    assert job(run).initial_weights == [directory]
    (problem,) = problems({**run, "ep_size": 3}, world_size=3)
    assert "the 8 experts" in problem
    changed = {**json.loads((directory / "config.json").read_text()), "architectures": ["GPT2LMHeadModel"]}
    (directory / "config.json").write_text(json.dumps(changed))
    (problem,) = problems(run)
    assert "GPT2LMHeadModel" in problem
    assert not Path(inputs["run_dir"]).exists()


def test_what_a_preset_changes_of_a_directorys_model_is_said(inputs, directory, tmp_path):
    run = {**inputs, "init_from": str(directory), "seq_len": 16}
    changed = {**preset_of(directory).model_dump(), "rope_theta": 5e5, "router_aux_loss_coef": 0.1}
    (tmp_path / "preset.json").write_text(json.dumps(changed))
    assert "rope_theta 500000.0 in place of 300.0" in job(run).describe_initial()
    assert "aux" not in job(run).describe_initial()
    assert job({**run, "preset": str(directory)}).describe_initial() is None


def test_weights_of_another_tokenizer_than_the_corpus_are_refused(inputs, directory, tmp_path):
    run = {**inputs, "preset": str(directory), "init_from": str(directory), "seq_len": 16}
    write_tokenizer(directory)
    write_tokenizer(tmp_path / "corpus", 90)
    (problem,) = problems(run)
    assert "has 90 tokens" in problem
    assert "starts from, 96" in problem
    assert "--tokenizer" in problem
    write_tokenizer(tmp_path / "corpus")
    job(run)
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=3))  # the same, written otherwise
    job(run)
