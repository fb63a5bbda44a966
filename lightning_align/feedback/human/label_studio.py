"""Tasks of Label Studio (https://labelstud.io), as it exports them as JSON or JSON_MIN.

A task has ``data`` and ``annotations``; each of these has ``completed_by``, ``was_cancelled``, ``lead_time``,
``created_at`` and ``result``. Results that compare answers are those of the tags Pairwise (``value.selected``), Ranker
(``value.ranker``), Choices (``value.choices``) and Rating (``value.rating``). JSON_MIN has a record an annotation, with
the data beside the results; it leaves out what was skipped.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lightning_align.data.files import Row
from lightning_align.data.records import RecordError
from lightning_align.errors import UserError, nearest
from lightning_align.feedback.human.fields import Names, Wish, by_rating, find_answers, find_prompt
from lightning_align.feedback.human.imported import Found, Opinion, item_of, seconds_since_1970
from lightning_align.feedback.human.tasks import Verdict

TAGS = {"selected": "pairwise", "ranker": "ranker", "choices": "choices", "rating": "rating"}  # by key of the value
OWN = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")  # of JSON_MIN
UNSORTED = "_"  # the bucket of a ranker in which everything lies at first


class Result(NamedTuple):
    """One control's result: its name, its tag, the object it is of, and what was said."""

    name: str
    tag: str
    of: str
    said: Any


