"""Rooms import downward only, and DeepSpeed stays in the rooms that own it."""

import ast
import sys
from pathlib import Path

import megamoe

FOLDER = Path(megamoe.__file__).parent
SOURCES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
# From low to high; a room may import from the lines above its own only.
ORDER = [
    {"__init__"},
    {"config"},
    {"cli", "cpu", "tokenizer", "ds_config", "names", "manifest", "unpickle", "rendezvous", "stopping"},
    {"schedule", "layers", "loss", "router", "data", "corpus", "plan", "devices", "meter", "watch"},
    {"moe", "metrics", "reader", "sharding", "preflight"},
    {"model", "buckets", "traffic"},
    {"engine", "checkpoint", "restore", "export", "generate", "footprint"},
    {"train", "zero_to_fp32", "simulate"},
    {"pretrain", "scale"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# corpus: for the index writer; unpickle: for the classes that DeepSpeed's files may hold
DEEPSPEED_ROOMS = {"moe", "engine", "checkpoint", "restore", "corpus", "unpickle"}


def imports(source):
    """Full names of everything imported anywhere in `source`, relative imports as of the package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (["megamoe"] if node.level else []) + [node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rooms_imported(source):
    for name in imports(source):
        package, _, rest = name.partition(".")
        if package == "megamoe":
            room = rest.split(".")[0]
            yield room if room in LEVEL else "__init__"


def upward(room, source):
    return sorted(other for other in rooms_imported(source) if LEVEL[other] >= LEVEL[room])


def test_every_room_has_a_level():
    assert SOURCES.keys() <= LEVEL.keys(), "give the new room a level here and in the design"
    assert {"config", "model", "train", "pretrain"} <= SOURCES.keys()
    assert {path.parent.name for path in FOLDER.rglob("*.py") if path.parent != FOLDER} == {"huggingface"}


def test_rooms_import_downward_only():
    found = {room: upward(room, source) for room, source in SOURCES.items()}
    assert {room: others for room, others in found.items() if others} == {}


def test_an_upward_import_of_any_form_would_be_seen():
    for line in (
        "import megamoe.model",
        "import megamoe.model as m",
        "from megamoe import model",
        "from megamoe.model import Decoder",
        "from . import model",
        "from .model import Decoder",
        "def late():\n    from megamoe.model import Decoder",
    ):
        assert upward("moe", line) == upward("model", line) == ["model"]
        assert upward("generate", line) == []
    assert upward("config", "from megamoe import cli") == ["cli"]
    assert upward("corpus", "from megamoe.tokenizer import load_tokenizer") == []


def test_only_its_own_rooms_import_deepspeed():
    importers = {
        room for room, source in SOURCES.items() if any(name.split(".")[0] == "deepspeed" for name in imports(source))
    }
    assert importers <= DEEPSPEED_ROOMS
    (index_writer,) = (name for name in imports(SOURCES["corpus"]) if name.startswith("deepspeed"))
    assert index_writer.endswith("indexed_dataset.MMapIndexedDataset")


def test_no_room_is_named_like_a_module_of_the_standard_library():
    # A script's folder comes first in sys.path: megamoe/queue.py would be everyone's queue.
    assert SOURCES.keys() & sys.stdlib_module_names == set()
