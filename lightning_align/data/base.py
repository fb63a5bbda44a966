"""The base of all datamodules: read records, tokenise them, say what was found, hand out batches."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
from transformers import PreTrainedTokenizerBase

from lightning_align.data.cache import cache_folder, cached, first_process_first, hash_training
from lightning_align.data.collate import Batchable
from lightning_align.data.loader import EvalLoader, TrainLoader
from lightning_align.data.records import Kind, is_conversational
from lightning_align.data.report import Report, count
from lightning_align.data.sources import PLAYGROUND
from lightning_align.data.splits import Split, SplitName, Splits, texts
from lightning_align.data.tables import Arrays, Counts, Limit, OnOverflow
from lightning_align.data.tabulate import Record
from lightning_align.data.templates import conventions
from lightning_align.errors import UserError

STAGES: dict[str | None, tuple[SplitName, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
}


class BaseDataModule(L.LightningDataModule):
    """What all datamodules share: where records come from, which are held out, how long they may be.

    Held out are the records of ``val_path``; else the source's own validation split; else ``val_fraction`` of the
    records.

    Args:
        path: File, folder, hub id or ``playground``.
        columns: Our field names to those in the data: ``{prompt: question}``.
        val_path: Source of the validation records.
        val_fraction: Share of the records that is held out where the source has no validation split. The choice depends
            on the prompts alone, and records of one prompt stay together.
        leave_out: A part of the training records that is not used, by prompts: ``2/5`` for the second of five. So the
            members of an ensemble can differ in what they have seen.
        batch_size: Elements per process and micro-batch.
        eval_batch_size: The same in evaluations; ``batch_size`` if not given.
        max_length: Longest sequence in tokens; what the model can take limits it too.
        on_bad_record: Stop at a record that cannot be used, or skip and count it.
        on_overflow: What happens to records that are too long; they are counted whatever it is. ``truncate`` takes from
            the beginning of the prompt first, down to half of the length, then from the end of the completion.
        playground: Options of the playground: ``{size: 1000, seed: 1}``; other sources have no use for them.
        shuffle: Whether every epoch has another order.
        cache_dir: Where tokenised data are kept: ``auto`` (the user's cache folder), a folder, or null for nowhere.
    """

    kind: Kind
    packs = False  # whether rows hold several documents that must not see each other
    group_by_length = False

    def __init__(
        self,
        *,
        path: str,
        columns: dict[str, str] | None = None,
        val_path: str | None = None,
        val_fraction: float = 0.05,
        leave_out: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        on_bad_record: Literal["error", "skip"] = "error",
        on_overflow: OnOverflow = "truncate",
        playground: dict[str, Any] | None = None,
        shuffle: bool = True,
        cache_dir: str | None = "auto",
    ) -> None:
        super().__init__()
        at_least_one = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_length": max_length}
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}: give at least 1")
        if not 0 <= val_fraction < 1:
            raise UserError(f"data.val_fraction is {val_fraction}: give a share from 0 up to (not including) 1")
        self.path = path
        self.columns = columns
        self.val_path = val_path
        self.val_fraction = val_fraction
        self.leave_out = None if leave_out is None else _fold(leave_out)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_length = max_length
        self.on_bad_record = on_bad_record
        self.skips_bad = on_bad_record == "skip"
        self.on_overflow = on_overflow
        self.playground = playground or {}
        self.shuffle = shuffle
        self.cache_dir = cache_dir
        self.seed = 0
        self.train_hash: str | None = None  # of the training data, to notice that they are others when a run goes on
        self.datasets: dict[SplitName, Batchable] = {}
        self._splits: Splits | None = None
        self._train_loader: TrainLoader | None = None
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------ what a kind of records implies
    def tabulate(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], places: Sequence[str], limit: Limit
    ) -> tuple[Arrays, Counts]:
        """Tokenise records."""
        raise NotImplementedError(f"{type(self).__name__} must implement tabulate")

    def options(self) -> dict[str, Any]:
        """Whatever changes the result of :meth:`tabulate`, beside records, tokenizer and limit."""
        return {}

    def dataset(self, split: SplitName, table: Arrays, pad_id: int, capacity: int) -> Batchable:
        """Something that batches can be made of."""
        raise NotImplementedError(f"{type(self).__name__} must implement dataset")

    def source_kind(self) -> Kind:
        """The kind of records to ask for."""
        return self.kind

    # ------------------------------------------------------------------ set-up
    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenise what the stage needs; Lightning calls this before any weights are loaded.

        The first process of a machine does it alone; the others then find the tokens in the cache.
        """
        assert self.trainer is not None
        with first_process_first(self.trainer.local_rank):
            self.prepare(self.trainer.lightning_module, STAGES[stage])
        if STAGES[stage][0] not in self.datasets:
            raise UserError(f"{self.path}: no records are held out: set data.val_path, or data.val_fraction above 0")

    def prepare(self, module: Any, splits: Sequence[SplitName]) -> None:
        """Set up ``splits`` for a module, which has ``get_tokenizer`` and ``max_tokens``."""
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        wanted = {split: self.splits.read(split) for split in splits if split not in self.datasets}
        if self.playground and PLAYGROUND not in (self.path, self.val_path):  # left over in a configuration
            self.report.note("data.playground", f"not used, as data.path is {self.path}")
        tokenizer = module.get_tokenizer(lambda: texts(self.splits.read("train").records))
        limit = self._limit(module.max_tokens())
        self._note_turn_end(wanted.values(), tokenizer)
        for split, source in wanted.items():
            if source.records:
                table, counts = self._tabulated(source, tokenizer, limit)
                if split == next(iter(wanted)):
                    counts.note(self.report)
                else:
                    counts.note_losses(self.report, f"{split}: ")
                _check_something_is_left(counts, self.path, split)
                self.datasets[split] = self.dataset(split, table, padding_id(tokenizer), limit.tokens)
                if split == "train":  # a reward may read any field of a prompt's record
                    self.train_hash = hash_training(table, source.records if self.kind == "prompt" else [])

    @property
    def splits(self) -> Splits:
        """The records; nothing is read before they are asked for."""
        if self._splits is None:
            self._splits = Splits(
                self.path,
                self.source_kind(),
                val_path=self.val_path,
                val_fraction=self.val_fraction,
                leave_out=self.leave_out,
                columns=self.columns,
                on_bad_record=self.on_bad_record,
                playground=self.playground,
            )
        return self._splits

    @property
    def report(self) -> Report:
        """What was read, converted, cut and dropped."""
        report = self.splits.report
        assert report is not None, "nothing was read yet"
        return report

    def _tabulated(self, source: Split, tokenizer: PreTrainedTokenizerBase, limit: Limit) -> tuple[Arrays, Counts]:
        records, places = source
        options = {"kind": self.kind, **asdict(limit), "skips_bad": self.skips_bad, **self.options()}
        return cached(
            cache_folder(self.cache_dir),
            tokenizer,
            records,
            places,
            options,
            lambda: self.tabulate(tokenizer, records, places, limit),
        )

    def _note_turn_end(self, sources: Iterable[Split], tokenizer: PreTrainedTokenizerBase) -> None:
        known = conventions(tokenizer)
        if known.turn_end_id in (None, known.eos_id):
            return
        if any(is_conversational(source.records[0]) for source in sources if source.records):
            self.report.note(
                "a turn ends with", f"{known.turn_end}, which is not the tokenizer's {tokenizer.eos_token}"
            )

    def _limit(self, max_tokens: int | None) -> Limit:
        tokens = self.max_length if max_tokens is None else min(self.max_length, max_tokens)
        if tokens < 1:
            raise UserError("model.max_new_tokens leaves no room for a prompt: lower it")
        if tokens < self.max_length:
            self.report.note(
                "longest sequence", f"{tokens} tokens, as the model takes no more (data.max_length is more)"
            )
        return Limit(tokens, self.on_overflow)

    # ------------------------------------------------------------------ what others ask about them
    @property
    def mean_tokens(self) -> float:
        """Tokens of an element of the training set, on average."""
        return float(self.datasets["train"].lengths.mean())

    @property
    def max_tokens_seen(self) -> int:
        """Tokens of the longest sequence of the training set."""
        return int(self.datasets["train"].longest)

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out."""
        return "val" in self.datasets

    @property
    def sequences_per_batch(self) -> float:
        """Sequences of a micro-batch, on average."""
        return self.batch_size * self.datasets["train"].sequences_per_element

    # ------------------------------------------------------------------ loaders
    def train_dataloader(self) -> TrainLoader:
        """Batches of the training set; the same loader each time, so that its position is known."""
        if self._train_loader is None:
            self._train_loader = self._build_train_loader()
            if self._restored is not None:
                self._train_loader.load_state_dict(self._restored)
        return self._train_loader

    def _build_train_loader(self) -> TrainLoader:
        world_size, rank = self._processes()
        loader = TrainLoader(
            self.datasets["train"],
            batch_size=self.batch_size,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer is not None else 1,
            world_size=world_size,
            rank=rank,
            seed=self.seed,
            shuffle=self.shuffle,
            group_by_length=self.group_by_length,
        )
        if self.trainer is not None:
            loader.limit = _limited(len(loader), self.trainer.limit_train_batches)
        return loader

    def val_dataloader(self) -> EvalLoader | list[Any]:
        """Batches of the validation set, none if nothing is held out."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader | list[Any]:
        """Batches of the test set."""
        return self._eval_loader("test")

    def _eval_loader(self, split: SplitName) -> EvalLoader | list[Any]:
        if split not in self.datasets:
            return []
        world_size, rank = self._processes()
        return EvalLoader(
            self.datasets[split], batch_size=self.eval_batch_size, world_size=world_size, rank=rank, by_length=True
        )

    def _processes(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    # ------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Position in the training data."""
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position.

        Lightning also stores it with its loop, but restores that only into a loader made later, and by then the
        schedule has already asked how long the loader is.
        """
        self._restored = state_dict["train_loader"]
        if self._train_loader is not None:
            self._train_loader.load_state_dict(self._restored)


def _fold(text: str) -> tuple[int, int]:
    """(k, K) of ``k/K``."""
    fold, _, folds = text.partition("/")
    if not (fold.isdecimal() and folds.isdecimal() and 1 <= int(fold) <= int(folds) and int(folds) > 1):
        raise UserError(f"data.leave_out is {text!r}: give a part and the number of parts, such as 2/5")
    return int(fold), int(folds)


def _check_something_is_left(counts: Counts, path: str, split: str) -> None:
    if not counts.records:
        reasons = "; ".join(
            f"{count(n, 'record')}: {reason} (first: {first})" for reason, (n, first) in counts.dropped.items()
        )
        raise UserError(f"{path}: nothing is left to learn from in the {split} data; {reasons}")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands where nothing is; EOS will do, because masks say what is padding."""
    pad_id = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad_id is None else pad_id)


def _limited(batches: int, limit: int | float | None) -> int | None:
    """Lightning's ``limit_train_batches`` as a number of batches."""
    if limit is None or limit == 1.0:
        return None
    return int(limit) if isinstance(limit, int) else int(batches * limit)
