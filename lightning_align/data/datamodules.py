"""One datamodule for each kind of training data; what they share is in ``base``."""

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_align.data.base import BaseDataModule
from lightning_align.data.collate import MARGINS, Batchable, PackedRows, PreferenceGroups, PromptRows
from lightning_align.data.encode import LossOn
from lightning_align.data.loader import EvalLoader, StreamLoader, TrainLoader
from lightning_align.data.packing import Strategy, efficiency, pack
from lightning_align.data.readers import detect_source_kind
from lightning_align.data.records import STRENGTHS, Kind
from lightning_align.data.sources import PLAYGROUND
from lightning_align.data.splits import SplitName
from lightning_align.data.tables import Arrays, Counts, Limit
from lightning_align.data.tabulate import Record, Ties, preference_table, prompt_table, sft_table, text_table
from lightning_align.data.unpaired import UnpairedRows
from lightning_align.errors import UserError

__all__ = ["BaseDataModule", "PreferenceDataModule", "PromptDataModule", "SFTDataModule", "TextDataModule"]


class TextDataModule(BaseDataModule):
    """Documents for pre-training, each ended by EOS and packed into rows. Reads ``text`` records.

    Args:
        packing: ``bfd`` keeps documents whole where they fit, ``wrap`` fills every row, ``none`` gives each its own.
        document_mask: Whether the documents of a row are kept apart; false is plain GPT packing.
        on_overflow: ``split`` goes on in another row, so that no token is lost; else as for other data.
        kwargs: The settings of :class:`BaseDataModule`.
    """

    kind: Kind = "text"

    def __init__(
        self,
        *,
        packing: Strategy = "bfd",
        document_mask: bool = True,
        on_overflow: Literal["split", "error", "drop", "truncate"] = "split",
        **kwargs: Any,
    ) -> None:
        super().__init__(on_overflow="truncate" if on_overflow == "split" else on_overflow, **kwargs)
        self.packing = packing
        self.document_mask = document_mask
        self.splits_documents = on_overflow == "split"
        self.packs = packing != "none" and document_mask

    def tabulate(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], places: Sequence[str], limit: Limit
    ) -> tuple[Arrays, Counts]:
        """Documents with EOS."""
        return text_table(tokenizer, records, places, None if self.splits_documents else limit)

    def options(self) -> dict[str, Any]:
        """Whether long documents keep their length."""
        return {"split": self.splits_documents}

    def dataset(self, split: SplitName, table: Arrays, pad_id: int, capacity: int) -> Batchable:
        """Packed rows."""
        return packed_rows(self, split, table, pad_id, capacity, self.packing, document_mask=self.document_mask)


class SFTDataModule(BaseDataModule):
    """Demonstrations for supervised fine-tuning. Reads ``sft`` records.

    Args:
        loss_on: ``completion`` (of a ``messages`` record: its assistant turns), ``assistant`` (every assistant turn,
            those within a prompt too) or ``all``.
        packing: ``bfd`` packs whole records into rows, which do not see each other; ``none`` gives each its own row.
        document_mask: Whether the records of a row are kept apart.
        group_by_length: Batch records of similar length: less padding, for batches that are a little less random.
        kwargs: The settings of :class:`BaseDataModule`.
    """

    kind: Kind = "sft"

    def __init__(
        self,
        *,
        loss_on: LossOn = "completion",
        packing: Literal["bfd", "none"] = "none",
        document_mask: bool = True,
        group_by_length: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.loss_on = loss_on
        self.group_by_length = group_by_length
        self.packing: Literal["bfd", "none"] = packing
        self.document_mask = document_mask
        self.packs = packing != "none" and document_mask

    def tabulate(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], places: Sequence[str], limit: Limit
    ) -> tuple[Arrays, Counts]:
        """Prompts with completions, or conversations."""
        return sft_table(tokenizer, records, places, limit, self.loss_on, skip_bad=self.skips_bad)

    def options(self) -> dict[str, Any]:
        """Where the loss is."""
        return {"loss_on": self.loss_on}

    def dataset(self, split: SplitName, table: Arrays, pad_id: int, capacity: int) -> Batchable:
        """Rows of one or more records."""
        return packed_rows(self, split, table, pad_id, capacity, self.packing, document_mask=self.document_mask)


