"""Reading runs and other trainers' CSVs: what is found, what is left out, what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_align.errors import UserError
from lightning_align.lab.runs import Point, load_curve
from lightning_align.run.logging import FileLogger


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "curve.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# ------------------------------------------------------------------ run directories
def test_a_run_with_everything(make_run: Callable[..., Path], peaked: dict[str, list[float]]) -> None:
    run = make_run(**peaked)
    curve = load_curve(run)
    assert (curve.name, curve.source, curve.seed, curve.left_out) == ("ppo", "eval", 3, 0)
    assert [point.step for point in curve.points] == list(range(0, 85, 5))
    assert [(p.kl, p.proxy, p.gold) for p in curve.points] == list(
        zip(peaked["kl"], peaked["proxy"], peaked["gold"], strict=True)
    )
    assert curve.has_gold
    assert len(curve.samples) == 17
    assert curve.config == {"model": {"class_path": "PPOModule"}}
    assert curve.status["status"] == "finished"


def test_checkpoints_are_found_by_name(make_run: Callable[..., Path], peaked: dict[str, list[float]]) -> None:
    run = make_run(**peaked)
    for name in ("last.ckpt", ".step=00090-kl=1.000.ckpt.tmp", "step=x-kl=1.ckpt", "best.ckpt"):
        (run / "checkpoints" / name).write_bytes(b"")
    for name in ("step=00100-kl=-0.001.ckpt", "step=00105-kl=nan.ckpt", "step=00110.ckpt"):
        (run / "checkpoints" / name).write_bytes(b"")
    found = load_curve(run).checkpoints
    assert sorted(found) == [*range(0, 85, 5), 100, 105, 110]
    assert found[5] == run / "checkpoints" / f"step=00005-kl={peaked['kl'][1]:.3f}.ckpt"


def test_a_run_without_gold_checkpoints_samples_or_status(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path / "run")
    for step in range(4):
        logger.log_metrics({"lab/kl": 0.5 * step, "lab/proxy": 1.0 * step}, step=step)
    curve = load_curve(tmp_path / "run")
    assert (curve.source, curve.has_gold, curve.checkpoints, curve.samples, curve.seed) == (
        "train",
        False,
        {},
        [],
        None,
    )


def test_a_resumed_run_reads_like_an_uninterrupted_one(tmp_path: Path) -> None:
    curves = []
    for name in ("whole", "resumed"):
        logger = FileLogger(tmp_path / name)
        for step in range(8):
            logger.log_metrics({"lab/kl": 0.1 * step, "lab/proxy": 1.0 * step, "lab/gold": 2.0}, step=step)
            if name == "resumed" and step == 4:
                state = logger.state_dict()
                logger.log_metrics({"lab/kl": 99.0, "lab/proxy": 99.0, "new": 1.0}, step=5)  # lost work
                logger = FileLogger(tmp_path / name)
                logger.rewind(state)
        curves.append(load_curve(tmp_path / name).points)
    assert curves[0] == curves[1]


def test_evaluations_are_preferred_unless_they_are_few(tmp_path: Path) -> None:
    for name, every, expected in (("often", 2, "eval"), ("seldom", 6, "train")):
        logger = FileLogger(tmp_path / name)
        for step in range(12):
            logger.log_metrics({"lab/kl": 0.1 * step, "lab/proxy": 1.0, "lab/gold": 2.0}, step=step)
            if step % every == 0:
                logger.log_metrics({"eval/lab/kl": 0.2 * step, "eval/lab/proxy": 1.5, "eval/lab/gold": 2.5}, step=step)
        assert load_curve(tmp_path / name).source == expected
        assert load_curve(tmp_path / name, source="eval").points[0].gold == 2.5
        assert len(load_curve(tmp_path / name, source="train").points) == 12


def test_a_folder_names_the_runs_that_have_a_curve(
    make_run: Callable[..., Path], peaked: dict[str, list[float]], tmp_path: Path
) -> None:
    FileLogger(tmp_path / "all" / "reward").log_metrics({"loss": 0.5}, step=0)
    with pytest.raises(UserError, match=r"all has no metrics.csv, and no run in it a curve$"):
        load_curve(tmp_path / "all")
    for name in ("dpo", "ppo/seed=0", "ppo/seed=1"):
        make_run(f"all/{name}", **peaked)
    with pytest.raises(UserError, match=r"it holds the runs dpo, ppo/seed=0, ppo/seed=1: give one of them"):
        load_curve(tmp_path / "all")


def test_a_pipeline_folder_names_its_runs(make_run: Callable[..., Path], peaked: dict[str, list[float]]) -> None:
    run = make_run("quick/ppo", **peaked)
    (run.parent / "pipeline.json").write_text("{}")
    assert load_curve(run).name == "quick/ppo"
    with pytest.raises(UserError, match=r"has no metrics.csv; it holds the runs ppo: give one of them"):
        load_curve(run.parent)


# ------------------------------------------------------------------ CSV
def test_a_plain_csv_in_any_order(table: Callable[[str], Path]) -> None:
    path = table("step, kl, proxy, gold, gold_se\n20, 4.0, 2, 0.7, 0.1\n0, 0.0, 0, 0.5, 0.1\n10, 1.0, 1, 0.9, 0.2\n")
    curve = load_curve(path)
    assert curve.name == "curve.csv"
    assert curve.points == [
        Point(0, 0.0, 0.0, 0.5, 0.1),
        Point(10, 1.0, 1.0, 0.9, 0.2),
        Point(20, 4.0, 2.0, 0.7, 0.1),
    ]


def test_columns_without_a_name_may_be_several(table: Callable[[str], Path]) -> None:
    assert len(load_curve(table("step,kl,proxy,,\n0,0,1,,\n1,1,2,,\n")).points) == 2


def test_without_a_step_column_rows_are_counted(table: Callable[[str], Path]) -> None:
    assert [point.step for point in load_curve(table("kl,proxy\n0,1\n1,2\n\n2,3\n")).points] == [0, 1, 2]


def test_a_csv_of_trl(table: Callable[[str], Path]) -> None:
    path = table("global_step,objective/kl,objective/scores,policy/clipfrac_avg\n1,0.1,0.5,0.2\n2,0.7,0.9,0.3\n")
    curve = load_curve(path)
    assert curve.source == "trl"
    assert [(p.step, p.kl, p.proxy) for p in curve.points] == [(1, 0.1, 0.5), (2, 0.7, 0.9)]
    assert not curve.has_gold


def test_columns_of_ones_own(table: Callable[[str], Path]) -> None:
    path = table("iteration,epoch,k,r,human\n1,7,0.1,0.5,0.2\n2,8,0.7,0.9,0.3\n")
    curve = load_curve(path, columns={"kl": "k", "proxy": "r", "gold": "human", "step": "epoch"})
    assert curve.source == "columns"
    assert curve.points == [Point(7, 0.1, 0.5, 0.2), Point(8, 0.7, 0.9, 0.3)]


def test_an_own_gold_column_beside_known_ones_loses_their_error(table: Callable[[str], Path]) -> None:
    path = table("step,kl,proxy,gold,gold_se,human\n1,0.1,0.5,0.2,0.01,7\n2,0.7,0.9,0.3,0.01,8\n")
    points = load_curve(path, columns={"gold": "human"}).points
    assert [point.gold for point in points] == [7, 8]
    assert all(math.isnan(point.gold_se) for point in points)


def test_nan_cells_are_left_out_and_counted(table: Callable[[str], Path]) -> None:
    path = table("step,kl,proxy,gold\n0,0,1,2\n1,nan,1,2\n2,0.5,,None\n3,0.6,nan,1.5\n4,inf,1,2\n5,0.7,1.2,N/A\n")
    curve = load_curve(path)
    assert [point.step for point in curve.points] == [0, 3, 5]
    assert math.isnan(curve.points[1].proxy)
    assert math.isnan(curve.points[2].gold)
    assert curve.left_out == 3


def test_a_step_in_several_rows_is_one_point(table: Callable[[str], Path]) -> None:
    points = load_curve(table("step,kl,proxy\n1,0.5,\n0,0,1\n1,0.5,\n1,nan,\n1,0.5,4\n")).points
    assert points == [Point(0, kl=0.0, proxy=1.0), Point(1, kl=0.5, proxy=4.0)]


def test_two_seeds_in_one_table_are_refused_with_the_line(table: Callable[[str], Path]) -> None:
    blocks = "".join(f"{step},{kl * step},1,{step}\n" for kl in (0.1, 0.2) for step in range(0, 80, 10))
    refused = r"curve.csv line 11: 2 in column 'kl' at step 10, which has 1 on line 3: give a file for each run or seed"
    with pytest.raises(UserError, match=refused):
        load_curve(table(f"step,kl,proxy,gold\n{blocks}"))


def test_a_kl_below_0_by_more_than_noise_is_refused_with_its_line(table: Callable[[str], Path]) -> None:
    refused = r"curve.csv line 4: -1.4 in column 'kl' is below 0 by more than noise, which no KL is: is its sign"
    with pytest.raises(UserError, match=refused):
        load_curve(table("step,kl,proxy\n0,0,1\n1,-0.9,2\n2,-1.4,3\n3,-10,3\n"))
    with pytest.raises(UserError, match=r"line 3: -0\.3 in column 'kl'"):
        load_curve(table("step,kl,kl_se,proxy\n0,-0.09,0,1\n1,-0.3,0.05,2\n"))
    with pytest.raises(UserError, match="line 3: -7 in column 'kl'"):
        load_curve(table("step,kl,proxy\n0,,4\n0,-7,\n0,,4\n"))
    assert len(load_curve(table("step,kl,kl_se,proxy\n0,-0.09,0.001,1\n1,-2,0.5,2\n2,-0.9,,3\n")).points) == 3


def test_negative_kl_is_kept_as_a_point_without_distance(table: Callable[[str], Path]) -> None:
    point = load_curve(table("step,kl,proxy\n0,-0.01,1\n")).points[0]
    assert point.kl == -0.01
    assert math.isnan(point.d)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("step,kl\n0,1\n", {}, r"has no curve over KL: .* it has step, kl\. Name others"),
        ("step,kl,proxy\n", {}, "curve.csv has a header and no rows"),
        ("", {}, "it has no columns"),
        ("step,kl,proxy\n0,nan,1\n", {}, r"no step has a number in 'kl'"),
        ("step,kl,proxy\n0,0.1,high\n", {}, r"line 2: 'high' in column 'proxy' is not a number"),
        ('note,kl,proxy\n"two\nlines",0.1,1\n,x,1\n', {}, r"line 4: 'x' in column 'kl'"),
        ("step,kl,proxy\n,0.1,1\n", {}, r"line 2: 'step' must be a whole number"),
        ("step,kl,proxy\n1.5,0.1,1\n", {}, r"line 2: 'step' must be a whole number"),
        ("step,kl,proxy\n1,0.1,1,5\n", {}, r"line 2: more cells than the header"),
        ("seed,step,kl,proxy\n0,1,0.1,1\n1,1,0.1,1\n", {}, r"holds several seeds .* give a file for each"),
        ("step,kl,kl,proxy\n1,0.1,2,1\n", {}, r"curve.csv has the column 'kl' twice: rename or remove one"),
        ("step;kl;proxy\n1;0,1;2\n", {}, r"curve.csv: its columns are separated by semicolons: write them with commas"),
        ("step\tkl\tproxy\n1\t0.1\t2\n", {}, r"its columns are separated by tabs: write them with commas"),
        ("Step, KL, Proxy\n1,0.1,2\n", {}, r"it has Step, KL, Proxy \(case counts: 'KL' is not 'kl'\)\. Name others"),
        ("Step,kl,proxy\n1,0.1,2\n", {}, r"case counts, 'Step' is not 'step': rename it, or give --columns step=Step"),
        ("step,kl,gold\n1,0.1,1\n2,0.2,1e308\n", {}, r"line 3: 1e\+308 in column 'gold' is no score: mend it"),
        ("step,kl,proxy\n1,0.1,-2e12\n", {}, r"line 2: -2e\+12 in column 'proxy' is no score"),
        ("step,kl,proxy\n1,0.1,1\n", {"source": "eval"}, r"nothing for --source eval \(found: plain\)"),
        ("step,kl,proxy\n1,0.1,1\n", {"columns": {"kl": "KL"}}, r"no column 'KL' \(it has step, kl, proxy\)"),
        ("step,kl,proxy\n1,0.1,1\n", {"columns": {"reward": "proxy"}}, "'reward' is none of step, kl, proxy, gold"),
        ("step,k,r\n1,0.1,1\n", {"columns": {"proxy": "r"}}, "must name 'kl' and 'proxy' or 'gold'"),
    ],
)
def test_bad_tables_are_refused_with_the_place(
    table: Callable[[str], Path], text: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_curve(table(text), **options)  # type: ignore[arg-type]


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist: give a run directory, or a CSV"):
        load_curve(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no metrics.csv: has it been trained\?"):
        load_curve(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x00")
    with pytest.raises(UserError, match=r"cannot read .*model\.bin as CSV"):
        load_curve(tmp_path / "model.bin")


# ------------------------------------------------------------------ samples and status
def test_samples_with_other_line_breaks_and_a_line_cut_by_a_crash(
    make_run: Callable[..., Path], peaked: dict[str, list[float]]
) -> None:
    run = make_run(**peaked, prompts=["a\u2028b"], completions=["one\r\ntwo"])
    with (run / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 85, "prompt": "a", "compl')
    samples = load_curve(run).samples
    assert len(samples) == 17
    assert samples[0]["completion"] == "one\r\ntwo"


def test_damaged_files_are_named(make_run: Callable[..., Path], peaked: dict[str, list[float]]) -> None:
    run = make_run(**peaked)
    whole = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text("{]\n" + whole)
    with pytest.raises(UserError, match=r"samples.jsonl line 1 is not JSON"):
        load_curve(run)
    (run / "samples.jsonl").write_text(json.dumps({"step": 0, "text": "of another kind"}) + "\n")
    assert load_curve(run).samples == []
    (run / "run.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"run.json is damaged"):
        load_curve(run)
