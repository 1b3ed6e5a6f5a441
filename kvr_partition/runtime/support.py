"""Which models a prefill can be split for, how deep the runtime can reach, and what is refused by name."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvr_partition.errors import PartitionError, RankError, UnsupportedError
from kvr_partition.runtime import attention
from kvr_partition.runtime.cache import DummyLayer, LayerKV

Depth = Literal["auto", "attention", "cache"]

# What a model may pass to its attention without changing what a plain causal softmax computes. Anything
# else that is not None (a soft cap, sinks, a position bias, head masks) needs the model's own attention.
_HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "is_training",
        "output_attentions",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "scaling",
        "sliding_window",
        "training",
        "use_cache",
    }
)


_PROBED = 2
"""Tokens that a probe reads at once."""


@dataclass(frozen=True)
class ModelSupport:
    """What a short probe of a model showed.

    Attributes:
        layers: what each layer keeps of a token, None for layers without KV of their own.
        route: how own block and prefix can be attended separately: ``"interface"`` (transformers'
            attention interface), ``"calls"`` (the model calls SDPA itself), or None when they cannot.
        reason: why not, when not.
        unmasked_window: tokens that a window of the cache keeps and no mask knows of, so that a longer prompt
            read in pieces would miss what it sees whole; None where there is no such window.
    """

    layers: tuple[LayerKV | None, ...]
    route: Literal["interface", "calls"] | None
    reason: str = ""
    unmasked_window: int | None = None

    @property
    def attention_depth(self) -> bool:
        """Whether own block and prefix can be attended separately."""
        return self.route is not None

    @property
    def kv_layers(self) -> int:
        """Layers that keep KV."""
        return sum(layer is not None for layer in self.layers)

    @property
    def last_kv_layer(self) -> int:
        """Index of the last layer that keeps KV."""
        return max(index for index, layer in enumerate(self.layers) if layer is not None)

    def entry_elements(self, batch: int = 1) -> int:
        """Elements of KV that one token keeps over all layers."""
        return sum(layer.entry(batch) for layer in self.layers if layer is not None)

    def check_tokens(self, tokens: int) -> None:
        """Refuse prompts of which the model's cache would drop what its attention still sees.

        Raises:
            UnsupportedError: more tokens than that.
        """
        if self.unmasked_window is not None and tokens > self.unmasked_window:
            raise UnsupportedError(
                f"the cache of this model keeps the last {self.unmasked_window} tokens, its attention sees all; "
                f"it is exact in pieces up to that many tokens, and these are {tokens}"
            )

    def choose(self, depth: Depth) -> Literal["attention", "cache"]:
        """The depth to run at.

        Raises:
            UnsupportedError: attention depth was asked for and the model does not allow it.
        """
        if depth not in ("auto", "attention", "cache"):
            raise UnsupportedError(f"depth must be auto, attention or cache; got {depth!r}")
        if depth == "cache" or (depth == "auto" and not self.attention_depth):
            return "cache"
        if not self.attention_depth:
            raise UnsupportedError(f"attention depth is not possible: {self.reason}; use depth='cache'")
        return "attention"


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


def check_tokens(input_ids: Sequence[int], vocabulary: int) -> None:
    """Refuse token ids that a model has no embedding for.

    Raises:
        PartitionError: the first one that is not in the vocabulary.
    """
    wrong = next((token for token in input_ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise PartitionError(f"token id {wrong} is not in the model's vocabulary of {vocabulary}")


def vocabulary(model: Any) -> int:
    """Token ids that a model has an embedding for; more than its tokens where the table was padded."""
    rows = getattr(getattr(model.get_input_embeddings(), "weight", None), "shape", None)
    return int(rows[0] if rows else text_config(model).vocab_size)


def check_config(config: Any) -> None:
    """Refuse by name what cannot be exact, from the configuration alone.

    Raises:
        UnsupportedError: not a causal decoder, or layers that keep something else than KV.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{config.model_type} is an encoder-decoder; KV-Runahead splits causal decoders")
    text = text_config(config)
    # What is said of vision concerns the tokens of images, and there are none.
    both_ways = getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision")
    if getattr(text, "is_causal", True) is False or both_ways:
        raise UnsupportedError(f"{text.model_type} attends in both directions; KV-Runahead needs causal attention")
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise UnsupportedError(
                f"layer {index} of {text.model_type} keeps a {type(layer).__name__}, not keys and values alone; "
                "such state cannot be received chunk by chunk"
            )


def probe(model: Any) -> ModelSupport:
    """Run two tokens through a model and see where its KV goes. Works on the meta device too.

    The answer is remembered for as long as the model lives.

    Raises:
        UnsupportedError: the model cannot be split exactly, with the layer or part at fault.
    """
    known = _probed.get(model)
    if known is None:
        known = _probed[model] = _probe(model)
    return known


_probed: weakref.WeakKeyDictionary[Any, ModelSupport] = weakref.WeakKeyDictionary()


