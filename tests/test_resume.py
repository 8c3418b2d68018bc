"""What a run starts from, and what it may change when it resumes."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corpora import build, random_tokens
from refusals import has, refusal, refusals
from toy import begin, check, ds_config

from megamoe.data.ledger import DataLedger

problem = partial(refusal, check)


def write_ds(folder, ds):
    (folder / "ds.json").write_text(json.dumps(ds))


def complete(run, step):
    """A checkpoint of that step, by its name and the file that is written last."""
    folder = Path(run["run_dir"]) / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text("{}\n")


def change_record(run, /, **changes):
    path = Path(run["run_dir"]) / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def started(run, **changes):
    """The run as an earlier start left it, with a checkpoint at step 3 and changes of its record."""
    begin(check(run))
    change_record(run, **changes)
    complete(run, 3)
    return {**run, "resume": True}


def test_a_folder_that_the_run_cannot_have_is_refused_and_left_alone(inputs, tmp_path):
    has(problem({**inputs, "resume": True}), "holds no run to resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    has(problem(inputs), "holds no run; choose another --run_dir")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    has(problem({**inputs, "run_dir": str(tmp_path / "run" / "thesis.txt" / "x")}), "thesis.txt is a file")
    (tmp_path / "run" / "thesis.txt").unlink()
    (tmp_path / "run").rmdir()
    started(inputs)
    has(problem(inputs), "holds another run")


def test_auto_resume_begins_a_run_and_goes_on_with_it_from_the_newest_checkpoint_whatever_latest_says(inputs):
    run = {**inputs, "auto_resume": True}
    assert not check(run).start.is_resuming
    started(inputs)
    complete(run, 10)
    (Path(run["run_dir"]) / "checkpoints" / "latest").write_text("step_3")
    start = check(run).start
    assert start.is_resuming
    assert [path.name for path in start.candidates] == ["step_10", "step_3"]


def test_resuming_without_a_complete_checkpoint_is_refused_and_auto_resume_begins_again(inputs):
    run = started(inputs)
    (Path(run["run_dir"]) / "checkpoints" / "step_3" / "index.json").unlink()  # killed while it was written
    has(problem(run), "holds no complete checkpoint to resume from; give --auto_resume")
    start = check({**inputs, "auto_resume": True}).start
    assert (start.is_resuming, start.candidates) == (True, [])


def test_a_run_without_a_checkpoint_resumes_from_the_weights_it_was_started_with_only(inputs):
    run = started(inputs)
    recorded = json.loads((Path(run["run_dir"]) / "run.json").read_text())["run"]
    change_record(run, run={**recorded, "init_from": "old.pt"})
    has(problem({**run, "init_from": "new.pt"}), 'init_from "old.pt", not "new.pt"')
    check(run)  # from the checkpoint
    DataLedger().gone_back(1, 3, generation=1).write(Path(run["run_dir"]))  # which the run has left
    again = {**inputs, "auto_resume": True}
    has(problem(again), 'init_from "old.pt", not null; give the same again')
    assert "old.pt" in problem({**again, "init_from": "old.pt"})  # is looked for


def test_resuming_with_what_decides_the_losses_changed_is_refused_with_what_differs(inputs):
    record = check(inputs).record
    ds, model, phase = record["deepspeed"], record["model"], record["phases"][0]
    (data,) = phase["data"]
    run = started(inputs)
    for changes, parts in (
        *(({key: "another"}, [f'{key} "another", not ']) for key in ("seed", "tokenizer_sha256")),
        ({"phases": [{**phase, "seq_len": 9}]}, ['phase 1 has {"seq_len": 9}, not {"seq_len": 16}', "what lies ahead"]),
        ({"phases": [{**phase, "samples_per_step": 4}]}, ['{"samples_per_step": 4}, not', '"train_batch_size" to 4']),
        ({"phases": [{**phase, "data": [{**data, "weight": 2.0}]}]}, ['"weight": 2.0']),
        ({"phases": [{**phase, "data": [{**data, "fingerprint": "x"}]}]}, ['t": "x"', "--allow_changed_data"]),
        ({"model": {**model, "hidden_size": 64}}, ['model {"hidden_size": 64}, not {"hidden_size": 32}']),
        ({"deepspeed": {**ds, "optimizer": {"type": "Adam"}}}, ['optimization {"optimizer": ']),
        ({"deepspeed": {**ds, "gradient_clipping": 2.0}}, ['optimization {"gradient_clipping": ']),
        ({"deepspeed": {**ds, "bf16": {"enabled": True}}}, ['optimization {"bf16": ']),
        ({"deepspeed": {**ds, "communication_data_type": "bf16"}}, ['optimization {"communication_data_type": ']),
    ):
        change_record(run, **{**record, **changes})
        has(problem(run), *parts)
    change_record(run, **record)
    has(problem({**inputs, "auto_resume": True, "seed": 7}), "holds a run with seed 1234, not 7")


def test_resuming_with_what_leaves_the_losses_alone_is_welcome(inputs, tmp_path):
    run = started(inputs)
    for change in (
        {"zero_optimization": {"stage": 1}},
        {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
        {"steps_per_print": 7},
    ):
        write_ds(tmp_path, ds_config(2, **change))
        check(run)
    shutil.move(tmp_path / "corpus", tmp_path / "elsewhere")
    check({**run, "data": [str(tmp_path / "elsewhere")]})


def with_schedule(**params):
    ds = ds_config(2)
    ds["scheduler"]["params"].update(params)
    return ds


COSINE = {
    "type": "WarmupCosineLR",
    "params": {"warmup_type": "linear", "warmup_num_steps": 4, "total_num_steps": 40},
}
ADAMW = ds_config(2)["optimizer"]


def with_muon(muon_lr, **others):
    return ds_config(2, optimizer={"type": "Muon", "params": {"muon_lr": muon_lr, **others}})


def with_cosine(**others):
    params = {**ADAMW["params"], "lr": 0.01, **others}
    return ds_config(2, scheduler=COSINE, optimizer={**ADAMW, "params": params})


@pytest.mark.parametrize(
    ("before", "after", "said", "wrong"),
    [
        (
            with_schedule(decay_min_ratio=0.1),
            with_schedule(total_num_steps=80),
            'from {"params": {"total_num_steps": 40, "decay_min_ratio": 0.1}} to {"params": {"total_num_steps": 80}}',
            {**with_schedule(total_num_steps=80), "gradient_clipping": 9.0},
        ),
        (ds_config(2), with_cosine(), 'to {"type": "WarmupCosineLR", "params": ', with_cosine(eps=1e-5)),
        (
            with_muon(0.02),
            with_muon(0.01),
            'from {"optimizer.params.muon_lr": 0.02} to {"optimizer.params.muon_lr": 0.01}',
            with_muon(0.01, momentum=0.9),
        ),
    ],
    ids=["longer", "of another type", "Muon's peak"],
)
def test_another_schedule_is_welcome_on_resume_alone(inputs, tmp_path, before, after, said, wrong):
    run = started(inputs, deepspeed=before)
    write_ds(tmp_path, after)
    changes = check(run).changes
    assert said in changes.schedule
    has(problem({**inputs, "auto_resume": True}), "give --resume to continue with the new schedule")
    write_ds(tmp_path, wrong)
    has(problem(run), "holds a run with optimization")


def test_the_length_of_the_schedule_given_on_the_command_line_is_that_of_the_run(inputs):
    run = started({**inputs, "schedule_steps": 60})
    assert not check({**run, "schedule_steps": 60}).changes.schedule
    assert check({**run, "schedule_steps": 60}).last_step == 60
    assert check({**run, "schedule_steps": None}).changes.schedule.endswith('to {"params": {"total_num_steps": 40}}')
    has(problem({**run, "resume": False, "auto_resume": True, "schedule_steps": 50}), "give --resume")


def write_phases(folder, *phases):
    (folder / "phases.json").write_text(json.dumps({"phases": phases}))
    return {"data_schedule": str(folder / "phases.json")}


def test_what_was_trained_on_stays_and_what_lies_ahead_may_change_on_resume(inputs, tmp_path):
    step = 2 * 16  # tokens
    run = started({**inputs, **write_phases(tmp_path, {"tokens": 5 * step}, {"samples_per_step": 4})})  # to step 3
    for phases in (
        [{"tokens": 3 * step}, {"samples_per_step": 8}],
        [{"tokens": 5 * step}, {"seq_len": 8, "tokens": 10 * step}, {}],
        [{}],
    ):
        write_phases(tmp_path, *phases)
        assert check(run).changes.phases
        has(problem({**run, "resume": False, "auto_resume": True}), "other data ahead of step 3", "give --resume")
    for phases in ([{"tokens": 2 * step}, {"samples_per_step": 4}], [{"seq_len": 8}]):
        write_phases(tmp_path, *phases)
        has(problem(run), "trained to step 3 whose phase ", "what lies ahead may change")
    DataLedger().gone_back(1, 9, generation=0).write(Path(run["run_dir"]))  # step 3 has read the data of step 11
    write_phases(tmp_path, {"tokens": 3 * step}, {"samples_per_step": 4})
    has(problem(run), "trained to step 11")


def test_a_resume_that_leaves_out_the_data_schedule_is_told_to_give_it(inputs, tmp_path):
    run = started({**inputs, **write_phases(tmp_path, {"samples_per_step": 4})})
    has(problem({**run, "data_schedule": None}), f"give --data_schedule {tmp_path / 'phases.json'} again")


def test_a_longer_context_on_resume_may_raise_the_limit_of_the_preset(inputs, tmp_path):
    run = started({**inputs, "seq_len": 16})
    preset = json.loads(Path(run["preset"]).read_text()) | {"max_position_embeddings": 32}
    (tmp_path / "longer.json").write_text(json.dumps(preset))
    phases = write_phases(tmp_path, {"tokens": 5 * 2 * 16}, {"seq_len": 32})
    has(problem({**run, **phases}), "phase 2", "above max_position_embeddings 16")
    longer = {**run, **phases, "preset": str(tmp_path / "longer.json")}
    assert check(longer).changes.phases
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    change_record(run, model={**check(run).record["model"], **scaling})
    (tmp_path / "longer.json").write_text(json.dumps({**preset, **scaling}))
    has(problem(longer), 'model {"max_position_embeddings": 16}')


def test_a_copy_in_place_of_a_corpus_that_goes_on_begins_it_again_and_is_refused(inputs, tmp_path):
    shutil.copytree(tmp_path / "corpus", tmp_path / "copy")
    path, first = str(tmp_path / "corpus"), {"tokens": 2 * 16}
    run = started({**inputs, **write_phases(tmp_path, first, {"data": [path], "samples_per_step": 4})})
    check(run)
    write_phases(tmp_path, first, {"data": [str(tmp_path / "copy")], "samples_per_step": 4})
    has(problem(run), "phase 2", '"first_sample": 2', '"first_sample": 0')
    shutil.move(tmp_path / "corpus", tmp_path / "elsewhere")  # all of it
    (tmp_path / "copy").rename(tmp_path / "moved")
    write_phases(tmp_path, first, {"samples_per_step": 4})
    check({**run, "data": [str(tmp_path / "moved")]})


def test_other_data_is_welcome_where_it_is_allowed(inputs, tmp_path):
    run = started(inputs, tokenizer_sha256="another")
    build(tmp_path / "corpus" / "train", random_tokens(6000, 96), np.int16)
    has(" ".join(refusals(check, run)), '"fingerprint"', "tokenizer_sha256")
    record = check({**run, "allow_changed_data": True}).record
    before = json.loads((Path(run["run_dir"]) / "run.json").read_text())["phases"]
    assert record["replaced_data"] == ({"last_step": 3, "phases": before},)
    assert record["phases"] != before
    change_record(run, **record)
    complete(run, 4)
    assert check(run).record["replaced_data"] == record["replaced_data"]


def test_how_a_run_began_is_never_overwritten_and_each_resume_appends_its_record(inputs, tmp_path):
    run = started(inputs)
    start = (tmp_path / "run" / "run.json").read_bytes()
    write_ds(tmp_path, with_schedule(total_num_steps=80))
    begin(check(run))
    assert (tmp_path / "run" / "run.json").read_bytes() == start
    record = json.loads((tmp_path / "run" / "resumes.jsonl").read_text())
    assert record["run_id"] == json.loads(start)["run_id"]
    assert not check({**inputs, "auto_resume": True}).changes.schedule  # since the last resume
