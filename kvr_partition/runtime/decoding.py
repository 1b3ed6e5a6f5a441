"""The first token and those after it: what ``generate`` would give, whatever a checkpoint's settings say.

Settings that change greedy decoding hold for the first token as for all others. Those that cannot be followed are
refused by name, before a prompt is read.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as rules
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from kvr_partition.errors import NotFiniteError, PartitionError, UnsupportedError
from kvr_partition.runtime.kernels import kernels_without_plans
from kvr_partition.runtime.positions import check_context

if TYPE_CHECKING:
    from kvr_partition.runtime.result import PrefillResult

# Settings that make something else than greedy decoding of one sequence per prompt, and what leaves it greedy.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
    "stop_strings": (),
}
# These look at the prompt's own token ids, so that ids which nobody has cannot be made up.
_READS_PROMPT = {
    "repetition_penalty": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
}


def check_generation(config: Any) -> None:
    """Refuse generation settings that greedy decoding cannot follow.

    Args:
        config: a ``GenerationConfig``; None has no settings.

    Raises:
        UnsupportedError: the setting, by name.
    """
    for name, harmless in _REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value not in harmless:
            raise UnsupportedError(
                f"the generation settings say {name}={value!r}, and decoding is greedy, one sequence a "
                f"prompt; take {name} out of generation_config.json, or set it to None in model.generation_config"
            )


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding after one prompt, under a model's settings.

    Attributes:
        ids: token ids before the first new one, ``[batch, past and context]``.
        processors: what the settings do to logits.
    """

    ids: torch.Tensor
    processors: rules.LogitsProcessorList

    @classmethod
    def under(
        cls,
        config: Any,
        input_ids: torch.Tensor,
        *,
        past: int = 0,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
    ) -> Greedy:
        """Decoding under a ``GenerationConfig``.

        Args:
            input_ids: the prompt ``[batch, context]``, or ``[batch, past + context]``.
            past: tokens before the prompt.
            attention_mask: ``[batch, past + context]``, 0 for padding.
            max_new_tokens: tokens that will be decoded, where that is known.

        Raises:
            UnsupportedError: settings that cannot be followed, or that need the ids of past tokens.
            PartitionError: ids of another length.
        """
        check_generation(config)
        ids = input_ids
        total = input_ids.shape[1] if not past else _whole_length(input_ids, past, attention_mask)
        if ids.shape[1] < total:
            for name, harmless in _READS_PROMPT.items():
                if getattr(config, name, None) not in harmless:
                    raise UnsupportedError(
                        f"the generation setting {name} looks at all token ids of the prompt, and {past} "
                        f"of them are known from the cache only; give input_ids of all {total} tokens"
                    )
            # Nothing reads them; they keep the count.
            ids = torch.cat([ids.new_zeros((ids.shape[0], total - ids.shape[1])), ids], dim=1)
        return cls(ids, _processors(config, ids, attention_mask, max_new_tokens))

    @property
    def choose(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """`first`, where settings change what is the largest logit; else None."""
        return self.first if self.processors else None

    def first(self, logits: torch.Tensor) -> torch.Tensor:
        """The first token ``[batch, 1]`` from the logits ``[batch, vocabulary]`` of the last position."""
        scores = logits
        if self.processors:
            # As generate has them: in single precision, and free to be written to.
            ids: Any = self.ids
            scores = self.processors(ids, logits.to(torch.float32, copy=True))
        return scores.argmax(-1, keepdim=True)


def _whole_length(input_ids: torch.Tensor, past: int, attention_mask: torch.Tensor | None) -> int:
    return past + input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]