class _ProbeCache(DynamicCache):
    """Notes what each layer stores."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.events: list[str] = []
        self.seen: dict[int, LayerKV] = {}
        self.returned: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[-2] != _PROBED:
            raise UnsupportedError(
                f"layer {layer_idx} stores KV of {key_states.shape[-2]} tokens where {_PROBED} were read; "
                "KV-Runahead needs one for each token"
            )
        if layer_idx in self.seen:
            raise UnsupportedError(f"layer {layer_idx} stores its KV twice in one pass")
        layer = self.layers[layer_idx]
        self.seen[layer_idx] = LayerKV(
            key_states.shape[1],
            key_states.shape[3],
            value_states.shape[1],
            value_states.shape[3],
            getattr(layer, "sliding_window", None),
        )
        self.events.append("update")
        self.returned = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.returned


def _probe(model: Any) -> ModelSupport:
    check_config(model.config)
    if getattr(type(model), "generate", GenerationMixin.generate) is not GenerationMixin.generate:
        raise UnsupportedError(
            f"{type(model).__name__} has a generate of its own, which reads prompts otherwise than they are given"
        )
    cache = _ProbeCache(model.config)
    with attention.noted_windows(model) as masked:
        _forward_two_tokens(model, cache)
    if cache.seen:
        _check_continues(model, cache)
    if not cache.seen:
        raise UnsupportedError(
            f"{type(model).__name__} stored nothing in its transformers cache; KV-Runahead needs models that do"
        )
    missing = [
        index
        for index, layer in enumerate(cache.layers)
        if type(layer) is not DummyLayer and index not in cache.seen
    ]
    if missing:
        raise UnsupportedError(f"layer {missing[0]} of {type(model).__name__} has a cache but stores no KV in it")
    layers = tuple(cache.seen.get(index) for index in range(len(cache.layers)))
    route: Literal["interface", "calls"] = "interface" if _uses_interface(model) else "calls"
    reason = _why_no_attention_depth(model, layers, route)
    unmasked = [layer.window for layer in layers if layer is not None and layer.window not in (None, *masked)]
    # A model that was never asked for a mask makes its own, and what those do cannot be seen.
    window = min((one for one in unmasked if one is not None), default=None) if masked.asked else None
    return ModelSupport(layers, None if reason else route, reason, window)


def _check_continues(model: Any, cache: _ProbeCache) -> None:
    """Read two more tokens behind those that a probe has cached, as every rank but the first one does.

    Raises:
        UnsupportedError: the model cannot.
    """
    cache.seen = {}
    try:
        _forward_two_tokens(model, cache)
    except UnsupportedError:
        raise
    except Exception as error:  # whatever fails here fails on the second rank
        raise UnsupportedError(
            f"{type(model).__name__} cannot read several tokens behind cached ones ({type(error).__name__})"
        ) from error


def _uses_interface(model: Any) -> bool:
    return bool(getattr(model, "_can_set_attn_implementation", lambda: False)())


def _why_no_attention_depth(
    model: Any, layers: tuple[LayerKV | None, ...], route: Literal["interface", "calls"]
) -> str:
    name = type(model).__name__
    cache = _ProbeCache(model.config)
    windows = [layer.window for layer in layers if layer is not None]
    complaints: list[str] = []
    no_mask = attention.no_mask(model.device)
    eager = model.config._attn_implementation == "eager"

    def hook(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        at = cache.events.count("attend")
        cache.events.append("attend")
        strange = sorted(
            word
            for word, given in kwargs.items()
            if word not in _HARMLESS and given is not None and given is not False
        )
        if strange:
            complaints.append(f"{name} passes {', '.join(strange)} to its attention")
        if cache.returned is None or key is not cache.returned[0] or value is not cache.returned[1]:
            # Latent attention keeps something smaller and expands it after the cache.
            complaints.append(f"{name} attends to something else than the keys and values it stores")
        if attention_mask is not (no_mask if route == "calls" else None):
            complaints.append(f"{name} makes attention masks of its own")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            if not eager:
                raise UnsupportedError(f"{name} attends in both directions; KV-Runahead needs causal attention")
            # Eager attention does as its mask says, and the flag says nothing.
            complaints.append(f"{name} leaves what is causal to its masks")
        if at < len(windows) and (windows[at] if route == "interface" else None) != kwargs.get("sliding_window"):
            # A chunked-attention layer looks like a window to the cache but masks differently.
            complaints.append(f"{name} masks layer {at} otherwise than by its cached window")
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    try:
        with replaced_attention(model, route, hook) as extra:
            _forward_two_tokens(model, cache, **extra)
    except UnsupportedError:
        raise
    except Exception as error:  # any failure only means that this model keeps its own attention
        return f"{name} does not run with its attention replaced ({type(error).__name__})"
    if complaints:
        return complaints[0]
    if route == "calls" and "attend" not in cache.events:
        return f"{name} uses neither transformers' attention interface nor SDPA"
    if cache.events != ["update", "attend"] * len(windows):
        return f"{name} does not attend once right after storing the KV of each layer"
    return ""


_running: set[int] = set()
"""Ids of modules that a prefill runs with; they live as long as it does."""

_running_known = threading.Lock()


@contextmanager
def exclusively(model: Any) -> Iterator[None]:
    """A model whose attention and layers nobody else replaces meanwhile: they are a model's, not a thread's.

    Raises:
        RankError: another thread prefills with the same model, or with one that has layers of it.
    """
    ids = _with_children(model)
    with _running_known:
        free = _running.isdisjoint(ids)
        if free:
            _running.update(ids)
    if not free:
        raise RankError(
            "another thread prefills with the same model, or one that shares its layers; one prefill at a time, "
            "or a model for each thread",
            kind="busy",
            phase="agreement",
        )
    try:
        yield
    finally:
        with _running_known:
            _running.difference_update(ids)


def _with_children(model: Any) -> set[int]:
    """Ids of a model, its body, its list of layers and the layers: of what has children, down to there."""
    found, level = {id(model)}, [model]
    for _ in range(3):
        level = [child for module in level for child in module._modules.values() if child and child._modules]
        found.update(map(id, level))
    return found


class runahead_attention:  # noqa: N801 - reads as a statement: with runahead_attention(model): ...
    """Use our attention in a model; nested uses cost nothing, and the last one out puts the old one back.

    Transformers looks at every module of a model for that, which takes milliseconds. What it changed the first
    time is changed directly from then on.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> None:
        attention.register()
        self._before = self._model.config._attn_implementation
        if self._before == attention.IMPLEMENTATION:
            return
        known = _attention_changes.get(self._model)
        if known is None or any(config._attn_implementation != before for config, before, _ in known):
            configs = {id(one.config): one.config for one in self._model.modules() if _configured(one)}
            were = {key: config._attn_implementation for key, config in configs.items()}
            self._model.set_attn_implementation(attention.IMPLEMENTATION)
            _attention_changes[self._model] = [
                (config, were[key], config._attn_implementation) for key, config in configs.items()
            ]
            return
        for config, _, ours in known:
            config._attn_implementation_internal = ours

    def __exit__(self, *_: object) -> None:
        if self._before != attention.IMPLEMENTATION:
            for config, stock, _ours in _attention_changes[self._model]:
                config._attn_implementation_internal = stock


