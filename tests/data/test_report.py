"""The report says every count, to people and to run.json."""

import json

from lightning_align.data.report import Report


def filled() -> Report:
    report = Report("pairs.jsonl", "preference", files=1, read=2312, kept=2308)
    report.converted("hh transcripts → prompt and answers", 2308)
    for line in (87, 517, 926, 1104):
        report.drop("field chosen: is empty", f"pairs.jsonl line {line}")
    report.drop("longer than 512 tokens", "pairs.jsonl line 5", 3)
    report.unused["id"] = 2312
    report.ignored.append("README.md")
    report.note("tokens", 1234567)
    report.note("samples that end in a learnt EOS", "99.2%")
    return report


def test_lines_say_everything() -> None:
    assert filled().lines() == [
        "pairs.jsonl: 2,312 records read from 1 file, 2,308 of kind preference kept",
        "  converted: 2,308 hh transcripts → prompt and answers",
        "  dropped: 4 field chosen: is empty (first: pairs.jsonl line 87)",
        "  dropped: 3 longer than 512 tokens (first: pairs.jsonl line 5)",
        "  columns not used: id (2,312)",
        "  files not read: README.md",
        "  tokens: 1,234,567",
        "  samples that end in a learnt EOS: 99.2%",
    ]


def test_what_did_not_happen_is_not_said() -> None:
    assert Report("playground", "text", read=1, kept=1).lines() == ["playground: 1 record read, 1 of kind text kept"]


def test_dictionary_is_plain_json() -> None:
    result = filled().to_dict()
    assert json.loads(json.dumps(result)) == result
    assert result["dropped"]["field chosen: is empty"] == {"count": 4, "first": "pairs.jsonl line 87"}
    assert result["notes"]["tokens"] == 1234567


def test_a_long_list_of_files_is_counted() -> None:
    report = Report("folder", "sft", ignored=[f"picture{number}.png" for number in range(100)])
    (line,) = (line for line in report.lines() if "not read" in line)
    assert line == "  files not read: picture0.png, picture1.png, picture2.png, picture3.png, picture4.png and 95 more"
