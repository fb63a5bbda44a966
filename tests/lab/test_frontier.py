"""Several runs side by side: interpolation, gains with their intervals, and what is refused."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_align.cli.main import run
from lightning_align.errors import UserError
from lightning_align.lab.evaluation.intervals import over_runs
from lightning_align.lab.frontier import best, common_kl, front, gain, load_tracks, summarise
from lightning_align.lab.frontier_figures import Panel, draw_frontier, mean_curve, note, panels
from lightning_align.lab.frontier_tracks import Track, roots, samples
from lightning_align.lab.frontier_words import headline, lines, to_csv
from lightning_align.lab.pareto import pareto
from lightning_align.lab.runs import Point

STEPS = (0, 2, 4, 6)
Z = stats.norm.ppf(0.975)


def made(folder: Path, gold: list[float], *, kl: tuple[float, ...] = (0.0, 0.25, 1.0, 4.0), se: float = 0.05) -> Path:
    """A run directory with evaluations and training rows of eight samples an iteration."""
    folder.mkdir(parents=True)
    lines = ["step,episode,lab/kl,lab/proxy,eval/lab/kl,eval/lab/proxy,eval/lab/gold,eval/lab/gold_se"]
    for step in range(1, 7):
        lines.append(f"{step},{8 * step},0.1,0.2,,,,")
    lines += [f"{s},,,,{k},{s / 10},{g},{se}" for s, k, g in zip(STEPS, kl, gold, strict=True)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def drawn(tracks: list[Track], kl: float = 1.0) -> list[Any]:
    """The panels of the picture, without the legend."""
    return draw_frontier(tracks, summarise(tracks, kl, None)).axes[1:]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds of one method and one run of another."""
    rows = ([0.5, 0.7, 1.0, 0.4], [0.6, 0.7, 0.9, 0.6], [0.4, 0.7, 1.1, 0.5])
    seeds = [made(tmp_path / f"s{i}" / "rest", row) for i, row in enumerate(rows)]
    return [*seeds, made(tmp_path / "s0" / "ppo", [0.5, 0.6, 0.8, 0.9], kl=(0.0, 0.25, 1.0, 2.25))]


def test_gold_is_read_between_neighbours_on_the_root_of_kl_and_not_beyond(runs: list[Path]) -> None:
    track = load_tracks(runs)[0]
    assert track.at(roots, 0.5) == pytest.approx(0.7)
    assert track.at(roots, 0.75) == pytest.approx(0.85)  # half way from KL 0.25 to KL 1, in roots
    assert track.at(roots, 2.0) == pytest.approx(0.4)
    assert math.isnan(track.at(roots, 2.1))
    assert list(track.samples) == [0, 16, 32, 48]
    assert track.at(samples, 24) == pytest.approx(0.85)


def test_a_run_that_starts_away_from_the_origin_says_nothing_of_what_lies_before(tmp_path: Path) -> None:
    (track,) = load_tracks([made(tmp_path / "run", [1.0, 1.5, 2.0, 3.0], kl=(1.0, 1.2, 4.0, 9.0))])
    assert math.isnan(track.at(roots, 0.5))
    assert track.at(roots, 1.0) == pytest.approx(1.0)
    assert summarise([track], 0.25, None)["methods"]["run"]["at_kl"]["n"] == 0


def test_kl_that_turns_back_is_put_in_order(tmp_path: Path) -> None:
    (track,) = load_tracks([made(tmp_path / "run", [0.0, 1.0, 3.0, 2.0], kl=(0.0, 1.0, 9.0, 4.0))])
    assert track.at(roots, 2.0) == pytest.approx(2.0)
    assert track.at(roots, 2.5) == pytest.approx(2.5)


def test_gain_is_of_each_run_over_its_own_start_with_students_interval(runs: list[Path]) -> None:
    tracks = load_tracks(runs)[:3]
    estimate = gain(tracks, roots, 1.0)
    gains = np.array([0.5, 0.3, 0.7])
    reach = stats.t.ppf(0.975, 2) * gains.std(ddof=1) / math.sqrt(3)
    assert estimate.value == pytest.approx(0.5)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - reach, 0.5 + reach))
    assert estimate.n == 3