_attention_changes: weakref.WeakKeyDictionary[Any, list[tuple[Any, str, str]]] = weakref.WeakKeyDictionary()
"""Configurations inside a model, and how they attend without and with our attention."""


def _configured(module: Any) -> bool:
    return isinstance(getattr(module, "config", None), PreTrainedConfig)


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """A model with its own attention, without what would make the host wait inside its layers."""
    with attention.sdpa_calls(None) if not _uses_interface(model) else nullcontext():
        yield


@contextmanager
def replaced_attention(
    model: Any, route: Literal["interface", "calls"] | None, hook: attention.Hook
) -> Iterator[dict[str, Any]]:
    """Send a model's attention to ``hook`` by a route of `ModelSupport`; by None it keeps its own.

    Yields:
        What `forward` must be given besides.
    """
    if route == "interface":
        with runahead_attention(model), attention.active(hook):
            yield {}
    elif route == "calls":
        with attention.sdpa_calls(hook):
            yield {"attention_mask": attention.no_mask(model.device)}
    else:
        yield {}


def forward(model: Any, input_ids: torch.Tensor, cache: Cache, **extra: Any) -> Any:
    """One pass of the model over ``input_ids`` into ``cache``, without logits that nobody asked for."""
    kind: Any = type(model)
    accepted = _accepted(kind)
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1
    if "position_ids" in accepted and "position_ids" not in extra:
        # As generate counts; some models (RoBERTa's kin) count otherwise when they are left alone.
        before = int(cache.get_seq_length())
        extra["position_ids"] = torch.arange(before, before + input_ids.shape[1], device=input_ids.device)[None]
    return model(input_ids=input_ids, past_key_values=cache, use_cache=True, **extra)


@functools.cache
def _accepted(kind: Any) -> frozenset[str]:
    """Names of what a class's ``forward`` takes."""
    return frozenset(inspect.signature(kind.forward).parameters)


def first_token(
    output: Any, choose: Callable[[torch.Tensor], torch.Tensor] | None = None, to_host: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last position's logits ``[batch, vocabulary]``, first token ``[batch, 1]``, largest logits ``[batch]``.

    The copy to the host is what ends a prefill: until it is there, nobody has a first token.

    Args:
        choose: takes the token from the logits; the largest one when None.
        to_host: whether token and largest logits are copied to the host.
    """
    logits: torch.Tensor = output.logits[:, -1]
    top, largest = logits.max(-1)
    token = largest[:, None] if choose is None else choose(logits)
    return logits, token.cpu() if to_host else token, top.cpu() if to_host else top


def check_model(model: Any) -> None:
    """Refuse a model that would read a prompt otherwise than it generates.

    Raises:
        UnsupportedError: it is in training mode.
    """
    if model.training:
        raise UnsupportedError(
            f"{type(model).__name__} is in training mode, where dropout makes tokens random; call model.eval()"
        )


@torch.no_grad()
def _forward_two_tokens(model: Any, cache: Cache, **extra: Any) -> None:
    device = next(model.parameters()).device
    forward(model, torch.zeros((1, _PROBED), dtype=torch.long, device=device), cache, **extra)


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
