"""What a rank on a GPU sets up."""

import os
from unittest import mock

import pytest
from ranks import run_alone

from megamoe.launch import distributed
from megamoe.launch.gpu import SETTINGS, use_expandable_segments

OWN = "max_split_size_mb:128"


def settings_at_the_first_touch(environment):
    """Of the allocator, when `init_distributed` comes to the device; and what is said of them."""
    os.environ.update(environment)
    said, touch = use_expandable_segments(), mock.Mock(side_effect=InterruptedError)
    if not environment:
        del os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    patched = mock.patch.multiple(distributed, is_on_cpu=lambda: False, choose_device=touch)
    with patched, pytest.raises(InterruptedError):
        distributed.init_distributed()
    return said, {name: os.environ[name] for name in SETTINGS if name in os.environ}


@pytest.mark.parametrize("name", [None, *SETTINGS])
def test_the_allocators_segments_grow_unless_the_environment_sets_it_up_and_the_run_says_which(name):
    said, found = run_alone(settings_at_the_first_touch, {name: OWN} if name else {})
    assert found == ({name: OWN} if name else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    assert (f"{name} sets it: {OWN}" if name else "expandable segments") in said