def test_one_run_has_the_interval_of_its_prompts(runs: list[Path]) -> None:
    estimate = gain(load_tracks(runs)[3:], roots, 1.0)
    assert estimate.value == pytest.approx(0.3)
    assert estimate.high - estimate.low == pytest.approx(2 * Z * 0.05 * math.sqrt(2))


def test_runs_that_did_not_come_that_far_are_left_out(runs: list[Path]) -> None:
    tracks = load_tracks(runs)
    assert common_kl(tracks) == pytest.approx(2.25)
    summary = summarise(tracks, 4.0, 40.0)
    assert summary["methods"]["ppo"]["at_kl"]["n"] == 0
    assert summary["methods"]["rest"]["at_kl"]["value"] == pytest.approx(0.0)
    assert summary["methods"]["ppo"]["at_samples"]["value"] == pytest.approx(0.35)
    assert headline(summary).startswith("At KL 4.0 rest is +0.00 from its start")
    assert headline(summarise(tracks, 9.0, None)) == "No method reaches KL 9.0"


def test_the_best_is_the_mean_of_each_runs_best(runs: list[Path]) -> None:
    row = best(load_tracks(runs)[:3])
    assert (row["gold"], row["kl"], row["samples"]) == pytest.approx((1.0, 1.0, 32.0))
    assert row["gain"]["value"] == pytest.approx(0.5)


def test_every_point_is_in_the_table(runs: list[Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(load_tracks(runs)))))
    assert len(rows) == 16
    last = rows[-1]
    assert (last["method"], last["step"], last["samples"]) == ("ppo", "6", "48.0")
    assert (float(last["kl"]), float(last["gold"])) == (2.25, 0.9)


def test_the_picture_has_a_line_for_each_method_and_faint_ones_for_seeds(runs: list[Path]) -> None:
    tracks = load_tracks(runs)
    axes = drawn(tracks)
    over_kl = [line for line in axes[0].get_lines() if line.get_gid() != "pareto"]
    assert [line.get_label() for line in over_kl if not line.get_label().startswith("_")] == ["rest", "ppo"]
    (mean,) = (line for line in over_kl if line.get_label() == "rest")
    assert mean.get_xdata() == pytest.approx([0.0, 0.5, 1.0, 2.0])
    assert mean.get_ydata() == pytest.approx([0.5, 0.7, 1.0, 0.5])
    assert sum(line.get_alpha() == 0.2 for line in over_kl) == 3
    assert len(axes) == 3  # over KL, samples and reward
    assert axes[1].xaxis.get_transform().linthresh == 16  # linear up to the first evaluation after the start


def test_the_sample_axis_is_linear_up_to_the_first_evaluation(tmp_path: Path) -> None:
    run_of_two = made(tmp_path / "one", [0.0, 1.0, 2.0, 3.0])
    table = (run_of_two / "metrics.csv").read_text().replace("1,8,", "1,80,").replace("2,16,", "2,160,")
    (run_of_two / "metrics.csv").write_text(table)
    tracks = load_tracks([run_of_two])
    assert drawn(tracks)[1].xaxis.get_transform().linthresh == min(value for value in tracks[0].samples if value > 0)


