"""The file of judgements: nothing is handed out too often, nothing is counted twice, nothing is lost."""

import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from lightning_align.errors import UserError
from lightning_align.feedback.human.store import LEASE, Conflict, Store
from lightning_align.feedback.human.tasks import OVERALL, Plan, Verdict

RANKS = (1, 2, 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.sqlite"


def filled(path: Path, size: int = 10, **plan: object) -> Store:
    store = Store(path, Plan(**plan))  # type: ignore[arg-type]
    for number in range(size):
        assert store.add(f"prompt {number}", ["a", "b", "c"], f"line {number}")
    return store


def work(store: Store, annotator: str, most: int = 10**6) -> list[int]:
    """Judge what there is; the numbers of the items."""
    judged = []
    while len(judged) < most and (task := store.next_task(annotator)) is not None:
        item, aspect = task
        store.judge(f"{annotator} {item.id} {aspect} {len(judged)}", item, annotator, aspect, Verdict(RANKS))
        judged.append(item.id)
    return judged


def test_each_prompt_is_judged_by_as_many_as_planned(path: Path) -> None:
    store = filled(path, 20, overlap=0.3, annotators_per_prompt=3)
    people = ["ann", "bob", "cyd", "dan"]
    judged: dict[str, list[int]] = {name: [] for name in people}
    for _ in range(20):
        for name in people:
            judged[name] += work(store, name, 1)
    times = Counter(number for own in judged.values() for number in own)
    assert sorted(times.values()) == [1] * 14 + [3] * 6
    assert all(len(set(own)) == len(own) for own in judged.values())
    progress = store.progress("ann")
    assert (progress["items"], progress["wanted"], progress["done"]) == (20, 14 + 18, 32)
    assert sum(store.progress(name)["judged"] for name in people) == 32


def test_a_task_is_the_same_until_it_is_judged_also_after_opening_again(path: Path) -> None:
    store = filled(path)
    first = store.next_task("ann")
    assert first is not None
    assert store.next_task("ann") == first
    store.close()
    assert Store(path).next_task("ann") == first


def test_aspects_of_a_prompt_come_one_after_the_other(path: Path) -> None:
    store = filled(path, 2, aspects=("helpfulness", "safety"), overlap=0)
    seen = []
    while (task := store.next_task("ann")) is not None:
        item, aspect = task
        seen.append((item.id, aspect))
        store.judge(f"key {len(seen)}", item, "ann", aspect, Verdict(RANKS))
    assert [aspect for _, aspect in seen] == ["helpfulness", "safety"] * 2
    assert seen[0][0] == seen[1][0] != seen[2][0] == seen[3][0]


def test_what_was_begun_and_left_goes_to_others_after_a_while(path: Path) -> None:
    store = filled(path, 1, overlap=0)
    assert store.next_task("ann", now=0.0) is not None
    assert store.next_task("bob", now=LEASE - 1) is None
    assert store.next_task("bob", now=LEASE + 1) is not None


def test_what_is_skipped_goes_to_others_and_not_back(path: Path) -> None:
    store = filled(path, 1, aspects=("helpfulness", "safety"), overlap=0)
    item, aspect = store.next_task("ann")  # type: ignore[misc]
    store.judge("k", item, "ann", aspect, Verdict(skipped="no idea"))
    assert store.next_task("ann") is None
    assert store.progress("ann") | {"pace": None, "last": None} == {
        **{"items": 1, "wanted": 1, "done": 0, "judged": 0, "skipped": 1, "pace": None, "last": None}
    }
    assert work(store, "bob") == [item.id] * 2


def test_undo_brings_the_last_one_back_and_keeps_what_was_said(path: Path) -> None:
    store = filled(path, 3, overlap=0)
    first, second = work(store, "ann", 2)
    assert store.next_task("ann")[0].id not in (first, second)  # type: ignore[index]
    undone = store.undo("ann")
    assert undone is not None
    assert undone.item.id == second
    assert undone.verdict == Verdict(RANKS)
    assert store.next_task("ann") == (undone.item, OVERALL)
    assert [judgement.item.id for judgement in store.judgements()] == [first]
    assert store.progress("ann")["judged"] == 1
    assert store.undo("bob") is None
    assert store.undo("ann").item.id == first  # type: ignore[union-attr]
    assert store.undo("ann") is None
    kept = sqlite3.connect(path).execute("SELECT count(*), count(undone) FROM judgements").fetchone()
    assert kept == (2, 2)


def test_undo_of_a_skip(path: Path) -> None:
    store = filled(path, 1, overlap=0)
    item, aspect = store.next_task("ann")  # type: ignore[misc]
    store.judge("k", item, "ann", aspect, Verdict(skipped="hm"))
    assert store.undo("ann").verdict.skipped == "hm"  # type: ignore[union-attr]
    assert work(store, "ann") == [item.id]


def test_a_judgement_that_is_sent_twice_counts_once_and_another_one_is_refused(path: Path) -> None:
    store = filled(path, 1)
    item, aspect = store.next_task("ann")  # type: ignore[misc]
    for _ in range(2):
        store.judge("same", item, "ann", aspect, Verdict(RANKS))
    with pytest.raises(Conflict, match="judged this before"):
        store.judge("other", item, "ann", aspect, Verdict((1, 2, 3)))
    with pytest.raises(ValueError, match="key is that of another"):
        store.judge("same", item, "bob", aspect, Verdict(RANKS))
    (judgement,) = store.judgements()
    assert judgement.verdict.ranks == RANKS


def test_everything_that_was_said_is_kept(path: Path) -> None:
    store = Store(path, Plan(aspects=("safety",)))
    prompt = [{"role": "user", "content": "Hé?"}]
    store.add(prompt, [[{"role": "assistant", "content": text}] for text in ("☃", "no")], "file line 7")
    item, aspect = store.next_task("ann")  # type: ignore[misc]
    verdict = Verdict((2, 1), "negligibly", unsafe=(1, 0))
    store.judge("k", item, "ann", aspect, verdict, seconds=3.5, shown=(1, 0), now=1e9)
    store.close()
    (found,) = Store(path).judgements()
    assert found.item == item
    assert (found.item.prompt, found.item.place) == (prompt, "file line 7")
    assert (found.annotator, found.aspect, found.shown, found.time, found.seconds) == (
        "ann",
        "safety",
        (1, 0),
        1e9,
        3.5,
    )
    assert (found.verdict.ranks, found.verdict.strength, found.verdict.unsafe) == ((2, 1), "negligibly", (0, 1))


def test_the_plan_says_in_which_order_answers_are_shown_if_nobody_else_does(path: Path) -> None:
    store = filled(path, 1)
    item, aspect = store.next_task("ann")  # type: ignore[misc]
    store.judge("k", item, "ann", aspect, Verdict(RANKS))
    (judgement,) = store.judgements()
    assert judgement.shown == store.plan.shown(item.key, "ann", 3)
    assert math.isnan(judgement.seconds)


def test_the_same_answers_in_another_order_are_the_same_item(path: Path) -> None:
    store = filled(path, 1)
    assert not store.add("prompt 0", ["c", "a", "b"], "elsewhere")
    assert store.add("prompt 0", ["c", "a"], "elsewhere")
    assert len(store.items()) == 2


def test_pace_is_the_median_of_the_last_twenty(path: Path) -> None:
    store = filled(path, 30, overlap=0)
    for number in range(30):
        item, aspect = store.next_task("ann")  # type: ignore[misc]
        seconds = 1000.0 if number < 10 else float(number)
        store.judge(f"k{number}", item, "ann", aspect, Verdict(RANKS), seconds=seconds)
    assert store.progress("ann")["pace"] == 20.0
    assert store.progress("bob")["pace"] is None


def test_what_is_no_store_and_other_plans(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no store"):
        Store(path)
    filled(path).close()
    with pytest.raises(UserError, match=r"made with overlap 0\.2, not 0\.5"):
        Store(path, Plan(overlap=0.5))
    with pytest.raises(UserError, match="aspects overall, not helpfulness safety"):
        Store(path, Plan(aspects=("helpfulness", "safety")))
    text = tmp_path / "notes.txt"
    text.write_text("nothing of the kind, and long enough to look at" * 10)
    with pytest.raises(UserError, match=r"cannot use .*notes\.txt"):
        Store(text)
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other).execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="no store of judgements"):
        Store(other, Plan())
    with sqlite3.connect(path) as database:
        database.execute("UPDATE settings SET value = '99' WHERE name = 'version'")
    with pytest.raises(UserError, match="another version"):
        Store(path)


