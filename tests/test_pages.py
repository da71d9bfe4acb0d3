"""Rules for the pages: short lines, one sentence a line, small tables, links to what exists.

Their numbers are those of the files in docs/data.
"""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from dype.config import DEFAULT_LAMBDA_S
from dype.demo import evaluate

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("dype/**/*.md")]
COLUMNS, TABLE_COLUMNS, CELLS, ROWS = 100, 160, 6, 12
NO_END = re.compile(r"(Eq|Fig|Figs|vs|e\.g|i\.e|\d)\.$")  # a dot that ends no sentence
SENTENCES = re.compile(r"(\S+[.!?])\s+(?=[A-Z`\[])")


def without_code(text: str) -> list[str]:
    """Return the lines of a page; those of code blocks are empty."""
    text = re.sub(
        r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S
    )
    return ["" if line.startswith("    ") else line for line in text.splitlines()]


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    letters = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {words.replace(" ", "-") for words in letters}


def find_faults(text: str) -> list[str]:
    """Return the faults of a page, each with its line number."""
    faults, rows = [], 0
    for number, line in enumerate(without_code(text), 1):
        if line.startswith("|"):
            rows += 1
            cells = re.sub(r"`[^`]*`|\\\|", "", line).strip().strip("|").split("|")
            faults += [f"{number}: table of {len(cells)} columns"] * (len(cells) > CELLS)
            faults += [f"{number}: table of more than {ROWS} rows"] * (rows == ROWS + 3)
            faults += [f"{number}: long table line"] * (len(line) > TABLE_COLUMNS)
            continue
        rows = 0
        words = re.sub(r"\]\([^)]*\)|https?://\S+", "", line)
        faults += [f"{number}: line of {len(words)} columns"] * (len(words) > COLUMNS)
        ends = [match[1] for match in SENTENCES.finditer(words)]
        ends = [end for end in ends if not NO_END.search(end)]
        faults += [f"{number}: two sentences, the first ends in {end!r}" for end in ends]
    return faults


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layout(path):
    assert not find_faults(path.read_text())


@pytest.mark.parametrize(
    "text",
    ["x" * 101, "|a" * 7 + "|", "| a |\n" * 15, "It stops. It goes on.", "| " + "a" * 160 + " |"],
)
def test_rules_see_faults(text):
    assert len(find_faults(text)) == 1