def test_from_the_command_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lab", "frontier", *map(str, runs), "--out", str(tmp_path / "out"), "--kl", "1"]) == 0
    said = capsys.readouterr().out
    assert "At KL 1.0 rest gains most, +0.50" in said
    assert "ppo (1 run): at KL 1.0 +0.300 (+0.161 to +0.439); at best +0.400 at KL 2.25 after 48 samples" in said
    summary = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert summary["methods"]["rest"]["runs"] == 3
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_csv_of_another_trainer_has_no_samples(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,kl,proxy,gold\n0,0,0,1\n1,1,1,2\n")
    tracks = load_tracks([tmp_path / "log.csv"])
    assert [panel.over for panel in panels(tracks)] == ["kl", "proxy"]


def test_columns_of_another_trainer_and_one_method_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trl.csv").write_text("step,objective/kl,objective/scores,judge\n0,0,0,2\n1,1,1,1.5\n")
    words = ["lab", "frontier", str(tmp_path / "trl.csv"), "--out", str(tmp_path / "out")]
    other = str(made(tmp_path / "with", [0.0, 1.0, 2.0, 3.0]))
    assert run([*words[:2], other, *words[2:]]) == 2
    assert "--columns gold=NAME" in capsys.readouterr().err
    assert run([*words, "--columns", "kl=objective/kl", "gold=judge"]) == 0
    said = capsys.readouterr().out
    assert "At KL 1.0 trl.csv is -0.50 from its start" in said
    assert "nan" not in said


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.csv").write_text("step,kl,proxy\n0,0,0\n1,1,1\n")
    with pytest.raises(UserError, match=r"log\.csv has no gold score"):
        load_tracks([made(tmp_path / "judged", [0.0, 1.0, 2.0, 3.0]), tmp_path / "log.csv"])
    with pytest.raises(UserError, match="is given twice"):
        load_tracks([made(tmp_path / "twice", [0.0, 1.0, 2.0, 3.0]), tmp_path / "other" / ".." / "twice"])
    many = [made(tmp_path / f"m{i}", [0.0, 1.0, 2.0, 3.0]) for i in range(11)]
    with pytest.raises(UserError, match="11 methods in one picture: give at most 10"):
        load_tracks(many)
    assert run(["lab", "frontier", str(many[0]), "--kl", "-1"]) == 2
    assert "--kl is -1: give a number above 0" in capsys.readouterr().err
    assert run(["lab", "frontiers"]) == 2
    assert "did you mean" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the front
def test_the_front_is_what_no_other_point_beats() -> None:
    generator = np.random.default_rng(3)
    for _ in range(200):
        count = int(generator.integers(1, 12))
        kl, score = (generator.integers(0, 6, count).astype(float) for _ in range(2))  # many ties
        score[generator.random(count) < 0.1] = np.nan
        beaten = [
            any(
                kl[j] <= kl[i] and score[j] >= score[i] and (kl[j] < kl[i] or score[j] > score[i])
                for j in range(count)
                if not np.isnan(score[j])
            )
            for i in range(count)
        ]
        expected = [not b and not np.isnan(s) for b, s in zip(beaten, score, strict=True)]
        assert pareto(kl.tolist(), score.tolist()) == expected


def test_the_front_is_over_all_runs_and_marked_in_table_json_and_picture(runs: list[Path]) -> None:
    tracks = load_tracks(runs)
    found = [(str(track.run), point.step) for track, point in front(tracks)]
    # KL 0: 0.6 of the second; KL 0.25: 0.7 of all three seeds; KL 1: 1.1 of the third
    assert found == [(str(runs[1]), 0), *((str(run), 2) for run in runs[:3]), (str(runs[2]), 4)]
    rows = list(csv.DictReader(io.StringIO(to_csv(tracks))))
    assert [(row["run"], int(row["step"])) for row in rows if row["pareto"] == "1"] == sorted(
        found, key=lambda pair: (list(map(str, runs)).index(pair[0]), pair[1])
    )
    told = summarise(tracks, 1.0, None)["pareto"]
    assert [(entry["run"], entry["step"]) for entry in told] == found
    (line,) = (line for line in drawn(tracks)[0].get_lines() if line.get_gid() == "pareto")
    assert list(line.get_ydata()) == [0.6, 0.7, 0.7, 0.7, 1.1, 1.1]  # to the edge at the end
    assert line.get_drawstyle() == "steps-post"


# ---------------------------------------------------------------------------------------------------------- the bands
def over_kl(score: str = "gold") -> Panel:
    return Panel(score, roots, "kl", "")


def test_a_band_is_over_seeds_from_three_runs_on_else_over_prompts(runs: list[Path]) -> None:
    tracks = load_tracks(runs)
    x, mean, low, high = mean_curve(tracks[:3], over_kl())
    assert x == pytest.approx([0.0, 0.5, 1.0, 2.0])
    gains = np.array([0.5, 0.3, 0.7])  # the band is about the mean score, as wide as the interval of the gain
    reach = stats.t.ppf(0.975, 2) * gains.std(ddof=1) / math.sqrt(3)
    assert (mean[2], low[2], high[2]) == pytest.approx((1.0, 1.0 - reach, 1.0 + reach))
    _, mean, low, high = mean_curve(tracks[:2], over_kl())
    assert (mean[2], high[2] - mean[2]) == pytest.approx((0.95, Z * 0.05))  # √2 for the start, 1/√2 for two
    assert (low[0], high[0]) == pytest.approx((mean[0], mean[0]))  # the start gains nothing, for certain
    assert over_runs([1.0, 3.0], [0.3, 0.4]).se == pytest.approx(0.25)


def scored(place: Path, rows: np.ndarray, kls: tuple[float, ...] = (0.0, 1.0)) -> Track:
    """A run whose prompts have these scores ``[steps, prompts]``."""
    errors = rows.std(axis=1, ddof=1) / math.sqrt(rows.shape[1])
    points = [
        Point(step, kl, gold=float(row.mean()), gold_se=float(error))
        for step, (kl, row, error) in enumerate(zip(kls, rows, errors, strict=True))
    ]
    prompts = {"gold": {step: row.tolist() for step, row in enumerate(rows)}}
    return Track("a", place, points, [math.nan] * len(points), prompts=prompts)


def test_the_difficulty_of_prompts_is_no_error_of_a_gain(tmp_path: Path) -> None:
    difficulty = np.random.default_rng(0).normal(0, 3, 50)
    track = scored(tmp_path, np.stack([difficulty, difficulty + 0.25]))
    assert track.error(track.start) > 0.3
    assert track.gain_error(np.array([0.0, 1.0])) == pytest.approx(0, abs=1e-12)
    assert track.gain_error(np.array([0.5, 0.5])) == pytest.approx(0, abs=1e-12)
    for runs in (1, 2, 3):
        estimate = gain([track] * runs, roots, 1.0)
        assert (estimate.low, estimate.value, estimate.high)[runs == 1 :] == pytest.approx(
            (0.25, 0.25, 0.25)[runs == 1 :], abs=1e-9
        )


@pytest.mark.parametrize("runs", [2, 3])
def test_the_interval_of_a_gain_holds_the_error_of_a_start_that_is_shared(tmp_path: Path, runs: int) -> None:
    """One start of one answer a prompt for all runs: what it is off by moves every gain together."""
    generator = np.random.default_rng(1)
    held, free, trials = 0, 0, 300
    for _ in range(trials):
        difficulty = generator.normal(0, 1, 60)
        start = difficulty + generator.normal(0, 1, 60)
        seeds = generator.normal(0, 0.02, runs) if runs > 2 else np.zeros(runs)
        ends = [difficulty + 0.5 + seed + generator.normal(0, 0.3, 60) for seed in seeds]
        tracks = [scored(tmp_path, np.stack([start, end])) for end in ends]
        estimate = gain(tracks, roots, 1.0)
        held += estimate.low <= 0.5 <= estimate.high
        alone = over_runs([t.points[1].gold - t.start.gold for t in tracks], [t.error(t.start) for t in tracks])
        free += alone.low <= 0.5 <= alone.high
    assert 0.92 <= held / trials <= 0.99
    assert runs == 2 or free / trials < 0.75  # over the runs alone


def test_a_shared_start_without_its_prompts_counts_with_its_error(runs: list[Path], tmp_path: Path) -> None:
    for seed, high in enumerate((0.9, 1.0, 1.1)):
        made(tmp_path / f"t{seed}" / "rest", [0.5, 0.7, high, 0.4])
    alike = load_tracks([tmp_path / f"t{seed}" / "rest" for seed in range(3)])
    over = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    estimate = gain(alike, roots, 1.0)
    assert estimate.high - estimate.value == pytest.approx(math.hypot(over, Z * 0.05))
    assert gain(alike, roots, 0.25).se == pytest.approx(0.05 / 2)  # half way from the start
    assert gain(alike, roots, 0.0).se == 0.0
    own = load_tracks(runs[:3])  # each measured a start of its own
    assert gain(own, roots, 1.0).se == pytest.approx(0.2 / math.sqrt(3))
    assert "the start's answers are the same for all, and their error is not in it" in note(own)
    measured = scored(tmp_path, np.array([[0.0, 1.0], [1.0, 2.0]]))
    assert "their error is in the interval of the gain" in note([measured] * 3)
    assert "Over runs" not in note([measured] * 2)


def test_a_run_that_turns_back_reaches_its_farthest_kl(tmp_path: Path) -> None:
    (track,) = load_tracks([made(tmp_path / "back", [0.0, 1.0, 3.0, 2.0], kl=(0.0, 1.0, 9.0, 4.0))])
    assert common_kl([track]) == pytest.approx(9.0)


def test_two_runs_are_drawn_where_both_are(tmp_path: Path) -> None:
    tracks = [
        Track("a", tmp_path / "1", [Point(0, 0.0, gold=0.0), Point(1, 4.0, gold=2.0)], [math.nan] * 2),
        Track("a", tmp_path / "2", [Point(0, 1.0, gold=3.0), Point(1, 9.0, gold=5.0)], [math.nan] * 2),
    ]
    x, mean, low, _ = mean_curve(tracks, over_kl())
    assert (x.tolist(), mean.tolist()) == ([2.0], [3.0])  # (2 + 4) / 2
    assert np.isnan(low).all()  # no errors are known
    assert len(drawn(tracks, 4.0)) == 1


# ---------------------------------------------------------------------------------------------------------- odd runs
def test_one_point_alone_is_drawn_and_told(tmp_path: Path) -> None:
    (tmp_path / "dpo.csv").write_text("step,kl,proxy,gold,gold_se\n9,1.5,1,2,0.1\n")
    tracks = load_tracks([tmp_path / "dpo.csv", made(tmp_path / "ppo", [0.5, 0.7, 1.0, 0.4])])
    assert common_kl(tracks) == 4.0  # one point says not how far a method goes
    summary = summarise(tracks, 1.0, None)
    assert summary["methods"]["dpo.csv"]["at_kl"]["n"] == 0
    assert summary["methods"]["dpo.csv"]["best"]["gold"] == 2.0
    (line,) = (line for line in drawn(tracks)[0].get_lines() if line.get_label() == "dpo.csv")
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([pytest.approx(math.sqrt(1.5))], [2.0])
    alone = summarise(tracks[:1], common_kl(tracks[:1]), None)
    assert headline(alone) == "No run has a second checkpoint: one point says nothing of a gain"
    assert lines(alone) == ["  dpo.csv (1 run): one point, true score 2.000 at KL 1.50"]
    assert drawn(tracks[:1])


def test_numbers_that_are_missing_and_kl_below_zero(tmp_path: Path) -> None:
    text = "step,kl,proxy,gold,win_rate\n0,-0.001,0,1,0.5\n1,nan,1,9,0.5\n2,1,,2,\n3,4,2,nan,0.8\n4,9,3,1.5,0.7\n"
    (tmp_path / "log.csv").write_text(text)
    (track,) = load_tracks([tmp_path / "log.csv"])
    assert [point.step for point in track.points] == [0, 2, 4]
    assert roots(track) == [0.0, 1.0, 3.0]
    assert [(panel.score, panel.over) for panel in panels([track])] == [
        ("gold", "kl"),
        ("gold", "proxy"),
        ("win_rate", "kl"),
    ]
    x, mean, _, _ = mean_curve([track], over_kl("win_rate"))
    assert (x.tolist(), mean.tolist()) == ([0.0, 3.0], [0.5, 0.7])
    assert len(drawn([track])) == 3
    assert "nan" not in to_csv([track])


def test_kl_that_only_falls(tmp_path: Path) -> None:
    tracks = load_tracks([made(tmp_path / "back", [2.0, 1.5, 1.0, 0.5], kl=(4.0, 1.0, 0.25, 0.01))])
    x, mean, _, _ = mean_curve(tracks, over_kl())
    assert (x.tolist(), mean.tolist()) == ([pytest.approx(0.1), 0.5, 1.0, 2.0], [0.5, 1.0, 1.5, 2.0])
    assert drawn(tracks)


def test_without_gold_the_next_score_counts(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,kl,proxy,win_rate,win_rate_se\n0,0,0,0.5,0.01\n1,1,1,0.6,0.02\n")
    tracks = load_tracks([tmp_path / "log.csv"])
    summary = summarise(tracks, 1.0, None)
    assert summary["score"] == "win_rate"
    assert summary["methods"]["log.csv"]["at_kl"]["value"] == pytest.approx(0.1)
    assert [panel.over for panel in panels(tracks)] == ["kl", "proxy"]


@pytest.mark.parametrize("gold", ["", ",gold"])
def test_a_reward_is_not_told_as_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str], gold: str) -> None:
    cell = ",nan" * bool(gold)
    for name, top in (("nogold", 1.3), ("other", 0.9)):
        (tmp_path / f"{name}.csv").write_text(f"step,kl,proxy{gold}\n0,0,0{cell}\n1,8,{top}{cell}\n")
    words = ["--out", str(tmp_path / "out")]
    assert run(["lab", "frontier", str(tmp_path / "nogold.csv"), *words]) == 0
    said = capsys.readouterr().out
    title = "At KL 8.0 the reward of nogold.csv is +1.30 from its start; no true score was found"
    assert said.startswith(f"{title}\n  nogold.csv (1 run): reward at KL 8.0 +1.300")
    page = (tmp_path / "out" / "frontier.html").read_text()
    assert f"<h1>{title}</h1>" in page
    assert "Compared by reward (proxy), as no true score was found" in page
    assert run(["lab", "frontier", *(str(tmp_path / f"{name}.csv") for name in ("nogold", "other")), *words]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("At KL 8.0 nogold.csv gains most reward, +1.30; ")
    assert said.endswith("; no true score was found")


def test_files_of_best_of_n_given_by_hand_are_one_method(tmp_path: Path) -> None:
    text = "step,kl,proxy,proxy_se,gold,gold_se\n1,0,0,0,0.5,0.1\n2,0.19,1,0,0.8,0.1\n"
    names = ["best_of.csv", "best_of_2.csv", "best_of_3.csv", "best_of_ppo.csv"]
    for name in names:
        (tmp_path / name).write_text(text)
    many = [made(tmp_path / f"m{i}", [0.0, 1.0, 2.0, 3.0]) for i in range(8)]
    tracks = load_tracks([*many, *(tmp_path / name for name in names)])
    assert [track.method for track in tracks[8:]] == ["best-of-n"] * 3 + ["best_of_ppo.csv"]


def test_runs_of_a_folder_without_the_source_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {}
    for name in ("ppo", "dpo"):
        made(tmp_path / name, [0.0, 1.0, 2.0, 3.0])
        (tmp_path / name / "checkpoints").mkdir()
        (tmp_path / name / "checkpoints" / "step=00002.ckpt").write_bytes(b"x")
        (tmp_path / name / "run.json").write_text("{}")
        states[name] = {"finished": True}
    (tmp_path / "pipeline.json").write_text(json.dumps(states))
    (tmp_path / "dpo" / "metrics.csv").write_text("step,loss\n1,0\n")
    words = ["lab", "frontier", str(tmp_path), "--out", str(tmp_path / "out"), "--source"]
    assert run([*words, "eval"]) == 0
    said = capsys.readouterr().out
    assert "  ppo (1 run): at KL 4.0" in said
    assert f"  left out: {tmp_path / 'dpo' / 'metrics.csv'} has nothing for --source eval (found: no curve)" in said
    assert run([*words, "measured"]) == 2  # none is left
    assert "ppo has no measured.csv" in capsys.readouterr().err
    assert run(["lab", "frontier", str(tmp_path / "dpo"), "--source", "eval"]) == 2  # asked for by name
    assert "has nothing for --source eval" in capsys.readouterr().err


def test_best_of_n_is_a_track_of_its_own(tmp_path: Path, runs: list[Path]) -> None:
    (tmp_path / "best_of.csv").write_text("step,kl,proxy,proxy_se,gold,gold_se\n1,0,0,0,0.5,0.1\n2,0.19,1,0,0.8,0.1\n")
    tracks = load_tracks(runs, best_of=[tmp_path / "best_of.csv"])
    assert tracks[-1].method == "best-of-n"
    assert [point.step for point in tracks[-1].points] == [1, 2]
    assert (tracks[-1].run, 2) in [(track.run, point.step) for track, point in front(tracks)]


def test_a_pipelines_folder_without_kept_checkpoints_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "sft", [0.0, 1.0, 2.0, 3.0])
    for name, content in (("sft/run.json", {}), ("pipeline.json", {"sft": {"finished": True}})):
        (tmp_path / name).write_text(json.dumps(content))
    assert run(["lab", "frontier", str(tmp_path)]) == 2
    assert "kept checkpoints for the lab (run.keep_every)" in capsys.readouterr().err
