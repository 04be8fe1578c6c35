"""Any OpenCLIP model with ProtoCLIP's projection heads and second temperature.

OpenCLIP pads every caption to the whole context, 77 tokens for a dozen words, and runs the text
tower over all of it. Under a causal mask nothing after a caption's end reaches its feature, so
``encode_text`` skips those positions: the same feature up to rounding, in a fraction of the time.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip.common.files import torch_reason
from protoclip.common.json_text import parse_json
from protoclip.common.waits import Wait
from protoclip.data.feature_pairs import Means
from protoclip.data.images import Transform, build_transform
from protoclip.distributed import GlobalBatchNorm1d, find_rank
from protoclip.heads import Heads
from protoclip.settings.config import ModelConfig

CONFIG_FOLDER = Path(__file__).parent / "model_configs"
MAX_LOG_SCALE = math.log(100)
INITIAL_LOG_SCALE = math.log(1 / 0.07)
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # OpenCLIP's --siglip
HUB_TIMEOUT = 10.0  # seconds
STEP = 8  # token tensors are padded to multiples of it, so that kernels see few shapes
COMPILED_STEP = 32  # the same under --torchcompile, which compiles the text tower for each length
MOST_REMEMBERED = 32_768  # captions whose tokens are kept, of 8 bytes a token


@dataclass(frozen=True)
class Encoded:
    """The features of a batch from both towers; rows are not normalised."""

    image: Tensor  # [B, D]
    text: Tensor  # [B, D]

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        """The rows of several batches, one after the other."""
        return cls(
            image=torch.cat([part.image for part in parts]),
            text=torch.cat([part.text for part in parts]),
        )

    def detached(self) -> Encoded:
        """The same rows without a graph."""
        return Encoded(self.image.detach(), self.text.detach())


class Projection(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear: [B, width] -> [B, out]; docs/algorithm.md §1's g."""

    def __init__(self, width: int, hidden: int, out: int, sync_batch_norm: bool = True) -> None:
        norm = GlobalBatchNorm1d if sync_batch_norm else nn.BatchNorm1d
        super().__init__(nn.Linear(width, hidden), norm(hidden), nn.ReLU(), nn.Linear(hidden, out))