def test_many_threads_over_two_connections_never_judge_a_prompt_too_often(path: Path) -> None:
    stores = [filled(path, 60, overlap=0.5), Store(path)]
    failures: list[BaseException] = []

    def person(number: int) -> None:
        try:
            work(stores[number % 2], f"person {number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=person, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    times = Counter(judgement.item.id for judgement in stores[0].judgements())
    assert sorted(times.values()) == [1] * 30 + [2] * 30


WRITER = """
import sys
from pathlib import Path
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import Verdict
store = Store(Path(sys.argv[1]))
while (task := store.next_task("ann")) is not None:
    item, aspect = task
    store.judge(f"key {item.id}", item, "ann", aspect, Verdict((1, 2, 2)))
    print(item.id, flush=True)
"""


def test_a_killed_process_loses_nothing_that_it_answered_for(path: Path) -> None:
    filled(path, 400, overlap=0).close()
    generator, said = random.Random(0), []
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        said += [int(writer.stdout.readline()) for _ in range(generator.randint(5, 40))]
        os.kill(writer.pid, signal.SIGKILL)
        said += [int(line) for line in writer.stdout.read().splitlines() if line.strip()]
        writer.wait()
        found = [judgement.item.id for judgement in Store(path).judgements()]
        assert set(said) <= set(found)
        assert len(set(found)) == len(found) <= len(said) + 3  # one may have been saved but not told


FILLER = """
import resource, sys
from pathlib import Path
from lightning_align.errors import UserError
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import Verdict
store = Store(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
told = 0
try:
    while (task := store.next_task("ann")) is not None:
        item, aspect = task
        store.judge(f"key {item.id}", item, "ann", aspect, Verdict((1, 2, 2)))
        told += 1
except UserError as error:
    print(told, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
item, aspect = store.next_task("ann")
store.judge("when there is room", item, "ann", aspect, Verdict((1, 2, 2)))
"""


def test_a_full_disk_is_told_and_what_was_answered_for_is_there(path: Path) -> None:
    filled(path, 400, overlap=0).close()
    done = subprocess.run([sys.executable, "-c", FILLER, str(path)], capture_output=True, text=True, check=True)
    told, message = done.stdout.split(" ", 1)
    assert message.startswith(f"not saved in {path}: ")
    assert 0 < int(told) < 400
    assert len(Store(path).judgements()) == int(told) + 1


def test_what_is_added_together_is_there_whole_or_not_at_all(path: Path) -> None:
    store = filled(path, 2, overlap=0)
    with pytest.raises(ZeroDivisionError), store.together():
        assert store.add("new", ["a", "b"], "here") / 0
    assert len(store.items()) == 2
    item, aspect = store.next_task("ann")  # type: ignore[misc]
    store.judge("k", item, "ann", aspect, Verdict(RANKS))
    with store.together():
        assert store.add("new", ["a", "b"], "here")
        with pytest.raises(Conflict):  # what is refused within it undoes nothing else
            store.judge("other", item, "ann", aspect, Verdict(RANKS))
    assert len(Store(path).items()) == 3
