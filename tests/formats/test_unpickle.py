"""Files of torch.save run no code when they are opened, and make no object of DeepSpeed's."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from indexed import Malicious
from refusals import has, refusal

from megamoe.formats.unpickle import safe_load


@pytest.mark.parametrize("zipped", [True, False])
def test_a_planted_pickle_is_refused_by_name_and_does_not_run(tmp_path, zipped):
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    if zipped:
        torch.save({"x": [Malicious(mark)]}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Malicious(mark)}))
    problem = refusal(safe_load, path)
    has(problem, str(path))
    assert ("system" in problem and "do not open it" in problem) if zipped else "damaged" in problem
    assert not mark.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())  # the trap is real
    assert mark.exists()


def test_of_objects_of_deepspeed_the_attributes_come_back_without_their_class(tmp_path):
    dynamic = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False, dtype=torch.half)
    torch.save({"a": [LossScaler(128.0), (dynamic, 1)], "stage": ZeroStageEnum(2)}, tmp_path / "x.pt")
    found = safe_load(tmp_path / "x.pt")
    assert type(found["a"][0]) is SimpleNamespace
    assert vars(found["a"][0]) == vars(LossScaler(128.0))
    assert vars(found["a"][1][0]) == vars(dynamic)
    assert found["stage"] == 2
    has(refusal(safe_load, tmp_path / "none.pt"), str(tmp_path / "none.pt"), "is missing")


class ChangesAnEnum:
    def __reduce__(self):
        return ZeroStageEnum, (2,), {"_value_": 99}


def test_a_file_cannot_change_a_member_of_an_enum(tmp_path):
    torch.save({"zero_stage": ChangesAnEnum()}, tmp_path / "x.pt")
    has(refusal(safe_load, tmp_path / "x.pt"), str(tmp_path / "x.pt"))
    assert ZeroStageEnum(2).value == 2
