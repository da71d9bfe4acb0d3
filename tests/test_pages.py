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
from dype.demo import evaluate, scores

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


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


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


RESULTS = sorted(path.stem for path in (ROOT / "docs/data").glob("*_pairs.csv"))


@pytest.mark.parametrize("name", [name.removesuffix("_pairs") for name in RESULTS])
def test_tables_of_the_benchmark(name):
    """The CSV files are those that `--save` writes beside the JSON."""
    path = ROOT / "docs" / "data" / f"{name}.json"
    saved = json.loads(path.read_text())
    protocol = saved.pop("protocol")
    for file, content in evaluate.files_to_save(path, protocol, saved).items():
        assert file.read_bytes() == content, file


LINKS = re.compile(r"data/(\w+?)(?:_pairs)?\.csv")
# heads of the tables in the pages -> columns of the CSV files
HEADS = {name: name for name in (*scores.SCORES, "n")} | {"px": "size"}
HEADS |= {"layouts right": "layout", "sun's overlap with a disk": "overlap"}
HEADS |= {"horizon, %": "shift", "spectrum error": "spectrum", "feature distance": "lite0"}


def find_rows() -> list[tuple]:
    """Return the rows of tables of scores: page, CSV file, cells by head.

    The pages link such a file; the one of a table is the last before it. The first head is
    "setting" or "px".
    """
    rows = []
    for page in PAGES:
        file, heads, text = "", [], page.read_text()
        if not {f"{name}_pairs" for name in LINKS.findall(text)} & {*RESULTS}:
            continue
        for line in text.splitlines():
            links = LINKS.findall(line)
            file = links[-1] if links else file
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not line.startswith("|"):
                heads = []
            elif cells[0] in ("setting", "px"):
                heads = cells
            elif heads and "---" not in line and {*heads[1:]} <= HEADS.keys() | {"against"}:
                assert f"{file}_pairs" in RESULTS, (page.name, line)
                rows.append((page, file, dict(zip(heads, cells, strict=True))))
    return rows


def test_pages_quote_the_tables():
    """Every score in a page is that of the CSV file that the page links before it."""
    rows = find_rows()
    pages = {page.name for page, _, _ in rows}
    assert {"README.md", "demo.md", "2026-11-26-later-methods.md"} <= pages
    for page, file, cells in rows:
        is_pair = "against" in cells
        with (ROOT / f"docs/data/{file}{'_pairs' * is_pair}.csv").open() as text:
            saved = list(csv.DictReader(text))
        keys = {"size": cells.get("px", "1024"), "setting": cells["setting"].split("`")[1]}
        keys |= {"against": cells["against"].strip("`")} if is_pair else {}
        [row] = [row for row in saved if row.items() >= keys.items()]
        assert "n" in cells or re.search(rf"\b{row['n']} prompts", page.read_text()), cells
        for head in cells.keys() - {"setting", "against", "px"}:
            name = HEADS[head]
            expected = row["n"]
            if name != "n":
                sign = "+" * (is_pair or name == "shift")
                expected = format_score(row, name, sign, "[" in cells[head])
            assert cells[head] == expected, (page.name, cells["setting"], head)


def format_score(row: dict, name: str, sign: str, with_interval: bool) -> str:
    """Return a score of a CSV row as the pages print it."""
    value, low, high = (f"{float(row[name + end]):{sign}.2f}" for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]" if with_interval else value
