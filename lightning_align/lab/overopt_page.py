"""One self-contained page: the picture, its numbers, and what the model said on the way. No script, no request."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from lightning_align.lab.analysis import Analysis
from lightning_align.lab.extrapolation import FORMS, Foresight
from lightning_align.lab.figures import NARROW, WIDE, draw, source_line, svg
from lightning_align.lab.findings import FORM_NAMES, Finding, kl_interval, kl_text, number
from lightning_align.lab.measured import read_measured
from lightning_align.lab.overopt import FORMULAS, Interval
from lightning_align.lab.page import page
from lightning_align.lab.runs import Point

PROMPTS_SHOWN = 5
LONGEST_TEXT = 700  # characters of a prompt or answer
SHARE_NAMES = {1 / 2: "half", 1 / 3: "third"}
READING = (
    "Each dot is a checkpoint; training moves to the right, away from the model it started from. The reward is what "
    "training can see and maximise; whether the answers are better it does not say."
)
READING_GOLD = (
    "Each dot is a checkpoint; training moves to the right, away from the model it started from. The reward (above) is "
    "what training can see and maximise. The true score (below) is what we want. Where the reward still rises and the "
    "true score falls, the policy is exploiting the reward's mistakes."
)


def render(analysis: Analysis, finding: Finding) -> str:
    """The whole page."""
    head = [
        f'<p class="eyebrow">Over-optimisation · {escape(analysis.curve.name)}</p>',
        f"<h1>{escape(finding.headline)}</h1>",
    ]
    return page(finding.headline, [*head, *sections(analysis, finding)], footer=_footer(analysis))


def sections(analysis: Analysis, finding: Finding) -> list[str]:
    """The parts of the page under its heading."""
    return [
        *(f"<p>{escape(sentence)}</p>" for sentence in finding.sentences),
        _keep(analysis),
        _picture(analysis, finding),
        _fit(analysis),
        answers(analysis),
        _run(analysis),
    ]


# ---------------------------------------------------------------------------------------------------------- the top
def _keep(analysis: Analysis) -> str:
    choice = analysis.choice
    if choice is None or choice.checkpoint is None:
        return ""
    title = "Checkpoint to keep" if choice.policy == "gold" else "Checkpoint at the knee"
    path = str(choice.checkpoint)
    near = (
        "" if choice.checkpoint_step == choice.point.step else f" (saved at step {choice.checkpoint_step}, the nearest)"
    )
    command = f"lightning-align export {path} --out best"
    return (
        f'<div class="keep"><p><strong>{title}</strong>{near}<br><code>{escape(path)}</code></p>'
        f'<p class="note">Write it as a Hugging Face model: <code>{escape(command)}</code></p></div>'
    )


def _picture(analysis: Analysis, finding: Finding) -> str:
    label = escape(finding.headline)
    pictures = "\n".join(
        svg(draw(analysis, finding, layout, with_title=False), name, label)
        for name, layout in (("wide", WIDE), ("narrow", NARROW))
    )
    reading = READING_GOLD if analysis.curve.has_gold else READING
    caption = escape(reading) + "<br>" + escape(source_line(analysis)).replace("\n", " ")
    return (
        f'<div class="beside"><figure>{pictures}<figcaption><p>{caption}</p></figcaption></figure>'
        f"{_points(analysis)}</div>"
    )


def _points(analysis: Analysis) -> str:
    """The numbers behind the dots."""
    notes = _notes(analysis)
    rows = []
    for point in analysis.curve.points:
        chosen = ' class="chosen"' if analysis.choice is not None and point == analysis.choice.point else ""
        cells = "".join(
            f"<td>{cell}</td>" for cell in (point.step, number(point.kl), number(point.proxy), number(point.gold))
        )
        rows.append(f'<tr{chosen}>{cells}<td class="word">{", ".join(notes.get(point.step, []))}</td></tr>')
    head = '<th>step</th><th>KL</th><th class="proxy">reward</th><th class="gold">true score</th><th class="word"></th>'
    return (
        '<div class="scroll"><table><caption>The dots as numbers (KL in nats)</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _notes(analysis: Analysis) -> dict[int, list[str]]:
    notes: dict[int, list[str]] = {}
    if analysis.start is not None:
        notes.setdefault(analysis.start.points[0].step, []).append("start")
    if (choice := analysis.choice) is not None:
        notes.setdefault(choice.point.step, []).append("keep" if choice.policy == "gold" else "knee")
        if choice.best is not None:
            notes.setdefault(choice.best.step, []).append("best")
    for point in analysis.curve.points:
        if point.kl < 0:
            notes.setdefault(point.step, []).append("KL below 0, not fitted")
    return notes


# ---------------------------------------------------------------------------------------------------------- the fit
def _fit(analysis: Analysis) -> str:
    result = analysis.result
    if result is None:
        return ""
    rows = [_row("α", result.alpha, 3), _row("β", result.beta, 3)]
    peak = analysis.fitted_peak
    if peak is not None:
        estimate, ends = kl_text(peak.kl.estimate), kl_interval(peak.kl)
        rows += [
            f'<tr><td class="word">peak, KL (nats)</td><td>{estimate}</td><td>{ends}</td></tr>',
            _row("peak, d* = √KL", peak.d, 2),
            _row("gain over the start at the peak, R*", peak.reward, 2),
        ]
    else:
        rows.append('<tr><td class="word">peak</td><td>none claimed</td><td></td></tr>')
    if analysis.fall is not None:
        rows.append(_row("end minus peak, measured", analysis.fall, 2))
    slope = number(analysis.proxy_slope)
    rows.append(f'<tr><td class="word">reward per unit of d, straight line</td><td>{slope}</td><td></td></tr>')
    head = '<th class="word"></th><th>estimate</th><th>95 % interval</th>'
    note = (
        f"{len(analysis.fitted)} checkpoints fitted by least squares, true score at the start "
        f"{'fitted' if analysis.start_fitted else 'fixed at'} {number(analysis.start_gold)}. d = √KL."
    )
    return (
        f'<h2>The fit</h2><p class="note">{escape(note)}</p><div class="pair">'
        f"<table><caption>{escape(FORMULAS[analysis.form])}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>{_forms(analysis)}</div>"
    )


def _row(name: str, interval: Interval, digits: int) -> str:
    low, high = number(interval.low, digits), number(interval.high, digits) if interval.high < 1e3 else "∞"
    return f'<tr><td class="word">{name}</td><td>{number(interval.estimate, digits)}</td><td>{low} to {high}</td></tr>'


def _forms(analysis: Analysis) -> str:
    """Both forms on the same points: how near they come, and how well they foresee the far ones."""
    rows = "".join(
        f'<tr><td class="word">{FORM_NAMES[name]}: {escape(FORMULAS[name])}</td><td>{number(result.rmse, 3)}</td></tr>'
        for name, result in analysis.forms.items()
    )
    table = (
        "<table><caption>Two forms (root mean square error of the true score)</caption>"
        f'<thead><tr><th class="word"></th><th>error</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    return table + foresight_table(analysis.foresight)


def foresight_table(foresight: Sequence[Foresight]) -> str:
    """Errors at the far points: of each form, and of what needs no law."""
    if not foresight:
        return ""
    heads = "".join(f"<th>farthest {SHARE_NAMES[found.share]}</th>" for found in foresight)
    lines = [
        *((f"{FORM_NAMES[form]}, from the nearer points", [f.predicted[form] for f in foresight]) for form in FORMS),
        ("no change, from the nearer points", [f.constant for f in foresight]),
        ("straight line, from the nearer points", [f.linear for f in foresight]),
        *((f"{FORM_NAMES[form]}, from all points", [f.hindsight[form] for f in foresight]) for form in FORMS),
    ]
    rows = "".join(
        f'<tr><td class="word">{name}</td>{"".join(f"<td>{number(value, 3)}</td>" for value in values)}</tr>'
        for name, values in lines
    )
    return (
        "<table><caption>Does the law predict? (error at the farthest points)</caption>"
        f'<thead><tr><th class="word"></th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    )


# ---------------------------------------------------------------------------------------------------------- answers
def answers(analysis: Analysis) -> str:
    """The same prompts at the start, at the chosen checkpoint and at the end."""
    columns = sample_columns(analysis)
    if not columns:
        return ""
    blocks = []
    for prompt in shared_prompts([rows for _, _, rows in columns])[:PROMPTS_SHOWN]:
        cards = "".join(_card(title, point, rows.get(prompt), analysis) for title, point, rows in columns)
        blocks.append(f'<div><p class="prompt">{escape(clip(prompt))}</p><div class="columns">{cards}</div></div>')
    drawn = "when the checkpoints were measured" if _measured_answers(analysis) else "during training"
    note = (
        f"The first {len(blocks)} held-out prompts, not selected; one answer each, drawn {drawn}, long texts cut at "
        "[…]. One answer is one draw: its scores may lie far from the checkpoint's means, which stand above it."
    )
    return f'<h2>What it says on the way</h2><p class="note">{note}</p><div class="answers">{"".join(blocks)}</div>'


def sample_columns(analysis: Analysis) -> list[tuple[str, Point, dict[str, Mapping[str, Any]]]]:
    """Title, point and rows by prompt of the sampled checkpoints: the first, the chosen and the farthest by KL."""
    by_step: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in _measured_answers(analysis) or analysis.curve.samples:
        if isinstance(row["step"], int):
            by_step.setdefault(row["step"], {}).setdefault(as_text(row["prompt"]), row)
    points = {point.step: point for point in analysis.curve.points}
    sampled = sorted((points[step] for step in by_step if step in points), key=lambda p: (p.kl, p.step))
    if not sampled:
        return []
    titles = {
        sampled[-1].step: "Over-optimised" if analysis.falls else "Farthest from the start",
        sampled[0].step: "Start",
    }
    if (choice := analysis.choice) is not None:
        kept = choice.point.step
        chosen = min(sampled, key=lambda p: abs(p.step - kept))
        name = "Checkpoint to keep" if choice.policy == "gold" else "Checkpoint at the knee"
        titles[chosen.step] = name if chosen.step == kept else f"Sampled nearest to: {name.lower()}"
    return [(titles[p.step], p, by_step[p.step]) for p in sampled if p.step in titles]


def _measured_answers(analysis: Analysis) -> list[dict[str, Any]]:
    """The answers that the points' scores are means of, where they were measured after training."""
    curve = analysis.curve
    measured = read_measured(curve.path) if curve.source == "measured" and curve.path is not None else []
    return [{"step": row["step"], **answer} for row in measured for answer in row["answers"]]


