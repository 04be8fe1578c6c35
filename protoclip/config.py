"""Every setting of a run: a tree of frozen dataclasses; ``protoclip.flags`` makes the command line.

A default stands in one place, the field (``protoclip.fields``), with its meaning in the help text.
Flags carry OpenCLIP's names where OpenCLIP has the flag, the ProtoCLIP authors' where they have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protoclip.fields import option

PRECISIONS = ("auto", "fp32", "amp_bf16", "amp")


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    train_data: str = option(
        "builtin:emoji",
        "builtin:emoji, builtin:shapes[:N], a .csv/.tsv file, or webdataset shards such as "
        "'d/{000..012}.tar', globs, urls; sources joined by '::'",
    )
    val_data: str = option("", "data to evaluate on; default: the held-out part of built-in data")
    imagenet_val: str = option(
        "",
        "pictures with classes for zero-shot evaluation during training: a folder of class "
        "folders, a CLIP_benchmark folder, or built-in data",
    )
    train_num_samples: int = option(0, "use only the first N samples; 0: all", low=0)
    train_data_upsampling_factors: str = option(
        "",
        "weight of each source of --train-data, joined by '::'; with --dataset-resampled a "
        "chance of its shards, else how often an epoch sees it",
    )
    dataset_resampled: bool = option(
        False, "draw whole shards with replacement, as OpenCLIP does; else every sample once"
    )
    shuffle_buffer: int = option(
        -1,
        "go shard by shard and mix over so many samples; 0: mix everything; -1: 0 for files, "
        "10000 for urls",
        low=-1,
    )
    max_bad_fraction: float = option(
        0.05, "stop when more than this share of the samples cannot be used", low=0, high=1
    )
    check_data: bool = option(
        False, "read all of --train-data once, list what is wrong, and end without training"
    )
    csv_separator: str = option("\t", "separator of a .csv/.tsv file (default: tab)")
    csv_img_key: str = option("filepath", "column of the image path")
    csv_caption_key: str = option("title", "column of the caption")
    csv_encoding: str = option("utf-8", "of a .csv/.tsv file: latin-1, ...", flag="encoding")
    augmentation: str = option(
        "clip",
        "training transform: 'paper' (ProtoCLIP's), 'clip' (OpenCLIP's random crop) or 'none'",
        choices=("paper", "clip", "none"),
    )
    captions: str = option(
        "canonical",
        "of several captions: any ('random'), the first ('first'), or the first in half of the "
        "draws ('canonical')",
        choices=("random", "canonical", "first"),
    )
    workers: int = option(0, "processes that read images; 0: in the training process", low=0)


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str = option(
        "protoclip-tiny", "an OpenCLIP model name, a config .json, local-dir:PATH or hf-hub:ID"
    )
    pretrained: str = option("", "weights to start from: an OpenCLIP tag or a checkpoint file")
    force_image_size: int = option(
        0, "pixels, overrides the model's image size; 0: the model's", low=0
    )
    lock_image: bool = option(
        False, "freeze the image tower and train the text towards it (LiT); as OpenCLIP's flag"
    )
    add_projection_head: bool = option(
        True, "prototypes live behind a projection head, not in the embedding itself"
    )
    projection_hidden_dim: int = option(512, "width of the projection heads (paper: 2048)", low=1)
    use_bn_sync: bool = option(
        True, "batch norm of the projection heads over the samples of all ranks"
    )
    projection_dim: int = option(64, "output of the projection heads (paper: 128)", low=1)


@dataclass(frozen=True)
class EpisodeConfig:
    """Episodes and prototypes"""

    size: int = option(0, "samples per episode; 0: one epoch", flag="episode-size", low=0)
    replacement: bool = option(
        False, "draw samples with replacement, as the authors do", flag="episode-replacement"
    )
    features: str = option(
        "auto",
        "what is clustered: 'extract', a forward pass over the episode's samples (paper), or "
        "'reuse', the projections of the last episode's training, at no cost; 'auto': reuse, but "
        "extract with --ema-decay or without a warm-up, which need it",
        flag="episode-features",
        choices=("auto", "extract", "reuse"),
    )
    ema_decay: float = option(
        0.0, "extract with a moving average of the weights that decays so; 0: the model", low=0
    )
    clusters: tuple[int, ...] = option(
        (0,),
        "prototypes per source; several numbers: as many sets of prototypes at once; 0: a tenth "
        "of the episode",
        flag="k",
        low=0,
    )
    target_temperature: tuple[float, ...] = option(
        (0.01,),
        "of the soft targets of the internal prototypes, one for both or image's and text's; "
        "0: hard labels",
        low=0,
    )
    external_target_temperature: tuple[float, ...] = option(
        (0.0,),
        "the same for external teachers, one for all or one each; 0: hard labels (paper)",
        low=0,
    )
    pbt: bool = option(
        True, "prototype back translation; off: raw centroids of the other modality", flag="PBT"
    )
    normalize_centroids: bool = option(
        False, "centroids and prototypes of unit length (spherical k-means); off: plain means"
    )
    keep_empty: bool = option(
        False, "keep empty clusters as prototypes at zero, as the authors do", flag="keep-empty"
    )
    infonce_warmup: int = option(
        2, "first episodes without prototypes (paper: 1)", flag="infonce-warmup-epoch", low=0
    )
    lit_start: int = option(
        0,
        "episodes after which the image tower is frozen and only InfoNCE goes on (LiT); 0: never",
        low=0,
    )
    kmeans_init: str = option(
        "warm",
        "start k-means from the last episode's centroids, or anew",
        choices=("warm", "random", "k-means++"),
    )
    kmeans_backend: str = option(
        "auto",
        "who runs k-means: protoclip's fastest usable backend, one by name, or faiss (the paper's)",
        choices=("auto", "reference", "cpu", "cuda", "faiss"),
    )
    kmeans_max_iter: int = option(20, "iterations of k-means", low=1)
    kmeans_nredo: int = option(1, "restarts of k-means when not warm (paper: 3)", low=1)
    external_teacher: tuple[str, ...] = option(
        ("auto",),
        "features that tell which samples belong together, one teacher or several: .npz of "
        "python -m protoclip.teacher, .npy or .safetensors of [dataset, d], builtin:minilm, none, "
        "or auto (builtin:minilm on built-in data if installed)",
    )
    external_teacher_dim: int = option(
        64, "reduce a teacher's features to this many principal components; 0: keep all", low=0
    )

    @property
    def reuses(self) -> bool:
        """Whether training's own projections are clustered."""
        can = self.ema_decay == 0 and self.infonce_warmup >= 1
        return self.features == "reuse" or (self.features == "auto" and can)


