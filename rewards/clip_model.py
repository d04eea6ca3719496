"""CLIP behind one face, from open_clip or transformers: unit-length embeddings of pictures and prompts.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import DiffalignError, did_you_mean
from diffalign.precision import at_least_float32
from diffalign.rewards.preprocess import ClipPreprocess
from diffalign.rewards.weights import load_exactly, read_state_dict

Tokens = tuple[Tensor, ...]

BACKBONES = {
    "openai/clip-vit-large-patch14": "CLIP ViT-L/14 (openai)",
    "openai/clip-vit-base-patch32": "CLIP ViT-B/32 (openai)",
    "openai/clip-vit-base-patch16": "CLIP ViT-B/16 (openai)",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "CLIP ViT-H/14 (laion2b)",
    "ViT-L-14@openai": "CLIP ViT-L/14 (openai)",
    "ViT-L-14-quickgelu@openai": "CLIP ViT-L/14 (openai)",
    "ViT-B-32@openai": "CLIP ViT-B/32 (openai)",
    "ViT-B-16@openai": "CLIP ViT-B/16 (openai)",
    "ViT-H-14@laion2b_s32b_b79k": "CLIP ViT-H/14 (laion2b)",
}


class ClipModel(nn.Module):
    """A CLIP network with its tokenizer and preprocessing.

    The embeddings of prompts are kept per distinct prompt, as long as the network is frozen.

    Fields:
        network: has `encode_image(pixels)`, `encode_text(*tokens)` and the parameter `logit_scale`.
        preprocess: pictures in [0, 1] to pixels of the network; may be replaced. width: of the embeddings.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenize: Callable[[list[str]], Tokens],
        preprocess: ClipPreprocess,
        width: int,
        cache_size: int = 4096,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.tokenize = tokenize
        self.preprocess = preprocess
        self.width = width
        self.cache_size = cache_size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def logit_scale(self) -> Tensor:
        """The learned log of the inverse temperature, as checkpoints store it: `exp(logit_scale)` is about 100."""
        return self.network.logit_scale

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors `[B, D]`, float32 (float64 for a float64 network), of pictures `[B, 3, H, W]` in [0, 1]."""
        weight = next(self.network.parameters())
        pixels = self.preprocess(images.to(weight.device))
        return _unit(self.network.encode_image(pixels.to(weight.dtype)))

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors `[B, D]`, float32 (float64 for a float64 network), of `B` prompts; cut after the context length.

        Gradients reach the text tower only while it is trainable; the cache is not used then.
        """
        if any(parameter.requires_grad for parameter in self.network.parameters()):
            self._cache.clear()
            return self._encode_texts(list(prompts))
        distinct = list(dict.fromkeys(prompts))
        known = {prompt: self._cache[prompt] for prompt in distinct if prompt in self._cache}
        new = [prompt for prompt in distinct if prompt not in known]
        if new:
            # Tensors made in inference mode cannot take part in later gradients, so they must not get into the cache.
            with torch.inference_mode(False), torch.no_grad():
                known.update(zip(new, self._encode_texts(new), strict=True))
        for prompt in distinct:
            self._cache[prompt] = known[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return torch.stack([known[prompt] for prompt in prompts])

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine `[B]` between each picture and its own prompt."""
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)

    def _encode_texts(self, prompts: list[str]) -> Tensor:
        device = next(self.network.parameters()).device
        return _unit(self.network.encode_text(*(tokens.to(device) for tokens in self.tokenize(prompts))))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ClipModel:
        self._cache.clear()  # another device or precision
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache.clear()  # other weights
        super()._load_from_state_dict(*args, **kwargs)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(at_least_float32(features), dim=-1)


def load_clip(source: str, pretrained: str | None = None, processor: str | None = None) -> ClipModel:
    """A frozen CLIP in float32.

    Args:
        source: a folder (`open_clip_config.json` makes it open_clip's, `config.json` transformers'), a
            transformers hub id (`openai/clip-vit-large-patch14`), `hf-hub:ID` for an open_clip repository, or the
            name of an open_clip architecture (`ViT-H-14`), alone or as `NAME@PRETRAINED`.
        pretrained: for an architecture name: a tag of open_clip, or a local file of weights.
        processor: hub id or folder of tokenizer and preprocessing where a transformers model comes without them.

    Raises:
        DiffalignError: none of these, unreachable, or weights that do not fit.
    """
    folder = Path(source.removeprefix("local-dir:"))
    if folder.is_dir():
        return _from_folder(folder, processor)
    if source.startswith("hf-hub:"):
        return _frozen(_open_clip(source))
    name, _, tag = source.partition("@")
    import open_clip

    if name in open_clip.list_models():
        return _frozen(_open_clip_architecture(name, pretrained or tag or None))
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return _frozen(_transformers(source, processor))
    hint = did_you_mean(name, open_clip.list_models())
    raise DiffalignError(
        f"no CLIP {source!r}: expected an existing folder, a hub id such as 'openai/clip-vit-large-patch14', or an "
        f"architecture of open_clip such as 'ViT-H-14'.{hint}"
    )


def backbone_name(source: str, pretrained: str | None = None) -> str:
    """How `Facts.backbone` calls a CLIP: one name for the same network, whichever library it comes from."""
    full = f"{source}@{pretrained}" if pretrained else source.removeprefix("hf-hub:")
    return BACKBONES.get(full, f"CLIP {full}")


def _frozen(model: ClipModel) -> ClipModel:
    model.requires_grad_(False)
    return model.eval()


def _from_folder(folder: Path, processor: str | None) -> ClipModel:
    if (folder / "open_clip_config.json").is_file():
        return _frozen(_open_clip(f"local-dir:{folder}"))
    if (folder / "config.json").is_file():
        return _frozen(_transformers(str(folder), processor))
    raise DiffalignError(
        f"folder {str(folder)!r} holds no CLIP: expected open_clip_config.json (open_clip) or config.json "
        "(transformers)"
    )


def _open_clip(source: str, pretrained: str | None = None, **options: Any) -> ClipModel:
    import open_clip

    try:
        # without `require_pretrained`, missing weights would only be logged and the network left random
        network = open_clip.create_model(source, pretrained, require_pretrained=True, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise DiffalignError(f"open_clip cannot load {source!r}: {str(error).splitlines()[0]}") from error
    return _around_open_clip(network, source, open_clip.get_model_preprocess_cfg(network))


def _around_open_clip(network: nn.Module, source: str, settings: Mapping[str, Any]) -> ClipModel:
    import open_clip

    tokenizer = open_clip.get_tokenizer(source)
    side = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    preprocess = ClipPreprocess(
        size=side,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        resize=settings["resize_mode"],
        interpolation=settings["interpolation"],
    )
    width = open_clip.get_model_config(source)["embed_dim"]
    return ClipModel(network, lambda prompts: (tokenizer(prompts),), preprocess, width)


def _open_clip_architecture(name: str, pretrained: str | None) -> ClipModel:
    import open_clip

    if pretrained is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise DiffalignError(
            f"CLIP {name!r} needs weights: give a local file or a tag of open_clip as `pretrained` (tags: {tags})"
        )
    if Path(pretrained).is_file():
        return open_clip_from_file(name, pretrained)
    settings = open_clip.get_pretrained_cfg(name, pretrained)
    if not settings:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise DiffalignError(
            f"{pretrained!r} is neither a file nor weights that open_clip has for {name!r}; "
            f"its tags: {', '.join(tags) or 'none'}.{did_you_mean(pretrained, tags)}"
        )
    # open_clip only warns when the weights were trained with the other GELU, and then computes wrong embeddings.
    return _open_clip(name, pretrained, force_quick_gelu=bool(settings.get("quick_gelu", False)))


def open_clip_from_file(name: str, path: str | Path) -> ClipModel:
    """A frozen CLIP of an open_clip architecture, in float32, with weights from a local file.

    Args:
        name: architecture of open_clip, or `local-dir:FOLDER` with an `open_clip_config.json`. OpenAI's own weights
            need the `-quickgelu` architectures.
        path: see `read_state_dict`.

    Raises:
        DiffalignError: the file is unreadable or does not fit the architecture.
    """
    network = empty_open_clip(name)
    state = {key: value for key, value in read_state_dict(path).items() if not key.endswith("attn_mask")}
    load_exactly(network, state, path)
    return _frozen(_around_open_clip(network.float(), name, _preprocess_settings(name, network)))


def empty_open_clip(name: str) -> nn.Module:
    """The network of an open_clip architecture with parameters on the meta device, which take no memory.

    Raises:
        DiffalignError: open_clip knows no such architecture, or it is not a plain CLIP.
    """
    import open_clip
    from accelerate import init_empty_weights

    try:
        config = open_clip.get_model_config(name)
    except OSError as error:
        raise DiffalignError(f"open_clip cannot build {name!r}: {error}") from error
    if config is None or "multimodal_cfg" in config:
        hint = did_you_mean(name, open_clip.list_models())
        raise DiffalignError(f"{name!r} is no CLIP architecture of open_clip; 'ViT-H-14' is one.{hint}")
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    # Buffers (the causal mask) are not in checkpoints; they must be real.
    with init_empty_weights(include_buffers=False):
        return kind(**config)


def _preprocess_settings(name: str, network: Any) -> dict[str, Any]:
    """What open_clip would use for an architecture: its defaults, or those written in a `local-dir:` folder."""
    from open_clip.transform import PreprocessCfg

    settings = asdict(PreprocessCfg()) | {"size": network.visual.image_size}
    if name.startswith("local-dir:"):
        written = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        settings |= json.loads(written.read_text(encoding="utf-8")).get("preprocess_cfg", {})
    return settings


class _TransformersNetwork(nn.Module):
    """A transformers CLIPModel with open_clip's method names."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        return _projected(self.model.get_image_features(pixel_values=pixels))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _projected(self.model.get_text_features(input_ids=ids, attention_mask=mask))


def _projected(output: Any) -> Tensor:
    """transformers before 5 returns the projected embedding, since 5 an object that holds it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _transformers(source: str, processor: str | None) -> ClipModel:
    from transformers import AutoTokenizer, CLIPModel

    side = processor or source
    try:
        model, loading = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(side)
        preprocess = _transformers_preprocess(side, model.config.vision_config.image_size)
    except (OSError, ValueError, RuntimeError) as error:
        parts = f"{source!r} with the tokenizer of {side!r}" if side != source else repr(source)
        raise DiffalignError(
            f"transformers cannot load a CLIP from {parts}: {str(error).splitlines()[0]}. Expected local folders or "
            "reachable hub ids"
        ) from error
    if loading["missing_keys"]:
        first = sorted(loading["missing_keys"])[0]
        raise DiffalignError(
            f"the weights of {source!r} lack {len(loading['missing_keys'])} tensors (first: {first})"
        )
    length = model.config.text_config.max_position_embeddings

    def tokenize(prompts: list[str]) -> Tokens:
        batch = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    return ClipModel(_TransformersNetwork(model), tokenize, preprocess, model.config.projection_dim)


def _transformers_preprocess(source: str, image_size: int) -> ClipPreprocess:
    from transformers import CLIPImageProcessor

    try:
        settings = CLIPImageProcessor.from_pretrained(source)
    except OSError:
        return ClipPreprocess(size=image_size, crop="floor")
    return ClipPreprocess(
        size=settings.crop_size["height"],
        mean=tuple(settings.image_mean),
        std=tuple(settings.image_std),
        shorter=settings.size["shortest_edge"],
        crop="floor",
    )