def _processors(
    config: Any, ids: torch.Tensor, attention_mask: torch.Tensor | None, max_new_tokens: int | None
) -> rules.LogitsProcessorList:
    """What generate would do to the logits of every new token, in its order."""

    def said(name: str, *harmless: Any) -> Any:
        value = getattr(config, name, None)
        return None if value in (None, *harmless) else value

    length, device = ids.shape[1], ids.device
    ends = _ends(config)

    def eos() -> Any:
        # A copy to the device, which most settings do not need.
        return torch.tensor(ends, device=device) if ends else None

    # The classes take a device as a word; one that is not the default loses its number there.
    on: Any = device
    prompt: Any = ids
    found = rules.LogitsProcessorList()
    if (bias := said("sequence_bias")) is not None:
        found.append(rules.SequenceBiasLogitsProcessor(bias))
    # What is said of an encoder's tokens means those of the prompt where there is no encoder.
    if (penalty := said("encoder_repetition_penalty", 1.0)) is not None:
        found.append(rules.EncoderRepetitionPenaltyLogitsProcessor(penalty, encoder_input_ids=prompt))
    if (penalty := said("repetition_penalty", 1.0)) is not None:
        found.append(_repetition(penalty, attention_mask))
    if (size := said("no_repeat_ngram_size", 0)) is not None:
        found.append(rules.NoRepeatNGramLogitsProcessor(size))
    if (size := said("encoder_no_repeat_ngram_size", 0)) is not None:
        found.append(rules.EncoderNoRepeatNGramLogitsProcessor(size, encoder_input_ids=prompt))
    if (words := said("bad_words_ids")) is not None:
        found.append(rules.NoBadWordsLogitsProcessor(words, eos()))
    if ends and (least := said("min_length", 0)) is not None:
        found.append(rules.MinLengthLogitsProcessor(least, eos(), device=on))
    if ends and (least := said("min_new_tokens", 0)) is not None:
        found.append(rules.MinNewTokensLengthLogitsProcessor(length, least, eos(), device=on))
    if (token := said("forced_bos_token_id")) is not None:
        found.append(rules.ForcedBOSTokenLogitsProcessor(token))
    if max_new_tokens is not None and (token := said("forced_eos_token_id")) is not None:
        found.append(rules.ForcedEOSTokenLogitsProcessor(length + max_new_tokens, token, device=on))
    if said("remove_invalid_values", False) is not None:
        found.append(rules.InfNanRemoveLogitsProcessor())
    if ends and (decay := said("exponential_decay_length_penalty")) is not None:
        found.append(rules.ExponentialDecayLengthPenalty(decay, eos(), length))
    if (tokens := said("suppress_tokens")) is not None:
        found.append(rules.SuppressTokensLogitsProcessor(tokens, device=on))
    if (tokens := said("begin_suppress_tokens")) is not None:
        begin = length + (length == 1 and said("forced_bos_token_id") is not None)
        found.append(rules.SuppressTokensAtBeginLogitsProcessor(tokens, begin, device=on))
    return found


def _repetition(penalty: float, attention_mask: torch.Tensor | None) -> Any:
    padding = None if attention_mask is None else (attention_mask == 0).sum(dim=1)
    if padding is None or not bool(padding.any()):
        return rules.RepetitionPenaltyLogitsProcessor(penalty)
    try:
        return rules.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=padding)
    except ValueError:
        # Older transformers count padding as said before, or leave out the same number of tokens of every prompt.
        raise UnsupportedError(
            "repetition_penalty with padded prompts needs a newer transformers; use prompts of one length"
        ) from None


def _ends(config: Any) -> list[int]:
    end = getattr(config, "eos_token_id", None)
    return [] if end is None else [int(token) for token in end] if isinstance(end, list | tuple) else [int(end)]


def _check_result(model: Any, input_ids: torch.Tensor, result: PrefillResult, max_new_tokens: int) -> torch.Tensor:
    """The logits of the first token.

    Raises:
        PartitionError: there are none, they are of another prompt, or were decoded from before.
    """
    if result.logits is None or result.first_token is None:
        raise PartitionError(f"rank {result.rank} has no first token; decode on the last rank")
    if max_new_tokens < 1:
        raise PartitionError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    held, read = int(result.cache.get_seq_length()), result.past + result.context
    if held != read:
        raise PartitionError(
            f"the cache of this result holds {held} tokens, not the {read} that were read: it was decoded from "
            "before; prefill again"
        )
    batch = result.logits.shape[0]
    if input_ids.dim() != 2 or input_ids.shape[0] != batch or input_ids.shape[1] not in (result.context, held):
        raise PartitionError(
            f"input_ids must be the prompt, [{batch}, {result.context}]"
            + (f", or with its past, [{batch}, {held}]" if result.past else "")
            + f"; got {list(input_ids.shape)}"
        )
    check_context(model.config, held + max_new_tokens - 1)  # nobody reads the last one
    return result.logits


def _greedy_settings(config: GenerationConfig, max_new_tokens: int, ends: list[int]) -> GenerationConfig:
    """Settings of a greedy ``generate`` that says nothing but where to end and what to fill up with."""
    pad = getattr(config, "pad_token_id", None)
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        disable_compile=True,
        max_new_tokens=max_new_tokens,
        max_time=getattr(config, "max_time", None),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if pad is None and ends else pad,
        bos_token_id=getattr(config, "bos_token_id", None),
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    )


