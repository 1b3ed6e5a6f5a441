"""How many positions a model has, and which prompts it can read in pieces."""

from __future__ import annotations

from typing import Any

from kvr_partition.errors import PartitionError, UnsupportedError


def text_config(model_or_config: Any) -> Any:
    """The configuration of the language model proper."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def check_context(config: Any, tokens: int) -> None:
    """Refuse prompts that this model cannot read, or not in pieces.

    Args:
        tokens: prompt and, where it matters, the tokens decoded after it.

    Raises:
        PartitionError: more tokens than the model has positions.
        UnsupportedError: RoPE frequencies that depend on the length of what is read at once.
    """
    config = text_config(config)
    kept = getattr(config, "keep_window_size", None)
    if isinstance(kept, int) and tokens > kept:
        # Of keys that score alike, which are kept depends on how many tokens are read at once.
        raise UnsupportedError(
            f"{config.model_type} attends to the {kept} best of all tokens (keep_window_size); in pieces it is "
            f"exact only as long as these are all; {tokens} are more"
        )
    field, limit = _positions(config)
    if limit is None:
        return
    ropes = _rope_parameters(config)
    for rope in ropes:
        kind = rope.get("rope_type", "default")
        # What the dynamic kind starts from is the limit, whatever else a configuration says.
        original = limit if kind == "dynamic" else rope.get("original_max_position_embeddings") or limit
        if kind in ("dynamic", "longrope") and tokens > original:
            raise UnsupportedError(
                f"RoPE of type {kind!r} changes with the length read at once, so chunks beyond {original} tokens "
                f"cannot be exact; use a context of at most {original}, or another RoPE type"
            )
    reach = farthest(config)
    if reach is not None and tokens > reach:
        scaled = "" if reach == limit else f" of {limit}, scaled by its RoPE"
        raise PartitionError(
            f"{tokens} tokens are beyond the {reach} positions of this {config.model_type} model "
            f"({field}{scaled}); use a shorter context"
        )


def farthest(config: Any) -> int | None:
    """How many positions a model has, as far as its RoPE stretches them; None where there is no end to them."""
    config = text_config(config)
    _, limit = _positions(config)
    if limit is None:
        return None
    return max([limit, *(_scaled_positions(rope, limit) for rope in _rope_parameters(config))])


_POSITIONS = (
    *("max_position_embeddings", "max_seq_len", "max_sequence_length"),
    *("n_positions", "n_ctx", "max_target_positions"),
)
"""What families call the number of their positions; the first one that a configuration has."""


def _positions(config: Any) -> tuple[str, int | None]:
    """The number of positions of a model and the field that tells it; None where there is no end to them.

    ALiBi has none, as of BLOOM and Falcon. MPT's is added from a table of its size, and so has one.
    """
    if getattr(config, "alibi", False) or config.model_type == "bloom":
        return "", None
    for field in _POSITIONS:
        limit = getattr(config, field, None)
        if isinstance(limit, int):
            return field, limit
    return "", None


def _scaled_positions(rope: dict[str, Any], limit: int) -> int:
    """Positions that RoPE stretched by a factor reaches, which checkpoints do not always write into the limit.

    These kinds fix their frequencies once, whatever is read: any chunk gets those of the whole prompt.
    """
    factor = rope.get("factor")
    if rope.get("rope_type") not in ("linear", "llama3", "proportional", "yarn") or not isinstance(
        factor, int | float
    ):
        return limit
    return int((rope.get("original_max_position_embeddings") or limit) * factor)


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope, dict):
        return []
    nested = [value for value in rope.values() if isinstance(value, dict) and "rope_type" in value]
    return nested or [rope]
