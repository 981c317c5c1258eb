"""Loads a trained model from its run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mim.core.errors import setting_error
from mim.model import MaskedImageModel, build_model
from mim.model.backbones import misfit_of, resize_positions
from mim.training import checkpoint
from mim.training.runtime.machine import pick_device


def load(
    path: str | Path,
    trust: bool = False,
    *,
    image_size: int | tuple[int, int] | None = None,
    device: str = "cpu",
) -> MaskedImageModel:
    """Loads the model of a run folder or of one of its checkpoints, in eval mode.

    Args:
        path: a run folder, or ``RUN/checkpoints/step_N.pt``.
        trust: whether plug-ins of a run folder from elsewhere may run.
        image_size: side of the images in pixels, or (height, width), where it differs from the
            run's; position embeddings are interpolated (bicubic).
        device: auto, cpu, cuda, cuda:1 or mps.

    Raises:
        UserError: if there is no run or no checkpoint there.
    """
    path = Path(path)
    run = path if path.is_dir() else path.parent.parent
    config, state = checkpoint.read_config(run, trust), checkpoint.model_state(path)
    model = build_model(config)
    if image_size is not None:
        small, config = model, replace(config, data=replace(config.data, image_size=image_size))
        model = build_model(config)
        own = model.state_dict()
        small.load_state_dict(state)
        for part in ("backbone", "teacher.encoder")[: 1 + (model.teacher is not None)]:
            moved = resize_positions(small.get_submodule(part), model.get_submodule(part))
            state |= {f"{part}.{key}": value for key, value in moved.items()}
        # Those of a decoder are fixed, by its grid.
        fixed = "decoder.pos_embed"
        state |= {fixed: own[fixed]} if fixed in own else {}
        if misfit := misfit_of(state, own):
            reason = f"cannot differ from that of the run: {misfit}"
            raise setting_error("image_size", image_size, reason)
    model.load_state_dict(state)
    return model.eval().to(pick_device(device, "device"))
