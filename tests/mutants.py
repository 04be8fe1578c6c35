"""Changes one thing at a time: does a test notice it?

    python -m tests.mutants [--out FILE] [--only "a family, or part of a name"]

A mutant is planted in a copy of the working tree with a cache of compiled code of its own, and the
tests of its family run until the first one fails, once they have all passed in a copy without it.
Each row of the table is written when it is known, and a later call does those that are missing. A
survivor is a missing test, an equivalent change or code that nobody needs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 3600  # seconds for the tests of a mutant
# The files of tests that reach a family of code, in the order in which they run: those that notice
# most first, Triton's interpreter last.
TESTS = {
    "contrastive": (
        *("ops", "contrastive", "info_nce", "backends", "default_dtype", "stash"),
        *("ops_compile", "contrastive_peers", "faults_fuzz_ops"),
        *("distributed_losses", "kernels_contrastive", "kernels_info_nce"),
    ),
    "prototypes": (
        *("ops", "prototype_cross_entropy", "prototype_cpu", "backends"),
        *("default_dtype", "ops_compile", "faults_fuzz_ops", "kernels_prototype"),
    ),
    "clusters": (
        *("ops", "segment_mean", "kmeans_assign", "kmeans", "backends", "kmeans_quality"),
        *("faults_fuzz_ops", "estimator"),
    ),
    "kmeans": (
        *("kmeans", "kmeans_quality", "estimator", "kmeans_on_disk", "kmeans_sklearn"),
        "distributed_losses",
    ),
    "bounds": ("kmeans_bounds",),
    "ranks": ("distributed_losses", "clip_loss", "openclip_proto_loss"),
    "training": ("train_plan", "step", "checkpoint", "loop"),
    "runs": ("checkpoint", "run_folder", "resume"),
    "model": ("model", "step"),
    "heads": ("heads",),
    "data": ("selection", "data_files", "data_folders", "data_batches"),
    "encode": ("encode",),
    "cluster": ("cluster", "cluster_pictures"),
    "curate": ("curate", "curate_command"),
    "evaluate": ("metrics", "evaluate_data", "evaluate"),
    "report": ("compare_statistics", "compare"),
    "compare": ("compare",),
    "export": ("openclip_export",),
}


# Words in the names of a family's tests: those that ask these ops come first in their file.
OPS = {
    "contrastive": ("info_nce", "contrastive", "nt_xent", "sup_con", "sigmoid_loss"),
    "prototypes": ("prototype", "soft_targets"),
    "clusters": ("kmeans", "segment_mean"),
}

# Once, before the process forks.
IMPORTED = (
    "torch",
    "triton",
    "hypothesis",
    "open_clip",
    "sentence_transformers",
    "sklearn.cluster",
)
IMPORTED += ("pytorch_metric_learning.losses", "faiss", "torch._dynamo")


class Mutant(NamedTuple):
    name: str
    family: str  # of TESTS
    path: str
    old: str  # once in the file
    new: str
    # The file, and a word of their names, of the tests that are likely to notice it, where those
    # are not the first.
    first: str = ""

    def tests(self) -> list[str]:
        """The files of tests, in order."""
        first = self.first.partition("::")[0]
        names = [name for name in TESTS[self.family] if name != first]
        if first:
            names.insert(0, first)
        if self.path.startswith("csrc/"):  # which Triton does not call
            names = [name for name in names if not name.startswith("kernels_")]
        paths = [next((ROOT / "tests").rglob(f"test_{name}.py")) for name in names]
        return [str(path.relative_to(ROOT)) for path in paths]

    def words(self) -> tuple[str, ...]:
        """Words in the names of the tests that come first in their file."""
        word = self.first.partition("::")[2]
        return (word,) if word else OPS.get(self.family, ())

    def fits(self, tree: Path) -> bool:
        """Whether what it changes is in the tree."""
        path = tree / self.path
        return path.is_file() and path.read_text().count(self.old) == 1


PROTOTYPES = "protoclip/ops/prototypes.py"
OPERATORS = "protoclip/ops/operators.py"
SUMS = "protoclip/ops/sums.py"
PAIRS = "protoclip/ops/pairs.py"
CONTRASTIVE = "protoclip/ops/contrastive_losses.py"
SOFTMAX = "protoclip/ops/softmax.py"
COLUMNS = "protoclip/ops/columns.py"
SIGLIP = "protoclip/ops/siglip_loss.py"
CLUSTERING = "protoclip/lloyd/clustering.py"
LLOYD = "protoclip/lloyd/loop.py"
SLICES = "protoclip/lloyd/slices.py"
STARTS = "protoclip/lloyd/starts.py"
REASSIGN = "csrc/kmeans_reassign_cpu.cpp"
MUTANTS = [
    # ---- the ops
    Mutant(
        "prototypes: the gradient of a mean is not divided",
        "prototypes",
        PROTOTYPES,
        "weight = (weight / saved.divisor)",
        "weight = weight",
    ),
    Mutant(
        "prototypes: smoothing moves the mean below soft targets",
        "prototypes",
        PROTOTYPES,
        "mean = mean.detach()",
        "mean = mean",
    ),
    Mutant(
        "prototypes: the mean of the reference divides by N",
        "prototypes",
        PROTOTYPES,
        "count = (bank.labels != LEFT_OUT).sum()",
        "count = (bank.labels != 2 * LEFT_OUT).sum()",
    ),
    Mutant(
        "soft targets: temperatures below the coldest",
        "prototypes",
        PROTOTYPES,
        "temperature=max(float(temperature), COLDEST)",
        "temperature=float(temperature)",
        first="faults_fuzz_ops::soft_targets",
    ),
    Mutant(
        "a half sum counts whole",
        "contrastive",
        OPERATORS,
        "weight = 0.5 if both_directions else 1.0",
        "weight = 1.0",
    ),
    Mutant(
        "rows without a loss count in a weighted mean",
        "contrastive",
        OPERATORS,
        "row_weights = counted * weights",
        "row_weights = weights",
    ),
    Mutant(
        "the scale's gradient keeps another shape",
        "contrastive",
        OPERATORS,
        "return gradient.to(scalar.dtype).reshape(scalar.shape)",
        "return gradient.to(scalar.dtype)",
        first="ops::one_element",
    ),
    Mutant(
        "smoothing forgets how many own negatives there are",
        "contrastive",
        SUMS,
        "num_seen = num_seen + negative_logits.shape[1]",
        "num_seen = num_seen + 0 * negative_logits.shape[1]",
    ),
    Mutant(
        "SigLIP's smoothing counts the bias of positives once",
        "contrastive",
        SUMS,
        "2 * (positive + bias * num_positives)",
        "(2 * positive + bias * num_positives)",
    ),
    Mutant(
        "smoothing takes the first keys for the own ones",
        "contrastive",
        SUMS,
        "y[pairs.offset : pairs.offset + x.shape[0]]",
        "y[: x.shape[0]]",
        first="distributed_losses",
    ),
    Mutant(
        "several positives: the mean moves the other way",
        "contrastive",
        SUMS,
        "loss = loss_per_query + (positive_mean - all_mean)",
        "loss = loss_per_query - (positive_mean - all_mean)",
    ),
    Mutant(
        "keys that share both ids count twice",
        "contrastive",
        SUMS,
        "+ self._of_code(query_ids[1], key_ids[1]) - in_both",
        "+ self._of_code(query_ids[1], key_ids[1])",
    ),
    Mutant(
        "sums count an own key that is excluded",
        "contrastive",
        SUMS,
        "self._own = self._own.where(self._own != pairs.exclude[:, None], -1)",
        "self._own = self._own + 0",
        first="distributed_losses",
    ),
    Mutant(
        "sums count a key that is excluded and has the query's id twice",
        "contrastive",
        SUMS,
        "return seen - self._at(exclude.where(~of_same_id(pairs, exclude), -1))",
        "return seen - self._at(exclude)",
        first="distributed_losses",
    ),
    Mutant(
        "the position after the last key is in range",
        "contrastive",
        PAIRS,
        "inside = (positives >= 0) & (positives < m)",
        "inside = (positives >= 0) & (positives <= m)",
        first="ops::bad_input",
    ),
    Mutant(
        "the excluded position after the last key is in range",
        "contrastive",
        PAIRS,
        "beyond = exclude >= m",
        "beyond = exclude > m",
        first="ops::bad_input",
    ),
    Mutant(
        "a positive that is named twice counts twice",
        "contrastive",
        PAIRS,
        "valid = (own_keys >= 0) & ~repeated",
        "valid = own_keys >= 0",
    ),
    Mutant(
        "an id that no key has is the next larger one",
        "contrastive",
        PAIRS,
        "query_codes = position.where(ordered.gather(1, position) == columns, -1)",
        "query_codes = position",
    ),
    Mutant(
        "biases reach the kernels' own number for what is not seen",
        "contrastive",
        PAIRS,
        "LEAST_BIAS = -5e29",
        "LEAST_BIAS = -3e38",
        first="contrastive::finite_bias",
    ),
    Mutant(
        "nt_xent: weights go by pairs of views",
        "contrastive",
        CONTRASTIVE,
        "weights = torch.cat([weights, weights])",
        "weights = weights.repeat_interleave(2)",
    ),
    Mutant(
        "nt_xent: decoupled smoothing keeps the whole target",
        "contrastive",
        CONTRASTIVE,
        "(1 - label_smoothing) * positive.mean",
        "positive.mean",
    ),
    Mutant(
        "sup_con: unknown labels are a class",
        "contrastive",
        CONTRASTIVE,
        "labels = labels.where(labels != checks.LEFT_OUT, itself + torch.iinfo(torch.int64).min)",
        "labels = labels + 0",
    ),
    Mutant(
        "contrastive: own negatives are dropped without other options",
        "contrastive",
        SOFTMAX,
        "all_count = pairs.plain and negatives is None and",
        "all_count = pairs.plain and",
    ),
    Mutant(
        "info_nce: smoothing looks one way",
        "contrastive",
        CONTRASTIVE,
        "(by_image + by_text) / 2",
        "by_image",
    ),
    Mutant(
        "info_nce: the reference under autocast",
        "contrastive",
        CONTRASTIVE,
        "with without_autocast(x.device.type):\n            losses = reference.contrastive(",
        "if True:\n            losses = reference.contrastive(",
        first="ops::autocast",
    ),
    Mutant(
        "contrastive: the mean positive has no gradient",
        "contrastive",
        SOFTMAX,
        "positive_mean_weight=grads.positive_mean",
        "positive_mean_weight=None",
    ),
    Mutant(
        "contrastive: a query without a position has a loss by its id",
        "contrastive",
        SOFTMAX,
        "counted = counted & ~pairs.left_out",
        "counted = counted & True",
    ),
    Mutant(
        "contrastive: a position out of range has a finite gradient",
        "contrastive",
        SOFTMAX,
        "loss = loss * torch.ones_like(loss).masked_fill(out_of_range, torch.nan)",
        "loss = loss.masked_fill(out_of_range, torch.nan)",
        first="contrastive",
    ),
    Mutant(
        "SigLIP: sums of half precision overflow",
        "contrastive",
        SIGLIP,
        "if x.dtype == torch.float16:  # the fused op",
        "if x.dtype == torch.complex64:  # the fused op",
        first="clip_loss::fp16",
    ),
    Mutant(
        "SigLIP: every strip has the ids of the first",
        "contrastive",
        SIGLIP,
        "else pairs.query_ids[:, rows]",
        "else pairs.query_ids[:, : len(pairs.query_ids[0, rows])]",
    ),
    Mutant(
        "SigLIP: smooths by less",
        "contrastive",
        SIGLIP,
        "label_smoothing / 2 * (signed",
        "label_smoothing / 2.2 * (signed",
    ),
    Mutant(
        "SigLIP: weights are forgotten",
        "contrastive",
        SIGLIP,
        "torch.ones_like(losses), weights, reduction, columns)",
        "torch.ones_like(losses), None, reduction, columns)",
    ),
    Mutant(
        "SigLIP: a mean over texts",
        "contrastive",
        SIGLIP,
        "return losses / max(n, 1)",
        "return losses / max(m, 1)",
    ),
    Mutant(
        "an exported graph keeps a stash of its first size",
        "contrastive",
        "protoclip/ops/stash.py",
        "return wanted and not torch.compiler.is_exporting()",
        "return wanted",
        first="ops_compile",
    ),
    Mutant(
        "a scale of zero is refused",
        "contrastive",
        "protoclip/ops/checks.py",
        "if -math.inf < number < 0:",
        "if -math.inf < number < 0 or (number == 0 and isinstance(x, float)):",
        first="ops::any_number",
    ),
    Mutant(
        "mixed dtypes take the first",
        "contrastive",
        "protoclip/ops/checks.py",
        "return functools.reduce(torch.promote_types, (x.dtype for x in tensors))",
        "return dtype",
        first="ops::mixed_dtypes",
    ),
    Mutant(
        "transforms run fused backends",
        "contrastive",
        "protoclip/ops/dispatch.py",
        'if backend != "reference" and in_transform():',
        'if backend == "none" and in_transform():',
        first="ops::transforms",
    ),
    Mutant(
        "distances of the reference are those of half precision",
        "clusters",
        "protoclip/ops/reference.py",
        "(x_square - 2 * x @ c.T + c_square)",
        "(x_square - 2 * x.half().to(x) @ c.half().to(x).T + c_square)",
    ),
    Mutant(
        "segment means of the reference are those of positive labels",
        "clusters",
        "protoclip/ops/reference.py",
        "order = order[(labels < 0).sum() :]",
        "order = order[(labels <= 0).sum() :]",
    ),
    # ---- losses over ranks
    Mutant(
        "over ranks: sums of columns are added as they are",
        "ranks",
        COLUMNS,
        "exponentials * torch.exp2(reference - top)",
        "exponentials",
    ),
    Mutant(
        "over ranks: a mean divides by this rank's weight",
        "ranks",
        SOFTMAX,
        "return reduce_weighted(losses, counted, weights, reduction, strip.columns)",
        "return reduce_weighted(losses, counted, weights, reduction)",
    ),
    Mutant(
        "over ranks: the ring's ids go the other way",
        "ranks",
        SIGLIP,
        "owner = (columns.rank + hop) % columns.size",
        "owner = (columns.rank - hop) % columns.size",
    ),
    Mutant(
        "over ranks: query i's own key is key i of rank 0",
        "ranks",
        PAIRS,
        "offset = offset + columns.first(m)",
        "offset = offset + 0",
    ),
    # ---- k-means
    Mutant(
        "k-means: the last state is returned",
        "kmeans",
        LLOYD,
        "best if best and best.inertia < last.inertia else last",
        "last",
    ),
    Mutant(
        "k-means: equal weights count as 1",
        "kmeans",
        CLUSTERING,
        "rows.weight = float(first)",
        "rows.weight = 1.0",
    ),
    Mutant(
        "k-means: empty clusters move to copies of one point",
        "kmeans",
        LLOYD,
        "squared = torch.minimum(squared, (points - points[taken]).square().sum(1))",
        "squared = squared.index_fill(0, torch.tensor(taken), 0)",
    ),
    Mutant(
        "k-means: the variance over ranks is that within them",
        "kmeans",
        SLICES,
        "rows.sum(self.spread + apart)",
        "rows.sum(self.spread)",
    ),
    Mutant(
        "k-means: the smaller half of a split cluster grows too",
        "kmeans",
        LLOYD,
        "centroids * (2 - step)",
        "centroids * step",
    ),
    Mutant(
        "k-means++: candidates drawn earlier are kept always",
        "kmeans",
        STARTS,
        "is_kept = (now >= self.luck[first:] * start) & ((now > 0) | (start == 0))",
        "is_kept = (now > 0) | (start == 0)",
    ),
    # ---- k-means that computes what may have changed
    Mutant(
        "bounds: rounded down too little",
        "bounds",
        REASSIGN,
        "std::min(distance * scale_ * kBelow, kMostBound)",
        "std::min(distance * scale_ * kBelow + 1, kMostBound)",
    ),
    Mutant(
        "bounds: a centroid's move lowers those of another group",
        "bounds",
        REASSIGN,
        "(it < rest ? alone : together)[group_of(it->second)]",
        "(it < rest ? alone : together)[it->second / (span * kColumns)]",
    ),
    Mutant(
        "bounds: of equal distances that of the lowest slot",
        "bounds",
        REASSIGN,
        "if (block.is_nearer(row, now, candidate)) {",
        "if (block.is_nearer(row, now, first + i)) {",
    ),
    Mutant(
        "bounds: that of a group stays after a jump",
        "bounds",
        REASSIGN,
        "larger(fallen_by(moves.alone), int8::load(apart + g) * scale_ - limit)",
        "bound",
    ),
    Mutant(
        "bounds: the point's distance to its own centroid is forgotten after a jump",
        "bounds",
        REASSIGN,
        "int8::load(apart + g) * scale_ - limit)",
        "int8::load(apart + g) * scale_)",
    ),
    Mutant(
        "bounds: that of an own centroid's group is lost with it",
        "bounds",
        REASSIGN,
        "        bounds.lower_to(moves.group_of(loser), from_below(block.rounding, lost));",
        "        (void)lost;",
    ),
    Mutant(
        "bounds: of centroids whose distances are all measured",
        "bounds",
        "protoclip/ops/clusters.py",
        "row.runs_kmeans and num_clusters * columns > row.most_measured",
        "row.runs_kmeans",
    ),
    # ---- C++
    Mutant(
        "C++: the positive's weight of another column",
        "contrastive",
        "csrc/contrastive_losses_cpu.cpp",
        "by_column.positive_weight.get()[row + pairs.offset];",
        "by_column.positive_weight.get()[row];",
        first="distributed_losses::ranks",
    ),
    Mutant(
        "C++: biases have the gradient of the last rows",
        "contrastive",
        "csrc/contrastive_losses_cpu.cpp",
        "dkey_bias[tile.column + j] += bias_sums[j];",
        "dkey_bias[tile.column + j] = bias_sums[j];",
    ),
    Mutant(
        "C++: SigLIP counts a lane past the last column",
        "contrastive",
        "csrc/contrastive_losses_cpu.cpp",
        "for (int64_t lane = tile.columns - j; lane < kLanes; ++lane) dot[lane]",
        "for (int64_t lane = tile.columns - j + 1; lane < kLanes; ++lane) dot[lane]",
    ),
    Mutant(
        "C++: keys that are excluded are seen",
        "contrastive",
        "csrc/pairs.h",
        "(same & same_unseen & ~is_own) | (lanes == exclude)",
        "(same & same_unseen & ~is_own)",
    ),
    Mutant(
        "C++: biases are in nats",
        "contrastive",
        "csrc/pairs.h",
        "key_bias_.get()[j] *= kLog2E;",
        "key_bias_.get()[j] *= 1;",
    ),
    Mutant(
        "C++: prototypes divide by N",
        "prototypes",
        "csrc/prototypes_cpu.cpp",
        "divisor = labels.ne(kLeftOut).sum()",
        "divisor = labels.ne(2 * kLeftOut).sum()",
    ),
    Mutant(
        "C++: the first prototype of a tile is no label",
        "prototypes",
        "csrc/prototypes_cpu.cpp",
        "if (hard && 0 <= label && label < tile.columns) g[label]",
        "if (hard && 0 < label && label < tile.columns) g[label]",
    ),
    Mutant(
        "C++: a non-finite feature without a label is hidden",
        "prototypes",
        "csrc/prototypes_cpu.cpp",
        "const auto zero = static_cast<float>(0. * state.logits);",
        "const float zero = 0.f;",
        first="prototype_cpu::non_finite",
    ),
    Mutant(
        "C++: long segments are summed in fp32",
        "clusters",
        "csrc/segment_mean_cpu.cpp",
        "std::vector<double> total(d);",
        "std::vector<float> total(d);",
        first="segment_mean::bits",
    ),
    Mutant(
        "C++: a segment of one whole piece is left out",
        "clusters",
        "csrc/segment_mean_cpu.cpp",
        "      if (size(i) > kPiece) continue;",
        "      if (size(i) >= kPiece) continue;",
    ),
    Mutant(
        "C++: an iteration's inertia forgets the weights",
        "clusters",
        "csrc/kmeans_iteration_cpu.cpp",
        "at::sum(weights ? at::mul(squared, *weights) : squared)",
        "at::sum(squared)",
        first="kmeans",
    ),
    Mutant(
        "C++: joined groups of keys keep one group's values",
        "prototypes",
        "csrc/prototype_attention.h",
        "acc[e] = acc[e] * factors.mine + other[e] * factors.other;",
        "acc[e] = acc[e] * factors.mine + other[e] * factors.mine;",
    ),
    # ---- outside the ops: what a maintainer might do in a hurry
    Mutant(
        "every epoch has the same order",
        "training",
        "protoclip/training/schedule.py",
        "generator(seed, DRAWS, epoch)",
        "generator(seed, DRAWS, 0)",
        first="train_plan::order",
    ),
    Mutant(
        "with replacement no sample comes twice",
        "training",
        "protoclip/training/schedule.py",
        "        if replacement:\n",
        "        if not replacement:\n",
        first="train_plan::replacement",
    ),
    Mutant(
        "the episode of a line in the log is one high",
        "training",
        "protoclip/training/log.py",
        "(step - 1) // plan.steps_per_episode",
        "step // plan.steps_per_episode",
        first="step::bad_step",
    ),
    Mutant(
        "a skipped step moves the weights",
        "training",
        "protoclip/training/update.py",
        "        elif finite:\n",
        "        else:\n",
        first="step::bad_step",
    ),
    Mutant(
        "fp16: gradients are clipped while they are scaled",
        "training",
        "protoclip/training/update.py",
        "        self.scaler.unscale_(self.adamw)\n",
        "",
        first="step::clipped",
    ),
    Mutant(
        "a resumed run takes rate and decay of the saved one",
        "training",
        "protoclip/training/optimiser.py",
        '"param_groups": groups}',
        '"param_groups": saved["param_groups"]}',
        first="step::own_rate",
    ),
    Mutant(
        "a power cut after the rename loses the checkpoint",
        "runs",
        "protoclip/common/sealed.py",
        "        os.fsync(file.fileno())\n",
        "",
        first="run_folder::power_cut",
    ),
    Mutant(
        "a power cut loses lines of steps that a checkpoint has",
        "runs",
        "protoclip/runs/run_folder.py",
        "os.fsync(self._metrics.fileno())",
        "self._metrics.flush()",
        first="run_folder::power_cut",
    ),
    Mutant(
        "a reader sees half of a new file",
        "runs",
        "protoclip/common/files.py",
        "        yield temporary\n        os.replace(temporary, path)",
        "        yield temporary\n        path.write_bytes(temporary.read_bytes())",
        first="checkpoint::reads",
    ),
    Mutant(
        "epoch 9 is newer than epoch 10",
        "runs",
        "protoclip/runs/checkpoint.py",
        "key=lambda path: int(path.stem[6:])",
        "key=lambda path: path.stem",
        first="checkpoint::tenth",
    ),
    Mutant(
        "the newest checkpoint is lost when a run continues from another",
        "runs",
        "protoclip/runs/checkpoint.py",
        "            os.replace(latest, folder / PREVIOUS)",
        "            pass",
        first="checkpoint::older",
    ),
    Mutant(
        "a multiplier falls below 1",
        "model",
        "protoclip/model.py",
        "self.clip.logit_scale.clamp_(0, MAX_LOG_SCALE)",
        "self.clip.logit_scale.clamp_(max=MAX_LOG_SCALE)",
        first="model::multipliers",
    ),
    Mutant(
        "the multiplier of the prototypes falls below 1",
        "model",
        "protoclip/model.py",
        "self.proto_log_scale.clamp_(0, MAX_LOG_SCALE)",
        "self.proto_log_scale.clamp_(max=MAX_LOG_SCALE)",
        first="model::multipliers",
    ),
    Mutant(
        "heads do not centre rows",
        "heads",
        "protoclip/heads.py",
        "rows.float() - self.mean",
        "rows.float()",
    ),
    Mutant(
        "blocks of heads forget their input",
        "heads",
        "protoclip/heads.py",
        "return x + self.narrow(",
        "return self.narrow(",
        first="heads::adds_nothing",
    ),
    Mutant(
        "a selection of one row too many is an IndexError",
        "data",
        "protoclip/data/selection.py",
        "positions.max(initial=0) >= count:",
        "positions.max(initial=0) > count:",
        first="selection::other_data",
    ),
    Mutant(
        "part 10 is sorted before part 2",
        "encode",
        "protoclip/encode/folder.py",
        'f"{number:0{digits}}"',
        'f"{number}"',
        first="encode::sort_names",
    ),
    Mutant(
        "a text teacher reads the first caption only",
        "encode",
        "protoclip/encode/folder.py",
        "teacher_text(super().captions(i))",
        "super().captions(i)[0]",
        first="encode::one_text",
    ),
    Mutant(
        "without a clear number there are half as many groups",
        "cluster",
        "protoclip/cluster/groups.py",
        "math.sqrt(len(rows) / 2)",
        "math.sqrt(len(rows)) / 2",
        first="cluster::root",
    ),
    Mutant(
        "the nearest row has rank 0",
        "cluster",
        "protoclip/cluster/groups.py",
        "- starts + 1",
        "- starts",
        first="cluster::rank",
    ),
    Mutant(
        "members of a group are in the order of the data",
        "cluster",
        "protoclip/cluster/groups.py",
        "np.lexsort((squared.numpy(), labels.numpy()))",
        'np.argsort(labels.numpy(), kind="stable")',
        first="cluster::rank",
    ),
    Mutant(
        "closest chooses at random",
        "curate",
        "protoclip/curate/sampling.py",
        'if choose == "closest":',
        'if choose == "nearest":',
        first="curate::closest",
    ),
    Mutant(
        "clusters that have more give nothing for those that have less",
        "curate",
        "protoclip/curate/sampling.py",
        "return torch.minimum(sizes, cut[parents])",
        "return cut[parents]",
        first="curate::shares",
    ),
    Mutant(
        "pairs of a row with itself count in uniformity",
        "evaluate",
        "protoclip/evaluate/metrics.py",
        "squared[:, start : start + step].fill_diagonal_",
        "squared[:, :step].fill_diagonal_",
        first="metrics::itself",
    ),
    Mutant(
        "classes that no sample has lower the mean recall",
        "evaluate",
        "protoclip/evaluate/metrics.py",
        "(size > 0).sum()",
        "len(size)",
        first="metrics::no_sample",
    ),
    Mutant(
        "a probe is chosen on what it was fitted to",
        "evaluate",
        "protoclip/evaluate/metrics.py",
        "    judge, train = order",
        "    train, judge = order",
        first="metrics::judged",
    ),
    Mutant(
        "five of three classes are right",
        "evaluate",
        "protoclip/evaluate/metrics.py",
        "if num_classes >= 5 else",
        "if num_classes >= 3 else",
        first="metrics::nothing",
    ),
    Mutant(
        "a probe is trained on the pictures of its test",
        "evaluate",
        "protoclip/evaluate/datasets.py",
        "chosen not in (root, train) and",
        "chosen != root and",
        first="evaluate_data::probe_is",
    ),
    Mutant(
        "scores from before a run are those of other data",
        "evaluate",
        "protoclip/evaluate/during.py",
        "if saved.data != self.data:",
        "if saved.data != saved.data:",
        first="evaluate::before_a_run",
    ),
    Mutant(
        "the spread of seeds is that of all of them",
        "report",
        "protoclip/report/statistics.py",
        "differences.std(-1, ddof=1)",
        "differences.std(-1, ddof=0)",
    ),
    Mutant(
        "a corrected p may be below that of a smaller one",
        "report",
        "protoclip/report/statistics.py",
        "np.maximum.accumulate(scaled, axis=-1)",
        "scaled",
    ),
    Mutant(
        "runs on different pictures are compared",
        "report",
        "protoclip/report/comparison.py",
        "            sentence = different\n",
        "            values[score] = (sides[0], sides[1])\n",
        first="compare::different_pictures",
    ),
    Mutant(
        "a run that has no scores has finished",
        "compare",
        "protoclip/compare.py",
        "return outcome if outcome.trained else None",
        "return outcome",
        first="compare::without_scores",
    ),
    Mutant(
        "the length of the context is that of the preset",
        "export",
        "protoclip/export.py",
        'model_cfg["text_cfg"]["context_length"] = config.force_context_length',
        "pass",
        first="openclip_export::context",
    ),
    Mutant(
        "the bias of SigLIP is not in the exported config",
        "export",
        "protoclip/export.py",
        'model_cfg["init_logit_bias"] = 0.0',
        "pass",
        first="openclip_export::siglip",
    ),
]


def copy_of_the_tree(folder: Path) -> None:
    """The files that git knows, and those that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for package in ("kernels", "csrc"):  # else an editable install has those of the original
        (folder / "protoclip" / package).symlink_to(folder / package)


