"""The two READMEs are true: their commands run, or exist with their flags; files are there; tables are current."""

import re
import shlex
from functools import cache
from xml.etree import ElementTree

import pytest
import tables
from conftest import REPO, run_forked

PAGES = {name: (REPO / name).read_text(encoding="utf-8") for name in tables.PAGES}
README = PAGES["README.md"]
BLOCKS = re.findall(r"^```(bash test|bash|python)\n(.*?)^```", "\n".join(PAGES.values()), flags=re.M | re.S)


def commands(kind):
    lines = [line for name, body in BLOCKS if name == kind for line in body.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_commands_run(smollm2_dir):
    """In order: later ones use files that earlier ones make."""
    for python, script, *args in commands("bash test"):
        assert python == "python"
        run = run_forked(script, *args, cwd=REPO)
        assert run.status == 0, (script, args, run.stderr)
        assert run.stdout.strip() or script == "quantize.py", (script, args)


def test_python_example_runs(smollm2_dir):
    (code,) = [body for name, body in BLOCKS if name == "python"]
    run = run_forked(code, cwd=REPO)
    assert run.status == 0, run.stderr
    assert len(run.stdout) > 20


@cache
def known_flags(script):
    return set(re.findall(r"--[a-z_0-9]+", run_forked(script, "--help").stdout))


def test_other_commands_exist_with_their_flags():
    checked = 0
    for command in commands("bash"):
        scripts = [word for word in command if re.fullmatch(r"(\./)?(scripts/)?[a-z_]+\.(py|sh)", word)]
        for script in scripts:
            assert (REPO / script).is_file(), command
            if script.endswith(".py"):
                after = command[command.index(script) :]
                unknown = {word for word in after if word.startswith("--")} - known_flags(script)
                assert not unknown, (command, unknown)
                checked += 1
    assert checked > 5


def test_named_files_exist():
    (tree,) = re.findall(r"^## Files\n\n```\n(.*?)^```", README, flags=re.M | re.S)
    named = [line.split()[0] for line in tree.splitlines()]
    assert [name for name in named if not (REPO / name).exists()] == []
    assert {f.name for f in REPO.glob("*.py")} == {name for name in named if name.endswith(".py")}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[name]):
        file, _, section = link.partition("#")
        path = (REPO / name).parent / file
        assert path.exists(), link
        headings = re.findall(r"^#+ (.+)", path.read_text(encoding="utf-8"), flags=re.M) if section else []
        assert not section or section in {heading.lower().replace(" ", "-") for heading in headings}, link


def test_tables_are_current():
    assert run_forked("scripts/tables.py", "--check").status == 0


def test_every_table_stands_on_one_page():
    assert sorted(re.findall(r"^<!-- (\w+) -->$", "\n".join(PAGES.values()), flags=re.M)) == sorted(tables.TABLES)


def test_the_table_of_an_unfinished_measurement_shows_what_there_is():
    made = {"device": "2 cores", "torch": "2.0", "commit": "f" * 40, "command": "python x.py"}
    timed = {"bytes": 2_000_000, "quantise_seconds": 7.2, "quantise_memory": 10**9, "tokens_per_second": 50.0}
    found = tables.quant(made | {"own": {"int8": {"perplexity": 14.666, "bytes": 10**6}, "int4.g32": {}}})
    assert found.splitlines() == [
        "2 cores, torch 2.0, commit fffffff: `python x.py`.",
        "",
        "| weights | bits | MB | perplexity |",
        "|---|---|---|---|",
        "| int8 | 8 | 1 | 14.67 |",
        "| int4.g32 | 5 | - | - |",
    ]
    exact, timed = {"perplexity": 10.0, "bytes": 1}, timed | {"perplexity": 11.0}
    found = tables.quant(made | {"own": {"bf16": exact, "int8": timed}})
    assert found.splitlines()[2:] == [
        "| weights | bits | MB | perplexity | tok/s, CPU | time, memory to quantise |",
        "|---|---|---|---|---|---|",
        "| bf16 | 16 | 0 | 10.00 (+0.00 %) |  |  |",
        "| int8 | 8 | 2 | 11.00 (+10.00 %) | 50.0 | 7 s, 1.0 GB |",
    ]


def test_bars_are_the_measured_fraction_of_their_outlines():
    image = ElementTree.fromstring((REPO / tables.PICTURE).read_text(encoding="utf-8"))
    bars = [e for e in image.iter() if e.tag.endswith("rect") and e.get("x") == str(tables.BAR_LEFT)]
    measured, limits = ([float(e.get("width")) for e in bars[i::2]] for i in (0, 1))
    fractions = [row["fraction"] for row in tables.results("h100")["rows"]]
    assert [m / l for m, l in zip(measured, limits, strict=True)] == pytest.approx(fractions, abs=2e-3)
