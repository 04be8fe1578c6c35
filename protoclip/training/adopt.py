"""``--resume`` of a run that OpenCLIP's trainer began: a new run that starts where it stands."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protoclip import checkpoint
from protoclip.config import TrainConfig
from protoclip.model import ProtoModel, register_configs
from protoclip.openclip_runs import adamw_states, run_preprocess
from protoclip.training.plan import Plan

if TYPE_CHECKING:
    from protoclip.training.loop import Trainer


@dataclass(frozen=True)
class OpenClipRun:
    """A checkpoint of OpenCLIP's trainer, and the epochs that it is after."""

    file: Path
    epochs: int

    def settings(self, config: TrainConfig) -> TrainConfig:
        """The config of a run that starts from its weights."""
        model = dataclasses.replace(config.model, pretrained=str(self.file))
        return dataclasses.replace(config, model=model)

    def prepare(self, model: ProtoModel, config: TrainConfig) -> None:
        """Let the model take pictures as the run prepared them."""
        name = register_configs(config.model.model)
        model.prepare_as(run_preprocess(self.file, model.clip.visual, name))

    def step(self, plan: Plan) -> int:
        """Steps of the plan that its epochs stand for.

        Raises:
            ValueError: the plan ends there.
        """
        step = self.epochs * plan.steps_per_epoch
        if step >= plan.total_steps:
            raise ValueError(
                f"--resume: {self.file} is after epoch {self.epochs}, step {step}, and this run "
                f"ends at step {plan.total_steps}; give --epochs the epochs of both together, or "
                "start from its weights by --pretrained"
            )
        return step


def is_openclips(payload: dict[str, Any]) -> bool:
    """Whether OpenCLIP's trainer wrote a checkpoint at the end of an epoch."""
    return "protoclip" not in payload and {"epoch", "state_dict", "optimizer"} <= set(payload)


def adopt(trainer: Trainer, run: OpenClipRun) -> str:
    """Let a new trainer, whose model has the weights, go on after the run's epochs.

    Returns:
        What was taken and what starts anew, in a sentence.
    """
    payload = checkpoint.load(run.file)
    clip, optimiser = trainer.model.clip, trainer.optimiser
    parameters = dict(clip.named_parameters())
    states = adamw_states(payload, parameters)
    if states:
        own = [p for group in optimiser.adamw.param_groups for p in group["params"]]
        number = {id(parameter): i for i, parameter in enumerate(own)}
        filled = {
            number[id(parameter)]: states[name]
            for name, parameter in parameters.items()
            if name in states and id(parameter) in number
        }
        state = {**optimiser.adamw.state_dict(), "state": filled}
        optimiser.load_state(state, payload.get("scaler") or {})
    trainer.step = run.step(trainer.plan)
    taken = "weights and AdamW's moments" if states else "weights"
    anew = ["the order of the data"]
    if not states:
        anew.insert(0, "the optimiser, whose state is not AdamW's of these parameters")
    if trainer.model.image_head is not None:
        anew.append("projection heads and prototypes")
    return (
        f"resumed from OpenCLIP's {run.file}: {taken}, epoch {run.epochs}, so step {trainer.step} "
        f"of {trainer.plan.total_steps} with its learning rate; anew: {', '.join(anew)}"
    )
