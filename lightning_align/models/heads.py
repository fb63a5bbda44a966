"""Scalar heads on decoder trunks: reward models (one score a sequence) and value models (one value a token)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_align.errors import UserError
from lightning_align.models.answers import AnswerRows
from lightning_align.models.loading import (
    Loaded,
    Parameters,
    count_parameters,
    has_architecture,
    load_causal_lm,
    load_config,
    load_network,
)
from lightning_align.models.masks import attention_inputs, predictable_tokens
from lightning_align.models.sources import base_of_adapter, resolve_source

HEAD = "score.weight"
# How raw scores leave a reward model: as they are, minus the reference set's mean, divided by its deviation too, or in
# the unit of the scores that a regression learnt.
Normalisation = Literal["none", "mean", "full", "target"]


class RewardModel(nn.Module):
    """A score per sequence: a linear head without bias on the state of the last real token, in float32.

    The last token is found by the mask, so that padding side, padding id and batch do not matter. Mean and standard
    deviation of the scores on a reference set are kept in the configuration (``reward_mean``, ``reward_std``), and so
    are those of a regression's targets (``target_mean``, ``target_std``) and which of them are applied
    (``reward_normalize``). Raw scores are those of ``AutoModelForSequenceClassification``, which loads what
    ``network.save_pretrained`` writes, as long as no text ends with the padding id of its configuration.

    Args:
        network: A sequence classifier of transformers with one label and a head named ``score``.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network
        _score_head(network)
        fields = network.config.to_dict()
        self.reward_mean, self.reward_std = float(fields.get("reward_mean", 0.0)), float(fields.get("reward_std", 1.0))
        self.target_mean, self.target_std = float(fields.get("target_mean", 0.0)), float(fields.get("target_std", 1.0))
        self.normalisation: Normalisation = fields.get("reward_normalize", "mean")

    @classmethod
    def from_backbone(
        cls, source: str, *, tokenizer: PreTrainedTokenizerBase | None = None, dtype: str = "float32"
    ) -> "RewardModel":
        """A trunk under a fresh head, drawn from N(0, 1/(H + 1)) by torch's seed; a reward model keeps its own."""
        loaded = _load_classifier(source, tokenizer, dtype)
        if loaded.missing - {HEAD}:
            raise _incomplete(source, loaded)
        model = cls(loaded.network)
        if HEAD in loaded.missing or resolve_source(source).kind == "architecture":
            nn.init.normal_(model.head.weight, std=(model.head.in_features + 1) ** -0.5)
            model._store_normalisation(0.0, 1.0)
        return model

    @classmethod
    def from_pretrained(cls, source: str, *, dtype: str = "float32", merge: bool = True) -> "RewardModel":
        """A trained reward model from a run, path or hub id; :class:`UserError` if it has no score head.

        An adapter becomes part of the weights, or with ``merge`` false stays beside them, frozen as they are.
        """
        loaded = _load_classifier(source, None, dtype, merge=merge)
        if HEAD in loaded.missing:
            raise _is_language_model(source)
        if loaded.missing:
            raise _incomplete(source, loaded)
        return cls(loaded.network)

    @staticmethod
    def count(source: str) -> Parameters:
        """Parameters of a trained reward model; :class:`UserError` if its configuration is a language model's."""
        stored = resolve_source(source)
        if base_of_adapter(stored) is None and has_architecture(load_config(stored), "ForCausalLM", "LMHeadModel"):
            raise _is_language_model(source)
        return count_parameters(source, auto_class=AutoModelForSequenceClassification, dtype="auto")

    @property
    def head(self) -> nn.Linear:
        """The linear map from the width to the score, in float32."""
        return _score_head(self.network)

    @property
    def config(self) -> PretrainedConfig:
        """The network's configuration."""
        return self.network.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scores ``[R]`` of sequences ``[R, T]`` padded on either side."""
        inputs = attention_inputs(self.config, attention_mask)
        states = self.network.base_model(input_ids=input_ids, **inputs).last_hidden_state
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(attention_mask.bool(), index, 0).amax(1)
        return _apply_head(self.head, states[torch.arange(len(last), device=last.device), last])

    def answer_scores(self, rows: AnswerRows) -> Tensor:
        """The same ``[R]`` of answers that lie packed or behind a prompt they share, each of at least one token."""
        inputs = attention_inputs(
            self.config, rows.attention_mask, rows.position_ids, rows.document_ids, dtype=self.network.dtype
        )
        states = self.network.base_model(input_ids=rows.input_ids, **inputs).last_hidden_state
        last = rows.slots.gather(1, rows.mask.sum(1, keepdim=True) - 1)[:, 0]
        return _apply_head(self.head, states.flatten(0, 1)[last])

    def shift_and_scale(self, normalisation: Normalisation | None = None) -> tuple[float, float]:
        """What is subtracted from raw scores and what then divides them; the stored way unless another is named."""
        match normalisation or self.normalisation:
            case "none":
                return 0.0, 1.0
            case "mean":
                return self.reward_mean, 1.0
            case "full":
                return self.reward_mean, self.reward_std
            case "target":
                return -self.target_mean / self.target_std, 1 / self.target_std

    def normalise(self, scores: Tensor, normalisation: Normalisation | None = None) -> Tensor:
        """Raw scores after :meth:`shift_and_scale`."""
        shift, scale = self.shift_and_scale(normalisation)
        return (scores - shift) / scale

    def normalised_scores(
        self, input_ids: Tensor, attention_mask: Tensor, normalisation: Normalisation | None = None
    ) -> Tensor:
        """Normalised scores ``[R]``; with ``none`` and ``mean`` pair probabilities are those of the raw ones."""
        return self.normalise(self(input_ids, attention_mask), normalisation)

    def set_normalisation(self, scores: Tensor, normalisation: Normalisation = "mean") -> None:
        """Take mean and (biased) standard deviation of a reference set's raw scores, and store how to normalise."""
        self._store_normalisation(*moments_of(scores), normalisation)

    def set_target(self, mean: float, deviation: float) -> None:
        """Store what the scores were standardised by that a regression learns."""
        self.target_mean, self.target_std = mean, deviation
        self.config.target_mean, self.config.target_std = mean, deviation

    def _store_normalisation(self, mean: float, deviation: float, normalisation: Normalisation = "mean") -> None:
        self.reward_mean, self.reward_std, self.normalisation = mean, deviation, normalisation
        self.config.reward_mean, self.config.reward_std = mean, deviation
        self.config.reward_normalize = normalisation


