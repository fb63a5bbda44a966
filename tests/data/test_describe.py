"""One line a field says what is in it."""

from lightning_align.data.describe import describe

MESSAGE = {"role": "user", "content": "q"}


def test_fields_by_type() -> None:
    records = [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "label": True,
            "strength": "better",
            "score": 0.5,
            "ranks": [1, 2],
        },
        {"prompt": "a text", "label": False, "strength": "better", "score": 1234.5, "ranks": [1, 2, 3]},
        {"prompt": "more text", "label": False, "strength": "slightly", "extra": {"a": 1}, "ranks": [1, 1]},
    ]
    assert describe(records) == [
        "  prompt    characters: 6 to 9 (median 7.5); 1 of another form",
        "  label     true in 33%",
        "  strength  better 67%, slightly 33%",
        "  score     in 2 of 3: 0.5 to 1,234 (median 618)",
        "  ranks     entries: 2 to 3 (median 2)",
        "  extra     in 1 of 3: dict",
    ]


def test_conversations_are_counted_in_messages() -> None:
    assert describe([{"messages": [MESSAGE] * 3}]) == ["  messages  messages: 3"]
