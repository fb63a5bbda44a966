"""Records of Argilla (https://docs.argilla.io), in the three forms in which they are exported.

- As the server and Argilla 1's ``FeedbackRecord`` write them: ``responses`` is a list of ``user_id``, ``status`` and
  ``values``. This form alone has the ranks of a ranking.
- ``dataset.records.to_json()`` or ``to_list()`` of Argilla 2: ``responses`` has a list of ``value`` and ``user_id`` for
  each question; whether a response is a draft or was discarded is not in it.
- ``to_list(flatten=True)`` and ``to_datasets()`` of Argilla 2: columns ``QUESTION.responses``, ``….users`` and
  ``….status``.

Argilla 2's client leaves out the ranks of a ranking and gives its options in the order of the question's settings,
whatever was said (https://github.com/argilla-io/argilla/issues/5712). Lists without ranks are only believed where they
are not all the same.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_align.data.files import Row
from lightning_align.data.records import RecordError
from lightning_align.errors import UserError, nearest
from lightning_align.feedback.human.fields import Names, Wish, by_rating, find_answers, find_prompt
from lightning_align.feedback.human.imported import Found, Opinion, item_of, seconds_since_1970
from lightning_align.feedback.human.tasks import Verdict

COLUMNS = ("id", "_server_id", "external_id", "status", "score", "metadata", "vectors", "inserted_at", "updated_at")
LOST = "docs/human.md says how to export them with their ranks"


@dataclass
class Response:
    """What one person said of one record."""

    annotator: str
    status: str | None
    time: float | None = None
    values: dict[str, Any] = field(default_factory=dict)


class Argilla:
    """Reads the records of one dataset.

    Args:
        rows: All its records; those that are malformed are passed over here and found by :meth:`read`.
        wish: What the user says of them.

    Raises:
        UserError: Which fields or which question are meant is unclear, or the rankings have lost their ranks.
    """

    def __init__(self, rows: Iterable[Row], wish: Wish) -> None:
        self.left_out: Counter[str] = Counter()
        self.notes: list[str] = []
        fields: dict[str, None] = {}
        values: defaultdict[str, list[Any]] = defaultdict(list)
        has_status = True
        fault: UserError | None = None
        for place, record, _ in rows:
            if isinstance(record, RecordError):
                continue
            try:
                responses = responses_of(record)
                fields |= dict.fromkeys(fields_of(record))
            except RecordError as error:
                fault = fault or UserError(f"{place}: {error}")
                continue
            for response in responses:
                has_status &= response.status is not None
                for name, value in response.values.items():
                    values[name] += [] if value is None else [value]
        if not values:
            raise fault or UserError(
                f"{wish.name} has no responses: export records that were annotated, with their responses"
            )
        options = [str(option) for said in values.values() for value in said for option in _options(value) or ()]
        self.answers = find_answers(list(fields), options, wish)
        self.prompt = find_prompt(list(fields), self.answers, wish)
        self.names = Names(self.answers)
        self.questions = self._find_question(values, wish)
        said = [value for value in values[self.questions[0]] if _options(value)]
        if (
            said
            and not any(isinstance(value[0], Mapping) for value in said)
            and all(value == said[0] for value in said)
        ):
            raise UserError(
                f"{wish.name}: all {len(said)} rankings of {self.questions[0]!r} have no ranks and the same order "
                f"({', '.join(map(str, said[0]))}), which is how Argilla 2's client loses them: {LOST}"
            )
        if not has_status:
            self.notes.append(
                "responses have no status: drafts and discarded ones count as submitted (see docs/human.md)"
            )

    def _find_question(self, values: Mapping[str, Sequence[Any]], wish: Wish) -> tuple[str, ...]:
        """The question that compares the answers, or one a rating of each."""
        for name in wish.question:
            if name not in values:
                there = ", ".join(values)
                raise UserError(f"--question: no response to {name!r}{nearest(name, values)} (there are: {there})")
        if len(wish.question) > 1:
            if len(wish.question) != len(self.answers):
                count = len(self.answers)
                raise UserError(f"--question: give one, or a rating for each of the {count} answers in their order")
            return wish.question
        if wish.question:
            return wish.question
        names = self.names
        ranked = [q for q, said in values.items() if any(names.order([[o] for o in _options(v) or ()]) for v in said)]
        chosen = [
            q for q, said in values.items() if _share(said, lambda v: isinstance(v, str) and names.choice(v)) > 0.5
        ]
        rated: list[list[str]] = [[] for _ in self.answers]
        for name, said in values.items():
            number = names.about(name) if said and all(map(_is_number, said)) else None
            if number is not None:
                rated[number].append(name)
        for found in (ranked, chosen):
            if len(found) == 1:
                return (found[0],)
            if found:
                raise UserError(f"{wish.name}: {', '.join(found)} all compare the answers: name one by --question")
        if all(len(found) == 1 for found in rated):
            return tuple(found[0] for found in rated)
        hint = "give --question NAME, or for ratings one for each answer in their order"
        raise UserError(
            f"{wish.name}: none of the questions {', '.join(values)} ranks, chooses or rates "
            f"{', '.join(self.answers)}: {hint}"
        )

    def read(self, record: Mapping[str, Any]) -> Found | None:
        """See :class:`~lightning_align.feedback.human.imported.Reader`."""
        fields, responses = fields_of(record), responses_of(record)
        if fields.get(self.prompt) is None:
            raise RecordError(self.prompt, "is missing", "every record needs a prompt")
        sides = [(name, fields.get(name)) for name in self.answers]
        prompt, answers = item_of((self.prompt, fields[self.prompt]), sides, self.left_out)
        opinions = []
        for response in responses:
            verdict = self._verdict(response) if answers else None
            if verdict is not None:
                opinions.append(Opinion(response.annotator, verdict, response.time))
        self.left_out["records without a response"] += not responses
        return Found(prompt, answers, opinions) if opinions else None

    def _verdict(self, response: Response) -> Verdict | None:
        if response.status == "discarded":
            return Verdict(skipped="discarded in Argilla")
        if response.status == "draft":
            self.left_out["drafts"] += 1
            return None
        values = [response.values.get(name) for name in self.questions]
        if all(value is None for value in values):
            self.left_out["responses to other questions alone"] += 1
            return None
        if len(values) > 1:
            ratings = [float(value) for value in values if value is not None and _is_number(value)]
            ranks = by_rating(ratings) if len(ratings) == len(values) else None
            reason = "ratings of some answers alone"
        elif (groups := _groups(values[0])) is not None:
            ranks, reason = self.names.order(groups), "rankings that do not rank every answer once"
        else:
            ranks, reason = self.names.choice(values[0]), f"choices that name no answer: {values[0]}"
        if ranks is None:
            self.left_out[reason] += 1
            return None
        return Verdict(ranks)


def fields_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields that were shown, by name."""
    if "fields" not in record:
        return {name: value for name, value in record.items() if name not in COLUMNS and not _is_of_question(name)}
    if not isinstance(record["fields"], Mapping):
        raise RecordError("fields", "is no mapping", "export the records again", found=type(record["fields"]).__name__)
    return record["fields"]


