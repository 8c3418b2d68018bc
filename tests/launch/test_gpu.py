"""What a rank on a GPU sets up."""

import os
from unittest import mock

import pytest
from ranks import run_alone

from megamoe.launch import distributed
from megamoe.launch.gpu import SETTINGS, use_expandable_segments


def settings(environment):
    os.environ.update(environment)
    line = use_expandable_segments()
    return line, {name: os.environ[name] for name in SETTINGS if name in os.environ}


@pytest.mark.parametrize("name", [None, *SETTINGS])
def test_the_allocators_segments_grow_unless_the_environment_sets_it_up_and_the_run_says_which(name):
    given = {name: "max_split_size_mb:128"} if name else {}
    line, found = run_alone(settings, given)
    assert found == (given or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    assert (f"{name} sets it: max_split_size_mb:128" if name else "expandable segments") in line


def settings_at_the_first_touch():
    def touch(local_rank):
        raise InterruptedError(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))

    with mock.patch.multiple(distributed, is_on_cpu=lambda: False, choose_device=touch):
        try:
            distributed.init_distributed()
        except InterruptedError as touched:
            return touched.args


def test_it_is_set_up_before_the_device_is_touched():
    assert run_alone(settings_at_the_first_touch) == ("expandable_segments:True",)