def test_code_and_links_may_be_long():
    text = f"[a]({'x' * 100})\n\n    {'x' * 120}\n\n```\nA. B.\n```\n\nAs in Eq. 5.\n\n1. A list."
    assert not find_faults(text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """Files and images exist; so do the headings that anchors name."""
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            page = (path.parent / name).resolve() if name else path
            assert page.exists(), target
            assert not anchor or anchor in anchors(page.read_text()), target


def test_every_image_and_table_is_used():
    """No file of docs/images and docs/data is left over."""
    texts = "".join(page.read_text() for page in PAGES)
    texts += "".join(path.read_text() for path in ROOT.glob("dype/**/*.py"))
    for path in [*ROOT.glob("docs/images/*"), *ROOT.glob("docs/data/*")]:
        assert path.name in texts, path


def test_the_readme_is_short_and_quotes_the_benchmark():
    """150 lines; the rows of its table are those of ground_truth.csv."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    with (ROOT / "docs/data/ground_truth.csv").open() as file:
        results = {row["setting"]: row for row in csv.DictReader(file) if row["size"] == "1024"}
    lines = re.findall(r"^\| `([\w:]+)`: .+? \| (.+ \| .+ \| .+) \|$", text, re.MULTILINE)
    assert len(lines) == 5
    for setting, cells in lines:
        row = results[setting]
        scores = [format_score(row, name) for name in ("layout", "overlap")]
        scores += [format_score(row, name, "", False) for name in ("spectrum", "lite0")]
        assert cells.split(" | ") == scores
        assert f"*{row['n']} prompts" in text


def test_numbers_of_the_paper():
    """paper_tables.csv has so many rows of each table; reproduce.md quotes those at 4096 px."""
    with (ROOT / "docs/data/paper_tables.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "table,model,set,size_wxh,method,lambda_s,lambda_t,metric,value"
    assert [*rows[0]] == columns.split(",")
    counts = {"1": 168, "3": 8, "6": 42, "7": 15, "8": 12, "10": 6, "fig18": 3, "sega": 12}
    assert Counter(row["table"] for row in rows) == counts
    assert len({tuple(row.values())[:-1] for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"-?\d+\.\d+", row["value"])
        assert row["method"] != "dy_base"
        assert row["method"].removeprefix("dy_") in DEFAULT_LAMBDA_S
        assert re.fullmatch(r"\d+x\d+", row["size_wxh"]) or row["table"] == "8"
        assert bool(row["lambda_s"]) == bool(row["lambda_t"])
    text = (ROOT / "docs/reproduce.md").read_text()
    lines = re.findall(r"^\| `(\w+)` \| (-?\d.*) \| (-?\d.*) \|$", text, re.MULTILINE)
    assert len(lines) == 6
    for method, *cells in lines:
        place = {"table": "1", "size_wxh": "4096x4096", "method": method}
        for name, cell in zip(("drawbench", "aesthetic-4k"), cells, strict=True):
            keys = (place | {"set": name}).items()
            assert cell == ", ".join(row["value"] for row in rows if row.items() >= keys)


@pytest.mark.parametrize("name", ["ground_truth", "cutoff", "cutoff_second", "later_methods"])
def test_tables_of_the_benchmark(name):
    """The CSV files are those that `--save` writes beside the JSON."""
    path = ROOT / "docs" / "data" / f"{name}.json"
    saved = json.loads(path.read_text())
    protocol = saved.pop("protocol")
    for file, content in evaluate.files_to_save(path, protocol, saved).items():
        assert file.read_bytes() == content, file


def format_score(row: dict, name: str, sign: str = "", with_interval: bool = True) -> str:
    """Return a score of a CSV row as the pages print it."""
    value, low, high = (f"{float(row[name + end]):{sign}.2f}" for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]" if with_interval else value


def test_the_tables_of_the_later_methods():
    """Rows are those of later_methods.csv, of 16 prompts; both forms of each method have one."""
    with (ROOT / "docs/data/later_methods.csv").open() as file:
        results = {row["setting"]: row for row in csv.DictReader(file)}
    page = (ROOT / "docs/log/2026-11-26-later-methods.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", page, re.MULTILINE)
    for setting, cells in rows:
        row = results[setting]
        scores = [format_score(row, name) for name in ("layout", "overlap")]
        scores += [format_score(row, name, "", False) for name in ("spectrum", "lite0")]
        assert cells.split(" | ") == scores
        assert row["n"] == "16"
    names = {setting for setting, _ in rows}
    later = ("tide", "sega", "imax", "rdfc", "riflex", "resonance")
    assert names >= {prefix + method for method in later for prefix in ("", "dy_")}


def test_the_tables_of_demo_md_are_those_of_the_files():
    """Rows and paired differences are those of ground_truth.csv and ground_truth_pairs.csv."""
    differences = {}
    with (ROOT / "docs/data/ground_truth.csv").open() as file:
        results = {(row["size"], row["setting"]): row for row in csv.DictReader(file)}
    with (ROOT / "docs/data/ground_truth_pairs.csv").open() as file:
        for row in csv.DictReader(file):
            differences[row["size"], row["setting"], row["against"]] = row
    page = (ROOT / "docs/demo.md").read_text()
    [_, *sections] = re.split(r"^(?:At (\d+) px|With DyPE minus)", page, flags=re.MULTILINE)
    counts = []
    for size, text in zip(sections[:-2:2], sections[1:-2:2], strict=True):
        rows = re.findall(r"^\| `(.+?)` \| (\d+) \| (.+) \|$", text, re.MULTILINE)
        counts.append(len(rows))
        for setting, n, cells in rows:
            row = results[size, setting]
            scores = [format_score(row, name) for name in ("layout", "overlap")]
            scores += [format_score(row, name, "", False) for name in ("spectrum", "lite0")]
            assert row["n"] == n
            assert cells.split(" | ") == scores
    assert counts == [2, 9, 5]
    rows = re.findall(r"^\| (\d+) \| `(.+?)` \| (.+) \|$", sections[-1], re.MULTILINE)
    assert len(rows) == 3
    for size, setting, cells in rows:
        row = differences[size, setting, setting.removeprefix("dy_")]
        names = ("layout", "overlap", "spectrum", "lite0")
        scores = [format_score(row, name, "+") for name in names]
        assert cells.split(" | ") == scores