def shared_prompts(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Prompts in the order of the columns, those that all columns have before the others."""
    prompts = dict.fromkeys(prompt for rows in columns for prompt in rows)
    return sorted(prompts, key=lambda prompt: -sum(prompt in rows for rows in columns))


def _card(title: str, point: Point, row: Mapping[str, Any] | None, analysis: Analysis) -> str:
    chosen = " chosen" if analysis.choice is not None and point.step == analysis.choice.point.step else ""
    means = [f"{name} {number(v)}" for name, v in (("reward", point.proxy), ("true score", point.gold)) if v == v]
    mean = f"<br>mean {', '.join(means)}" if means else ""
    head = f'<div class="note">{title} · step {point.step}, KL {kl_text(point.kl)}{mean}</div>'
    if row is None:
        return f'<div class="card{chosen}">{head}<div class="text note">no sample of this prompt</div></div>'
    scores = "".join(
        f'<span class="{key}">{name} <strong>{number(float(row[key]))}</strong></span>'
        for key, name in (("proxy", "reward"), ("gold", "true score"))
        if isinstance(row.get(key), int | float)
    )
    cut = '<span class="note">cut at the length limit</span>' if row.get("finish_reason") == "length" else ""
    text = escape(clip(as_text(row["completion"]))) or '<span class="note">(empty)</span>'
    return (
        f'<div class="card{chosen}">{head}<div class="text">{text}</div><div class="scores">{scores}{cut}</div></div>'
    )


def as_text(content: Any) -> str:
    """A text, or a conversation with a line per turn."""
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, list) and all(isinstance(turn, dict) for turn in content):
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in content)
    return json.dumps(content, ensure_ascii=False)


def clip(text: str) -> str:
    """At most :data:`LONGEST_TEXT` characters: both ends of a longer text."""
    half = LONGEST_TEXT // 2
    return text if len(text) <= LONGEST_TEXT else f"{text[:half].rstrip()} […] {text[-half:].lstrip()}"


# ---------------------------------------------------------------------------------------------------------- the run
def _run(analysis: Analysis) -> str:
    curve = analysis.curve
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _status_entries(curve.status)
    )
    full = yaml.safe_dump(curve.config, sort_keys=False, allow_unicode=True) if curve.config else ""
    details = f"<details><summary>The whole configuration</summary><pre>{escape(full)}</pre></details>" if full else ""
    return f"<h2>The run</h2><dl>{listed}</dl>{details}" if listed or full else ""


def _status_entries(status: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if status.get("seed") is not None:
        yield "seed", str(status["seed"])
    seconds = _mapping(status, "durations").get("total_seconds")
    if isinstance(seconds, int | float):
        yield "trained for", f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    if status.get("created"):
        yield "started", str(status["created"])
    hardware = _mapping(status, "hardware")
    if hardware:
        gpus = ", ".join(map(str, hardware.get("gpus") or []))
        yield "hardware", gpus or f"{hardware.get('cpu_cores', '?')} CPU cores"
    versions = _mapping(status, "versions")
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if status.get("git_commit"):
        yield "commit", str(status["git_commit"])


def _mapping(status: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = status.get(key)
    return value if isinstance(value, dict) else {}


def _footer(analysis: Analysis) -> str:
    left_out = analysis.curve.left_out
    lost = f" {left_out} steps without a finite KL and score were left out." if left_out else ""
    noise = analysis.gold_noise.se
    scatter = (
        f" One true score has a standard error of about {number(noise)}." if math.isfinite(noise) and noise else ""
    )
    return (
        f"Formula: Gao, Schulman & Hilton, Scaling laws for reward model overoptimization, 2022 (arXiv 2210.10760)."
        f"{scatter}{lost}"
    )
