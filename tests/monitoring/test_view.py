"""The picture of a run, from fixed files."""

import io
import json
import math
import re
from pathlib import Path

from rich.console import Console

from megamoe.monitoring.log_files import write_event
from megamoe.monitoring.run_state import RunState
from megamoe.monitoring.view import BLOCKS, Area, render
from megamoe.utils.run_folder import RunFolder


def printed(renderable, width=80, **options):
    console = Console(width=width, file=io.StringIO(), **options)
    console.print(renderable)
    return console.file.getvalue()


def test_a_run_fits_80_columns_and_24_lines_and_a_layer_out_of_balance_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunFolder(tmp_path / "run").enter({"last_step": 400, "preset": "tiny", "parameters": 1234567}, [])
    rows = [
        {"kind": "train", "step": step, "loss": 3 + 5 * math.exp(-step / 60), "lr": 1e-3, "tokens_per_second": 5000.0,
         "mfu": 0.25, "max_vio": 0.5, "running_max_vio": 0.1, "memory_gib": 1.5, "seconds_left": 60.0,
         "running_max_vio_by_block": {"1": 0.1, "2": 2.5, "3": 0.6}}
        for step in range(1, 301)
    ]  # fmt: skip
    rows.insert(200, {"kind": "valid", "step": 200, "loss": 4.0625, "tokens": 9})
    log = tmp_path / "run" / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows[:150]))
    state = RunState(Path("run"))
    with open(log, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows[150:-1]) + json.dumps(rows[-1])[:50])
    for step in range(9):
        write_event(Path("run"), "warning", step, {"reason": f"spike {step} " + "long " * 50})
    write_event(Path("run"), "death", 300, {"reason": "rank 1 died"})
    state.refresh()
    assert state.log["train"][-1]["step"] == 299
    with open(log, "a") as file:
        file.write(json.dumps(rows[-1])[50:] + "\n")
    state.refresh()
    text = printed(render(state))
    lines = [re.sub(r"\d:\d\d:\d\d", "T", line).rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    assert lines[1:3] == ["run  tiny, 1,234,567 parameters on 1 rank, ep_size 1", "step 300 of 400, logged T ago"]
    by_name = {line[:10].strip(): line[12:].split("  ")[0] for line in lines if line[:1].isalpha()}
    assert (by_name["loss"], by_name["held out"]) == ("3.0337", "4.0625 at step 200")
    assert [line[:31] for line in lines if "spike" in line] == [f"T ago  warning at step {n}: spike" for n in (6, 7, 8)]
    assert lines[-2] == "died after step 300, T ago: rank 1 died"
    assert lines[-1].startswith("go on: megamoe train --ranks 1 --run_dir run --auto_resume")
    colored = printed(render(state), force_terminal=True, color_system="standard")
    assert "\x1b[32m▁\x1b[0m\x1b[31m█\x1b[0m\x1b[33m▃\x1b[0m" in colored
    assert lines[-1] not in printed(render(state, "running"))


def heights(text):
    """Of each column of an area, in eighths of a row."""
    return [sum(map(BLOCKS.index, column)) for column in zip(*text.splitlines(), strict=True)]


def test_an_area_follows_its_series_in_as_many_cells_as_there_is_room():
    falling = [math.nan, *(100 / step for step in range(1, 1001))]
    found = heights(printed(Area(falling, "cyan", height=3), 40))
    assert len(found) == 40
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1], found[20] > 1) == (23, 1, True)  # the first spike does not flatten the rest
    assert heights(printed(Area([1.0, 3.0, 2.0], "cyan"))) == [1, 7, 4]
    assert heights(printed(Area([2.0], "cyan"))) == [1]
    assert printed(Area([math.nan], "cyan")).strip() == ""