def compile_once(arguments: list[str]) -> int:
    """g++, with objects kept by what they are made of: most mutants change one of eight."""
    if "-c" not in arguments:
        return subprocess.run(["g++", *arguments]).returncode
    source = next(Path(word) for word in arguments if word.endswith(".cpp"))
    target = Path(arguments[arguments.index("-o") + 1])
    parts = [source]
    for part in parts:
        for name in re.findall(r'#include "(\w+\.h)"', part.read_text()):
            if (header := source.with_name(name)).exists() and header not in parts:
                parts.append(header)
    made_of = [part.read_bytes() for part in parts]
    if b"TORCH_EXTENSION_NAME" in made_of[0]:  # the library's, in which the hash of all sources is
        made_of += [word.encode() for word in arguments if "TORCH_EXTENSION_NAME" in word]
    digest = hashlib.sha256(b"".join(made_of)).hexdigest()
    kept = Path(os.environ["PROTOCLIP_CACHE"], "objects", f"{source.stem}-{digest}.o")
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        if code := subprocess.run(["g++", *arguments]).returncode:
            return code
        shutil.copy2(target, kept)
    shutil.copyfile(kept, target)
    return 0


class Outcome(NamedTuple):
    verdict: str  # "dies", "hangs", "survives" or what is wrong with the mutant
    noticed_by: str = ""


