"""The SD3 adapter gives what the diffusers pipeline gives: text, pictures, latents."""

import itertools
import json
import math
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from diffalign.backbones import StableDiffusion3, model_fingerprint, open_backbone
from diffalign.config import LoRAConfig, ModelConfig, RunConfig
from diffalign.elbo import NoisedPairs, pair_errors
from diffalign.errors import DiffalignError
from diffalign.export import save_pipeline
from diffalign.objectives.pairwise import dpo_loss, dpo_margin
from diffalign.plan_network import Kept, network_size
from diffalign.sampling.generate import generate_images

PROMPTS = ["two red circles", "", "a blue square left of a star", "two red circles"]
FOLDERS = ["tiny_sd3", "tiny_sd3_without_t5"]


def opened(folder, **options):
    rest = {key: options.pop(key) for key in ("parts", "resolution", "frozen_copy") if key in options}
    config = ModelConfig(path=str(folder), lora=LoRAConfig(rank=4), **options)
    return open_backbone(config, device="cpu", **{"resolution": 64, **rest})


def some_inputs(backbone, rows=2):
    torch.manual_seed(0)
    times = torch.tensor([0.9, 0.1, 0.5, 0.999])[:rows]
    return torch.randn(rows, *backbone.latent_shape), times, backbone.encode_prompts(PROMPTS[:rows])


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def perturb(backbone, std=0.05):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in backbone.trainable_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)


def plain_pipeline(folder):
    """The pipeline as a user loads it; diffusers asks to be told that there is no T5."""
    options = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_facts_come_from_the_model(tiny_sd3):
    backbone = opened(tiny_sd3, resolution=None)
    assert isinstance(backbone, StableDiffusion3)
    assert backbone.family == "sd3"
    assert backbone.resolution == (64, 64)
    assert (backbone.process.prediction, backbone.process.time_scale) == ("flow", 1000.0)
    assert backbone.process.model_time(torch.tensor([0.25])).tolist() == [250.0]


def test_sizes_that_the_network_cannot_take_are_refused(tiny_sd3):
    assert opened(tiny_sd3, resolution=96).latent_shape == (4, 24, 24)
    with pytest.raises(DiffalignError, match="resolution is 68; expected a multiple of 8"):
        opened(tiny_sd3, resolution=68)
    with pytest.raises(DiffalignError, match="resolution is 104; expected at most 96"):
        opened(tiny_sd3, resolution=104)


@pytest.mark.parametrize("folder", FOLDERS)
def test_text_is_the_pipelines(request, folder):
    path = request.getfixturevalue(folder)
    pipeline = plain_pipeline(path)
    backbone = opened(path)
    embeddings, negative, pooled, pooled_negative = pipeline.encode_prompt(PROMPTS, None, None)
    cond = backbone.encode_prompts(PROMPTS)
    assert cond.embeddings.shape == (4, 16 + 256, 48)
    assert cond.pooled.shape == (4, 16 + 12)
    torch.testing.assert_close(cond.embeddings, embeddings)
    torch.testing.assert_close(cond.pooled, pooled)
    uncond = backbone.unconditional(4)
    torch.testing.assert_close(uncond.embeddings, negative)
    torch.testing.assert_close(uncond.pooled, pooled_negative)
    assert (cond.embeddings[:, :16, 16 + 24 :] == 0).all()  # the CLIPs' states, padded to the width of T5
    assert (cond.embeddings[:, 16:] == 0).all() == (folder == "tiny_sd3_without_t5")


