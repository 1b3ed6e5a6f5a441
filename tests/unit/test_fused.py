"""Layers with parts replaced: the same results, whatever differs is left alone, and nobody else notices."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from kvr_partition import Partition, UnsupportedError
from kvr_partition.runtime import decode, prefill, single, stock
from kvr_partition.runtime.fused import PARTS, chosen_layers, fused_model, ops
from kvr_partition.runtime.fused import layers as fused_layers
from tests import families
from tests.fused_models import ALL_PARTS, CONTEXT, prompt, read, trained
from tests.models import CORE


def forwards(model: Any) -> list[str]:
    """Modules whose ``forward`` somebody has put there."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama-mha", ALL_PARTS),
        ("llama-gqa", ALL_PARTS),
        ("mistral-full", ALL_PARTS),
        ("mistral-window", ALL_PARTS),
        ("qwen2", ALL_PARTS),
        ("qwen3", ALL_PARTS),
        ("falcon-mqa", "fused(rotary, activation, residual)"),
        ("falcon-new", "fused(activation, residual)"),
    ],
)
def test_these_parts_of_a_model_are_replaced(name: str, parts: str) -> None:
    assert fused_model(trained(name)).name == parts


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_are_those_of_transformers(name: str, batch: int) -> None:
    model, ids = trained(name), prompt(batch)
    right = stock(model, ids)
    out = prefill(model, ids, Partition((CONTEXT,)), layers="fused")
    assert out.logits is not None
    assert right.logits is not None
    torch.testing.assert_close(out.logits, right.logits, rtol=1e-4, atol=1e-5)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(decode(model, ids, out, 12), generated[:, CONTEXT:])


@pytest.mark.parametrize("name", ["llama-gqa", "falcon-mqa", "qwen3"])
def test_in_half_precision_the_error_is_that_of_the_model(name: str) -> None:
    exact, model = trained(name), trained(name).to(torch.bfloat16)
    right = stock(exact, prompt()).logits
    assert right is not None

    def distance(logits: torch.Tensor | None) -> float:
        assert logits is not None
        return float((logits.float() - right).norm() / right.norm())

    assert distance(read(model, layers="fused")) <= 1.1 * distance(stock(model, prompt()).logits)


# ------------------------------------------------------------------------------ what differs is left alone


class MeanOff(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class EpsilonOutside(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.float()
        root = rows.pow(2).mean(-1, keepdim=True).sqrt()
        return self.weight * (rows / (root + self.variance_epsilon)).to(hidden_states.dtype)


class OnePlusWeight(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.float()
        scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return ((1 + self.weight) * rows * scale).to(hidden_states.dtype)


class Clamped(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.clamp(-20, 20))


def with_norm(kind: type) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            for name in ("input_layernorm", "post_attention_layernorm"):
                norm = kind(64, eps=1e-5)
                norm.weight.data.copy_(getattr(layer, name).weight.data)
                setattr(layer, name, norm)

    return change


def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any) -> Any:
    def turn(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        even, odd = x[..., 0::2], x[..., 1::2]
        c, s = (one[..., :half].unsqueeze(1) for one in (cos, sin))
        return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)

    return turn(q), turn(k)


def keys_alone(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any) -> Any:
    return q, rotate(q, k, cos, sin)[1]


def backwards(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any) -> Any:
    return rotate(q, k, cos, -sin)


rotate = modeling_llama.apply_rotary_pos_emb


def scaled_residual(model: Any) -> None:
    class Layer(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, **given: Any) -> Any:  # type: ignore[override]
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
            hidden_states = hidden_states + 0.5 * attended
            return hidden_states + 0.5 * self.mlp(self.post_attention_layernorm(hidden_states))

    for layer in model.model.layers:
        layer.__class__ = Layer


def sandwich(model: Any) -> None:
    class Layer(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, **given: Any) -> Any:  # type: ignore[override]
            attended, _ = self.self_attn(hidden_states=hidden_states, **given)
            hidden_states = hidden_states + self.input_layernorm(attended)
            return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))

    for layer in model.model.layers:
        layer.__class__ = Layer


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x) + 0.01 * x


