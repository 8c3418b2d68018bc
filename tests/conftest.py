"""One thread a process, on the CPU and without the Hugging Face hub: the workers of pytest, their ranks and their
programs share the cores."""

import gc
import os
import signal
import tempfile

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's choice, on a host with GPUs too; tests on a GPU choose that
os.environ["HF_HUB_OFFLINE"] = "1"  # read when its package is imported; what the tests load is on this disk
# Inductor's cache does not tell apart what it has compiled for AVX-512 and for AVX2.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"megamoe-inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"),
)
torch.set_num_threads(1)
# A script's background jobs and nohup ignore them, which every process of a test would inherit.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
gc.disable()  # until all is imported and collected, which stays


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = max((mark.args[0] for mark in item.iter_markers("gpu")), default=0)
    if needed and needed > torch.cuda.device_count():
        pytest.skip(f"needs {needed} GPU{'s' * (needed > 1)}")


@pytest.fixture
def call(capsys):
    """Calls `megamoe VERB ...`; returns the lines that it prints."""
    from megamoe.__main__ import run  # of which tests of the processes themselves have no need

    def call(*words):
        run([*map(str, words)])
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def run(capsys):
    """Runs `megamoe VERB ...` to its exit; returns its exit code, what it prints, and the lines of stderr."""
    from megamoe.__main__ import run as run_verb
    from megamoe.config import cli

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda: run_verb([*map(str, words)]))
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return caught.value.code, said.out, said.err.splitlines()

    return run


@pytest.fixture
def inputs(tmp_path):
    """The fields of a RunConfig, whose files are in `tmp_path`."""
    from toy import ds_config, write_inputs  # takes seconds, which few tests need

    return {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def module_cache(tmp_path_factory):
    """transformers copies the code of a model into a cache; the tests of a session have one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
