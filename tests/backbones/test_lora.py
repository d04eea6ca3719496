import pytest
import torch
from torch import nn

from diffalign.backbones import open_backbone
from diffalign.backbones.lora import adapters_off, target_modules
from diffalign.config import LoRAConfig, ModelConfig
from diffalign.errors import DiffalignError


def opened(folder, **options):
    model = {k: options.pop(k) for k in ("precision", "tune", "gradient_checkpointing") if k in options}
    config = ModelConfig(path=str(folder), lora=LoRAConfig(**{"rank": 4, **options}), **model)
    return open_backbone(config, device="cpu", resolution=64)


def endings(names):
    return {name.rpartition(".")[2] for name in names}


def test_presets_reach_the_layers_they_name(tiny_sdxl):
    core = opened(tiny_sdxl, tune="full").core
    attention = target_modules(core, "attention")
    convolution = target_modules(core, "attention+conv")
    linear = target_modules(core, "all-linear")
    assert endings(attention) == {"to_q", "to_k", "to_v", "0"}
    assert len(attention) == 4 * 16
    assert endings(convolution) >= {"conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "proj", "2"}
    assert set(attention) < set(convolution)
    assert {"time_embedding.linear_1", "add_embedding.linear_2"} < set(linear)
    assert all(isinstance(core.get_submodule(name), nn.Linear) for name in linear)


def test_presets_stay_inside_the_blocks_of_flux(tiny_flux):
    core = opened(tiny_flux, tune="full").core
    single, double = "single_transformer_blocks.0", "transformer_blocks.0"
    attention = {f"{block}.attn.to_{n}" for block in (single, double) for n in "qkv"}
    attention |= {f"{double}.attn.{n}" for n in ("to_out.0", "to_add_out")}
    attention |= {f"{double}.attn.add_{n}_proj" for n in "qkv"}
    assert set(target_modules(core, "attention")) == attention
    forward = {f"{double}.{ff}.net.{n}" for ff in ("ff", "ff_context") for n in ("0.proj", "2")}
    forward |= {f"{single}.proj_mlp", f"{single}.proj_out"}
    assert set(target_modules(core, "attention+conv")) == attention | forward
    assert set(target_modules(core, ["proj_out"])) == {"proj_out", f"{single}.proj_out"}  # as asked


def test_a_list_names_endings_and_a_wrong_one_gets_the_nearest(tiny_sd):
    core = opened(tiny_sd, tune="full").core
    assert endings(target_modules(core, ["to_q", "attn2.to_k"])) == {"to_q", "to_k"}
    with pytest.raises(DiffalignError, match=r"'to_kk' matches no .* Did you mean 'to_k'"):
        target_modules(core, ["to_kk"])
    with pytest.raises(DiffalignError, match="empty"):
        target_modules(core, [])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_adapters_are_trained_and_they_are_float32(tiny_sdxl, precision):
    backbone = opened(tiny_sdxl, precision=precision)
    parameters = backbone.trainable_parameters()
    assert len(parameters) == 2 * 4 * 16
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in parameters)
    frozen = {p.dtype for p in backbone.core.parameters() if not p.requires_grad}
    assert frozen == {backbone.dtype}


def test_second_factor_starts_at_zero_and_the_first_from_the_seed(tiny_sd):
    torch.manual_seed(1)
    one = opened(tiny_sd).trainable_state()
    torch.manual_seed(2)
    same = opened(tiny_sd).trainable_state()
    config = ModelConfig(path=str(tiny_sd), lora=LoRAConfig(rank=4))
    other = open_backbone(config, device="cpu", seed=1).trainable_state()
    assert all((value == 0).all() for name, value in one.items() if "lora_B" in name)
    first = next(name for name in one if "lora_A" in name)
    assert torch.equal(one[first], same[first])
    assert not torch.equal(one[first], other[first])


def test_opening_does_not_touch_the_global_generator(tiny_sd):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    opened(tiny_sd)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_switching_off_is_the_base_and_keeps_gradients(tiny_sd, dora):
    backbone = opened(tiny_sd, dora=dora, targets="attention+conv")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    cond = backbone.unconditional(2)
    before = backbone.predict(x, t, cond).detach()
    with torch.no_grad():
        for name, parameter in backbone.trainable_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    after = backbone.predict(x, t, cond)
    with adapters_off(backbone._lora_layers):
        off = backbone.predict(x, t, cond).detach()
    assert torch.equal(off, before)
    assert (after - off).abs().max() > 1e-3
    after.square().mean().backward()
    assert all(p.requires_grad and p.grad is not None for _, p in backbone.trainable_parameters())
    assert torch.equal(backbone.predict(x, t, cond), after)


def test_adapters_come_back_after_an_error(tiny_sd):
    backbone = opened(tiny_sd)
    with pytest.raises(KeyError), adapters_off(backbone._lora_layers):
        raise KeyError
    assert not any(layer.disable_adapters for layer in backbone._lora_layers)


@pytest.mark.parametrize("dora", [False, True])
def test_state_round_trip_is_in_place_and_exact(tiny_sdxl, dora):
    source, target = opened(tiny_sdxl, dora=dora), opened(tiny_sdxl, dora=dora)
    state = {name: torch.randn_like(value) for name, value in source.trainable_state().items()}
    held = dict(target.trainable_parameters())
    target.load_trainable_state(state)
    assert all(torch.equal(target.trainable_state()[name], value) for name, value in state.items())
    assert all(p is held[name] for name, p in target.trainable_parameters())
    assert all(".default" not in name for name in state)


def test_a_state_of_another_rank_or_target_is_refused(tiny_sd):
    backbone = opened(tiny_sd)
    with pytest.raises(DiffalignError, match="differ in name or shape"):
        backbone.load_trainable_state(opened(tiny_sd, rank=2).trainable_state())
    with pytest.raises(DiffalignError, match="same model, rank and targets"):
        backbone.load_trainable_state(opened(tiny_sd, targets="attention+conv").trainable_state())


def test_dropout_is_active_in_training_and_off_in_inference(tiny_sd):
    backbone = opened(tiny_sd, dropout=0.5)
    state = {name: torch.randn_like(value) for name, value in backbone.trainable_state().items()}
    backbone.load_trainable_state(state)
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([500]), backbone.unconditional(1)
    assert not torch.equal(backbone.predict(x, t, cond), backbone.predict(x, t, cond))
    with backbone.inference():
        assert torch.equal(backbone.predict(x, t, cond), backbone.predict(x, t, cond))
    assert backbone.core.training


def test_gradient_checkpointing_changes_no_gradient(tiny_sdxl):
    grads = []
    for checkpointing in (False, True):
        backbone = opened(tiny_sdxl, gradient_checkpointing=checkpointing)
        assert backbone.core.is_gradient_checkpointing is checkpointing
        torch.manual_seed(0)
        cond = backbone.encode_prompts(["a", "b"])
        sizes = torch.full((2, 2), 64)
        cond = backbone.with_sizes(cond, sizes, 0 * sizes, sizes)
        x = torch.randn(2, *backbone.latent_shape)
        backbone.predict(x, torch.tensor([3, 700]), cond).square().mean().backward()
        grads.append([p.grad for name, p in backbone.trainable_parameters() if "lora_B" in name])
    assert all(g.abs().max() > 0 for g in grads[0])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-7)