@dataclass(frozen=True)
class LossConfig:
    """Losses"""

    w_clip: float = option(1.0, "weight of InfoNCE", low=0)
    w_proto: float = option(1.0, "weight of the internal prototype loss", low=0)
    w_proto_external: float = option(1.0, "weight of the external prototype loss", low=0)
    w_distill: float = option(
        0.0,
        "weight of distilling the teacher's similarities within the batch, without prototypes "
        "(the control experiment; with --w-proto 0 --w-proto-external 0)",
        low=0,
    )
    distill_temperature: float = option(0.1, "of the teacher's similarities", low=1e-6)


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation"""

    epochs: float = option(33.0, "passes over the data", low=0)
    max_steps: int = option(
        0, "stop after this many steps; the schedule shrinks with it; 0: no limit", low=0
    )
    batch_size: int = option(256, "pairs per forward pass of a process", low=2)
    accum_freq: int = option(
        1, "forward passes per step: the batch is batch size x this x processes", low=1
    )
    lr: float = option(1e-3, "peak learning rate", low=0)
    beta1: float = option(0.9, "AdamW", low=0, high=1)
    beta2: float = option(0.98, "AdamW", low=0, high=1)
    eps: float = option(1e-6, "AdamW", low=0)
    wd: float = option(
        0.2, "weight decay; none on vectors, scalars and projection heads (paper: 0.5)", low=0
    )
    warmup: float = option(
        0.1,
        "linear warm-up of the learning rate: a fraction of the run, or steps if 1 or more",
        low=0,
    )
    lr_scheduler: str = option("cosine", "after the warm-up", choices=("cosine", "const"))
    grad_clip_norm: float = option(10.0, "largest norm of the gradient; 0: no clipping", low=0)


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    name: str = option("", "folder under --logs; default: date and time, method, seed")
    logs: str = option("logs", "where run folders go")
    seed: int = option(0, "same seed, same machine, same run", low=0, high=2**31)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    precision: str = option(
        "auto", "auto: amp_bf16 on a GPU that has it, else fp32", choices=PRECISIONS
    )
    dist_backend: str = option(
        "auto",
        "of torchrun or srun processes; auto: nccl on GPUs, gloo on CPUs",
        choices=("auto", "nccl", "gloo"),
    )
    dist_timeout: float = option(
        1800.0, "seconds to wait for another process before naming it and ending", low=1
    )
    log_every_n_steps: int = option(1, "lines of metrics.jsonl, points of the curves", low=1)
    val_frequency: float = option(
        5.0, "epochs between quick evaluations; 0: only at the end", low=0
    )
    zeroshot_frequency: float = option(
        2.0, "epochs between zero-shot evaluations on --imagenet-val; 0: none", low=0
    )
    save_frequency: int = option(0, "epochs between kept checkpoints; 0: only the last", low=0)
    save_every: str = option(
        "",
        "write epoch_latest.pt every so often: 500steps, 10m, 2h; default: at the end and on "
        "SIGTERM or SIGUSR1",
    )
    resume: str = option(
        "",
        "go on exactly where a run stopped: its folder, one of its checkpoints, or auto (the run "
        "--name, else the newest unfinished one with these settings, else a new one); of a run of "
        "OpenCLIP's trainer: a new run from its weights, optimiser and epoch",
    )
    max_bad_steps: int = option(
        10, "stop after so many steps in a row with a loss or gradient that is not finite", low=1
    )
    report_to: str = option(
        "tensorboard",
        "where scalars go besides metrics.jsonl",
        choices=("tensorboard", "wandb", "tensorboard,wandb", "none"),
    )
    wandb_project_name: str = option("protoclip", "the project of --report-to wandb")


@dataclass(frozen=True)
class TrainConfig:
    """All of a run; written to config.json, read back by ``from_dict``."""

    method: str = option(
        "protoclip",
        "protoclip, or clip: InfoNCE only, same everything else",
        choices=("protoclip", "clip"),
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
