"""A crowd of simulated annotators on ``label human``: ``python -m benchmarks.labelling --model runs/sft``.

Annotators rank the answers of a playground policy over HTTP, as the page does, all at once: each adds Gumbel noise of a
temperature to the true scores, so that a pair is chosen by Bradley–Terry with a known probability. Half way the server
is killed with -9 and started again on the same store. Reported are

- judgements that were answered for and are not in the store, or are in it twice;
- response times of a judgement, which is on disk before it is answered for;
- Krippendorff's α of the export against the α that was put in, 1 − 4 E[p(1 − p)];
- accuracy on true comparisons of held-out prompts of reward models trained from the command line on the first n
  judgements, beside one of as many judgements without noise.

Results go to the terminal, and as JSON and a figure, ``labelling.…``, to ``benchmarks/results/<device>/``.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.common import machine, markdown, result_folder
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import Item
from lightning_align.rewards.build import build_reward

ANSWERS, NEW_TOKENS = 4, 24
OVERLAP = 2 / 3  # with two annotators on those, three prompts give five judgements
HELD_OUT = 500  # prompts


def align(*words: str, folder: Path) -> str:
    """Run a command of ours; what it printed."""
    line = [sys.executable, "-m", "lightning_align", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


class Server:
    """``label human`` as a process; killed and started again it keeps its port and its links."""

    def __init__(self, folder: Path, names: Sequence[str], *options: str) -> None:
        self.folder, self.names, self.options, self.port = folder, names, options, 0
        self.start()

    def start(self) -> None:
        """Until it answers."""
        words = ["label", "human", "--no_browser", f"--port={self.port}", *self.options, "--annotators", *self.names]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_align", *words], cwd=self.folder, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.tokens: dict[str, str] = {}
        for line in self.process.stdout:
            if found := re.match(r"  (\S+)\s+http://[\d.]+:(\d+)/#token=(\S+)", line):
                self.tokens[found[1]], self.port = found[3], int(found[2])
            if line.startswith("Ctrl-C"):
                return
        raise SystemExit("label human did not start")

    def end(self, kind: int) -> None:
        """Send a signal and wait."""
        self.process.send_signal(kind)
        self.process.wait()


@dataclass
class Crowd:
    """Annotators at work.

    Attributes:
        server: That they ask.
        scores: True score by prompt and answer.
        temperature: Of their noise.
        kill_after: Judgements after which the server is killed once.
        told: Keys of judgements that were answered for.
        seconds: From sending a judgement to its answer, where the server was up.
    """

    server: Server
    scores: dict[tuple[str, str], float]
    temperature: float
    kill_after: int
    told: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> float:
        """All at once until nothing is left; the seconds it took."""
        begun = time.perf_counter()
        killer = threading.Thread(target=self._kill_once)
        people = [threading.Thread(target=self._person, args=(n, name)) for n, name in enumerate(self.server.names)]
        for thread in (killer, *people):
            thread.start()
        for thread in (*people, killer):
            thread.join()
        return time.perf_counter() - begun

    def _kill_once(self) -> None:
        while len(self.told) < self.kill_after:
            time.sleep(0.01)
        self.server.end(signal.SIGKILL)
        self.server.start()

    def _person(self, number: int, name: str) -> None:
        draw = np.random.default_rng(number)
        headers = {"authorization": f"Bearer {self.server.tokens[name]}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}", headers=headers, timeout=60) as client:
            answer = self._ask(client, "/api/task", None)
            made = 0
            while (task := answer["task"]) is not None:
                texts = [shown[0]["text"] for shown in task["answers"]]
                true = np.array([self.scores[task["prompt"][0]["text"], text] for text in texts])
                order = np.argsort(-(true + self.temperature * draw.gumbel(size=len(true))))
                ranks = (np.argsort(order) + 1).tolist()
                body = {"key": f"{name} {made:06}", "item": task["item"], "aspect": task["aspect"], "ranks": ranks}
                made += 1
                answer = self._ask(client, "/api/judge", {**body, "strength": "better" if len(ranks) == 2 else None})
                with self.lock:
                    self.told.append(body["key"])

    def _ask(self, client: httpx.Client, path: str, body: dict[str, Any] | None) -> Any:
        """As the page does: until there is an answer, under the same key."""
        while True:
            begun = time.perf_counter()
            try:
                answer = client.get(path) if body is None else client.post(path, json=body)
            except httpx.TransportError:
                time.sleep(0.2)
                continue
            if body is not None:
                self.seconds.append(time.perf_counter() - begun)
            if answer.status_code != 200:
                self.failures.append(answer.text)
            return answer.raise_for_status().json()


def true_scores(items: Sequence[Item]) -> list[list[float]]:
    """Of each item's answers, in their order."""
    gold = build_reward("playground", default_name="gold")
    prompts = [item.prompt for item in items for _ in item.answers]
    texts = [str(answer) for item in items for answer in item.answers]
    total = gold.score(prompts, texts, finished=[True] * len(texts), records=[{}] * len(texts)).total.tolist()
    ends = np.cumsum([len(item.answers) for item in items])[:-1]
    return [part.tolist() for part in np.split(np.array(total), ends)]