def outcome(mutant: Mutant, tree: Path, cache: Path) -> Outcome:
    if not mutant.fits(tree):
        return Outcome("not once in its file")
    path = tree / mutant.path
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        return run(tree, cache, mutant.tests(), mutant.words())
    finally:
        path.write_text(original)


def run(tree: Path, cache: Path, files: Sequence[str], ops: Sequence[str]) -> Outcome:
    """Whether a test in one of the files fails, and which: in a fork, which has torch already."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        os.setsid()
        os.environ.update(CXX=str(cache / "g++"), PROTOCLIP_CACHE=str(cache), OMP_NUM_THREADS="1")
        os.chdir(tree)
        sys.path[:0] = [str(tree), str(tree / "tests")]
        os.environ["PYTHONPATH"] = f"{tree}:{tree / 'tests'}"  # of processes that tests start
        sys.dont_write_bytecode = True  # two versions of a file may have one size and second
        for descriptor in (1, 2):
            os.dup2(os.open(cache / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        os.write(sender, noticed_by(files, ops).encode())
        os._exit(0)
    os.close(sender)
    ready, _, _ = select.select([receiver], [], [], LIMIT)
    answer = os.read(receiver, 1000).decode() if ready else "hangs"
    os.close(receiver)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also the ranks that it has started
    os.waitpid(child, 0)
    if answer.startswith("no mutant: "):
        return Outcome("is no mutant", answer.removeprefix("no mutant: "))
    return Outcome("survives") if answer == "nothing" else Outcome("dies", answer or "a crash")


def noticed_by(files: Sequence[str], ops: Sequence[str]) -> str:
    """The first test that fails; those of ``ops`` come first, Triton's interpreter comes last."""
    import protoclip

    if reason := protoclip.backends("info_nce")["cpu"]:
        return f"no mutant: {reason}"
    first = FirstFailure(ops)
    code = pytest.main(["-x", "--tb=short", *files], plugins=[first])
    return (first.name or f"exit code {int(code)}") if code else "nothing"


