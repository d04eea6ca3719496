import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from diffalign.backbones import StableDiffusion, StableDiffusionXL, open_backbone
from diffalign.config import LoRAConfig, ModelConfig
from diffalign.errors import DiffalignError

PROMPTS = ["two red circles", "", "a blue square left of a star", "two red circles"]


def opened(folder, **options):
    keys = ("parts", "resolution", "frozen_copy", "seed")
    rest = {key: options.pop(key) for key in keys if key in options}
    config = ModelConfig(path=str(folder), lora=LoRAConfig(rank=4), **options)
    return open_backbone(config, device="cpu", **{"resolution": 64, **rest})


def some_inputs(backbone, rows=2):
    torch.manual_seed(0)
    sizes = torch.tensor([[96, 64]]).expand(rows, 2)
    cond = backbone.with_sizes(backbone.encode_prompts(PROMPTS[:rows]), sizes, sizes - 64, 0 * sizes + 64)
    return torch.randn(rows, *backbone.latent_shape), torch.tensor([10, 900, 500, 0])[:rows], cond


def perturb(backbone, std=0.05):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in backbone.trainable_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)


@contextmanager
def from_pretrained_calls(monkeypatch, classes):
    """Count calls of `from_pretrained` of classes."""
    calls = []
    with monkeypatch.context() as patch:
        for cls in classes:
            original = cls.from_pretrained.__func__

            def counted(klass, *args, _original=original, **kwargs):
                calls.append(klass.__name__)
                return _original(klass, *args, **kwargs)

            patch.setattr(cls, "from_pretrained", classmethod(counted))
        yield calls


def test_family_shape_and_process_come_from_the_model(tiny_sdxl, tiny_sd, tiny_sd_v):
    sdxl, sd, sd_v = opened(tiny_sdxl), opened(tiny_sd), opened(tiny_sd_v)
    assert isinstance(sdxl, StableDiffusionXL)
    assert isinstance(sd, StableDiffusion)
    assert (sdxl.family, sd.family) == ("sdxl", "sd")
    assert sdxl.latent_shape == (4, 16, 16)  # VAE factor 4
    assert sd.latent_shape == (4, 8, 8)  # VAE factor 8
    assert (sd.process.prediction, sd_v.process.prediction) == ("epsilon", "v_prediction")


def test_resolution_is_the_models_own_or_a_multiple_of_the_factor(tiny_sd):
    assert opened(tiny_sd, resolution=None).resolution == (64, 64)
    assert opened(tiny_sd, resolution=96).latent_shape == (4, 12, 12)
    with pytest.raises(DiffalignError, match="resolution is 68; expected a multiple of 8"):
        opened(tiny_sd, resolution=68)


def test_training_parts_load_neither_vae_nor_text_encoders(tiny_sdxl, monkeypatch):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    others = [AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, DiffusionPipeline]
    cond = some_inputs(opened(tiny_sdxl))[2]
    with from_pretrained_calls(monkeypatch, others) as calls:
        backbone = opened(tiny_sdxl, parts="network")
        x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([1, 2])
        backbone.predict(x, t, cond)
        backbone.predict(x, t, cond, reference=True)
        backbone.trainable_state()
        assert calls == []
        opened(tiny_sdxl, parts="all")
        assert {"AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection"} <= set(calls)


def test_released_encoders_come_back(tiny_sd):
    backbone = opened(tiny_sd)
    first = backbone.encode_prompts(["a"]).embeddings
    backbone.release_encoders()
    assert backbone._pipeline is None
    assert torch.equal(backbone.encode_prompts(["a"]).embeddings, first)