def alpha_put_in(scores: Sequence[Sequence[float]], temperature: float) -> float:
    """1 − 4 E[p(1 − p)] over all pairs of answers of an item; equal true scores are coins."""
    differences = np.concatenate([np.subtract.outer(own, own)[np.triu_indices(len(own), 1)] for own in scores])
    p = 1 / (1 + np.exp(-differences / temperature))
    return float(1 - 4 * np.mean(p * (1 - p)))


def held_out(folder: Path, options: argparse.Namespace) -> Path:
    """True comparisons of answers to prompts that nobody judged."""
    align(
        *("data", "export", "playground", "--kind", "prompt", "--split", "val"),
        "--size",
        str(8 * HELD_OUT),
        "--out",
        "val.jsonl",
        folder=folder,
    )
    lines = (folder / "val.jsonl").read_text().splitlines()[:HELD_OUT]
    (folder / "val.jsonl").write_text("\n".join(lines) + "\n")
    server = Server(
        folder, ["nobody"], "--prompts=val.jsonl", f"--model={options.model}", "--store=val.sqlite", *sampling()
    )
    server.end(signal.SIGTERM)
    items = list(Store(folder / "val.sqlite").items().values())
    rows = []
    for item, own in zip(items, true_scores(items), strict=True):
        for i, j in zip(*np.triu_indices(len(own), 1), strict=True):
            if own[i] != own[j]:
                better, worse = (i, j) if own[i] > own[j] else (j, i)
                rows.append({"prompt": item.prompt, "chosen": item.answers[better], "rejected": item.answers[worse]})
    path = folder / "true.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sampling() -> list[str]:
    """How answers are drawn."""
    return [f"--num_answers={ANSWERS}", f"--max_new_tokens={NEW_TOKENS}", "--batch_size=256"]


def accuracies(folder: Path, options: argparse.Namespace, true: Path) -> list[dict[str, Any]]:
    """Of reward models on the first n judgements, and on as many without noise, with their intervals."""
    rows = [json.loads(line) for line in (folder / "ranked.jsonl").read_text().splitlines()]
    scores = {}
    items = list(Store(folder / "labels.sqlite").items().values())
    for item, own in zip(items, true_scores(items), strict=True):
        scores |= {(item.prompt, answer): score for answer, score in zip(item.answers, own, strict=True)}
    found = []
    for n in (n for n in options.sizes if n <= len(rows)):
        for source in ("crowd", "truth"):
            for seed in range(options.seeds):
                picked = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:n]]
                if source == "truth":
                    picked = [
                        {**row, "ranks": _ranks([scores[row["prompt"], a] for a in row["completions"]])}
                        for row in picked
                    ]
                name = f"{source}-{n}-{seed}"
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in picked))
                fit = [
                    "fit",
                    f"--config={options.config}",
                    f"--model.model={options.model}",
                    f"--data.path={name}.jsonl",
                ]
                fixed = [
                    f"--seed_everything={seed}",
                    f"--run.name={name}",
                    "--run.wandb=disabled",
                    "--trainer.enable_progress_bar=false",
                ]
                align(*fit, *fixed, folder=folder)
                align(
                    "evaluate", "--model", f"runs/{name}", "--data", str(true), "--out", f"{name}.json", folder=folder
                )
                measured = json.loads((folder / f"{name}.json").read_text())
                accuracy = measured["models"][0]["metrics"]["accuracy"]
                found.append({"source": source, "judgements": n, "seed": seed, "accuracy": accuracy["value"]})
                print(f"{source} {n} seed {seed}: accuracy {accuracy['value']:.3f}", flush=True)
    return found