class ValueModel(nn.Module):
    """A value per token on a trunk of its own: ``values[t] = head(h[t − 1]) − shift``, float32, token-aligned.

    Args:
        trunk: A decoder of transformers without output layer.
        head: Linear map from the width to 1, in float32.
        shift: Subtracted from every value: the reward model's mean, when scores are shifted by it too.
        scale: Divides every value: the reward model's deviation, when scores are divided by it too.
    """

    def __init__(self, trunk: PreTrainedModel, head: nn.Linear, *, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    @classmethod
    def from_reward(
        cls,
        source: str,
        *,
        dtype: str = "float32",
        normalisation: Normalisation | None = None,
        keep_head: bool = True,
        merge: bool = True,
    ) -> "ValueModel":
        """Trunk and head of a reward model, its normalisation included; a zero head unless ``keep_head``.

        ``merge`` is that of :meth:`RewardModel.from_pretrained`.
        """
        reward = RewardModel.from_pretrained(source, dtype=dtype, merge=merge)
        trunk = reward.network.base_model
        assert isinstance(trunk, PreTrainedModel)
        if not keep_head:
            return cls(trunk, _zero_head(reward.head.in_features))
        shift, scale = reward.shift_and_scale(normalisation)
        return cls(trunk, reward.head, shift=shift, scale=scale)

    @classmethod
    def from_policy(
        cls, source: str, *, tokenizer: PreTrainedTokenizerBase | None = None, dtype: str = "float32"
    ) -> "ValueModel":
        """Trunk of a language model under a zero head: every value starts at 0."""
        policy = load_causal_lm(source, tokenizer=tokenizer, dtype=dtype)
        return cls(policy.get_decoder(), _zero_head(policy.config.get_text_config().hidden_size))

    def _state_values(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        inputs = attention_inputs(self.trunk.config, attention_mask, position_ids, document_ids, dtype=self.trunk.dtype)
        states = self.trunk(input_ids=input_ids, **inputs).last_hidden_state
        return (_apply_head(self.head, states) - self.shift) / self.scale

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Values ``[B, T]`` of the states before each token; 0 on padding and on first tokens."""
        states = self._state_values(input_ids, attention_mask, position_ids, document_ids)
        return torch.where(predictable_tokens(attention_mask, document_ids), F.pad(states[:, :-1], (1, 0)), 0.0)

    def last_value(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Value ``[B]`` of the state after the last real token, to bootstrap truncated sequences."""
        states = self._state_values(input_ids, attention_mask, None, None)
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(attention_mask.bool(), index, 0).amax(1)
        return states.gather(1, last[:, None])[:, 0]


def _load_classifier(
    source: str, tokenizer: PreTrainedTokenizerBase | None, dtype: str, *, merge: bool = True
) -> Loaded:
    changes = {"num_labels": 1, "problem_type": "regression"}
    return load_network(
        AutoModelForSequenceClassification,
        source,
        tokenizer=tokenizer,
        dtype=dtype,
        config_changes=changes,
        merge=merge,
    )


def _is_language_model(source: str) -> UserError:
    return UserError(f"{source} has no score head: it is a language model, not a reward model")


def _incomplete(source: str, loaded: Loaded) -> UserError:
    missing = sorted(loaded.missing - {HEAD})
    return UserError(
        f"{source} does not hold the trunk of a {type(loaded.network).__name__}: {len(missing)} weights are missing, "
        f"first {missing[0]}"
    )


def _score_head(network: PreTrainedModel) -> nn.Linear:
    head = dict(network.named_children()).get("score")
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(f"{type(network).__name__} has no linear score head with one output")
    # the head computes in float32 whatever the trunk's dtype; a float64 one stays
    return head.to(torch.promote_types(head.weight.dtype, torch.float32))


def _zero_head(width: int) -> nn.Linear:
    head = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(head.weight)
    return head


def _apply_head(head: nn.Linear, states: Tensor) -> Tensor:
    """Head of states ``[…, H]`` to ``[…]`` in the head's dtype, autocast or not."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(head.weight.dtype))[..., 0]


def moments_of(scores: Tensor) -> tuple[float, float]:
    """Mean and biased standard deviation, as numbers to standardise by: scores that are all equal have deviation 1."""
    scores = scores.double()
    deviation = float(scores.std(correction=0))
    return float(scores.mean()), deviation if deviation > 0 else 1.0
