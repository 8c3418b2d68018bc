"""Packages import downward only, and DeepSpeed stays in the modules that own it."""

import ast
import sys
from functools import cache
from pathlib import Path

import megamoe

FOLDER = Path(megamoe.__file__).parent
SOURCES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path.read_text()
    for path in sorted(FOLDER.rglob("*.py"))
    if path.parent.name != "huggingface"  # goes into exports; nothing here imports it
}
# From low to high: a module may import from its own layer, without a cycle, and from those before it.
LAYERS = [
    {"utils"},
    {"config"},
    {"data"},
    {"model"},
    {"launch"},
    {"formats"},
    {"checkpoint"},
    {"evaluation"},
    {"monitoring"},
    {"training"},
    {"planning"},
    {"dry_run", "library", "resume", "run_inputs", "run_record"},
    {"commands", "pretrain", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
UNRELATED = ("checkpoint", "planning")  # neither imports the other
# The modules that import DeepSpeed; CONTRIBUTING.md says what each takes of it.
DEEPSPEED_MODULES = {
    "commands.preflight",
    "checkpoint.engine_state",
    "checkpoint.restore",
    "checkpoint.universal",
    "checkpoint.writer",
    "model.moe",
    "model.grouped_gemm",
    "launch.distributed",
    "training.engine",
    "training.operators",
    "training.reduce_once",
    "training.zero_step",
}


@cache
def imports(module, source):
    """Full names of everything imported anywhere in `source`, relative imports as of the module's package."""
    package, names = ["megamoe", *module.split(".")[:-1]], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + [node.module] * bool(node.module))
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def modules_imported(module, source):
    """megamoe's own modules among them; the package itself has none below."""
    for name in imports(module, source):
        package, _, rest = name.partition(".")
        if package == "megamoe" and rest:
            parts = rest.split(".")
            found = next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in SOURCES), parts[0])
            if found in SOURCES or found in LEVEL:
                yield found


def upward(module, source):
    layer = module.split(".")[0]
    return sorted(
        other
        for other in modules_imported(module, source)
        if LEVEL[other.split(".")[0]] > LEVEL[layer] or {layer, other.split(".")[0]} == set(UNRELATED)
    )


def test_every_module_has_a_layer():
    tops = {module.split(".")[0] for module in SOURCES} - {"__init__"}
    assert tops == LEVEL.keys(), "give the new module or package a layer here and in CONTRIBUTING.md"


def test_packages_import_downward_only():
    found = {module: upward(module, source) for module, source in SOURCES.items() if module != "__init__"}
    assert {module: others for module, others in found.items() if others} == {}


def test_no_module_imports_itself_over_others():
    graph = {module: set(modules_imported(module, source)) - {module} for module, source in SOURCES.items()}
    while leaves := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}, "these import each other in a circle"


def test_only_its_own_modules_import_deepspeed():
    importers = {
        module
        for module, source in SOURCES.items()
        if any(name.split(".")[0] == "deepspeed" for name in imports(module, source))
    }
    assert importers == DEEPSPEED_MODULES
    from_model = [name for name in imports("model.moe", SOURCES["model.moe"]) if name.startswith("deepspeed")]
    assert from_model == ["deepspeed.moe.layer"]


def test_no_module_at_the_top_is_named_like_one_of_the_standard_library():
    # A script's folder comes first in sys.path: megamoe/queue.py would be everyone's queue.
    assert LEVEL.keys() & sys.stdlib_module_names == set()