class ProtoModel(nn.Module):
    """An OpenCLIP model, or heads on stored features, and what ProtoCLIP adds.

    The state dict of ``clip`` is OpenCLIP's own and loads there. The heads and
    ``proto_log_scale`` (a logarithm, like OpenCLIP's ``logit_scale``) are outside it.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], Tensor] | None,
        siglip: bool = False,
        token_step: int = STEP,
    ) -> None:
        import open_clip  # late: whoever groups features needs neither it nor torchvision

        super().__init__()
        self.clip: Any = clip
        self.siglip = siglip
        if not siglip and getattr(clip, "logit_bias", None) is not None:
            self.clip.logit_bias.requires_grad_(False)  # softmax ignores it
        self.tokenizer = tokenizer  # OpenCLIP's own; None: the model takes rows of features
        self.short_tokenizer = tokenizer  # for encode and encode_text
        if tokenizer is not None and can_shorten(clip):
            self.short_tokenizer = ShortTokenizer(tokenizer, _end_id(clip), token_step)
        self.image_head: Projection | None = None
        self.text_head: Projection | None = None
        self.proto_log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self.image_locked = self.text_locked = False
        visual: Any = clip.visual
        size = visual.image_size
        self.image_size: int = size[0] if isinstance(size, (tuple, list)) else size
        self.mean: tuple[float, ...] = tuple(visual.image_mean or open_clip.OPENAI_DATASET_MEAN)
        self.std: tuple[float, ...] = tuple(visual.image_std or open_clip.OPENAI_DATASET_STD)

    def lock_image(self) -> None:
        """Freeze the image tower from now on: no gradient, no dropout, fixed running statistics."""
        self.image_locked = True
        self.clip.visual.requires_grad_(False).eval()

    def lock_text(self) -> None:
        """Freeze the text tower from now on."""
        from open_clip.transformer import lock_text_tower

        self.text_locked = True
        if hasattr(self.clip, "text"):
            self.clip.text.requires_grad_(False).eval()
        else:  # OpenCLIP's CLIP has no text module, only its parts; none of them is random
            lock_text_tower(self.clip)

    def train(self, mode: bool = True) -> ProtoModel:
        super().train(mode)
        if self.image_locked:
            self.clip.visual.eval()
        if self.text_locked and hasattr(self.clip, "text"):
            self.clip.text.eval()
        return self

    def transform(self, augmentation: str = "none") -> Transform | None:
        """How pictures become the model's input; None: it takes rows of features."""
        if not self.image_size:
            return None
        return build_transform(self.image_size, self.mean, self.std, augmentation)

    def example(self, batch: int) -> tuple[Tensor, Tensor]:
        """A batch of zeros of the shapes that ``encode`` takes."""
        if isinstance(self.clip, Heads):
            return (
                torch.zeros(batch, self.clip.visual.width),
                torch.zeros(batch, self.clip.text.width),
            )
        length = getattr(self.clip, "context_length", None) or 77
        return (
            torch.zeros(batch, 3, self.image_size, self.image_size),
            torch.zeros(batch, length, dtype=torch.int64),
        )

    def encode(self, image: Tensor, tokens: Tensor) -> Encoded:
        """u of both modalities, not normalised: [B, 3, H, W] and int64 [B, L], or rows of features,
        -> [B, D] each."""
        return Encoded(self.clip.encode_image(image), self.encode_text(tokens))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """u of texts, not normalised: int64 [B, L] of either tokenizer -> [B, D]."""
        return encode_text(self.clip, tokens)

    def project(self, encoded: Encoded) -> Encoded:
        """h of both modalities, unit rows, fp32 [B, Dh]; without heads, normalised embeddings."""
        if self.image_head is not None and self.text_head is not None:
            encoded = Encoded(self.image_head(encoded.image), self.text_head(encoded.text))
        return Encoded(
            image=F.normalize(encoded.image.float(), dim=-1),
            text=F.normalize(encoded.text.float(), dim=-1),
        )

    def forward(
        self, image: Tensor, tokens: Tensor, project: bool = True
    ) -> tuple[Encoded, Encoded | None]:
        """Embeddings and, if ``project``, projections in one call, as DDP requires."""
        encoded = self.encode(image, tokens)
        return encoded, self.project(encoded) if project else None

    @property
    def projection_dim(self) -> int:
        """Dh, the width of a projection."""
        if self.text_head is not None:
            return int(self.text_head[-1].out_features)  # type: ignore[arg-type]
        with torch.no_grad():
            tokens = self.example(1)[1].to(self.proto_log_scale.device)
            return self.clip.encode_text(tokens).shape[-1]

    @property
    def logit_scale(self) -> Tensor:
        """InfoNCE's multiplier, exp of the parameter."""
        return self.clip.logit_scale.exp()

    @property
    def logit_bias(self) -> Tensor | None:
        """What SigLIP's loss adds to every logit; None: the loss is InfoNCE."""
        return self.clip.logit_bias if self.siglip else None

    @property
    def proto_logit_scale(self) -> Tensor:
        """The prototype terms' multiplier, exp of the parameter."""
        return self.proto_log_scale.exp()

    @torch.no_grad()
    def centre(self, means: Means) -> None:
        """Have the heads subtract the means of the rows that they will be trained on."""
        assert isinstance(self.clip, Heads)
        self.clip.visual.mean.copy_(means.image)
        self.clip.text.mean.copy_(means.text)

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep both multipliers in [1, 100]; call after every optimiser step."""
        self.clip.logit_scale.clamp_(0, MAX_LOG_SCALE)
        self.proto_log_scale.clamp_(0, MAX_LOG_SCALE)

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds besides OpenCLIP's state dict; "heads" includes their scale."""
        heads = {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}
        return {"heads": heads, "preprocess": self.preprocess()}

    def preprocess(self) -> dict[str, Any]:
        """How pictures are prepared for the model, with OpenCLIP's keys; {}: it takes none."""
        if not self.image_size:
            return {}
        settings = {"mean": list(self.mean), "std": list(self.std)}
        of_openclip = getattr(self.clip.visual, "preprocess_cfg", None) or {}
        for key in ("interpolation", "resize_mode"):
            if key in of_openclip:
                settings[key] = of_openclip[key]
        return settings

    def load_state(self, payload: dict[str, Any]) -> None:
        """Load the weights of a checkpoint that ``protoclip.train`` wrote; ValueError if they
        belong to another model or something is missing."""
        try:
            clip = {f"clip.{key}": value for key, value in payload["state_dict"].items()}
            self.load_state_dict(clip | payload["protoclip"]["heads"])
            # Pretrained weights may have come with a mean and deviation of their own.
            saved = payload["protoclip"].get("preprocess", {})
            self.mean = tuple(saved.get("mean", self.mean))
            self.std = tuple(saved.get("std", self.std))
            of_openclip = getattr(self.clip.visual, "preprocess_cfg", None) or {}
            self.clip.visual.preprocess_cfg = {**of_openclip, **saved}
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"checkpoint: it does not fit this model ({reason})") from error