class LabelStudio:
    """Reads the tasks of one project.

    Args:
        rows: All its tasks; those that are malformed are passed over here and found by :meth:`read`.
        wish: What the user says of them.

    Raises:
        UserError: Which fields or which control is meant is unclear.
    """

    def __init__(self, rows: Iterable[Row], wish: Wish) -> None:
        self.left_out: Counter[str] = Counter()
        self.notes: list[str] = []
        self.buckets = wish.buckets
        self.wish = wish
        fields: dict[str, list[Any]] = {}
        results: defaultdict[str, list[Result]] = defaultdict(list)
        fault: UserError | None = None
        for place, task, _ in rows:
            if isinstance(task, RecordError):
                continue
            try:
                data, annotations = parts_of(task, wish.question)
                said = [result for annotation in annotations for result in results_of(annotation)]
            except RecordError as error:
                fault = fault or UserError(f"{place}: {error}")
                continue
            for name, value in data.items():
                fields.setdefault(name, []).append(value)
            for result in said:
                results[result.name].append(result)
        if not results:
            raise fault or UserError(
                f"{wish.name} has no annotations that compare answers: export annotated tasks as JSON"
            )
        for name in wish.question:
            if name not in results:
                there = ", ".join(results)
                raise UserError(f"--question: no result of {name!r}{nearest(name, results)} (there are: {there})")
        rankers = [name for name, given in results.items() if given[0].tag == "ranker"]
        lists = [name for name, values in fields.items() if any(_is_items(value) for value in values)]
        self.is_list = bool(rankers) and (set(wish.question) <= set(rankers))
        if self.is_list:
            self.answers = wish.answers or tuple(lists)
            if len(self.answers) != 1 or self.answers[0] not in lists:
                there = f"{', '.join(fields)} ({', '.join(lists) or 'none'} hold such lists)"
                raise UserError(f"{wish.name}: give --answers FIELD, the list of items that are ranked, one of {there}")
        else:
            self.answers = find_answers(list(fields), (), wish)
        self.prompt = find_prompt(list(fields), self.answers, wish)
        self.questions = self._find_question(results, Names(self.answers))
        if self.is_list:
            self._check_buckets(results[self.questions[0]])

    def _find_question(self, results: Mapping[str, list[Result]], names: Names) -> tuple[str, ...]:
        if len(self.wish.question) == 1 or (self.wish.question and len(self.wish.question) == len(self.answers)):
            return self.wish.question
        if self.wish.question:
            count = len(self.answers)
            raise UserError(f"--question: give one, or a rating for each of the {count} answers in their order")
        rated: list[list[str]] = [[] for _ in self.answers]
        for name, said in results.items():
            number = _number_of(said[0], names) if said[0].tag == "rating" else None
            if number is not None:
                rated[number].append(name)
        for tag in ("ranker",) if self.is_list else ("pairwise", "choices"):
            found = [
                name
                for name, said in results.items()
                if said[0].tag == tag and (tag != "choices" or any(_choice(result, names) for result in said))
            ]
            if tag == "pairwise" and found and len(self.answers) != 2:
                there = ", ".join(self.answers)
                raise UserError(f"{self.wish.name}: {found[0]} compares two of {there}: give --answers LEFT RIGHT")
            if len(found) == 1:
                return (found[0],)
            if found:
                raise UserError(f"{self.wish.name}: {', '.join(found)} all compare the answers: name one by --question")
        if all(len(found) == 1 for found in rated):
            return tuple(found[0] for found in rated)
        raise UserError(
            f"{self.wish.name}: none of the controls {', '.join(results)} ranks, chooses or rates "
            f"{', '.join(self.answers)}: give --question NAME, or for ratings one for each answer in their order"
        )

    def _check_buckets(self, results: Iterable[Result]) -> None:
        """Whether it is known how the buckets that are used follow each other."""
        used = {name: None for result in results for name, items in _buckets(result).items() if items}
        unknown = [name for name in self.buckets if name not in used]
        if unknown:
            raise UserError(f"--buckets: nothing lies in {', '.join(unknown)} (but in {', '.join(used)})")
        if not self.buckets and len(used) > 1:
            raise UserError(
                f"{self.wish.name}: items lie in the buckets {', '.join(used)}: give --buckets from best to worst "
                f"({UNSORTED} is what was not moved, and ties)"
            )

    def read(self, record: Mapping[str, Any]) -> Found | None:
        """See :class:`~lightning_align.feedback.human.imported.Reader`."""
        data, annotations = parts_of(record, self.wish.question)
        if data.get(self.prompt) is None:
            raise RecordError(self.prompt, "is missing", "every task needs a prompt")
        keys = self.answers
        sides = [(name, data.get(name)) for name in keys]
        if self.is_list:
            sides = _items(self.answers[0], data.get(self.answers[0]))
            keys = tuple(name for name, _ in sides)
        prompt, answers = item_of((self.prompt, data[self.prompt]), sides, self.left_out)
        opinions = [self._opinion(annotation, keys) for annotation in annotations] if answers else []
        if record.get("drafts"):
            self.left_out["drafts"] += len(record["drafts"])
        self.left_out["tasks without an annotation"] += not annotations
        said = [opinion for opinion in opinions if opinion is not None]
        return Found(prompt, answers, said) if said else None

    def _opinion(self, annotation: Mapping[str, Any], keys: tuple[str, ...]) -> Opinion | None:
        annotator = _annotator(annotation.get("completed_by"))
        if annotator is None:
            self.left_out["annotations that do not say whose they are"] += 1
            return None
        verdict = self._verdict(annotation, keys)
        if verdict is None:
            return None
        time = seconds_since_1970("annotations.created_at", annotation.get("created_at"))
        return Opinion(annotator, verdict, time, _seconds(annotation.get("lead_time")))

    def _verdict(self, annotation: Mapping[str, Any], keys: tuple[str, ...]) -> Verdict | None:
        if annotation.get("was_cancelled"):
            return Verdict(skipped="skipped in Label Studio")
        said = {result.name: result for result in results_of(annotation) if result.name in self.questions}
        results = [said[name] for name in self.questions if name in said]
        names = Names(keys)
        ranks: tuple[int, ...] | None
        if not results:
            ranks, reason = None, "annotations that say nothing of the answers"
        elif len(self.questions) > 1:
            complete = len(results) == len(self.questions)
            ranks, reason = (
                by_rating([result.said for result in results]) if complete else None,
                "ratings of some alone",
            )
        elif results[0].tag == "ranker":
            ranks, reason = self._order(results[0], keys), "rankings that do not rank every item once"
        else:
            ranks, reason = _choice(results[0], names), f"choices that name no answer: {results[0].said}"
        if ranks is None:
            self.left_out[reason] += 1
            return None
        return Verdict(ranks)

    def _order(self, result: Result, keys: tuple[str, ...]) -> tuple[int, ...] | None:
        """Ranks ``[K]``: buckets from best to worst, and the order within each."""
        filled = {name: items for name, items in _buckets(result).items() if items}
        if not set(filled) <= set(self.buckets or filled):
            return None
        groups: list[list[str]] = []
        for bucket in self.buckets or filled:
            items = filled.get(bucket, [])
            groups += [items] if bucket == UNSORTED else [[item] for item in items]
        ranks = {item: rank for rank, group in enumerate(groups) for item in group}
        if sum(map(len, groups)) != len(keys) or set(ranks) != set(keys) or set(filled) == {UNSORTED}:
            return None
        return by_rating([-ranks[key] for key in keys])