def test_t5_can_be_left_out_and_another_cache_is_used(tiny_sd3, tiny_sd3_without_t5, tiny_sdxl):
    without = opened(tiny_sd3, text_encoder_3=False)
    assert without.pipeline().text_encoder_3 is None
    # The two folders differ in nothing but T5.
    expected = opened(tiny_sd3_without_t5).encode_prompts(PROMPTS)
    assert torch.equal(without.encode_prompts(PROMPTS).embeddings, expected.embeddings)
    with_t5, clips = (ModelConfig(path=str(tiny_sd3), text_encoder_3=value) for value in (True, False))
    assert model_fingerprint(with_t5) != model_fingerprint(clips)
    with pytest.raises(DiffalignError, match="StableDiffusionXLPipeline has no such part"):
        opened(tiny_sdxl, text_encoder_3=False)


def test_a_model_may_name_another_number_of_t5_states_and_keeps_it(tiny_sd3_without_t5, tmp_path):
    folder = shutil.copytree(tiny_sd3_without_t5, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_max_sequence_length": 16}))
    backbone, usual = opened(folder, tune="full"), opened(tiny_sd3_without_t5)
    assert backbone.encode_prompts(PROMPTS).embeddings.shape == (4, 16 + 16, 48)
    options = {
        "output_type": "pt",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
    }
    pipeline = plain_pipeline(folder)
    expected = pipeline(PROMPTS[0], generator=generators(1), max_sequence_length=16, **options).images
    found = generate_images(backbone, PROMPTS[:1], [1], steps=2, guidance=3.0)
    assert (found - expected).abs().max() < 1e-5
    assert (found - generate_images(usual, PROMPTS[:1], [1], steps=2, guidance=3.0)).abs().max() > 0.01
    saved = save_pipeline(backbone, tmp_path / "saved", torch.float32)
    assert opened(saved).call_options == {"max_sequence_length": 16}


def test_training_parts_load_neither_vae_nor_text_encoders(tiny_sd3, monkeypatch):
    cond = some_inputs(opened(tiny_sd3))[2]
    for kind in (AutoencoderKL, CLIPTextModelWithProjection, T5EncoderModel, DiffusionPipeline):
        monkeypatch.setattr(kind, "from_pretrained", None)
    backbone = opened(tiny_sd3)
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.7])
    assert backbone.predict(x, t, cond).shape == x.shape


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("folder", FOLDERS)
def test_pictures_are_the_pipelines(request, folder, guidance):
    path = request.getfixturevalue(folder)
    pipeline = plain_pipeline(path)
    expected = pipeline(
        prompt=PROMPTS[:2],
        generator=generators(1, 2),
        num_inference_steps=3,
        guidance_scale=guidance,
        output_type="pt",
        height=64,
        width=64,
    ).images
    backbone = opened(path)
    found = generate_images(backbone, PROMPTS[:2], [1, 2], steps=3, guidance=guidance)
    assert (found - expected).abs().max() < 1e-5
    other = generate_images(backbone, PROMPTS[2:], [1, 2], steps=3, guidance=guidance)
    assert (found - other).abs().max() > 0.02  # the prompt matters


def test_an_euler_loop_in_the_terms_of_the_process_gives_the_pipelines_latents(tiny_sd3):
    """dx = v dt (Esser et al. 2024, eq. 1) along the scheduler's times, velocity from `guided`."""
    pipeline = plain_pipeline(tiny_sd3)
    backbone = opened(tiny_sd3)
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 64, "width": 64}
    expected = pipeline(PROMPTS[0], generator=generators(7), output_type="latent", **options).images
    times = pipeline.scheduler.sigmas  # 5 times from 1 down, and 0
    x = torch.randn(1, *backbone.latent_shape, generator=generators(7)[0])
    cond, uncond = backbone.encode_prompts(PROMPTS[:1]), backbone.unconditional(1)
    with backbone.inference():
        for now, then in itertools.pairwise(times):
            x = x + (then - now) * backbone.guided(x, now[None], cond, uncond, 3.0)
    assert expected.std() > 0.5
    assert (x - expected).abs().max() < 1e-4


