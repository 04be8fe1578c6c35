"""Training on several ranks: the losses of one rank, and the same state everywhere."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import TINY, on_ranks

from protoclip import distributed
from protoclip.distributed import find_rank
from protoclip.model import Encoded
from protoclip.run_folder import NullRunFolder

STEPS, BATCH = 5, 24


class Recorder(NullRunFolder):
    """A run folder that keeps the metrics, and the first checkpoint as a resumed run reads it."""

    def __init__(self, path):
        super().__init__(path)
        self.lines, self.kept = [], None

    def metrics(self, step, samples, scalars):
        self.lines.append({"step": step, **scalars})

    def checkpoint(self, payload, epoch):
        if self.kept is None:
            buffer = io.BytesIO()
            torch.save(payload, buffer)
            buffer.seek(0)
            self.kept = torch.load(buffer, weights_only=True)


def stripped(lines):
    """Without what the clock says."""
    return [
        {k: v for k, v in line.items() if "second" not in k} for line in lines if "loss" in line
    ]


def arguments(folder, *flags):
    return [
        *("--train-data", "builtin:shapes:64", "--model", str(folder / "tiny.json")),
        *("--projection-hidden-dim", "24", "--projection-dim", "8", "--lr", "1e-3"),
        *("--external-teacher", str(folder / "teacher.npy"), "--external-teacher-dim", "0"),
        *("--k", "6", "--episode-size", str(2 * BATCH), "--infonce-warmup-epoch", "1"),
        *("--report-to", "none", "--val-frequency", "0", "--max-steps", str(STEPS), *flags),
    ]  # fmt: skip


def train(folder, flags):
    """The metrics of a run of the trainer, and what every rank must have the same."""
    from protoclip.config import build_parser, parse
    from protoclip.data.loader import EpochOrder
    from protoclip.model import build_model
    from protoclip.schedule import make_plan
    from protoclip.step import seed_everything
    from protoclip.train import Setup, Trainer, open_teacher, open_training_data

    cpu = torch.device("cpu")
    distributed.start(find_rank(), cpu, 60)

    def trainer_for(more):
        config = parse(build_parser("train", ""), arguments(folder, *more))
        data = open_training_data(config)
        seed_everything(0)
        model = build_model(config.model)
        plan, order = make_plan(config, len(data)), EpochOrder(data, config.data)
        setup = Setup(config, plan, data, order, cpu, "fp32", open_teacher(config, data, cpu)[0])
        return Trainer(setup, model, Recorder(folder))

    out = []
    for more in flags:
        trainer = trainer_for(more)
        trainer.run()
        model, recorder = trainer.model, trainer.folder
        if "--save-every" in more:
            payload = distributed.from_main(lambda kept=recorder.kept: kept)
            again = trainer_for(more)
            again.restore(payload)
            done = again.step
            again.run()
            assert stripped(again.folder.lines) == stripped(recorder.lines[done:])
        state = [p.detach().double().sum().item() for p in model.parameters()]
        state += [b.double().sum().item() for b in model.buffers()]
        episode = trainer.episode
        for item in episode.sets if episode else ():
            state += [item.prototypes.sum().item(), item.clustering.labels.sum().item()]
        out.append((recorder.lines, state))
    distributed.stop()
    return out


class ExactLoss:
    """InfoNCE and prototype terms in the dtype of the features; fp64 stays fp64."""

    def __call__(self, encoded, projected, index, logit_scale, proto_scale, episode, measure):
        from protoclip.losses import Losses, global_info_nce, prototype_term

        unit = Encoded(F.normalize(encoded.image, dim=1), F.normalize(encoded.text, dim=1))
        terms = {
            "contrastive_loss": global_info_nce(unit.image, unit.text, logit_scale),
            "proto_loss": prototype_term(
                vars(unit),
                index,
                episode.internal,
                proto_scale,
                over_ranks=distributed.is_distributed(),
            )[0],
        }
        return Losses(sum(terms.values()), terms, {})


def gradients(folder, passes):
    """fp64 loss and gradients of one step, for each number of passes that the batch is cut into."""
    from protoclip.config import ModelConfig, OptimConfig
    from protoclip.data import Batch
    from protoclip.model import build_model
    from protoclip.prototypes import Clustering, Episode, PrototypeSet
    from protoclip.schedule import Plan, own_draws
    from protoclip.step import Stepper

    distributed.start(find_rank(), torch.device("cpu"), 60)
    torch.manual_seed(0)
    model = build_model(ModelConfig(model=str(folder / "tiny.json"))).double()
    pixels = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
    tokens = torch.randint(1, 49000, (BATCH, 12))
    sets = []
    for source, student in (("text", "image"), ("image", "text")):
        labels = torch.randint(6, (BATCH,))
        labels[::5] = -100  # ranks have unequal numbers of samples with a label
        tables = [torch.randn(6, 16, dtype=torch.float64) for _ in range(2)]
        clustering = Clustering(tables[0], labels, torch.ones(6))
        sets.append(PrototypeSet(source, student, clustering, *tables, False))
    stepper = Stepper(model, ExactLoss(), OptimConfig(grad_clip_norm=0))
    own, _ = own_draws(Plan(BATCH, BATCH, 1, 1, 1), torch.arange(BATCH))
    found = []
    for number in passes:
        parts = [Batch(i, pixels[i], tokens[i]) for i in own.chunk(number)]
        step = stepper.step(0, parts, Episode(tuple(sets)), project=False, lr=0.0)
        loss = distributed.mean_over_ranks(step.losses.total.detach().clone())
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        embedding = grads.pop("clip.token_embedding.weight")
        flat = [embedding[tokens.unique()], *grads.values()]
        found.append((loss.item(), sorted(grads), torch.cat([g.flatten() for g in flat]).numpy()))
    distributed.stop()
    return found


@pytest.fixture(scope="module")
def exact(folder):
    return on_ranks(1, gradients, folder, [1])[0][0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_and_passes_give_the_exact_gradients(folder, exact, ranks):
    loss, names, grads = exact
    assert "clip.logit_scale" in names and "logit_scale_proto" in names
    for results in on_ranks(ranks, gradients, folder, [1, 2]):
        for value, reached, got in results:
            assert abs(value - loss) <= 1e-12 * loss
            assert reached == names
            assert np.abs(got - grads).max() <= 1e-12 * np.abs(grads).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    (path / "tiny.json").write_text(json.dumps(TINY))
    np.save(path / "teacher.npy", np.random.default_rng(0).normal(size=(52, 5)).astype("f4"))
    return path


EXTRACT = ["--episode-features", "extract"]
REUSE = ["--episode-features", "reuse"]


@pytest.fixture(scope="module")
def alone(folder):
    """The metrics of one rank with features by extract, and by reuse."""
    size = ["--batch-size", str(BATCH)]
    return [
        lines for lines, _ in on_ranks(1, train, folder, [[*size, *EXTRACT], [*size, *REUSE]])[0]
    ]


def assert_same_losses(lines, alone):
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, want in zip(lines, alone, strict=True):
        for name in ("loss", "contrastive_loss", "proto_loss", "external_loss", "image_inertia"):
            assert (name in line) == (name in want)
            if name in want:
                # Of unit rows the inertia is a small difference: 1e-6 is their rounding.
                bound = {"rel": 3e-4, "abs": 1e-6 if name == "image_inertia" else 0.0}
                assert line[name] == pytest.approx(want[name], **bound), (name, line["step"])
        assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=3e-3)
    assert "external_loss" in alone[-1] and "image_inertia" in {k for r in alone for k in r}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_and_passes_gives_the_losses_of_one(folder, alone, ranks):
    size = ["--batch-size", str(BATCH // ranks)]
    flags = [[*size, *EXTRACT], [*size, *REUSE]] if ranks > 1 else []
    if ranks <= 2:
        passes = ["--batch-size", str(BATCH // ranks // 3), "--accum-freq", "3"]
        flags += [[*passes, *EXTRACT], [*passes, *REUSE]]
    if ranks == 3:
        flags[1] += ["--save-every", "3steps"]
        flags.append([*size, "--method", "clip"])
    found = on_ranks(ranks, train, folder, flags)
    for number, more in enumerate(flags):
        lines, state = found[0][number]
        if "--method" not in more:
            assert_same_losses(lines, alone["reuse" in more])
        for other in found:  # rank by rank the same weights, statistics, prototypes and labels
            assert other[number][1] == state
            assert len(other[number][0]) == STEPS