def odd_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = Odd()


def gate_for_up(model: Any) -> None:
    class MLP(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    for layer in model.model.layers:
        layer.mlp.__class__ = MLP


def colder(model: Any) -> None:
    class Attention(modeling_llama.LlamaAttention):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
            return super().forward(hidden_states * 0.9, *args, **given)

    for layer in model.model.layers:
        layer.self_attn.__class__ = Attention


def colder_far_away(model: Any) -> None:
    class Attention(modeling_llama.LlamaAttention):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
            far = (given["position_ids"] > 40)[..., None]
            return super().forward(torch.where(far, 0.9 * hidden_states, hidden_states), *args, **given)

    for layer in model.model.layers:
        layer.self_attn.__class__ = Attention


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (with_norm(MeanOff), "norm"),
        (with_norm(EpsilonOutside), "norm"),
        (with_norm(OnePlusWeight), "norm"),
        (with_norm(Clamped), "norm"),
        (interleaved, "rotary"),
        (keys_alone, "rotary"),
        (backwards, "rotary"),
        (colder, "rotary"),
        (colder_far_away, "rotary"),
        (odd_activation, "activation"),
        (gate_for_up, "activation"),
        (scaled_residual, "residual"),
        (sandwich, "residual"),
    ],
    ids=lambda one: one if isinstance(one, str) else getattr(one, "__name__", ""),
)
def test_a_part_that_differs_in_a_detail_is_recognised(
    change: Callable[..., Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("llama-gqa")
    if change in (interleaved, keys_alone, backwards):
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", change)
    else:
        change(model)
    model.eval()
    found = fused_model(model)
    assert found.parts[part] == 0  # type: ignore[index]
    assert any(line.startswith(f"{part} of layer 0") for line in found.left)
    right = stock(model, prompt()).logits
    torch.testing.assert_close(read(model, layers="fused"), right, rtol=1e-4, atol=1e-5)


def test_one_odd_layer_leaves_the_others_replaced() -> None:
    model = trained("llama-gqa")
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    found = fused_model(model)
    assert found.name == "fused(norm, rotary, activation 2/3, residual)"
    assert [line.partition(":")[0] for line in found.left] == ["activation of layer 1"]
    right = stock(model, prompt()).logits
    torch.testing.assert_close(read(model, layers="fused"), right, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- and nobody notices


def test_another_model_of_the_class_keeps_its_layers() -> None:
    """Kernels of libraries are patched into classes, so that whatever comes after has them."""
    fused, other = trained("llama-gqa"), trained("llama-gqa")
    right = read(other, layers="stock")
    kinds = {type(module): type(module).forward for module in other.modules()}
    during: list[tuple[int, list[str], bool]] = []

    def look(*_: Any) -> None:
        same = all(kind.forward is forward for kind, forward in kinds.items())
        during.append((len(forwards(fused)), forwards(other), same))

    read(fused, layers="fused")
    fused.model.embed_tokens.register_forward_hook(look)
    read(fused, layers="fused")
    assert during == [(4, [], True)]
    assert forwards(fused) == []
    torch.testing.assert_close(read(fused, layers="stock"), right, rtol=0, atol=0)


def test_it_is_undone_after_an_error_too() -> None:
    model = trained("llama-gqa")
    fails: list[bool] = []

    def fail(*_: Any) -> None:
        if fails:
            raise RuntimeError("in the middle")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    read(model, layers="fused")
    assert forwards(model) == []
    fails.append(True)
    with pytest.raises(RuntimeError, match="in the middle"):
        read(model, layers="fused")
    hook.remove()
    assert forwards(model) == []


def test_what_comes_later_to_a_layer_or_the_last_norm_is_not_passed_over() -> None:
    for change in ("layer", "norm", "hook"):
        model = trained("llama-gqa")
        read(model, layers="fused")
        part = model.model.norm if change == "norm" else model.model.layers[0]
        if change == "hook":
            part.register_forward_hook(lambda module, args, output: args[0])
        else:
            before = part.forward
            part.forward = lambda *args, before=before, **given: before(*args, **given) * 0.5
        torch.testing.assert_close(read(model, layers="fused"), read(model, layers="stock"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("depth", ["auto", "cache"])
def test_eager_attention_runs_behind_fused_layers(depth: Any) -> None:
    from kvr_partition.runtime import prefill

    model = trained("llama-gqa")
    model.set_attn_implementation("eager")
    ids = torch.randint(0, model.config.vocab_size, (1, 24))
    fused, stock = (
        prefill(model, ids, Partition((24,)), depth=depth, layers=layers).logits for layers in ("fused", "stock")
    )
    torch.testing.assert_close(fused, stock, rtol=0, atol=2e-5)


def test_hooks_of_a_users_own_go_on_working() -> None:
    model = trained("llama-gqa")
    calls: list[str] = []
    mlp, norm = model.model.layers[0].mlp, model.model.layers[0].input_layernorm
    mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    norm.register_forward_hook(lambda *_: calls.append("norm"))
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append("q"))
    read(model, layers="fused")
    calls.clear()
    read(model, layers="fused")
    assert sorted(calls) == ["mlp", "norm", "q"]


def test_a_projection_that_is_more_than_a_product_is_called() -> None:
    class Adapted(nn.Linear):
        extra = 0.0

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + self.extra

    model = trained("llama-gqa")
    read(model, layers="fused")
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Adapted
        layer.self_attn.q_proj.__class__ = Adapted
    # Known again: what was found before was found of another model.
    model = copy.deepcopy(model)
    read(model, layers="fused")
    for layer in model.model.layers:
        layer.mlp.down_proj.extra = layer.self_attn.q_proj.extra = 0.2
    right = stock(model, prompt()).logits
    torch.testing.assert_close(read(model, layers="fused"), right, rtol=1e-4, atol=1e-5)


def test_what_a_layer_is_given_is_not_written_to() -> None:
    model = trained("llama-gqa")
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.model.embed_tokens.register_forward_hook(lambda _, __, made: kept.append((made, made.clone())))
    read(model, layers="fused")
    assert all(torch.equal(made, copied) for made, copied in kept)


def test_rows_go_through_an_mlp_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("llama-gqa")
    whole = read(model, layers="fused")
    monkeypatch.setattr(fused_layers, "MLP_ROWS", 16)
    monkeypatch.setattr(fused_layers, "_ROUNDING", 4)
    assert fused_layers.slices(CONTEXT) == [(0, 16), (16, 32), (32, 47)]
    rows: list[int] = []
    product = ops.product
    monkeypatch.setattr(
        ops, "product", lambda of, *rest, **named: (rows.append(of.shape[0]), product(of, *rest, **named))[1]
    )
    torch.testing.assert_close(read(model, layers="fused"), whole, rtol=1e-5, atol=1e-6)
    assert {16, 15} <= set(rows)


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("kvr_partition.runtime.fused.probing._decoder_layers", lambda _: [])
    return trained("llama-gqa")


def test_layers_that_cannot_be_replaced_are_refused_by_name(nothing_known: Any) -> None:
    assert chosen_layers(nothing_known, "stock").name == "stock"
    with pytest.raises(UnsupportedError, match="no part of LlamaForCausalLM can be replaced: everything: "):
        read(nothing_known, layers="fused")
    with pytest.raises(UnsupportedError, match="layers must be auto, fused or stock; got 'quick'"):
        read(trained("llama-gqa"), layers="quick")


def test_on_the_cpu_auto_means_the_models_own() -> None:
    assert chosen_layers(trained("llama-gqa"), "auto").name == "stock"


def test_one_rank_alone_takes_a_past_cache() -> None:
    model, ids = trained("llama-gqa"), prompt()
    past = stock(model, ids[:, :20]).cache
    out = single(model, ids[:, 20:], past=past, layers="fused")
    right = stock(model, ids)
    assert out.first_token is not None
    assert right.first_token is not None
    assert torch.equal(out.first_token, right.first_token)
    assert out.cache.get_seq_length() == CONTEXT


def test_rotation_is_what_transformers_does() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn((5, heads, 16), generator=generator) for heads in (4, 2))
    angle = torch.randn((5, 8), generator=generator).repeat(1, 2)
    right = rotate(query.transpose(0, 1)[None], key.transpose(0, 1)[None], angle.cos()[None], angle.sin()[None])
    to = torch.full((5, 3, 16), 7.0)
    ops.rotate_(query, key, to[:, :2], angle.cos(), angle.sin())
    torch.testing.assert_close(query, right[0][0].transpose(0, 1))
    torch.testing.assert_close(to[:, :2], right[1][0].transpose(0, 1))
    assert bool((to[:, 2] == 7).all())


def test_every_part_has_a_name() -> None:
    assert set(fused_model(trained("llama-gqa")).parts) == set(PARTS)


def test_layers_that_say_the_same_share_a_line() -> None:
    model = trained("llama-gqa")
    for index in (0, 2):
        model.model.layers[index].mlp.act_fn = nn.Tanh()
    (line,) = fused_model(model).left_in_short
    assert line == "activation of layers 0, 2: its activation is not known here"
    (line,) = fused_model(trained("falcon-mqa")).left_in_short
    assert line.startswith("norm: ")


class Adapter(nn.Module):
    """What adapter libraries put in the place of a projection."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.1 * x.sum(-1, keepdim=True)


def test_an_adapter_that_comes_later_is_not_passed_over() -> None:
    model = trained("llama-gqa")
    before = read(model, layers="fused")
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    right = stock(model, prompt()).logits
    assert right is not None
    assert not torch.allclose(before, right, atol=1e-4)
    torch.testing.assert_close(read(model, layers="fused"), right, rtol=1e-4, atol=1e-5)
    assert [line for line in fused_model(model).left if "layer 1" in line] == [
        "rotary of layer 1: a projection is a Adapter"
    ]


def test_hooks_that_come_later_are_called() -> None:
    model = trained("llama-gqa")
    read(model, layers="fused")
    calls: list[int] = []
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: calls.append(1))
    read(model, layers="fused")
    calls.clear()
    read(model, layers="fused")
    assert calls == [1]
    hook.remove()
    assert fused_model(model).name == ALL_PARTS


def test_a_model_that_cannot_be_tried_keeps_its_layers() -> None:
    model = trained("llama-gqa")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    hook = model.model.layers[1].register_forward_pre_hook(full)
    assert fused_model(model).left == ["everything: there was no room to try it"]
    hook.remove()
    # Another time there was.
    assert fused_model(model).name == ALL_PARTS


def test_every_family_is_as_exact_with_fused_layers() -> None:
    """All causal families of the installed transformers that are not refused; behind a past, and in a batch."""
    ids = torch.randint(
        families.FIRST_TOKEN, families.VOCABULARY, (1, 41), generator=torch.Generator().manual_seed(1)
    )
    seen: dict[str, str] = {}
    for name in families.names():
        try:
            model = families.build(name)
            right = prefill(model, ids, Partition((41,)), layers="stock").logits
        except Exception:  # refused, or nothing that transformers can build small
            continue
        known = fused_model(model)
        seen[name] = known.name
        if seen[name] == "stock":
            continue
        assert right is not None
        for past, batch in ((0, 1), (0, 2), (17, 1), (17, 2)):
            tokens = ids.expand(batch, -1)
            before = stock(model, tokens[:, :past]).cache if past else None
            split = Partition((41 - past,), past)
            logits = prefill(
                model, tokens if past else tokens[:, past:], split, past=before, layers="fused"
            ).logits
            assert logits is not None
            error = float((logits - right).abs().max() / right.abs().max())
            assert error < 2e-5, (name, seen[name], past, batch, error)
        # Nothing that a model does by itself makes it be tried anew at every prompt.
        assert fused_model(model) is known, name
    assert sum(parts != "stock" for parts in seen.values()) > 80


def test_a_model_and_its_caches_can_be_given_up() -> None:
    model = trained("llama-gqa")
    out = prefill(model, prompt(), Partition((CONTEXT,)), layers="fused")
    gone = [weakref.ref(model), weakref.ref(out.cache)]
    del out
    gc.collect()
    assert gone[1]() is None
    del model
    gc.collect()
    assert gone[0]() is None
