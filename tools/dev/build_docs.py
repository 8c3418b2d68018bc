"""Build the site of README and docs/: `python tools/dev/build_docs.py`, or `make docs`. A broken link is an error.

It copies the pages to build/pages, writes the generated parts of docs/reference/ there, in the place of their marks
`<!-- generated: NAME -->`, and has zensical check links and anchors and make build/site.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megamoe.__main__ import make_app
from megamoe.config.model import ModelConfig, load_preset, preset_names
from megamoe.config.optimizers import OPTIMIZERS
from megamoe.config.recipe_sections import REFUSED, SECTIONS, TopLevel
from megamoe.config.schedule import TYPES
from megamoe.model.costs import parameter_count, parameter_shapes
from megamoe.model.names import expert_id

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "build/pages"
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """In Markdown."""
    lines = (" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in [head, ("---",) * len(head), *rows])
    return "".join(f"| {line} |\n" for line in lines)


def what_it_takes(schema: dict[str, Any]) -> str:
    """A value, by its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(what_it_takes(one) for one in schema["anyOf"] if one.get("type") != "null")
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f'`"{value}"`' for value in values)
    kind = f"array of {what_it_takes(schema['items'])}" if "items" in schema else schema.get("type", "")
    return ", ".join([kind, *(f"{words} {schema[key]:,.12g}" for key, words in BOUNDS.items() if key in schema)])


def fields(kind: type[BaseModel]) -> str:
    """What each field of a class takes, its default and its description."""
    rows, schemas = [], kind.model_json_schema()["properties"]
    for name, field in kind.model_fields.items():
        default = "must be given" if field.is_required() else f"`{json.dumps(field.default)}`".replace("`null`", "")
        is_section = name == "scheduler" or any(path.split(".")[-1] == name for path in SECTIONS)
        if takes := "a section" if is_section else what_it_takes(schemas[name]):
            rows.append((f"`{name}`", takes, default, " ".join((field.description or "").split())))
    return table(("key", "takes", "default", "meaning"), rows)


def ds_json() -> str:
    """Every key of the DeepSpeed JSON that is known, by section."""
    parts = ["## Keys of no section\n", fields(TopLevel)]
    for name, section in SECTIONS.items():
        parts += [f"## {name}\n", fields(section) if name != "optimizer" else "Keys `type` and `params`.\n"]
    for spec in OPTIMIZERS:  # the last section
        parts += [f"### optimizer.params of {', '.join(spec.names)}\n", fields(spec.params)]
    parts += ["## scheduler\n"]
    for name, kind in TYPES.items():
        parts += [f"### scheduler.params of {name}\n\n{inspect.getdoc(kind)}\n", fields(kind)]
    refused = [(f"`{name}`", why) for name, why in REFUSED.items()]
    return "\n".join([*parts, "## Refused sections\n", table(("section", "instead"), refused)])


def presets() -> str:
    """The fields of a preset, and what those that ship set them to."""
    configs = {name: load_preset(name) for name in preset_names()}
    rows: list[tuple[Any, ...]] = [("parameters", *(f"{parameter_count(config):,}" for config in configs.values()))]
    rows += [("active for a token", *(f"{active_parameters(config):,}" for config in configs.values()))]
    for field in ModelConfig.model_fields:
        values = [getattr(config, field) for config in configs.values()]
        if len(set(map(str, values))) > 1:
            rows.append((f"`{field}`", *values))
    shipped = table(("", *(f"`{name}`" for name in configs)), rows)
    return f"## What they set\n\nFields in which they differ.\n\n{shipped}\n## Fields\n\n{fields(ModelConfig)}"


def active_parameters(config: ModelConfig) -> int:
    """All but the experts that a token is not sent to."""
    shapes = parameter_shapes(config).items()
    expert = sum(math.prod(shape) for name, shape in shapes if expert_id(name) is not None) // config.num_local_experts
    return parameter_count(config) - expert * (config.num_local_experts - config.num_experts_per_tok)


def options() -> str:
    """Every verb and option, by the command line itself."""
    return make_app().generate_docs(heading_level=2)


def write_pages() -> list[str]:
    """Copy README and docs/, and fill in what is generated. Returns what zensical does not look for: links to missing
    files that are no pages, such as pictures, and pages that are in only one of docs/ and the navigation."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES / "docs")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, PAGES)
    for part in (options, ds_json, presets):
        page = PAGES / f"docs/reference/{part.__name__}.md"
        page.write_text(page.read_text().replace(f"<!-- generated: {part.__name__} -->", part()))
    texts = {page: re.sub("```.*?```|`[^`\n]+`", "", page.read_text(), flags=re.S) for page in PAGES.rglob("*.md")}
    links = ((page, target) for page, text in texts.items() for target in re.findall(r"\]\(([^)#:\s]+)\)", text))
    in_navigation = set(re.findall(r'"([^"]+\.md)"', (ROOT / "zensical.toml").read_text()))
    unpaired = in_navigation ^ {str(page.relative_to(PAGES)) for page in texts}
    return [
        *(f"{page}: {target} does not exist" for page, target in links if not (page.parent / target).exists()),
        *(f"{page} is in only one of docs/ and zensical.toml" for page in unpaired),
    ]


if __name__ == "__main__":
    argparse.ArgumentParser(description="Build the site of README and docs/; a broken link is an error.").parse_args()
    sys.exit("\n".join(write_pages()) or subprocess.run(["zensical", "build", "--strict"], cwd=ROOT).returncode)