def test_few_steps_are_the_times_the_sampler_visits(tiny_sd3):
    grid = opened(tiny_sd3, few_steps=4).process.grid
    pipeline = plain_pipeline(tiny_sd3)
    pipeline.scheduler.set_timesteps(4)
    torch.testing.assert_close(grid.flip(0) * 1000, pipeline.scheduler.timesteps, rtol=1e-6, atol=1e-3)


def test_encode_and_decode_shift_and_scale(tiny_sd3):
    backbone = opened(tiny_sd3)
    vae = AutoencoderKL.from_pretrained(tiny_sd3, subfolder="vae")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = backbone.encode(images)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.0609) * 1.5305)
    torch.testing.assert_close(std, posterior.std * 1.5305)
    decoded = (vae.decode(mean / 1.5305 + 0.0609).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(backbone.decode(mean), decoded)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_margin_is_zero_and_loss_log_2_at_step_0(tiny_sd3, precision, tune):
    backbone = opened(tiny_sd3, precision=precision, tune=tune, frozen_copy=tune == "full")
    x, t, cond = some_inputs(backbone, 4)
    policy, reference = backbone.predict(x, t, cond), backbone.predict(x, t, cond, reference=True)
    assert policy.dtype == torch.float32
    assert torch.equal(policy, reference)
    assert policy.requires_grad
    assert not reference.requires_grad
    errors = pair_errors(backbone, NoisedPairs(x, t, torch.randn_like(x), cond))
    margin = dpo_margin(errors.chosen_delta, errors.rejected_delta, 5000.0)
    assert margin.tolist() == [0.0, 0.0]
    assert dpo_loss(margin).tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("options", [{"tune": "full", "frozen_copy": True}, {}])
def test_reference_stays_while_the_policy_moves(tiny_sd3, options):
    backbone = opened(tiny_sd3, **options)
    inputs = some_inputs(backbone)
    before = backbone.predict(*inputs).detach()
    perturb(backbone)
    assert torch.equal(backbone.predict(*inputs, reference=True), before)
    assert (backbone.predict(*inputs) - before).abs().max() > 1e-3
    assert backbone.pipeline().transformer is backbone.core


def test_bf16_is_close_to_fp32_but_really_bf16(tiny_sd3):
    exact, rounded = opened(tiny_sd3), opened(tiny_sd3, precision="bf16")
    inputs = some_inputs(exact)
    expected, found = exact.predict(*inputs), rounded.predict(*inputs)
    assert 1e-5 < (expected - found).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(tiny_sd3, tune):
    grads = []
    for checkpointing in (False, True):
        backbone = opened(tiny_sd3, gradient_checkpointing=checkpointing, tune=tune)
        assert backbone.core.is_gradient_checkpointing is checkpointing
        perturb(backbone)
        backbone.predict(*some_inputs(backbone)).square().mean().backward()
        grads.append({name: p.grad for name, p in backbone.trainable_parameters()})
    assert sum(grad.abs().max() > 0 for grad in grads[0].values()) > 30
    for name, plain in grads[0].items():
        torch.testing.assert_close(plain, grads[1][name], rtol=1e-4, atol=1e-7)


def test_adapters_reach_pictures_and_text_of_the_blocks(tiny_sd3):
    def layers(targets):
        config = ModelConfig(path=str(tiny_sd3), lora=LoRAConfig(rank=2, targets=targets))
        names = [name for name, _ in open_backbone(config, device="cpu").trainable_parameters()]
        return {name.partition(".lora_A")[0] for name in names if ".lora_A" in name}

    attention, wider = layers("attention"), layers("attention+conv")
    # Two blocks; the last has no output for the text; the first attends a second time to the picture alone.
    own = {f"transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in ("to_q", "to_k", "to_v", "to_out.0")}
    text = {f"transformer_blocks.{i}.attn.add_{n}_proj" for i in (0, 1) for n in "qkv"}
    second = {f"transformer_blocks.0.attn2.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")}
    assert attention == own | text | second | {"transformer_blocks.0.attn.to_add_out"}
    forward = {f"transformer_blocks.{i}.ff.net.{n}" for i in (0, 1) for n in ("0.proj", "2")}
    text_forward = {f"transformer_blocks.0.ff_context.net.{n}" for n in ("0.proj", "2")}
    assert wider - attention == forward | text_forward
    assert "proj_out" not in wider
    assert "proj_out" in layers("all-linear")


def test_a_cached_batch_holds_what_the_backbone_gives(tiny_sd3, tmp_path):
    from diffalign.config import DataConfig
    from diffalign.data.cache import build_cache
    from diffalign.data.sources import open_records
    from diffalign.randomness import Draw

    lines = []
    for i, shade in enumerate((200, 40)):
        Image.new("RGB", (64, 64), (shade, 90, 20)).save(tmp_path / f"{i}.png")
        Image.new("RGB", (64, 64), (20, shade, 90)).save(tmp_path / f"bad{i}.png")
        lines.append(f'{{"prompt": "{PROMPTS[2 * i]}", "chosen": "{i}.png", "rejected": "bad{i}.png"}}')
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    source = str(tmp_path / "pairs.jsonl")
    config = DataConfig(source=source, resolution=64, cache_dir=str(tmp_path / "cache"), latents="mode")
    model = ModelConfig(path=str(tiny_sd3), precision="fp32")
    backbone = opened(tiny_sd3, precision="fp32")
    cache = build_cache(open_records(config), lambda: backbone, config, model)
    batch = cache.fetch(Draw(0, 0, [0, 1], [0, 1], 2))
    text = backbone.encode_prompts([PROMPTS[0], PROMPTS[2]])
    torch.testing.assert_close(batch.conditioning_chosen.embeddings, text.embeddings)
    torch.testing.assert_close(batch.conditioning_rejected.pooled, text.pooled)
    assert batch.chosen.shape == (2, *backbone.latent_shape)
    assert batch.conditioning_chosen.time_ids is None
    uncond = cache.unconditional(2)
    torch.testing.assert_close(uncond.embeddings, backbone.unconditional(2).embeddings)


def planned(folder, **model):
    config = RunConfig(
        name="x",
        model={"path": str(folder), "lora": {"rank": 4}, **model},
        data={"source": "scenes:preferences", "resolution": 64},
        trainer={"method": "dpo", "beta": 1.0},
        optim={"lr": 1e-4, "steps": 1, "batch_size": 1},
    )
    return network_size(config, torch.float32)


def test_a_plan_counts_weights_products_and_what_autograd_keeps(tiny_sd3):
    size = planned(tiny_sd3)
    backbone = opened(tiny_sd3)
    assert size.trained == sum(p.numel() for _, p in backbone.trainable_parameters())
    assert size.total == sum(p.numel() for p in backbone.core.parameters())
    kept = Kept({p.untyped_storage()._cdata for p in backbone.core.parameters()})
    text = torch.zeros(2, 77 + 256, 48), torch.zeros(2, 28)
    with (
        torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x),
        FlopCounterMode(display=False) as c,
    ):
        backbone.core(torch.randn(2, 4, 16, 16), *text, torch.zeros(2))
    assert size.activations == pytest.approx(kept.total(), rel=0.15)
    assert size.forward_flops == pytest.approx(c.get_total_flops(), rel=0.05)


def test_a_plan_knows_recomputation_and_four_bits(tiny_sd3):
    size, recomputed = planned(tiny_sd3), planned(tiny_sd3, gradient_checkpointing=True)
    assert recomputed.activations < 0.7 * size.activations
    assert recomputed.forward_flops == size.forward_flops
    core = opened(tiny_sd3, tune="full").core
    linear = [m for m in core.modules() if isinstance(m, torch.nn.Linear)]
    assert planned(tiny_sd3, quantize="nf4").quantized == sum(m.weight.numel() for m in linear)
    assert size.quantized == 0
