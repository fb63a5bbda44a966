"""The run directory: nothing is overwritten by accident, nothing written too early."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lightning_align.errors import UserError
from lightning_align.run.directory import RunDirectory, check_parents, find_parents, read_status
from lightning_align.run.files import write_atomically


def opened(root: Path, name: str = "a", *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
    run = RunDirectory(root, name, resume=resume, overwrite=overwrite)
    run.check()
    run.open("x: 1\n", seed=3, parents=[])
    run.close()  # as if its process had ended
    return run


def test_new_run_writes_only_when_opened(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs", "a")
    run.check()
    assert not (tmp_path / "runs").exists()
    run.open("x: 1\n", seed=3, parents=[])
    status = read_status(run.path)
    assert (run.path / "config.yaml").read_text() == "x: 1\n"
    assert status["status"] == "running"
    assert status["seed"] == 3
    assert {"python", "torch", "lightning", "transformers"} <= set(status["versions"])
    assert status["hardware"]["memory_bytes"] > 0
    assert run.opened


def test_existing_run_needs_resume_or_overwrite(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(UserError, match=r"exists: give --resume, --overwrite"):
        RunDirectory(tmp_path, "a").check()


def test_overwrite_deletes_only_runs(tmp_path: Path) -> None:
    run = opened(tmp_path)
    (run.path / "old.txt").write_text("old")
    opened(tmp_path, overwrite=True)
    assert not (run.path / "old.txt").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory(tmp_path, "thesis", overwrite=True).check()


def test_resume_keeps_history(tmp_path: Path) -> None:
    run = opened(tmp_path)
    created = read_status(run.path)["created"]
    run.update(status="interrupted", step=4)
    before = read_status(run.path)
    assert psutil.Process().memory_info().rss <= before["peak_memory"]["process_bytes"] < psutil.virtual_memory().total
    before["peak_memory"]["process_bytes"] = 2**50  # the process that was interrupted used more than this one
    (run.path / "run.json").write_text(json.dumps(before))
    again = opened(tmp_path, resume=True)
    again.update(step=6)
    status = read_status(again.path)
    assert status["peak_memory"]["process_bytes"] == 2**50
    assert status["created"] == created
    assert status["resumed"] == 1
    assert status["durations"]["total_seconds"] >= status["durations"]["session_seconds"]
    opened(tmp_path, resume=True)
    assert read_status(again.path)["resumed"] == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none", {"resume": True}, "nothing to resume"),
        ("none", {"resume": True, "overwrite": True}, "contradict"),
        ("", {}, "run.name"),
        ("..", {}, "run.name"),
        ("/tmp/x", {}, "run.name"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, name: str, options: dict[str, bool], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunDirectory(tmp_path, name, **options).check()


def test_unwritable_root_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="is not a folder"):
        RunDirectory(tmp_path / "file", "a").check()
    with pytest.raises(UserError, match="is not a folder"):
        RunDirectory(tmp_path / "file" / "deeper", "a").check()


def test_status_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "{}")
    write_atomically(path, '{"a": 1}')
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    path.write_text('{"a": ')
    with pytest.raises(UserError, match="damaged"):
        read_status(tmp_path)


def test_parents_are_the_runs_that_options_name(tmp_path: Path) -> None:
    sft = opened(tmp_path, "sft")
    sft.update(status="finished")
    (sft.path / "model").mkdir()
    (tmp_path / "data.jsonl").write_text("{}")
    config = {
        "model": {"init_args": {"model": str(sft.path), "reward": {"rm": {"source": str(sft.path / "model")}}}},
        "data": {"path": str(tmp_path / "data.jsonl")},
    }
    parents = find_parents(config)
    assert [parent["option"] for parent in parents] == ["model.init_args.model", "model.init_args.reward.rm.source"]
    assert {parent["run"] for parent in parents} == {str(sft.path)}
    assert {parent["status"] for parent in parents} == {"finished"}


def test_a_parent_that_was_replaced_is_noticed_and_one_that_went_on_is_not(tmp_path: Path) -> None:
    sft = opened(tmp_path, "sft")
    config = {"model": {"init_args": {"model": str(sft.path)}}, "data": {"path": "playground"}}
    run = RunDirectory(tmp_path, "ppo")
    run.open("x: 1\n", seed=3, parents=find_parents(config))
    opened(tmp_path, "sft", resume=True).update(status="finished", step=7)
    check_parents(run.path, find_parents(config))
    time.sleep(0.002)  # times are written in milliseconds
    opened(tmp_path, "sft", overwrite=True)
    with pytest.raises(UserError, match=r"sft was replaced since .*ppo began: .* give --overwrite or another --run\.n"):
        check_parents(run.path, find_parents(config))
    check_parents(run.path, find_parents({"model": {"init_args": {"model": "hub/name"}}}))


def in_child(action: Callable[[], None]) -> int:
    """Start ``action`` in a child, whose exit code is 2 for a user's error; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except UserError:
            code = 2
        finally:
            os._exit(code)
    return child


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_several_processes_that_come_at_once_one_gets_the_run(tmp_path: Path, overwrite: bool) -> None:
    if overwrite:
        opened(tmp_path)
    for attempt in range(5):
        start = time.monotonic() + 0.2
        name = "a" if overwrite else f"run{attempt}"

        def compete(name: str = name, start: float = start) -> None:
            run = RunDirectory(tmp_path, name, overwrite=overwrite)
            run.check()
            time.sleep(max(0.0, start - time.monotonic()))
            run.open("x: 1\n", seed=3, parents=[])
            time.sleep(1.5)

        children = [in_child(compete) for _ in range(4)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0, 2, 2, 2]
        assert read_status(tmp_path / name)["status"] == "running"
        assert not list(tmp_path.glob(".*"))


def test_a_run_that_is_going_on_is_left_alone_until_its_process_is_dead(tmp_path: Path) -> None:
    def go_on() -> None:
        run = RunDirectory(tmp_path, "a")
        run.open("x: 1\n", seed=3, parents=[])
        time.sleep(100)

    child = in_child(go_on)
    while not (tmp_path / "a").exists():
        time.sleep(0.01)
    for flag in ("resume", "overwrite"):
        with pytest.raises(UserError, match=r"a is going on in another process: wait .* or give another --run\.name$"):
            RunDirectory(tmp_path, "a", **{flag: True}).open("x: 2\n", seed=3, parents=[])
    assert (tmp_path / "a" / "config.yaml").read_text() == "x: 1\n"
    assert not list(tmp_path.glob(".*"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    opened(tmp_path, resume=True)


def test_what_a_killed_process_left_of_a_new_run_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.new" / "checkpoints").mkdir(parents=True)
    (tmp_path / ".a.new" / "half").write_text("{")
    run = opened(tmp_path)
    assert {path.name for path in run.path.iterdir()} == {"checkpoints", "config.yaml", "run.json", ".lock"}
    assert not list(tmp_path.glob(".*"))


def test_a_failed_run_says_so_even_where_there_is_no_room_for_another_file(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "a")
    run.open("x: 1\n", seed=3, parents=[])
    (run.path / ".run.json.tmp").mkdir()  # so that nothing can be written beside it
    run.end(status="failed", error="no room")
    status = read_status(run.path)
    assert (status["status"], status["error"]) == ("failed", "no room")
    run.close()


def test_what_cannot_be_written_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*file: File too large; make room"):
            write_atomically(path, "x" * 2_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["file"]