class PreferenceDataModule(BaseDataModule):
    """Comparisons for reward models and preference optimisation. Reads ``preference`` or ``ranked`` records.

    One prompt is one element of a batch: with K ranked answers, all their pairs, each weighing 1 / number of pairs.
    For a reward model that learns scores it reads ``scored`` records, for KTO ``unpaired`` ones, each an element.

    Args:
        kind: ``preference`` or ``ranked`` records; ``auto`` for what the source holds (of the playground, preferences).
            As preferences, the pairs of a ranking are elements by themselves.
        margin: Margin by strength: ``small`` or ``large`` (LLaMA-2's tables), ``none``, a mapping of strength to
            margin, or ``auto``: ``small`` where records carry a strength. A record's own ``margin`` goes before it.
        ties: ``drop`` them, or learn them: as ``soft`` labels of ½, or (reward models) with a probability of ties and
            a learnt parameter, ``rao_kupper`` or ``davidson``.
        aspect: Use the records of this aspect only.
        group_by_length: Batch prompts with answers of similar length.
        kwargs: The settings of :class:`BaseDataModule`.
    """

    kind: Kind = "preference"

    def __init__(
        self,
        *,
        kind: Literal["auto", "preference", "ranked"] = "auto",
        margin: Literal["auto", "none", "small", "large"] | dict[str, float] = "auto",
        ties: Ties = "drop",
        aspect: Literal["helpfulness", "safety"] | None = None,
        group_by_length: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(margin, dict) and (unknown := set(margin) - set(STRENGTHS)):
            raise UserError(f"data.margin names strength {min(unknown)!r}: there are {', '.join(STRENGTHS)}")
        self.wanted_kind: Kind | None = None if kind == "auto" else kind
        self.margin = margin
        self.uses_margins = True  # as far as the method is known
        self.ties = ties
        self.aspect = aspect
        self.group_by_length = group_by_length
        if aspect is not None and self.path == PLAYGROUND:
            self.playground["aspect"] = aspect

    def setup(self, stage: str | None = None) -> None:
        """Read what the method learns from, scores or comparisons; see :meth:`BaseDataModule.setup`."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        if module.record_kind is not None:
            if self.wanted_kind not in (None, module.record_kind):
                raise UserError(
                    f"data.kind is {self.wanted_kind}, but the model learns from {module.record_kind} records: "
                    "leave data.kind out"
                )
            self.wanted_kind = module.record_kind
        if self.ties not in ("drop", "soft", *module.tie_models):
            known = ", ".join(("drop", "soft", *module.tie_models))
            raise UserError(f"data.ties is {self.ties}, which {type(module).__name__} cannot learn here: give {known}")
        self.uses_margins = module.uses_margins
        if not self.uses_margins and self.margin not in ("auto", "none"):
            raise UserError(f"data.margin is {self.margin}, but this loss has no margins: leave it out")
        super().setup(stage)
        module.check_data(self)

    def source_kind(self) -> Kind:
        """Rankings stay together: their pairs belong in one batch."""
        if self.wanted_kind is not None:
            return self.wanted_kind
        found = detect_source_kind(self.path, columns=self.columns, wanted="preference")
        return "ranked" if found in ("ranked", "scored") else "preference"

    def tabulate(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], places: Sequence[str], limit: Limit
    ) -> tuple[Arrays, Counts]:
        """Answers with their prompts, and pairs of them."""
        chosen = [i for i, record in enumerate(records) if self.aspect in (None, record.get("aspect"))]
        if not chosen:
            raise UserError(
                f"{places[0]}: neither this record nor one of the other {len(records) - 1:,} is of aspect {self.aspect}"
                ": change data.aspect, or the records (those held out may come from data.val_path)"
            )
        table, counts = preference_table(
            tokenizer,
            [records[i] for i in chosen],
            [places[i] for i in chosen],
            limit,
            self.ties,
            skip_bad=self.skips_bad,
        )
        for index in sorted(set(range(len(records))) - set(chosen)):
            counts.drop(f"not of aspect {self.aspect}", places[index])
        return table, counts

    def options(self) -> dict[str, Any]:
        """What becomes of ties, and which aspect is wanted."""
        return {"ties": self.ties, "aspect": self.aspect}

    def dataset(self, split: SplitName, table: Arrays, pad_id: int, capacity: int) -> Batchable:
        """Groups of answers, with margins."""
        graded = bool((table["strength"] >= 0).any())
        name = ("small" if graded and self.uses_margins else "none") if self.margin == "auto" else self.margin
        margins = MARGINS[name] if isinstance(name, str) else tuple(name.get(strength, 0.0) for strength in STRENGTHS)
        if split == "train":
            if self.wanted_kind == "scored":
                self._note_scores(table)
            elif self.wanted_kind == "unpaired":
                self.report.note("good answers", f"{int(table['score'].sum()):,} of {len(table['score']):,}")
            else:
                self._note_margins(table, margins, graded)
        if self.wanted_kind == "unpaired":
            return UnpairedRows(table, pad_id=pad_id, capacity=capacity, report=self.report)
        return PreferenceGroups(table, pad_id=pad_id, margins=margins)

    def _note_scores(self, table: Arrays) -> None:
        scores = table["score"].astype(float)
        self.report.note("scores", f"mean {scores.mean():.4g}, deviation {scores.std():.4g}")

    def _note_margins(self, table: Arrays, margins: Sequence[float], graded: bool) -> None:
        own = int((table["margin"] == table["margin"]).sum())  # the others are NaN
        self.report.note("pairs", len(table["chosen"]))
        if not self.uses_margins:
            if own:
                self.report.note("pairs with a margin of their own", f"{own:,}, which this loss has no use for")
            return
        if graded and any(margins):
            by_strength = ", ".join(f"{name} {value:.3g}" for name, value in zip(STRENGTHS, margins, strict=True))
            self.report.note(
                "margin by strength", by_strength + (" (data.margin: auto)" if self.margin == "auto" else "")
            )
        else:
            self.report.note("margin by strength", "none" if graded else "none, as no record carries a strength")
        if own:
            self.report.note("pairs with a margin of their own", own)

    def reference_dataloader(self) -> EvalLoader:
        """The training answers, on every process, to fix the zero of the scores.

        The order is random, and the same every time: the first batches stand for all, even where the file is sorted.
        """
        return EvalLoader(self.datasets["train"], batch_size=self.eval_batch_size, shuffle=True)


class PromptDataModule(BaseDataModule):
    """Prompts for methods that sample. Reads ``prompt`` records; what is too long loses its beginning.

    An iteration draws ``batch_size`` prompts on every process, epoch after epoch without end; a batch that an epoch
    cannot fill goes on with the next.

    Args:
        kwargs: The settings of :class:`BaseDataModule`; ``max_length`` is the prompt's.
    """

    kind: Kind = "prompt"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def tabulate(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], places: Sequence[str], limit: Limit
    ) -> tuple[Arrays, Counts]:
        """Prompts."""
        return prompt_table(tokenizer, records, places, limit, skip_bad=self.skips_bad)

    def dataset(self, split: SplitName, table: Arrays, pad_id: int, capacity: int) -> Batchable:
        """Prompts with their records."""
        return PromptRows(table, self.splits.read(split).records)

    def _build_train_loader(self) -> TrainLoader:
        return self._stream(self.seed)

    def further_loader(self) -> TrainLoader:
        """The training prompts in another order, for methods that need more of them than a batch."""
        return self._stream(self.seed + 1)

    def _stream(self, seed: int) -> StreamLoader:
        world_size, rank = self._processes()
        return StreamLoader(
            self.datasets["train"],
            batch_size=self.batch_size,
            world_size=world_size,
            rank=rank,
            seed=seed,
            shuffle=self.shuffle,
        )

    def _eval_loader(self, split: SplitName) -> EvalLoader | list[Any]:
        if split not in self.datasets:
            return []
        world_size, rank = self._processes()
        return EvalLoader(
            self.datasets[split], batch_size=self.eval_batch_size, world_size=world_size, rank=rank, fill=False
        )


def packed_rows(
    datamodule: BaseDataModule,
    split: SplitName,
    table: Arrays,
    pad_id: int,
    capacity: int,
    strategy: Strategy,
    *,
    document_mask: bool,
) -> PackedRows:
    """Rows of at most ``capacity`` tokens; the report says how full they are."""
    lengths = table["starts"][1:] - table["starts"][:-1]
    packing = pack(
        lengths, capacity, strategy, seed=datamodule.seed if split == "train" and datamodule.shuffle else None
    )
    if strategy != "none" and split == "train":
        apart = "" if document_mask else ", documents see each other (data.document_mask: false)"
        share = efficiency(packing, capacity)
        datamodule.report.note(
            "packing", f"{strategy}, {len(packing):,} rows of {capacity} tokens, {share:.1%} full{apart}"
        )
    return PackedRows(table, packing, pad_id=pad_id, document_mask=document_mask)