def decode(
    model: Any, input_ids: torch.Tensor, result: PrefillResult, max_new_tokens: int, **generate: Any
) -> torch.Tensor:
    """Go on from the first token, on the last rank: the tokens that the model's own ``generate`` gives, greedily.

    Of ``model.generation_config`` holds what changes greedy decoding (end and padding tokens, tokens that are
    suppressed, forced or penalised, least lengths); sampling settings and cache kinds do not.

    Args:
        input_ids: the prompt as `prefill` had it, ``[batch, context]``; or with the past tokens in front.
        max_new_tokens: how many tokens in all, the first one included.
        generate: settings over those of ``model.generation_config``, and ``streamer``, ``logits_processor`` or
            ``stopping_criteria``, which see tokens from the second on.

    Returns:
        The new tokens, ``[batch, up to max_new_tokens]``. A prompt whose end came earlier is filled up with the
        padding token, or the end token where there is none.

    Raises:
        PartitionError: called on another rank than the last, another prompt's ids, a result that was decoded from
            before, or more tokens than the model has positions.
        UnsupportedError: settings that cannot be followed.
        NotFiniteError: logits that are NaN or infinite.
    """
    logits = _check_result(model, input_ids, result, max_new_tokens)
    config, passed = _settings(model, generate)
    held = int(result.cache.get_seq_length())
    greedy = Greedy.under(
        config,
        input_ids,
        past=held - input_ids.shape[1],
        attention_mask=result.attention_mask,
        max_new_tokens=max_new_tokens,
    )
    if greedy.ids.shape[1] != input_ids.shape[1] and {"logits_processor", "stopping_criteria"} & passed.keys():
        raise PartitionError(
            f"logits_processor and stopping_criteria look at token ids, and {result.past} of them are known from "
            f"the cache only; give input_ids of all {held} tokens"
        )
    first = greedy.first(logits).to(input_ids.device)
    ends = _ends(config)
    ended = (
        torch.isin(first[:, 0], first.new_tensor(ends))
        if ends
        else torch.zeros_like(first[:, 0], dtype=torch.bool)
    )
    if max_new_tokens == 1 or bool(ended.all()):
        return first
    tokens = torch.cat([greedy.ids, first], dim=1)
    mask = torch.ones_like(tokens)
    if result.attention_mask is not None:
        mask[:, :-1] = result.attention_mask
    ours = _greedy_settings(config, max_new_tokens - 1, ends)
    stopping = StoppingCriteriaList([_Ended(ended), *(passed.pop("stopping_criteria", None) or [])])
    change = rules.LogitsProcessorList(
        [_Finite(tokens.shape[1]), *greedy.processors, *(passed.pop("logits_processor", None) or [])]
    )
    # A copy that shares everything but its settings: another thread may be reading a prompt meanwhile.
    alone = copy.copy(model)
    with configured(alone, ours), kernels_without_plans():
        whole: torch.Tensor = alone.generate(
            tokens,
            attention_mask=mask,
            past_key_values=result.cache,
            generation_config=ours,
            logits_processor=change,
            stopping_criteria=stopping,
            **passed,
        )
    new = whole[:, greedy.ids.shape[1] :].clone()
    if bool(ended.any()):
        # What was decoded for a prompt that had ended, before generate took notice.
        new[ended, 1:] = ours.pad_token_id
    return new


def _settings(model: Any, generate: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The settings that hold, and what of ``generate`` is no setting."""
    known = getattr(model, "generation_config", None)
    config = copy.deepcopy(generate.pop("generation_config", None) or known or GenerationConfig())
    own = {
        "max_new_tokens",
        "max_length",
        "attention_mask",
        "past_key_values",
        "input_ids",
        "inputs",
    } & generate.keys()
    if own:
        raise UnsupportedError(f"{sorted(own)[0]} is decode's own affair; leave it out")
    if generate.get("do_sample"):
        raise UnsupportedError(
            "decode is greedy, and do_sample=True is not; take the first token from the result's logits and go on "
            "with model.generate, as the README shows"
        )
    check_generation(SimpleNamespace(**generate))
    try:
        passed: dict[str, Any] = config.update(**generate)
    except ValueError as error:  # transformers finds that settings do not go together
        raise UnsupportedError(f"transformers does not accept these generation settings: {error}") from None
    check_generation(config)
    unknown = sorted(
        passed.keys() - {"streamer", "logits_processor", "stopping_criteria", "tokenizer", "synced_gpus"}
    )
    if unknown:
        raise UnsupportedError(f"decode knows no {unknown[0]}; go on with model.generate, as the README shows")
    return config, passed


@contextlib.contextmanager
def configured(model: Any, config: GenerationConfig) -> Iterator[None]:
    """A model under these settings alone: generate fills in what its model's own say besides."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


class _Ended(StoppingCriteria):
    """Prompts that ended with their first token."""

    def __init__(self, ended: torch.Tensor) -> None:
        self._ended = ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self._ended.to(input_ids.device)


class _Finite(rules.LogitsProcessor):
    """Refuses logits that are NaN or infinite, which would be decoded as some token or other."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not top_is_finite(scores.max(-1).values):
            raise NotFiniteError(
                f"the logits of new token {input_ids.shape[1] - self._length + 2} are not finite; "
                "use another dtype, or look at the weights"
            )
        return scores


def top_is_finite(top: torch.Tensor) -> bool:
    """Whether largest logits are numbers. NaN anywhere makes the largest one NaN; minus infinity masks a token."""
    return bool(torch.isfinite(top).all())
