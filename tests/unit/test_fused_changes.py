"""Models that do more than they seem to, and models that somebody changes: fused layers pass nothing over."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama

from kvr_partition import Partition, RankError, UnsupportedError
from kvr_partition.runtime import prefill
from kvr_partition.runtime.fused import fused_model
from tests.fused_models import ALL_PARTS, CONTEXT, prompt, read, trained

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def assert_same(model: Any) -> None:
    """With fused layers a model makes the logits that it makes by itself."""
    torch.testing.assert_close(read(model, layers="fused"), read(model, layers="stock"), rtol=1e-4, atol=2e-5)


# ----------------------------------------------------------------------------- what comes after it was tried


def of_class(base: type, forward: Callable[..., Any]) -> type:
    return type("Changed", (base,), {"forward": forward})


def swapped_forward(kind: type, change: Callable[[Any], Any]) -> type:
    """A subclass that changes what it is given."""
    return of_class(kind, lambda self, x, *args, **given: kind.forward(self, change(x), *args, **given))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 0.7),
    "epsilon": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5),
    "another epsilon": lambda layer: setattr(layer.post_attention_layernorm, "variance_epsilon", 0.5),
    "activation": lambda layer: setattr(layer.mlp, "act_fn", nn.Tanh()),
    "class of a projection": lambda layer: setattr(
        layer.mlp.up_proj, "__class__", swapped_forward(nn.Linear, lambda x: 2 * x)
    ),
    "class of a norm": lambda layer: setattr(
        layer.input_layernorm, "__class__", swapped_forward(modeling_llama.LlamaRMSNorm, torch.abs)
    ),
    "class of a layer": lambda layer: setattr(
        layer, "__class__", swapped_forward(modeling_llama.LlamaDecoderLayer, lambda x: 2 * x)
    ),
    "hook on a projection": lambda layer: layer.self_attn.v_proj.register_forward_hook(lambda _, __, y: 2 * y),
    "hook on an activation": lambda layer: layer.mlp.act_fn.register_forward_hook(lambda _, __, y: 2 * y),
    "forward of a projection": lambda layer: setattr(
        layer.mlp.down_proj, "forward", lambda x: nn.functional.linear(2 * x, layer.mlp.down_proj.weight)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_later_is_not_passed_over(change: Callable[[Any], Any]) -> None:
    model = trained("llama-gqa")
    before = read(model, layers="fused")
    change(model.model.layers[1])
    assert not torch.allclose(before, read(model, layers="stock"), atol=1e-3)
    assert_same(model)


def test_the_last_norms_epsilon_may_change() -> None:
    model = trained("llama-gqa")
    before = read(model, layers="fused")
    model.model.norm.variance_epsilon = 0.5
    assert not torch.allclose(before, read(model, layers="stock"), atol=1e-3)
    assert_same(model)


@pytest.mark.parametrize("kind", [modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm])
def test_a_class_may_change(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("llama-gqa")
    before, forward = read(model, layers="fused"), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    assert not torch.allclose(before, read(model, layers="stock"), atol=1e-3)
    assert_same(model)


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "rotate_half"])
def test_what_a_class_calls_may_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("llama-gqa")
    before, called = read(model, layers="fused"), getattr(modeling_llama, name)

    def changed(*args: Any, **given: Any) -> Any:
        made = called(*args, **given)
        return -made if isinstance(made, torch.Tensor) else (made[0], 2 * made[1])

    monkeypatch.setattr(modeling_llama, name, changed)
    assert not torch.allclose(before, read(model, layers="stock"), atol=1e-3)
    assert_same(model)


def test_layers_may_be_numbered_anew() -> None:
    model = trained("llama-gqa")
    read(model, layers="fused")
    first, second = (model.model.layers[index].self_attn for index in (0, 1))
    first.layer_idx, second.layer_idx = 1, 0
    assert [layer.attention.index for layer in fused_model(model).layers] == [1, 0, 2]  # type: ignore[union-attr]
    assert_same(model)


def test_hooks_on_all_modules_are_called() -> None:
    model = trained("llama-gqa")
    read(model, layers="fused")
    seen: list[Any] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert fused_model(model).left == ["everything: there are hooks on all modules"]
        read(model)
        assert model.model.layers[0].mlp.up_proj in seen
    finally:
        hook.remove()
    assert fused_model(model).name == ALL_PARTS


@pytest.mark.parametrize(
    "change", [lambda model: model.half(), lambda model: model.double()], ids=["half", "double"]
)
def test_another_number_format_is_tried_anew(change: Callable[[Any], Any]) -> None:
    model = trained("llama-gqa")
    read(model, layers="fused")
    known = fused_model(model)
    # Parameters stay the same objects.
    change(model)
    assert fused_model(model) is not known
    torch.testing.assert_close(read(model, layers="fused"), read(model, layers="stock"), rtol=0.02, atol=0.02)


def test_what_stays_the_same_is_tried_once() -> None:
    model = trained("llama-gqa")
    read(model, layers="fused")
    known = fused_model(model)
    # Transformers leaves hooks on a model whose hidden states were asked for once.
    model(prompt(), output_hidden_states=True)
    after = fused_model(model)
    assert after.name == ALL_PARTS
    read(model, layers="stock")
    read(model, layers="fused")
    model.generate(prompt(), max_new_tokens=2, do_sample=False)
    assert fused_model(model) is after
    assert known.chained
    assert after.chained


# -------------------------------------------------------------- what has no effect yet, or only on some prompts


class LowRank(modeling_llama.LlamaMLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.a, self.b = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = super().forward(x) + self.b(self.a(x))
        return made


class Shifted(modeling_llama.LlamaRMSNorm):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps)
        self.register_buffer("shift", torch.zeros(size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = super().forward(hidden_states) + self.shift
        return made


class Scaled(modeling_llama.LlamaAttention):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        return super().forward(hidden_states * self.factor, *args, **given)


class Plain(modeling_llama.LlamaAttention):
    factor = torch.ones(())

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.factor = torch.ones(())

    def forward(self, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        return super().forward(hidden_states * self.factor, *args, **given)


class Gated(modeling_llama.LlamaDecoderLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        made = super().forward(hidden_states, *args, **given)
        return made + self.gate * hidden_states


def put(model: Any, place: str, module: nn.Module) -> Any:
    """Put a module in the place of one in layer 1, whose weights it takes over."""
    layer = model.model.layers
    parent = layer if place == "1" else layer[1]
    old = parent[1] if place == "1" else getattr(parent, place)
    module.load_state_dict(old.state_dict(), strict=False)
    setattr(parent, place, module.eval())
    return module


@pytest.mark.parametrize(
    ("place", "make", "change"),
    [
        ("mlp", LowRank, lambda new: nn.init.ones_(new.b.weight)),
        ("input_layernorm", lambda _: Shifted(64, 1e-5), lambda new: new.shift.fill_(0.5)),
        ("self_attn", lambda config: Scaled(config, 1), lambda new: new.factor.fill_(3)),
        ("self_attn", lambda config: Plain(config, 1), lambda new: new.factor.fill_(3)),
        ("1", lambda config: Gated(config, 1), lambda new: new.gate.fill_(0.5)),
    ],
    ids=["branch", "buffer", "parameter", "tensor", "layer"],
)
def test_what_is_nothing_yet_may_become_something(
    place: str, make: Callable[[Any], nn.Module], change: Callable[[Any], Any]
) -> None:
    model = trained("llama-gqa")
    new = put(model, place, make(model.config))
    before = read(model, layers="fused")
    with torch.no_grad():
        change(new)
    assert not torch.allclose(before, read(model, layers="stock"), atol=1e-3)
    assert_same(model)


def test_a_part_that_is_compiled_stays_compiled() -> None:
    """What wraps it has a length as its module has, which an MLP has not."""
    model = trained("llama-gqa")
    read(model, layers="fused")
    layer = model.model.layers[1]
    layer.mlp = torch.compile(layer.mlp, backend="eager")
    assert fused_model(model).parts["activation"] == 2
    assert_same(model)


def test_a_part_that_counts_its_calls_counts_them() -> None:
    class Counting(modeling_llama.LlamaMLP):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            made: torch.Tensor = super().forward(x)
            return made

    model = trained("llama-gqa")
    model.model.layers[1].mlp.__class__ = Counting
    read(model, layers="fused")
    known, before = fused_model(model), model.model.layers[1].mlp.calls
    read(model, layers="fused")
    assert model.model.layers[1].mlp.calls == before + 1
    assert fused_model(model) is known


def test_what_is_cut_off_of_large_numbers_is_recognised() -> None:
    class Cut(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.act_fn(self.gate_proj(x)).clamp(max=20)
            made: torch.Tensor = self.down_proj(gate * self.up_proj(x))
            return made

    for clip, parts in ((None, 2), (50.0, 0)):
        config = AutoConfig.for_model("olmo", **SMALL, num_hidden_layers=2, clip_qkv=clip, vocab_size=300)
        assert fused_model(AutoModelForCausalLM.from_config(config).eval()).parts["rotary"] == parts
    model = trained("llama-gqa")
    model.model.layers[1].mlp.__class__ = Cut
    assert fused_model(model).parts["activation"] == 2


def test_in_half_precision_large_numbers_are_tried_too() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert fused_model(trained("llama-gqa").to(dtype)).name == ALL_PARTS


def test_a_norm_that_does_nothing_gives_back_what_is_written_to() -> None:
    model = trained("falcon-mqa")
    for layer in model.transformer.h:
        layer.input_layernorm = nn.Identity()
    assert fused_model(model).parts["residual"] > 0
    assert_same(model)


# ---------------------------------------------------------------------------------- what somebody else keeps


def body(between: Callable[[torch.Tensor, torch.Tensor, list[Any]], torch.Tensor]) -> type:
    """A Llama that does something with what a layer was given and what it returned."""

    class Body(modeling_llama.LlamaModel):
        def forward(self, input_ids: torch.Tensor, past_key_values: Any, position_ids: Any, **_: Any) -> Any:
            hidden = self.embed_tokens(input_ids)
            angles = self.rotary_emb(hidden, position_ids=position_ids)
            self.kept: list[Any] = []
            for layer in self.layers:
                made = layer(
                    hidden,
                    attention_mask=None,
                    position_embeddings=angles,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                )
                hidden = between(hidden, made, self.kept)
            if self.kept:
                hidden = hidden + 0.1 * sum(self.kept)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    return Body


def keeping(_: torch.Tensor, made: torch.Tensor, kept: list[Any]) -> torch.Tensor:
    kept.append(made)
    return made


def keeping_a_part(_: torch.Tensor, made: torch.Tensor, kept: list[Any]) -> torch.Tensor:
    kept.append(made[:, -1:])
    return made


@pytest.mark.parametrize(
    "between",
    [keeping, keeping_a_part, lambda hidden, made, _: made + 0.1 * hidden],
    ids=["all", "a part", "the one before"],
)
def test_a_model_may_keep_what_its_layers_return(between: Any) -> None:
    model = trained("llama-gqa")
    model.model.__class__ = body(between)
    found = fused_model(model)
    assert found.name == ALL_PARTS
    assert not found.chained
    assert_same(model)


def test_a_model_that_keeps_nothing_pays_no_copies() -> None:
    model = trained("llama-gqa")
    model.model.__class__ = body(lambda _, made, __: made)
    assert [layer.copies for layer in fused_model(model).layers] == [True, False, False]


@pytest.mark.parametrize(
    "where", ["layers.0", "layers.1.self_attn.q_proj", "layers.0.mlp", "layers.2.input_layernorm"]
)
def test_what_hooks_keep_is_not_written_to(where: str) -> None:
    model = trained("llama-gqa")
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: Any, args: tuple[Any, ...], made: Any) -> None:
        for one in (*args, made):
            kept.append((one, one.clone()))

    model.model.get_submodule(where).register_forward_hook(keep)
    read(model, layers="fused")
    assert kept
    assert all(torch.equal(one, then) for one, then in kept)


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
def test_hooks_see_what_they_always_see(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvr_partition.runtime.fused.layers.MLP_ROWS", 16)
    model, ids = trained("llama-gqa"), prompt(batch=2)
    layer = model.model.layers[1]
    part = layer.self_attn if name in ("q_proj", "v_proj", "o_proj") else layer.mlp
    seen: list[torch.Size] = []
    getattr(part, name).register_forward_hook(lambda _, args, made: seen.append(made.shape))
    for layers in ("stock", "fused"):
        fused_model(model)
        seen.clear()
        prefill(model, ids, Partition((CONTEXT,)), layers=layers)  # type: ignore[arg-type]
        assert [tuple(shape[:2]) for shape in seen] == [(2, CONTEXT)]


# ------------------------------------------------------------------------------------- others, at the same time


def test_under_autocast_layers_are_the_models_own() -> None:
    model = trained("llama-gqa")
    read(model, layers="fused")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_model(model).name == "stock"
        with pytest.raises(UnsupportedError, match=r"torch\.autocast decides"):
            read(model, layers="fused")
    assert fused_model(model).name == ALL_PARTS


@pytest.fixture
def meanwhile() -> Callable[[Callable[[], Any]], Any]:
    """Run something in another thread, and what it returned or raised."""

    def run(work: Callable[[], Any]) -> Any:
        found: list[Any] = []

        def inside() -> None:
            try:
                found.append(work())
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        return found[0]

    return run


def test_a_model_with_the_same_layers_is_refused_meanwhile(meanwhile: Any) -> None:
    model, other = trained("llama-gqa"), trained("llama-gqa")
    other.model = model.model
    found: list[Any] = []
    once: list[int] = []

    def look(*_: Any) -> None:
        if not once:
            once.append(1)
            found.append(meanwhile(lambda: read(other, layers="fused")))

    read(model, layers="fused")
    read(other, layers="fused")
    hook = model.model.embed_tokens.register_forward_hook(look)
    read(model, layers="fused")
    hook.remove()
    assert isinstance(found[0], RankError)
    assert "another thread prefills with the same model" in str(found[0])
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
    # It is free again.
    assert_same(other)


def test_a_model_may_be_called_plainly_meanwhile(meanwhile: Any) -> None:
    model, ids = trained("llama-gqa"), prompt()
    with torch.no_grad():
        right = model(ids, use_cache=False).logits
    found: list[Any] = []

    def plainly() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    once: list[int] = []

    def look(*_: Any) -> None:
        if not once:
            once.append(1)
            found.append(meanwhile(plainly))

    read(model, layers="fused")
    hook = model.model.embed_tokens.register_forward_hook(look)
    inside = read(model, layers="fused")
    hook.remove()
    torch.testing.assert_close(found[0], right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inside, read(model, layers="stock"), rtol=1e-4, atol=2e-5)


def test_a_copy_of_a_model_is_tried_by_itself() -> None:
    model = trained("llama-gqa")
    read(model, layers="fused")
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.scaling = 0.7
    assert_same(other)
    assert_same(model)
