"""docs/playground.md says what the code does: every number, example, command and snippet."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from lightning_align.playground import (
    FAMILIES,
    Request,
    annotator_agreement,
    describe,
    gold,
    parse,
    records,
    satisfies,
)
from lightning_align.playground import gold as gold_function
from lightning_align.playground.answers import TIERS, sample_answer
from lightning_align.playground.corpora import SIZES

PAGE = (Path(__file__).parents[2] / "docs" / "playground.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Cells of the last table of a section, without its first two rows; numbers with a plain minus."""
    rows = [line for line in section(heading).splitlines() if line.startswith("|")]
    tables = "\n".join(rows).split("|---")[-1].splitlines()[1:]
    return [[cell.strip().strip("`").replace("−", "-") for cell in row.strip("|").split(" | ")] for row in tables]


def section(heading: str) -> str:
    return re.split(r"^## ", PAGE.partition(f"## {heading}\n")[2], maxsplit=1, flags=re.M)[0]


def rounded(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"


def test_families_have_an_example_that_is_answered_in_full() -> None:
    rows = table("Families")
    assert [row[0] for row in rows] == list(FAMILIES)
    for family, prompt, _, answer in rows:
        assert parse(prompt).family == family
        assert satisfies(prompt, answer), describe(prompt, answer)
        assert gold(prompt, answer).safety == 1


def test_the_formula_is_the_one_in_the_code() -> None:
    module = sys.modules[gold_function.__module__]
    formula = [line for line in section("The gold score").splitlines() if line.startswith("    ")]
    assert len(formula) == 5
    assert "\n".join(formula) in (module.__doc__ or "")


def test_example_scores() -> None:
    rows = table("Examples")
    assert len(rows) > 20
    for prompt, answer, *scores, why in rows:
        found = gold(prompt, answer)
        assert scores == [rounded(value, 2) for value in found], (prompt, answer, found)
        if why.startswith(("hack", "evades")):
            assert found.gold <= 1.2 + 1e-9, answer
        if why.startswith(("good", "right")) and "rude" not in why:
            assert found.gold > 1.7, answer


def test_scores_of_degenerate_policies(policy_gold: dict[str, dict[str, float]]) -> None:
    heading = [line for line in section("What degenerate policies get").splitlines() if line.startswith("| says")]
    columns = [cell.strip() for cell in heading[0].strip("|").split("|")][1:]
    assert columns == ["all", *FAMILIES]
    measured = [[name, *(rounded(means[column], 1) for column in columns)] for name, means in policy_gold.items()]
    assert table("What degenerate policies get") == measured, "\n".join(
        "| " + " | ".join(row) + " |" for row in measured
    )


def test_agreement_by_temperature() -> None:
    agreement = section("The annotator").partition("| tier |")[0]
    rows = [line.strip("|").split("|") for line in agreement.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 4
    for temperature, *numbers in rows:
        found = annotator_agreement(temperature=float(temperature))
        expected = [f"{value:.2f}" for value in (found.self_agreement, found.ceiling, found.entropy)]
        assert [number.strip() for number in numbers] == expected


def test_mean_gold_of_the_tiers(requests_of: dict[str, list[Request]]) -> None:
    random = Random("tiers of the page")
    means = []
    for tier in TIERS:
        scores = [
            gold(request.prompt, sample_answer(random, request, tier)).gold
            for family in FAMILIES
            for request in requests_of[family]
        ]
        means.append([tier, rounded(fmean(scores), 1)])
    assert [row[:2] for row in table("The annotator")] == means


def test_kinds_of_records_and_their_sizes() -> None:
    rows = table("Corpora")
    sizes = [[kind, f"{train:,}", f"{held_out:,}"] for kind, (train, held_out) in SIZES.items()]
    assert [[row[0], *row[-2:]] for row in rows] == sizes
    for kind, fields, *_ in rows:
        assert set(records(kind, size=1)[0]) <= set(re.findall(r"\w+", fields))


def test_the_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("1.0 1.0 3.0\n")


def test_the_commands_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    for line in block.strip().splitlines():
        words = shlex.split(line)
        assert words[0] == "python"
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 1000