def responses_of(record: Mapping[str, Any]) -> list[Response]:
    """What was said of a record, one a person, whatever form it is written in."""
    if "fields" not in record:
        return _of_columns(record)
    responses = record.get("responses")
    if isinstance(responses, Mapping):
        found: dict[str, Response] = {}
        for question, given in responses.items():
            for entry in _list(f"responses.{question}", given):
                user = _user(f"responses.{question}", entry)
                response = found.setdefault(user, Response(user, entry.get("status")))
                response.values[question] = entry.get("value")
        return list(found.values())
    return [_of_user(entry) for entry in _list("responses", responses)]


def _of_user(entry: Any) -> Response:
    user = _user("responses", entry)
    values = entry.get("values") or {}  # a discarded response need not say anything
    if not isinstance(values, Mapping) or not all(isinstance(value, Mapping) for value in values.values()):
        raise RecordError("responses.values", "is no mapping of questions to values", "export the records again")
    time = seconds_since_1970("responses.updated_at", entry.get("updated_at") or entry.get("inserted_at"))
    said = {question: value.get("value") for question, value in values.items()}
    return Response(user, entry.get("status"), time, said)


def _of_columns(record: Mapping[str, Any]) -> list[Response]:
    found: dict[str, Response] = {}
    for name, values in record.items():
        question, is_one, _ = name.partition(".responses")
        if not is_one or not name.endswith(".responses"):
            continue
        values = _list(name, values)
        users = _list(f"{name}.users", record.get(f"{name}.users"))
        states = _list(f"{name}.status", record.get(f"{name}.status")) or [None] * len(values)
        if not len(values) == len(users) == len(states):
            found_lengths = f"{len(values)} values, {len(users)} users, {len(states)} statuses"
            raise RecordError(name, "does not fit its users", "export the records again", found=found_lengths)
        for value, user, status in zip(values, users, states, strict=True):
            found.setdefault(str(user), Response(str(user), status)).values[question] = value
    return list(found.values())


def _is_of_question(column: str) -> bool:
    return any(column.endswith(f".{part}") or f".{part}." in column for part in ("responses", "suggestion"))


def _list(name: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecordError(name, "is no list", "export the records again", found=type(value).__name__)
    return value


def _user(name: str, entry: Any) -> str:
    if not isinstance(entry, Mapping) or not entry.get("user_id"):
        raise RecordError(name, "has a response without a user_id", "export the records again")
    return str(entry["user_id"])


def _options(value: Any) -> list[Any] | None:
    """The options of a ranking as they are listed; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    options = [item.get("value") if isinstance(item, Mapping) else item for item in value]
    return options if all(isinstance(option, str) for option in options) else None


def _groups(value: Any) -> list[list[str]] | None:
    """The options of a ranking from best to worst; those of one rank together, those without a rank left out."""
    options = _options(value)
    if options is None:
        return None
    if not isinstance(value[0], Mapping):
        return [[option] for option in options]
    ranks = sorted({item["rank"] for item in value if isinstance(item.get("rank"), int)})
    return [[option for option, item in zip(options, value, strict=True) if item.get("rank") == rank] for rank in ranks]


def _share(values: Sequence[Any], holds: Callable[[Any], Any]) -> float:
    return sum(bool(holds(value)) for value in values) / max(len(values), 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