def _ranks(scores: Sequence[float]) -> list[int]:
    levels = sorted(set(scores), reverse=True)
    return [levels.index(score) + 1 for score in scores]


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy over the number of judgements."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for source, marker in (("truth", "s"), ("crowd", "o")):
        points: dict[int, list[float]] = {}
        for row in result["accuracies"]:
            if row["source"] == source:
                points.setdefault(row["judgements"], []).append(row["accuracy"])
        sizes = sorted(points)
        label = "without noise" if source == "truth" else f"crowd, α {result['alpha']['value']:.2f}"
        axes.plot(sizes, [np.mean(points[n]) for n in sizes], marker=marker, label=label)
        for n in sizes:
            axes.plot([n] * len(points[n]), points[n], ".", color="0.6", zorder=0)
    axes.set(xscale="log", xlabel="judgements (rankings of up to four answers)", ylabel="accuracy on true comparisons")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Let a crowd judge, and train on what it said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="policy whose answers are ranked, and start of the reward models"
    )
    parser.add_argument("--config", default=str(Path("configs/playground/reward.yaml").resolve()))
    parser.add_argument("--prompts", type=int, default=3000)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.5, help="of the noise, in units of the true score")
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 300, 1000, 3000, 5000])
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments)
    options.model = str(Path(options.model).resolve())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        align(
            *("data", "export", "playground", "--kind", "prompt", "--size", str(options.prompts)),
            "--out",
            "train.jsonl",
            folder=folder,
        )
        names = [f"person{n}" for n in range(options.people)]
        begun = ["--prompts=train.jsonl", f"--model={options.model}", f"--overlap={OVERLAP}", *sampling()]
        server = Server(folder, names, *begun)
        store = Store(folder / "labels.sqlite")
        items = list(store.items().values())
        scores = true_scores(items)
        known = {
            (str(i.prompt), str(a)): s
            for i, own in zip(items, scores, strict=True)
            for a, s in zip(i.answers, own, strict=True)
        }
        wanted = store.progress("nobody")["wanted"]
        crowd = Crowd(server, known, options.temperature, kill_after=wanted // 2)
        took = crowd.work()
        server.end(signal.SIGINT)
        saved = store.judgements()
        align("label", "export", "labels.sqlite", "--kind", "ranked", "--out", "ranked.jsonl", folder=folder)
        alpha = json.loads((folder / "ranked.agreement.json").read_text())["nominal"]
        times = np.array(crowd.seconds) * 1000
        result = {
            "machine": machine(),
            **{"people": options.people, "items": len(items), "wanted": wanted, "temperature": options.temperature},
            **{"answered": len(crowd.told), "saved": len(saved), "distinct": len(set(crowd.told))},
            **{"refused": len(crowd.failures), "seconds": took, "judgements_per_second": len(saved) / took},
            "milliseconds": {str(q): float(np.percentile(times, q)) for q in (50, 95, 99, 100)},
            **{"alpha": alpha, "alpha_put_in": alpha_put_in(scores, options.temperature)},
        }
        print(json.dumps(result, indent=1), flush=True)
        result["accuracies"] = accuracies(folder, options, held_out(folder, options))
    folder = result_folder()
    (folder / "labelling.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, folder / "labelling.png")
    rows = [("judgements", "labels", "accuracy")]
    rows += [(str(r["judgements"]), r["source"], f"{r['accuracy']:.3f}") for r in result["accuracies"]]
    print(markdown(rows))


if __name__ == "__main__":
    main()