def parts_of(task: Mapping[str, Any], questions: Iterable[str] = ()) -> tuple[Mapping[str, Any], list[Any]]:
    """Data and annotations of a task; a record of JSON_MIN is taken apart."""
    if "annotation_id" in task and "annotations" not in task:
        return _of_min(task, set(questions))
    for name, kind in (("data", Mapping), ("annotations", list)):
        if not isinstance(task.get(name), kind):
            raise RecordError(name, "is missing", "export the tasks as JSON, with their annotations in full")
    if not all(isinstance(annotation, Mapping) for annotation in task["annotations"]):
        raise RecordError("annotations", "holds numbers alone", "export the tasks with their annotations in full")
    return task["data"], task["annotations"]


def _of_min(record: Mapping[str, Any], questions: set[str]) -> tuple[Mapping[str, Any], list[Any]]:
    """JSON_MIN writes a list of values for each control, and the option alone for one choice."""
    data, results = {}, []
    for name, value in record.items():
        if name in OWN:
            continue
        given = [{"choices": [value]}] if name in questions and isinstance(value, str) else value
        first = given[0] if isinstance(given, list) and given and isinstance(given[0], Mapping) else {}
        tag = next((tag for key, tag in TAGS.items() if set(first) == {key}), None)
        if tag is None:
            data[name] = value
        else:
            results.append({"from_name": name, "to_name": "", "type": tag, "value": first})
    annotation = {name: record.get(name) for name in ("created_at", "lead_time")}
    return data, [{**annotation, "completed_by": record.get("annotator"), "result": results}]


def results_of(annotation: Mapping[str, Any]) -> list[Result]:
    """Those results that can compare answers."""
    results = annotation.get("result")
    if not isinstance(results, list) or not all(isinstance(result, Mapping) for result in results):
        raise RecordError("annotations.result", "is no list of results", "export the tasks as JSON")
    found = []
    for result in results:
        key = next((key for key, tag in TAGS.items() if tag == result.get("type")), None)
        if key is None:
            continue
        value = result.get("value")
        name = result.get("from_name")
        if not isinstance(value, Mapping) or key not in value or not isinstance(name, str):
            raise RecordError("annotations.result", f"has a {result['type']} without value.{key}", "export it again")
        if key == "rating" and (isinstance(value[key], bool) or not isinstance(value[key], int | float)):
            raise RecordError("annotations.result", "has a rating that is no number", "export it again")
        found.append(Result(name, result["type"], str(result.get("to_name")), value[key]))
    return found


def _choice(result: Result, names: Names) -> tuple[int, ...] | None:
    said = result.said
    if isinstance(said, list):
        said = said[0] if len(said) == 1 else None
    return names.choice(said) if isinstance(said, str) else None


def _number_of(result: Result, names: Names) -> int | None:
    """The number of the answer that a rating is of: the one it is attached to, or that its name tells."""
    return names.answers.index(result.of) if result.of in names.answers else names.about(result.name)


def _buckets(result: Result) -> dict[str, list[str]]:
    said = {result.name: result.said} if isinstance(result.said, list) else result.said
    if not isinstance(said, Mapping) or not all(isinstance(items, list) for items in said.values()):
        raise RecordError("annotations.result", "has a ranker without lists of items", "export it again")
    return {name: [str(item) for item in items] for name, items in said.items()}


def _is_items(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) and "id" in item for item in value)


def _items(name: str, value: Any) -> list[tuple[str, Any]]:
    """Ids and texts of the items of a list: their bodies, or their titles where they have no body."""
    if not _is_items(value):
        raise RecordError(name, "is no list of items with an id", "see https://labelstud.io/tags/list")
    return [(str(item["id"]), item.get("body") or item.get("title")) for item in value]


def _annotator(value: Any) -> str | None:
    """Who annotated: an id, or a user's e-mail address or id."""
    value = (value.get("email") or value.get("id")) if isinstance(value, Mapping) else value
    return None if value is None or value == "" else str(value)


def _seconds(value: Any) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise RecordError(
            "annotations.lead_time", "is no number of seconds", "export the tasks again", found=repr(value)
        )
    return float(value)