class FirstFailure:
    """A plugin of pytest that notes the name of the first test that fails."""

    def __init__(self, ops: Sequence[str]) -> None:
        self.ops = ops
        self.name = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = list(dict.fromkeys(item.path for item in items))

        def place(item: pytest.Item) -> tuple[int, bool, bool]:
            asks_them = any(op in item.name for op in self.ops)
            return files.index(item.path), not asks_them, "triton" in item.name

        items.sort(key=place)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.removeprefix("tests/")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.name:
            self.name = f"{report.nodeid} cannot be imported"


def rows_of(table: Path) -> dict[str, str]:
    """Name of a mutant -> the row that says what became of it."""
    rows = table.read_text().splitlines()[2:] if table.exists() else []
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def write_row(table: Path, name: str, outcome: Outcome, started: float) -> None:
    noticed_by = outcome.noticed_by.replace("|", "/").replace("\n", " ")
    seconds = time.monotonic() - started
    with table.open("a") as rows:
        rows.write(f"| {name} | {outcome.verdict} | {noticed_by} | {seconds:.0f} |\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.md")
    parser.add_argument("--only", default="", help="a family, or part of a mutant's name")
    asked = parser.parse_args(argv)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    if not asked.out.exists():
        asked.out.write_text("| Mutant | Verdict | Noticed by | Seconds |\n|---|---|---|---|\n")
    wanted = [m for m in MUTANTS if asked.only == m.family or asked.only in m.name]
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for module in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        cache = asked.out.parent.resolve() / "mutants-cache"  # compiles each mutant of C++ once
        copy_of_the_tree(tree)
        cache.mkdir(exist_ok=True)
        compiler = cache / "g++"
        compiler.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} compile "$@"\n')
        compiler.chmod(0o755)
        for mutant in wanted:
            if mutant.name in rows_of(asked.out):
                continue
            for file in mutant.tests():
                if (unchanged := f"nothing, {file}") not in rows_of(asked.out):
                    started = time.monotonic()
                    passed, failed = run(tree, cache, [file], ())
                    if passed != "survives":
                        sys.exit(f"without a mutant {failed} fails, see {cache / 'log'}")
                    write_row(asked.out, unchanged, Outcome("passes"), started)
            started = time.monotonic()
            write_row(asked.out, mutant.name, outcome(mutant, tree, cache), started)
    rows = [rows_of(asked.out)[mutant.name] for mutant in wanted]
    alive = [row for row in rows if " | dies | " not in row and " | hangs | " not in row]
    print(*alive, f"{len(rows)} mutants, {len(alive)} alive: {asked.out}", sep="\n")
    return int(bool(alive))


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        sys.exit(compile_once(sys.argv[2:]))
    sys.exit(main())