def register_configs(model: str = "", *, audio: bool = False) -> str:
    """Register protoclip's models and the config file ``model`` with OpenCLIP; returns the name.

    Args:
        audio: whether the model may have an audio tower instead of an image tower, as CLAP.
    Raises:
        ValueError: not a valid config file, which OpenCLIP would skip silently or crash on.
    """
    import open_clip

    if "protoclip-tiny" not in open_clip.list_models():
        open_clip.add_model_config(CONFIG_FOLDER)
    if not model.endswith(".json"):
        return model
    try:
        config = parse_json(Path(model).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model: expected an OpenCLIP config in {model}: {error}") from error
    found = set(config if isinstance(config, dict) else ())
    tower = "audio_cfg" if audio and "audio_cfg" in found else "vision_cfg"
    if missing := sorted({"embed_dim", tower, "text_cfg"} - found):
        raise ValueError(f"--model: the OpenCLIP config {model} lacks {', '.join(missing)}")
    open_clip.add_model_config(Path(model))
    return Path(model).stem


def check_model(config: ModelConfig) -> str:
    """The model's name in OpenCLIP; ValueError if there is no such model or no such weights."""
    import open_clip

    name = register_configs(config.model)
    pretrained = config.pretrained
    models = open_clip.list_models()
    if not name.startswith(("local-dir:", "hf-hub:")) and name not in models:
        near = difflib.get_close_matches(name, models, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise ValueError(f"--model: OpenCLIP knows no model {name!r}; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and not Path(pretrained).is_file() and pretrained.lower() not in tags:
        hint = f"its tags are {', '.join(tags)}" if tags else "this model has no tags"
        raise ValueError(f"--pretrained: {pretrained!r} is not a file or a tag of {name}; {hint}")
    return name


def _refuse_code(name: str) -> None:
    """ValueError if the model's config asks to run code that comes with its tokenizer."""
    import open_clip

    settings: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # OpenCLIP says what is wrong with a config, or has none
        settings = open_clip.get_model_config(name) or {}  # also of a folder, or of the hub
    arguments = settings.get("text_cfg", {}).get("tokenizer_kwargs") or {}
    if arguments.get("trust_remote_code"):
        raise ValueError(
            "its config asks to run code that comes with its tokenizer (trust_remote_code), which "
            "protoclip never does; use another model, or a copy without that setting"
        )


def _create(name: str, config: ModelConfig, device: str) -> Any:
    """OpenCLIP's model with its weights, without a logit_bias that only the weights have."""
    import open_clip

    create = partial(
        open_clip.create_model,
        name,
        pretrained=config.pretrained or None,
        force_image_size=config.force_image_size or None,
        force_context_length=config.force_context_length or None,
        device=device,
        output_dict=True,
    )
    if config.siglip:
        return create(**SIGLIP)
    try:
        return create()
    except (AttributeError, RuntimeError) as error:
        if "Failed to download" in str(error):
            raise
        # Weights of OpenCLIP's --siglip? Neither features nor InfoNCE use the bias.
        clip = create(init_logit_bias=0.0)
    clip.logit_bias = None
    return clip


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[str]:
    """Ask the hub once whether it can be reached; if not, take files from the cache alone, instead
    of six attempts at each, and yield the reason."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    reason = ""
    was_offline = constants.HF_HUB_OFFLINE
    if not was_offline:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
        except Exception as error:  # of the library that huggingface_hub uses
            constants.HF_HUB_OFFLINE = True
            reason = f"{constants.ENDPOINT} cannot be reached ({error})"
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def build_model(config: ModelConfig, device: str = "cpu") -> ProtoModel:
    """Build the model of a config: heads if it has the widths of stored features, else OpenCLIP's.
    Weights that are not pretrained use torch's generator.

    ``device`` "meta", inside ``torch.device("meta")``, gives only the shapes.

    Raises:
        ValueError: no such model, config, checkpoint or tag.
    """
    clip: nn.Module
    tokenizer: Callable[[list[str]], Tensor] | None = None
    if config.image_width:
        clip = Heads(
            config.image_width,
            config.text_width,
            config.embed_dim,
            kind=config.head,
            depth=config.head_depth,
            siglip=config.siglip,
        )
    else:
        clip, tokenizer = _open_clip(config, device)
    token_step = COMPILED_STEP if config.torchcompile else STEP
    model = ProtoModel(clip, tokenizer, config.siglip, token_step)
    if config.add_projection_head:
        text_head = Projection(
            model.projection_dim,  # without heads, the columns of an embedding
            config.projection_hidden_dim,
            config.projection_dim,
            config.use_bn_sync,
        )
        # The image head starts as a copy, as in the paper: equal features, equal projections.
        model.image_head = copy.deepcopy(text_head)
        model.text_head = text_head
    if config.grad_checkpointing:
        model.clip.set_grad_checkpointing()
    if config.lock_image:
        model.lock_image()
    if config.lock_text:
        model.lock_text()
    return model


def _open_clip(config: ModelConfig, device: str) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """OpenCLIP's model and its tokenizer; ValueError as in ``build_model``."""
    import open_clip

    name = check_model(config)
    logging.disable(logging.ERROR)  # OpenCLIP logs every step and its own errors
    unreachable = ""
    try:
        with contextlib.ExitStack() as stack:
            if name.startswith("hf-hub:") or open_clip.get_pretrained_cfg(name, config.pretrained):
                unreachable = stack.enter_context(offline_if_unreachable())
            _refuse_code(name)
            with Wait(f"loading {name}"):
                clip = _create(name, config, device)
            length = getattr(clip, "context_length", None)
            tokenizer = open_clip.get_tokenizer(name, context_length=length)
    except Exception as error:  # torn files and bad configs raise any error
        reason = torch_reason(error)
        if unreachable:
            reason = f"{unreachable}, and the cache does not hold all files; give a weights file"
        if os.path.isfile(config.pretrained):
            reason += "; is the file complete, and a checkpoint of this model?"
        raise ValueError(
            f"--model {config.model} --pretrained {config.pretrained!r}: {reason}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    if min(getattr(clip.visual, "grid_size", (1,))) < 1:
        raise ValueError("--force-image-size: expected at least one patch of the model in pixels")
    return clip, tokenizer


def put_channels_last(model: ProtoModel, device: torch.device) -> None:
    """Store a convolutional image tower's weights channels-last, the native layout of oneDNN and of
    tensor cores; on a CPU the numbers in features and checkpoints do not change."""
    visual = model.clip.visual
    # A ViT has one convolution, whose patches are flattened right after it.
    if (
        device.type in ("cpu", "cuda")
        and sum(isinstance(m, nn.Conv2d) for m in visual.modules()) > 1
    ):
        visual.to(memory_format=torch.channels_last)


@torch.no_grad()
def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser's moments the memory layout of their weights: a checkpoint may come from a
    device with another layout, and the fused update reads both in memory order."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def can_shorten(clip: nn.Module) -> bool:
    """Whether ``clip``'s text feature ignores everything after the caption's end."""
    import open_clip

    return (
        type(clip) is open_clip.CLIP
        and isinstance(clip.attn_mask, Tensor)  # causal: OpenCLIP has no other there
        and (clip.text_pool_type == "argmax" or _end_id(clip) is not None)
    )


def _end_id(clip: Any) -> int | None:
    """The token whose position gives the feature; None: the largest token."""
    return getattr(clip, "text_eos_id", None) if clip.text_pool_type == "eos" else None


def _ends(tokens: Tensor, end_id: int | None) -> Tensor:
    """The position from which each caption's feature is read, int64 [B]."""
    return (tokens if end_id is None else torch.eq(tokens, end_id).int()).argmax(dim=1)


@dataclass(frozen=True)
class ShortTokenizer:
    """OpenCLIP's tokenizer without the padding that all captions of a call share."""

    tokenizer: Callable[[list[str]], Tensor]
    end_id: int | None
    step: int = STEP
    # Captions come again every epoch, and splitting one takes as long as cropping a picture.
    remembered: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, texts: list[str]) -> Tensor:
        """-> int64 [B, L], L a multiple of ``step`` or the whole context."""
        tokens = self._tokenize(texts)
        length = int(_ends(tokens, self.end_id).max()) + 1
        return tokens[:, : -(-length // self.step) * self.step]

    def __reduce__(self) -> tuple[Any, ...]:  # a worker remembers its own captions
        return ShortTokenizer, (self.tokenizer, self.end_id, self.step)

    def _tokenize(self, texts: list[str]) -> Tensor:
        """The tokenizer's result, int64 [B, context]."""
        if getattr(self.tokenizer, "reduction_fn", None) is not None:  # chooses words at random
            return self.tokenizer(texts)
        if new := [text for text in dict.fromkeys(texts) if text not in self.remembered]:
            if len(self.remembered) + len(new) > MOST_REMEMBERED:
                self.remembered.clear()
                new = list(dict.fromkeys(texts))
            self.remembered.update(zip(new, self.tokenizer(new), strict=True))
        return torch.stack([self.remembered[text] for text in texts])


def encode_text(clip: Any, tokens: Tensor) -> Tensor:
    """``clip.encode_text`` of captions of any length up to the context: int64 [B, L] -> [B, D].

    On the CPU, where reading lengths is free, a few long captions are encoded separately if that
    saves a tenth of the token positions.
    """
    if not can_shorten(clip):
        return clip.encode_text(tokens)
    tracing = type(tokens) is not Tensor or torch.compiler.is_compiling()
    if not len(tokens) or tokens.device.type != "cpu" or tracing:
        return _encode(clip, [tokens])[0]
    lengths, order = ((_ends(tokens, _end_id(clip)) // STEP + 1) * STEP).sort(stable=True)
    # Token positions to encode if the shortest 1, 2, ... captions are encoded separately.
    num_short = torch.arange(1, len(order) + 1)
    positions = num_short * lengths + (len(order) - num_short) * lengths[-1]
    best = int(positions.argmin())
    split = best + 1 if positions[best] < 0.9 * positions[-1] else 0
    parts = [tokens[order[split:], : int(lengths[-1])]]
    if split:
        parts.insert(0, tokens[order[:split], : int(lengths[split - 1])])
    return torch.cat(_encode(clip, parts))[order.argsort()]


def _encode(clip: Any, parts: Sequence[Tensor]) -> list[Tensor]:
    """OpenCLIP 3's ``CLIP.encode_text`` of each part, with only as many positions as it has tokens.

    All parts are looked up at once: each lookup's gradient has the size of the vocabulary.
    """
    if len(parts) == 1 and parts[0].shape[1] == clip.positional_embedding.shape[0]:
        return [clip.encode_text(parts[0])]
    ids = torch.cat([tokens.flatten() for tokens in parts])
    embedded = clip.token_embedding(ids).split([tokens.numel() for tokens in parts])
    return [
        _encode_embedded(clip, tokens, rows.view(*tokens.shape, -1))
        for tokens, rows in zip(parts, embedded, strict=True)
    ]


def _encode_embedded(clip: Any, tokens: Tensor, embedded: Tensor) -> Tensor:
    """The features of tokens [B, L] with their embeddings [B, L, width]."""
    length = tokens.shape[1]
    dtype = clip.transformer.get_cast_dtype()
    x = embedded.to(dtype) + clip.positional_embedding[:length].to(dtype)
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x)
    x = x[torch.arange(len(x), device=x.device), _ends(tokens, _end_id(clip))]
    projection = clip.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def choose_device(name: str) -> torch.device:
    """The device that a flag names; "auto": a GPU if there is one. It becomes torch's current one.

    ValueError: no such device.
    """
    remedy = "use --device auto"
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and gpus and (info := find_rank()).world_size > 1:
        # Each process of a machine has its own GPU. SLURM's --gpus-per-task shows it no other.
        shows_one = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        name = f"cuda:{0 if shows_one else info.local_rank}"
        remedy = "start no more processes on a machine than it has GPUs"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cuda" and (device.index or 0) < gpus:
        if device.index is not None:
            torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(
            f"--device: expected cpu or one of the {gpus} CUDA devices that torch can use here, "
            f"got {name}; {remedy}"
        )
    return device


def processor_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 (AVX-512 BF16 or AMX).

    With them towers train 1.1 to 1.9 times as fast as in fp32 (docs/speed.md); without, slower.
    """
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public names
    return any(getattr(torch.cpu, unit, bool)() for unit in units)


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32", "amp_bf16" or "amp" for a flag that may say "auto"."""
    if name == "auto":
        on_gpu = device.type == "cuda"
        if on_gpu:
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = processor_multiplies_bf16()
        return "amp_bf16" if fast else "fp32"
    if name == "amp" and device.type == "cpu":
        if find_rank().rank == 0:
            note = "fp16 needs a GPU; using fp32 (amp_bf16 works on CPUs too)"
            print(f"note: --precision amp: {note}", file=sys.stderr)
        return "fp32"
    return name


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """A function that returns the autocast context of a forward pass."""
    if precision == "fp32":
        return nullcontext
    dtype = torch.float16 if precision == "amp" else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=dtype)
