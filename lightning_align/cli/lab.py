"""``lab``: what finished runs say; each command lives in a module of its own."""

from importlib import import_module

from lightning_align.errors import UserError, nearest

SUMMARIES = {
    "overopt": "true score and reward over KL: fit, peak, checkpoint to keep (PNG, HTML, JSON)",
    "frontier": "true score of several runs over KL and over samples, method by method (HTML, PNG, JSON, CSV)",
    "claims": "claims of the field against the runs of sweeps: effect, interval, verdict (PNG, JSON)",
    "leaderboard": "all methods at the same KL and sample budget (HTML, PNG, JSON, CSV)",
    "report": "one page of everything, for a run or for pipelines (HTML)",
    "select": "which checkpoint to keep, why, and what each policy would have cost (JSON, PNG)",
    "scaling": "laws over reward-model size, data and policy size, from a sweep (JSON, CSV, PNG)",
}  # by command; lab_NAME.py has its main


def main(argv: list[str]) -> int:
    """Run the lab command that ``argv`` names."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, SUMMARIES))
        commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in SUMMARIES.items())
        print(f"usage: lightning-align lab COMMAND [options]\n\ncommands:\n{commands}")
        return 0
    if argv[0] not in SUMMARIES:
        names = list(SUMMARIES)
        raise UserError(f"unknown lab command '{argv[0]}'{nearest(argv[0], names)} (there are: {', '.join(names)})")
    main_of_command = import_module(f"lightning_align.cli.lab_{argv[0]}").main
    return int(main_of_command(argv[1:]))