def test_sdxl_text_is_the_pipelines(tiny_sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    backbone = opened(tiny_sdxl)
    embeddings, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    cond = backbone.encode_prompts(PROMPTS)
    assert cond.embeddings.shape == (4, 16, 16 + 24)
    assert cond.pooled.shape == (4, 12)
    torch.testing.assert_close(cond.embeddings, embeddings)
    torch.testing.assert_close(cond.pooled, pooled)
    _, negative, _, pooled_negative = pipeline.encode_prompt(PROMPTS)
    uncond = backbone.unconditional(4)
    assert torch.equal(uncond.embeddings, negative)
    assert torch.equal(uncond.pooled, pooled_negative)
    assert uncond.embeddings.abs().max() == 0  # force_zeros_for_empty_prompt


def test_sdxl_without_forced_zeros_encodes_the_empty_prompt(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    backbone = opened(folder)
    torch.testing.assert_close(backbone.unconditional(1).embeddings, backbone.encode_prompts([""]).embeddings)


def test_sd_text_is_the_pipelines_final_normed_state(tiny_sd):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    backbone = opened(tiny_sd)
    embeddings, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    torch.testing.assert_close(backbone.encode_prompts(PROMPTS).embeddings, embeddings)
    torch.testing.assert_close(backbone.unconditional(4).embeddings, negative)
    padded = {"padding": "max_length", "max_length": 16, "truncation": True, "return_tensors": "pt"}
    last = pipeline.text_encoder(pipeline.tokenizer(PROMPTS, **padded).input_ids).last_hidden_state
    torch.testing.assert_close(backbone.encode_prompts(PROMPTS).embeddings, last)


def test_equal_prompts_are_encoded_once(tiny_sd, monkeypatch):
    backbone = opened(tiny_sd)
    encoded = []
    original = StableDiffusion._encode_text
    monkeypatch.setattr(
        StableDiffusion,
        "_encode_text",
        lambda self, pipeline, prompts: encoded.extend(prompts) or original(self, pipeline, prompts),
    )
    cond = backbone.encode_prompts(["b", "a", "b", "b"])
    assert encoded == ["b", "a"]
    assert torch.equal(cond.embeddings[0], cond.embeddings[3])
    assert not torch.equal(cond.embeddings[0], cond.embeddings[1])


def test_time_ids_are_height_first_and_reach_a_bf16_network_unrounded(tiny_sdxl):
    backbone = opened(tiny_sdxl, precision="bf16")
    cond = backbone.encode_prompts(["a"])
    cond = backbone.with_sizes(
        cond, torch.tensor([[1025, 769]]), torch.tensor([[3, 513]]), torch.tensor([[1023, 1023]])
    )
    assert cond.time_ids.tolist() == [[1025, 769, 3, 513, 1023, 1023]]
    seen = []
    backbone.core.add_time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    backbone.predict(torch.randn(1, 4, 16, 16), torch.tensor([5]), cond)
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == [1025, 769, 3, 513, 1023, 1023]


def test_sdxl_without_sizes_says_so(tiny_sdxl):
    backbone = opened(tiny_sdxl)
    with pytest.raises(ValueError, match="with_sizes"):
        backbone.predict(torch.randn(1, 4, 16, 16), torch.tensor([5]), backbone.unconditional(1))


def test_encode_is_the_scaled_posterior_and_decode_inverts_the_scaling(tiny_sdxl):
    backbone = opened(tiny_sdxl)
    vae = AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = backbone.encode(images)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(mean, posterior.mean * 0.13025)
    torch.testing.assert_close(std, posterior.std * 0.13025)
    decoded = (vae.decode(mean / 0.13025).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(backbone.decode(mean), decoded)


def test_latent_mean_std_and_shift_are_used(tiny_sdxl):
    backbone = opened(tiny_sdxl)
    plain, plain_std = backbone.encode(torch.zeros(1, 3, 64, 64))
    vae = backbone.pipeline().vae
    vae.register_to_config(shift_factor=0.5)
    shifted, _ = backbone.encode(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(shifted, plain - 0.5 * 0.13025)
    latents = torch.randn(1, 4, 16, 16)
    moved = backbone.decode(latents)
    vae.register_to_config(shift_factor=None, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4)
    mean, std = backbone.encode(torch.zeros(1, 3, 64, 64))
    offset = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    torch.testing.assert_close(mean, (plain / 0.13025 - offset) * 0.13025 / 2)
    torch.testing.assert_close(std, plain_std / 2)
    # The same VAE latent from another network latent.
    same = ((latents / 0.13025 + 0.5) - offset) * 0.13025 / 2
    torch.testing.assert_close(backbone.decode(same), moved, rtol=1e-4, atol=1e-5)


def test_decode_is_differentiable_and_leaves_the_vae_frozen(tiny_sd):
    backbone = opened(tiny_sd)
    latents = torch.randn(1, *backbone.latent_shape, requires_grad=True)
    backbone.decode(latents).mean().backward()
    assert latents.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in backbone.pipeline().vae.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_policy_equals_reference_exactly_at_step_0(tiny_sdxl, precision, tune):
    backbone = opened(tiny_sdxl, precision=precision, tune=tune, frozen_copy=tune == "full")
    x, t, cond = some_inputs(backbone, 4)
    policy, reference = backbone.predict(x, t, cond), backbone.predict(x, t, cond, reference=True)
    assert policy.dtype == reference.dtype == torch.float32
    assert torch.equal(policy, reference)
    assert policy.requires_grad
    assert not reference.requires_grad
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert backbone.dtype == expected
    assert all(p.dtype == torch.float32 for _, p in backbone.trainable_parameters())


@pytest.mark.parametrize("options", [{"tune": "full", "frozen_copy": True}, {"frozen_copy": True}, {}])
def test_reference_stays_while_the_policy_moves(tiny_sd, options):
    backbone = opened(tiny_sd, **options)
    inputs = some_inputs(backbone)
    before = backbone.predict(*inputs).detach()
    perturb(backbone)
    assert torch.equal(backbone.predict(*inputs, reference=True), before)
    with backbone.reference():
        assert torch.equal(backbone.predict(*inputs), before)
        assert torch.equal(backbone.predict(*inputs, reference=True), before)
    assert (backbone.predict(*inputs) - before).abs().max() > 1e-3


def test_full_tuning_without_a_copy_has_no_reference(tiny_sd):
    backbone = opened(tiny_sd, tune="full")
    with pytest.raises(DiffalignError, match="no reference model"):
        backbone.predict(*some_inputs(backbone), reference=True)


def test_bf16_is_close_to_fp32_but_really_bf16(tiny_sdxl):
    exact, rounded = opened(tiny_sdxl), opened(tiny_sdxl, precision="bf16")
    inputs = some_inputs(exact)
    difference = (exact.predict(*inputs) - rounded.predict(*inputs)).abs().max()
    assert 1e-5 < difference < 0.1


def test_prediction_goes_through_the_wrapped_network_and_the_reference_does_not(tiny_sd):
    backbone = opened(tiny_sd)
    inputs = some_inputs(backbone)

    class Wrapper(torch.nn.Module):
        calls = 0

        def forward(self, *args, **kwargs):
            Wrapper.calls += 1
            return backbone.core(*args, **kwargs)

    backbone.network = Wrapper()
    backbone.predict(*inputs)
    backbone.predict(*inputs, reference=True)
    assert Wrapper.calls == 1


def test_guidance_is_one_batch_of_both_branches(tiny_sdxl):
    backbone = opened(tiny_sdxl)
    x, t, cond = some_inputs(backbone)
    uncond = backbone.unconditional(2)
    sizes = cond.time_ids
    off = backbone.predict(x, t, backbone.with_sizes(uncond, sizes[:, :2], sizes[:, 2:4], sizes[:, 4:]))
    on = backbone.predict(x, t, cond)
    torch.testing.assert_close(backbone.guided(x, t, cond, uncond, 3.0), off + 3 * (on - off))
    torch.testing.assert_close(backbone.guided(x, t, cond, uncond, 1.0), on)
    scales = torch.tensor([0.0, 2.0])
    expected = torch.stack([off[0], 2 * on[1] - off[1]])
    torch.testing.assert_close(backbone.guided(x, t, cond, uncond, scales), expected)


def test_full_state_round_trip(tiny_sd):
    source, target = opened(tiny_sd, tune="full"), opened(tiny_sd, tune="full")
    perturb(source)
    held = dict(target.trainable_parameters())
    target.load_trainable_state({k: v.clone() for k, v in source.trainable_state().items()})
    inputs = some_inputs(source)
    assert torch.equal(target.predict(*inputs), source.predict(*inputs))
    assert all(p is held[name] for name, p in target.trainable_parameters())
    with pytest.raises(DiffalignError, match="do not fit the network"):
        target.load_trainable_state({"conv_in.weight": torch.zeros(1)})


def test_another_vae_is_used(tiny_sd, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny_sd, subfolder="vae")
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    backbone = opened(tiny_sd, vae=str(tmp_path / "vae"))
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(backbone.encode(images)[0], vae.encode(images).latent_dist.mean * 0.5)


def test_pipeline_is_around_the_current_policy(tiny_sd):
    backbone = opened(tiny_sd, tune="full", frozen_copy=True)
    pipeline = backbone.pipeline()
    assert pipeline.unet is backbone.core
    assert pipeline is backbone.pipeline()
    with backbone.reference():
        assert backbone.pipeline().unet is not backbone.core
    assert backbone.pipeline().unet is backbone.core


@pytest.mark.slow
def test_really_compiled_network_agrees_with_the_plain_one(tiny_sdxl):
    """Compiles for minutes; policy and reference are two compiled programs, so they agree but for rounding."""
    plain, fast = opened(tiny_sdxl), opened(tiny_sdxl, compile=True)
    inputs = some_inputs(plain)
    expected = plain.predict(*inputs)
    policy, reference = fast.predict(*inputs), fast.predict(*inputs, reference=True)
    torch.testing.assert_close(policy, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(reference, policy, atol=2e-5, rtol=0)
    for backbone, output in ((plain, expected), (fast, policy)):
        output.square().mean().backward()
        assert len(backbone.trainable_parameters()) > 0
    pairs = zip(plain.trainable_parameters(), fast.trainable_parameters(), strict=True)
    for (name, p), (_, q) in pairs:
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_compiled_network_predicts_the_same(tiny_sd, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: compiled.append(function) or function)
    plain, fast = opened(tiny_sd), opened(tiny_sd, compile=True)
    inputs = some_inputs(plain)
    assert torch.equal(fast.predict(*inputs), plain.predict(*inputs))
    assert len(compiled) == 1
