"""Which models a prefill can be split for, how deep the runtime can reach, and what is refused by name."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvr_partition.errors import PartitionError, UnsupportedError
from kvr_partition.runtime import attention
from kvr_partition.runtime.cache import DummyLayer
from kvr_partition.runtime.positions import text_config
from kvr_partition.runtime.replacing import replaced_attention, uses_interface
from kvr_partition.runtime.rows import LayerKV

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
    route: Literal["interface", "calls"] = "interface" if uses_interface(model) else "calls"
    reason = _why_no_attention_depth(model, layers, route)
    unmasked = [layer.window for layer in layers if layer is not None and layer.window not in (None, *masked)]
    # A model that was never asked for a mask makes its own, and what those do cannot be seen.
    window = min((length for length in unmasked if length is not None), default=None) if masked.asked else None
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
    output: Any,
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
    to_host: bool = True,
    settled: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last position's logits ``[batch, vocabulary]``, first token ``[batch, 1]``, largest logits ``[batch]``.

    The copy to the host is what ends a prefill: until it is there, nobody has a first token.

    Args:
        choose: takes the token from the logits; the largest one when None.
        to_host: whether token and largest logits are copied to the host.
        settled: returns once the device has come to what is enqueued, or raises; called before the host waits for
            the device in any other way.
    """
    logits: torch.Tensor = output.logits[:, -1]
    # CUDA loads a kernel when it is first launched, and may wait for the whole device to do so: behind KV that
    # never comes, not even the watchdog could end that. Rules may look at what is on the device.
    kernels = (logits.device, logits.dtype, logits.shape)
    ahead = choose is None and kernels in _LOADED
    if to_host and not ahead:
        settled()
    top = logits.max(-1).values
    token = logits.argmax(-1, keepdim=True) if choose is None else choose(logits)
    if not to_host:
        return logits, token, top
    # Enqueued while the device is busy, as numbers that hold both; then there is one copy to wait for.
    both = torch.stack((token[:, 0].double(), top.double()))
    if ahead:
        settled()
    found = both.cpu()
    if choose is None:
        _LOADED.add(kernels)
    return logits, found[0].long()[:, None], found[1].to(top.dtype)


_LOADED: set[tuple[torch.device, torch.dtype, torch.Size]] = set()
"""Logits for which this process has launched the kernels that choose a first token."""


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
